"""Whether probabilities come true: coverage of the gaze's posterior region, one factor that mends it, reliability.

The region of level 0.9 holds the gazes that are no farther from the mean of the draws than nine tenths of the draws
are, by the Mahalanobis distance of their own covariance. Where the region holds the truth too seldom (a picture's
pixels are not independent, and the next labels are by other hands), one factor on the sds, fitted on scenes held out
of training, makes it as wide as it has to be.

Convention (the whole module): gazes as in `foveate.model.gaze`; distances in the units of `LocalChart` at the mean of
the draws, so that a mode far out in the picture is measured as one in its middle.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.inference.attend import attend
from foveate.inference.guide import GazeGuide
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel

__all__ = ["LEVEL", "Reliability", "calibrated_factor", "coverage_factor", "reach", "reliability"]

LEVEL = 0.9
# Scenes that are attended to together.
BATCH = 16
# Added to the variances of draws that never moved, in chart units: a region without width has no distances.
LEAST_VARIANCE = 1e-12


class Reliability(NamedTuple):
    """Stated probabilities beside what happened, in bins of equal width that hold at least one case.

    Attributes:
        stated: ``(bin,)`` mean of the stated probabilities.
        happened: ``(bin,)`` share of the cases that came true.
        count: ``(bin,)`` cases.
        gap: mean absolute difference of the two, over all cases (the expected calibration error).
        brier: mean squared difference of each case's probability and its outcome.
    """

    stated: Tensor
    happened: Tensor
    count: Tensor
    gap: float
    brier: float


def reach(
    draws: Float[Tensor, "scene chain draw 4"], truth: Float[Tensor, "scene 4"], level: float = LEVEL
) -> Float[Tensor, " scene"]:
    """How far out the truth lies among the draws, in radii of the region of `level`: at most 1 is inside.

    A truth that follows the law of the draws is inside with probability `level`. With all sds multiplied by f, inside
    is at most f.

    Args:
        draws: gazes of one mode.
        truth: true gazes.
        level: the share of the draws within the region.
    """
    flat = draws.double().flatten(1, 2)
    # The mean of (a, b, tx, ty) is the reported gaze and the base of the chart.
    chart = gazes.LocalChart(flat.mean(1, keepdim=True))
    z, of_truth = chart.to_chart(flat), chart.to_chart(truth.double()[:, None])
    middle = z.mean(1, keepdim=True)
    centred = z - middle
    covariance = centred.mT @ centred / max(1, z.shape[1] - 1)
    least = LEAST_VARIANCE * torch.eye(4, dtype=z.dtype, device=z.device)
    factor = torch.linalg.cholesky(covariance + least)

    def distance(offset: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, offset.mT, upper=False).norm(dim=-2)

    return distance(of_truth - middle)[:, 0] / distance(centred).quantile(level, -1)


def coverage_factor(reached: Float[Tensor, " scene"], level: float = LEVEL) -> float:
    """The factor on the posterior sds with which the region of `level` holds the truth of that share of scenes.

    The conformal quantile, number ⌈(n + 1) level⌉ of n in order: the next scene of the same kind is covered with at
    least that probability, however wrong the model is (Vovk et al. 2005), if they had no part in it; `fit` trains
    nothing on them, but chooses noise, temperature and when to stop by them. Of fewer than ``level / (1 - level)``
    scenes, nine at 0.9, no factor is known to be enough: the largest is taken, which covers n of n + 1. A scene whose
    draws are all the same is out of reach of any factor, and counts as farther off than every other. 1 where there is
    none.

    Args:
        reached: of `reach`, on scenes that nothing was trained on.
        level: the share of scenes to be covered.
    """
    known = reached[torch.isfinite(reached)]
    if len(known) == 0:
        return 1.0
    rank = min(len(known), math.ceil((len(reached) + 1) * level))
    return float(known.sort().values[rank - 1])


def calibrated_factor(
    parts: Sequence[tuple[AttentionModel, Int[Tensor, " _"]]],
    guide: GazeGuide,
    scenes: Any,
    truth: Float[Tensor, "scene 4"],
    seed: int = 0,
) -> float:
    """`coverage_factor` on scenes that the models do not know, with no initial gaze.

    Only scenes whose object was found count. The region is one mode's, and whether it is the object's mode is what
    weights and presence say: a region that had to make up for a few missed objects would be as wide as chance has it.

    Args:
        parts: models that sample gazes, and which of the scenes each one does not know.
        guide: proposes gazes.
        scenes: with ``pictures(indices)``, such as `foveate.data.Scenes`.
        truth: true gazes of all scenes.
        seed: of the sampler.
    """
    reached, found = [], []
    for model, rows in parts:
        for part in rows.split(BATCH):
            true = truth[part]
            posterior = attend(model, guide, scenes.pictures(part.tolist()), chains=2, draws=100, warmup=50, seed=seed)
            reached.append(reach(posterior.gaze, true))
            found.append(gazes.overlap(posterior.mean_gaze, true.double()) > 0.5)
    return coverage_factor(torch.cat(reached)[torch.cat(found)])


def reliability(stated: Float[Tensor, " case"], happened: Bool[Tensor, " case"], bins: int = 10) -> Reliability:
    """Stated probabilities against what happened, in `bins` bins of equal width."""
    stated, outcome = stated.double(), happened.double()
    bin_of = (stated * bins).long().clamp(0, bins - 1)
    count = torch.bincount(bin_of, minlength=bins)
    kept = count > 0

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(bin_of, values, minlength=bins)[kept] / count[kept]

    of_stated, of_outcome = mean(stated), mean(outcome)
    gap = (count[kept] * (of_stated - of_outcome).abs()).sum() / count.sum()
    return Reliability(of_stated, of_outcome, count[kept], float(gap), float((stated - outcome).square().mean()))
