"""What squares other people drew: collections are taught in one convention, and labels compared with what runs report.

Convention (the whole module): gazes as in `foveate.model.gaze`, scene pixels; a label t and the gaze u that a run finds
differ by δ on the canonical side, ``t = u ∘ δ``, so that δ's offset is in canonical pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.data import Scenes
from foveate.data.joining import in_one_convention
from foveate.data.scenes import SPEC_HELP, parse_spec
from foveate.experiments.options import announce
from foveate.inference.attend import attend
from foveate.inference.checkpoint import Run
from foveate.model import gaze as gazes
from foveate.model.errors import InputError

__all__ = [
    "COMPARED",
    "LIGHT",
    "convention_of",
    "label_convention",
    "labelled_scenes",
    "training_scenes",
]

# Training scenes whose labels are compared at most.
COMPARED = 120
# Sampling where many posteriors are needed and none exactly.
LIGHT: dict[str, Any] = {"chains": 2, "draws": 60, "warmup": 40}


def labelled_scenes(specs: Sequence[str], seed: int = 0) -> tuple[Scenes, dict[str, Any]]:
    """What a run is taught: the labelled scenes of all SPECs, their labels as the first collection's would be drawn.

    Returns:
        The scenes, and ``{"label_differences": {SPEC: [a, b, tx, ty] or None}}`` for the run's configuration: the
        similarity δ of `foveate.data.joining.label_difference` for every SPEC after the first; nothing for one alone.

    Raises:
        InputError: no SPEC was given, or one is wrong.
    """
    if not specs:
        raise InputError(f"no SPEC was given; {SPEC_HELP}")
    collections = [Scenes.from_spec(spec, seed=seed).labelled() for spec in specs]
    if len(collections) == 1:
        return collections[0], {}
    joined, differences = in_one_convention(collections)
    for spec, difference in zip(specs[1:], differences, strict=True):
        if difference is None:
            announce(
                f"{spec}: has too few pictures, or does not look like {specs[0]} where it is labelled, to say how "
                "labels differ; they stay as they are"
            )
            continue
        (right, down), scale, rotation = gazes.parts(difference)
        announce(
            f"{spec}: labels differ from those of {specs[0]} by {right:+.2f} canonical pixels to the right, "
            f"{down:+.2f} down, a factor of {scale:.3f} in size and {rotation.rad2deg():+.1f}°; they are re-expressed"
        )
    told = {spec: None if d is None else d.tolist() for spec, d in zip(specs[1:], differences, strict=True)}
    return Scenes.concatenate(joined), {"label_differences": told}


def label_convention(found: Float[Tensor, "scene 4"], truth: Float[Tensor, "scene 4"]) -> Float[Tensor, "4"] | None:
    """The similarity δ by which labels differ from what a run was taught: truth ≈ found ∘ δ; None if nothing is found.

    The medians, over the scenes found, of the offset (canonical pixels), the log-scale and the rotation of
    ``found⁻¹ ∘ truth``. `foveate.data.joining.re_expressed` then gives labels as the run would have drawn them.

    Args:
        found: reported gazes of training scenes of the labelled collection.
        truth: their labels.
    """
    near = gazes.overlap(found.double(), truth.double()) > 0.5
    if not bool(near.any()):
        return None
    centre, scale, rotation = gazes.parts(gazes.compose(gazes.inverse(found.double()), truth.double()))
    of_centre = centre[near].median(0).values
    return gazes.from_parts(of_centre, scale[near].log().median().exp(), rotation[near].median())


def convention_of(run: Run, train: Scenes, seed: int = 0) -> Float[Tensor, "4"] | None:
    """`label_convention` of up to `COMPARED` training scenes, spread over all of them, with no initial gaze."""
    rows = torch.linspace(0, len(train) - 1, min(COMPARED, len(train))).round().long()
    compared = train.subset(rows)
    found = attend(run.model, run.guide, compared, progress=True, seed=seed, **LIGHT)
    assert compared.gazes is not None
    return label_convention(found.mean_gaze, compared.gazes)


def training_scenes(spec: str, seed: int = 0) -> Scenes | None:
    """The scenes of the same collection that may be learned from, for a SPEC of test scenes; None without any."""
    if parse_spec(spec).split != "test":
        return None
    try:
        return Scenes.from_spec(f"{spec.removesuffix('@test')}@train", seed=seed).labelled()
    except InputError as error:
        announce(f"{spec}: labels are not compared with those trained on ({error})")
        return None
