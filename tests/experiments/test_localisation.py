"""The first experiment: errors of the size asked for, labels compared, and the whole command on miniature scenes."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.experiments import localisation
from foveate.experiments.cli import main
from foveate.experiments.conventions import label_convention
from foveate.experiments.localisation import ERRORS, METHODS, Localisation, starts_off_by
from foveate.experiments.training import Budget
from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.model import AttentionModel, ClutterModel, DeepBeliefNet
from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid

SMALL = ((96, 120), (120, 96))


def _some_gazes(n: int) -> torch.Tensor:
    centre, scale = 100 + 50 * torch.rand(n, 2).double(), torch.exp(torch.randn(n).double())
    return gazes.from_parts(centre, scale, 0.3 * torch.randn(n).double())


@pytest.mark.parametrize(("kind", "size"), [(kind, float(size)) for kind, sizes in ERRORS.items() for size in sizes])
def test_a_start_is_off_by_one_error_of_the_size_asked_for_in_any_direction(kind: str, size: float) -> None:
    truth = _some_gazes(40)
    start = starts_off_by(truth, kind, size, torch.Generator().manual_seed(0))
    error = gazes.parts(gazes.compose(gazes.inverse(truth), start))
    wanted = {"offset": 0.0, "scale": 1.0, "rotation": 0.0} | {kind: size}
    # Float64 rounding of coordinates of some hundred pixels.
    torch.testing.assert_close(
        error.centre.norm(dim=-1) / 24, torch.full((40,), wanted["offset"], dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(error.scale, torch.full((40,), wanted["scale"], dtype=torch.float64), atol=1e-12, rtol=0)
    degrees = torch.rad2deg(error.rotation)
    torch.testing.assert_close(
        degrees.abs(), torch.full((40,), wanted["rotation"], dtype=torch.float64), atol=1e-9, rtol=0
    )
    if kind == "offset":
        assert bool((error.centre.amin(0) < 0).all()) and bool((error.centre.amax(0) > 0).all())
    if kind == "rotation":
        assert 0 < int((degrees > 0).sum()) < 40


def test_the_labels_own_similarity_is_found_among_failures_and_noise() -> None:
    convention = gazes.from_parts(
        torch.tensor([0.4, -1.1]).double(), torch.tensor(1.06).double(), torch.tensor(0.03).double()
    )
    found = _some_gazes(200)
    noise = gazes.LocalChart(found).to_gaze(torch.tensor([0.5, 0.5, 0.3, 0.3]) * torch.randn(200, 4).double())
    truth = gazes.compose(noise, convention)
    truth[::9, 2:] += 500.0  # the run looked elsewhere
    known = label_convention(found, truth)
    assert known is not None
    parts = gazes.parts(known)
    # 4 standard errors of a median of about 180, 1.25 sd / √180 each, in the units of the noise above.
    torch.testing.assert_close(parts.centre, torch.tensor([0.4, -1.1]).double(), atol=4 * 1.25 * 0.5 / 13, rtol=0)
    assert float(parts.scale.log()) == pytest.approx(math.log(1.06), abs=4 * 1.25 * 0.3 / 8 / 13)
    assert float(parts.rotation) == pytest.approx(0.03, abs=4 * 1.25 * 0.3 / 8 / 13)


def test_labels_are_not_compared_where_nothing_is_found() -> None:
    truth = _some_gazes(3)
    assert label_convention(truth + 900, truth) is None


@pytest.mark.parametrize(
    ("looks", "after"), [([0.1, 0.6, 0.895, 0.9, 0.9], 2), ([0.9, 0.9, 0.9], 0), ([0.9, 0.5, 0.9], 2)]
)
def test_looks_have_converged_once_they_stay_where_they_end(looks: list[float], after: int) -> None:
    assert localisation._converged_after(torch.tensor(looks)) == after


def _write(scenes: Scenes, folder: Path, split: str = "") -> list[str]:
    folder.mkdir(exist_ok=True)
    rows = []
    for scene in scenes:
        name = f"{scene.name}.png"
        Image.fromarray((scene.picture.numpy() * 255).round().astype(np.uint8)).save(folder / name)
        if scene.gaze is not None:
            rows.append(",".join([name, *map(str, scene.gaze.tolist()), split]))
    return rows


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where runs were trained; in place of training, a run of the right form that has learned nothing."""
    folders: list[Path] = []

    def untrained(
        scenes: Scenes,
        clutter: Scenes | None,
        out: Path,
        budget: Budget,
        seed: int,
        device: str,
        labels: dict[str, Any],
    ) -> Run:
        folders.append(out)
        dbn = DeepBeliefNet.from_config({"layer": "diagonal", "hidden": 6, "top": 4, "dimension": 575})
        dbn.set_log_z(10 * math.log(2), 0.0)
        config = {**dataclasses.asdict(budget), "seed": seed, "scenes": len(scenes), "coverage_factor": 1.5, **labels}
        torch.manual_seed(seed)
        run = Run(AttentionModel(dbn, ClutterModel.blank(575)), GazeGuide(4), config)
        save(run, out)
        return run

    monkeypatch.setattr(localisation, "fit_logged", untrained)
    return folders


@pytest.fixture
def command(tmp_path: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The whole experiment in miniature, two seeds."""
    monkeypatch.setattr(localisation, "LIGHT", {"chains": 1, "draws": 4, "warmup": 2})
    rows = _write(orl_scenes("train", 3, sizes=SMALL), tmp_path / "faces", "train")
    rows += _write(orl_scenes("test", 2, sizes=SMALL), tmp_path / "faces", "test")
    (tmp_path / "faces" / "gazes.csv").write_text("\n".join(["file,a,b,tx,ty,split", *rows]))
    _write(orl_clutter("train", 2, sizes=SMALL), tmp_path / "clutter")
    return [
        *("localisation", "--out", str(tmp_path / "out"), "--seeds", "2", "--starts", "1"),
        *("--train", f"folder:{tmp_path / 'faces'}@train", "--data", f"folder:{tmp_path / 'faces'}@test"),
        *("--clutter", f"folder:{tmp_path / 'clutter'}", "--empty", f"folder:{tmp_path / 'clutter'}"),
        *("--chains", "2", "--draws", "6", "--warmup", "2", *threads),
    ]


def test_collections_of_one_name_are_told_apart(tmp_path: Path) -> None:
    specs = []
    # Also in the names of files, where @ is not used.
    for place, name in (("a", "faces"), ("b", "faces"), ("b", "faces@test_2"), ("b", "others_test"), ("b", "others")):
        folder = tmp_path / place / name
        folder.parent.mkdir(exist_ok=True)
        rows = _write(orl_scenes("test", 1, sizes=SMALL), folder, "test")
        split = "@test" if name in ("faces", "others") else ""
        (folder / "gazes.csv").write_text("\n".join(["file,a,b,tx,ty,split", *rows]))
        specs.append(f"folder:{folder}{split}")
    found = localisation._collections(specs, 0)
    assert [collection.label for collection in found] == [
        *("faces@test", "faces@test_2", "faces@test_2_2", "others_test", "others@test_2")
    ]
    assert [collection.spec for collection in found] == specs


def test_the_experiment_scores_every_method_and_draws_every_figure(
    tmp_path: Path, command: list[str], trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    out = tmp_path / "out"
    assert trained == [out / "seed_0", out / "seed_1"]
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    (told,) = results["collections"]
    assert (told["label"], told["scenes"], results["seeds"]) == ("faces@test", 2, 2)
    assert list(told["methods"]) == list(METHODS)
    for name, scores in told["methods"].items():
        assert len(scores["accuracy"]["each"]) == (1 if name in ("haar", "correlation", "distance") else 2)
        assert 0 <= scores["mean_iou"]["mean"] <= 1
        assert scores["scenes_per_second"]["mean"] > 0
    windows = {name: scores["windows"]["mean"] for name, scores in told["methods"].items()}
    # A given start needs its looks alone, a whole scene also a glance and looks from every proposal, a sampler more.
    assert 4 <= windows["protocol_guide"] < windows["guide"] < windows["posterior"]
    assert windows["protocol_guide"] < windows["protocol_posterior"]
    assert len(told["robustness"]) == sum(map(len, ERRORS.values()))
    assert all(len(row["iou_by_look"]) == 9 for row in told["robustness"])
    assert len(told["protocol_iou_by_step"]) == 6
    (calibration,) = results["calibration"]
    assert 0 <= calibration["coverage"]["mean"] <= calibration["coverage_recalibrated"]["mean"] <= 1
    assert calibration["factor"]["each"] == [1.5, 1.5]
    presence = results["reliability"]["presence of the object"]
    assert sum(presence["count"]) == 2 * (2 + 2)  # seeds × (scenes + pictures without)
    drawn = {path.name for path in out.glob("*.png")}
    # What runs that have learned nothing fail at is on one sheet.
    failed = {"failures.png"} if told["failures"] else set()
    assert drawn == {"figure_4_faces_test.png", "figure_5_faces_test.png", "reliability.png"} | failed
    # What is not known, labels not being comparable with what these runs have learned, is not told.
    known = told["label_convention"] is not None
    assert ("coverage_re_expressed" in calibration) == known
    spec = f"folder:{tmp_path / 'faces'}@train"
    assert results["trained_on"] == [[spec], [spec]] and results["detectors_fitted_on"] == [spec]
    text = (out / "results.md").read_text()
    assert f"Trained on {spec}. Haar and templates fitted on {spec}. 2 runs" in text
    assert all(method in text for method in METHODS.values())
    assert METHODS["haar"] in capsys.readouterr().out


def test_runs_that_are_there_are_used_again_and_none_of_another_kind(
    tmp_path: Path, command: list[str], trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"folder:{tmp_path / 'faces'}@train"
    train = Scenes.from_spec(spec)
    experiment = Localisation(out=tmp_path / "out", seeds=1, clutter=f"folder:{tmp_path / 'clutter'}", train=(spec,))
    experiment._trained(train, {})
    two = dataclasses.replace(experiment, seeds=2)
    assert len(two._trained(train, {})) == 2
    assert trained == [tmp_path / "out" / "seed_0", tmp_path / "out" / "seed_1"]
    assert main([*command, "--look-steps", "3"]) == 2
    assert "this run has other look_steps than is asked for" in capsys.readouterr().err
    # As many scenes, but others; other clutter.
    for word, other in ((spec, spec.replace("faces", "people")), (f"folder:{tmp_path / 'clutter'}", "orl")):
        shutil.copytree(tmp_path / "faces", tmp_path / "people", dirs_exist_ok=True)
        place = command.index(word)
        assert main([*command[:place], other, *command[place + 1 :]]) == 2
        assert f"this run has other {'clutter' if other == 'orl' else 'trained_on'} than" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_before_any_work(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(command) == 2
    assert "holds other things" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_window_of_the_looks_counts_once_whichever_half_of_the_guide_looks_at_it() -> None:
    guide, pyramid = GazeGuide(4).eval(), Pyramid.build([torch.rand(60, 80)])
    gaze = torch.tensor([[1.0, 0.0, 40.0, 30.0]] * 3)
    with torch.no_grad(), localisation._counting(guide) as looked:
        guide.look(pyramid, gaze, torch.zeros(3, 24, 24), torch.zeros(3, dtype=torch.long))
        assert looked.total() == 3
        guide.recognise(pyramid, gaze, torch.zeros(3, dtype=torch.long), torch.zeros(3))
        assert looked.total() == 6
        guide.glance(torch.rand(1, 64, 40))
    assert looked.total() == 6 + 16 * 10
