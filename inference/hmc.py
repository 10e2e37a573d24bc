"""Hamiltonian Monte Carlo for a batch of posteriors at once, each with its own accept/reject, step size and metric.

The algorithm is Neal, "MCMC using Hamiltonian dynamics" (2011), with a jittered trajectory length and the warm-up of
`foveate.inference.adaptation`. Positions are kept in one tensor ``(*batch, d)``; momenta are whitened, ``y = z /
scale``, so that one coefficient, step size times scale, serves both halves of a leapfrog step.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from foveate.inference.adaptation import Adaptation, HMCOptions
from foveate.inference.noise import KeyedNoise, Purpose, batch_streams
from foveate.inference.proposal import StudentProposal
from foveate.model.errors import InputError

__all__ = ["BatchedHMC", "Chains", "HMCStatistics", "sample_batch"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
Streams = Sequence[int] | Tensor | None


class HMCStatistics(NamedTuple):
    """What happened in each draw, for every element; the names are those of ArviZ' ``sample_stats``.

    Attributes:
        lp: log density of the draw in unconstrained space, up to the model's constant; nats.
        acceptance_rate: probability with which the trajectory's end was accepted.
        step_size: leapfrog step of the trajectory, in units of the metric.
        n_steps: leapfrog steps of the trajectory.
        diverging: the energy went wrong by more than 1000 nats or became NaN; the trajectory's end was rejected.
        energy: potential plus kinetic energy of the draw; nats.
        energy_error: energy at the trajectory's end less at its start; infinite where it is not a number.
    """

    lp: Float[Tensor, "..."]
    acceptance_rate: Float[Tensor, "..."]
    step_size: Float[Tensor, "..."]
    n_steps: Int[Tensor, "..."]
    diverging: Bool[Tensor, "..."]
    energy: Float[Tensor, "..."]
    energy_error: Float[Tensor, "..."]


# An energy error beyond this is a divergence (Stan, PyMC and Pyro use the same bound).
_DIVERGENCE = 1000.0
# Random numbers are drawn for many draws at once, up to this many numbers.
_NOISE_BLOCK = 1 << 17


class BatchedHMC(MCMCKernel):
    """HMC on a batch of independent posteriors, under :class:`pyro.infer.MCMC` or stepwise (``setup``, ``sample``).

    Every element of the batch (a scene, or a scene and a chain) is a Markov chain of its own, with its own
    accept/reject, step size, metric and random numbers; one evaluation of the potential advances all of them. Give
    exactly one of ``model``, ``potential_fn`` and ``value_and_grad_fn``.

    Args:
        model: a Pyro model in which the values of all latent sites and the ``log_prob`` of all sites begin with
            ``batch_dims`` batch dimensions. Constrained supports are transformed, element by element. Discrete latent
            sites are refused.
        potential_fn: unconstrained ``{site: (*batch, ...)}`` to energies ``(*batch)``, differentiable: minus log
            density.
        batch_dims: number of leading dimensions that enumerate the elements.
        value_and_grad_fn: ``z (*batch, d)`` to energies ``(*batch)`` and gradients ``(*batch, d)``, with the sites of
            ``initial_params`` flattened and concatenated in sorted order. If it has a method ``trajectory(z, momentum,
            gradient, step, steps)`` that returns ``(z, momentum, energy, gradient)`` after ``steps`` leapfrog steps of
            per-coordinate size ``step (*batch, d)``, the method runs the trajectories.
        step_size: the first step size, in units of the metric.
        num_steps: leapfrog steps of every trajectory; the jitter then shortens the step.
        trajectory_length: step size × steps, in units of a coordinate's standard deviation. With neither, 2.4: with the
            jitter, lengths about the quarter period of a Gaussian, after which draws are independent.
        jitter: each trajectory is shortened by a uniform share of up to this; a fixed length can be periodic.
        adapt_step_size: adapt by dual averaging.
        adapt_mass_matrix: adapt the diagonal metric.
        target_accept_prob: what dual averaging aims at; 0.8 is robust (Betancourt, Byrne and Girolami 2014), 0.651 is
            optimal in many independent dimensions (Beskos et al. 2010).
        chees: adapt the trajectory length by ChEES, pooling the last batch dimension, which must hold the chains of one
            scene.
        max_num_steps: bound on the leapfrog steps of one trajectory.
        seed: key of all random numbers. ``None`` draws one from torch's global generator at ``setup``, as Pyro's
            kernels do; with ``num_chains > 1`` leave it so, or the chains are equal.
        streams: integer keys of the batch or of its leading dimensions; the index by default. An element's draws depend
            on its own potential, the seed and its key alone. See :func:`foveate.inference.noise.stream_keys` for names.
        init_strategy: as of Pyro's kernels; ``None`` starts uniformly in (-2, 2) in unconstrained space, keyed by
            ``streams``.

    Raises:
        InputError: naming the site or the element: a discrete or improper site, a site or potential without the batch
            dimensions, a start without finite energy, a potential that does not confine an element.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        batch_dims: int = 1,
        value_and_grad_fn: ValueAndGrad | None = None,
        step_size: float = 1.0,
        num_steps: int | None = None,
        trajectory_length: float | None = None,
        jitter: float = 0.5,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        target_accept_prob: float = 0.8,
        chees: bool = False,
        max_num_steps: int = 256,
        seed: int | None = None,
        streams: Streams = None,
        init_strategy: Callable[..., Any] | None = None,
    ) -> None:
        if sum(source is not None for source in (model, potential_fn, value_and_grad_fn)) != 1:
            raise InputError("give exactly one of model, potential_fn and value_and_grad_fn")
        if batch_dims < 1:
            raise InputError(f"batch_dims is {batch_dims}: it must be at least 1; a single chain is a batch of one")
        self.model = model
        self.potential_fn = potential_fn
        self.value_and_grad_fn = value_and_grad_fn
        self.batch_dims = batch_dims
        self.options = HMCOptions(
            step_size,
            num_steps,
            trajectory_length,
            jitter,
            adapt_step_size,
            adapt_mass_matrix,
            target_accept_prob,
            chees,
            max_num_steps,
        )
        self.seed = seed
        self.streams = streams
        self.transforms: dict[str, Any] | None = None if model is not None else {}
        self._init_strategy = init_strategy
        self._initial: dict[str, Tensor] | None = None
        self._carried: dict[str, Tensor] | None = None
        self._chains: Chains | None = None
        self._layout: _Layout | None = None
        self._latest: dict[str, Tensor] | None = None
        self._history: list[HMCStatistics] = []

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Trace the model once, find a start and begin the warm-up."""
        seed = int(torch.randint(2**31, (1,))) if self.seed is None else self.seed
        if self.model is not None:
            density = _ModelDensity(self.model, args, kwargs, self.batch_dims, self._init_strategy)
            self.transforms = density.transforms
            start, layout = density.start, density.layout
        elif self._initial is None:
            raise InputError(
                "initial_params are needed with potential_fn or value_and_grad_fn: {site: (*batch, ...)}, unconstrained"
            )
        else:
            density = None
            start, layout = self._initial, _Layout(self._initial, self.batch_dims)
        streams = batch_streams(self.streams, layout.batch_shape)
        if density is not None and self._initial is None and self._init_strategy is None:
            position = _random_start(density, layout.flatten(start), KeyedNoise(seed, streams))
        else:
            position = layout.flatten(start if self._initial is None else self._initial)
        if density is not None:
            function: ValueAndGrad = _Autograd(density)
        elif self.potential_fn is not None:
            potential = self.potential_fn
            function = _Autograd(lambda z: potential(layout.unflatten(z)))
        else:
            assert self.value_and_grad_fn is not None
            function = self.value_and_grad_fn
        explain = density.explain if density is not None else lambda z, element: ""
        self._layout = layout
        self._history = []
        self._chains = Chains(function, position, self.options, warmup_steps, seed, streams, self._carried, explain)
        self._initial = self._latest = layout.unflatten(self._chains.position)

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """The start in unconstrained space, ``{site: (*batch, ...)}``; after ``setup``, also where none was given."""
        return self._initial

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor] | None) -> None:
        self._initial = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Advance every element by one draw.

        Args:
            params: what the last call returned, or other unconstrained positions to go on from.
        """
        chains, layout = self._running()
        if params is not self._latest:
            chains.move(layout.flatten(params))
        statistics = chains.step()
        if chains.draw > chains.warmup_steps:
            self._history.append(statistics)
        self._latest = layout.unflatten(chains.position)
        return self._latest

    def clear_cache(self) -> None:
        """Forget energies and gradients: call it when the density has changed between draws."""
        self._latest = None

    @property
    def statistics(self) -> HMCStatistics:
        """Statistics of the draws after warm-up, each ``(*batch, draw)``."""
        if not self._history:
            raise InputError("no draw has been made after warm-up: call sample, or run MCMC with num_samples > 0")
        return _stacked(self._history)

    def state_dict(self) -> dict[str, Tensor]:
        """The adaptation and the stream keys it belongs to, to be carried over to another run."""
        return self._running()[0].state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Begin the next ``setup`` from this adaptation: elements are matched by stream key, new ones begin anew."""
        self._carried = state

    def logging(self) -> OrderedDict[str, str]:
        """Median step size and mean acceptance probability of the last draw, for Pyro's progress bar."""
        chains, _ = self._running()
        if chains.last is None:
            return OrderedDict()
        return OrderedDict(
            [
                ("step size", f"{chains.last.step_size.median().item():.2e}"),
                ("acc. prob", f"{chains.last.acceptance_rate.mean().item():.3f}"),
            ]
        )

    def diagnostics(self) -> dict[str, Any]:
        """Divergences as ``(*element, draw)``, mean acceptance probability and all statistics of every element."""
        if not self._history:
            return {"divergences": [], "acceptance rate": {}, "statistics": {}}
        statistics = self.statistics
        return {
            "divergences": [tuple(index) for index in statistics.diverging.nonzero().tolist()],
            "acceptance rate": statistics.acceptance_rate.mean(-1),
            "statistics": statistics._asdict(),
        }

    def cleanup(self) -> None:
        """Let go of the start, so that another run finds its own; adaptation and statistics stay."""
        self._initial = None

    def _running(self) -> tuple["Chains", "_Layout"]:
        if self._chains is None or self._layout is None:
            raise InputError("the kernel has not been set up: call setup(warmup_steps, *model_args) first")
        return self._chains, self._layout


def sample_batch(
    value_and_grad_fn: ValueAndGrad,
    initial: Float[Tensor, "*batch d"],
    *,
    num_samples: int,
    warmup_steps: int,
    seed: int,
    streams: Streams = None,
    adaptation: dict[str, Tensor] | None = None,
    proposal: StudentProposal | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "*batch draw d"], HMCStatistics]:
    """Run HMC on a batch of potentials: the function underneath :class:`BatchedHMC`, with no Pyro in between.

    Args:
        value_and_grad_fn: as of :class:`BatchedHMC`.
        initial: where each element starts; dtype and device of everything follow it.
        num_samples: draws kept.
        warmup_steps: draws that adapt, not kept; 0 with a carried ``adaptation`` goes on where it ended.
        seed: key of all random numbers.
        streams: integer keys of the batch or of its leading dimensions; the index by default.
        adaptation: a dict, updated in place with the adaptation at the end; what it holds at the start is where warm-up
            begins.
        proposal: a density of all positions that an independence sampler proposes from before each trajectory; it
            broadcasts against ``initial``.
        **options: ``step_size, num_steps, trajectory_length, jitter, adapt_step_size, adapt_mass_matrix,
            target_accept_prob, chees, max_num_steps`` of :class:`BatchedHMC`.

    Returns:
        The draws ``(*batch, draw, d)`` and their statistics, each ``(*batch, draw)``.

    Raises:
        InputError: naming the element: a start without finite energy, a potential without the batch dimensions or one
            that does not confine an element.
    """
    if num_samples < 1 or warmup_steps < 0:
        raise InputError(f"num_samples is {num_samples} and warmup_steps {warmup_steps}: at least 1 and 0 are needed")
    keys = batch_streams(streams, tuple(initial.shape[:-1]))
    chains = Chains(
        value_and_grad_fn, initial, HMCOptions(**options), warmup_steps, seed, keys, adaptation, proposal=proposal
    )
    for _ in range(warmup_steps):
        chains.step()
    draws, history = [], []
    for _ in range(num_samples):
        history.append(chains.step())
        draws.append(chains.position)
    if adaptation is not None:
        adaptation.update(chains.state_dict())
    return torch.stack(draws, -2), _stacked(history)


class Chains:
    """The state of all chains: `position (*batch, d)`, `energy` and `gradient`; one call of `step` is one draw of each.

    Args:
        value_and_grad: as of :class:`BatchedHMC`.
        position: where each element starts.
        options: how the chains move and what warm-up adapts.
        warmup_steps: draws that adapt.
        seed: key of all random numbers.
        streams: the key of each element, see `foveate.inference.noise.batch_streams`.
        carried: an earlier `state_dict`, from which elements of the same key start.
        explain: ``(position, element)`` to a clause that says what is wrong there, for error messages.
        proposal: what an independence sampler proposes from before each trajectory.
    """

    def __init__(
        self,
        value_and_grad: ValueAndGrad,
        position: Tensor,
        options: HMCOptions,
        warmup_steps: int,
        seed: int,
        streams: Tensor,
        carried: dict[str, Tensor] | None = None,
        explain: Callable[[Tensor, tuple[int, ...]], str] = lambda z, element: "",
        proposal: StudentProposal | None = None,
    ) -> None:
        self.value_and_grad = value_and_grad
        self.options, self.warmup_steps, self.streams = options, warmup_steps, streams
        self.noise = KeyedNoise(seed, streams)
        self.draw = 0
        self.last: HMCStatistics | None = None
        self._block: list[Tensor] | None = None
        self._block_start = 0
        self._explain = explain
        self.move(position.detach())
        self._require_finite()
        self.proposal = None if proposal is None else proposal.to(self.position)
        self.adaptation = Adaptation(options, self.position, warmup_steps)
        new = torch.ones_like(self.energy, dtype=torch.bool)
        if carried:
            new = ~self._load(carried)
        if warmup_steps and options.adapt_step_size and bool(new.any()):
            self._seek_step_size(new, strict=True)

    @property
    def trajectory(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The potential's own leapfrog, or ours; looked up anew, for a Gibbs step may have changed the potential."""
        return getattr(self.value_and_grad, "trajectory", None) or self._leapfrog

    def move(self, position: Tensor) -> None:
        """Go on from another position (or another density at the same one)."""
        energy, gradient = self.value_and_grad(position)
        if energy.shape != position.shape[:-1] or gradient.shape != position.shape:
            raise InputError(
                f"the potential of positions {tuple(position.shape)} returned energies {tuple(energy.shape)} and "
                "gradients "
                f"{tuple(gradient.shape)}: needed is one energy per element, {tuple(position.shape[:-1])}, and a "
                "gradient like the positions; "
                "sum over the event dimensions only, not over the batch"
            )
        self.position, self.energy, self.gradient = position, energy, gradient

    def step(self) -> HMCStatistics:
        """One draw of every chain."""
        adaptation = self.adaptation
        momentum, log_uniform, fraction, *of_leap = self._numbers()
        if self.proposal is not None:
            self._leap(self.proposal, *of_leap)
        step_size, steps = adaptation.plan(fraction)
        before = self.energy + 0.5 * (momentum * momentum).sum(-1)
        position, momentum, energy, gradient = self.trajectory(
            self.position, momentum, self.gradient, step_size[..., None] * adaptation.scale, steps
        )
        error = energy + 0.5 * (momentum * momentum).sum(-1) - before
        error = torch.where(torch.isfinite(error), error, math.inf)
        accept_prob = torch.exp(-error).clamp_(max=1.0)
        accepted = log_uniform < -error
        start = self.position
        self._take(accepted, position, energy, gradient)
        self.draw += 1
        self.last = HMCStatistics(
            lp=-self.energy,
            acceptance_rate=accept_prob,
            step_size=step_size,
            n_steps=steps if isinstance(steps, Tensor) else torch.full_like(accepted, steps, dtype=torch.int64),
            diverging=error > _DIVERGENCE,
            energy=torch.where(accepted, before + error, before),
            energy_error=error,
        )
        if self.draw <= self.warmup_steps:
            if self.options.chees:
                adaptation.update_length(fraction, start, position, momentum, accept_prob)
            if adaptation.update(self.draw, self.position, self.gradient, accept_prob) and self.options.adapt_step_size:
                self._seek_step_size(torch.ones_like(accepted), strict=False)
        return self.last

    def state_dict(self) -> dict[str, Tensor]:
        return {"streams": self.streams} | self.adaptation.state_dict()

    def _load(self, carried: dict[str, Tensor]) -> Tensor:
        """Take over the adaptation of the elements whose stream key is known; returns which they are."""
        keys, shape = carried["streams"].reshape(-1), self.streams.shape
        if carried["inverse_mass"].shape[-1] != self.position.shape[-1]:
            raise InputError(
                f"the carried adaptation is of {carried['inverse_mass'].shape[-1]} coordinates, this potential has "
                f"{self.position.shape[-1]}: it belongs to another model"
            )
        known = {key: row for row, key in enumerate(keys.tolist())}
        rows = torch.tensor([known.get(key, -1) for key in self.streams.reshape(-1).tolist()])
        found = (rows >= 0).reshape(shape).to(self.position.device)
        merged = {}
        for name, value in self.adaptation.state_dict().items():
            source = carried[name].to(value).reshape(len(keys), *value.shape[len(shape) :])
            picked = source[rows.clamp_min(0).to(source.device)].reshape(value.shape)
            merged[name] = torch.where(found.reshape(*shape, *[1] * (value.ndim - len(shape))), picked, value)
        self.adaptation.load(**merged)
        return found

    def _numbers(self) -> list[Tensor]:
        """Momenta, log uniforms and jitter of the next draw; those of a leap after them, where chains leap."""
        if self._block is None or self.draw >= self._block_start + self._block[0].shape[0]:
            size = self.position.shape[-1]
            draws = max(1, min(64, _NOISE_BLOCK // max(1, self.position.numel())))
            normal, uniform = self.noise.normal, self.noise.uniform
            self._block_start = self.draw
            block = [
                normal(Purpose.MOMENTUM, self.draw, draws, size),
                np.log(uniform(Purpose.ACCEPT, self.draw, draws)[..., 0]),
                uniform(Purpose.JITTER, self.draw, draws)[..., 0],
            ]
            if self.proposal is not None:
                block += [
                    normal(Purpose.LEAP, self.draw, draws, size),
                    uniform(Purpose.LEAP_TAIL, self.draw, draws, 2),
                    np.log(uniform(Purpose.LEAP_ACCEPT, self.draw, draws)[..., 0]),
                ]
            self._block = [torch.from_numpy(numbers).to(self.position) for numbers in block]
        return [numbers[self.draw - self._block_start] for numbers in self._block]

    def _leap(self, proposal: StudentProposal, normal: Tensor, uniform: Tensor, log_uniform: Tensor) -> None:
        """One step of the independence sampler: a position from the proposal, whatever the present one is."""
        there = proposal.place(normal, uniform)
        energy, gradient = self.value_and_grad(there)
        both = torch.stack([there, self.position])
        log_q = proposal.log_prob(both)
        ratio = self.energy - energy + log_q[1] - log_q[0]
        # From and to where the proposal reaches, and only where a trajectory can begin.
        possible = torch.isfinite(energy) & torch.isfinite(gradient).all(-1)
        if proposal.within is not None:
            possible = possible & proposal.within(both).all(0)
        self._take(possible & (log_uniform < ratio), there, energy, gradient)

    def _take(self, accepted: Tensor, position: Tensor, energy: Tensor, gradient: Tensor) -> None:
        """Go on from there where it was accepted."""
        self.position = torch.where(accepted[..., None], position, self.position)
        self.gradient = torch.where(accepted[..., None], gradient, self.gradient)
        self.energy = torch.where(accepted, energy, self.energy)

    def _leapfrog(
        self, z: Tensor, momentum: Tensor, gradient: Tensor, step: Tensor, steps: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leapfrog steps of per-coordinate size ``step (*batch, d)``; an element that is done stands still."""
        function = self.value_and_grad
        energy = self.energy
        momentum = torch.addcmul(momentum, step, gradient, value=-0.5)
        if isinstance(steps, int):
            for _ in range(steps):
                z = torch.addcmul(z, step, momentum)
                energy, gradient = function(z)
                momentum = torch.addcmul(momentum, step, gradient, value=-1.0)
        else:
            # The one host synchronisation of a draw, before its trajectory.
            longest = int(steps.max())
            moving = (steps > torch.arange(longest, device=z.device).reshape(-1, *[1] * steps.ndim)).to(z.dtype)[
                ..., None
            ]
            for i in range(longest):
                now = step * moving[i]
                z = torch.addcmul(z, now, momentum)
                energy, gradient = function(z)
                momentum = torch.addcmul(momentum, now, gradient, value=-1.0)
        return z, torch.addcmul(momentum, step, gradient, value=0.5), energy, gradient

    def _seek_step_size(self, active: Tensor, strict: bool) -> None:
        """Double or halve each element's step size until the acceptance of one step crosses 0.8.

        Hoffman and Gelman 2014, algorithm 4, with Stan's bound.

        Args:
            active: elements that seek.
            strict: raise where any step whatsoever is accepted.
        """
        adaptation, size = self.adaptation, self.position.shape[-1]
        log_step = first = adaptation.log_step
        direction = torch.zeros_like(log_step)
        endless = torch.zeros_like(active)
        for doubling in range(_DOUBLINGS):
            momentum = torch.from_numpy(self.noise.normal(Purpose.SEARCH, self.draw * _DOUBLINGS + doubling, 1, size))[
                0
            ].to(self.position)
            before = self.energy + 0.5 * (momentum * momentum).sum(-1)
            _, momentum, energy, _ = self.trajectory(
                self.position, momentum, self.gradient, log_step.exp()[..., None] * adaptation.scale, 1
            )
            error = energy + 0.5 * (momentum * momentum).sum(-1) - before
            towards = torch.where(error < -math.log(0.8), 1.0, -1.0).to(log_step)
            direction = towards if doubling == 0 else direction
            # Further on, rounding decides: the step fell so far that a difference of 0.01 nats is lost.
            lost = (towards > 0) & ((energy - self.energy).abs() > 0.01 / torch.finfo(energy.dtype).eps)
            endless = endless | (active & lost)
            active = active & (towards == direction) & ~lost
            if not bool(active.any()):
                break
            log_step = torch.where(active, log_step + direction * math.log(2.0), log_step)
        endless = endless | (active & (direction > 0))
        if strict and bool(endless.any()):
            elements = [tuple(element) for element in endless.nonzero().tolist()]
            raise InputError(
                f"the energy does not grow with distance: a step of any size is accepted for {_listed(elements)}, so "
                "the density cannot be "
                f"normalised{self._explain_flat(elements[0])}. Give the latent variable a proper prior, or start "
                "inside the support of the data"
            )
        adaptation.restart_step_size(torch.where(active | endless, first, log_step))

    def _explain_flat(self, element: tuple[int, ...]) -> str:
        flat = (self.gradient[element] == 0).nonzero().reshape(-1).tolist()
        named = self._explain(self.position, element) if not flat else ""
        return f"; coordinates {flat} have no influence" if flat else named

    def _require_finite(self) -> None:
        bad = ~(torch.isfinite(self.energy) & torch.isfinite(self.gradient).all(-1))
        if bool(bad.any()):
            elements = [tuple(element) for element in bad.nonzero().tolist()]
            first = elements[0]
            raise InputError(
                f"energy or gradient is not finite at the start of {_listed(elements)} (energy "
                f"{self.energy[first].item():g}, position "
                f"{self.position[first].tolist()[:8]}){self._explain(self.position, first)}: start elsewhere "
                "(initial_params, init_strategy) "
                "or mend the density"
            )


_DOUBLINGS = 64


class _Autograd:
    """Energy and gradient by one backward pass: elements are independent, so the gradient of their sum is theirs."""

    def __init__(self, potential: Callable[[Tensor], Tensor]) -> None:
        self.potential = potential

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # Distributions that check their arguments would raise for the whole batch where one element has diverged.
        with torch.enable_grad(), pyro.validation_enabled(False):
            try:
                return self._evaluate(z)
            except torch.linalg.LinAlgError:
                with _FactorOrNaN():
                    return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_(True)
        energy = self.potential(z)
        if energy.shape != z.shape[:-1]:
            raise InputError(
                f"the potential returned shape {tuple(energy.shape)} for a batch {tuple(z.shape[:-1])}: "
                "return one energy per element, summed over the event dimensions only"
            )
        if not energy.requires_grad:
            return energy.detach(), torch.zeros_like(z)
        (gradient,) = torch.autograd.grad(energy.sum(), z, materialize_grads=True)
        return energy.detach(), gradient


class _FactorOrNaN(TorchFunctionMode):
    """Matrix factorisations that give NaN for the elements of a batch where they fail, instead of raising for all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        quiet = {
            torch.linalg.cholesky: torch.linalg.cholesky_ex,
            torch.linalg.inv: torch.linalg.inv_ex,
            torch.inverse: torch.linalg.inv_ex,
            torch.linalg.solve: torch.linalg.solve_ex,
        }
        if func not in quiet:
            return func(*args, **(kwargs or {}))
        result, info = quiet[func](*args, **(kwargs or {}))
        failed = (info != 0).reshape(info.shape + (1,) * (result.ndim - info.ndim))
        return result.masked_fill(failed, math.nan)


class _Layout:
    """Sites ``{name: (*batch, ...)}`` to one tensor ``(*batch, d)`` and back, in sorted order."""

    def __init__(self, sites: dict[str, Tensor], batch_dims: int) -> None:
        if not sites:
            raise InputError("there is no continuous latent site to sample: the model's sites are all observed")
        self.names = sorted(sites)
        shapes = {name: tuple(sites[name].shape) for name in self.names}
        self.batch_shape = shapes[self.names[0]][:batch_dims]
        for name, shape in shapes.items():
            if len(shape) < batch_dims:
                raise InputError(
                    f"site '{name}' has shape {shape}, but batch_dims={batch_dims}: every latent site needs that many "
                    "leading batch dimensions"
                )
            if shape[:batch_dims] != self.batch_shape:
                raise InputError(
                    f"site '{name}' has shape {shape}, whose leading {batch_dims} dimensions are not those of site "
                    f"'{self.names[0]}', "
                    f"{self.batch_shape}: every latent site needs the same leading batch dimensions"
                )
        self.events = [shapes[name][batch_dims:] for name in self.names]
        self.sizes = [math.prod(event) for event in self.events]

    def flatten(self, sites: dict[str, Tensor]) -> Tensor:
        missing = [name for name in self.names if name not in sites]
        if missing:
            raise InputError(
                f"no initial value for site {missing[0]!r}: initial_params must hold every latent site, in "
                "unconstrained space"
            )
        for name, event in zip(self.names, self.events, strict=True):
            if tuple(sites[name].shape) != self.batch_shape + event:
                raise InputError(
                    f"site '{name}' has shape {tuple(sites[name].shape)}, expected {self.batch_shape + event} "
                    "(unconstrained)"
                )
        return torch.cat([sites[name].detach().reshape(*self.batch_shape, -1) for name in self.names], -1)

    def unflatten(self, z: Tensor) -> dict[str, Tensor]:
        parts = z.split(self.sizes, -1)
        return {
            name: part.reshape(self.batch_shape + event)
            for name, part, event in zip(self.names, parts, self.events, strict=True)
        }


class _ModelDensity:
    """Minus the log density of a Pyro model in unconstrained space, one number per batch element."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_dims: int,
        init_strategy: Callable[..., Any] | None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        watched = model if init_strategy is None else InitMessenger(init_strategy)(model)
        with torch.no_grad(), poutine.block(), _RefuseImproper():
            trace = poutine.trace(watched).get_trace(*args, **kwargs)
        self.transforms: dict[str, Any] = {}
        self.start: dict[str, Tensor] = {}
        for name, node in trace.iter_stochastic_nodes():
            if isinstance(node["fn"], _Subsample):
                if node["fn"].subsample_size is not None and node["fn"].subsample_size < node["fn"].size:
                    raise InputError(
                        f"plate '{name}' draws a subsample, which HMC cannot: pass the subsample as the model's data"
                    )
                continue
            if node["fn"].support.is_discrete:
                raise InputError(
                    f"site '{name}' is discrete, and HMC needs a gradient: sum it out of the model, condition on it "
                    "(pyro.condition), or draw it "
                    "by Gibbs next to HMC with foveate.inference.gibbs.HMCWithinGibbs"
                )
            value = cast(Tensor, node["value"]).detach()
            if value.ndim < batch_dims:
                raise InputError(
                    f"site '{name}' has shape {tuple(value.shape)}, but batch_dims={batch_dims}: put it in the plate "
                    "of the batch, or unsqueeze it"
                )
            self.transforms[name] = biject_to(node["fn"].support).inv
            self.start[name] = self.transforms[name](value)
        self.layout = _Layout(self.start, batch_dims)
        self._refuse_moving_supports()

    def _refuse_moving_supports(self) -> None:
        """Transforms are made once, so no support may change with the values of other sites."""
        # A little further on: what can be evaluated at the start can be there.
        moved = {name: of.inv(self.start[name] + 1e-3).detach() for name, of in self.transforms.items()}
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False), _FactorOrNaN():
            trace = poutine.trace(poutine.condition(self.model, moved)).get_trace(*self.args, **self.kwargs)
            for name, transform in self.transforms.items():
                if name not in trace.nodes:
                    continue
                probe = self.start[name]
                again = biject_to(trace.nodes[name]["fn"].support)(probe)
                if not torch.allclose(again, transform.inv(probe), equal_nan=True):
                    raise InputError(
                        f"the support of site '{name}' depends on another latent site, which HMC in one unconstrained "
                        "space cannot follow: sample a share of the range and compute the value from it, "
                        "such as x = s * Uniform(0, 1)"
                    )

    def __call__(self, z: Tensor) -> Tensor:
        terms = iter(self.terms(z).values())
        total = next(terms)
        for term in terms:
            total = total + term
        return -total

    def terms(self, z: Tensor) -> dict[str, Tensor]:
        """Log density of every site, log-determinant of its transform included: ``{site: (*batch)}``."""
        values, terms = {}, {}
        batch = self.layout.batch_shape
        for name, part in self.layout.unflatten(z).items():
            values[name] = self.transforms[name].inv(part)
            log_det = self.transforms[name].log_abs_det_jacobian(values[name], part)
            terms[name] = -_sum_events(log_det, len(batch))
        trace = poutine.trace(poutine.condition(self.model, values)).get_trace(*self.args, **self.kwargs)
        trace.compute_log_prob()
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
                continue
            log_prob = node["log_prob"]
            if tuple(log_prob.shape[: len(batch)]) != batch:
                raise InputError(
                    f"the log_prob of site '{name}' has shape {tuple(log_prob.shape)}, which does not begin with the "
                    f"batch {batch}: put the site in the "
                    "plate of the batch, and event dimensions to the right of it (to_event)"
                )
            log_prob = _sum_events(log_prob, len(batch))
            terms[name] = terms[name] + log_prob if name in terms else log_prob
        return terms

    def explain(self, z: Tensor, element: tuple[int, ...]) -> str:
        """Which sites are not finite at an element, as part of a sentence."""
        with torch.no_grad(), pyro.validation_enabled(False):
            bad = [name for name, term in self.terms(z).items() if not bool(torch.isfinite(term[element]))]
        return (
            f"; the log density of site{'s' if len(bad) > 1 else ''} {', '.join(map(repr, bad))} is not finite"
            if bad
            else ""
        )


class _RefuseImproper(Messenger):
    """Stop at an improper site before it is sampled, which would fail without saying where."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, ImproperUniform):
            raise InputError(
                f"site '{msg['name']}' is ImproperUniform, which cannot be normalised: give it a proper prior, such "
                "as a Uniform on a bounded box"
            )


def _random_start(density: _ModelDensity, like: Tensor, noise: KeyedNoise) -> Tensor:
    """Uniform in (-2, 2) in unconstrained space, as Stan and Pyro, again where the energy is not finite."""
    function = _Autograd(density)
    position = like
    bad = torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    for attempt in range(100):
        drawn = torch.from_numpy(noise.uniform(Purpose.START, attempt, 1, like.shape[-1])[0]).to(like) * 4.0 - 2.0
        position = torch.where(bad[..., None], drawn, position)
        energy, gradient = function(position)
        bad = ~(torch.isfinite(energy) & torch.isfinite(gradient).all(-1))
        if not bool(bad.any()):
            break
    return position


def _sum_events(value: Tensor, batch_dims: int) -> Tensor:
    return value.flatten(batch_dims).sum(-1) if value.ndim > batch_dims else value


def _stacked(history: list[HMCStatistics]) -> HMCStatistics:
    return HMCStatistics(*(torch.stack(values, -1) for values in zip(*history, strict=True)))


def _listed(elements: list[tuple[int, ...]]) -> str:
    shown = ", ".join(str(element if len(element) > 1 else next(iter(element))) for element in elements[:5])
    more = f" and {len(elements) - 5} more" if len(elements) > 5 else ""
    return f"element{'s' if len(elements) > 1 else ''} {shown}{more}"
