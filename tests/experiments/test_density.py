"""The command `density`: shares of the labels' gain, the table, and the whole of it on runs that know nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.experiments.cli import main
from foveate.experiments.density import recovered, table_rows
from foveate.inference.checkpoint import Run, save
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
    assert (out / "table.md").read_text(encoding="utf-8") in capsys.readouterr().out
