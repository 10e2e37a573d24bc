"""Deep belief networks of a few units against enumeration, quadrature and sampling."""

import inspect
import itertools
import json
import math
from typing import Any, cast

import pytest
import torch
from scipy import stats
from torch import nn

from foveate.inference.ais import exact_log_z
from foveate.model import dbn as dbn_module
from foveate.model.dbn import (
    CanonicalGivenHidden,
    DeepBeliefNet,
    DiagonalLayer,
    GatedLayer,
    HiddenPrior,
    contrast_groups,
)
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError
from foveate.model.rbm import BernoulliRBM

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
DIMENSION = 5
KINDS = ["gated", "diagonal"]


def states(units: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def small_net(kind: str, seed: int = 4) -> DeepBeliefNet:
    """Five coordinates, six units h1, four units h2: everything can be summed."""
    torch.manual_seed(seed)
    layer: DiagonalLayer | GatedLayer
    if kind == "diagonal":
        layer = DiagonalLayer(6, DIMENSION)
    else:
        layer = GatedLayer(3, 3, 2, torch.tensor([0, 1, 0, 1, 1]))
    core = EllipticalDensity(torch.zeros(DIMENSION), torch.eye(DIMENSION), 6.0)
    net = DeepBeliefNet(layer, BernoulliRBM(6, 4), core).double()
    with torch.no_grad():
        for value in net.parameters():
            value += 0.7 * torch.randn_like(value)
        if isinstance(layer, DiagonalLayer):
            layer.log_sigma.mul_(0.3)
        else:
            root = torch.randn(DIMENSION, DIMENSION, dtype=torch.float64) + 2 * torch.eye(
                DIMENSION, dtype=torch.float64
            )
            layer.set_analysis(torch.randn(DIMENSION, dtype=torch.float64), root, root[:, :2])
    log_z = exact_log_z(net.top)
    net.set_log_z(log_z.estimate, log_z.standard_error)
    return net


def exact_log_prob(net: DeepBeliefNet, y: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(net.log_joint(y[:, None], states(6)[None]), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_below_the_exact_log_probability_for_any_posterior(kind: str) -> None:
    net = small_net(kind)
    y = net.sample(40)
    exact = exact_log_prob(net, y)
    assert bool((net.log_prob_bound(y) <= exact + 1e-9).all())
    for _ in range(10):
        assert bool((net.log_prob_bound(y, torch.rand(40, 6, dtype=torch.float64)) <= exact + 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_at_a_certain_posterior_is_the_joint(kind: str) -> None:
    net = small_net(kind)
    y, h = torch.randn(64, DIMENSION, dtype=torch.float64), states(6)
    torch.testing.assert_close(net.log_prob_bound(y, h), net.log_joint(y, h), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_exact_where_the_units_do_nothing(kind: str) -> None:
    net = small_net(kind)
    with torch.no_grad():
        net.top.weight.zero_()
        for name in ("weight",) if kind == "diagonal" else ("shift", "gate"):
            getattr(net.layer, name).zero_()
    net.set_log_z(exact_log_z(net.top).estimate, 0.0)
    y = torch.randn(9, DIMENSION, dtype=torch.float64)
    q = torch.sigmoid(net.top.visible_bias).expand(9, -1)
    torch.testing.assert_close(net.log_prob_bound(y, q), exact_log_prob(net, y), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_log_prob_is_at_most_the_enumerated_expectation_and_close_to_it(kind: str) -> None:
    net = small_net(kind)
    y = net.sample(30)
    q = torch.rand(30, 6, dtype=torch.float64)
    h = states(6)
    weight = (h * q[:, None].log() + (1 - h) * (-q[:, None]).log1p()).sum(-1).exp()
    exact = (weight * net.layer.log_prob(y[:, None], h[None])).sum(-1)
    bound = net.layer.expected_log_prob(y, q)
    if kind == "diagonal":
        torch.testing.assert_close(bound, exact, **EXACT)
    else:
        assert bool((bound <= exact + 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_integrates_to_one(kind: str) -> None:
    net = small_net(kind)
    wide = EllipticalDensity(net.sample(4000).mean(0), 4 * torch.cov(net.sample(4000).T), 3.0)
    y = wide.sample(30_000)
    ratio = torch.exp(exact_log_prob(net, y) - wide.log_prob(y)).detach()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    # Importance sampling from a wider density: 4 standard errors, and the error itself is small.
    assert error < 0.04
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_one_group_without_units_is_scipys_student_t() -> None:
    layer = GatedLayer(1, 1, 1, torch.zeros(4, dtype=torch.long)).double()
    analysis = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    layer.set_analysis(bias, analysis, torch.zeros(4, 1, dtype=torch.float64))
    with torch.no_grad():
        layer.log_excess.fill_(math.log(5.0))
    y = torch.randn(8, 4, dtype=torch.float64)
    covariance = torch.linalg.inv(analysis.T @ analysis)
    expected = stats.multivariate_t(bias.numpy(), covariance.numpy() * 5 / 7, df=7).logpdf(y.numpy())
    found = layer.log_prob(y, torch.zeros(8, 2, dtype=torch.float64)).detach()
    torch.testing.assert_close(found, torch.from_numpy(expected), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_gibbs_of_the_hidden_units_keeps_their_enumerated_posterior(kind: str) -> None:
    net = small_net(kind)
    y = net.sample(1)
    posterior = torch.softmax(net.log_joint(y, states(6)), -1).detach()
    start = states(6)[torch.multinomial(posterior, 20_000, replacement=True)]
    many = y.expand(len(start), -1)
    h = net.gibbs_hidden(many, net.gibbs_hidden(many, start))
    assert float((h != start).double().mean()) > 0.05
    index = (h * 2.0 ** torch.arange(5, -1, -1)).sum(-1).long()
    share = torch.bincount(index, minlength=64) / len(h)
    # 20000 independent chains: 4.5 standard errors over 64 states, and a floor for the rarest.
    error = 4.5 * (posterior / len(h)).sqrt() + 2e-4
    assert bool(((share - posterior).abs() < error).all())


def test_recognition_gibbs_draws_from_the_recognition_posterior() -> None:
    net = small_net("gated")
    y = net.sample(1).expand(20_000, -1)
    drawn = net.gibbs_hidden(y, torch.zeros(20_000, 6, dtype=torch.float64), update="recognition").mean(0)
    torch.testing.assert_close(drawn, net.infer_hidden(y[0]).detach(), rtol=0, atol=0.015)  # 4 s.e. of 20000 draws


@pytest.mark.parametrize("kind", KINDS)
def test_gibbs_of_the_canonical_image_keeps_the_posterior_of_the_layer(kind: str) -> None:
    """Draws of (y, x) by y ~ p(y | h1), x ~ N(y, noise²) stay as they are under an update of y given x."""
    net = small_net(kind)
    h = states(6)[37].expand(40_000, -1)
    y = net.layer.sample(h).detach()
    observed = y + 0.8 * torch.randn_like(y)
    updated = net.gibbs_canonical(observed, 0.8, y, h)
    assert float((updated - y).abs().mean()) > 0.1
    for statistic in (lambda v: v, lambda v: torch.tanh(v) * torch.tanh(observed), lambda v: torch.log1p(v**2)):
        difference = (statistic(updated) - statistic(y)).mean(0)
        spread = (statistic(updated) - statistic(y)).std(0) / math.sqrt(len(y))
        assert bool((difference.abs() < 4.5 * spread).all())


@pytest.mark.parametrize("spread", [2.0, 5.0])
@pytest.mark.parametrize("most", [0, 200], ids=["direct", "conjugate gradients"])
def test_many_systems_that_differ_in_their_diagonals_are_solved_at_once(
    most: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one solution at a time, in the norm of each matrix, with the bound that is promised."""
    monkeypatch.setattr(dbn_module, "MOST_ITERATIONS", most)
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    common = factor.T @ torch.diag(torch.logspace(-3, 3, 40).double()) @ factor
    diagonal = torch.exp(spread * torch.randn(2, 5, 40, generator=generator, dtype=torch.float64))
    right = 10 * torch.randn(2, 5, 40, generator=generator, dtype=torch.float64)
    found = dbn_module._solve(common, diagonal, right)
    for at in itertools.product(range(2), range(5)):
        matrix = common + torch.diag(diagonal[at])
        away = found[at] - torch.linalg.solve(matrix, right[at])
        mean = diagonal.log().reshape(-1, 40).mean(0).exp()
        ratio = max(1.0, float((mean / diagonal[at]).max()))
        # Where diagonals differ by e^(2 · 3) none is farther off than 20.
        most_off = min(ratio**0.5, 20) if spread == 2 else ratio**0.5
        assert float(away @ matrix @ away) ** 0.5 < most_off * dbn_module.SOLVED


def test_systems_that_iteration_does_not_solve_are_solved_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbn_module, "MOST_ITERATIONS", 0)
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(DIMENSION, DIMENSION, generator=generator)
    common = factor.T @ factor / DIMENSION
    diagonal, right = torch.rand(2, 12, 8, DIMENSION, generator=generator)
    found = dbn_module._solve(common, 1 + diagonal, right)
    # Float32 of 575 terms whose condition number is about 5.
    torch.testing.assert_close(found @ common + (1 + diagonal) * found, right, rtol=0, atol=1e-4)


def test_the_papers_update_of_the_canonical_image_is_the_mean_of_patch_and_prediction() -> None:
    net = small_net("diagonal")
    with torch.no_grad():
        net.layer.log_sigma.fill_(math.log(0.5))
    h, patch = states(6)[21].expand(40_000, -1), torch.linspace(-1, 1, DIMENSION, dtype=torch.float64)
    drawn = net.gibbs_canonical(patch.expand(40_000, -1), 0.5, torch.zeros(40_000, DIMENSION, dtype=torch.float64), h)
    expected = 0.5 * (patch + net.layer.mean(h[0])).detach()
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.01)  # 5 s.e. of sd 0.35 over 40000 draws
    torch.testing.assert_close(drawn.var(0), torch.full((DIMENSION,), 0.125).double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_given_hidden_units_have_the_layers_mean(kind: str) -> None:
    net = small_net(kind)
    if isinstance(net.layer, GatedLayer):
        with torch.no_grad():
            net.layer.log_excess.fill_(math.log(6.0))
    for h in states(6)[[0, 63]]:
        draws = net.layer.sample(h.expand(50_000, -1)).detach()
        spread = draws.std(0) / math.sqrt(len(draws))
        assert bool(((draws.mean(0) - net.layer.mean(h)).abs() < 4.5 * spread).all())


@pytest.mark.parametrize("kind", KINDS)
def test_bound_and_core_are_differentiable_in_the_image(kind: str) -> None:
    net = small_net(kind)
    y = torch.randn(3, DIMENSION, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net.log_prob_bound, y)
    assert torch.autograd.gradcheck(net.core.log_prob, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_is_restored_from_its_config_and_state(kind: str) -> None:
    net = small_net(kind)
    restored = DeepBeliefNet.from_config(json.loads(json.dumps(net.config))).double()
    restored.load_state_dict(net.state_dict())
    y = torch.randn(4, DIMENSION, dtype=torch.float64)
    torch.testing.assert_close(restored.log_prob_bound(y), net.log_prob_bound(y), rtol=0, atol=0)
    torch.testing.assert_close(restored.core.log_prob(y), net.core.log_prob(y), rtol=0, atol=0)
    assert all(isinstance(value, nn.Parameter | torch.Tensor) for value in net.state_dict().values())


def test_the_distributions_of_the_program_agree_with_the_net() -> None:
    net = small_net("gated")
    prior = HiddenPrior(net, torch.Size([3]))
    h = prior.sample()
    assert h.shape == (3, 6)
    given = CanonicalGivenHidden(net, h)
    y = given.sample()
    assert y.shape == (3, DIMENSION)
    torch.testing.assert_close(prior.log_prob(h) + given.log_prob(y), net.log_joint(y, h), **EXACT)
    total = HiddenPrior(net).log_prob(states(6)).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64), **EXACT)


def test_contrast_groups_tile_the_patch_less_its_first_pixel() -> None:
    groups = contrast_groups(24, 3)
    assert len(groups) == 575
    sizes = torch.bincount(groups)
    assert sizes.tolist() == [8] + [9] * 63
    # Residuals k stand at pixels k + 1: the first block holds pixels 1, 2, 24, 25, 26, 48, 49, 50.
    assert (groups == 0).nonzero().flatten().tolist() == [0, 1, 23, 24, 25, 47, 48, 49]


def test_a_contrast_units_picture_has_its_log_scales_at_the_groups_pixels() -> None:
    layer = GatedLayer(2, 3, 4, contrast_groups(24, 3))
    net = DeepBeliefNet(layer, BernoulliRBM(5, 2), EllipticalDensity.blank(575))
    with torch.no_grad():
        layer.gate.normal_()
    pictures = net.filters()[2:]
    expected = layer.gate.T.reshape(3, 8, 8).repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert torch.equal(pictures, expected.detach())
    with pytest.raises(InputError, match="divisor"):
        contrast_groups(24, 5)


def test_pictures_of_images_and_filters_are_24_by_24() -> None:
    layer = GatedLayer(2, 3, 4, contrast_groups(24, 3))
    net = DeepBeliefNet(layer, BernoulliRBM(5, 2), EllipticalDensity.blank(575))
    net.set_log_z(exact_log_z(net.top).estimate, 0.0)
    pictures = net.to_canonical(net.sample(2))
    assert pictures.shape == (2, 24, 24)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    assert net.filters().shape == (5, 24, 24)


def test_forms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="make them equal"):
        DeepBeliefNet(DiagonalLayer(3, 4), BernoulliRBM(5, 2), EllipticalDensity.blank(4))
    with pytest.raises(InputError, match="known are"):
        DeepBeliefNet.from_config({"layer": "square"})
    with pytest.raises(InputError, match="without gaps"):
        GatedLayer(1, 1, 1, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="singular"):
        layer = GatedLayer(1, 1, 1, torch.tensor([0, 0]))
        layer.set_analysis(torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_refined_posteriors_tighten_the_bound_and_leave_it_below_the_exact_log_probability(kind: str) -> None:
    net = small_net(kind)
    y = net.sample(60)
    refined, plain = net.log_prob_bound(y, net.refine_hidden(y)), net.log_prob_bound(y)
    assert bool((refined >= plain).all()) and bool((refined > plain + 1e-3).any())
    assert bool((refined <= exact_log_prob(net, y) + 1e-9).all())


def test_where_mean_field_steps_overshoot_the_posterior_stays_as_it_was() -> None:
    """Two hundred units that explain the same twenty coordinates swing about, and end below where they began."""
    generator = torch.Generator().manual_seed(0)
    net = DeepBeliefNet(DiagonalLayer(200, 20), BernoulliRBM(200, 3), EllipticalDensity.blank(20)).double()
    with torch.no_grad():
        for value in net.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    y = net.layer.sample(torch.randint(2, (10, 200), generator=generator).double(), generator)
    plain = net.infer_hidden(y)
    torch.testing.assert_close(net.refine_hidden(y), plain, rtol=0, atol=0)
    # With smaller steps there is something to gain; log Z was not known above, and is any number here.
    net.set_log_z(0.0, 0.0)
    assert bool((net.log_prob_bound(y, net.refine_hidden(y, rate=0.1)) > net.log_prob_bound(y) + 1).all())


def test_parts_that_do_not_fit_and_unknown_updates_are_refused() -> None:
    with pytest.raises(InputError, match="5 coordinates with a core over 9"):
        DeepBeliefNet(DiagonalLayer(7, 5), BernoulliRBM(7, 2), EllipticalDensity.blank(9))
    net = small_net("gated")
    update = inspect.unwrap(DeepBeliefNet.gibbs_hidden)
    with pytest.raises(InputError, match="update='recogniton'"):
        update(net, net.sample(2), torch.zeros(2, 6).double(), update=cast(Any, "recogniton"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_are_denoised_to_none(kind: str) -> None:
    nothing = torch.zeros(0, DIMENSION, dtype=torch.float64)
    found = small_net(kind).gibbs_canonical(nothing, 0.5, nothing, torch.zeros(0, 6, dtype=torch.float64))
    assert found.shape == (0, DIMENSION)


def test_one_state_for_many_scenes_counts_once_for_each() -> None:
    net = small_net("gated")
    state = states(6)[5]
    expected = HiddenPrior(net).log_prob(state).expand(3)
    torch.testing.assert_close(HiddenPrior(net).expand(torch.Size([3])).log_prob(state), expected)
