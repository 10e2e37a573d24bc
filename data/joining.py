"""Joining collections that different people labelled: one object is to have one canonical frame.

Whoever marks eyes and mouths puts them a little higher, wider or further apart than the next person does, the same way
in every picture. A model that is taught both ways learns a blur. In the mean over a collection's crops the pictures
differ no longer but the squares do, so that the mean crops of two collections, laid over each other, tell by what
similarity their labels differ. Pixels do not tell it equally well: hair and what lies behind a face differ between one
picture and the next as much as they differ between collections. So the gap between the means is measured by the spread
of crops about the mean of their collection (Mahalanobis' distance, that of Fisher's linear discriminant), whose errors
are those of a mean over other pictures.

Convention (the whole module): gazes as in `foveate.model.gaze`, scene pixels; a label t and the gaze u that the
reference collection's labeller would have drawn differ by δ on the canonical side, ``t = u ∘ δ``, so that δ's offset is
in canonical pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import minimize
from torch import Tensor

from foveate.data.scenes import Scenes
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import extract, normalise

__all__ = ["in_one_convention", "label_difference", "re_expressed"]

# The mean crop is taken with what lies around it, and twice as finely as the canonical frame.
AROUND, FINE = 1.5, 2
SIDE = int(gazes.CANONICAL_SIZE * AROUND * FINE)
# The gaze that sees a mean crop in its surroundings.
STRAIGHT = gazes.from_parts(
    torch.full((2,), (SIDE - 1) / 2, dtype=torch.float64),
    torch.tensor(float(FINE), dtype=torch.float64),
    torch.tensor(0.0, dtype=torch.float64),
)
# Where the search for δ begins to look: offset in canonical pixels, log-scale, radians.
FIRST_STEP = (1.0, 1.0, 0.05, 0.05)
# Mean crops that resemble each other less do not show one object in one pose.
RESEMBLING = 0.7
# Added to the variance of each pixel of a normalised crop, whose own is one on average: crops may be fewer than pixels.
FLOOR = 0.3
# Means over fewer crops than these are of persons, not of the object.
FEWEST = 12


def label_difference(reference: Scenes, other: Scenes) -> Float64[Tensor, "4"] | None:
    """The similarity δ by which the labels of `other` differ from those of `reference`.

    It carries the mean crop of `other` to where it is nearest to that of `reference`, by Mahalanobis' distance within
    the collections: with the covariance of all crops, each about its own collection's mean, plus `FLOOR`. Each goes
    half of the way, so that the two may change places. Offset, scale and rotation are found by Nelder and Mead's
    simplex.

    Returns:
        ``(4,)`` δ with ``label ≈ drawn as in the reference ∘ δ``; None where that cannot be told: fewer than `FEWEST`
        scenes in either, or mean crops that do not resemble each other (correlation below `RESEMBLING` at its best).

    Raises:
        InputError: a scene has no gaze.
    """
    if min(len(reference), len(other)) < FEWEST:
        return None
    (there, of_there), (seen, of_seen) = _mean_and_scatter(reference), _mean_and_scatter(other)
    within = (of_there + of_seen) / (len(reference) + len(other))
    root = torch.linalg.cholesky(within + FLOOR * torch.eye(len(within), dtype=torch.float64))

    def at(mean: Tensor, change: np.ndarray) -> Tensor:
        return normalise(extract(mean, gazes.compose(STRAIGHT, _similarity(change)))).flatten()

    def apart(change: np.ndarray) -> float:
        gap = at(seen, change / 2) - at(there, -change / 2)
        return float(torch.linalg.solve_triangular(root, gap[:, None], upper=False).square().sum())

    simplex = np.concatenate([np.zeros((1, 4)), np.diag(FIRST_STEP)])
    found = minimize(apart, np.zeros(4), method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-3}).x
    if float((at(seen, found / 2) * at(there, -found / 2)).mean()) < RESEMBLING:
        return None
    return gazes.compose(_similarity(-found / 2), gazes.inverse(_similarity(found / 2)))


def re_expressed(truth: Float[Tensor, "scene 4"], difference: Float[Tensor, "4"]) -> Float64[Tensor, "scene 4"]:
    """Labels as the reference's labeller would have drawn them: ``truth ∘ δ⁻¹``."""
    return gazes.compose(truth.double(), gazes.inverse(difference.double()))


def in_one_convention(collections: Sequence[Scenes]) -> tuple[list[Scenes], list[Float64[Tensor, "4"] | None]]:
    """Collections with their labels re-expressed as the labeller of the first would have drawn them.

    Returns:
        The collections, and δ of each but the first (see `label_difference`): None for one of which it cannot be told,
        whose labels stay.

    Raises:
        InputError: there is no collection, or a scene has no gaze.
    """
    if not collections:
        raise InputError("no collections to join: give at least one")
    first, *others = collections
    joined, differences = [first], [label_difference(first, other) for other in others]
    for scenes, difference in zip(others, differences, strict=True):
        if scenes.gazes is not None and difference is not None:
            scenes = scenes.with_gazes(re_expressed(scenes.gazes, difference))
        joined.append(scenes)
    return joined, differences


def _mean_and_scatter(scenes: Scenes) -> tuple[Float64[Tensor, "side side"], Float64[Tensor, "576 576"]]:
    """The mean crop with what lies around it, itself a picture; the scatter matrix of the crops about their mean."""
    truth = scenes.gazes
    if truth is None or bool(truth.isnan().any()):
        raise InputError("labels are compared only where every scene has one: give scenes.labelled()")
    around = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    crops = []
    for i in range(len(scenes)):
        picture = scenes.pictures([i])[0]
        around += normalise(extract(picture, truth[i], SIDE, AROUND).double()) / len(scenes)
        crops.append(normalise(extract(picture, truth[i]).double()).flatten())
    return around, len(scenes) * torch.cov(torch.stack(crops).T, correction=0)


def _similarity(change: np.ndarray) -> Float64[Tensor, "4"]:
    """From offset (canonical pixels), log-scale and radians."""
    right, down, log_scale, rotation = torch.from_numpy(np.asarray(change, dtype=np.float64))
    return gazes.from_parts(torch.stack([right, down]), log_scale.exp(), rotation)
