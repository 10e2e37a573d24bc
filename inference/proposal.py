"""Proposals for a whole mode at once: a Student-t adapted to it by importance sampling.

A posterior of a gaze has four dimensions and is rough; HMC feels its way about in it. A heavy-tailed density that has
been fitted to it by adaptive importance sampling (Cappé et al. 2008) leaps: as the proposal of an independence sampler
(Tierney 1994) between the trajectories it makes draws that hardly remember the last one, and where it fits badly
its leaps are refused and HMC goes on as before. It is fitted before the first draw and stays what it is, so that the
chains keep their posterior exactly.

Convention: positions ``(..., d)`` are coordinates of a chart, as the potential takes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from pyro.distributions import MultivariateStudentT
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["DEGREES", "ROUNDS", "StudentProposal", "adapted_proposal", "spread_points"]

# Degrees of freedom: tails heavier than any posterior's that falls off like a normal. Draws are made for four alone.
DEGREES = 4
# Points of a round of adaptation, and rounds.
POINTS, ROUNDS = 256, 2
# Weights are tempered until so many points count (Kish), and the covariance has at least this variance: a fit to a
# handful of points would be too narrow for good.
LEAST_ESS, LEAST_VARIANCE = 24, 1e-3


class StudentProposal(NamedTuple):
    """Multivariate Student-t densities with four degrees of freedom.

    Attributes:
        mean: ``(*batch, d)``.
        scale_tril: ``(*batch, d, d)`` Cholesky factors of the scale matrices, half of the covariances.
        within: positions ``(..., d)`` to whether a leap may begin and end there; ``None`` is everywhere. The densities
            are then those of what lies within, up to a constant; elsewhere a chain has its trajectories alone.
    """

    mean: Tensor
    scale_tril: Tensor
    within: Callable[[Tensor], Tensor] | None = None

    def place(
        self, normal: Float[Tensor, "*points d"], uniform: Float[Tensor, "*points 2"]
    ) -> Float[Tensor, "*each d"]:
        """Draws from standard normal numbers and two uniform ones each, whose logs make a χ² of four degrees.

        The points broadcast against the densities. Those that are not `within` are among them.
        """
        chi_square = -2 * uniform.log().sum(-1, keepdim=True)
        spread = normal * torch.sqrt(DEGREES / chi_square)
        return self.mean + (self.scale_tril @ spread[..., None])[..., 0]

    def log_prob(self, position: Float[Tensor, "*points d"]) -> Float[Tensor, "*each"]:
        """Log densities, nats; the positions broadcast against the densities."""
        degrees = torch.full_like(self.mean[..., 0], DEGREES)
        return MultivariateStudentT(degrees, self.mean, self.scale_tril, validate_args=False).log_prob(position)

    def to(self, like: Tensor) -> "StudentProposal":
        """The same in the dtype and on the device of `like`."""
        return StudentProposal(self.mean.to(like), self.scale_tril.to(like), self.within)


def adapted_proposal(
    energy: Float[Tensor, "scene point"],
    position: Float[Tensor, "scene point d"],
    log_q: Float[Tensor, "scene point"],
) -> StudentProposal:
    """The Student-t with the mean of weighted points and their covariance as its scale matrix, ``(scene, 1)`` of them.

    Args:
        energy: of the points, nats; a point whose energy is not finite has no weight.
        position: the points.
        log_q: log density that they were drawn from.
    """
    log_weight = torch.where(torch.isfinite(energy), -energy - log_q, -1e30)
    power = torch.ones_like(log_weight[:, :1])
    share = torch.softmax(log_weight, -1)
    while bool((few := share.square().sum(-1, keepdim=True) * LEAST_ESS > 1).any()) and float(power.min()) > 1e-4:
        power = torch.where(few, 0.8 * power, power)
        share = torch.softmax(power * log_weight, -1)
    mean = (share[..., None] * position).sum(1, keepdim=True)
    away = position - mean
    least = LEAST_VARIANCE * torch.eye(position.shape[-1], dtype=position.dtype, device=position.device)
    return StudentProposal(mean, torch.linalg.cholesky((share[..., None] * away).mT @ away + least)[:, None])


def spread_points(proposal: StudentProposal, seed: int) -> Float[Tensor, "scene point d"]:
    """A fixed set of `POINTS` points through each scene's density, from the Sobol set that is scrambled by `seed`."""
    d = proposal.mean.shape[-1]
    uniform = SobolEngine(d + 2, scramble=True, seed=seed).draw(POINTS, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    uniform = uniform.to(proposal.mean)
    return proposal.place(torch.special.ndtri(uniform[:, :d]), uniform[:, d:])
