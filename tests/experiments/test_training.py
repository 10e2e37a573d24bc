"""The command `train`, broken off and resumed."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from foveate.data import orl_clutter, orl_scenes
from foveate.experiments.cli import main

# The package's function `fit` hides the module of the same name.
fitting = importlib.import_module("foveate.inference.fit")


def test_training_that_was_interrupted_is_resumed_to_the_same_guide(
    tmp_path: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ((96, 120),)
    scenes = orl_scenes("train", 14, sizes=small)
    monkeypatch.setattr("foveate.data.Scenes.from_specs", lambda specs, seed: scenes)
    monkeypatch.setattr(
        "foveate.experiments.training.default_clutter", lambda spec, seed: orl_clutter("train", 2, sizes=small)
    )
    steps = ["--glance-steps", "3", "--look-steps", "3", "--dbn-steps", "2"]

    def train(out: str, *more: str) -> int:
        return main(["train", "--data", "orl", "--out", str(tmp_path / out), *steps, *threads, *more])

    assert train("whole") == 0
    learn_prior: Any = fitting.train_dbn

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "train_dbn", interrupted)
    assert train("run") == 130
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "run.training"}
    capsys.readouterr()
    assert train("run") == 2
    assert "go on with --resume, or remove that folder" in capsys.readouterr().err
    monkeypatch.setattr(fitting, "train_dbn", learn_prior)
    assert train("run", "--resume", "--seed", "1") == 2
    assert "settings differ" in capsys.readouterr().err
    # The guide's stages are done: they must not begin again.
    monkeypatch.setattr("foveate.inference.guide_training._descend", lambda *a: pytest.fail("trained again"))
    assert train("run", "--resume") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "run"}
    for name in ("guide.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "run")
    ]
    assert [{**entry, "seconds": 0} for entry in logs[0]] == [{**entry, "seconds": 0} for entry in logs[1]]
    assert sorted(entry["seconds"] for entry in logs[1]) == [entry["seconds"] for entry in logs[1]]
