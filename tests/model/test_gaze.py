"""Gaze algebra by its laws, overlap against exact areas, charts against autograd, priors against quadrature."""

import math
from collections.abc import Callable

import numpy as np
import pyro.distributions
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from foveate.model import gaze as gazes
from foveate.model.errors import InputError

# Laws of the algebra hold to a few roundings of float64, relative to the largest number in the chain.
ROUNDING = 1e-11

# The same examples on every run: a law that fails, fails for everybody.
LAWS = settings(max_examples=50, deadline=None, derandomize=True)

COORDINATE = st.floats(-500, 500)
SCALE = st.floats(0.05, 40)
ROTATION = st.floats(-3.1, 3.1)


@st.composite
def any_gaze(draw: st.DrawFn) -> Tensor:
    centre = torch.tensor([draw(COORDINATE), draw(COORDINATE)], dtype=torch.float64)
    scale, rotation = torch.tensor([draw(SCALE), draw(ROTATION)], dtype=torch.float64)
    return gazes.from_parts(centre, scale, rotation)


@st.composite
def any_point(draw: st.DrawFn) -> Tensor:
    return torch.tensor([draw(st.floats(-100, 100)), draw(st.floats(-100, 100))], dtype=torch.float64)


def some_gazes(n: int, seed: int = 0, spread: float = 50.0, log_scale: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return gazes.from_parts(spread * normal(n, 2), torch.exp(log_scale * normal(n)), 2 * normal(n))


def close(found: Tensor, wanted: Tensor, scale: Tensor | float = 1.0) -> bool:
    return bool(((found - wanted).abs() <= ROUNDING * (1 + torch.as_tensor(scale))).all())


# ---- algebra


@given(any_gaze(), any_gaze(), any_gaze())
@LAWS
def test_composition_is_associative(g: Tensor, h: Tensor, k: Tensor) -> None:
    left, right = gazes.compose(gazes.compose(g, h), k), gazes.compose(g, gazes.compose(h, k))
    assert close(left, right, 1e6)  # 500 px times two scales of 40


@given(any_gaze())
@LAWS
def test_a_gaze_and_its_inverse_compose_to_the_identity_both_ways(g: Tensor) -> None:
    one = gazes.identity(torch.float64)
    assert close(gazes.compose(g, gazes.inverse(g)), one, 1e3)
    assert close(gazes.compose(gazes.inverse(g), g), one, 1e4)  # 500 px divided by a scale of 0.05


@given(any_gaze())
@LAWS
def test_the_identity_changes_nothing_on_either_side(g: Tensor) -> None:
    one = gazes.identity(torch.float64)
    torch.testing.assert_close(gazes.compose(g, one), g, rtol=0, atol=0)
    torch.testing.assert_close(gazes.compose(one, g), g, rtol=0, atol=0)


@given(any_gaze(), any_gaze(), any_point())
@LAWS
def test_a_composition_acts_as_one_gaze_after_the_other(g: Tensor, h: Tensor, p: Tensor) -> None:
    assert close(gazes.apply(gazes.compose(g, h), p), gazes.apply(g, gazes.apply(h, p)), 1e6)


@given(any_gaze(), any_point())
@LAWS
def test_the_inverse_brings_every_point_back(g: Tensor, p: Tensor) -> None:
    assert close(gazes.apply(gazes.inverse(g), gazes.apply(g, p)), p, 1e5)


@given(any_gaze())
@LAWS
def test_a_gaze_taken_apart_and_put_together_is_the_same_gaze(g: Tensor) -> None:
    centre, scale, rotation = gazes.parts(g)
    assert close(gazes.from_parts(centre, scale, rotation), g, 40)


def test_a_gaze_maps_points_as_its_matrix_does() -> None:
    a, b, tx, ty = 1.5, -0.4, 30.0, 12.0
    point = torch.tensor([2.0, -7.0], dtype=torch.float64)
    wanted = torch.tensor([[a, -b], [b, a]], dtype=torch.float64) @ point + torch.tensor([tx, ty], dtype=torch.float64)
    found = gazes.apply(torch.tensor([a, b, tx, ty], dtype=torch.float64), point)
    torch.testing.assert_close(found, wanted)


def test_rotation_turns_the_x_axis_towards_the_y_axis() -> None:
    quarter = gazes.from_parts(torch.zeros(2), torch.tensor(2.0), torch.tensor(math.pi / 2))
    # float32 cosine of π/2
    torch.testing.assert_close(
        gazes.apply(quarter, torch.tensor([1.0, 0.0])), torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("function", [gazes.compose, gazes.overlap])
def test_functions_of_two_gazes_broadcast_leading_dimensions(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    g, h = some_gazes(3)[:, None], some_gazes(5, 1)
    both = function(g, h)
    each = torch.stack([torch.stack([function(g[i, 0], h[j]) for j in range(5)]) for i in range(3)])
    torch.testing.assert_close(both, each)


def test_parts_broadcast_into_gazes() -> None:
    grid = gazes.from_parts(torch.zeros(2), torch.tensor([1.0, 2.0])[:, None], torch.tensor([0.0, 0.1, 0.2]))
    assert grid.shape == (2, 3, 4)


# ---- landmarks, lattices, corners


def test_landmarks_that_a_gaze_made_give_the_gaze_back() -> None:
    g = some_gazes(20)
    eyes_and_mouth = gazes.apply(g[:, None], torch.tensor([[-5.0, -3.0], [5.0, -3.0], [0.0, 7.0]], dtype=torch.float64))
    found = gazes.from_landmarks(*eyes_and_mouth.unbind(1))
    torch.testing.assert_close(found, g, rtol=0, atol=1e-11)  # float64 at 200 px


def test_landmarks_of_no_similarity_give_the_least_squares_gaze() -> None:
    canonical = [(-5.0, -3.0), (5.0, -3.0), (0.0, 7.0)]
    rows = np.concatenate([[[x, -y, 1, 0], [y, x, 0, 1]] for x, y in canonical])
    points = np.random.default_rng(0).uniform(-100, 100, (10, 3, 2))
    found = gazes.from_landmarks(*torch.from_numpy(points).unbind(1))
    for one, p in zip(found, points, strict=True):
        np.testing.assert_allclose(one.numpy(), np.linalg.lstsq(rows, p.ravel(), rcond=None)[0], atol=1e-11)  # float64


def test_the_patch_lattice_reaches_from_minus_to_plus_eleven_and_a_half() -> None:
    points = gazes.lattice()
    assert points.shape == (24, 24, 2)
    torch.testing.assert_close(points[0, 0], torch.tensor([-11.5, -11.5]))
    torch.testing.assert_close(points[3, -1], torch.tensor([11.5, -8.5]))


@pytest.mark.parametrize(("size", "extent"), [(48, 3.0), ((8, 12), 2.0), (1, 1.0)])
def test_a_lattice_is_centred_and_even_and_fills_its_extent(size: int | tuple[int, int], extent: float) -> None:
    points = gazes.lattice(size, extent, torch.float64)
    rows, columns = (size, size) if isinstance(size, int) else size
    step = 24 * extent / columns
    torch.testing.assert_close(points.mean((0, 1)), torch.zeros(2, dtype=torch.float64), atol=1e-13, rtol=0)
    wanted = torch.tensor([step * (columns - 1), step * (rows - 1)], dtype=torch.float64)
    torch.testing.assert_close(points[-1, -1] - points[0, 0], wanted)


def test_corners_enclose_the_lattice_clockwise_from_the_top_left() -> None:
    found = gazes.corners(gazes.identity(torch.float64))
    wanted = torch.tensor([[-12.0, -12.0], [12.0, -12.0], [12.0, 12.0], [-12.0, 12.0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gazes.corners(gazes.identity(torch.float64), 3.0), 3 * wanted)


def test_a_centre_is_inside_up_to_half_a_pixel_beyond_the_outermost_pixel_centres() -> None:
    centres = torch.tensor([[-0.5, -0.5], [9.5, 4.5], [-0.6, 0.0], [9.6, 0.0], [0.0, 4.6], [0.0, -0.6]])
    found = gazes.inside(gazes.from_parts(centres, torch.ones(6), torch.zeros(6)), height=5, width=10)
    assert found.tolist() == [True, True, False, False, False, False]


# ---- overlap


def gaze_at(x: float, y: float, scale: float = 1.0, degrees: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    centre = torch.tensor([x, y], dtype=dtype)
    return gazes.from_parts(centre, torch.tensor(scale, dtype=dtype), torch.tensor(math.radians(degrees), dtype=dtype))


# The octagon in which two equal squares overlap at 45° has the area 8 (√2 − 1) of half sides squared.
OCTAGON = 8 * (math.sqrt(2) - 1)


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        (gaze_at(0, 0), 1.0),
        (gaze_at(0, 0, 1, 90), 1.0),
        (gaze_at(12, 0), 1 / 3),
        (gaze_at(12, 12), 1 / 7),
        (gaze_at(24, 0), 0.0),
        (gaze_at(24, 24), 0.0),
        (gaze_at(100, -7, 2, 30), 0.0),
        (gaze_at(1, 2, 0.25, 17), 1 / 16),
        (gaze_at(0, 0, 4, 33), 1 / 16),
        (gaze_at(0, 0, 1, 45), OCTAGON / (8 - OCTAGON)),
        (gaze_at(6, 0, 0.5, 0), 0.25),
        (gaze_at(12, 0, 0.5, 0), 1 / 9),
        # A square on its corner, half of it over the right edge.
        (gaze_at(12, 0, 0.5, 45), 0.5 / 4.5),
    ],
)
def test_overlap_is_the_area_that_geometry_gives(second: Tensor, wanted: float) -> None:
    # 1e-6: corners within 1e-9 of an edge count as on it.
    assert float(gazes.overlap(gaze_at(0, 0), second)) == pytest.approx(wanted, abs=1e-6)


@given(any_gaze(), st.floats(-30, 30), st.floats(-30, 30), st.floats(0.2, 4), st.floats(-3.1, 3.1))
@LAWS
def test_overlap_is_symmetric_bounded_and_the_same_from_anywhere(
    base: Tensor, x: float, y: float, scale: float, angle: float
) -> None:
    here, there = gazes.identity(torch.float64), gaze_at(x, y, scale, math.degrees(angle))
    found = float(gazes.overlap(here, there))
    assert 0 <= found <= min(scale**2, scale**-2) + 1e-6
    assert float(gazes.overlap(there, here)) == pytest.approx(found, abs=1e-6)
    moved = gazes.overlap(gazes.compose(base, here), gazes.compose(base, there))
    assert float(moved) == pytest.approx(found, abs=1e-6)


def test_overlap_agrees_with_counting_random_points() -> None:
    second = gazes.from_parts(
        torch.randn(40, 2, dtype=torch.float64) * 8,
        torch.exp(0.4 * torch.randn(40, dtype=torch.float64)),
        torch.randn(40, dtype=torch.float64),
    )
    n = 200_000
    points = 24 * torch.rand(n, 2, dtype=torch.float64) - 12
    within = (gazes.apply(gazes.inverse(second)[:, None], points).abs() < 12).all(-1).double().mean(1) * 24**2
    counted = within / (24**2 + 24**2 * gazes.parts(second).scale ** 2 - within)
    # A share p of n points has an error sqrt(p(1-p)/n) < 1.1e-3; five of them, and the union is never below the share.
    torch.testing.assert_close(gazes.overlap(gazes.identity(torch.float64), second), counted, rtol=0, atol=6e-3)


def test_overlap_of_small_patches_far_away_survives_single_precision() -> None:
    first, second = gaze_at(4000, 3000, 0.5, 0, torch.float32), gaze_at(4006, 3000, 0.5, 0, torch.float32)
    found = gazes.overlap(first, second)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1 / 3, abs=1e-6)  # these coordinates are exact in float32


# ---- charts

SCALES = [(1.0, 1.0, 0.125, 0.125), (12.0, 12.0, 1.0, 1.0)]


@pytest.mark.parametrize("scales", SCALES)
def test_a_chart_leads_there_and_back(scales: tuple[float, float, float, float]) -> None:
    chart = gazes.LocalChart(some_gazes(6), scales)
    z = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(chart.to_chart(chart.to_gaze(z)), z, rtol=0, atol=1e-10)  # float64 at 200 px


def test_a_chart_has_its_base_at_zero() -> None:
    base = some_gazes(6)
    torch.testing.assert_close(gazes.LocalChart(base).to_gaze(torch.zeros(6, 4, dtype=torch.float64)), base)


@pytest.mark.parametrize("scales", SCALES)
def test_the_log_determinant_of_a_chart_is_that_of_its_jacobian(scales: tuple[float, float, float, float]) -> None:
    base, z = some_gazes(5), torch.randn(5, 4, dtype=torch.float64)
    for one, at in zip(base, z, strict=True):
        chart = gazes.LocalChart(one, scales)
        jacobian = torch.autograd.functional.jacobian(chart.to_gaze, at)
        torch.testing.assert_close(chart.log_det(at), torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-10)


def test_one_base_serves_many_chains() -> None:
    base, z = some_gazes(3)[:, None], torch.randn(3, 5, 4, dtype=torch.float64)
    chart = gazes.LocalChart(base)
    assert chart.to_gaze(z).shape == (3, 5, 4)
    assert chart.log_det(z).shape == (3, 5)
    torch.testing.assert_close(chart.log_det(z)[2, 4], gazes.LocalChart(base[2, 0]).log_det(z[2, 4]))


def test_two_charts_give_the_same_posterior() -> None:
    """Densities over two charts of one posterior differ by the Jacobian of the step between them, and nothing else."""
    prior = gazes.GazePrior(torch.tensor([240.0, 320.0], dtype=torch.float64))
    here = gazes.LocalChart(gaze_at(100, 90, 3.0, 8.0))
    there = gazes.LocalChart(gaze_at(112, 80, 2.2, -5.0), (12.0, 12.0, 1.0, 1.0))

    def log_density(chart: gazes.LocalChart, z: Tensor) -> Tensor:
        g = chart.to_gaze(z)
        likelihood = -0.5 * ((g - here.base) / torch.tensor([0.3, 0.2, 5.0, 4.0], dtype=torch.float64)).square().sum(-1)
        return prior.log_prob(g) + likelihood + chart.log_det(z)

    def step(z: Tensor) -> Tensor:
        return there.to_chart(here.to_gaze(z))

    for z in torch.randn(8, 4, dtype=torch.float64) * 0.7:
        jacobian = torch.autograd.functional.jacobian(step, z)
        wanted = log_density(there, step(z)) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_density(here, z), wanted, rtol=0, atol=1e-9)  # float64 sums of about 20


def test_two_charts_give_the_same_expectations_by_quadrature() -> None:
    """∫ x p(z) dz of a posterior over scale and rotation is one number, whichever chart the sum runs in."""
    prior = gazes.GazePrior(torch.tensor([240.0, 320.0], dtype=torch.float64))
    target = gaze_at(100, 90, 3.0, 8.0)

    def expectation(chart: gazes.LocalChart, low: float, high: float) -> Tensor:
        steps = torch.linspace(low, high, 401, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        z = torch.cat([torch.zeros_like(grid), grid], -1)
        g = chart.to_gaze(z)
        log_density = prior.log_prob(g) - 0.5 * ((g[..., :2] - target[:2]) / 0.2).square().sum(-1) + chart.log_det(z)
        weight = torch.softmax(log_density.flatten(), 0)
        return (weight[:, None] * g[..., :2].flatten(0, 1)).sum(0)

    first = expectation(gazes.LocalChart(gaze_at(100, 90, 3.2, 4.0)), -5.0, 5.0)
    second = expectation(gazes.LocalChart(gaze_at(100, 90, 2.5, -3.0), (12.0, 12.0, 1.0, 1.0)), -0.6, 1.0)
    # Sums over smooth densities that have died out at the ends converge geometrically: the two agree to rounding.
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


# ---- priors

SIZE = torch.tensor([120.0, 200.0], dtype=torch.float64)


def test_the_density_of_the_position_integrates_to_one_and_is_uniform_inside() -> None:
    prior = gazes.GazePrior(SIZE)
    other = prior.log_prob(gaze_at(100, 60, 1.5))

    def over_position(x: float, y: float) -> float:
        return math.exp(float(prior.log_prob(gaze_at(x, y, 1.5)) - other))

    along_x, _ = integrate.quad(lambda x: over_position(x, 60), -150, 350, points=[0, 200], limit=200)
    along_y, _ = integrate.quad(lambda y: over_position(100, y), -150, 270, points=[0, 120], limit=200)
    # The density is a product; at the middle each factor is 1/extent up to the logistic's own tail there.
    middle_x, middle_y = 1 - 2 / (1 + math.exp(100 / 6)), 1 - 2 / (1 + math.exp(60 / 6))
    assert along_x * middle_x == pytest.approx(200, rel=1e-5)
    assert along_y * middle_y == pytest.approx(120, rel=1e-4)


def test_the_density_over_a_and_b_integrates_to_one() -> None:
    prior = gazes.GazePrior(SIZE, typical=0.4, log_scale_sd=0.5, rotation_sd=1.2)
    log_scale = torch.linspace(math.log(2.0) - 5, math.log(2.0) + 5, 801, dtype=torch.float64)
    angle = torch.linspace(-math.pi, math.pi, 801, dtype=torch.float64)
    scale = torch.exp(log_scale)[:, None]
    density = torch.exp(prior.log_prob(gazes.from_parts(SIZE.flip(0) / 2, scale, angle)))
    # da db = s² dlog s dθ; a periodic trapezoid in the angle, one that has died out in the log-scale.
    mass = (density * scale**2)[:, :-1].sum() * (log_scale[1] - log_scale[0]) * (angle[1] - angle[0])
    # The position is one factor, 1/(extent x · extent y) in the middle up to exp(-10) of tail.
    assert float(mass) * 120 * 200 == pytest.approx(1, rel=2e-4)


def test_log_scale_is_normal_and_rotation_a_wrapped_normal() -> None:
    prior = gazes.GazePrior(SIZE, typical=0.4, log_scale_sd=0.5, rotation_sd=1.2)

    def of_scale(s: float) -> float:
        return float(prior.log_prob(gaze_at(100, 60, s))) + 2 * math.log(s)

    def of_angle(angle: float) -> float:
        return float(prior.log_prob(gaze_at(100, 60, 1.0, math.degrees(angle))))

    def wrapped(angle: float) -> float:
        return math.log(sum(stats.norm(0, 1.2).pdf(angle + 2 * math.pi * k) for k in range(-6, 7)))

    normal = stats.norm(math.log(0.4 * 120 / 24), 0.5)
    for s in (0.3, 1.0, 5.0):
        assert of_scale(s) - of_scale(2.0) == pytest.approx(normal.logpdf(math.log(s)) - normal.logpdf(math.log(2.0)))
    for angle in (-3.0, -1.0, 0.5, 2.9):
        # Turns beyond the second of a sd of 1.2 weigh below exp(-17).
        assert of_angle(angle) - of_angle(0.0) == pytest.approx(wrapped(angle) - wrapped(0.0), abs=1e-6)


def test_sizes_in_whole_pixels_are_sizes_and_settings_are_positive() -> None:
    whole = torch.tensor([[60, 80], [300, 200]])
    for kind in (gazes.GazePrior, gazes.FlatGazePrior):
        drawn = kind(whole).sample(torch.Size([5]))
        assert drawn.shape == (5, 2, 4) and drawn.is_floating_point()
        assert torch.equal(kind(whole).log_prob(drawn), kind(whole.float()).log_prob(drawn))
    for wrong in ({"typical": -0.3}, {"log_scale_sd": 0.0}, {"edge": math.nan}):
        with pytest.raises(InputError, match="a positive number is needed"):
            gazes.GazePrior(whole, **wrong)
    with pytest.raises(InputError, match="largest=-1"):
        gazes.FlatGazePrior(whole, largest=-1.0)


def test_a_rotation_wider_than_a_half_turn_is_refused() -> None:
    size = torch.tensor([60.0, 80.0], dtype=torch.float64)
    with pytest.raises(InputError, match="at most π"):
        gazes.GazePrior(size, rotation_sd=3.2)
    # The widest that is taken still integrates to one over the angle, by the rule of 720 points (exact to rounding).
    angle = torch.arange(720, dtype=torch.float64) * math.tau / 720
    log_prob = {}
    for sd in (0.25, math.pi):
        prior = gazes.GazePrior(size, rotation_sd=sd)
        at = gazes.from_parts(torch.tensor([40.0, 30.0]).double().expand(720, 2), torch.ones(720).double(), angle)
        log_prob[sd] = prior.log_prob(at).exp().sum()
    assert float(log_prob[math.pi] / log_prob[0.25]) == pytest.approx(1.0, abs=1e-5)


def test_samples_of_the_prior_have_its_density() -> None:
    prior = gazes.GazePrior(SIZE, edge=0.1)
    n = 20_000
    centre, scale, rotation = gazes.parts(prior.sample(torch.Size([n])))
    logistic = 0.1 * 120

    def position(extent: float):
        def cdf(x: np.ndarray) -> np.ndarray:
            # The integral of σ((x + ½)/w) − σ((x + ½ − extent)/w), over the extent.
            low, high = (x + 0.5) / logistic, (x + 0.5 - extent) / logistic
            return logistic * (np.logaddexp(0, low) - np.logaddexp(0, high)) / extent

        return cdf

    for sample, law in (
        (centre[:, 0], position(200.0)),
        (centre[:, 1], position(120.0)),
        (torch.log(scale), stats.norm(math.log(0.3 * 120 / 24), 0.6).cdf),
        (rotation, stats.norm(0, 0.25).cdf),  # a sd of 0.25 wraps once in 10³⁴ draws
    ):
        assert stats.kstest(sample.numpy(), law).pvalue > 1e-3  # one fixed seed


def test_log_densities_of_samples_have_the_entropy_as_their_mean() -> None:
    prior = gazes.GazePrior(SIZE, edge=0.01)
    draws = prior.sample(torch.Size([20_000]))
    found = -prior.log_prob(draws)
    of_log_scale, of_rotation = (0.5 * math.log(2 * math.pi * math.e) + math.log(sd) for sd in (0.6, 0.25))
    # Over (a, b): the entropy in (log s, θ) plus E[2 log s]; the edges add to the uniform's entropy 1.65 w/extent each.
    wanted = math.log(200 * 120) + of_log_scale + of_rotation + 2 * math.log(0.3 * 120 / 24)
    edges = math.pi**2 / 6 * 1.2 * (1 / 200 + 1 / 120)
    error = float(found.std()) / math.sqrt(20_000)
    assert float(found.mean()) == pytest.approx(wanted + edges, abs=4 * error)


def test_the_prior_keeps_its_slope_far_outside_the_picture() -> None:
    prior = gazes.GazePrior(SIZE.float())
    far = torch.tensor([1.5, 0.0, 5000.0, -4000.0], requires_grad=True)
    (slope,) = torch.autograd.grad(prior.log_prob(far), far)
    # One logistic width is 6 px, and the logistic's log density falls by one per width.
    torch.testing.assert_close(slope[2:], torch.tensor([-1 / 6, 1 / 6]), atol=1e-5, rtol=0)


def test_the_flat_prior_is_uniform_over_its_box_and_nothing_elsewhere() -> None:
    prior = gazes.FlatGazePrior(SIZE, largest=1.2)
    half = 1.2 * 120 / 24
    volume = (2 * half) ** 2 * 200 * 120
    draws = prior.sample(torch.Size([5000]))
    assert prior.support.check(draws).all()
    torch.testing.assert_close(prior.log_prob(draws), torch.full((5000,), -math.log(volume), dtype=torch.float64))
    outside = torch.tensor([[half + 0.1, 0, 50, 50], [0, 0, -0.6, 50], [1, 0, 50, 119.6]], dtype=torch.float64)
    assert torch.isneginf(prior.log_prob(outside)).all()
    low = torch.tensor([-half, -half, -0.5, -0.5], dtype=torch.float64)
    high = torch.tensor([half, half, 199.5, 119.5], dtype=torch.float64)
    for sample in ((draws - low) / (high - low)).unbind(-1):
        assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3  # one fixed seed


@pytest.mark.parametrize("kind", [gazes.GazePrior, gazes.FlatGazePrior])
def test_a_prior_takes_pictures_of_many_sizes_and_expands(kind: type) -> None:
    sizes = torch.tensor([[120.0, 200.0], [60.0, 50.0]])
    prior = kind(sizes)
    assert (prior.batch_shape, prior.event_shape) == ((2,), (4,))
    draws = prior.sample(torch.Size([7]))
    assert draws.shape == (7, 2, 4) and draws.dtype == torch.float32
    each = torch.stack([kind(size).log_prob(draws[:, i]) for i, size in enumerate(sizes)], 1)
    torch.testing.assert_close(prior.log_prob(draws), each)
    wide = prior.expand([3, 2])
    assert wide.batch_shape == (3, 2) and wide.sample().shape == (3, 2, 4)
    torch.testing.assert_close(wide.log_prob(draws[:3]), prior.log_prob(draws[:3]))


def test_the_settings_of_a_prior_survive_its_expansion() -> None:
    draws = gazes.GazePrior(SIZE).sample(torch.Size([4]))
    prior = gazes.GazePrior(SIZE, 0.2, 0.4, 0.5, 0.01)
    torch.testing.assert_close(prior.expand([4]).log_prob(draws), prior.log_prob(draws))
    flat = gazes.FlatGazePrior(SIZE, 0.7)
    torch.testing.assert_close(flat.expand([4]).log_prob(draws), flat.log_prob(draws))


def test_a_priors_settings_may_be_learned_and_be_others_for_every_picture() -> None:
    """Slopes by the settings are those of central differences, and settings of two pictures are those of each alone."""
    size = torch.tensor([240.0, 320.0], dtype=torch.float64)
    value = torch.tensor([3.0, 0.4, 100.0, 90.0], dtype=torch.float64)
    settings = {"typical": 0.3, "log_scale_sd": 0.6, "rotation_sd": 0.25, "edge": 0.05}

    def density(name: str, setting: float | Tensor) -> Tensor:
        return gazes.GazePrior(size, **settings | {name: setting}).log_prob(value)

    for name, setting in settings.items():
        learned = torch.tensor(setting, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(density(name, learned), learned)
        step = 1e-5
        between = (density(name, setting + step) - density(name, setting - step)) / (2 * step)
        torch.testing.assert_close(slope, between, rtol=1e-5, atol=1e-5)  # curvature × step², relative to slopes of 1
        two = torch.tensor([setting, setting / 2], dtype=torch.float64)
        both = gazes.GazePrior(size.expand(2, 2), **settings | {name: two}).log_prob(value.expand(2, 4))
        torch.testing.assert_close(both, torch.stack([density(name, setting), density(name, setting / 2)]))
    with pytest.raises(InputError, match="rotation_sd"):
        gazes.GazePrior(size.expand(2, 2), rotation_sd=torch.tensor([0.3, 4.0]))


def test_a_prior_that_pytorch_cannot_map_to_its_support_is_scored_within_it() -> None:
    """A mixture's support has no `biject_to`; where all gazes lie within nothing has to be mapped."""
    part = pyro.distributions.Normal(torch.zeros(2, 4), torch.tensor([[1.0], [2.0]])).to_event(1)
    mixture = pyro.distributions.MixtureSameFamily(pyro.distributions.Categorical(torch.ones(2)), part)
    value = torch.randn(5, 4)
    assert torch.equal(gazes.log_prior(mixture, value), mixture.log_prob(value))
