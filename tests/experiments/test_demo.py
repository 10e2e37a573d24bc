"""The demo: its photograph, and the whole of it with as little training as there can be."""

import json
import re
from pathlib import Path

import pytest
import torch

from foveate.experiments.cli import main
from foveate.experiments.demo import astronaut
from foveate.experiments.training import unfinished_training
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


def test_an_output_with_unfinished_training_in_it_is_the_demos_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(scenes: object, clutter: object, out: Path, *arguments: object) -> None:
        training.append(unfinished_training(out).is_dir())
        unfinished_training(out).mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    training: list[bool] = []
    monkeypatch.setattr("foveate.experiments.demo.fit_logged", interrupted)
    words = ["demo", "--out", str(tmp_path / "demo"), "--scenes", "12", "--clutter", "1", "--unseen", "1"]
    assert main([*words, "--threads", "1"]) == main([*words, "--threads", "1"]) == 130
    assert training == [False, True], capsys.readouterr().err


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
