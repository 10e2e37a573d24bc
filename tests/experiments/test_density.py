"""The command `density`: shares of the labels' gain, the table, and the whole of it on runs that know nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data import Scenes
from foveate.experiments import density
from foveate.experiments.cli import main
from foveate.experiments.density import Density, recovered, table_rows
from foveate.inference.checkpoint import Run, load, save
from foveate.inference.guide import GazeGuide
from foveate.model import AttentionModel, ClutterModel, DeepBeliefNet


def _score(bound: float, accuracy: float, iou: float) -> dict[str, Any]:
    return {
        "bound_nats": bound,
        "bound_nats_se": 2.0,
        "bound_gaussian": 7.0,
        "log_z": 50.0,
        "log_z_se": 0.01,
        "accuracy": accuracy,
        "mean_iou": iou,
    }


SCORES = {
    "before": {"a": _score(85.0, 0.7, 0.5), "b": _score(100.0, 0.9, 0.8)},
    "after": {"a": _score(387.0, 0.9, 0.6), "b": _score(90.0, 0.9, 0.7)},
    "with labels": {"a": _score(503.0, 0.9, 0.7), "b": _score(95.0, 1.0, 0.9)},
}


def test_what_is_recovered_is_a_share_of_what_labels_would_have_gained() -> None:
    shares = recovered(SCORES, "a")
    # The figures that Tang et al. report: 302 of 418 nats.
    assert shares["bound_nats"] == pytest.approx(302 / 418)
    assert shares["accuracy"] == pytest.approx(1.0)
    assert shares["mean_iou"] == pytest.approx(0.5)
    # Where labels gained nothing there is no share; what was lost is negative.
    assert recovered(SCORES, "b")["bound_nats"] is None
    assert recovered(SCORES, "b")["mean_iou"] == pytest.approx(-1.0)


def test_the_table_has_a_column_for_each_set_of_scenes_and_ends_with_the_shares() -> None:
    rows = {row[0]: row[1:] for row in table_rows(SCORES)}
    assert rows["before: bound, nats"] == ["85.0 ± 2.0", "100.0 ± 2.0"]
    assert rows["after: log Z, nats"] == ["50.00 ± 0.01"] * 2
    assert rows["share of the labels' gain in nats"] == ["72 %", "labels gain nothing"]
    without = table_rows({name: SCORES[name] for name in ("before", "after")})
    assert len(without) == 10


def test_every_figure_of_the_table_stands_in_the_row_that_names_it() -> None:
    scores = {name: {"b": SCORES[name]["b"]} for name in SCORES}
    rows = [row for row in table_rows(scores) if row[0].startswith(("with labels", "share"))]
    assert rows == [
        ["with labels: bound, nats", "95.0 ± 2.0"],
        ["with labels: one Gaussian on the same crops, nats", "7.0"],
        ["with labels: log Z, nats", "50.00 ± 0.01"],
        ["with labels: accuracy (IoU > 0.5)", "1.000"],
        ["with labels: mean IoU", "0.900"],
        ["share of the labels' gain in nats", "labels gain nothing"],
        ["share of the labels' gain in accuracy", "0 %"],
        ["share of the labels' gain in mean IoU", "-100 %"],
    ]


def test_each_run_is_scored_under_its_own_name(
    tmp_path: Path, blank_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are told apart by their log Z; of what labels gain, 70 nats, learning without them gains 7."""
    run = load(blank_run)
    for name, log_z in (("old", 100.0), ("new", 107.0), ("labelled", 170.0)):
        run.model.dbn.set_log_z(log_z, 0.0)
        save(run, tmp_path / name)

    def told(run: Run, scenes: Scenes, **how_much: Any) -> tuple[dict[str, Any], None]:
        log_z = float(run.model.dbn.log_z)
        figures = {**_score(log_z, log_z / 200, 0.5), "scenes": len(scenes), "bound_student_t": 0.0, "log_z": log_z}
        return figures, None

    monkeypatch.setattr(density, "evaluate", told)
    scenes = Scenes.from_pictures([torch.rand(40, 40)], gazes=torch.tensor([[1.0, 0.0, 20.0, 20.0]]))
    monkeypatch.setattr(density.Scenes, "from_spec", classmethod(lambda cls, spec, **_: scenes))
    places = {"before": tmp_path / "old", "after": tmp_path / "new", "labelled": tmp_path / "labelled"}
    Density(**places, data=("orl@test",), out=tmp_path / "out", samples=1).run()
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    found = {name: scores["orl@test"]["log_z"] for name, scores in results["scores"].items()}
    assert found == {"before": 100.0, "after": 107.0, "with labels": 170.0}
    assert results["runs"] == dict(zip(found, map(str, places.values()), strict=True))
    # log Z is held in float32 or better, the shares in float64.
    expected = {"bound_nats": 0.1, "accuracy": 0.1, "mean_iou": None}
    assert results["recovered"]["orl@test"] == {
        name: None if share is None else pytest.approx(share, abs=1e-6) for name, share in expected.items()
    }


def test_the_command_writes_scores_table_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        dbn = DeepBeliefNet.from_config({"layer": "diagonal", "hidden": 6, "top": 4, "dimension": 575})
        dbn.set_log_z(10 * math.log(2), 0.0)
        save(Run(AttentionModel(dbn, ClutterModel.blank(575)), GazeGuide(8)), tmp_path / name)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(numbers.integers(0, 255, (30, 40), dtype=np.uint8)).save(pictures / f"{i}.png")
    (pictures / "gazes.csv").write_text("file,a,b,tx,ty\n0.png,1,0,20,15\n1.png,1,0,20,15\n", encoding="utf-8")
    out, data = tmp_path / "out", f"folder:{pictures}"
    quick = ["--chains", "1", "--draws", "3", "--warmup", "1", "--samples", "4", "--threads", "1"]
    words = ["density", "--before", str(tmp_path / "first"), "--after", str(tmp_path / "second"), "--out", str(out)]
    assert main([*words, *quick]) == 2
    assert "no SPEC was given" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--data", data, *quick]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["scores"].keys() == {"before", "after"}
    assert results["scores"]["after"][data]["scenes"] == 2
    assert results["recovered"] is None
    assert (out / "samples.png").is_file()
    assert (out / "results.md").read_text(encoding="utf-8") in capsys.readouterr().out
