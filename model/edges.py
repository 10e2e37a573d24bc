r"""Edges as evidence: how much likelier a patch's oriented edges are under the object than under clutter.

Pixels are a poor witness against clutter: fine detail that no two pictures share drowns what they have in common, and
light, blur and a pixel of misalignment move hundreds of them together. Histograms of oriented gradients f keep what is
shared. Of these 968 numbers, or those of the cells within an aperture, 33 linear statistics z = Bᵀ f are scored:

- the one that tells the means of object and clutter apart best, ``wᵀ f`` with ``w = S⁻¹ (m_o − m_c)`` and S the mean of
  the two covariances (Hariharan, Malik & Ramanan 2012). A single statistic needs few examples: it carries over from
  eighty crops to pictures of another collection, where a covariance of the pixels does not;
- the 32 in which the object varies least beside clutter: the generalised eigenvectors of the two covariances with the
  least values. What stays as it is in every object tells a gaze that is off a little from one that is not, which the
  difference of the means does not.

Both laws of z are normal, each with its own mean and covariance (the object's drawn a quarter towards clutter's: it is
that of few pictures), so that the odds are quadratic,

.. math:: \ell(f) = \log \frac{N(B^T f; \mu_o, \Sigma_o)}{N(B^T f; \mu_c, \Sigma_c)}
                  = w^T f + c - \tfrac12 \sum_j \lambda_j (u_j^T f)^2 .

z is a function of the patch, so it is one more statistic of it whose law under clutter may be replaced by the object's
(Baggenstoss's projection theorem). With the pixels beside it the object's law is clutter's, tilted,

.. math:: p_o(y) = p_c(y) \exp\Big(\tfrac1T \big(\ell_{pixels}(y) + \ell(f(y))\big)\Big),

where the temperature T keeps what both statistics say from being counted twice, and the scale of ℓ is what edges have
to say beside pixels (`foveate.inference.fit` sets both). That is a density as far as the tilt has mean one under
clutter, which fitting the odds to examples of both sees to (Gutmann & Hyvärinen 2010). `fit` counts windows that show
the object in part to the examples that are not it: odds against clutter alone are wide in scale and place, and a gaze
that is off a little is not the gaze either. It also counts the windows that the odds of a first fit take for the object
(Dalal & Triggs 2005): most of a picture is nothing like an object, and what tells the two apart is not what tells an
object from the few things that resemble it.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.model.errors import InputError
from foveate.model.identity import DIRECTIONS as ORIENTATIONS
from foveate.model.identity import STRIDE, edges
from foveate.model.patch import from_density_coordinates

__all__ = ["CHUNK", "EdgeOdds", "require_wide_enough"]

# Added to the covariances of the features, as a share of the mean variance under clutter.
FLOOR = 0.03
# Directions beside the difference of the means, and how far the object's covariance in them is drawn to clutter's.
DIRECTIONS, SHRINKAGE = 32, 0.25
# Added to the variances of z, all of the order of one, so that few examples still have laws.
STEADY = 1e-3
FEWEST = 10
# Cells along a side of the patch.
CELLS = 11
# Patches whose features are worked out together: 30 MB.
CHUNK = 4096


class EdgeOdds(nn.Module):
    """Log-odds of the edges of a patch, object against clutter: quadratic in `foveate.model.identity.edges`.

    Args:
        direction: ``(feature,)`` w.
        offset: c, nats.
        axes: ``(feature, axis)`` u.
        curvature: ``(axis,)`` λ.
    """

    direction: Tensor
    offset: Tensor
    axes: Tensor
    curvature: Tensor

    def __init__(
        self,
        direction: Float[Tensor, "feature"],
        offset: Float[Tensor, ""],
        axes: Float[Tensor, "feature axis"],
        curvature: Float[Tensor, " axis"],
    ) -> None:
        super().__init__()
        for name, value in (("direction", direction), ("offset", offset), ("axes", axes), ("curvature", curvature)):
            self.register_buffer(name, value)

    @classmethod
    def fit(
        cls,
        of_object: Float[Tensor, "sample 575"],
        of_clutter: Float[Tensor, "other 575"],
        aperture: float | None = None,
    ) -> "EdgeOdds":
        """From density coordinates of patches that show the object and of patches that do not.

        Args:
            of_object: of the object.
            of_clutter: of anything else.
            aperture: cells count whose middle is less than so many canonical pixels from the patch's; None takes all.

        Raises:
            InputError: for fewer than 10 of either, or an aperture that leaves hardly a cell.
        """
        if min(len(of_object), len(of_clutter)) < FEWEST:
            raise InputError(
                f"{len(of_object)} patches of the object and {len(of_clutter)} of clutter: "
                f"at least {FEWEST} of each are needed to tell their edges apart"
            )
        require_wide_enough(aperture)
        kept = _within(aperture)
        moments = _moments(of_object), _moments(of_clutter)
        (mean, covariance), (other_mean, other) = ((m[kept], c[kept][:, kept]) for m, c in moments)
        floor = FLOOR * other.diagonal().mean() * torch.eye(len(other), dtype=other.dtype, device=other.device)
        apart = torch.linalg.solve(0.5 * (covariance + other) + floor, mean - other_mean)
        apart = apart / torch.sqrt(apart @ (mean - other_mean))
        basis = torch.cat([apart[:, None], _least_varying(covariance + floor, other + floor)], 1)
        # Laws of z, the object's with index 0.
        centres = mean @ basis, other_mean @ basis
        spreads = [basis.T @ of @ basis for of in (covariance, other)]
        spreads[0] = (1 - SHRINKAGE) * spreads[0] + SHRINKAGE * spreads[1]
        for spread in spreads:
            spread.diagonal().add_(STEADY)
        precisions = [torch.linalg.inv(spread) for spread in spreads]
        pulls = [precision @ centre for precision, centre in zip(precisions, centres, strict=True)]
        least = [
            -0.5 * (centre @ pull + torch.logdet(spread))
            for centre, pull, spread in zip(centres, pulls, spreads, strict=True)
        ]
        curvature, turn = torch.linalg.eigh(precisions[0] - precisions[1])
        # No cell outside the aperture has a say.
        everywhere = basis.new_zeros(len(moments[0][0]), basis.shape[1])
        everywhere[kept] = basis
        form = everywhere @ (pulls[0] - pulls[1]), least[0] - least[1], everywhere @ turn, curvature
        return cls(*(value.to(of_object.dtype) for value in form))

    @classmethod
    def blank(cls) -> "EdgeOdds":
        """A place to load a state into; it says nothing."""
        features = edges(torch.zeros(24, 24)).shape[-1]
        axes = torch.zeros(features, 1 + DIRECTIONS)
        return cls(torch.zeros(features), torch.zeros(()), axes, torch.zeros(1 + DIRECTIONS))

    def scaled(self, factor: float) -> "EdgeOdds":
        """`factor` times the odds."""
        return EdgeOdds(factor * self.direction, factor * self.offset, self.axes, factor * self.curvature)

    def log_odds(self, y: Float[Tensor, "*batch 575"]) -> Float[Tensor, "*batch"]:
        """Log-odds of patches by their density coordinates, nats; differentiable."""
        features = edges(from_density_coordinates(y))
        quadratic = (features @ self.axes.to(y)).square() @ self.curvature.to(y)
        return features @ self.direction.to(y) + self.offset.to(y) - 0.5 * quadratic


def require_wide_enough(aperture: float | None) -> None:
    """Refuse an aperture, a radius in canonical pixels, with too few edges in it for `EdgeOdds.fit`.

    Raises:
        InputError: no more features lie within than directions are taken of them.
    """
    count = len(_within(aperture))
    if count <= DIRECTIONS:
        raise InputError(
            f"aperture {aperture}: {count} features of edges lie within it, more than {DIRECTIONS} are needed: widen it"
        )


def _within(aperture: float | None) -> Int[Tensor, " feature"]:
    """Features of the cells within the aperture."""
    from_middle = STRIDE * (torch.arange(CELLS) - (CELLS - 1) / 2)
    away = torch.sqrt(from_middle[:, None].square() + from_middle.square())
    inside = away < (math.inf if aperture is None else aperture)
    return inside.expand(ORIENTATIONS, CELLS, CELLS).flatten().nonzero().flatten()


def _least_varying(of_object: Float[Tensor, "n n"], of_clutter: Float[Tensor, "n n"]) -> Float[Tensor, "n axis"]:
    """The directions in which the object varies least beside clutter, whose variance in them is one."""
    root = torch.linalg.cholesky(of_clutter)
    white = torch.linalg.solve_triangular(root, of_object, upper=False)
    white = torch.linalg.solve_triangular(root, white.T, upper=False)
    _, axes = torch.linalg.eigh(0.5 * (white + white.T))
    return torch.linalg.solve_triangular(root.T, axes[:, :DIRECTIONS], upper=True)


@torch.no_grad()
def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features, float64, a chunk at a time: features are twice as large as patches."""
    total, products = 0.0, 0.0
    for part in y.split(CHUNK):
        features = edges(from_density_coordinates(part)).double()
        total, products = total + features.sum(0), products + features.T @ features
    mean = torch.as_tensor(total) / len(y)
    return mean, (torch.as_tensor(products) - len(y) * torch.outer(mean, mean)) / (len(y) - 1)
