"""Warm-up of a batch of HMC chains: step size, diagonal metric and trajectory length, each element for itself.

Step size: dual averaging (Nesterov 2009; Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 2014, sec. 3.2). Metric: the
variance of the draws in windows that double (Stan Reference Manual, "HMC algorithm parameters"), shrunk towards the
diagonal metric of least Fisher divergence, ``sqrt(var z / var grad)``, which is exact for a diagonal Gaussian after a
handful of draws (Seyboldt, Carlson and Carpenter, "Preconditioning Hamiltonian Monte Carlo by minimizing Fisher
divergence", 2025) and so makes short warm-ups safe. Trajectory length, optional: ChEES (Hoffman, Radul and Sountsov,
"An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo", AISTATS 2021).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.model.errors import InputError

__all__ = ["Adaptation", "HMCOptions", "Plan", "mass_windows"]


@dataclass(frozen=True)
class HMCOptions:
    """How chains move and what warm-up adapts: arguments of :class:`foveate.inference.BatchedHMC`, described there."""

    step_size: float = 1.0
    num_steps: int | None = None
    trajectory_length: float | None = None
    jitter: float = 0.5
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    # Between the optimum of 0.651 for many independent dimensions (Beskos et al. 2010) and the range 0.6 ... 0.9 that
    # is robust in practice (Betancourt, Byrne and Girolami 2014); Stan's and Pyro's default.
    target_accept_prob: float = 0.8
    chees: bool = False
    max_num_steps: int = 256

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.trajectory_length is not None:
            raise InputError("num_steps and trajectory_length are both given: give one of them")
        if self.num_steps is not None and self.num_steps < 1:
            raise InputError(f"num_steps is {self.num_steps}: it must be at least 1")
        for name in ("step_size", "trajectory_length"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise InputError(f"{name} is {value}: it must be positive and finite")
        if not 0 <= self.jitter <= 1:
            raise InputError(f"jitter is {self.jitter}: it must lie in [0, 1]")
        if not 0 < self.target_accept_prob < 1:
            raise InputError(f"target_accept_prob is {self.target_accept_prob}: it must lie in (0, 1)")
        if self.max_num_steps < 1:
            raise InputError(f"max_num_steps is {self.max_num_steps}: it must be at least 1")
        if self.chees and self.num_steps is not None:
            raise InputError("chees=True adapts the trajectory length, so num_steps cannot be fixed: drop num_steps")


class Plan(NamedTuple):
    """One trajectory: ``step_size (*batch)``; ``steps``, an int for all or (*batch) int64."""

    step_size: Tensor
    steps: int | Tensor


# Three halves of a quarter period and a little more: with jitter 0.5 lengths of 1.2 ... 2.4, in units of a coordinate's
# standard deviation; a direction longer than the diagonal metric sees is still crossed.
_DEFAULT_LENGTH = 2.4
# Before the first metric, units mean nothing and a long trajectory is a waste.
_STEPS_BEFORE_METRIC = 32
# Hoffman and Gelman's γ = 0.05 and t₀ = 10 suit warm-ups of hundreds of draws; these keep the worst of many chains
# above an acceptance of 0.5 after 20 draws, and come as close to the target after 300.
_SHRINKAGE = 0.1
_PATIENCE = 5.0
# A short window may hold the way from the start to the typical set, which swells the variance but not the Fisher
# metric. A long one gives the variance, so that a coordinate's unit is its standard deviation, shrunk towards the
# Fisher metric as by this many draws.
_DRAWS_FOR_VARIANCE = 50
_FISHER_DRAWS = 20


class Adaptation:
    """The adapted quantities of a batch, and how a warm-up draw changes them.

    Args:
        options: what to adapt, and the values to start from.
        like: positions (*batch, d): shape, dtype and device.
        warmup_steps: the number of draws that adapt; afterwards nothing changes.
    """

    def __init__(self, options: HMCOptions, like: Float[Tensor, "*batch d"], warmup_steps: int) -> None:
        self.options = options
        self.warmup_steps = warmup_steps
        self.windows = mass_windows(warmup_steps) if options.adapt_mass_matrix else []
        batch = like.shape[:-1]
        self.log_step = like.new_full(batch, math.log(options.step_size))
        self.inverse_mass = torch.ones_like(like)
        self.length_given = options.num_steps is None
        scenes = batch[:-1] if options.chees else batch
        if options.chees and (len(batch) < 2 or batch[-1] < 2):
            raise InputError(
                "chees=True pools the chains of one scene, which are the last of at least two batch dimensions; the "
                f"batch is {tuple(batch)}. "
                "Give the sites dimensions (scene, chain) with two chains or more and batch_dims=2"
            )
        self.log_length = like.new_full(scenes, math.log(options.trajectory_length or _DEFAULT_LENGTH))
        self._length_count = 0
        self._length_moment = torch.zeros_like(self.log_length)
        self._log_length_average = self.log_length
        self._metric_known = not self.windows
        self.restart_step_size(self.log_step)
        self._restart_window(like)

    def plan(self, fraction: Float[Tensor, "*batch"]) -> Plan:
        """Step size and number of steps of the next trajectory.

        Args:
            fraction: uniform numbers; the trajectory is shortened by up to ``jitter`` of its length.
        """
        shorter = 1.0 - self.options.jitter * fraction
        if not self.length_given:
            assert self.options.num_steps is not None
            return Plan(self.step_size * shorter, self.options.num_steps)
        length = self._length * shorter
        most = (
            self.options.max_num_steps if self._metric_known else min(self.options.max_num_steps, _STEPS_BEFORE_METRIC)
        )
        steps = (length / self.step_size).ceil_().clamp_(1, most)
        return Plan(torch.minimum(length / steps, self.step_size), steps.to(torch.int64))

    def update(
        self,
        draw: int,
        position: Float[Tensor, "*batch d"],
        gradient: Float[Tensor, "*batch d"],
        accept_prob: Float[Tensor, "*batch"],
    ) -> bool:
        """Learn from warm-up draw ``draw`` (from 1); true when the metric has changed."""
        if self.options.adapt_step_size:
            self._update_step_size(accept_prob)
        changed = False
        if self.windows and self.windows[0] < draw <= self.windows[-1]:
            self._add(position, gradient)
            if draw in self.windows:
                self._update_metric(position)
                changed = True
        if draw == self.warmup_steps:
            self._finish()
        self._refresh()
        return changed

    def update_length(
        self,
        fraction: Float[Tensor, "*batch"],
        start: Float[Tensor, "*batch d"],
        end: Float[Tensor, "*batch d"],
        momentum: Float[Tensor, "*batch d"],
        accept_prob: Float[Tensor, "*batch"],
    ) -> None:
        """One ChEES step (Hoffman et al. 2021, eq. 8 and algorithm 1) on the trajectory length of each scene.

        Args:
            fraction: the uniform numbers that :meth:`plan` was given.
            start: positions before the trajectories.
            end: positions after them, before accept/reject.
            momentum: whitened momenta after them.
            accept_prob: acceptance probabilities; a trajectory that diverged weighs nothing.
        """
        usable = (accept_prob > 0) & torch.isfinite(end).all(-1)
        weight = torch.where(usable, accept_prob, torch.zeros_like(accept_prob))[..., None]
        total = weight.sum(-2).clamp_min(1e-12)
        # The chains of a scene are compared in one common metric.
        scale = self.inverse_mass.mean(-2, keepdim=True).sqrt()
        start, end = start / scale, torch.where(usable[..., None], end, start) / scale
        momentum = torch.where(usable[..., None], momentum, torch.zeros_like(momentum))
        away_start = start - start.mean(-2, keepdim=True)
        away_end = end - ((weight * end).sum(-2) / total)[..., None, :]
        gain = away_end.square().sum(-1) - away_start.square().sum(-1)
        slope = (1.0 - self.options.jitter * fraction) * gain * (away_end * momentum).sum(-1)
        slope = (weight[..., 0] * slope).sum(-1) / total[..., 0]
        # Adam without momentum, rate 0.025, on the logarithm of the length, as in the paper.
        self._length_count += 1
        self._length_moment = 0.95 * self._length_moment + 0.05 * slope.square()
        unbiased = self._length_moment / (1 - 0.95**self._length_count)
        self.log_length = self.log_length + 0.025 * slope / (unbiased.sqrt() + 1e-8)
        most = self.log_step.amax(-1) + math.log(self.options.max_num_steps)
        self.log_length = torch.minimum(self.log_length, most).clamp_min(math.log(1e-3))
        blend = self._length_count**-0.5
        self._log_length_average = (1 - blend) * self._log_length_average + blend * self.log_length

    def restart_step_size(self, log_step: Float[Tensor, "*batch"]) -> None:
        """Begin dual averaging anew, around the given step size."""
        self.log_step = log_step
        # Hoffman and Gelman aim at ten times the first guess, to save time with long warm-ups; a short one would end
        # there.
        self._centre = self.log_step
        self._log_step_average = self.log_step
        self._shortfall = torch.zeros_like(self.log_step)
        self._step_count = 0
        self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """What was adapted: ``log_step`` and ``log_length (*batch)``, ``inverse_mass (*batch, d)``."""
        length = self._per_element(self.log_length).expand_as(self.log_step)
        return {"log_step": self.log_step, "inverse_mass": self.inverse_mass, "log_length": length}

    def load(self, log_step: Tensor, inverse_mass: Tensor, log_length: Tensor) -> None:
        """Start from adapted quantities as `state_dict` gives them."""
        self.inverse_mass = inverse_mass
        # The chains of a scene were given the same length; a chain that is new among them only pulls it towards the
        # default.
        self.log_length = log_length.mean(-1) if self.options.chees else log_length
        self._log_length_average = self.log_length
        self._metric_known = True
        self.restart_step_size(log_step)

    def _update_step_size(self, accept_prob: Tensor) -> None:
        self._step_count += 1
        t = self._step_count
        rate = 1.0 / (t + _PATIENCE)
        self._shortfall = (1.0 - rate) * self._shortfall + rate * (self.options.target_accept_prob - accept_prob)
        log_step = self._centre - (math.sqrt(t) / _SHRINKAGE) * self._shortfall
        if self.length_given:
            # Beyond the trajectory length a larger step changes nothing, and dual averaging would run away.
            log_step = torch.minimum(log_step, self._per_element(self.log_length))
        self.log_step = log_step
        blend = (t + 1) ** -0.75
        self._log_step_average = (1.0 - blend) * self._log_step_average + blend * self.log_step

    def _add(self, position: Tensor, gradient: Tensor) -> None:
        """Welford's update of the window's moments of position and gradient."""
        self._count += 1
        for value, mean, moment in (
            (position, self._mean, self._moment),
            (gradient, self._gradient_mean, self._gradient_moment),
        ):
            away = value - mean
            mean += away / self._count
            moment += away * (value - mean)

    def _update_metric(self, like: Tensor) -> None:
        ratio = (self._moment / self._gradient_moment).sqrt()
        usable = torch.isfinite(ratio) & (ratio > 0)
        fisher = torch.where(usable, ratio, self.inverse_mass)
        if self._count < _DRAWS_FOR_VARIANCE:
            self.inverse_mass = fisher
        else:
            moment = torch.where(usable, self._moment, fisher * self._count)
            self.inverse_mass = (moment + _FISHER_DRAWS * fisher) / (self._count + _FISHER_DRAWS)
        self._metric_known = True
        self._restart_window(like)

    def _restart_window(self, like: Tensor) -> None:
        self._count = 0
        self._mean, self._moment = torch.zeros_like(like), torch.zeros_like(like)
        self._gradient_mean, self._gradient_moment = torch.zeros_like(like), torch.zeros_like(like)

    def _finish(self) -> None:
        if self.options.adapt_step_size:
            self.log_step = self._log_step_average
        if self.options.chees:
            self.log_length = self._log_length_average

    def _per_element(self, value: Tensor) -> Tensor:
        return value[..., None] if self.options.chees else value

    def _refresh(self) -> None:
        self.step_size = self.log_step.exp()
        self.scale = self.inverse_mass.sqrt()
        self._length = self._per_element(self.log_length).exp()


def mass_windows(warmup_steps: int) -> list[int]:
    """Draws at which the windows of metric adaptation begin and end: ``[begin, end, end, ...]``; empty below 10 draws.

    Windows of 8, 16, 32, ... draws after the first two, and a quarter of the warm-up, at most 50 draws, to settle the
    step size. Stan's begin at 75 and hold 25 draws; the Fisher metric needs fewer, and until there is one the
    trajectories have no unit of length.
    """
    if warmup_steps < 10:
        return []
    edges, size, stop = [2], 8, warmup_steps - max(5, min(50, warmup_steps // 4))
    while edges[-1] < stop:
        end = edges[-1] + size
        size *= 2
        # A last window too short to double again takes the rest.
        edges.append(end if end + size <= stop else stop)
    return edges
