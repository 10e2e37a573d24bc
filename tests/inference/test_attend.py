"""Attending samples the posterior that brute force integrates, whatever shares the batch, and refuses bad input."""

import copy
import importlib
import inspect
import json
import math
from typing import Any, NamedTuple

import arviz
import numpy as np
import pyro
import pyro.distributions
import pytest
import torch
from torch import Tensor

from foveate.data import Scenes
from foveate.inference.attend import Candidates, attend, attend_batches, integrated_odds, mode_points, search
from foveate.inference.glance import Proposals
from foveate.inference.guide import GazeChange, GazeGuide
from foveate.inference.noise import KeyedNoise
from foveate.inference.posterior import Posterior
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer, GatedLayer, contrast_groups
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError
from foveate.model.identity import IdentityModel
from foveate.model.patch import Pyramid, density_coordinates
from foveate.model.rbm import BernoulliRBM

# The package's function `attend` hides the module of the same name.
attending = importlib.import_module("foveate.inference.attend")
NOISE, TEMPERATURE = 0.7, 6.0
SIZES = [(70, 90), (64, 64), (80, 60)]
SCALES, ROTATIONS = (1.3, 1.0, 1.1), (0.15, -0.2, 0.0)
SHORT: dict[str, Any] = {"chains": 2, "draws": 12, "warmup": 8, "guide_steps": 0}


def waves(seed: int, points: Tensor, fastest: float) -> Tensor:
    """A smooth random function of the plane of about unit variance: six waves of up to `fastest` radians a pixel."""
    generator = torch.Generator().manual_seed(seed)
    frequency = fastest * (2 * torch.rand(6, 2, generator=generator, dtype=torch.float64) - 1)
    phase = 2 * math.pi * torch.rand(6, generator=generator, dtype=torch.float64)
    return torch.sin(points @ frequency.T + phase).sum(-1) / math.sqrt(3)


def pattern(seed: int) -> Tensor:
    """An object's canonical image."""
    return 0.5 + 0.12 * waves(100 + seed, gazes.lattice(dtype=torch.float64), 0.35)


def paint(size: tuple[int, int], seed: int, objects: list[tuple[int, Tensor]]) -> Tensor:
    """A picture of soft clutter with objects at their gazes, pasted through a soft mask of a patch's size."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([x, y], -1)
    picture = 0.5 + 0.08 * waves(seed, pixels, 0.3)
    for which, gaze in objects:
        inside = gazes.apply(gazes.inverse(gaze), pixels)
        mask = torch.sigmoid((13.5 - inside.abs().amax(-1)) / 0.7)
        picture = picture + mask * (0.5 + 0.12 * waves(100 + which, inside, 0.35) - picture)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (picture + 0.01 * noise).clamp(0, 1).float()


class World(NamedTuple):
    """A model whose object is a planted pattern, a guide that knows nothing, and one object in each picture."""

    model: AttentionModel
    guide: GazeGuide
    scenes: Scenes
    start: Tensor


def make_model(form: str = "diagonal", clutter: bool = True) -> AttentionModel:
    """The object is normal about the planted pattern; the net, which only canonical draws read, is untrained."""
    layer = DiagonalLayer(4) if form == "diagonal" else GatedLayer(2, 2, 4, contrast_groups())
    core = EllipticalDensity.blank(575)
    core.mean.copy_(density_coordinates(pattern(0)))
    core.variances.fill_(0.2)
    core.nu.fill_(math.inf)
    dbn = DeepBeliefNet(layer, BernoulliRBM(4, 3), core)
    dbn.set_log_z(0.0, 0.0)
    if not clutter:
        return AttentionModel(dbn, None, noise=NOISE, temperature=TEMPERATURE)
    pyramid = Pyramid.build([paint((90, 90), 50 + i, []) for i in range(4)])
    patches = density_coordinates(
        pyramid.extract(gazes.GazePrior(pyramid.size.double()[:, None].expand(4, 150, 2)).sample())
    )
    # Noise beside the waves, so that no direction is free of variance.
    patches = patches.flatten(0, 1) + 0.3 * torch.randn(600, 575, generator=torch.Generator().manual_seed(8))
    return AttentionModel(dbn, ClutterModel.fit(patches), noise=NOISE, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(3)
    centre = torch.tensor([[w / 2 + 3, h / 2 - 2] for h, w in SIZES]).double()
    truth = gazes.from_parts(centre, torch.tensor(SCALES).double(), torch.tensor(ROTATIONS).double())
    pictures = [paint(size, i, [(0, truth[i])]) for i, size in enumerate(SIZES)]
    scenes = Scenes.from_pictures(pictures, ["first", "second", "third"], truth)
    start = gazes.LocalChart(truth).to_gaze(torch.tensor([0.4, -0.3, 0.2, 0.3]).double().expand(3, 4))
    return World(make_model(), GazeGuide(4).eval(), scenes, start)


class Quadrature(NamedTuple):
    """Of the posterior over chart coordinates: log of its integral, mean and sd."""

    log_integral: float
    mean: Tensor
    sd: Tensor


def log_posterior(
    world: World, scene: int, base: Tensor, z: Tensor, canonical: Tensor | None = None, sd: Tensor | None = None
) -> Tensor:
    """Unnormalised log density of chart coordinates ``(n, 4)`` about `base`, from its formula."""
    pyramid = Pyramid.build(world.scenes.pictures([scene]), oversampling=2.0, smallest=0.07)
    chart = gazes.LocalChart(base)
    gaze = chart.to_gaze(z)
    y = density_coordinates(pyramid.extract(gaze[None])[0])
    dense_object, dense_clutter = world.model.marginal_densities()
    assert dense_clutter is not None
    if canonical is None:
        log_object = dense_object.log_prob(y)
    else:
        v = density_coordinates(canonical)
        log_object = torch.distributions.Normal(v, NOISE).log_prob(y).sum(-1)
    log_odds = (log_object - dense_clutter.log_prob(y)).double() / TEMPERATURE
    log_p = log_odds + world.model.prior(pyramid.size[0].double()).log_prob(gaze) + chart.log_det(z)
    return log_p if sd is None else log_p - 0.5 * (z / sd).square().sum(-1)


def quadrature(
    world: World, scene: int, base: Tensor, canonical: Tensor | None = None, sd: Tensor | None = None
) -> Quadrature:
    """Brute force: a grid of 9 to the fourth, 4.4 sds either way along axes that two grids before it have whitened.

    Grids of 11 and 13 change its sds by 0.7 % at most (the pyramid has a kink at every sample).
    """
    centre, axes = torch.zeros(4).double(), 0.7 * torch.eye(4).double()
    log_integral, covariance = math.nan, axes
    for count in (7, 9, 9):
        grid = torch.linspace(-4.4, 4.4, count, dtype=torch.float64)
        z = centre + torch.cartesian_prod(grid, grid, grid, grid) @ axes.T
        log_p = torch.cat([log_posterior(world, scene, base, part, canonical, sd) for part in z.split(1024)])
        cell = 4 * math.log(float(grid[1] - grid[0])) + float(torch.linalg.slogdet(axes)[1])
        log_integral = float(torch.logsumexp(log_p, 0)) + cell
        weight = torch.softmax(log_p, 0)
        centre = weight @ z
        covariance = (z - centre).T @ (weight[:, None] * (z - centre))
        axes = torch.linalg.cholesky(covariance)
    return Quadrature(log_integral, centre, covariance.diagonal().sqrt())


def assert_same_moments(draws: Tensor, base: Tensor, exact: Quadrature) -> None:
    """Draws ``(chain, draw, 4)`` of gazes have the exact mean and sd within 4 Monte-Carlo standard errors."""
    z = gazes.LocalChart(base).to_chart(draws)
    for k in range(4):
        mean, sd = float(exact.mean[k]), float(exact.sd[k])
        square = (z[..., k] - mean).square()
        mcse_mean = float(sd / np.sqrt(arviz.ess(z[..., k].numpy())))
        # Of the square root of the mean square.
        mcse_sd = float(square.std() / np.sqrt(arviz.ess(square.numpy())) / (2 * sd))
        assert mcse_mean < 0.2 * sd and mcse_sd < 0.2 * sd
        # Four standard errors in eight comparisons: one false alarm in two thousand. 1 %: the grid's own error.
        assert abs(float(z[..., k].mean()) - mean) < 4 * mcse_mean + 0.01 * sd
        assert abs(float(square.mean().sqrt()) - sd) < 4 * mcse_sd + 0.01 * sd


@pytest.mark.parametrize(
    ("scene", "given", "belief"),
    [(0, False, False), (1, True, False), (0, False, True)],
    ids=["collapsed", "canonical image given", "guide as prior"],
)
def test_draws_have_the_mean_and_sd_of_brute_force_quadrature(
    world: World, scene: int, given: bool, belief: bool
) -> None:
    picture, base = world.scenes[scene : scene + 1], world.start[scene]
    canonical = pattern(0).float()[None] if given else None
    guide = copy.deepcopy(world.guide)
    guide.prior_weight.fill_(float(belief))
    pyramid = Pyramid.build(picture.pictures(), oversampling=2.0, smallest=0.07)
    found = search(world.model, guide, pyramid, start=base[None], canonical=canonical, steps=0)
    exact = quadrature(
        world, scene, base, None if canonical is None else canonical[0], found.sd[0, 0] if belief else None
    )
    # A processor's last bits decide the adaptation: of 120 draws a chain some seeds' standard errors exceed 0.2 sd.
    posterior = attend(
        world.model, guide, picture, start=base[None], canonical=canonical, guide_steps=0, draws=400, warmup=50
    )
    assert_same_moments(posterior.gaze[0], base, exact)
    # lp is the log density that was sampled, up to float32 rounding of 576 terms.
    z = gazes.LocalChart(base).to_chart(posterior.gaze[0, 0])
    expected = log_posterior(
        world, scene, base, z, None if canonical is None else canonical[0], found.sd[0, 0] if belief else None
    )
    torch.testing.assert_close(posterior.statistics["lp"][0, 0].double(), expected, rtol=1e-4, atol=0.02)


def test_the_proposal_of_leaps_has_the_posteriors_mean_and_sds(world: World) -> None:
    base, sd = world.start[:1], torch.tensor([[1.0, 1.0, 1.5, 1.5]]).double()
    pyramid = Pyramid.build(world.scenes.pictures([0]), oversampling=2.0, smallest=0.07)
    potential = attending.mode_potential(world.model, world.guide, pyramid, base, sd)
    noise = KeyedNoise(0, torch.arange(4)[None])
    starts, proposal = attending.adapted_starts(potential, base, sd, noise)
    exact = quadrature(world, 0, base[0])
    # Some 200 of 768 points count: standard errors are 0.07 sd of the mean and 5 % of an sd. Four of them.
    mean, root = proposal.mean[0, 0], proposal.scale_tril[0, 0]
    assert bool(((mean - exact.mean).abs() < 0.28 * exact.sd).all())
    torch.testing.assert_close((root @ root.T).diagonal().sqrt() / exact.sd, torch.ones(4).double(), rtol=0, atol=0.2)
    assert bool(((starts[0] - exact.mean).abs() < 5 * exact.sd).all())


def test_neither_starts_nor_leaps_go_to_another_mode(world: World) -> None:
    """Two copies of the object, 24 canonical pixels from each other, and a belief that is wide enough for both."""
    one = gazes.from_parts(torch.tensor([40.0, 48.0]), torch.tensor(1.6), torch.tensor(0.0)).double()
    other = gazes.from_parts(torch.tensor([40 + 24 * 1.6, 48.0]), torch.tensor(1.6), torch.tensor(0.0)).double()
    pyramid = Pyramid.build([paint((96, 128), 7, [(0, one), (0, other)])], oversampling=2.0, smallest=0.07)
    base, sd = one[None], torch.tensor([[4.0, 1.0, 1.0, 1.0]]).double()
    potential = attending.mode_potential(world.model, world.guide, pyramid, base, sd)
    # The other one is the better by some nats.
    of_one, of_other = potential(potential.chart.to_chart(torch.stack([one, other])[None]))[0][0].tolist()
    assert of_one - 10 < of_other < of_one
    starts, proposal = attending.adapted_starts(potential, base, sd, KeyedNoise(0, torch.arange(64)[None]))
    assert proposal.within is not None
    assert bool(proposal.within(starts).all())
    z = potential.chart.to_chart(torch.stack([one, other])[None])
    assert proposal.within(z)[0].tolist() == [True, False]
    # What is adapted to one of them is as narrow as one of them.
    assert float(proposal.scale_tril[0, 0, 0, 0]) < 3


def test_leaps_leave_draws_with_little_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"start": world.start, "guide_steps": 0, "draws": 100, "warmup": 50}
    with_leaps = attend(world.model, world.guide, world.scenes, **how)
    sample = attending.sample_batch
    monkeypatch.setattr(attending, "sample_batch", lambda *given, proposal, **options: sample(*given, **options))
    without = attend(world.model, world.guide, world.scenes, **how)
    # Of 400 draws 169 to 233 against 39 to 63, as measured; an ess of so few draws is known to a third.
    assert bool((with_leaps.ess() > 120).all())
    assert bool((with_leaps.ess() > 1.3 * without.ess()).all())
    assert bool((with_leaps.rhat() < 1.05).all())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["hmc", "nuts"])
def test_pyros_own_kernels_have_the_mean_and_sd_of_brute_force_quadrature(world: World, kernel: Any) -> None:
    posterior = attend(
        world.model,
        world.guide,
        world.scenes[:1],
        start=world.start[:1],
        guide_steps=0,
        kernel=kernel,
        chains=2,
        # Of 120 one machine's last bits leave standard errors of more than 0.2 sd.
        draws=300,
        warmup=40,
    )
    assert_same_moments(posterior.gaze[0], world.start[0], quadrature(world, 0, world.start[0]))
    assert (posterior.settings["aperture"], posterior.settings["edges"]) == (None, False)
    assert posterior.settings["kernel"] == kernel and set(posterior.statistics) == {"lp", "diverging"}


def test_pyros_own_kernels_draw_from_the_same_density(world: World) -> None:
    """The log density they report is that of the formula; their moments are held to it in the slow test."""
    for kernel in ("hmc", "nuts"):
        posterior = attend(
            world.model,
            world.guide,
            world.scenes[:1],
            start=world.start[:1],
            kernel=kernel,
            **SHORT | {"chains": 1, "draws": 4, "warmup": 2},
        )
        z = gazes.LocalChart(world.start[0]).to_chart(posterior.gaze[0, 0])
        expected = log_posterior(world, 0, world.start[0], z)
        torch.testing.assert_close(posterior.statistics["lp"][0, 0].double(), expected, rtol=1e-4, atol=0.02)


def test_a_prior_of_ones_own_is_the_one_that_is_sampled(world: World) -> None:
    """A prior of another family, much narrower than the likelihood, about a place beside the object's own."""

    class Here(AttentionModel):
        def prior(self, size: Tensor) -> Any:
            at = world.start[0] + torch.tensor([0.0, 0.0, 0.5, 0.0])
            return pyro.distributions.Normal(at.expand(*size.shape[:-1], 4), 0.01).to_event(1)

    model = Here(world.model.dbn, world.model.clutter, noise=NOISE, temperature=1e3)
    how: dict[str, Any] = {"start": world.start[:1], "guide_steps": 0, "chains": 2, "draws": 100, "warmup": 60}
    gaze = attend(model, world.guide, world.scenes[:1], **how).gaze[0].flatten(0, 1)
    wanted = world.start[0] + torch.tensor([0.0, 0.0, 0.5, 0.0])
    # The odds at a temperature of 1000 pull by a small part of a sd. Of 100 independent draws or more a mean is known
    # to a tenth of a sd and a sd to 7 %: four of either. The energy itself is held to 1e-10 in test_potential.
    torch.testing.assert_close(gaze.mean(0), wanted, rtol=0, atol=0.004)
    torch.testing.assert_close(gaze.std(0), torch.full((4,), 0.01).double(), rtol=0.28, atol=0)


def test_a_prior_within_bounds_is_searched_and_sampled_within_them(world: World) -> None:
    low = world.start[0] - torch.tensor([0.3, 0.3, 3.0, 3.0])

    class Box(AttentionModel):
        def prior(self, size: Tensor) -> Any:
            shape = (*size.shape[:-1], 4)
            return pyro.distributions.Uniform(low.expand(shape), low.expand(shape) + 6).to_event(1)

    model = Box(world.model.dbn, world.model.clutter, noise=NOISE, temperature=TEMPERATURE)
    gaze = attend(model, world.guide, world.scenes[:1], start=world.start[:1], **SHORT).gaze
    assert bool(((gaze >= low) & (gaze <= low + 6)).all())


def test_pyros_own_kernels_share_no_random_numbers_between_chains_scenes_and_seeds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(pyro, "set_rng_seed", seeds.append)
    how: dict[str, Any] = {"chains": 3, "draws": 1, "warmup": 0, "kernel": "hmc"}
    for seed in range(3):
        attend(world.model, world.guide, world.scenes[:2], start=world.start[:2], seed=seed, **how)
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 2


def test_pyros_own_kernels_leave_the_global_generators_as_they_were(world: World) -> None:
    pyro.set_rng_seed(5)
    expected = torch.rand(2)
    pyro.set_rng_seed(5)
    how = SHORT | {"chains": 1, "draws": 2, "warmup": 1}
    attend(world.model, world.guide, world.scenes[:1], start=world.start[:1], kernel="nuts", **how)
    assert torch.equal(torch.rand(2), expected)


def test_what_was_asked_for_is_told_with_the_posterior(world: World) -> None:
    # An array as start, as users give one whom no checker of types stops.
    start: Any = world.start[:1].numpy()
    (posterior,) = inspect.unwrap(attend_batches)(world.model, world.guide, world.scenes[:1], start=start, **SHORT)
    told = posterior.settings
    assert (told["noise"], told["temperature"], told["canonical"], told["modes"]) == (NOISE, TEMPERATURE, "free", 4)
    assert told["gaze_prior"] == {"kind": "proper"}
    assert told["trajectories"]["trajectory_length"] == 1.6 and told["trajectories"]["target_accept_prob"] == 0.65
    # Numbers of NumPy's kinds, as loops over arrays give them, go to disk as well.
    how = SHORT | {"draws": np.int64(4), "seed": np.int64(3)}
    (again,) = inspect.unwrap(attend_batches)(world.model, world.guide, world.scenes[:1], start=start, **how)
    json.dumps(again.settings)


@pytest.mark.parametrize("draws", [1, 3])
def test_pyros_own_kernels_give_as_few_draws_as_are_asked_for(world: World, draws: int) -> None:
    how = SHORT | {"chains": 1, "draws": draws, "warmup": 2}
    posterior = attend(world.model, world.guide, world.scenes[:1], start=world.start[:1], kernel="hmc", **how)
    assert posterior.gaze.shape == (1, 1, draws, 4) and bool(posterior.gaze.isfinite().all())


def test_scenes_of_the_same_name_have_random_numbers_of_their_own(world: World) -> None:
    picture = world.scenes[0].picture
    twice = Scenes.from_pictures([picture, picture, picture], ["a/1.jpg", "1.jpg", "1.jpg"])
    gaze = attend(world.model, world.guide, twice, start=world.start[:1].expand(3, 4), batch=2, **SHORT).gaze
    assert not torch.isclose(gaze[1], gaze[2]).all(-1).any()
    # The first of a name draws as it does alone.
    alone = attend(world.model, world.guide, twice[1:2], start=world.start[:1], **SHORT).gaze
    torch.testing.assert_close(gaze[1:2], alone, rtol=0, atol=1e-6)


def test_draws_of_a_scene_do_not_depend_on_what_shares_its_batch(world: World) -> None:
    together = attend(world.model, world.guide, world.scenes, start=world.start, **SHORT)
    alone = attend(world.model, world.guide, world.scenes, start=world.start, batch=1, **SHORT)
    order = [2, 0, 1]
    mixed = attend(world.model, world.guide, world.scenes.subset(order), start=world.start[order], batch=2, **SHORT)
    assert alone.names == together.names and mixed.names == [together.names[i] for i in order]
    for other, rows in ((alone, [0, 1, 2]), (mixed, order)):
        torch.testing.assert_close(other.gaze, together.gaze[rows], rtol=0, atol=1e-6)
        # Canonical images pass through float32 twice.
        torch.testing.assert_close(other.canonical_draws, together.canonical_draws[rows], rtol=0, atol=1e-5)
        torch.testing.assert_close(other.presence, together.presence[rows], rtol=0, atol=1e-5)
        assert other.hashes == [together.hashes[i] for i in rows]


def test_the_seed_alone_decides_the_draws(world: World) -> None:
    def draws(seed: int) -> Tensor:
        torch.manual_seed(seed + 17)
        return attend(world.model, world.guide, world.scenes[:1], start=world.start[:1], seed=seed, **SHORT).gaze

    first = draws(1)
    assert torch.equal(first, draws(1))
    assert not torch.isclose(first, draws(2)).any(-1).all()


def test_chains_of_a_scene_differ(world: World) -> None:
    gaze = attend(world.model, world.guide, world.scenes[:1], start=world.start[:1], **SHORT).gaze
    assert not torch.isclose(gaze[0, 0], gaze[0, 1]).all(-1).any()


def test_attending_in_batches_streams_the_same_posterior(world: World) -> None:
    parts = list(attend_batches(world.model, world.guide, world.scenes, start=world.start, batch=2, **SHORT))
    whole = attend(world.model, world.guide, world.scenes, start=world.start, batch=2, **SHORT)
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.gaze for part in parts]), whole.gaze)


@pytest.mark.parametrize("start", ["given", "searched"])
def test_batches_beside_each_other_are_those_one_after_the_other(world: World, start: str) -> None:
    def attended(threads: int) -> Posterior:
        torch.set_num_threads(threads)
        first = world.start if start == "given" else None
        return attend(world.model, world.guide, world.scenes, start=first, batch=1, **SHORT)

    one, two = attended(1), attended(2)
    assert one.names == two.names and one.hashes == two.hashes
    # To the last bit: each batch has one thread to itself, as when there is but one.
    for name in ("gaze", "modes", "presence", "canonical_draws"):
        assert torch.equal(getattr(one, name).nan_to_num(), getattr(two, name).nan_to_num()), name


def test_a_list_of_arrays_is_attended_like_scenes(world: World) -> None:
    pictures = [world.scenes[0].picture.numpy()]
    as_list = attend(world.model, world.guide, pictures, start=world.start[:1], **SHORT)
    scenes = Scenes.from_pictures(pictures)
    assert as_list.names == list(scenes.names) == ["picture_0000"]
    assert torch.equal(as_list.gaze, attend(world.model, world.guide, scenes, start=world.start[:1], **SHORT).gaze)


def test_a_gaussian_integrates_to_one_over_a_mode_and_to_a_hundredth_with_enough_points() -> None:
    gaze, sd = torch.tensor([[[1.5, 0.4, 30.0, 20.0]]]).double(), torch.tensor([[[0.7, 1.3, 0.4, 2.0]]]).double()
    for count, tolerance in ((64, 0.1), (1024, 0.02)):
        points = mode_points(gaze, sd, count)
        normal = torch.distributions.Normal(torch.zeros(4).double(), sd[..., None, :])
        log_weight = normal.log_prob(points.z).sum(-1) - points.log_q
        # A plain Monte-Carlo rule would have a standard error of sqrt(1.09 / count): 13 % and 3 %.
        assert abs(float(log_weight.exp().mean()) - 1) < tolerance
        torch.testing.assert_close(gazes.LocalChart(gaze[..., None, :]).to_chart(points.gaze), points.z)
        assert torch.equal(points.log_det, gazes.LocalChart(gaze[..., None, :]).log_det(points.z))


def test_integrated_odds_are_the_quadrature_of_the_posterior(world: World) -> None:
    exact = quadrature(world, 0, world.start[0])
    mode = gazes.LocalChart(world.start[0]).to_gaze(exact.mean)
    pyramid = Pyramid.build(world.scenes.pictures([0]), oversampling=2.0, smallest=0.07)
    found = float(integrated_odds(world.model, pyramid, mode[None, None], exact.sd[None, None]))
    # An integral over gazes is the same in every chart. Many points come close to quadrature,
    for count in (attending.POINTS, 4096):
        points = mode_points(mode[None, None], exact.sd[None, None], count)
        log_weight = log_posterior(world, 0, mode, points.z[0, 0]) - points.log_q[0, 0]
        estimate = float(torch.logsumexp(log_weight, 0)) - math.log(count)
        share = torch.softmax(log_weight, 0)
        # Four standard errors of plain Monte Carlo with these weights (Sobol points undercut it), and the grid's 1 %.
        assert abs(estimate - exact.log_integral) < 4 * float(share.square().sum().sqrt()) + 0.01
        if count == attending.POINTS:
            # and those that are used give what the formula gives, in float32.
            assert found == pytest.approx(estimate, abs=0.02)


def test_integrated_odds_of_some_modes_are_those_among_all(world: World) -> None:
    pyramid = Pyramid.build(world.scenes.pictures([0, 1]), oversampling=2.0, smallest=0.07)
    off = torch.randn(2, 3, 2).double()
    gaze = gazes.compose(world.start[:2, None], gazes.from_parts(off, off[..., 0].exp(), 0.1 * off[..., 1]))
    sd = 0.5 + torch.rand(2, 3, 4).double()
    every = integrated_odds(world.model, pyramid, gaze, sd)
    scene, mode = torch.tensor([1, 0, 1]), torch.tensor([0, 2, 2])
    some = integrated_odds(world.model, pyramid, gaze[scene, mode][:, None], sd[scene, mode][:, None], scene=scene)
    torch.testing.assert_close(some[:, 0], every[scene, mode], rtol=1e-4, atol=1e-3)  # float32 sums, in other batches


def test_of_end_points_that_are_nearly_one_the_one_that_looks_led_to_is_weighed() -> None:
    """Two proposals (first half) and where the looks led from each: the second stayed, and the first went there."""
    at = torch.tensor([[1.0, 0.0, 50.0, 50.0], [1.0, 0.0, 90.3, 40.0], [1.0, 0.0, 90.2, 40.1], [1.0, 0.0, 90.0, 40.0]])
    every = torch.ones(1, 4, dtype=torch.bool)
    first = attending._first_of_its_place(at[None].double(), every)
    assert first.tolist() == [[True, False, True, False]]
    # What was not found takes nobody's place.
    missing = torch.tensor([[True, True, False, False]])
    assert attending._first_of_its_place(at[None].double(), missing).tolist() == [[True, True, False, False]]
    assert attending._first_of_its_place(at[None, :1].double(), every[:, :1]).tolist() == [[True]]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_looks_that_are_used_again_are_those_that_would_be_taken(
    world: World, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    torch.manual_seed(1)
    guide = GazeGuide(4).eval()
    for layer in (guide.glance.head, guide.votes[-1]):
        assert isinstance(layer, torch.nn.Conv2d)
        torch.nn.init.normal_(layer.weight, std=0.5)
    guide.evidence.copy_(torch.tensor([0.3, 1.0, 0.2, 0.0]))
    pyramid = Pyramid.build(world.scenes.pictures())
    found = search(world.model, guide, pyramid, steps=steps)
    promising, recognise = attending._promising, GazeGuide.recognise
    monkeypatch.setattr(attending, "_promising", lambda *given: (promising(*given)[0], []))
    monkeypatch.setattr(
        GazeGuide, "recognise", lambda self, pyramid, gaze, scene, upright: recognise(self, pyramid, gaze, scene)
    )
    anew = search(world.model, guide, pyramid, steps=steps)
    assert bool((found.path[:, 0] != found.path[:, -1]).any()) == (steps > 0)
    for name in ("gaze", "sd", "features", "log_weight", "path"):
        # Float32 convolutions of batches of another size: last bits, which each look magnifies a little.
        torch.testing.assert_close(getattr(found, name), getattr(anew, name), rtol=1e-3, atol=1e-3, msg=name)


def test_a_given_start_is_where_the_path_begins_and_nothing_is_searched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Proposals:
        raise AssertionError("searched although a start was given")

    monkeypatch.setattr(attending, "propose", refuse)
    posterior = attend(world.model, world.guide, world.scenes, start=world.start, **SHORT | {"guide_steps": 2})
    assert torch.equal(posterior.path[:, 0], world.start)
    assert posterior.path.shape == (3, 4, 4)  # start, two looks, posterior mean
    assert torch.equal(posterior.path[:, -1], posterior.mean_gaze)
    torch.testing.assert_close(posterior.modes[:, 0], posterior.path[:, -2])
    assert posterior.settings["start"] == "given"
    with pytest.raises(AssertionError, match="searched"):
        attend(world.model, world.guide, world.scenes, **SHORT)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """A picture of two different objects, and their gazes."""
    gaze = gazes.from_parts(
        torch.tensor([[32.0, 34.0], [98.0, 38.0]]).double(), torch.tensor([1.2, 1.3]).double(), torch.zeros(2).double()
    )
    return paint((70, 130), 5, [(0, gaze[0]), (1, gaze[1])]), gaze


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_given_canonical_image_picks_the_object_whose_image_it_is(
    world: World, pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    picture, gaze = pair
    proposed = Proposals(gaze[None].float(), torch.zeros(1, 2))
    monkeypatch.setattr(attending, "propose", lambda glance, pyramid, count: proposed)
    v = pattern(wanted).float()[None]
    posterior = attend(world.model, world.guide, [picture], canonical=v, modes=3, **SHORT)
    overlap = gazes.overlap(posterior.mean_gaze, gaze)
    # 0.5 is the paper's bound of success; a few draws scatter about the truth.
    assert overlap[wanted] > 0.5 and overlap[1 - wanted] == 0
    # Both are modes, the wanted one has all the weight, and there is no third.
    assert gazes.overlap(posterior.modes[0, 1], gaze[1 - wanted]) > 0.99
    assert posterior.weights[0, 0] > 0.99 and posterior.weights[0, 2] == 0
    assert bool(posterior.modes[0, 2].isnan().all())
    torch.testing.assert_close(posterior.canonical, v)


@pytest.fixture(scope="module")
def acquainted() -> AttentionModel:
    """The model, taught by other patterns what tells patterns apart."""
    generator = torch.Generator().manual_seed(4)
    crops = torch.stack([pattern(k).float() for k in range(2, 22) for _ in range(4)])[:, None]
    crops = crops + 0.02 * torch.randn(80, 2, 24, 24, generator=generator)
    model = make_model()
    model.identity = IdentityModel.fit(crops, torch.arange(80) // 4)
    return model


@pytest.mark.parametrize("wanted", [0, 1])
def test_from_one_start_attention_goes_to_whom_another_picture_shows(
    acquainted: AttentionModel, world: World, pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    picture, gaze = pair
    proposed = Proposals(gaze[None].float(), torch.zeros(1, 2))
    monkeypatch.setattr(attending, "propose", lambda glance, pyramid, count: _filled(proposed, len(pyramid), count))
    start = gazes.from_parts(
        torch.tensor([[65.0, 36.0]]).double(), torch.tensor([1.2]).double(), torch.zeros(1).double()
    )
    # Another light and other noise than the picture's own.
    noise = 0.02 * torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    v = (0.8 * pattern(wanted).float() + 0.1 + noise)[None]
    found = attend(acquainted, world.guide, [picture], start=start, canonical=v, **SHORT | {"guide_steps": 1})
    assert torch.equal(found.path[0, 0], start[0])
    overlap = gazes.overlap(found.mean_gaze, gaze)
    # The model's object is pattern 0; whom v shows decides against it, too.
    assert overlap[wanted] > 0.5 and overlap[1 - wanted] == 0
    far = start + torch.tensor([0.0, 0.0, 24 * 1.3 * attending.REACH, 0.0])
    out_of_reach = attend(acquainted, world.guide, [picture], start=far, canonical=v, **SHORT | {"guide_steps": 1})
    assert gazes.overlap(out_of_reach.modes[0, :, None], gaze).nan_to_num()[:, 0].max() < 0.5


def _filled(proposals: Proposals, scenes: int, count: int) -> Proposals:
    """The same for every scene, as `propose` returns them: what is missing repeats the first with a logit of -inf."""
    gaze, logit = proposals.gaze.expand(scenes, -1, -1), proposals.logit.expand(scenes, -1)
    missing = count - gaze.shape[1]
    return Proposals(
        torch.cat([gaze, gaze[:, :1].expand(-1, missing, -1)], 1),
        torch.cat([logit, logit.new_full((len(logit), missing), -math.inf)], 1),
    )


def test_the_odds_of_a_person_are_the_objects_times_the_bayes_factor(acquainted: AttentionModel, world: World) -> None:
    assert acquainted.identity is not None
    v, patch = torch.stack([pattern(0), pattern(1)]).float(), torch.rand(2, 3, 24, 24)
    person, anybody = attending.odds_score(acquainted, v), attending.odds_score(acquainted)
    t = acquainted.identity.coordinates(patch)
    ratio = acquainted.identity.log_ratio(t, acquainted.identity.coordinates(v)[:, None])
    torch.testing.assert_close(person.energy(patch), anybody.energy(patch) - ratio)
    # The compiled sampler's slopes against autograd, float32.
    seen = patch.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(person.energy(seen).sum(), seen)
    energy, fast = person.energy_and_slope(patch.reshape(6, 576), (2, 3), torch.arange(6))
    torch.testing.assert_close(energy, person.energy(patch).flatten(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(fast.reshape(2, 3, 24, 24), slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max()))


def test_objects_are_attended_to_one_after_the_other(
    world: World, pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, gaze = pair
    proposed = Proposals(gaze[None].float(), torch.zeros(1, 2))
    monkeypatch.setattr(attending, "propose", lambda glance, pyramid, count: _filled(proposed, len(pyramid), count))
    options = SHORT | {"guide_steps": 0}
    one = attend(world.model, world.guide, [picture], **options)
    three = attend(world.model, world.guide, [picture, picture], max_objects=3, **options)
    assert len(three) == 6 and three.settings["max_objects"] == 3
    by_object = three.gaze.unflatten(0, (-1, 3))
    torch.testing.assert_close(by_object[0, 0], one.gaze[0], rtol=0, atol=1e-6)
    first, second, third = three.modes[:3]
    assert gazes.overlap(first[0], gaze[0]) > 0.99 and gazes.overlap(second[0], gaze[1]) > 0.99
    # The first is taken out of what the second is chosen among; then nothing is left.
    assert bool(second[1:].isnan().all()) and bool(third.isnan().all())
    assert three.weights[1, 0] == 1 and three.presence[0] >= three.presence[1] > three.presence[2] == 0
    assert not torch.isclose(by_object[0, 0] - gaze[0], by_object[0, 1] - gaze[1]).all(-1).any()
    # What is said of the first object does not depend on how many are looked for.
    assert three.modes.shape == (6, *one.modes.shape[1:])
    torch.testing.assert_close(three.presence[0], one.presence[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(three.weights[0], one.weights[0], rtol=0, atol=1e-6)


def test_what_shares_a_third_of_its_patch_with_an_explained_object_is_taken_out() -> None:
    explained = gazes.from_parts(
        torch.tensor([50.0, 50.0]).double(), torch.tensor(2.0).double(), torch.tensor(0.0).double()
    )
    offsets, sizes = torch.tensor([0.0, 10.0, 28.0, 40.0]).double(), torch.tensor([2.0, 0.5, 2.0, 2.0]).double()
    centre = torch.stack([50 + offsets, torch.full((4,), 50.0).double()], -1)
    gaze = gazes.from_parts(centre, sizes, torch.zeros(4).double())[None]
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).double()
    found = attending.Candidates(gaze, gaze, gaze[..., :3], weight, gaze[:, :, None])
    left = attending._without(found, explained[None])
    # The same, one within it, one that shares 20 of 48 pixels' width; the last shares 8.
    assert left.log_weight[0].tolist() == [1.0, -math.inf, -math.inf, -math.inf]
    assert torch.equal(left.gaze[0, 0], gaze[0, 3]) and torch.equal(left.path[0, 0], gaze[0, 3])


def test_canonical_images_of_a_gated_net_are_pictures_like_the_patch(world: World) -> None:
    posterior = attend(
        make_model("gated"), world.guide, world.scenes[:1], start=world.start[:1], **SHORT | {"draws": 2, "chains": 1}
    )
    assert posterior.canonical_draws.shape == (1, 1, 2, 24, 24)
    assert 0 <= posterior.canonical_draws.min() and posterior.canonical_draws.max() <= 1
    pyramid = Pyramid.build(world.scenes.pictures([0]), oversampling=2.0, smallest=0.07)
    torch.testing.assert_close(posterior.patch, pyramid.extract(posterior.mean_gaze[:, None])[:, 0])


def refused(
    world: World, message: str, pictures: Any = None, model: AttentionModel | None = None, **options: Any
) -> None:
    """Attending raises an `InputError`, also where no shape checker has looked first: as users run it."""
    given = world.scenes if pictures is None else pictures
    with pytest.raises(InputError, match=message):
        next(inspect.unwrap(attend_batches)(model or world.model, world.guide, given, **options))


def test_arguments_that_do_not_fit_are_refused_by_name(world: World) -> None:
    refused(world, "no pictures", [])
    refused(world, r"start has shape \(2, 4\): needed is one gaze a picture, \(3, 4\)", start=world.start[:2])
    refused(world, r"start has shape \(3, 3\)", start=world.start[:, :3])
    refused(world, "not finite or of scale 0", start=world.start * math.nan)
    refused(world, "not finite or of scale 0", start=world.start * torch.tensor([0.0, 0.0, 1.0, 1.0]))
    refused(world, r"canonical has shape \(1, 24, 24\): needed .* \(3, 24, 24\)", canonical=torch.rand(1, 24, 24))
    refused(world, "canonical holds values that are not finite", canonical=torch.full((3, 24, 24), math.nan))
    refused(world, r"canonical holds .* outside \[0, 1\]", canonical=255 * torch.rand(3, 24, 24))
    far = world.start + torch.tensor([0.0, 0.0, 1e4, 0.0])
    refused(world, "start of first: .* nowhere near the picture", start=far)
    refused(world, "start is a str", start="here")
    refused(world, "draws=8.0: a whole number", draws=8.0)
    refused(world, "seed=None: a whole number", seed=None)
    refused(world, "pictures is a str", "a.jpg")
    refused(world, "pictures is a generator", (p for p in [torch.rand(40, 40)]))
    refused(world, "max_objects=2 from a given start", start=world.start, max_objects=2)
    refused(world, "kernel='gibbs': one of 'batched', 'hmc', 'nuts'", kernel="gibbs")
    for name, value in (
        ("chains", 0),
        ("draws", 0),
        ("warmup", -1),
        ("modes", 0),
        ("guide_steps", -1),
        ("batch", 0),
        ("max_objects", 0),
    ):
        refused(world, f"{name}={value}", **{name: value})


def test_pictures_that_are_none_are_refused_by_number(world: World) -> None:
    good = torch.rand(40, 40)
    bad = good.clone()
    bad[3, 4] = math.nan
    refused(world, "picture 1 has pixels that are not finite", [good, bad])
    refused(world, r"picture 1 has shape \(3, 40, 40\): needed is \(height, width\)", [good, good.expand(3, 40, 40)])
    refused(world, r"picture 0 has shape \(1, 1\)", [good[:1, :1]])


def test_a_model_without_clutter_is_refused_with_the_reason(world: World) -> None:
    bare = make_model(clutter=False)
    refused(world, "attending needs a clutter model", model=bare)
    # With v given the paper's likelihood can be followed; that is allowed.
    v = pattern(0).float().expand(1, 24, 24)
    attend(bare, world.guide, world.scenes[:1], start=world.start[:1], canonical=v, **SHORT)


def test_drawn_canonical_images_carry_the_light_of_their_patch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw that equals what is observed comes back as the patch, and the noise is that of the Pyro program, σ √T."""
    pyramid = Pyramid.build(world.scenes.pictures())
    gaze = world.start[:, None, None]
    given: list[float] = []

    def observed(dbn: Any, seen: torch.Tensor, noise: float, *rest: Any) -> torch.Tensor:
        given.append(noise)
        return seen

    monkeypatch.setattr(type(world.model.dbn), "gibbs_canonical", observed)
    monkeypatch.setattr(world.model, "temperature", 16.0)
    streams = torch.arange(len(pyramid))[:, None]
    drawn = attending.canonical_draws(world.model, pyramid, gaze, None, 0, streams)
    patch = pyramid.extract(gaze).float()
    # float32, there and back.
    torch.testing.assert_close(drawn, patch.clamp(0, 1), rtol=0, atol=1e-5)
    assert set(given) == {4 * world.model.noise}


def test_pictures_of_eight_bits_are_divided_by_255_and_other_scales_are_refused(world: World) -> None:
    picture = (255 * world.scenes.pictures([0])[0].clamp(0, 1)).to(torch.uint8)
    bytes_read, _ = attending._read([picture], range(1), torch.device("cpu"))
    floats_read, _ = attending._read([picture.float() / 255], range(1), torch.device("cpu"))
    assert torch.equal(bytes_read.texels, floats_read.texels)
    with pytest.raises(InputError, match=r"picture 0 has values from .* to \d+: scale them to \[0, 1\]"):
        attending._read([picture.float()], range(1), torch.device("cpu"))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["hmc", "person", "prior"])
def test_nothing_changes_where_the_caller_has_switched_derivatives_off(
    world: World, acquainted: AttentionModel, context: Any, how: str
) -> None:
    model, options = world.model, SHORT | {"draws": 4, "warmup": 2, "start": world.start}
    if how == "hmc":
        options |= {"kernel": "hmc", "chains": 1}
    elif how == "person":
        model, options = acquainted, options | {"canonical": torch.stack([pattern(0).float()] * len(world.scenes))}
    else:
        model = copy.deepcopy(model)
        model.__class__ = type("Own", (AttentionModel,), {"prior": _own_prior})
    expected = attend(model, world.guide, world.scenes, **options)
    with context():
        options = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
        found = attend(model, world.guide, world.scenes, **options)
    assert torch.equal(found.gaze, expected.gaze)


class _Steeper(gazes.GazePrior):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 20 * gazes.parts(value).rotation ** 2


def _own_prior(self: AttentionModel, size: Tensor) -> gazes.GazePrior:
    return _Steeper(size)


def test_a_double_diagonal_net_can_be_attended_with(world: World) -> None:
    double = copy.deepcopy(world.model).double()
    options = SHORT | {"draws": 2, "warmup": 2, "start": world.start}
    found = attend(double, world.guide, world.scenes, **options)
    assert found.canonical.dtype == torch.float32
    assert bool(torch.isfinite(found.canonical).all())


def test_presence_counts_every_mode_and_canonical_images_are_spread_over_the_draws(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(model: Any, guide: Any, pyramid: Pyramid, **options: Any) -> Candidates:
        at = torch.stack([world.start[:1], world.start[:1] + 50.0], 1)
        weight = torch.tensor([[0.3, -0.4]]).double()
        return Candidates(at, torch.ones(1, 2, 4).double(), torch.zeros(1, 2, 3).double(), weight, at[:, :, None])

    seen: list[Tensor] = []
    proper = attending.canonical_draws

    def watched(model: Any, pyramid: Any, gaze: Tensor, *rest: Any) -> Any:
        seen.append(gaze)
        return proper(model, pyramid, gaze, *rest)

    monkeypatch.setattr(attending, "search", two)
    monkeypatch.setattr(attending, "canonical_draws", watched)
    found = attend(world.model, world.guide, world.scenes[:1], **SHORT | {"draws": 20})
    a, b = math.exp(0.3), math.exp(-0.4)
    assert float(found.presence) == pytest.approx((a + b) / (1 + a + b))
    assert found.weights[0].tolist() == pytest.approx([a / (a + b), b / (a + b)])
    # Ten of twenty draws, each the last of its stretch.
    assert torch.equal(seen[0], found.gaze[:, :, 1::2])


def test_the_constant_of_the_evidence_raises_every_mode(world: World) -> None:
    guide = copy.deepcopy(world.guide)
    pyramid = Pyramid.build(world.scenes.pictures([0]))
    before = search(world.model, guide, pyramid, start=world.start[:1], steps=0).log_weight
    guide.evidence[3] += 5.0
    after = search(world.model, guide, pyramid, start=world.start[:1], steps=0).log_weight
    torch.testing.assert_close(after, before + 5.0)


def test_that_it_is_an_object_at_all_does_not_outweigh_whose_it_is(
    acquainted: AttentionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odds(model: Any, pyramid: Any, gaze: Tensor, sd: Tensor, canonical: Tensor | None = None) -> Tensor:
        # Of the person against of anybody: log-ratios of 0 and 3.
        return torch.tensor([[1.0, 4.0]]).double() if canonical is not None else torch.ones(1, 2).double()

    gaze = torch.zeros(1, 2, 4).double()
    found = Candidates(gaze, gaze, gaze[..., :3], torch.tensor([[50.0, 2.0]]).double(), gaze[:, :, None])
    monkeypatch.setattr(attending, "integrated_odds", odds)
    best = attending._of_person(acquainted, Pyramid.build([torch.rand(30, 30)]), found, torch.rand(1, 24, 24), 2)
    # Log-odds of 50 and 2 count as probabilities: log σ(2) + 3 beats log σ(50) + 0.
    assert best.log_weight[0].tolist() == pytest.approx([3 - math.log1p(math.exp(-2.0)), 0.0], abs=1e-12)


def test_widths_of_a_mode_are_in_the_charts_units(world: World) -> None:
    class Sure(GazeGuide):
        def look(self, pyramid: Any, gaze: Tensor, canonical: Any, scene: Any) -> GazeChange:
            log_sd = torch.tensor([0.02, 0.05, 0.2, 0.1]).log().expand(len(gaze), 4)
            return GazeChange(torch.zeros(len(gaze), 4), log_sd, *torch.zeros(2, len(gaze)))

    pyramid = Pyramid.build(world.scenes.pictures([0]))
    found = search(world.model, Sure(4).eval(), pyramid, start=world.start[:1], steps=0)
    # The guide counts in half patches, 12 canonical pixels; the chart's log-scale and radians are in eighths.
    torch.testing.assert_close(found.sd[0, 0], torch.tensor([0.24, 0.6, 1.6, 0.8]).double(), rtol=1e-6, atol=0)


def test_the_most_promising_proposals_are_followed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    logit = torch.tensor([3.0, -1, 9, 2, 8, 0, 7, 1, 6, -2, 5, 4])
    monkeypatch.setattr(GazeGuide, "recognise", lambda *given, **options: logit)
    gaze = world.start[:1, None].repeat(1, 12, 1).float()
    gaze[0, :, 2] += torch.arange(12.0)
    proposed = torch.zeros(1, 12)
    proposed[0, 4] = -math.inf  # was not found at all
    pyramid = Pyramid.build(world.scenes.pictures([0]))
    kept, _ = attending._promising(world.model, world.guide, pyramid, Proposals(gaze, proposed))
    assert kept.logit[0].tolist() == [9, 7, 6, 5, 4, 3]
    assert torch.equal(kept.gaze[0, :, 2], gaze.double()[0, [2, 6, 8, 10, 11, 0], 2])


def test_every_candidate_has_the_width_that_the_guide_saw_there(world: World) -> None:
    class Telling(GazeGuide):
        """Leads one and a half half-patches on, and says by its sds where it has looked."""

        def look(self, pyramid: Any, gaze: Tensor, canonical: Any, scene: Any) -> GazeChange:
            mean = torch.tensor([1.5, 0.0, 0.0, 0.0]).expand(len(gaze), 4)
            log_sd = (math.log(0.05) + 0.005 * gaze[:, 2:3].float()).expand(-1, 4)
            return GazeChange(mean, log_sd, *torch.zeros(2, len(gaze)))

    torch.manual_seed(0)
    found = search(world.model, Telling(4).eval(), Pyramid.build(world.scenes.pictures()), steps=2, modes=6)
    there = torch.isfinite(found.log_weight)
    assert int(there.sum()) > 6
    # Half patches are 12 canonical pixels; float32 within.
    expected = 12 * 0.05 * torch.exp(0.005 * found.gaze[..., 2])
    torch.testing.assert_close(found.sd[..., 0][there], expected[there], rtol=1e-5, atol=0)


def test_a_draw_of_v_is_given_the_states_that_were_drawn_for_the_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: list[Tensor] = []
    canonical: list[Tensor] = []

    def gibbs_hidden(self: Any, v: Tensor, h: Tensor, generator: Any, update: str) -> Tensor:
        assert not canonical or v is canonical[-1]
        hidden.append(torch.full_like(h, float(len(hidden))))
        return hidden[-1]

    def gibbs_canonical(self: Any, seen: Tensor, noise: float, v: Tensor, h: Tensor, generator: Any) -> Tensor:
        # A likelihood to the power 1 / T.
        assert noise == pytest.approx(NOISE * math.sqrt(TEMPERATURE))
        assert torch.equal(h, hidden[-1])
        canonical.append(v + 1.0)
        return canonical[-1]

    monkeypatch.setattr(DeepBeliefNet, "gibbs_hidden", gibbs_hidden)
    monkeypatch.setattr(DeepBeliefNet, "gibbs_canonical", gibbs_canonical)
    pyramid = Pyramid.build(world.scenes.pictures([0]))
    attending.canonical_draws(world.model, pyramid, world.start[:1, None, None], None, 0, torch.zeros(1, 1).long())
    assert len(canonical) == 3 and len(hidden) == 4
