"""Training of the prior: what it estimates, what it watches and what it returns when things go wrong."""

import inspect
import math
from typing import Any

import pytest
import torch

from foveate.inference import prior_training
from foveate.inference.prior_training import Monitor, augmented_coordinates, fit_core, fit_covariance, train_dbn
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer, GatedLayer, contrast_groups
from foveate.model.density import EllipticalDensity, choose_elliptical
from foveate.model.errors import InputError
from foveate.model.patch import density_coordinates, from_density_coordinates, normalise
from foveate.model.rbm import BernoulliRBM


def synthetic_crops(pictures: int, versions: int, seed: int) -> torch.Tensor:
    """Smooth fields on a common mean, with fine texture whose strength differs from quarter to quarter."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pictures, 1, 32, 32, generator=generator)
    smooth = 0.15 * torch.nn.functional.avg_pool2d(noise, 9, 1)[:, 0] * 9 / 3
    strength = (
        torch.exp(torch.randn(pictures, 2, 2, generator=generator)).repeat_interleave(12, 1).repeat_interleave(12, 2)
    )
    fine = 0.01 * strength * torch.randn(pictures, 24, 24, generator=generator)
    row = torch.linspace(-1, 1, 24)
    crops = 0.5 + 0.15 * torch.cos(3 * row)[:, None] * torch.cos(2 * row) + smooth + fine
    jitter = 0.003 * torch.randn(pictures, versions, 24, 24, generator=generator)
    jitter[:, 0] = 0
    return (crops[:, None] + jitter).clamp(0, 1)


@pytest.fixture(scope="module", autouse=True)
def few_settings():
    """Two settings of the covariance instead of 24: how they are chosen does not depend on how many there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior_training, "RADII", (3,))
        patch.setattr(prior_training, "STATIONARY", (0.3,))
        patch.setattr(prior_training, "SAMPLE_SHARE", (0.2, 0.4))
        yield


@pytest.fixture(scope="module")
def trained(few_settings) -> tuple[DeepBeliefNet, list[tuple[float, Monitor]], torch.Tensor]:
    checks: list[tuple[float, Monitor]] = []
    crops = synthetic_crops(60, 2, 1)
    net = train_dbn(crops, steps=60, seed=3, progress=lambda share, monitor: checks.append((share, monitor)))
    return net, checks, crops


def test_the_net_beats_the_student_t_on_new_crops_of_uneven_texture(trained) -> None:
    net, _, crops = trained
    new = density_coordinates(synthetic_crops(80, 1, 2)[:, 0])
    y = augmented_coordinates(crops).flatten(0, 1)
    student, _ = choose_elliptical(y, density_coordinates(synthetic_crops(20, 1, 3)[:, 0]), student=True)
    gain = net.log_prob_bound(new, net.refine_hidden(new)) - student.log_prob(new)
    # Judged by the bound less two standard errors of log Z, and by 3 standard errors of the mean over crops.
    error = 3 * float(gain.std()) / math.sqrt(len(new)) + 2 * float(net.log_z_se)
    assert float(gain.mean()) - error > 20


def test_refined_posteriors_tighten_the_bound_and_stay_probabilities(trained) -> None:
    net, _, _ = trained
    new = density_coordinates(synthetic_crops(40, 1, 4)[:, 0])
    q = net.refine_hidden(new)
    assert bool(((q >= 0) & (q <= 1)).all())
    assert float(net.log_prob_bound(new, q).mean()) > float(net.log_prob_bound(new).mean())


def test_every_check_is_reported_in_order_and_complete(trained) -> None:
    net, checks, _ = trained
    shares = [share for share, _ in checks]
    assert shares == sorted(shares)
    assert {monitor.stage for _, monitor in checks} == {"layer", "top"}
    assert all(math.isfinite(value) for _, monitor in checks for value in monitor[1:])
    assert all(0 < monitor.activation < 1 for _, monitor in checks)
    assert all(1 <= monitor.effective_filters <= net.top.visible for _, monitor in checks)


def test_the_net_comes_back_frozen_with_log_z_and_its_error(trained) -> None:
    net, _, _ = trained
    assert math.isfinite(float(net.log_z))
    assert 0 <= float(net.log_z_se) <= prior_training.FINAL_LOG_Z_ERROR
    assert not any(value.requires_grad for value in net.parameters())


def test_the_same_seed_gives_the_same_net() -> None:
    crops = synthetic_crops(20, 1, 5)
    first, second = (train_dbn(crops, steps=4, seed=7).state_dict() for _ in range(2))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


def test_a_training_that_diverges_returns_the_best_net_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    proper, calls = GatedLayer.expected_residual_log_prob, []

    def breaking(self: GatedLayer, e: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        value = proper(self, e, q)
        return value if len(calls) < 8 else value * math.nan

    monkeypatch.setattr(GatedLayer, "expected_residual_log_prob", breaking)
    net = train_dbn(synthetic_crops(20, 1, 5), steps=12, seed=1)
    monkeypatch.undo()
    assert len(calls) > 8
    assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())
    new = density_coordinates(synthetic_crops(5, 1, 6)[:, 0])
    assert bool(torch.isfinite(net.log_prob_bound(new)).all())


def test_the_papers_diagonal_net_is_trained_on_request() -> None:
    checks: list[Monitor] = []
    net = train_dbn(
        synthetic_crops(30, 2, 1),
        form="diagonal",
        diagonal_units=32,
        top_units=8,
        steps=60,
        progress=lambda share, monitor: checks.append(monitor),
    )
    assert isinstance(net.layer, DiagonalLayer)
    assert max(monitor.bound for monitor in checks) > checks[0].bound


def test_the_chosen_covariance_beats_the_sample_covariance_of_few_pictures() -> None:
    y = augmented_coordinates(synthetic_crops(40, 1, 1))
    found = fit_covariance(y, torch.arange(40) % 5)
    new = density_coordinates(synthetic_crops(60, 1, 2)[:, 0])
    ours = EllipticalDensity(found.mean.float(), found.inflation * found.covariance, found.nu).log_prob(new).mean()
    theirs, _ = choose_elliptical(y.flatten(0, 1), new, student=True)
    assert float(ours) > float(theirs.log_prob(new).mean()) + 20


def test_a_field_that_depends_on_near_pixels_only_is_about_its_own_neighbourhood_covariance() -> None:
    """A field conditioned on a sum of zero; conditioning leaves regressions on neighbours all but as they were."""
    generator = torch.Generator().manual_seed(0)
    basis = prior_training._pixel_basis(torch.zeros(1, dtype=torch.float64))
    rows = torch.zeros(576, 576, dtype=torch.float64)
    for i in range(576):
        rows[i, i] = 1 + torch.rand((), generator=generator, dtype=torch.float64)
        for step in (1, 24, 25):  # left, above, above left: all within a radius of 2
            if i >= step and (step == 24 or i % 24):
                rows[i, i - step] = -0.4 * torch.rand((), generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv((rows @ basis).T @ (rows @ basis))
    found = prior_training._neighbourhood_covariance(covariance, 2, 0.0)
    trace = torch.linalg.solve(found, covariance).diagonal().sum()
    divergence = 0.5 * (trace - 575 + torch.logdet(found) - torch.logdet(covariance))
    # Nats, 0.015 of them in 575 dimensions; residuals wrong by a tenth would be 1.4, one pixel by itself 0.1.
    assert float(divergence) < 0.05
    wanted, given = ((basis @ c * basis).sum(1) for c in (covariance, found))
    torch.testing.assert_close(given, wanted, rtol=0.02, atol=0)


def test_the_local_root_whitens_and_its_filters_stand_about_their_pixels() -> None:
    y = augmented_coordinates(synthetic_crops(40, 1, 1))
    covariance = prior_training._mixed(y, 3, 0.3, 0.4)[1]
    root, directions = prior_training._local_root(covariance)
    identity = torch.eye(575, dtype=torch.float64)
    torch.testing.assert_close(root @ covariance @ root.T, identity, rtol=0, atol=1e-6)  # condition number 1e4
    torch.testing.assert_close(directions.T @ directions, identity[:20, :20], rtol=0, atol=1e-10)
    response = root @ prior_training._pixel_basis(root).T
    # A filter stands where its group says: residual k at pixel k + 1.
    assert float((response.abs().argmax(1) == torch.arange(1, 576)).double().mean()) > 0.95


def test_folds_and_validation_do_not_share_people() -> None:
    people = torch.tensor([3, 3, 3, 7, 7, 9, 9, 9, 9, 1, 1, 5])
    group = prior_training._groups(12, people, torch.device("cpu"))
    fold = prior_training._folds(group)
    held = prior_training._set_aside(group, torch.Generator().manual_seed(0))
    for person in people.unique():
        assert len(fold[people == person].unique()) == 1
        assert len(held[people == person].unique()) == 1
    assert 2 <= int(held.sum()) <= 6
    assert len(fold.unique()) == 5


def test_the_core_alone_is_that_of_the_net() -> None:
    crops, people = synthetic_crops(20, 2, 5), torch.arange(20) // 4
    net = train_dbn(crops, people=people, validation=synthetic_crops(6, 1, 8)[:, 0], steps=1, seed=0)
    alone = fit_core(crops, people)
    for name in ("mean", "axes", "variances"):
        torch.testing.assert_close(getattr(alone, name), getattr(net.core, name), rtol=0, atol=0)
    assert float(alone.nu) == float(net.core.nu)


def test_pictures_of_one_person_alone_can_be_learned_from_in_a_single_step() -> None:
    one_person = torch.zeros(24, dtype=torch.int64)
    net = train_dbn(synthetic_crops(24, 2, 7), people=one_person, steps=1, seed=0)
    assert bool(torch.isfinite(net.log_prob_bound(density_coordinates(synthetic_crops(5, 1, 8)[:, 0]))).all())


def test_crops_that_cannot_be_learned_from_are_refused() -> None:
    with pytest.raises(InputError, match="at least 10"):
        train_dbn(torch.rand(4, 1, 24, 24))
    crops = torch.rand(12, 1, 24, 24)
    crops[3, 0, 2, 2] = math.nan
    with pytest.raises(InputError, match="not finite"):
        train_dbn(crops)
    form: Any = "paper"
    with pytest.raises(InputError, match="form 'paper': there are gated and diagonal"):
        inspect.unwrap(train_dbn)(crops, form=form)


class Silent(prior_training._Watch):
    """A watch that neither stops training nor goes back."""

    def __init__(self) -> None: ...

    def begin(self) -> None: ...

    def check(self, *seen: Any) -> bool:
        return False

    def restore(self, net: DeepBeliefNet) -> None: ...


def small_net(gated: bool) -> DeepBeliefNet:
    layer = GatedLayer(2, 2, prior_training.DIRECTIONS, contrast_groups()) if gated else DiagonalLayer(4)
    if isinstance(layer, DiagonalLayer):
        with torch.no_grad():
            layer.weight.normal_(std=0.05)
    net = DeepBeliefNet(layer, BernoulliRBM(4, 3), EllipticalDensity.blank(575))
    with torch.no_grad():
        net.top.visible_bias.fill_(-1.0)
    # A top without weights has its log Z in closed form.
    net.set_log_z(4 * math.log1p(math.exp(-1.0)) + 3 * math.log(2), 0.0)
    return net


def test_mirror_images_are_left_for_right() -> None:
    crop = torch.rand(2, 3, 24, 24)
    back = from_density_coordinates(augmented_coordinates(crop))
    torch.testing.assert_close(back[:, :3], normalise(crop), rtol=0, atol=1e-5)  # float32, a rotation of 576 values
    torch.testing.assert_close(back[:, 3:], normalise(crop).flip(-1), rtol=0, atol=1e-5)


def test_pictures_set_aside_are_of_other_people_and_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}

    def gated(y: torch.Tensor, fold: Any, units: Any, steps: Any, watch: Any, generator: Any) -> DeepBeliefNet:
        seen.update(trained=y[:, 0], validation=watch.validation)
        return small_net(gated=False)

    monkeypatch.setattr(prior_training, "_train_gated", gated)
    crops, people = torch.rand(40, 2, 24, 24), torch.arange(40) // 4
    train_dbn(crops, people=people, steps=1)
    exact = density_coordinates(crops[:, 0]).double()
    trained, held = (
        (torch.cdist(seen[name].double(), exact) < 1e-4).nonzero()[:, 1] for name in ("trained", "validation")
    )
    assert sorted([*trained.tolist(), *held.tolist()]) == list(range(40)) and len(held) > 0
    assert not set(people[held].tolist()) & set(people[trained].tolist())


@torch.no_grad()
def test_a_check_scores_the_validation_crops() -> None:
    net = small_net(gated=False)
    validation, trained_on = torch.randn(30, 575), 2 * torch.randn(40, 575) + 0.3
    seen: list[Monitor] = []
    generator = torch.Generator().manual_seed(0)
    watch = prior_training._Watch(validation, lambda share, monitor: seen.append(monitor), generator, 0.2)
    assert not watch.check(net, "layer", 0, trained_on, 0.0)
    # float32: the same sums by the same function.
    assert seen[0].bound == pytest.approx(float(net.log_prob_bound(validation).mean()), rel=1e-5)
    assert seen[0].train_bound == pytest.approx(float(net.log_prob_bound(trained_on).mean()), rel=1e-5)
    assert watch.best == pytest.approx(seen[0].bound)
    # The free energy of a top without weights is the units' number, times minus their bias, but for a constant.
    on, off = (net.infer_hidden(y).sum(-1).mean() for y in (validation, trained_on))
    assert seen[0].free_energy_gap == pytest.approx(float(on - off), abs=1e-4)
    assert abs(seen[0].free_energy_gap) > 1e-3


def test_the_core_is_as_wide_as_new_people_are(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance = torch.diag(torch.linspace(0.1, 1, 575, dtype=torch.float64))
    found = prior_training.Covariance(torch.zeros(575).double(), covariance, 3, 0.3, 0.4, 2.0, 6.0, 0.0)
    monkeypatch.setattr(prior_training, "fit_covariance", lambda y, fold: found)
    monkeypatch.setattr(prior_training, "_cross_fitted", lambda *rest: (torch.randn(24, 575), torch.zeros(24)))
    for stage in ("_climb_layer", "_climb_top"):
        monkeypatch.setattr(prior_training, stage, lambda *rest: None)
    y, fold = torch.randn(12, 2, 575), torch.arange(12) % 5
    net = prior_training._train_gated(y, fold, (2, 2, 2), 1, Silent(), torch.Generator().manual_seed(0))
    variances = net.core.variances.double().sort().values
    torch.testing.assert_close(variances, 2.0 * covariance.diagonal(), rtol=1e-5, atol=0)  # kept in float32
    assert float(net.core.nu) == 6.0


def test_a_fold_is_whitened_by_the_others_alone() -> None:
    y, fold = torch.randn(20, 1, 575), torch.arange(20) % 5
    found = prior_training.Covariance(torch.zeros(575), torch.eye(575).double(), 3, 0.3, 0.4, 1.0, 8.0, 0.0)
    other = y.clone()
    other[fold == 0] *= 3
    (_, first), (_, second) = (prior_training._cross_fitted(values, fold, found) for values in (y, other))
    assert torch.equal(first[:4], second[:4]) and not bool(torch.isclose(first[4:], second[4:]).any())


def test_the_covariance_is_scored_on_people_it_has_not_seen() -> None:
    y = augmented_coordinates(synthetic_crops(40, 1, 1))
    found = fit_covariance(y, torch.arange(40) % 5)
    new = density_coordinates(synthetic_crops(60, 1, 2)[:, 0])
    scores = EllipticalDensity(found.mean.float(), found.inflation * found.covariance, found.nu).log_prob(new)
    # In sample the score would lie far above what new people get; four standard errors.
    assert found.score < float(scores.mean()) + 4 * float(scores.std()) / math.sqrt(60)
    assert found.inflation > 1


def test_what_the_layer_learns_raises_the_bound_on_others() -> None:
    generator = torch.Generator().manual_seed(0)
    net = small_net(gated=True)
    with torch.no_grad():
        net.top.visible_bias.zero_()
    net.set_log_z(7 * math.log(2), 0.0)
    e, new = torch.randn(300, 575, generator=generator), torch.randn(300, 575, generator=generator)
    before = float(net.log_prob_bound(new).mean())
    prior_training._climb_layer(net, e, e, torch.zeros(300), 60, Silent(), generator)
    net.set_log_z(float(net.top.path_log_z(net.top.visible_bias)), 0.0)
    # Without the Jacobian of the filters the bound would rise on what it was trained on and fall by 3 nats here.
    assert float(net.log_prob_bound(new).mean()) > before


def test_the_top_descends_the_gradient_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def uphill(top: BernoulliRBM, units: Any, chains: Any, **options: Any) -> Any:
        return {name: torch.ones_like(value) for name, value in top.named_parameters()}, chains

    monkeypatch.setattr(prior_training, "fast_persistent_contrastive_divergence", uphill)
    net, e = small_net(gated=True), torch.randn(300, 575)
    with torch.no_grad():
        net.top.visible_bias.zero_()
    prior_training._climb_top(net, e, e, 5, Silent(), torch.Generator().manual_seed(0))
    assert bool((net.top.visible_bias < 0).all()) and bool((net.top.hidden_bias < 0).all())
