"""Clutter: the density of patches that are not the object, against which the patch at a gaze is scored."""

from jaxtyping import Float
from torch import Tensor, nn

from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError

__all__ = ["ClutterModel", "NoisyDensity"]


class NoisyDensity(EllipticalDensity):
    """An elliptical density of density coordinates seen through noise: the covariance of `core` plus ``noise² I``.

    With a Student-t core this is the named closed-form surrogate of the model's ``latent="collapsed"``: the core and
    the noise share one latent scale. With a Gaussian core it is the exact convolution.
    """

    @classmethod
    def through(cls, core: EllipticalDensity, noise: float | Tensor) -> "NoisyDensity":
        """`core` seen through noise of standard deviation `noise` (normalised intensities).

        Raises:
            InputError: the noise is negative.
        """
        if noise < 0:
            raise InputError(f"noise {noise}: a standard deviation is at least 0")
        return cls.from_axes(core.mean, core.axes, core.variances + noise**2, core.nu)


class ClutterModel(nn.Module):
    """Density of the coordinates y of patches read at gazes that show no object: one Student-t.

    It approximates the marginal of y under pictures of clutter whatever the scale and place of the gaze, and says so:
    the odds of the scene are proper only as far as it is right.
    """

    def __init__(self, density: EllipticalDensity):
        super().__init__()
        self.density = density

    @classmethod
    def fit(cls, y: Float[Tensor, "sample 575"], floor: float = 1e-3, nu: float = 8.0) -> "ClutterModel":
        """Mean and covariance of samples of clutter, at least a few hundred.

        Raises:
            InputError: for fewer than 100 samples.
        """
        if y.shape[0] < 100:
            raise InputError(f"{y.shape[0]} patches of clutter: at least 100 are needed to fit their density")
        return cls(EllipticalDensity.fit(y, floor, nu))

    @classmethod
    def blank(cls, dimension: int) -> "ClutterModel":
        """The standard Gaussian: a place to load a state into."""
        return cls(EllipticalDensity.blank(dimension))

    def log_prob(self, y: Float[Tensor, "*batch 575"]) -> Float[Tensor, "*batch"]:
        """Log-density in nats."""
        return self.density.log_prob(y)
