"""Restricted Boltzmann machines against enumeration, autograd and their own definitions."""

import itertools
import math

import pytest
import torch

from foveate.model.errors import InputError
from foveate.model.rbm import (
    BernoulliRBM,
    GaussianRBM,
    bernoulli,
    contrastive_divergence,
    fantasy_chains,
    fast_persistent_contrastive_divergence,
    persistent_contrastive_divergence,
    set_gradients,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of at most a few thousand terms


def states(units: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def binary(visible: int = 5, hidden: int = 4, scale: float = 0.8) -> BernoulliRBM:
    rbm = BernoulliRBM(visible, hidden, dtype=torch.float64)
    rbm.randomise(scale)
    with torch.no_grad():
        rbm.visible_bias.normal_()
        rbm.hidden_bias.normal_()
    return rbm


def gaussian(visible: int = 3, hidden: int = 4) -> GaussianRBM:
    rbm = GaussianRBM(visible, hidden, dtype=torch.float64)
    rbm.randomise(0.7)
    with torch.no_grad():
        for bias in (rbm.visible_bias, rbm.hidden_bias):
            bias.normal_()
        rbm.log_sigma.uniform_(-0.5, 0.5)
    return rbm


@pytest.mark.parametrize("rbm", [binary, gaussian], ids=["binary", "gaussian"])
def test_free_energy_sums_the_hidden_units_out_of_the_energy(rbm) -> None:
    machine = rbm()
    v = torch.randn(7, machine.visible, dtype=torch.float64)
    summed = -torch.logsumexp(-machine.energy(v[:, None], states(machine.hidden)[None]), -1)
    torch.testing.assert_close(machine.free_energy(v), summed, **EXACT)


@pytest.mark.parametrize("rbm", [binary, gaussian], ids=["binary", "gaussian"])
def test_hidden_probabilities_are_the_conditional_of_the_joint(rbm) -> None:
    machine = rbm()
    v = torch.randn(7, machine.visible, dtype=torch.float64)
    h = states(machine.hidden)
    posterior = torch.softmax(-machine.energy(v[:, None], h[None]), -1)
    torch.testing.assert_close(machine.hidden_probabilities(v), posterior @ h, **EXACT)


def test_visible_probabilities_are_the_conditional_of_the_joint() -> None:
    machine, v = binary(), states(5)
    h = states(4)
    posterior = torch.softmax(-machine.energy(v[None], h[:, None]), -1)
    torch.testing.assert_close(machine.visible_probabilities(h), posterior @ v, **EXACT)


def test_the_gaussian_conditional_has_the_mean_and_variance_of_the_energy() -> None:
    machine = gaussian()
    h = states(4)
    v = machine.visible_mean(h).detach().requires_grad_()
    energy = machine.energy(v, h).sum()
    (slope,) = torch.autograd.grad(energy, v, create_graph=True)
    torch.testing.assert_close(slope, torch.zeros_like(slope), **EXACT)
    (curvature,) = torch.autograd.grad(slope.sum(), v)
    torch.testing.assert_close(curvature, (1 / machine.sigma**2).expand_as(v).detach(), **EXACT)


def test_the_weight_of_a_hidden_state_integrates_the_gaussian_units_out() -> None:
    machine = gaussian(visible=1, hidden=3)
    grid = torch.linspace(-30, 30, 40001, dtype=torch.float64)
    h = states(3)
    integral = torch.trapezoid(torch.exp(-machine.energy(grid[:, None, None], h[None])), grid, dim=0)
    # Trapezoidal rule on an analytic integrand that vanishes at the ends: far below 1e-8.
    torch.testing.assert_close(machine.hidden_log_weight(h), integral.log(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rbm", [binary, gaussian], ids=["binary", "gaussian"])
def test_the_path_ends_at_the_machine_and_begins_at_a_known_normaliser(rbm) -> None:
    machine = rbm(3, 4)
    base = torch.randn(3, dtype=torch.float64)
    v = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(machine.path_free_energy(v, 1.0, base), machine.free_energy(v), **EXACT)
    if isinstance(machine, BernoulliRBM):
        total = torch.logsumexp(-machine.path_free_energy(states(3), 0.0, base), 0)
    else:
        total = machine.log_sigma.sum() + 1.5 * math.log(2 * math.pi) + 4 * math.log(2)
        torch.testing.assert_close(machine.path_free_energy(base, 0.0, base), torch.tensor(-4 * math.log(2)).double())
    torch.testing.assert_close(machine.path_log_z(base), total, **EXACT)


@pytest.mark.parametrize("rbm", [binary, gaussian], ids=["binary", "gaussian"])
def test_statistics_are_the_gradient_of_the_free_energy(rbm) -> None:
    machine = rbm()
    v = torch.randn(9, machine.visible, dtype=torch.float64)
    names, values = zip(*machine.named_parameters(), strict=True)
    gradients = torch.autograd.grad(-machine.free_energy(v).mean(), values)
    found = machine.statistics(v)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, **EXACT)


def test_gibbs_sampling_visits_states_as_often_as_enumeration_says() -> None:
    machine = binary(visible=3, hidden=3)
    v = states(3)
    exact = torch.softmax(-machine.free_energy(v), 0)
    draws = machine.gibbs(bernoulli(torch.full((20_000, 3), 0.5, dtype=torch.float64)), 50)
    index = (draws * torch.tensor([4.0, 2.0, 1.0])).sum(-1).long()
    share = torch.bincount(index, minlength=8) / len(draws)
    # 20000 independent chains: 4.5 standard errors of a share leave one false alarm in 10^4 runs over 8 states.
    error = 4.5 * (exact * (1 - exact) / len(draws)).sqrt()
    assert bool(((share - exact).abs() < error).all())


def exact_log_likelihood(machine: BernoulliRBM, data: torch.Tensor) -> torch.Tensor:
    log_z = torch.logsumexp(-machine.free_energy(states(machine.visible)), 0)
    return (-machine.free_energy(data) - log_z).mean()


def test_contrastive_divergence_with_many_steps_is_the_gradient_of_the_likelihood() -> None:
    machine = binary(visible=4, hidden=3, scale=0.4)
    data = bernoulli(torch.full((1, 4), 0.7, dtype=torch.float64)).expand(20_000, 4)
    names, values = zip(*machine.named_parameters(), strict=True)
    exact = torch.autograd.grad(-exact_log_likelihood(machine, data), values)
    found = contrastive_divergence(machine, data, steps=40)
    for name, gradient in zip(names, exact, strict=True):
        # Means of 20000 values in [0, 1]: standard error at most 0.0035, here four of them.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0.014)


@pytest.mark.parametrize("fast", [False, True], ids=["pcd", "fast-pcd"])
def test_persistent_chains_learn_the_likelihood_of_a_small_machine(fast: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    truth = binary(visible=6, hidden=4, scale=1.5)
    v = states(6)
    law = torch.softmax(-truth.free_energy(v), 0).detach()
    data = v[torch.multinomial(law, 4000, replacement=True, generator=generator)]
    learner = BernoulliRBM(6, 6, dtype=torch.float64)
    learner.randomise(0.1, generator)
    before = exact_log_likelihood(learner, data).item()
    chains = fantasy_chains(learner, data[:200])
    optimiser = torch.optim.SGD(learner.parameters(), 0.1)
    for _ in range(1500):
        batch = data[torch.randint(len(data), (200,), generator=generator)]
        if fast:
            gradient, chains = fast_persistent_contrastive_divergence(
                learner, batch, chains, fast_rate=0.1, generator=generator
            )
        else:
            gradient, chains = persistent_contrastive_divergence(learner, batch, chains, generator=generator)
        set_gradients(learner, gradient)
        optimiser.step()
    best, after = exact_log_likelihood(truth, data).item(), exact_log_likelihood(learner, data).item()
    # Within 0.05 nats of the machine that made the data, which independent units miss by far more.
    assert best - before > 0.5
    assert best - after < 0.05


def test_fast_weights_decay_and_leave_the_parameters_alone() -> None:
    machine = binary()
    before = {name: value.clone() for name, value in machine.named_parameters()}
    data = bernoulli(torch.full((50, 5), 0.5, dtype=torch.float64))
    chains = fantasy_chains(machine, data)
    _, chains = fast_persistent_contrastive_divergence(machine, data, chains, fast_rate=0.5)
    _, idle = fast_persistent_contrastive_divergence(machine, data, chains, fast_rate=0.0, decay=0.5)
    for name, value in machine.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        torch.testing.assert_close(idle.fast[name], 0.5 * chains.fast[name], **EXACT)


def test_an_rbm_without_units_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        BernoulliRBM(0, 3)
