"""The command `learn`: what it refuses, and that it ends the same after an interruption, with log and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.experiments import learning
from foveate.experiments.cli import main
from foveate.inference.checkpoint import Run, load
from foveate.inference.learn import Monitor

THREADS = ["--threads", "1"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 24 pictures without labels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(numbers.integers(0, 255, (30, 40), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def _learned(run: Run, scenes: object, clutter: object, *, checkpoint: Path, progress, each_round, **options) -> Run:
    """In place of `learn`: one round, told as it tells."""
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "plan.json").write_text("{}")
    if not options["resume"]:
        progress("looking, round 1", 1, 2, 0.5)
        raise KeyboardInterrupt
    monitor = Monitor(1, 20, 0.5, 0.6, 0.9, 0.1, 0.8, 12.0, True)
    progress("looking, round 1", 2, 2, 0.5)
    each_round(monitor, run)
    return Run(run.model, run.guide, {"learning": [monitor._asdict()]})


def test_interrupted_learning_is_kept_aside_and_resumed(
    tmp_path: Path,
    blank_run: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(learning, "learn", _learned)
    monkeypatch.setattr(learning, "default_clutter", lambda spec, seed: None)
    out = tmp_path / "out"
    words = ["learn", str(blank_run), "--data", f"folder:{pictures}", "--out", str(out), *THREADS]
    assert main(words) == 130
    assert not out.exists()
    assert learning.working_folder(out).is_dir()
    capsys.readouterr()
    # A line that the power went out in.
    with (learning.working_folder(out) / "log.jsonl").open("a") as log:
        log.write('{"seconds": 1.5, "sta')
    # It is neither thrown away nor mixed with a new beginning.
    assert main(words) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    told = capsys.readouterr()
    assert "round 1: learned from 20, presence 0.600, retained 0.900" in told.err
    assert not learning.working_folder(out).exists()
    assert (out / "prior_round_1.png").is_file()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    # The log begins before the interruption.
    assert [entry["stage"] for entry in log] == ["looking, round 1", "looking, round 1", "monitor"]
    assert log[-1]["retained"] == 0.9
    assert load(out).config["learning"][0]["learned_from"] == 20


def test_budgets_without_steps_and_missing_scenes_are_refused(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for words, message in (
        (["--data", "orl", "--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["--data", "folder:nowhere"], "nowhere: no such folder"),
        ([], "no SPEC was given"),
    ):
        assert main(["learn", str(blank_run), *words, "--out", out, *THREADS]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.learning").exists()


def test_labels_of_the_folder_do_not_reach_learning(
    tmp_path: Path, blank_run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A damaged label would stop whoever reads it.
    (pictures / "gazes.csv").write_text("file,a,b,tx,ty\n0.png,no,number,at,all\n", encoding="utf-8")
    seen: list[object] = []

    def watched(run: Run, scenes: object, *arguments: object, **options: object) -> Run:
        seen.append(scenes)
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "learn", watched)
    monkeypatch.setattr(learning, "default_clutter", lambda spec, seed: None)
    words = ["learn", str(blank_run), "--data", f"folder:{pictures}", "--out", str(tmp_path / "out"), *THREADS]
    assert main(words) == 130
    assert not hasattr(seen[0], "gazes")


def test_the_cells_of_a_monitor_are_its_figures() -> None:
    cells = learning.monitor_cells(Monitor(2, 31, 0.25, 0.5, 0.75, 0.125, 1.0, -3.25, False))
    assert cells == ["31", "0.500", "0.750", "0.125", "1.000", "-3.2", "no"]
