"""Runs on disk: what is saved is loaded, what is damaged is named, and a crash leaves one whole run."""

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.inference import checkpoint
from foveate.inference.checkpoint import FORMAT, Run, atomic_file, load, save, write_json
from foveate.inference.guide import GazeGuide
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer, GatedLayer, contrast_groups
from foveate.model.density import EllipticalDensity
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.rbm import BernoulliRBM

FILES = {"config.json", "model.safetensors", "guide.safetensors", "log.jsonl"}


def density(nu: float) -> EllipticalDensity:
    """A density whose axes are not the coordinates', built from its parts: a decomposition would take longer."""
    made = EllipticalDensity.blank(575)
    made.mean.normal_()
    made.axes.copy_(torch.linalg.qr(torch.randn(575, 575))[0])
    made.variances.uniform_(0.1, 2.0)
    made.nu.fill_(nu)
    return made


def test_a_run_whose_model_sees_edges_comes_back_the_same(tmp_path: Path) -> None:
    run = make_run(edges=EdgeOdds(torch.randn(968), torch.tensor(1.5), torch.randn(968, 33), torch.randn(33)))
    save(run, tmp_path / "run")
    found = load(tmp_path / "run")
    assert_equal(run, found)
    patch = torch.rand(3, 24, 24)
    assert torch.equal(found.model.log_odds(patch), run.model.log_odds(patch))
    assert not torch.equal(found.model.log_odds(patch), make_run().model.log_odds(patch))


def make_run(seed: int = 0, layer: str = "gated", clutter: bool = True, **options: Any) -> Run:
    torch.manual_seed(seed)
    first = DiagonalLayer(6) if layer == "diagonal" else GatedLayer(3, 3, 4, contrast_groups())
    dbn = DeepBeliefNet(first, BernoulliRBM(6, 4), density(8.0))
    dbn.set_log_z(12.5, 0.25)
    model = AttentionModel(dbn, ClutterModel(density(5.0)) if clutter else None, **options)
    guide = GazeGuide(width=8)
    for parameter in [*model.parameters(), *guide.parameters()]:
        with torch.no_grad():
            parameter.normal_()
    return Run(model, guide, {"seed": seed, "steps": [1, 2], "figures": {"accuracy": 0.75}})


def assert_equal(first: Run, second: Run) -> None:
    assert first.config == second.config
    assert first.model.config == second.model.config
    assert first.model.dbn.config == second.model.dbn.config
    assert first.guide.config == second.guide.config
    for one, other in ((first.model, second.model), (first.guide, second.guide)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            assert tensor.dtype == states[1][name].dtype, name
            torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on disk that tests copy and damage."""
    path = tmp_path_factory.mktemp("runs") / "faces"
    save(make_run(), path, [{"step": 1, "loss": 0.5}])
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    path = tmp_path / "faces"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": "diagonal"},
        {"clutter": False},
        {"noise": 0.5, "temperature": 3.0, "gaze_prior": "flat", "prior_options": {"largest": 1.2}},
        {"aperture": 7.5},
    ],
    ids=["gated", "diagonal", "without clutter", "other settings", "aperture"],
)
def test_what_is_saved_is_loaded_unchanged(tmp_path: Path, options: dict[str, Any]) -> None:
    run = make_run(**options)
    save(run, tmp_path / "deep" / "run")
    assert {file.name for file in (tmp_path / "deep" / "run").iterdir()} == FILES
    found = load(str(tmp_path / "deep" / "run"))
    assert_equal(run, found)
    assert not found.model.training
    assert not found.guide.training


def test_a_run_from_before_the_aperture_is_read_and_has_none(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    form = {name: value for name, value in config["model"].items() if name != "aperture"}
    edit(copy / "config.json", format=2, model=form)
    found = load(copy)
    assert found.model.aperture is None
    assert found.config == config["settings"]
    save(found, copy)
    assert json.loads((copy / "config.json").read_text(encoding="utf-8"))["format"] == FORMAT


def test_a_loaded_model_scores_a_patch_as_the_saved_one(saved: Path) -> None:
    run, found = make_run(), load(saved)
    patch = torch.rand(5, 24, 24)
    torch.testing.assert_close(found.model.log_odds(patch), run.model.log_odds(patch), rtol=0, atol=0)
    y = torch.randn(5, 575)
    torch.testing.assert_close(found.model.dbn.log_prob_bound(y), run.model.dbn.log_prob_bound(y), rtol=0, atol=0)
    window = torch.rand(2, 48, 48)
    expected = run.guide.eval()(window, patch[:2])
    for one, other in zip(found.guide(window, patch[:2]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_run_in_double_precision_stays_so(tmp_path: Path) -> None:
    run = make_run()
    run.model.double()
    save(run, tmp_path / "run")
    found = load(tmp_path / "run")
    assert found.model.dbn.core.mean.dtype == torch.float64
    assert_equal(run, found)


def test_loaded_parameters_can_be_trained_on(saved: Path) -> None:
    run = load(saved)
    assert all(parameter.requires_grad for parameter in run.guide.parameters())
    assert all(parameter.requires_grad for parameter in run.model.dbn.layer.parameters())


def test_the_files_are_json_and_one_object_a_line(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["format"] == FORMAT
    assert config["settings"]["figures"] == {"accuracy": 0.75}
    lines = (saved / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}]


def test_numbers_that_json_does_not_know_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"loss": math.nan, "rows": [1, math.inf, (2.5, "ü")]})
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"loss": None, "rows": [1, None, [2.5, "ü"]]}


def test_saving_again_replaces_the_run_and_keeps_its_log_and_foreign_files(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    other = make_run(seed=1, layer="diagonal")
    save(other, copy)
    assert_equal(load(copy), other)
    assert (copy / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert json.loads((copy / "log.jsonl").read_text(encoding="utf-8")) == {"step": 1, "loss": 0.5}
    save(other, copy, [{"step": 2}])
    assert json.loads((copy / "log.jsonl").read_text(encoding="utf-8")) == {"step": 2}
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save(make_run(), tmp_path / "run")
    load(tmp_path / "run")


def test_a_folder_that_is_no_run_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "config.json").write_text('{"of": "another program"}', encoding="utf-8")
    with pytest.raises(InputError, match="choose another folder"):
        save(make_run(), folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="is a file"):
        save(make_run(), tmp_path / "file")


def test_a_config_that_json_cannot_hold_changes_nothing(copy: Path) -> None:
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    run = make_run(seed=1)
    with pytest.raises(InputError, match=r"config\.json: .*Tensor"):
        save(Run(run.model, run.guide, {"loss": torch.zeros(())}), copy)
    with pytest.raises(InputError, match=r"log\.jsonl: "):
        save(run, copy, [{"path": Path("x")}])
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


class Crash(BaseException):
    """Stands for the end of the process: no handler of the code under test may catch it."""


@pytest.mark.parametrize("step", ["a tensor file", "moving the old run away", "moving the new run in"])
def test_a_crash_at_any_moment_leaves_the_old_run_whole(
    saved: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        if step == "a tensor file":

            def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
                Path(path).write_bytes(b"half of it")
                raise Crash

            patch.setattr(checkpoint, "save_file", half)
        else:
            rename, renamed = os.rename, []

            def die(old: Path, new: Path) -> None:
                renamed.append(new)
                if len(renamed) == (1 if step == "moving the old run away" else 2):
                    raise Crash
                rename(old, new)

            patch.setattr(os, "rename", die)
        with pytest.raises(Crash):
            save(make_run(seed=1), copy)
    assert_equal(load(copy), load(saved))
    after = make_run(seed=2)
    save(after, copy)
    assert_equal(load(copy), after)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_crash_after_the_new_run_is_in_place_leaves_the_new_one(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    new = make_run(seed=1)

    def die(target: Path, previous: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_finish_replacing", die)
        with pytest.raises(Crash):
            save(new, copy)
    assert_equal(load(copy), new)
    save(new, copy)
    assert (copy / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_loading_says_that_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such run; make one with `foveate train"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is no run: it has no config\.json"):
        load(tmp_path / "empty")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"is a file, and a run is a folder"):
        load(tmp_path / "file")


def edit(path: Path, **changes: Any) -> None:
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    ("found", "remedy"),
    [(FORMAT + 1, "install a newer foveate"), (0, "train the run again"), ("x", "train the run again")],
)
def test_a_run_of_another_format_names_the_remedy(copy: Path, found: Any, remedy: str) -> None:
    edit(copy / "config.json", format=found)
    with pytest.raises(InputError, match=rf"config\.json: the run has format {found!r} and .* {FORMAT}; {remedy}"):
        load(copy)


def test_a_config_that_is_not_a_runs_is_refused(copy: Path) -> None:
    edit(copy / "config.json", guide=None)
    with pytest.raises(InputError, match=r"config\.json: the entry 'guide' is missing"):
        load(copy)
    edit(copy / "config.json", format=None)
    with pytest.raises(InputError, match="names no format"):
        load(copy)
    (copy / "config.json").write_text('{"format": 1, ', encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("guide", {"width": -5}),
        ("settings", []),
        ("settings", {"coverage_factor": None}),  # what JSON makes of a number that is none
        ("settings", {"coverage_factor": -1.0}),
        ("model", {"noise": -1.0}),
        ("model", {"noise": "loud"}),
        ("model", {"noise": float("inf")}),
        ("model", {"temperature": 0.0}),
        ("model", {"aperture": 0.1}),
        ("model", {"aperture": "wide"}),
        ("model", {"prior_options": {"rotation_sd": -0.2}}),
        ("model", {"prior_options": {"rotation_sd": None}}),
        ("model", {"prior_options": {"largest": 1.2}}),
        ("model", {"prior_options": 3}),
    ],
)
def test_entries_of_a_config_that_mean_nothing_are_told_with_the_file(copy: Path, part: str, changed: Any) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    edit(copy / "config.json", **{part: {**config[part], **changed} if isinstance(changed, dict) else changed})
    with pytest.raises(InputError, match=r"(?s)config\.json: an entry .* of the wrong kind; train or"):
        load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "guide.safetensors"])
def test_a_tensor_file_that_is_absent_or_cut_short_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing"):
        load(copy)


def test_tensors_that_do_not_fit_are_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "dbn.layer.shift"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"tensor {name} is missing"),
        ({**tensors, name: torch.zeros(2, 2)}, rf"tensor {name} has shape \(2, 2\) where config.json asks for shape"),
        ({**tensors, "other": torch.zeros(1)}, r"tensor other .* asks for no such tensor"),
        (
            {**tensors, name: torch.full_like(tensors[name], math.nan)},
            f"tensor {name} holds values that are not numbers",
        ),
    ):
        save_file(changed, path)
        with pytest.raises(InputError, match=message):
            load(copy)


def test_the_two_halves_of_different_runs_are_told_apart(copy: Path, tmp_path: Path) -> None:
    save(make_run(layer="diagonal"), tmp_path / "other")
    (copy / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"model\.safetensors: tensor dbn\.layer\.\w+ is missing"):
        load(copy)


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "made" / "table.csv"
    with atomic_file(target) as partial:
        partial.write_text("a,b\n", encoding="utf-8")
        assert partial.suffix == ".csv"
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "a,b\n"
    with pytest.raises(Crash), atomic_file(target) as partial:
        partial.write_text("half", encoding="utf-8")
        raise Crash
    assert target.read_text(encoding="utf-8") == "a,b\n"
    assert [path.name for path in target.parent.iterdir()] == ["table.csv"]


def test_loading_leaves_the_random_numbers_of_others_alone(saved: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load(saved)
    assert torch.equal(torch.rand(4), wanted)


def test_settings_given_as_tensors_are_saved_as_numbers(saved: Path, tmp_path: Path) -> None:
    run = load(saved)
    run.model.noise, run.model.temperature = cast(Any, torch.tensor(0.5)), cast(Any, np.float32(2.0))
    save(run, tmp_path / "again")
    assert (load(tmp_path / "again").model.noise, load(tmp_path / "again").model.temperature) == (0.5, 2.0)


def test_nothing_is_flushed_that_may_only_be_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = pytest.importorskip("fcntl", reason="tells what Windows would refuse, on other systems")

    def windows(descriptor: int) -> None:
        if flags.fcntl(descriptor, flags.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "fsync", windows)
    save(load(saved), tmp_path / "run")
    write_json(tmp_path / "results.json", {"one": 1})
