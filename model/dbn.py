"""The prior over canonical images: a deep belief network, a Gaussian layer under a binary RBM (Tang et al. 2014).

``p(y, h1, h2) = p(y | h1) p(h1, h2)`` over the density coordinates y of normalised patches (`model.patch`), with
``p(h1, h2) ∝ exp(h1ᵀ R h2 + eᵀ h1 + dᵀ h2)``. Two Gaussian layers are offered for ``p(y | h1)``: the paper's diagonal
one, and one with a full covariance whose hidden units move the shape and gate the contrast place by place.

Every layer gives ``E_q[log p(y | h1)]`` for a factorial q, or a lower bound of it, in closed form. With ``F(h1)`` the
free energy of the top RBM, which is concave, ``E_q[-F(h1)] ≥ -F(E_q h1)``, so that

    log p(y) ≥ E_q[log p(y | h1)] - F(q) + H(q) - log Z

is a bound without sampling noise: the only random number in it is log Z, which carries its standard error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from foveate.model.density import EllipticalDensity, standard_gamma
from foveate.model.errors import InputError
from foveate.model.patch import from_density_coordinates
from foveate.model.rbm import BernoulliRBM, bernoulli, entropy

__all__ = ["CanonicalGivenHidden", "DeepBeliefNet", "DiagonalLayer", "GatedLayer", "HiddenPrior", "contrast_groups"]

DIMENSION = 575  # density coordinates of a 24×24 patch
SIDE = 24

# Sum of squares of a group below which its log-energy saturates: a few per cent of the typical whitened variance.
ENERGY_FLOOR = 0.03
# Log-odds of a recognition unit are kept within ±12 so that its entropy keeps a gradient in float32.
LOGIT_LIMIT = 12.0
# How far conjugate gradients may leave a draw from where it should be, in its own sds, and their steps at most.
SOLVED, MOST_ITERATIONS = 1e-3, 200


def contrast_groups(side: int = SIDE, block: int = 2) -> Tensor:
    """Group of each of the ``side² - 1`` residuals: square blocks of ``block × block`` pixels, row by row.

    Residual k, like density coordinate k, stands at pixel k + 1: the patch has no residual of its first pixel.

    Raises:
        InputError: blocks that do not tile the patch.
    """
    if side % block:
        raise InputError(f"blocks of {block} pixels do not tile a patch of {side}: take a divisor")
    pixel = torch.arange(1, side * side)
    return (pixel // side // block) * (side // block) + pixel % side // block


class _Layer(nn.Module):
    """Interface of the Gaussian layer: ``p(y | h1)``, a recognition posterior ``q(h1 | y)`` and their expectation."""

    config: dict[str, Any]

    @property
    def hidden(self) -> int:
        """Number of hidden units h1."""
        raise NotImplementedError

    @property
    def dimension(self) -> int:
        """Number of coordinates y."""
        raise NotImplementedError

    def recognise(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch hidden"]:
        """Probabilities of the factorial recognition posterior."""
        raise NotImplementedError

    def log_prob(
        self, y: Float[Tensor, "*#batch dimension"], h: Float[Tensor, "*#batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        """``log p(y | h1)`` in nats, exact; latent scales integrated out."""
        raise NotImplementedError

    def expected_log_prob(
        self, y: Float[Tensor, "*batch dimension"], q: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        """``E_q[log p(y | h1)]`` under independent units of probabilities q, or a lower bound of it."""
        raise NotImplementedError

    def update_hidden(
        self,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        logits: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch hidden"]:
        """One exact sweep of Gibbs over the units of h1, one after the other, given y and prior log-odds of the units.

        A unit's conditional log-odds are its prior log-odds plus ``log p(y | h_j = 1, rest) - log p(y | h_j = 0,
        rest)``.
        """
        raise NotImplementedError

    def mean(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch dimension"]:
        """``E[y | h1]``."""
        raise NotImplementedError

    def sample(
        self, h: Float[Tensor, "*batch hidden"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch dimension"]:
        """Exact draw of y given h1."""
        raise NotImplementedError

    def sample_denoised(
        self,
        observed: Float[Tensor, "*batch dimension"],
        noise: float,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch dimension"]:
        """One Gibbs update of y given h1 and ``observed ~ N(y, noise² I)``; latent scales are drawn first."""
        raise NotImplementedError

    def filters(self) -> Float[Tensor, "hidden dimension"]:
        """What switching on each unit does, as a direction in y (a change of mean) for pictures."""
        raise NotImplementedError


class DiagonalLayer(_Layer):
    """The paper's layer: ``p(y | h1) = N(b + σ² ∘ W h1, diag σ²)``, ``q(h1_j = 1 | y) = sigmoid(c_j + W_jᵀ y)``.

    Its parameters have the names and meanings of `GaussianRBM`, which trains it.

    Args:
        hidden: number of hidden units.
        dimension: number of coordinates.
    """

    def __init__(self, hidden: int, dimension: int = DIMENSION) -> None:
        super().__init__()
        self.config = {"layer": "diagonal", "hidden": hidden, "dimension": dimension}
        self.weight = nn.Parameter(torch.zeros(dimension, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(dimension))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.log_sigma = nn.Parameter(torch.zeros(dimension))

    @property
    def hidden(self) -> int:
        return self.weight.shape[1]

    @property
    def dimension(self) -> int:
        return self.weight.shape[0]

    @property
    def sigma(self) -> Float[Tensor, "dimension"]:
        """Standard deviations given h1."""
        return self.log_sigma.exp()

    def recognise(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch hidden"]:
        return torch.sigmoid((y @ self.weight + self.hidden_bias).clamp(-LOGIT_LIMIT, LOGIT_LIMIT))

    def log_prob(
        self, y: Float[Tensor, "*#batch dimension"], h: Float[Tensor, "*#batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        residual = (y - self.mean(h)) / self.sigma
        return -0.5 * (residual**2).sum(-1) - self.log_sigma.sum() - 0.5 * y.shape[-1] * math.log(2 * math.pi)

    def expected_log_prob(
        self, y: Float[Tensor, "*batch dimension"], q: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        # Exact: the variance of σ² W h1 under q, in units of σ², is Σ_j q (1 - q) Σ_i σ_i² W_ij².
        spread = ((self.sigma[:, None] * self.weight) ** 2).sum(0)
        return self.log_prob(y, q) - 0.5 * (q * (1 - q)) @ spread

    def mean(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch dimension"]:
        return self.visible_bias + self.sigma**2 * (h @ self.weight.T)

    def sample(
        self, h: Float[Tensor, "*batch hidden"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch dimension"]:
        mean = self.mean(h)
        return mean + self.sigma * _normal_like(mean, generator)

    def update_hidden(
        self,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        logits: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch hidden"]:
        scaled = self.sigma[:, None] * self.weight
        coupling = scaled.T @ scaled
        drive = logits + (y - self.visible_bias) @ self.weight - 0.5 * coupling.diagonal()
        units = list(h.unbind(-1))
        field = h @ coupling
        for j in range(self.hidden):
            others = field[..., j] - units[j] * coupling[j, j]
            drawn = bernoulli(torch.sigmoid(drive[..., j] - others), generator)
            field = field + (drawn - units[j])[..., None] * coupling[j]
            units[j] = drawn
        return torch.stack(units, -1)

    def sample_denoised(
        self,
        observed: Float[Tensor, "*batch dimension"],
        noise: float,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch dimension"]:
        precision = self.sigma**-2 + noise**-2
        mean = (self.mean(h) / self.sigma**2 + observed / noise**2) / precision
        return mean + _normal_like(mean, generator) / precision.sqrt()

    def filters(self) -> Float[Tensor, "hidden dimension"]:
        return (self.sigma[:, None] ** 2 * self.weight).T


class GatedLayer(_Layer):
    r"""A Gaussian layer with full covariance: shape units move its mean, contrast units gate its local scales.

    Residuals ``e = A (y - b)``: A is a bank of 575 local filters, one about each pixel but the first, that whitens the
    data. In
    groups g of neighbouring pixels (d_g of them) the residuals share a latent scale whose inverse square is
    Gamma-distributed and integrated out:

    .. math:: p(y \mid h) = |\det A| \prod_g t_{\nu_g}\big(e_g;\; (P W h^{shape})_g,\; e^{2 s_g(h)} I\big), \qquad
              s_g(h) = a_g + \textstyle\sum_j S_{gj} h^{contrast}_j

    with t_ν the Student-t of unit covariance. Given h and the scales, y is Gaussian with covariance
    ``A⁻¹ diag(e^{2 s} / τ) A⁻ᵀ``. Shape units act within the leading principal directions (columns of P), where there
    are data enough to place them. With W = S = 0 and one group this is the multivariate Student-t.

    Why local scales: sharpness, texture, shadows, spectacles and background make the whitened residuals of real crops
    heavy-tailed place by place; one scale for the whole patch sees the average only (Wainwright & Simoncelli 2000 on
    natural pictures). Why binary units on top: what the scales of neighbouring and mirrored places have in common
    (Karklin & Lewicki 2005; Ranzato & Hinton 2010 call the two kinds of unit mean and covariance units).

    ``E_q[log p(y | h)]`` is bounded by Jensen's inequality on ``-log1p``, after which the expectation of
    ``exp(-2 s_g) |e_g - m_g|²`` under independent units is a product; the bound is exact for q in {0, 1}.

    Args:
        shape_units: number of units that move the mean.
        contrast_units: number of units that gate scales.
        directions: number of principal directions that the shape units act in.
        groups: for each of the ``dimension`` residuals the group it belongs to, 0-based, every group non-empty.

    Raises:
        InputError: no unit of either kind, no direction, or a group without residuals.
    """

    bias: Tensor
    analysis: Tensor
    synthesis: Tensor
    log_det: Tensor
    directions: Tensor
    group: Tensor
    slot: Tensor
    group_size: Tensor

    def __init__(self, shape_units: int, contrast_units: int, directions: int, groups: Tensor) -> None:
        super().__init__()
        if shape_units < 1 or contrast_units < 1 or directions < 1:
            raise InputError(
                f"a gated layer of {shape_units} shape units, {contrast_units} contrast units and "
                f"{directions} directions: give at least one of each"
            )
        dimension, count = len(groups), int(groups.max()) + 1
        sizes = torch.bincount(groups, minlength=count)
        if bool((sizes == 0).any()):
            raise InputError(f"group {int((sizes == 0).nonzero()[0])} has no residual: number the groups without gaps")
        self.shape_units, self.contrast_units = shape_units, contrast_units
        self.config = {
            "layer": "gated",
            "shape_units": shape_units,
            "contrast_units": contrast_units,
            "directions": directions,
            "groups": groups.tolist(),
        }
        self.register_buffer("group", groups)
        self.register_buffer("group_size", sizes.float())
        # Members of each group, filled up with the index of a zero that `_pool` appends: a gather is faster than a
        # scatter.
        slot = torch.full((count, int(sizes.max())), dimension)
        for g in range(count):
            slot[g, : sizes[g]] = (groups == g).nonzero()[:, 0]
        self.register_buffer("slot", slot)
        self.register_buffer("bias", torch.zeros(dimension))
        self.register_buffer("analysis", torch.eye(dimension))
        self.register_buffer("synthesis", torch.eye(dimension))
        self.register_buffer("log_det", torch.zeros(()))
        self.register_buffer("directions", torch.eye(dimension, directions))
        self.log_scale = nn.Parameter(torch.zeros(count))  # a
        self.log_excess = nn.Parameter(torch.full((count,), math.log(3.0)))  # log(ν - 2)
        self.shift = nn.Parameter(torch.zeros(directions, shape_units))  # W
        self.gate = nn.Parameter(torch.zeros(count, contrast_units))  # S
        self.recognition_bias = nn.Parameter(torch.zeros(shape_units + contrast_units))
        self.recognition = nn.Parameter(torch.zeros(directions + count, shape_units + contrast_units))

    @property
    def hidden(self) -> int:
        return self.shape_units + self.contrast_units

    @property
    def dimension(self) -> int:
        return self.bias.shape[0]

    @property
    def nu(self) -> Float[Tensor, "group"]:
        """Degrees of freedom of each group, above 2."""
        return 2 + self.log_excess.exp()

    @torch.no_grad()
    def set_analysis(
        self,
        bias: Float[Tensor, "dimension"],
        analysis: Float[Tensor, "dimension dimension"],
        directions: Float[Tensor, "dimension direction"],
    ) -> None:
        """Set b, A and P, and what follows from A (its inverse and log-determinant).

        Raises:
            InputError: when A is singular or not finite.
        """
        sign, log_det = torch.linalg.slogdet(analysis.double())
        if not bool(torch.isfinite(log_det)) or float(sign) == 0:
            raise InputError("the analysis filters are singular: whiten with a larger noise floor")
        self.bias.copy_(bias)
        self.analysis.copy_(analysis)
        self.synthesis.copy_(torch.linalg.inv(analysis.double()))
        self.log_det.copy_(log_det)
        self.directions.copy_(directions)

    def residual(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch dimension"]:
        """``A (y - b)``."""
        return (y - self.bias) @ self.analysis.T

    def recognise(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch hidden"]:
        return self.recognise_residual(self.residual(y))

    def recognise_residual(self, e: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch hidden"]:
        """The recognition posterior from residuals: linear in principal coordinates and log-energies of groups."""
        energy = torch.log(self._pool(e**2) / self.group_size + ENERGY_FLOOR)
        features = torch.cat([e @ self.directions, energy], -1)
        return torch.sigmoid((features @ self.recognition + self.recognition_bias).clamp(-LOGIT_LIMIT, LOGIT_LIMIT))

    def log_prob(
        self, y: Float[Tensor, "*#batch dimension"], h: Float[Tensor, "*#batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        shape, contrast = self._split(h)
        square = self._pool((self.residual(y) - shape @ self._moves().T) ** 2)
        return self._student(square, self.log_scale + contrast @ self.gate.T) + self.log_det

    def expected_log_prob(
        self, y: Float[Tensor, "*batch dimension"], q: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        return self.expected_residual_log_prob(self.residual(y), q) + self.log_det

    def expected_residual_log_prob(
        self, e: Float[Tensor, "*batch dimension"], q: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        """The bound of `expected_log_prob` for residuals e, without ``log |det A|``."""
        shape, contrast = self._split(q)
        moves = self._moves()
        spread = torch.stack([self._pool(column**2) for column in moves.T], -1)
        square = self._pool((e - shape @ moves.T) ** 2) + (shape * (1 - shape)) @ spread.T
        # log E[exp(-2 S h)] for independent units, minus what the mean of s already gives.
        gated = torch.log1p(contrast[..., None, :] * torch.expm1(-2 * self.gate)).sum(-1)
        mean_scale = self.log_scale + contrast @ self.gate.T
        excess = gated + 2 * (contrast @ self.gate.T)
        return self._student(square * excess.exp(), mean_scale)

    def update_hidden(
        self,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        logits: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch hidden"]:
        shape, contrast = self._split(h)
        moves = self._moves().T
        units = list(h.unbind(-1))
        away = self.residual(y) - shape @ moves
        scale = self.log_scale + contrast @ self.gate.T
        for j in range(self.shape_units):
            without = away + units[j][..., None] * moves[j]
            odds = self._student(self._pool((without - moves[j]) ** 2), scale) - self._student(
                self._pool(without**2), scale
            )
            units[j] = bernoulli(torch.sigmoid(logits[..., j] + odds), generator)
            away = without - units[j][..., None] * moves[j]
        square = self._pool(away**2)
        for k in range(self.contrast_units):
            j = self.shape_units + k
            without = scale - units[j][..., None] * self.gate[:, k]
            odds = self._student(square, without + self.gate[:, k]) - self._student(square, without)
            units[j] = bernoulli(torch.sigmoid(logits[..., j] + odds), generator)
            scale = without + units[j][..., None] * self.gate[:, k]
        return torch.stack(units, -1)

    def mean(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch dimension"]:
        return self.bias + (self._split(h)[0] @ self._moves().T) @ self.synthesis.T

    def sample(
        self, h: Float[Tensor, "*batch hidden"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch dimension"]:
        shape, contrast = self._split(h)
        scale = self.log_scale + contrast @ self.gate.T
        half = (self.nu / 2).expand(scale.shape)
        tau = standard_gamma(half, generator) / ((self.nu - 2) / 2)
        sd = (scale.exp() / tau.sqrt())[..., self.group]
        e = shape @ self._moves().T + sd * _normal_like(sd, generator)
        return self.bias + e @ self.synthesis.T

    def sample_denoised(
        self,
        observed: Float[Tensor, "*batch dimension"],
        noise: float,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch dimension"]:
        shape, contrast = self._split(h)
        centre = shape @ self._moves().T
        inverse = torch.exp(-2 * (self.log_scale + contrast @ self.gate.T))
        square = self._pool((self.residual(y) - centre) ** 2) * inverse
        half = ((self.nu + self.group_size) / 2).expand(square.shape)
        tau = standard_gamma(half, generator) / ((self.nu - 2 + square) / 2)
        precision = (tau * inverse)[..., self.group]
        # In the residuals the prior precision is diagonal and the likelihood's is the same for every sample. A solution
        # with a right side that is drawn with the precision as covariance is a draw from the posterior.
        likelihood = self.synthesis.T @ self.synthesis / noise**2
        pull = precision * centre + (observed - self.bias) @ self.synthesis / noise**2
        noisy = _normal_like(pull, generator) * precision.sqrt()
        noisy = noisy + _normal_like(pull, generator) @ self.synthesis / noise
        return self.bias + _solve(likelihood, precision, pull + noisy) @ self.synthesis.T

    def filters(self) -> Float[Tensor, "hidden dimension"]:
        """Shape units: the change of mean. Contrast units: their log-scales, one value a residual."""
        moves = self._moves().T @ self.synthesis.T
        return torch.cat([moves, self.gate.T[:, self.group]])

    def _split(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h[..., : self.shape_units], h[..., self.shape_units :]

    def _moves(self) -> Tensor:
        """``P W``: what each shape unit adds to the residuals, ``(dimension, shape_units)``."""
        return self.directions @ self.shift

    def _pool(self, values: Tensor) -> Tensor:
        """Sums over groups: ``(..., dimension) -> (..., group)``."""
        return functional.pad(values, (0, 1))[..., self.slot].sum(-1)

    def _student(self, square: Tensor, log_scale: Tensor) -> Tensor:
        """Sum over groups of the log Student-t density of residuals with squared length `square`."""
        nu, d = self.nu, self.group_size
        constant = torch.lgamma((nu + d) / 2) - torch.lgamma(nu / 2) - 0.5 * d * torch.log(math.pi * (nu - 2))
        distance = square * torch.exp(-2 * log_scale)
        return (constant - d * log_scale - 0.5 * (nu + d) * torch.log1p(distance / (nu - 2))).sum(-1)


class DeepBeliefNet(nn.Module):
    """The two-layer stack as a density over density coordinates y.

    Args:
        layer: ``p(y | h1)``.
        top: the binary RBM over (h1, h2); its visible units are h1.
        core: closed-form elliptical density of the same data, the surrogate.

    Attributes:
        log_z, log_z_se: log-normaliser of the top RBM in nats and its standard error (0 when exact); set by
            `set_log_z`.

    Raises:
        InputError: when the layer's units are not the top's visible units, or its coordinates not the core's.
    """

    log_z: Tensor
    log_z_se: Tensor

    def __init__(self, layer: DiagonalLayer | GatedLayer, top: BernoulliRBM, core: EllipticalDensity) -> None:
        super().__init__()
        if layer.hidden != top.visible:
            raise InputError(
                f"a layer of {layer.hidden} hidden units under a top of {top.visible} visible ones: make them equal"
            )
        if layer.dimension != core.dimension:
            raise InputError(
                f"a layer over {layer.dimension} coordinates with a core over {core.dimension}: make them equal"
            )
        self.layer, self.top, self.core = layer, top, core
        self.register_buffer("log_z", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("log_z_se", torch.tensor(math.nan, dtype=torch.float64))

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build a net of the same form; JSON-able."""
        return {**self.layer.config, "top": self.top.hidden, "dimension": self.core.dimension}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DeepBeliefNet":
        """An untrained net of the form of `config`, into which ``load_state_dict`` puts the tensors.

        Raises:
            InputError: for an unknown kind of layer.
        """
        if config["layer"] == "diagonal":
            layer = DiagonalLayer(config["hidden"], config["dimension"])
        elif config["layer"] == "gated":
            groups = torch.tensor(config["groups"])
            layer = GatedLayer(config["shape_units"], config["contrast_units"], config["directions"], groups)
        else:
            raise InputError(f"layer {config['layer']!r} of a deep belief network: known are 'gated' and 'diagonal'")
        return cls(layer, BernoulliRBM(layer.hidden, config["top"]), EllipticalDensity.blank(config["dimension"]))

    def set_log_z(self, estimate: float, standard_error: float) -> None:
        """Store log Z of the top RBM (`inference.ais.log_z`); to be called whenever the top changes."""
        self.log_z.fill_(estimate)
        self.log_z_se.fill_(standard_error)

    def infer_hidden(self, y: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch hidden"]:
        """Probabilities ``q(h1_j = 1 | y)`` of the recognition posterior."""
        return self.layer.recognise(y)

    def refine_hidden(
        self,
        y: Float[Tensor, "*batch dimension"],
        *,
        steps: int = 10,
        rate: float = 0.6,
    ) -> Float[Tensor, "*batch hidden"]:
        """A factorial posterior closer to the truth than the recognition posterior, by damped mean-field steps.

        They come to rest where each unit's log-odds are the slope of the bound without its entropy term. Strongly
        coupled units may overshoot: where the bound is no better than at the start, the start is returned. The result
        is a constant to autograd.

        Args:
            y: density coordinates.
            steps: mean-field steps.
            rate: share of the way that the log-odds go in a step.
        """
        y = y.detach()
        q = self.layer.recognise(y).detach()
        logits = torch.logit(q, 1e-5)
        for _ in range(steps):
            with torch.enable_grad():
                p = torch.sigmoid(logits).requires_grad_()
                target = (self.layer.expected_log_prob(y, p) - self.top.free_energy(p)).sum()
                (slope,) = torch.autograd.grad(target, p)
            logits = (1 - rate) * logits + rate * slope.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        refined = torch.sigmoid(logits)
        with torch.no_grad():
            better = self._unnormalised_bound(y, refined) > self._unnormalised_bound(y, q)
        return torch.where(better[..., None], refined, q)

    def log_prob_bound(
        self, y: Float[Tensor, "*batch dimension"], q: Float[Tensor, "*batch hidden"] | None = None
    ) -> Float[Tensor, "*batch"]:
        """Lower bound of log p(y) in nats, differentiable in y, without sampling noise beyond that of log Z.

        ``log_prob_bound(y)`` costs one pass; ``log_prob_bound(y, net.refine_hidden(y))`` is never lower and what to
        quote.

        Args:
            y: density coordinates.
            q: probabilities of any factorial posterior; the recognition posterior by default. Any q gives a bound.
        """
        q = self.layer.recognise(y) if q is None else q
        return self._unnormalised_bound(y, q) - self.log_z.to(y.dtype)

    def _unnormalised_bound(self, y: Tensor, q: Tensor) -> Tensor:
        """The bound of log p(y) + log Z."""
        return self.layer.expected_log_prob(y, q) - self.top.free_energy(q) + entropy(q)

    def log_joint(
        self, y: Float[Tensor, "*#batch dimension"], h: Float[Tensor, "*#batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        """``log p(y, h1)`` with h2 summed out."""
        return self.layer.log_prob(y, h) - self.top.free_energy(h) - self.log_z.to(y.dtype)

    @torch.no_grad()
    def gibbs_hidden(
        self,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
        *,
        update: Literal["exact", "recognition"] = "exact",
    ) -> Float[Tensor, "*batch hidden"]:
        """Next h1 given y.

        ``"exact"`` draws h2 given h1 and then sweeps h1 unit by unit from its exact conditional: it leaves
        ``p(h1, h2 | y)`` invariant. ``"recognition"`` draws h1 from the recognition posterior as the paper does (sec.
        3.1): fast, independent of the current h1, and biased by as much as that posterior is wrong.

        Raises:
            InputError: another `update`.
        """
        if update not in ("exact", "recognition"):
            raise InputError(f"update={update!r}: 'exact' or 'recognition'")
        if update == "recognition":
            return bernoulli(self.layer.recognise(y), generator)
        above = self.top.sample_hidden(h, generator)
        logits = above @ self.top.weight.T + self.top.visible_bias
        return self.layer.update_hidden(y, h, logits, generator)

    @torch.no_grad()
    def gibbs_canonical(
        self,
        observed: Float[Tensor, "*batch dimension"],
        noise: float,
        y: Float[Tensor, "*batch dimension"],
        h: Float[Tensor, "*batch hidden"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch dimension"]:
        """Next y given h1 and ``observed ~ N(y, noise² I)``: exact draws of the latent scales, then of y given them."""
        return self.layer.sample_denoised(observed, noise, y, h, generator)

    @torch.no_grad()
    def sample_hidden(
        self, count: int, generator: torch.Generator | None = None, *, sweeps: int = 200
    ) -> Float[Tensor, "count hidden"]:
        """Draws of h1 from the top RBM: independent chains of `sweeps` Gibbs sweeps from independent units."""
        start = torch.sigmoid(self.top.visible_bias).expand(count, -1)
        return self.top.gibbs(bernoulli(start, generator), sweeps, generator)

    @torch.no_grad()
    def sample(
        self, count: int, generator: torch.Generator | None = None, *, sweeps: int = 200
    ) -> Float[Tensor, "count dimension"]:
        """Draws of y from the net."""
        return self.layer.sample(self.sample_hidden(count, generator, sweeps=sweeps), generator)

    def to_canonical(
        self, y: Float[Tensor, "*batch 575"], *, brightness: float = 0.5, contrast: float = 0.2
    ) -> Float[Tensor, "*batch 24 24"]:
        """The canonical picture of y, grey levels in [0, 1]; brightness and contrast, unknown to y, are chosen."""
        return (brightness + contrast * from_density_coordinates(y)).clamp(0, 1)

    @torch.no_grad()
    def filters(self) -> Float[Tensor, "hidden 24 24"]:
        """A picture of what each unit of h1 does: the change of the mean, or the map of log-scales that it switches."""
        effect = self.layer.filters()
        pictures = from_density_coordinates(effect)
        if isinstance(self.layer, GatedLayer):
            # Log-scales are no direction in y: each stands at its residual's pixel, and the first pixel has its
            # neighbour's.
            scales = effect[self.layer.shape_units :]
            pictures[self.layer.shape_units :] = torch.cat([scales[:, :1], scales], 1).unflatten(-1, (SIDE, SIDE))
        return pictures


class HiddenPrior(TorchDistribution):
    """The top RBM as a distribution over h1 ∈ {0, 1}^N, h2 summed out: the site ``hidden``.

    Args:
        dbn: the net.
        sweeps: Gibbs sweeps of a draw.
    """

    arg_constraints = {}  # pyright: ignore[reportAssignmentType]
    support = constraints.independent(constraints.boolean, 1)  # pyright: ignore[reportAssignmentType]

    def __init__(self, dbn: DeepBeliefNet, batch_shape: torch.Size = torch.Size(), *, sweeps: int = 50) -> None:
        self.dbn, self.sweeps = dbn, sweeps
        super().__init__(batch_shape, torch.Size([dbn.top.visible]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "HiddenPrior":
        return HiddenPrior(self.dbn, torch.Size(batch_shape), sweeps=self.sweeps)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.dbn.sample_hidden(shape[:-1].numel(), sweeps=self.sweeps).reshape(shape)

    def log_prob(self, value: Float[Tensor, "*batch hidden"]) -> Tensor:
        log_prob = -self.dbn.top.free_energy(value) - self.dbn.log_z.to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


class CanonicalGivenHidden(TorchDistribution):
    """``p(y | h1)`` as a distribution over density coordinates, latent scales integrated out: the site ``canonical``.

    Args:
        dbn: the net.
        hidden: ``(*batch, N)`` states of h1.
    """

    arg_constraints = {}  # pyright: ignore[reportAssignmentType]
    support = constraints.real_vector  # pyright: ignore[reportAssignmentType]

    def __init__(self, dbn: DeepBeliefNet, hidden: Float[Tensor, "*batch hidden"]) -> None:
        self.dbn, self.hidden = dbn, hidden
        super().__init__(hidden.shape[:-1], torch.Size([dbn.core.dimension]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "CanonicalGivenHidden":
        return CanonicalGivenHidden(self.dbn, self.hidden.expand(*batch_shape, self.hidden.shape[-1]))

    @property
    def mean(self) -> Tensor:
        """``E[y | h1]``."""
        return self.dbn.layer.mean(self.hidden)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.dbn.layer.sample(self.hidden.expand(*sample_shape, *self.hidden.shape))

    def log_prob(self, value: Float[Tensor, "*batch dimension"]) -> Float[Tensor, "*batch"]:
        return self.dbn.layer.log_prob(value, self.hidden)


def _solve(
    common: Float[Tensor, "dimension dimension"],
    diagonal: Float[Tensor, "*batch dimension"],
    right: Float[Tensor, "*batch dimension"],
) -> Float[Tensor, "*batch dimension"]:
    """``(common + diag(diagonal))⁻¹ right`` for many positive diagonals, by conjugate gradients on all at once.

    The matrix with the batch's geometric mean diagonal preconditions, so that one is factored instead of every one.
    What is left of `right`, in the norm of that matrix's inverse, falls below `SOLVED`. Where the solution is a draw
    with this precision, it is wrong by as many of its sds where its diagonal is the mean one, and elsewhere by at most
    the root of their largest ratio more; float32 knows no better.
    """
    if right.numel() == 0:
        return right
    middle = diagonal.log().reshape(-1, diagonal.shape[-1]).mean(0).exp()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(common + torch.diag(middle)))
    x, residual = torch.zeros_like(right), right
    improved = residual @ inverse
    direction, square = improved, torch.linalg.vecdot(residual, improved)[..., None]
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(MOST_ITERATIONS):
        if float(square.max()) < SOLVED**2:
            break
        image = torch.addcmul(direction @ common, diagonal, direction)
        # A sample that is solved to the last bit has no direction left.
        step = square / torch.linalg.vecdot(direction, image)[..., None].clamp(min=tiny)
        x, residual = torch.addcmul(x, step, direction), torch.addcmul(residual, step, image, value=-1)
        improved = residual @ inverse
        before, square = square, torch.linalg.vecdot(residual, improved)[..., None]
        direction = torch.addcmul(improved, square / before.clamp(min=tiny), direction)
    else:
        # By Cholesky: MKL's batched LU fails on several threads.
        factor = torch.linalg.cholesky(common + torch.diag_embed(diagonal))
        return torch.cholesky_solve(right[..., None], factor)[..., 0]
    return x


def _normal_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
