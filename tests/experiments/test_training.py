"""The command `train`: broken off and resumed, and what it is taught."""

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.experiments.cli import main
from foveate.experiments.conventions import labelled_scenes
from foveate.experiments.learning import working_folder
from foveate.experiments.training import unfinished_training
from foveate.inference import prior_training
from foveate.inference.checkpoint import load
from foveate.model import gaze as gazes

# The package's function `fit` hides the module of the same name.
fitting = importlib.import_module("foveate.inference.fit")


def test_training_that_was_interrupted_is_resumed_to_the_same_guide(
    tmp_path: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ((96, 120),)
    scenes = orl_scenes("train", 20, sizes=small)
    parts = {"orl@train": scenes[:12], "orl@test": scenes[12:]}
    monkeypatch.setattr("foveate.data.Scenes.from_spec", lambda spec, seed: parts[spec])
    monkeypatch.setattr(
        "foveate.experiments.training.default_clutter", lambda spec, seed: orl_clutter("train", 2, sizes=small)
    )
    steps = ["--glance-steps", "3", "--look-steps", "3", "--dbn-steps", "2"]
    # What comes after the guide is begun anew in any case: a little of it is enough.
    monkeypatch.setattr(fitting, "fit_clutter", partial(fitting.fit_clutter, count=500))
    monkeypatch.setattr(fitting, "without_each_fold", lambda *given: iter(()))
    monkeypatch.setattr(fitting, "calibrated_factor", lambda *given: 1.0)
    monkeypatch.setattr(prior_training, "RADII", (3,))
    monkeypatch.setattr(prior_training, "STATIONARY", (0.3,))

    def train(out: str, *more: str) -> int:
        data = ["--data", "orl@train", "--data", "orl@test"]
        return main(["train", *data, "--out", str(tmp_path / out), *steps, *threads, *more])

    assert train("whole") == 0
    assert list(load(tmp_path / "whole").config["label_differences"]) == ["orl@test"]
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


def test_what_is_unfinished_lies_beside_the_run_wherever_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for out in (Path("."), Path("../run"), tmp_path / "run"):
        assert unfinished_training(out) == tmp_path / "run.training"
        assert working_folder(out) == tmp_path / "run.learning"


def test_labels_of_a_second_collection_are_taught_as_the_first_would_have_drawn_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = orl_scenes("train", 12, sizes=((96, 120),))
    assert first.gazes is not None
    differently = gazes.from_parts(torch.tensor([0.0, 1.0]), torch.tensor(0.9), torch.tensor(0.0)).double()
    parts: dict[str, Scenes] = {
        "orl@train": first,
        "orl@test": first.with_gazes(gazes.compose(first.gazes, differently)),
    }
    monkeypatch.setattr("foveate.data.Scenes.from_spec", lambda spec, seed: parts[spec])
    scenes, told = labelled_scenes(["orl@train", "orl@test"])
    assert "+1.0" in (said := capsys.readouterr().err) and "a factor of 0.9" in said
    assert scenes.gazes is not None and len(scenes) == 24
    assert torch.equal(scenes.gazes[:12], first.gazes)
    # Of the tenth in size nothing is left; the pictures are the same, so that δ is known but for its interpolation.
    assert float(gazes.overlap(scenes.gazes[12:], first.gazes).min()) > 0.97
    torch.testing.assert_close(
        torch.tensor(told["label_differences"]["orl@test"]).double(), differently, atol=0.02, rtol=0
    )
    alone, nothing = labelled_scenes(["orl@train"])
    assert alone.gazes is not None and torch.equal(alone.gazes, first.gazes)
    assert nothing == {}
