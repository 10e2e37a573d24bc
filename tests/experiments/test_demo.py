"""The demo: its photograph, and the whole of it with as little training as there can be."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.experiments.cli import main
from foveate.experiments.demo import astronaut
from foveate.experiments.training import unfinished_training
from foveate.inference.checkpoint import Run, load
from foveate.model import gaze as gazes


def test_the_astronauts_face_is_where_it_was_marked() -> None:
    scenes = astronaut()
    assert scenes.sizes.tolist() == [[512, 512]]
    assert scenes.gazes is not None
    parts = gazes.parts(scenes.gazes[0])
    # The face between the ears, as measured on the photograph; 10 px is a tenth of its width.
    assert torch.dist(parts.centre, torch.tensor([225.0, 117.0]).double()) < 10
    assert 24 * float(parts.scale) == pytest.approx(104, abs=10)
    assert abs(float(parts.rotation)) < 0.1


@pytest.mark.parametrize("after", ["training", "the run is saved"])
def test_a_demo_that_was_interrupted_goes_on_from_its_training(
    tmp_path: Path, blank_run: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    def trained(*arguments: Any, checkpoint: Path, resume: bool, **options: Any) -> Run:
        found.append(checkpoint.is_dir() and resume)
        checkpoint.mkdir(parents=True, exist_ok=True)
        return load(blank_run)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    found: list[bool] = []
    out = tmp_path / "demo"
    # What `fit` makes of its checkpoint is tested where `train` is.
    monkeypatch.setattr("foveate.experiments.training.fit", trained)
    place = {"training": "foveate.experiments.training.save", "the run is saved": "foveate.experiments.demo.evaluate"}
    monkeypatch.setattr(place[after], interrupted)
    words = ["demo", "--out", str(out), "--scenes", "14", "--clutter", "1", "--unseen", "1", *threads]
    assert main(words) == main(words) == 130
    assert found == [False, True]
    assert unfinished_training(out / "run").is_dir()
    assert (out / "run" / "config.json").is_file() == (after == "the run is saved")


def test_a_run_that_train_put_there_is_not_the_demos_to_replace(
    tmp_path: Path, blank_run: Path, threads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (blank_run / "model.safetensors").read_bytes()
    assert main(["demo", "--out", str(tmp_path), *threads]) == 2
    assert "holds other things than an earlier output" in capsys.readouterr().err
    assert (blank_run / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_the_demo_writes_a_run_scores_pictures_and_a_page_with_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    steps = ["--glance-steps", "3", "--look-steps", "3", "--dbn-steps", "4", "--draws", "8", "--warmup", "4"]
    few = ["--scenes", "14", "--clutter", "2", "--unseen", "2", "--threads", "1"]
    assert main(["demo", "--out", str(out), *few, *steps]) == 0
    assert {p.name for p in out.iterdir()} == {"run", "results.json", "report.html", "pictures"}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["scenes"] == 2
    assert results["astronaut"].keys() == {"found", "iou", "presence", "gaze"}
    pictures = {p.stem for p in (out / "pictures").iterdir()}
    assert pictures == {
        "legend", "scenes_1", "canonical", "iou_by_step", "astronaut", "astronaut_canonical", "prior"
    }  # fmt: skip
    page = (out / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == len(pictures) == page.count("<img")
    assert "ArviZ summary" in page
    assert "astronaut's face" in capsys.readouterr().out
