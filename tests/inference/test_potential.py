"""The fused energy of a gaze equals its definition and autograd, bit for bit alone and in a batch, edges included."""

import math

import arviz
import numpy as np
import pytest
import torch
from pyro.distributions import Normal, Uniform
from scipy.interpolate import CubicSpline
from torch import Tensor

from foveate.inference.hmc import sample_batch
from foveate.inference.potential import CanonicalDensity, GazePotential, OddsScore, PatchScore, QuadraticScore
from foveate.model import gaze as gazes
from foveate.model.density import EllipticalDensity
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.gaze import FlatGazePrior, GazePrior, LocalChart, parts
from foveate.model.patch import Pyramid, disc

SIZES = [(60, 90), (128, 70), (41, 200)]


def smooth_pictures(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Pictures of different sizes: a few waves each, so that neighbouring pixels agree as in photographs."""
    generator = torch.Generator().manual_seed(3)
    pictures = []
    for height, width in SIZES:
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
        )
        picture = torch.zeros(height, width, dtype=torch.float64)
        for _ in range(12):
            fx, fy, phase = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            picture += torch.sin(0.5 * (fx - 0.5) * x + 0.5 * (fy - 0.5) * y + 6.28 * phase)
        pictures.append(((picture - picture.min()) / (picture.max() - picture.min())).to(dtype))
    return pictures


def base_gazes(dtype: torch.dtype = torch.float64) -> Tensor:
    """A gaze near the middle of each picture, at scales 0.7 (level 0), 2.1 and 1.3: (scene, 1, 4)."""
    centre = torch.tensor([[width / 2, height / 2] for height, width in SIZES], dtype=dtype)
    scale, rotation = torch.tensor([0.7, 2.1, 1.3], dtype=dtype), torch.tensor([0.1, -0.4, 0.2], dtype=dtype)
    return gazes.from_parts(centre, scale, rotation)[:, None]


def odds_score(dtype: torch.dtype = torch.float64, nu: float = 8.0) -> OddsScore:
    generator = torch.Generator().manual_seed(9)
    densities = []
    for spread in (0.6, 1.0):
        factor = torch.randn(575, 40, generator=generator, dtype=torch.float64) * spread
        covariance = factor @ factor.T / 40 + 0.5 * torch.eye(575, dtype=torch.float64)
        mean = 0.3 * torch.randn(575, generator=generator, dtype=torch.float64)
        densities.append(EllipticalDensity(mean.to(dtype), covariance.to(dtype), nu))
    return OddsScore(*densities, temperature=3.0)


def within_a_disc(dtype: torch.dtype, nu: float) -> OddsScore:
    whole, basis = odds_score(dtype, nu), disc(6.0)
    densities = [part.within(basis) for part in (whole.object, whole.clutter) if isinstance(part, EllipticalDensity)]
    return OddsScore(*densities, temperature=3.0)


def edged_score(dtype: torch.dtype = torch.float64) -> OddsScore:
    random = torch.randn(968, 34, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)
    edges = EdgeOdds(random[:, 0], random[0, 0], random[:, 1:], 0.1 * random[1, 1:])
    pixels = odds_score(dtype)
    return OddsScore(pixels.object, pixels.clutter, 3.0, edges=edges)


def scores(dtype: torch.dtype = torch.float64) -> dict[str, PatchScore]:
    generator = torch.Generator().manual_seed(4)
    target = torch.rand(3, 5, 24, 24, generator=generator, dtype=torch.float64).to(dtype)
    sigma = (0.05 + 0.2 * torch.rand(24, 24, generator=generator, dtype=torch.float64)).to(dtype)
    canonical = torch.randn(3, 5, 575, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "quadratic": QuadraticScore(target, sigma),
        "quadratic, a target per scene": QuadraticScore(target[:, 0], 0.1),
        "quadratic, one target": QuadraticScore(target[0, 0], 0.1),
        "odds": odds_score(dtype),
        "gaussian odds": odds_score(dtype, math.inf),
        "odds with edges": edged_score(dtype),
        "odds within a disc": within_a_disc(dtype, 8.0),
        "gaussian odds within a disc": within_a_disc(dtype, math.inf),
        "odds of given images": OddsScore(CanonicalDensity(canonical, 0.7), odds_score(dtype).clutter, 0.2),
        "paper": OddsScore(CanonicalDensity(canonical[:, 0], 0.7), None),
    }


def potential(
    name: str, prior: str = "proper", dtype: torch.dtype = torch.float64, oversampling: float | None = 2.0
) -> GazePotential:
    pyramid = Pyramid.build(smooth_pictures(dtype), oversampling=oversampling)
    size = pyramid.size.to(dtype)
    priors = {"none": None, "proper": GazePrior(size, 0.4, 0.5, 0.3), "flat": FlatGazePrior(size)}
    chart = LocalChart(base_gazes(dtype), (1.0, 0.7, 0.2, 0.1))
    belief = torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    return GazePotential(pyramid, chart, scores(dtype)[name], priors[prior], belief if prior == "proper" else None)


def coordinates(dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    """(scene, 5, 4): the middle of the picture, its border, and beyond."""
    z = spread * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    z[:, 1, :2] += 15.0
    z[:, 2, :2] -= 40.0
    z[:, 3, 2:] -= 6.0
    return z.to(dtype)


def differentiated(function: GazePotential, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_(True)
    energy = function.energy(z)
    (gradient,) = torch.autograd.grad(energy.sum(), z)
    return energy.detach(), gradient


@pytest.mark.parametrize("prior", ["none", "proper", "flat"])
@pytest.mark.parametrize("name", list(scores()))
def test_energy_and_gradient_equal_the_definition_and_autograd(name, prior):
    function, z = potential(name, prior), coordinates()
    energy, gradient = function(z)
    expected, slope = differentiated(function, z)
    inside = torch.isfinite(expected)
    assert torch.equal(inside, torch.isfinite(energy)) and inside.float().mean() > 0.5
    # Rounding of 576 terms in double precision, relative to the largest number involved.
    assert torch.allclose(energy[inside], expected[inside], rtol=1e-10, atol=1e-10)
    assert torch.allclose(gradient[inside], slope[inside], rtol=1e-10, atol=1e-10 * float(slope[inside].abs().max()))
    if isinstance(function.score, OddsScore):
        torch.testing.assert_close(function.energy_of_many(z), expected.detach(), rtol=1e-10, atol=1e-10)


def test_a_prior_with_settings_for_every_scene_scores_each_scene_by_its_own() -> None:
    function, z = potential("odds"), coordinates()
    size, typical = function.pyramid.size.double(), torch.tensor([0.2, 0.4, 0.3], dtype=torch.float64)
    turns = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    every = GazePotential(function.pyramid, function.chart, function.score, GazePrior(size, typical, 0.5, turns))
    found = every(z)
    for i in range(3):
        prior = GazePrior(size, float(typical[i]), 0.5, float(turns[i]))
        alone = GazePotential(function.pyramid, function.chart, function.score, prior)(z)
        inside = torch.isfinite(alone[0][i])
        # One is compiled and one is not: rounding, as above.
        for mine, wanted in zip(found, alone, strict=True):
            assert torch.allclose(mine[i][inside], wanted[i][inside], rtol=1e-10, atol=1e-8)


class Upright(GazePrior):
    """Another density than that of the class it derives from."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 40 * parts(value).rotation.square()


class Box(FlatGazePrior):
    """The same density under another name."""


def test_a_prior_without_a_slope_and_with_an_edge_is_scored_as_it_is():
    function, z = potential("odds", "flat"), coordinates()
    size = function.pyramid.size.double()
    low, high = FlatGazePrior(size)._box()
    expected, slope = function(z)
    for prior in (Box(size), Uniform(low, high).to_event(1)):
        other = GazePotential(function.pyramid, function.chart, function.score, prior)
        energy, gradient = other(z)
        inside = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(energy), inside) and 0.5 < float(inside.double().mean()) < 1
        torch.testing.assert_close(energy[inside], expected[inside], rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(gradient[inside], slope[inside], rtol=1e-9, atol=1e-9 * float(slope.abs().max()))


@pytest.mark.parametrize("kind", ["subclass", "of another family"])
def test_any_other_prior_is_scored_as_it_is(kind):
    function, z = potential("odds"), coordinates()
    size = function.pyramid.size.double()
    middle = torch.cat([torch.tensor([[1.0, 0.0]]).double().expand(3, 2), 0.5 * size.flip(-1)], -1)
    prior = Upright(size, 0.4) if kind == "subclass" else Normal(middle, 3.0).to_event(1)

    def log_prior(gaze: Tensor) -> Tensor:
        if kind == "subclass":
            return Upright(size[:, None], 0.4).log_prob(gaze)
        return torch.distributions.Normal(middle[:, None], 3.0).log_prob(gaze).sum(-1)

    other = GazePotential(function.pyramid, function.chart, function.score, prior)
    without = GazePotential(function.pyramid, function.chart, function.score)
    energy, gradient = other(z)
    gaze = function.chart.to_gaze(z)
    torch.testing.assert_close(energy, without(z)[0] - log_prior(gaze), rtol=1e-10, atol=1e-8)
    expected, slope = differentiated(other, z)
    torch.testing.assert_close(energy, expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))
    # HMC takes its own leapfrog then: the compiled one knows no such prior.
    assert other.trajectory is None and function.trajectory is not None


@pytest.mark.parametrize("name", [name for name, score in scores().items() if isinstance(score, OddsScore)])
def test_energies_of_many_patches_are_the_definition(name):
    score = scores()[name]
    patch = torch.rand(3, 5, 24, 24, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    # Rounding of 576 terms in double precision.
    torch.testing.assert_close(score.energy_of_many(patch), score.energy(patch), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("oversampling", [None, 2.0])
def test_single_precision_comes_close_to_double(oversampling):
    z = coordinates(spread=0.3)[:, :1].expand(3, 5, 4)
    for name in ("quadratic", "odds"):
        energy, gradient = potential(name, oversampling=oversampling)(z)
        single, slope = potential(name, dtype=torch.float32, oversampling=oversampling)(z.float())
        assert single.dtype == slope.dtype == torch.float32
        # Float32 rounding (6e-8) of sums of 576 terms and of pixel coordinates up to 200; the odds also invert a
        # covariance.
        assert torch.allclose(single.double(), energy, rtol=2e-4)
        assert torch.allclose(slope.double(), gradient, rtol=2e-2, atol=2e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["quadratic", "odds", "odds of given images"])
def test_fused_trajectories_equal_leapfrog_on_the_definition(name):
    function, z = potential(name), coordinates(spread=0.3)
    generator = torch.Generator().manual_seed(1)
    momentum = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    steps = torch.randint(1, 9, (3, 5), generator=generator)
    step = 0.002 * (1 + torch.rand(3, 5, 4, generator=generator, dtype=torch.float64))
    gradient = function(z)[1]
    end, speed, energy, slope = function.trajectory(z, momentum, gradient, step, steps)
    for i in range(3):
        for j in range(5):
            at, p, g = z.clone(), momentum.clone(), gradient
            for _ in range(int(steps[i, j])):
                p = p - 0.5 * step * g
                at = at + step * p
                value, g = differentiated(function, at)
                p = p - 0.5 * step * g
            # Eight steps let the rounding of single evaluations (1e-10) grow a little.
            assert torch.allclose(end[i, j], at[i, j], rtol=1e-8, atol=1e-9)
            assert torch.allclose(speed[i, j], p[i, j], rtol=1e-8, atol=1e-8 * float(p.abs().max()))
            assert torch.allclose(energy[i, j], value[i, j], rtol=1e-8)
            assert torch.allclose(slope[i, j], g[i, j], rtol=1e-8, atol=1e-8 * float(g.abs().max()))
    everywhere = function.trajectory(z, momentum, gradient, step, torch.full((3, 5), 4))
    assert all(
        torch.equal(a, b) for a, b in zip(everywhere, function.trajectory(z, momentum, gradient, step, 4), strict=True)
    )


@pytest.mark.parametrize("name", ["quadratic, a target per scene", "odds"])
def test_draws_of_a_scene_are_bit_for_bit_the_same_alone_and_in_a_batch(name):
    whole = potential(name)
    options = {"num_samples": 20, "warmup_steps": 30, "seed": 3}
    start = torch.zeros(3, 2, 4, dtype=torch.float64)
    together, _ = sample_batch(whole, start, streams=[7, 8, 9], **options)
    score = (
        QuadraticScore(whole.score.target[1:2].unflatten(-1, (24, 24)), 0.1)
        if isinstance(whole.score, QuadraticScore)
        else whole.score
    )
    chart = LocalChart(whole.chart.base[1:2], whole.chart.scales)
    single = GazePotential(whole.pyramid[1], chart, score, whole.prior, whole.belief[1:2])
    alone, _ = sample_batch(single, start[1:2], streams=[8], **options)
    assert torch.equal(alone[0], together[1])


def test_threads_do_not_change_the_numbers():
    function, z = potential("quadratic, one target"), coordinates().repeat(1, 4, 1)
    torch.set_num_threads(1)
    alone = function(z)
    torch.set_num_threads(2)
    shared = function(z)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("name", ["quadratic", "odds"])
def test_a_gaze_that_is_no_number_or_out_of_reach_has_infinite_energy_and_harms_nobody(name):
    function, z = potential(name), coordinates()
    clean = function(z)
    z[0, 0, 0], z[1, 1, 2], z[2, 2, 2], z[0, 4, 1] = math.nan, math.inf, -math.inf, 1e30
    energy, gradient = function(z)
    lost = torch.zeros(3, 5, dtype=torch.bool)
    for element in ((0, 0), (1, 1), (2, 2), (0, 4)):
        lost[element] = True
    assert (energy[lost] == math.inf).all()
    assert torch.equal(energy[~lost], clean[0][~lost]) and torch.equal(gradient[~lost], clean[1][~lost])
    end, *_ = function.trajectory(z, torch.ones_like(z), gradient, torch.full_like(z, 1e-3), torch.full((3, 5), 3))
    assert torch.isfinite(end[~lost]).all()


def test_patches_at_the_very_edge_of_small_and_large_scenes_are_read_inside_the_buffer():
    pictures = [
        torch.rand(2, 2, dtype=torch.float64),
        torch.rand(3, 500, dtype=torch.float64),
        torch.rand(130, 2, dtype=torch.float64),
    ]
    pyramid = Pyramid.build(pictures)
    base = torch.tensor([[0.3, 0.0, 0.5, 0.5]], dtype=torch.float64).expand(3, 1, 4)
    function = GazePotential(
        pyramid, LocalChart(base, (1.0, 1.0, 1.0, 1.0)), QuadraticScore(torch.zeros(24, 24, dtype=torch.float64), 1.0)
    )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 200, 4, generator=generator, dtype=torch.float64) * torch.tensor([300.0, 300.0, 3.0, 2.0])
    energy, _ = function(z)
    assert torch.allclose(energy, function.energy(z), rtol=1e-10, atol=1e-10)


def test_the_gaze_posterior_agrees_with_brute_force_quadrature():
    pictures = smooth_pictures()[1:2]
    pyramid = Pyramid.build(pictures)
    base = base_gazes()[1:2]
    target = (
        pyramid.extract(base)[0, 0] + 0.1 * torch.randn(24, 24, generator=torch.Generator().manual_seed(1)).double()
    )
    score, prior = QuadraticScore(target, 0.3), GazePrior(pyramid.size.double(), 0.6)
    # Coordinates scaled by the curvature at the middle, so that a grid of ±5 in each holds the mass.
    plain = GazePotential(pyramid, LocalChart(base, (1.0, 1.0, 0.1, 0.1)), score, prior)
    middle = minimum(plain)
    sd = (
        torch.linalg.inv(torch.autograd.functional.hessian(lambda z: plain.energy(z[None, None])[0, 0], middle))
        .diagonal()
        .sqrt()
    )
    scales = tuple((sd * torch.tensor([1.0, 1.0, 0.1, 0.1])).tolist())
    function = GazePotential(pyramid, LocalChart(plain.chart.to_gaze(middle[None, None]), scales), score, prior)

    axis = torch.linspace(-5, 5, 23, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[axis] * 4, indexing="ij"), -1).reshape(1, -1, 4)
    energy = function(grid)[0].reshape(*[23] * 4)
    weight = torch.exp(energy.min() - energy)
    start = torch.zeros(1, 20, 4, dtype=torch.float64)
    draws, statistics = sample_batch(function, start, num_samples=1000, warmup_steps=200, seed=1)
    assert not statistics.diverging.any()
    for coordinate in range(4):
        assert arviz.ess(draws[0, ..., coordinate].numpy()) > 10_000
        others = [i for i in range(4) if i != coordinate]
        density = CubicSpline(axis.numpy(), weight.sum(others).log().numpy())
        fine = np.linspace(-5, 5, 5001)
        cumulative = np.cumsum(np.exp(density(fine)))
        edges = np.interp(np.arange(1, 20) / 20, cumulative / cumulative[-1], fine)
        counts = np.bincount(np.searchsorted(edges, draws[..., coordinate].flatten().numpy()), minlength=20)
        # 20 bins of equal mass; 1e4 effective draws leave a total variation of about 0.02.
        assert 0.5 * np.abs(counts / counts.sum() - 0.05).sum() < 0.05


def minimum(function: GazePotential) -> Tensor:
    """Where the energy of the only scene is least near z = 0: (4,)."""
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([z], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        energy = function.energy(z[None, None])[0, 0]
        energy.backward()
        return energy

    search.step(closure)
    return z.detach()


@pytest.mark.parametrize("name", ["quadratic", "odds"])
def test_a_pyramid_in_bytes_is_read_as_by_the_definition(name):
    pyramid = Pyramid.build(smooth_pictures(torch.float32)).in_bytes()
    chart = LocalChart(base_gazes(torch.float32))
    function = GazePotential(pyramid, chart, scores(torch.float32)[name], GazePrior(pyramid.size))
    energy, gradient = function(coordinates(torch.float32))
    # The energy of the bytes themselves: the compiled pass and PyTorch's, float32 both.
    wanted, slope = differentiated(function, coordinates(torch.float32))
    torch.testing.assert_close(energy, wanted, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(gradient, slope, rtol=1e-2, atol=0.05 * float(slope.abs().max()))


def test_bad_shapes_and_settings_are_refused():
    function = potential("quadratic")
    with pytest.raises(InputError, match=r"for 3 scenes: needed is \(scene, ..., 4\)"):
        function(torch.zeros(2, 5, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="the first must lead"):
        function(torch.zeros(3, 4, 4, dtype=torch.float64))
    wrong_base = GazePotential(function.pyramid, LocalChart(base_gazes()[:, 0]), function.score)
    with pytest.raises(InputError, match="does not broadcast"):
        wrong_base(torch.zeros(3, 5, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="sigma"):
        QuadraticScore(torch.zeros(24, 24), 0.0)
    with pytest.raises(InputError, match="noise"):
        OddsScore(CanonicalDensity(torch.zeros(575), 0.0), None)
    with pytest.raises(InputError, match="temperature"):
        OddsScore(EllipticalDensity.blank(575), EllipticalDensity.blank(575), 0.0)
