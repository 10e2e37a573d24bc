r"""Edges as evidence: how much likelier a patch's oriented edges are under the object than under clutter.

Pixels are a poor witness against clutter: fine detail that no two pictures share drowns what they have in common, and
light, blur and a pixel of misalignment move hundreds of them together. Histograms of oriented gradients keep what is
shared. Their laws under object and clutter are taken to be normal with one covariance S, so that the odds are linear,

.. math:: \ell(f) = \log \frac{N(f; m_o, S)}{N(f; m_c, S)} = w^T f - \tfrac12 w^T (m_o + m_c), \qquad
          w = S^{-1} (m_o - m_c)

(Hariharan, Malik & Ramanan 2012 on histograms of gradients). A linear statistic of 968 numbers needs few examples: odds
from eighty crops carry over to pictures of another collection, where a covariance of the pixels does not.

The features are a function of the patch, so they are one more statistic of it whose law under clutter may be replaced
by the object's (Baggenstoss's projection theorem). With the pixels beside them the object's law is clutter's, tilted,

.. math:: p_o(y) = p_c(y) \exp\big(\tfrac1T \ell_{pixels}(y) + \kappa\, \ell(f(y))\big),

where T and κ keep what both statistics say from being counted twice. (`fit` gives both an equal say: it scales ℓ to
have as wide a gap between object and clutter as the pixels' log-odds have, and sets κ = 1 / T.) That is a density as
far as the tilt has mean one under clutter, which fitting the odds to examples of both sees to (Gutmann & Hyvärinen
2010). `fit` counts windows that show the object in part to the examples that are not it, half of them: odds against
clutter alone are wide in scale and place, and a gaze that is off a little is not the gaze either.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.model.errors import InputError
from foveate.model.identity import edges
from foveate.model.patch import from_density_coordinates

__all__ = ["CHUNK", "EdgeOdds"]

# Added to the covariance of the features, as a share of the mean variance under clutter.
FLOOR = 0.03
FEWEST = 10
# Patches whose features are worked out together: 30 MB.
CHUNK = 4096


class EdgeOdds(nn.Module):
    """Log-odds of the edges of a patch, object against clutter: linear in `foveate.model.identity.edges`.

    Args:
        direction: ``(feature,)`` w.
        offset: ``−½ wᵀ (m_o + m_c)``, nats.
        weight: κ, by which the odds count beside those of the pixels.
    """

    direction: Tensor
    offset: Tensor
    weight: Tensor

    def __init__(
        self, direction: Float[Tensor, "feature"], offset: Float[Tensor, ""] | float = 0.0, weight: float = 1.0
    ) -> None:
        super().__init__()
        self.register_buffer("direction", direction)
        for name, value in (("offset", offset), ("weight", weight)):
            self.register_buffer(name, torch.as_tensor(value, dtype=direction.dtype, device=direction.device).clone())

    @classmethod
    def fit(cls, of_object: Float[Tensor, "sample 575"], of_clutter: Float[Tensor, "other 575"]) -> "EdgeOdds":
        """From density coordinates of patches that show the object and of patches that do not.

        Raises:
            InputError: for fewer than 10 of either.
        """
        if min(len(of_object), len(of_clutter)) < FEWEST:
            raise InputError(
                f"{len(of_object)} patches of the object and {len(of_clutter)} of clutter: "
                f"at least {FEWEST} of each are needed to tell their edges apart"
            )
        (mean, covariance), (other_mean, other) = _moments(of_object), _moments(of_clutter)
        pooled = 0.5 * (covariance + other)
        pooled.diagonal().add_(FLOOR * other.diagonal().mean())
        direction = torch.linalg.solve(pooled, mean - other_mean)
        offset = -0.5 * direction @ (mean + other_mean)
        return cls(direction.to(of_object.dtype), offset.to(of_object.dtype))

    @classmethod
    def blank(cls) -> "EdgeOdds":
        """A place to load a state into; it says nothing."""
        return cls(torch.zeros(edges(torch.zeros(24, 24)).shape[-1]))

    def log_odds(self, y: Float[Tensor, "*batch 575"]) -> Float[Tensor, "*batch"]:
        """κ times the log-odds of patches by their density coordinates, nats; differentiable."""
        features = edges(from_density_coordinates(y))
        return self.weight.to(y) * ((features * self.direction.to(y)).sum(-1) + self.offset.to(y))


@torch.no_grad()
def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features, float64, a chunk at a time: features are twice as large as patches."""
    total, products = 0.0, 0.0
    for part in y.split(CHUNK):
        features = edges(from_density_coordinates(part)).double()
        total, products = total + features.sum(0), products + features.T @ features
    mean = torch.as_tensor(total) / len(y)
    return mean, (torch.as_tensor(products) - len(y) * torch.outer(mean, mean)) / (len(y) - 1)
