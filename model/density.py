"""Elliptical densities, one Gaussian and one Student-t: what the deep belief network has to beat, and its core."""

import math
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.model.errors import InputError

__all__ = ["EllipticalDensity", "choose_elliptical", "standard_gamma"]

# Floors, three to a decade about the noise of a camera's grey levels, and degrees of freedom: validation chooses.
FLOORS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
DEGREES_OF_FREEDOM = (4.0, 6.0, 8.0, 12.0, 20.0)

AnyElliptical = TypeVar("AnyElliptical", bound="EllipticalDensity")


def standard_gamma(shape: Float[Tensor, "*batch"], generator: torch.Generator | None = None) -> Float[Tensor, "*batch"]:
    """Draws from Gamma(shape, 1). `torch.distributions.Gamma` would take no generator."""
    return torch._standard_gamma(shape, generator=generator)  # pyright: ignore[reportPrivateImportUsage]


class EllipticalDensity(nn.Module):
    r"""Gaussian (``nu = inf``) or multivariate Student-t with a given mean and *covariance*.

    .. math:: \log t(y) = \log\Gamma\tfrac{\nu+D}2 - \log\Gamma\tfrac\nu2 - \tfrac D2 \log \pi(\nu-2)
              - \tfrac12\log|\Sigma| - \tfrac{\nu+D}2 \log\Big(1 + \tfrac{(y-m)^T\Sigma^{-1}(y-m)}{\nu-2}\Big)

    The Student-t is a Gaussian whose precision has one latent factor τ ~ Gamma(ν/2, (ν−2)/2), integrated out; both
    have covariance Σ.

    Args:
        mean: ``(dimension,)``.
        covariance: ``(dimension, dimension)``, positive definite.
        nu: degrees of freedom, above 2, or ``inf``.

    Raises:
        InputError: for `nu` not above 2, or a covariance that is of another shape or not positive definite; `log_prob`
            for points of another dimension.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    nu: Tensor

    def __init__(
        self, mean: Float[Tensor, "dimension"], covariance: Float[Tensor, "dimension dimension"], nu: float = math.inf
    ) -> None:
        super().__init__()
        if not nu > 2:
            raise InputError(f"degrees of freedom {nu}: the covariance exists only above 2")
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"mean of shape {tuple(mean.shape)} and covariance of shape {tuple(covariance.shape)}: needed are "
                "(dimension,) and (dimension, dimension)"
            )
        variances, axes = torch.linalg.eigh(covariance.double())
        if not bool(variances[0] > 0):
            raise InputError(f"covariance with smallest eigenvalue {float(variances[0]):.3g}: add a positive floor")
        self.register_buffer("mean", mean.clone())
        # As a state is loaded: sums are taken in the order in which memory lies.
        self.register_buffer("axes", axes.to(mean.dtype).contiguous())
        self.register_buffer("variances", variances.to(mean.dtype))
        self.register_buffer("nu", torch.tensor(nu, dtype=mean.dtype, device=mean.device))

    @classmethod
    def fit(cls, y: Float[Tensor, "sample dimension"], floor: float, nu: float = math.inf) -> "EllipticalDensity":
        """Sample mean, sample covariance + floor · I."""
        data = y.double()
        covariance = torch.cov(data.T) + floor * torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
        return cls(data.mean(0).to(y.dtype), covariance, nu)

    @classmethod
    def from_axes(
        cls: "type[AnyElliptical]",
        mean: Float[Tensor, "dimension"],
        axes: Float[Tensor, "dimension seen"],
        variances: Float[Tensor, " seen"],
        nu: float | Float[Tensor, ""] = math.inf,
    ) -> "AnyElliptical":
        """The density whose covariance is known by its orthonormal axes (columns) and the variances along them."""
        # Not through __init__, which would decompose the covariance.
        density = cls.__new__(cls)
        nn.Module.__init__(density)
        nu = torch.as_tensor(nu, dtype=mean.dtype, device=mean.device)
        for name, value in (("mean", mean), ("axes", axes), ("variances", variances), ("nu", nu)):
            density.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
        return density

    @classmethod
    def blank(cls: "type[AnyElliptical]", dimension: int, dtype: torch.dtype = torch.float32) -> "AnyElliptical":
        """The standard Gaussian: a place to load a state into."""
        unit = torch.ones(dimension, dtype=dtype)
        return cls.from_axes(torch.zeros_like(unit), torch.diag(unit), unit)

    @property
    def dimension(self) -> int:
        """Number of coordinates of a point."""
        return self.mean.shape[0]

    @property
    def seen(self) -> int:
        """Number of coordinates that the density is of: fewer than a point has where it is `within` a subspace."""
        return self.variances.shape[0]

    def squared_distance(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch"]:
        """Squared Mahalanobis distance from the mean."""
        if y.shape[-1:] != self.mean.shape:
            raise InputError(f"points of shape {tuple(y.shape)} in {self.dimension} dimensions: they come last")
        return (((y - self.mean) @ self.axes) ** 2 / self.variances).sum(-1)

    def log_prob(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch"]:
        """Log-density in nats."""
        q, d, nu = self.squared_distance(y), self.seen, self.nu
        half_log_det = 0.5 * self.variances.log().sum()
        if torch.isinf(nu):
            return -0.5 * q - half_log_det - 0.5 * d * math.log(2 * math.pi)
        constant = torch.lgamma((nu + d) / 2) - torch.lgamma(nu / 2) - 0.5 * d * torch.log(math.pi * (nu - 2))
        return constant - half_log_det - 0.5 * (nu + d) * torch.log1p(q / (nu - 2))

    def within(self, basis: Float[Tensor, "dimension seen"]) -> "EllipticalDensity":
        """The marginal density of ``basisᵀ y`` as a function of y: of the same kind, with the same ν.

        Args:
            basis: orthonormal columns. Another basis of the same subspace gives the same density.
        """
        root = basis.double().T @ self.axes.double() * self.variances.double().sqrt()
        variances, turn = torch.linalg.eigh(root @ root.T)
        like = self.mean
        return EllipticalDensity.from_axes(like, (basis.double() @ turn).to(like), variances.to(like), self.nu)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "count dimension"]:
        """Exact draws, by way of the latent factor; what is not seen is as in the mean."""
        like = {"dtype": self.mean.dtype, "device": self.mean.device}
        noise = torch.randn(count, self.seen, generator=generator, **like) * self.variances.sqrt()
        if not torch.isinf(self.nu):
            shape = torch.full((count, 1), float(self.nu) / 2, **like)
            tau = standard_gamma(shape, generator) / ((self.nu - 2) / 2)
            noise = noise / tau.sqrt()
        return self.mean + noise @ self.axes.T


def choose_elliptical(
    y: Float[Tensor, "sample dimension"],
    validation: Float[Tensor, "held_out dimension"],
    *,
    student: bool,
) -> tuple[EllipticalDensity, dict[str, float]]:
    """The baseline of its kind: floor, and ν of a Student-t, that score best on validation samples.

    Returns:
        The density and ``{"floor": …, "nu": …, "validation": mean log-density in nats}``.
    """
    data = y.double()
    mean, covariance = data.mean(0), torch.cov(data.T)
    identity = torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
    best: tuple[EllipticalDensity, dict[str, float]] | None = None
    for floor in FLOORS:
        density = EllipticalDensity(mean.to(y.dtype), covariance + floor * identity)
        for nu in DEGREES_OF_FREEDOM if student else (math.inf,):
            density = EllipticalDensity.from_axes(density.mean, density.axes, density.variances, nu)
            score = float(density.log_prob(validation).mean())
            if best is None or score > best[1]["validation"]:
                best = density, {"floor": floor, "nu": nu, "validation": score}
    assert best is not None
    return best
