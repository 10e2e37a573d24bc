"""What the tests of the commands share."""

import math
from pathlib import Path

import pytest

from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.model import AttentionModel, ClutterModel, DeepBeliefNet


@pytest.fixture
def threads() -> list[str]:
    """Options that keep a command to one thread."""
    return ["--threads", "1"]


@pytest.fixture
def blank_run(tmp_path: Path) -> Path:
    """A run of the right form that has learned nothing."""
    dbn = DeepBeliefNet.from_config({"layer": "diagonal", "hidden": 6, "top": 4, "dimension": 575})
    dbn.set_log_z(10 * math.log(2), 0.0)
    save(Run(AttentionModel(dbn, ClutterModel.blank(575)), GazeGuide(8)), tmp_path / "run")
    return tmp_path / "run"
