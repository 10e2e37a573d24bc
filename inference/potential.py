r"""The energy of a gaze and its gradient, for all scenes and chains at once.

The energy of chart coordinates z is :math:`E(z) = \mathrm{score}(x(u)) - \log p(u) - \log|\partial u / \partial z|`, u
= base ∘ δ(z): the score of the patch that the gaze reads (`QuadraticScore`: Tang et al. 2014, sec. 3.1; `OddsScore`:
the object against clutter), the prior over gazes and the chart's log-determinant. On the CPU patches and slopes come
out of compiled loops (`foveate.inference.kernels`), elsewhere out of autograd through `GazePotential.energy`, which is
the plain definition of the same number.

Convention: as `foveate.model.gaze`; a batch of chart coordinates is ``(scene, ..., 4)``.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from foveate.model.density import EllipticalDensity
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.gaze import CANONICAL_SIZE, FlatGazePrior, GazePrior, LocalChart, lattice, log_prior
from foveate.model.identity import IdentityModel
from foveate.model.patch import NORMALISING_FLOOR, Pyramid, density_coordinates, from_density_coordinates
from foveate.model.threads import share

__all__ = ["CanonicalDensity", "GazePotential", "OddsScore", "PatchScore", "PersonRatio", "QuadraticScore"]

# Below this many gazes a thread costs more than it saves.
LEAST = 4


@runtime_checkable
class PatchScore(Protocol):
    """Energy of patches, in nats."""

    def energy(self, patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch"]:
        """Energies, differentiable in the patch."""
        ...

    def energy_and_slope(
        self, patch: Float[Tensor, "gaze 576"], batch: tuple[int, ...], rows: Int[Tensor, " gaze"]
    ) -> tuple[Float[Tensor, " gaze"], Float[Tensor, "gaze 576"]]:
        """Energies and their derivatives by the patch, of the gazes `rows` of a flattened batch."""
        ...


class QuadraticScore:
    r"""The paper's energy of a patch given the canonical image, :math:`\tfrac12 \sum_i (x_i(u) - v_i)^2 / \sigma_i^2`.

    The normaliser of the likelihood is left out.

    Args:
        target: v, ``(*batch, 24, 24)``; its batch is the leading part of the gazes', or empty.
        sigma: noise of the pixels, a number or ``(24, 24)``.

    Raises:
        InputError: a sigma that is not positive.
    """

    def __init__(self, target: Float[Tensor, "*batch 24 24"], sigma: float | Float[Tensor, "24 24"]) -> None:
        sigma = torch.as_tensor(sigma, dtype=target.dtype, device=target.device)
        if not bool((sigma > 0).all()):
            raise InputError(f"sigma has a value of {float(sigma.min()):g}: the noise of every pixel must be positive")
        self.target = target.flatten(-2)
        self.precision = (sigma**-2).expand(CANONICAL_SIZE, CANONICAL_SIZE).flatten()

    def energy(self, patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch"]:
        """Energies, differentiable in the patch."""
        away = patch.flatten(-2) - _aligned(self.target, patch.shape[:-2])
        return 0.5 * (away**2 * self.precision).sum(-1)

    def energy_and_slope(
        self, patch: Float[Tensor, "gaze 576"], batch: tuple[int, ...], rows: Int[Tensor, " gaze"]
    ) -> tuple[Float[Tensor, " gaze"], Float[Tensor, "gaze 576"]]:
        """Energies and their derivatives by the patch, of the gazes `rows` of a flattened batch."""
        away = patch - _aligned(self.target, batch).expand(*batch, -1).reshape(-1, _POINTS)[rows]
        slope = away * self.precision
        return 0.5 * (slope * away).sum(-1), slope

    def tables(self, batch: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Targets, a row for each gaze or one for all, and precisions ``(1, 576)``, for the compiled loops."""
        target = self.target if self.target.ndim == 1 else _aligned(self.target, batch).expand(*batch, -1)
        rows, precision = target.detach().reshape(-1, _POINTS), self.precision.detach().reshape(1, _POINTS)
        return np.ascontiguousarray(rows.numpy(), dtype), np.ascontiguousarray(precision.numpy(), dtype)


class CanonicalDensity(NamedTuple):
    """The object's density once its canonical image is known: normal about the image.

    Attributes:
        canonical: ``(*batch, 575)`` density coordinates; the batch is the leading part of the gazes', or empty.
        noise: standard deviation, in normalised intensities.
    """

    canonical: Float[Tensor, "*batch 575"]
    noise: float


class PersonRatio(NamedTuple):
    """The Bayes factor of "the person of a given picture" against "anybody": it makes the object's density a person's.

    Attributes:
        identity: what tells people apart.
        of_v: ``(*batch, direction)`` coordinates of the given pictures; the batch is the leading part of the gazes', or
            empty.
    """

    identity: IdentityModel
    of_v: Float[Tensor, "*batch direction"]

    def log_ratio(self, patch: Float[Tensor, "*batch 24 24"], of_v: Tensor) -> Float[Tensor, "*batch"]:
        """Of patches in [0, 1] in nats; differentiable."""
        return self.identity.log_ratio(self.identity.coordinates(patch), of_v).to(patch)


class OddsScore:
    """Minus the log odds of a patch, the object's density against clutter's, both of its density coordinates.

    The Jacobian of the normalisation is the same on both sides and cancels, here and only here. The densities are read
    once: after a change make another score.

    Args:
        object: density of the object's patches: an elliptical one (v integrated out), or one about a given canonical
            image.
        clutter: density of patches that are not the object; ``None`` for the paper's likelihood, without the odds.
        temperature: divides the log odds, which correlated pixels make overconfident.
        person: whom the object shows; its ratio brings its own weight, and the temperature leaves it alone.
        edges: what the patch's edges say beside its pixels; the temperature divides the sum.

    Raises:
        InputError: a temperature or a noise that is not positive.
    """

    def __init__(
        self,
        object: EllipticalDensity | CanonicalDensity,
        clutter: EllipticalDensity | None,
        temperature: float = 1.0,
        person: PersonRatio | None = None,
        edges: EdgeOdds | None = None,
    ) -> None:
        if not temperature > 0:
            raise InputError(f"temperature {temperature}: it must be positive")
        if isinstance(object, CanonicalDensity) and not object.noise > 0:
            raise InputError(f"noise {object.noise}: it must be positive")
        self.object, self.clutter, self.temperature = object, clutter, temperature
        self.person, self.edges = person, edges
        self._compiled: dict[torch.dtype, _Compiled] = {}
        self._centres: tuple[tuple[int, ...], torch.dtype, Tensor] | None = None

    def energy(self, patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch"]:
        """Energies, differentiable in the patch."""
        y = density_coordinates(patch)
        if isinstance(self.object, CanonicalDensity):
            canonical, noise = self.object
            away = (y - _aligned(canonical, y.shape[:-1])) / noise
            energy = 0.5 * away.square().sum(-1) + 575 * math.log(noise * math.sqrt(2 * math.pi))
        else:
            energy = -self.object.log_prob(y)
        if self.clutter is not None:
            energy = energy + self.clutter.log_prob(y)
        if self.edges is not None:
            energy = energy - self.edges.log_odds(y)
        energy = energy / self.temperature
        if self.person is not None:
            energy = energy - self.person.log_ratio(patch, _aligned(self.person.of_v, patch.shape[:-2]))
        return energy

    def energy_of_many(self, patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch"]:
        """Energies without derivatives, nats: compiled on the CPU where no person is asked for; not differentiable."""
        if self.person is not None or patch.device.type != "cpu":
            return self.energy(patch).detach()
        rows = patch.detach().reshape(-1, _POINTS)
        n, _ = _normalised(rows)
        if isinstance(self.object, CanonicalDensity):
            energy = self._about_canonical(n, self._centre(tuple(patch.shape[:-2]), n))[0]
        else:
            energy = n.new_zeros(len(n))
        for form, _, square in self._forms_of(n):
            energy = energy + form.energy(square)
        if self.edges is not None:
            energy = energy - self._edges(n)[0]
        return (energy / self.temperature).reshape(patch.shape[:-2])

    def energy_and_slope(
        self, patch: Float[Tensor, "gaze 576"], batch: tuple[int, ...], rows: Int[Tensor, " gaze"]
    ) -> tuple[Float[Tensor, " gaze"], Float[Tensor, "gaze 576"]]:
        """Energies and their derivatives by the patch, of the gazes `rows` of a flattened batch."""
        n, deviation = _normalised(patch)
        energy, of_n = n.new_zeros(len(n)), torch.zeros_like(n)
        if isinstance(self.object, CanonicalDensity):
            energy, of_n = self._about_canonical(n, self._centre(batch, n)[rows])
        for form, pulled, square in self._forms_of(n):
            energy, of_n = energy + form.energy(square), of_n + form.slope(square, pulled)
        if self.edges is not None:
            log_odds, bent = self._edges(n)
            energy, of_n = energy - log_odds, of_n - self._edge_slopes(n, bent)
        of_n = of_n - of_n.mean(-1, keepdim=True)
        slope = _through_normalising(of_n, n, deviation)
        energy, slope = energy / self.temperature, slope / self.temperature
        if self.person is not None:
            of_v = _aligned(self.person.of_v, batch)
            of_v = of_v.expand(*batch, -1).reshape(-1, of_v.shape[-1])[rows]
            with torch.inference_mode(False), torch.enable_grad():
                seen = patch.detach().clone().reshape(-1, CANONICAL_SIZE, CANONICAL_SIZE).requires_grad_(True)
                ratio = self.person.log_ratio(seen, of_v.clone())
                (of_seen,) = torch.autograd.grad(ratio.sum(), seen)
            energy, slope = energy - ratio.detach(), slope - of_seen.flatten(-2)
        return energy, slope

    def _about_canonical(self, n: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Energies about given canonical images, and derivatives by the normalised patches."""
        assert isinstance(self.object, CanonicalDensity)
        noise = self.object.noise
        away = (n - centre) / noise
        return 0.5 * (away * away).sum(-1) + 575 * math.log(noise * math.sqrt(2 * math.pi)), away / noise

    def _forms_of(self, n: Tensor) -> Iterator[tuple["_Form", Tensor, Tensor]]:
        """For every elliptical density ``P (n − centre)`` of normalised patches, and its product with n − centre."""
        compiled = self._compile(n)
        # One matrix product serves all densities.
        product = _rowwise(n, compiled.precision)
        for which, form in enumerate(compiled.forms):
            pulled = product[:, which * _POINTS : (which + 1) * _POINTS] - form.pull
            yield form, pulled, (pulled * (n - form.centre)).sum(-1)

    def _edges(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """The edges' log odds of normalised patches, and ``λ u·f``, their slopes along the edges' axes."""
        # `edges` normalises what it is given, and this is: once more.
        again, _ = _normalised(n)
        features = np.empty((len(n), 11, 11, 8), again.numpy().dtype)
        share(_kernels().edge_features, len(n), again.numpy(), features, least=LEAST)
        compiled = self._compile(n)
        along = _rowwise(torch.from_numpy(features).flatten(1), compiled.axes)
        straight, turned = along[:, 0], along[:, 1:]
        bent = compiled.curvature * turned
        return straight + compiled.offset - 0.5 * (bent * turned).sum(-1), bent

    def _edge_slopes(self, n: Tensor, bent: Tensor) -> Tensor:
        """Derivatives of the edges' log odds by normalised patches."""
        again, deviation = _normalised(n)
        axes = self._compile(n).axes
        of_features = (axes[:, 0] - _rowwise(bent, axes[:, 1:].T)).reshape(-1, 11, 11, 8)
        slope = np.empty_like(again.numpy())
        share(_kernels().edge_slopes, len(n), again.numpy(), of_features.numpy(), slope, least=LEAST)
        return _through_normalising(torch.from_numpy(slope), again, deviation)

    def _compile(self, like: Tensor) -> "_Compiled":
        """What is scored as functions of the normalised patch, in the dtype of `like`."""
        if like.dtype not in self._compiled:
            forms, matrices = [], [like.new_empty(_POINTS, 0)]
            for density, sign in ((self.object, 1.0), (self.clutter, -1.0)):
                if not isinstance(density, EllipticalDensity):
                    continue
                axes = from_density_coordinates(density.axes.detach().double().T).flatten(-2).T
                centre = from_density_coordinates(density.mean.detach().double()).flatten()
                precision = (axes / density.variances.double()) @ axes.T
                least = -float(density.log_prob(density.mean))
                pull = (centre @ precision).to(like)
                forms.append(_Form(sign, centre.to(like), pull, least, float(density.nu), density.seen))
                matrices.append(precision.to(like))
            axes, curvature, offset = like.new_empty(0, 0), like.new_empty(0), 0.0
            if self.edges is not None:
                both = torch.cat([self.edges.direction[:, None], self.edges.axes], 1).to(like)
                # Cells first, as the compiled loops have them.
                axes = both.reshape(8, 11, 11, -1).permute(1, 2, 0, 3).flatten(0, 2).contiguous()
                curvature, offset = self.edges.curvature.to(like), float(self.edges.offset)
            self._compiled[like.dtype] = _Compiled(forms, torch.cat(matrices, -1), axes, curvature, offset)
        return self._compiled[like.dtype]

    def _centre(self, batch: tuple[int, ...], like: Tensor) -> Tensor:
        """Canonical images as normalised patches, a row for every gaze of a batch."""
        if self._centres is None or self._centres[:2] != (batch, like.dtype):
            assert isinstance(self.object, CanonicalDensity)
            centre = from_density_coordinates(self.object.canonical.detach()).flatten(-2).to(like)
            self._centres = batch, like.dtype, _aligned(centre, batch).expand(*batch, -1).reshape(-1, _POINTS)
        return self._centres[2]


class GazePotential:
    """Energies and gradients of chart coordinates ``(scene, ..., 4)``: the ``value_and_grad_fn`` of HMC on the gaze.

    Args:
        pyramid: the scenes, of any sizes; each gaze reads its own two levels.
        chart: coordinates of gazes; its base broadcasts against the batch.
        score: energy of the patch.
        prior: the prior over gazes; of the two that `foveate` brings the settings are used with the pyramid's own
            sizes. Any other distribution has a batch of the scenes, and is scored by autograd beside the compiled
            loops, slower. ``None`` leaves it out.
        belief: precisions of a normal density of the coordinates about 0, a guide's ``p(u | I)`` used as a prior; it
            broadcasts against the batch. ``None`` leaves it out.

    Convention: as the module. To the compiled loops a gaze of a million scene pixels or more has infinite energy.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        chart: LocalChart,
        score: PatchScore,
        prior: TorchDistributionMixin | None = None,
        belief: Float[Tensor, "*batch 4"] | None = None,
    ) -> None:
        # The compiled loops read floats.
        self.pyramid = pyramid.to(dtype=pyramid.dtype)
        self.chart, self.score, self.prior, self.belief = chart, score, prior, belief
        # A subclass may have another density, and a setting may be another one in every scene.
        plain = type(prior) in (GazePrior, FlatGazePrior) and all(
            torch.as_tensor(v).numel() == 1 for v in _settings(prior)
        )
        self._compiles_prior = prior is None or plain
        self._tables: dict[tuple[int, ...], _Tables] = {}

    def energy(self, z: Float[Tensor, "scene *chain 4"]) -> Float[Tensor, "scene *chain"]:
        """The definition, in PyTorch alone: differentiable, on any device."""
        return self._energy(z, self.score.energy)

    @torch.no_grad()
    def energy_of_many(self, z: Float[Tensor, "scene *chain 4"]) -> Float[Tensor, "scene *chain"]:
        """Energies without gradients: compiled on the CPU.

        Raises:
            InputError: a score that is no `OddsScore`.
        """
        if not isinstance(self.score, OddsScore):
            raise InputError(f"a {type(self.score).__name__}: energies of many gazes need an OddsScore")
        return self._energy(z, self.score.energy_of_many)

    def _energy(self, z: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        gaze = self.chart.to_gaze(z)
        total = score(self.pyramid.extract(gaze)) - self.chart.log_det(z)
        if self.belief is not None:
            total = total + 0.5 * (self.belief * z * z).sum(-1)
        return total if self.prior is None else total - self._log_prior(gaze)

    def _log_prior(self, gaze: Float[Tensor, "scene *chain 4"]) -> Float[Tensor, "scene *chain"]:
        assert self.prior is not None
        if isinstance(self.prior, GazePrior | FlatGazePrior) and self._compiles_prior:
            size = self.pyramid.size.to(gaze.dtype).reshape(-1, *[1] * (gaze.ndim - 2), 2)
            return _with_size(self.prior, size).log_prob(gaze)
        # Its batch is the scenes: they must come last to broadcast.
        return log_prior(self.prior, gaze.movedim(0, -2)).movedim(-1, 0)

    def __call__(
        self, z: Float[Tensor, "scene *chain 4"]
    ) -> tuple[Float[Tensor, "scene *chain"], Float[Tensor, "scene *chain 4"]]:
        """Energies and gradients: compiled on the CPU, by autograd elsewhere."""
        if z.device.type != "cpu":
            with torch.inference_mode(False), torch.enable_grad():
                z = z.detach().clone().requires_grad_(True)
                energy = self.energy(z)
                (gradient,) = torch.autograd.grad(energy.sum(), z)
            return energy.detach(), gradient
        tables, flat = self._of(z), _rows(z)
        if isinstance(self.score, QuadraticScore):
            energy, gradient = np.empty(len(flat), flat.dtype), np.empty_like(flat)
            targets = tables.targets(self.score)
            share(_kernels().quadratic_energy, len(flat), *tables.arrays, *targets, flat, energy, gradient, least=LEAST)
        else:
            energy, gradient = self._two_passes(tables, flat, len(flat))
        here, slope = torch.from_numpy(energy).reshape(z.shape[:-1]), torch.from_numpy(gradient).reshape(z.shape)
        if self._compiles_prior:
            return here, slope
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_(True)
            of_prior = -self._log_prior(self.chart.to_gaze(z))
            # One that is flat where it is anything has no slope at all.
            pull = torch.autograd.grad(of_prior.sum(), z)[0] if of_prior.requires_grad else torch.zeros_like(z)
        return here + of_prior.detach().to(here), slope + pull

    @property
    def trajectory(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None:
        """Whole leapfrog trajectories, as :class:`BatchedHMC` takes them.

        ``None`` for scenes not on the CPU and for priors that are not compiled.
        """
        return self._trajectory if self._compiles_prior and self.pyramid.texels.device.type == "cpu" else None

    def _trajectory(
        self, z: Tensor, momentum: Tensor, gradient: Tensor, step: Tensor, steps: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tables, batch = self._of(z), z.shape[:-1]
        at, speed, slope, size = (_rows(t) for t in (z, momentum, gradient, step))
        counts = np.full(len(at), steps) if isinstance(steps, int) else _rows(steps[..., None])[:, 0]
        if isinstance(self.score, QuadraticScore):
            at, speed, slope, energy = at.copy(), speed.copy(), slope.copy(), np.empty(len(at), at.dtype)
            targets, run = tables.targets(self.score), _kernels().quadratic_trajectory
            share(run, len(at), *tables.arrays, *targets, at, speed, slope, size, counts, energy, least=LEAST)
        else:
            # Sorted by length, the gazes still under way are always the first ones.
            order = np.argsort(-counts, kind="stable")
            back = np.argsort(order)
            tables, at, speed, slope, size = tables.take(order), at[order], speed[order], slope[order], size[order]
            speed -= 0.5 * size * slope
            energy = np.empty(len(at), at.dtype)
            for active in np.searchsorted(-counts[order], -np.arange(counts.max(initial=0)), side="left").tolist():
                at[:active] += size[:active] * speed[:active]
                energy[:active], slope[:active] = self._two_passes(tables, at, active)
                speed[:active] -= size[:active] * slope[:active]
            speed += 0.5 * size * slope
            at, speed, slope, energy = at[back], speed[back], slope[back], energy[back]
        end, momentum, gradient = (torch.from_numpy(a).reshape(z.shape) for a in (at, speed, slope))
        return end, momentum, torch.from_numpy(energy).reshape(batch), gradient

    def _two_passes(self, tables: "_Tables", z: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Energies and gradients of the first gazes: patches and slopes, the score's slope, their contraction."""
        near, slopes = np.empty(count, np.bool_), np.empty((count, 4 * _POINTS), tables.points[0].dtype)
        share(_kernels().patch_slopes, count, *tables.arrays, z, near, slopes, least=LEAST)
        patch, rows = torch.from_numpy(slopes[:, :_POINTS]), torch.from_numpy(tables.rows[:count])
        of_patch, of_pixels = self.score.energy_and_slope(patch, tables.batch, rows)
        weight = np.ascontiguousarray(of_pixels.numpy(), slopes.dtype)
        energy, gradient = of_patch.numpy().astype(z.dtype), np.empty((count, 4), z.dtype)
        share(_kernels().contract_slopes, count, *tables.arrays, z, near, weight, slopes, energy, gradient, least=LEAST)
        return energy, gradient

    def _of(self, z: Tensor) -> "_Tables":
        shape = tuple(z.shape)
        if shape not in self._tables:
            self._tables[shape] = _Tables.build(self, shape)
        return self._tables[shape]


_POINTS = CANONICAL_SIZE**2


class _Form(NamedTuple):
    """An elliptical density of the normalised patch n: ``least`` is its energy at the centre, ``pull = P centre``.

    ``seen`` is the number of coordinates that it is of.
    """

    sign: float
    centre: Tensor
    pull: Tensor
    least: float
    nu: float
    seen: int

    def energy(self, square: Tensor) -> Tensor:
        """Signed energy by the square ``(n − centre)ᵀ P (n − centre)``."""
        if math.isinf(self.nu):
            return self.sign * (self.least + 0.5 * square)
        return self.sign * (self.least + 0.5 * (self.nu + self.seen) * torch.log1p(square / (self.nu - 2)))

    def slope(self, square: Tensor, pulled: Tensor) -> Tensor:
        """Its derivatives by n; `pulled` is ``P (n − centre)``."""
        if math.isinf(self.nu):
            return self.sign * pulled
        factor = self.sign * (self.nu + self.seen) / (self.nu - 2) / (1 + square / (self.nu - 2))
        return factor[:, None] * pulled


class _Compiled(NamedTuple):
    """What `OddsScore` reads besides the patches; of the edges w and u side by side, λ and c."""

    forms: list[_Form]
    precision: Tensor
    axes: Tensor
    curvature: Tensor
    offset: float


class _Tables(NamedTuple):
    """What the compiled loops read besides the coordinates, for one batch shape.

    Attributes:
        batch: the batch's shape, without the coordinates' dimension.
        rows: which gaze of the flattened batch each row is.
        pyramid: the pyramid's arrays.
        place: (scene, base, scales, prior, belief); scene and base have a row for every gaze.
        points: (px, py) of the lattice, in the texels' dtype.
        scores: the last score's targets and precisions, by the score's identity.
    """

    batch: tuple[int, ...]
    rows: np.ndarray
    pyramid: tuple[np.ndarray, ...]
    place: tuple[np.ndarray, ...]
    points: tuple[np.ndarray, np.ndarray]
    scores: dict[int, tuple[QuadraticScore, tuple[np.ndarray, np.ndarray]]]

    @classmethod
    def build(cls, potential: GazePotential, shape: tuple[int, ...]) -> "_Tables":
        pyramid, chart, prior, belief = potential.pyramid, potential.chart, potential.prior, potential.belief
        if len(shape) < 2 or shape[0] != len(pyramid) or shape[-1] != 4:
            raise InputError(f"chart coordinates of shape {shape} for {len(pyramid)} scenes: needed is (scene, ..., 4)")
        settings = (
            [float(setting.detach() if isinstance(setting, Tensor) else setting) for setting in _settings(prior)]
            if potential._compiles_prior
            else []
        )
        lattice_points = lattice(dtype=pyramid.texels.dtype).reshape(-1, 2).numpy()
        texels = (pyramid.texels, pyramid.offset, pyramid.rows, pyramid.columns, pyramid.stride, pyramid.size)
        return cls(
            batch=shape[:-1],
            rows=np.arange(math.prod(shape[:-1])),
            pyramid=tuple(np.ascontiguousarray(t.detach().numpy()) for t in texels),
            place=(
                np.repeat(np.arange(len(pyramid)), math.prod(shape[1:-1])),
                _spread(chart.base, shape, "the chart's base"),
                np.array(chart.scales, np.float64),
                np.array(settings, np.float64),
                np.zeros((1, 4)) if belief is None else _spread(belief, shape, "the belief"),
            ),
            points=(np.ascontiguousarray(lattice_points[:, 0]), np.ascontiguousarray(lattice_points[:, 1])),
            scores={},
        )

    @property
    def arrays(self) -> tuple[tuple[np.ndarray, ...], ...]:
        """The first arguments of every loop."""
        return self.pyramid, self.place, self.points

    def targets(self, score: QuadraticScore) -> tuple[np.ndarray, np.ndarray]:
        """Targets and precisions of a quadratic score."""
        if id(score) not in self.scores:
            self.scores.clear()
            self.scores[id(score)] = score, score.tables(self.batch, self.points[0].dtype)
        return self.scores[id(score)][1]

    def take(self, rows: np.ndarray) -> "_Tables":
        """The same for some of the gazes."""
        scene, base, scales, prior, belief = self.place
        belief = belief if len(belief) == 1 else belief[rows]
        return self._replace(rows=self.rows[rows], place=(scene[rows], base[rows], scales, prior, belief))


def _spread(value: Tensor, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A row for every gaze."""
    try:
        spread = value.detach().double().expand(shape)
    except RuntimeError as error:
        raise InputError(
            f"{what} {tuple(value.shape)} does not broadcast to coordinates {shape}: "
            "give it (scene, 1, 4) for all chains of a scene"
        ) from error
    return spread.reshape(-1, 4).contiguous().numpy()


def _aligned(value: Tensor, batch: tuple[int, ...] | torch.Size) -> Tensor:
    """Values ``(*leading, d)`` with ones for the batch dimensions that they lack, to broadcast with ``(*batch, d)``."""
    leading = tuple(value.shape[:-1])
    if leading != tuple(batch[: len(leading)]):
        raise InputError(
            f"canonical images of batch {leading} for gazes of batch {tuple(batch)}: the first must lead the second"
        )
    return value.reshape(*leading, *[1] * (len(batch) - len(leading)), value.shape[-1])


def _settings(prior: TorchDistributionMixin | None) -> tuple[float | Tensor, ...]:
    if isinstance(prior, GazePrior):
        return prior.typical, prior.log_scale_sd, prior.rotation_sd, prior.edge
    return (prior.largest,) if isinstance(prior, FlatGazePrior) else ()


def _with_size(prior: GazePrior | FlatGazePrior, size: Tensor) -> GazePrior | FlatGazePrior:
    settings: tuple[Any, ...] = _settings(prior)
    return type(prior)(size, *settings, validate_args=False)


def _rows(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1, tensor.shape[-1]).contiguous().numpy()


def _kernels() -> Any:
    """The compiled loops; numba takes a second to import, which only those who sample should pay."""
    from foveate.inference import kernels

    return kernels


def _normalised(patch: Float[Tensor, "gaze 576"]) -> tuple[Float[Tensor, "gaze 576"], Float[Tensor, "gaze 1"]]:
    """`foveate.model.patch.normalise` of flat patches, and by what it divided."""
    centred = patch - patch.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + NORMALISING_FLOOR**2)
    return centred / deviation, deviation


def _through_normalising(of_n: Tensor, n: Tensor, deviation: Tensor) -> Tensor:
    """Derivatives by patches of mean zero from those by what `_normalised` made of them."""
    return (of_n - n * (of_n * n).mean(-1, keepdim=True)) / deviation


def _rowwise(x: Float[Tensor, "row n"], matrix: Float[Tensor, "n m"]) -> Float[Tensor, "row m"]:
    """``x @ matrix``: BLAS gives a row the same bits in any batch of a multiple of four."""
    return (torch.cat([x, x.new_zeros(-len(x) % 4, x.shape[1])]) @ matrix)[: len(x)]
