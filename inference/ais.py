"""Log-normalisers of restricted Boltzmann machines, with their error: annealed importance sampling and enumeration.

Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks"; Neal 2001; the reverse direction
after Burda, Grosse & Salakhutdinov 2015.
"""

import copy
import itertools
import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.model.errors import InputError
from foveate.model.rbm import BernoulliRBM, GaussianRBM, bernoulli

__all__ = ["ENUMERABLE", "LogZ", "ais_log_z", "exact_log_z", "log_z", "reverse_ais_log_z"]

# 2^20 states of the smaller side: a second of work; each unit more doubles it.
ENUMERABLE = 20
ENUMERATION_CHUNK = 1 << 14


class LogZ(NamedTuple):
    """An estimate of log Z in nats.

    Attributes:
        estimate: log Z. Forward AIS is below the truth on average, reverse AIS above it.
        standard_error: of the estimate over independent chains (delta method); 0 when exact.
        effective_sample_size: ``(Σ w)² / Σ w²`` of the chains' weights; ``inf`` when exact.
        temperatures: number of intermediate machines of the last run; 0 when exact.
        kind: how it was made. ``"reverse-heuristic"`` says that the start was not an exact sample, so that nothing is
            bounded.
    """

    estimate: float
    standard_error: float
    effective_sample_size: float
    temperatures: int
    kind: Literal["exact", "forward", "reverse", "reverse-heuristic"]


def log_z(
    rbm: GaussianRBM | BernoulliRBM,
    *,
    base: Float[Tensor, "visible"] | None = None,
    target_error: float = 0.1,
    generator: torch.Generator | None = None,
) -> LogZ:
    """Log Z by enumeration where a side has at most 20 binary units, by `ais_log_z` elsewhere."""
    smaller = rbm.hidden if isinstance(rbm, GaussianRBM) else min(rbm.visible, rbm.hidden)
    if smaller <= ENUMERABLE:
        return exact_log_z(rbm)
    return ais_log_z(rbm, base=base, target_error=target_error, generator=generator)


@torch.no_grad()
def exact_log_z(rbm: GaussianRBM | BernoulliRBM) -> LogZ:
    """Log Z by summing over every state of the smaller binary side, in float64.

    Raises:
        InputError: when that side has more than 20 units.
    """
    by_visible = isinstance(rbm, BernoulliRBM) and rbm.visible < rbm.hidden
    units = rbm.visible if by_visible else rbm.hidden
    if units > ENUMERABLE:
        raise InputError(
            f"{units} binary units on the smaller side: at most {ENUMERABLE} are enumerated, use ais_log_z"
        )
    double = copy.deepcopy(rbm).double()
    bits = torch.arange(units, device=rbm.weight.device)
    total = torch.tensor(-math.inf, dtype=torch.float64, device=rbm.weight.device)
    for start in range(0, 1 << units, ENUMERATION_CHUNK):
        index = torch.arange(start, min(start + ENUMERATION_CHUNK, 1 << units), device=bits.device)
        states = ((index[:, None] >> bits) & 1).double()
        log_weight = -double.free_energy(states) if by_visible else double.hidden_log_weight(states)
        total = torch.logaddexp(total, torch.logsumexp(log_weight, 0))
    return LogZ(float(total), 0.0, math.inf, 0, "exact")


@torch.no_grad()
def ais_log_z(
    rbm: GaussianRBM | BernoulliRBM,
    *,
    chains: int = 128,
    temperatures: int | None = None,
    target_error: float = 0.1,
    max_temperatures: int = 64_000,
    base: Float[Tensor, "visible"] | None = None,
    generator: torch.Generator | None = None,
) -> LogZ:
    """Forward annealed importance sampling of log Z.

    With ``temperatures=None`` the schedule is found: a pilot run measures how much the log-weights spread between
    neighbouring temperatures, the temperatures are placed at equal spread (the thermodynamic-length rule of Gelman &
    Meng 1998), and their number doubles until the standard error and the step from the previous estimate both lie
    under the target.

    Args:
        rbm: the machine, any size.
        chains: independent chains; the error is taken over them.
        temperatures: a fixed number of evenly spaced temperatures instead.
        target_error: standard error in nats to reach.
        max_temperatures: where doubling ends even if the target is not reached (the returned error says so).
        base: visible bias at β = 0; the machine's own by default. The log-odds of the data's mean shorten the path.
        generator: source of randomness.

    Raises:
        InputError: fewer than 2 chains or 1 temperature, or a `base` of another shape than the visible bias.

    Returns:
        The estimate with its error. An error that is underestimated because all chains miss a mode cannot be seen from
        inside.
    """
    base = _base(rbm, base, chains, temperatures)
    if temperatures is not None:
        betas = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
        return _summary(_forward(rbm, base, betas, chains, generator)[0], temperatures, "forward")
    pilot = torch.linspace(0, 1, 129, dtype=torch.float64)
    spread = _forward(rbm, base, pilot, chains, generator)[1]
    count, previous = 256, math.inf
    while True:
        result = _summary(
            _forward(rbm, base, _equal_spread(pilot, spread, count), chains, generator)[0], count, "forward"
        )
        settled = abs(result.estimate - previous) <= 3 * target_error
        if (result.standard_error <= target_error and settled) or 2 * count > max_temperatures:
            return result
        count, previous = 2 * count, result.estimate


@torch.no_grad()
def reverse_ais_log_z(
    rbm: GaussianRBM | BernoulliRBM,
    samples: Float[Tensor, "chain visible"],
    *,
    exact: bool,
    temperatures: int = 1000,
    base: Float[Tensor, "visible"] | None = None,
    generator: torch.Generator | None = None,
) -> LogZ:
    """Annealed importance sampling from the machine down to the base: log Z from the other side.

    From exact samples ``E[1/w] = 1/Z`` makes it a stochastic *upper* bound, so that forward and reverse hold log Z
    between them.

    Args:
        rbm: the machine.
        samples: one start for each chain, drawn from the machine.
        exact: True only for exact, independent samples (small machines by enumeration, simulated data). With False the
            result is a heuristic: chains that miss a mode make it too low without a sign, and `kind` says so.
        temperatures: evenly spaced.
        base: visible bias at β = 0.
        generator: source of randomness.

    Raises:
        InputError: fewer than 2 chains or 1 temperature, or a `base` of another shape than the visible bias.
    """
    base = _base(rbm, base, len(samples), temperatures)
    betas = torch.linspace(1, 0, temperatures + 1, dtype=torch.float64).tolist()
    v, log_weight = samples, torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    for upper, lower in itertools.pairwise(betas):
        # Reversible sweeps at `upper` keep exact samples exact, so that the start may be used as it comes.
        v = rbm.path_gibbs(v, upper, base, generator)
        log_weight += (rbm.path_free_energy(v, upper, base) - rbm.path_free_energy(v, lower, base)).double()
    inverse = _summary(
        log_weight - float(rbm.path_log_z(base)), temperatures, "reverse" if exact else "reverse-heuristic"
    )
    return inverse._replace(estimate=-inverse.estimate)


def _base(
    rbm: GaussianRBM | BernoulliRBM, base: Tensor | None, chains: int, temperatures: int | None
) -> Float[Tensor, "visible"]:
    """The base that was given, or the machine's own bias; refuses what has no standard error or no base machine."""
    if chains < 2:
        raise InputError(f"{chains} chain: the standard error needs at least 2")
    if temperatures is not None and temperatures < 1:
        raise InputError(f"{temperatures} temperatures: at least 1 is needed")
    bias = rbm.visible_bias.detach()
    if base is None:
        return bias
    if base.shape != bias.shape:
        raise InputError(f"base of shape {tuple(base.shape)}: needed is a bias for each visible unit, {len(bias)}")
    return base


def _forward(
    rbm: GaussianRBM | BernoulliRBM, base: Tensor, betas: Tensor, chains: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Log-weights of the chains (base normaliser included) and the spread of each step's increment."""
    like = {"dtype": rbm.weight.dtype, "device": rbm.weight.device}
    half = torch.full((chains, rbm.hidden), 0.5, **like)
    v = rbm.path_sample_visible(bernoulli(half, generator), 0.0, base, generator)
    log_weight = torch.full((chains,), float(rbm.path_log_z(base)), dtype=torch.float64, device=rbm.weight.device)
    spread = torch.zeros(len(betas) - 1, dtype=torch.float64)
    steps = betas.tolist()
    for k, (lower, upper) in enumerate(itertools.pairwise(steps)):
        increment = (rbm.path_free_energy(v, lower, base) - rbm.path_free_energy(v, upper, base)).double()
        log_weight += increment
        spread[k] = increment.std()
        v = rbm.path_gibbs(v, upper, base, generator)
    return log_weight, spread


def _equal_spread(pilot: Tensor, spread: Tensor, count: int) -> Tensor:
    """`count` + 1 temperatures such that each step spreads the weights alike; no step is starved or skipped."""
    density = spread + 0.1 * spread.mean() + 1e-12
    length = torch.cat([density.new_zeros(1), density.cumsum(0)])
    wanted = torch.linspace(0, float(length[-1]), count + 1, dtype=torch.float64)
    at = torch.searchsorted(length, wanted).clamp(1, len(length) - 1)
    fraction = (wanted - length[at - 1]) / (length[at] - length[at - 1])
    betas = pilot[at - 1] + fraction * (pilot[at] - pilot[at - 1])
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _summary(log_weight: Tensor, temperatures: int, kind: Literal["forward", "reverse", "reverse-heuristic"]) -> LogZ:
    """Log-mean-exp of the weights; its error by the delta method: standard error of the mean weight over the mean."""
    weight = torch.exp(log_weight - log_weight.max())
    chains = len(weight)
    estimate = float(log_weight.max() + weight.mean().log())
    error = float(weight.std() / weight.mean()) / math.sqrt(chains)
    size = float(weight.sum() ** 2 / (weight**2).sum())
    return LogZ(estimate, error, size, temperatures, kind)
