"""What the tests of the commands share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.inference.posterior import Posterior
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


@pytest.fixture
def posterior_of() -> Callable[..., Posterior]:
    """Makes a posterior that reports given gazes ``(scene, 4)``, every one of its 2 × 3 draws being that gaze."""

    def made(reported: torch.Tensor, **changes: Any) -> Posterior:
        n = len(reported)
        fields: dict[str, Any] = {
            "gaze": reported[:, None, None].expand(n, 2, 3, 4),
            "statistics": {"n_steps": torch.ones(n, 2, 3, dtype=torch.long)},
            "modes": reported[:, None],
            "weights": torch.ones(n, 1),
            "presence": torch.ones(n),
            "path": reported[:, None].expand(n, 3, 4),
            "canonical": torch.zeros(n, 24, 24),
            "canonical_draws": torch.zeros(n, 2, 0, 24, 24),
            "patch": torch.zeros(n, 24, 24),
            "names": [f"{i}.png" for i in range(n)],
            "hashes": [f"{i:016x}" for i in range(n)],
            "sizes": torch.tensor([[90, 120]] * n),
        }
        return Posterior(**{**fields, **changes})

    return made


@pytest.fixture
def with_iou() -> Callable[..., torch.Tensor]:
    """Moves upright gazes to the right until their squares overlap the old ones by the IoUs that are asked for."""

    def moved(truth: torch.Tensor, *iou: float) -> torch.Tensor:
        asked = torch.tensor(iou, dtype=torch.float64)
        # Squares of width w at a distance d share w (w - d) of w (w + d).
        right = 24 * truth[:, 0] * (1 - asked) / (1 + asked)
        return truth + torch.stack([0 * right, 0 * right, right, 0 * right], -1)

    return moved
