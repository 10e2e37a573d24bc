"""The demo: its photograph, and the whole of it with as little training as there can be."""

import json
from pathlib import Path

import pytest
import torch
from foveate.experiments.cli import main
from foveate.experiments.demo import astronaut
from foveate.model import gaze as gazes


def test_the_astronauts_face_is_where_it_was_marked() -> None:
    scenes = astronaut()
    assert scenes.sizes.tolist() == [[512, 512]]
    assert scenes.gazes is not None
    parts = gazes.parts(scenes.gazes[0])
    # The face, between the ears, as measured on the photograph: 10 px is a tenth of its width.
    assert torch.dist(parts.centre, torch.tensor([225.0, 117.0]).double()) < 10
    assert 24 * float(parts.scale) == pytest.approx(104, abs=10)
    assert abs(float(parts.rotation)) < 0.1
