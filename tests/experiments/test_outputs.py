"""Outputs: what may be replaced and what is refused, and posteriors merged file by file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from foveate.experiments.figures import legend_figure
from foveate.experiments.outputs import (
    check_directory,
    check_json,
    check_picture,
    check_run,
    merge_netcdf,
    save_figure,
)
from foveate.inference.posterior import Posterior
from foveate.model import InputError


def _posterior(names: list[str], value: float) -> Posterior:
    n = len(names)
    return Posterior(
        gaze=torch.full((n, 2, 5, 4), value).double() + torch.rand(n, 2, 5, 4).double(),
        statistics={"lp": torch.randn(n, 2, 5), "diverging": torch.rand(n, 2, 5) < 0.5},
        modes=torch.rand(n, 3, 4).double(),
        weights=torch.rand(n, 3),
        presence=torch.rand(n),
        path=torch.rand(n, 6, 4).double(),
        canonical=torch.rand(n, 24, 24),
        canonical_draws=torch.rand(n, 2, 1, 24, 24),
        patch=torch.rand(n, 24, 24),
        names=names,
        hashes=[f"{i:016x}" for i in range(n)],
        sizes=torch.tensor([[60, 80]] * n),
        settings={"seed": 3},
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_posteriors_merged_as_files_equal_posteriors_concatenated(tmp_path: Path, parts: int) -> None:
    posteriors = [_posterior([f"{k}{c}ö" for c in "ab"[: 1 + k % 2]], float(k + 1)) for k in range(parts)]
    files = [tmp_path / f"{k}.nc" for k in range(parts)]
    for posterior, file in zip(posteriors, files, strict=True):
        posterior.save(file)
    merge_netcdf(files, tmp_path / "all.nc")
    merged, wanted = Posterior.load(tmp_path / "all.nc"), Posterior.concatenate(posteriors)
    assert merged.names == wanted.names
    assert merged.hashes == wanted.hashes
    assert merged.settings == {"seed": 3}
    for name in ("gaze", "modes", "weights", "presence", "path", "canonical", "canonical_draws", "patch", "sizes"):
        assert torch.equal(getattr(merged, name), getattr(wanted, name)), name
    for name, values in wanted.statistics.items():
        assert torch.equal(merged.statistics[name], values), name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["all.nc", *(f.name for f in files)])


def test_what_is_not_there_yet_may_be_written_wherever_a_folder_can_be_made(tmp_path: Path) -> None:
    check_json(tmp_path / "a" / "b" / "scores.json", "accuracy")
    check_picture(tmp_path / "a" / "p.png")
    check_directory(tmp_path / "a" / "b", {"posterior.nc": None})
    check_run(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_output_of_the_same_kind_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps({"accuracy": 1}))
    check_json(tmp_path / "scores.json", "accuracy")
    save_figure(legend_figure(3), tmp_path / "p.png")
    check_picture(tmp_path / "p.png")
    (tmp_path / "out").mkdir()
    marks = {"posterior.nc": None, "results.json": "scores"}
    check_directory(tmp_path / "out", marks)  # empty
    (tmp_path / "out" / "posterior.nc").touch()
    check_directory(tmp_path / "out", marks)
    (tmp_path / "out" / "posterior.nc").unlink()
    (tmp_path / "out" / "results.json").write_text(json.dumps({"scores": {}}))
    check_directory(tmp_path / "out", marks)


def _other_json(path: Path) -> None:
    path.write_text(json.dumps({"format": 1}))


def _photograph(path: Path) -> None:
    Image.new("L", (30, 30)).save(path)


def _folder_with_things(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def _folder_with_results(path: Path) -> None:
    """Of somebody else's program."""
    path.mkdir()
    _other_json(path / "results.json")


def _folder_with_results_and_a_run(path: Path) -> None:
    _folder_with_results(path)
    (path / "run").mkdir()


def _file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize(
    ("name", "make", "check", "message"),
    [
        ("config.json", _other_json, lambda p: check_json(p, "accuracy"), "no earlier output"),
        ("list.json", lambda p: p.write_text("3"), lambda p: check_json(p, "accuracy"), "no earlier output"),
        ("broken.json", _file, lambda p: check_json(p, "accuracy"), "no earlier output"),
        ("folder.json", _folder_with_things, lambda p: check_json(p, "accuracy"), "is a folder"),
        ("scores.txt", _file, lambda p: check_json(p, "accuracy"), ".json file"),
        ("holiday.png", _photograph, check_picture, "no earlier output"),
        ("broken.png", _file, check_picture, "no earlier output"),
        ("p.jpg", lambda p: None, check_picture, ".png file"),
        ("out", _folder_with_things, lambda p: check_directory(p, {"thesis.nc": None}), "other things"),
        (
            "out",
            _folder_with_results_and_a_run,
            lambda p: check_directory(p, {"results.json": "scores", "run": None}),
            "other things",
        ),
        ("out", _folder_with_results, lambda p: check_directory(p, {"results.json": "scores"}), "other things"),
        ("out", _file, lambda p: check_directory(p, {"thesis.nc": None}), "is a file"),
        ("run", _folder_with_things, check_run, "holds files but no run"),
        ("run", _file, check_run, "is a file"),
    ],
)
def test_anything_else_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str, make: Callable[[Path], object], check: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / name
    make(path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        check(path)
    assert str(path) in str(caught.value)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_run(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_json(tmp_path / "file" / "scores.json", "accuracy")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The administrator may write anywhere, so the refusal of the system is acted.
    monkeypatch.setattr("foveate.experiments.outputs.os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="may not be written"):
        check_run(tmp_path / "run")


def test_a_run_is_refused_where_the_folder_around_it_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("foveate.experiments.outputs.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match="may not be written"):
        check_run(tmp_path / "run")
    check_directory(tmp_path / "run", {"posterior.nc": None})


def test_a_run_is_not_put_where_saving_it_would_be_refused_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights of something else")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds files but no run"):
        check_run(tmp_path)
