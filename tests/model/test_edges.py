"""Edges as evidence: the odds are those of two normal laws, see the object through light, and are quadratic."""

import pytest
import torch
from scipy.linalg import eigh

from foveate.model import edges as of_edges
from foveate.model.edges import DIRECTIONS, FLOOR, SHRINKAGE, STEADY, EdgeOdds
from foveate.model.errors import InputError
from foveate.model.identity import edges
from foveate.model.patch import density_coordinates, from_density_coordinates


def discs(count: int, seed: int) -> torch.Tensor:
    """Bright soft discs of nearly one size in the middle of a noisy patch."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(24) - 11.5
    radius = (at[:, None].square() + at.square()).sqrt()
    size = 7 + 0.5 * torch.randn(count, 1, 1, generator=generator)
    return 0.4 + 0.3 * torch.sigmoid(size - radius) + 0.05 * torch.randn(count, 24, 24, generator=generator)


def noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic")[:, 0]


@pytest.fixture(scope="module", params=[None, 7.0])
def aperture(request: pytest.FixtureRequest) -> float | None:
    return request.param


@pytest.fixture(scope="module")
def odds(aperture: float | None) -> EdgeOdds:
    return EdgeOdds.fit(density_coordinates(discs(300, 1)), density_coordinates(noise(900, 2)), aperture)


def seen(aperture: float | None) -> torch.Tensor:
    """Features, direction by direction, of cells whose middles are less than the aperture from the patch's."""
    middles = [2.0 * k + 1.5 - 11.5 for k in range(11)]
    inside = [aperture is None or (y * y + x * x) ** 0.5 < aperture for y in middles for x in middles]
    return torch.tensor(inside * 8).nonzero().flatten()


def features(y: torch.Tensor) -> torch.Tensor:
    return edges(from_density_coordinates(y)).double()


def test_the_odds_are_those_of_two_normal_laws_of_linear_statistics(odds: EdgeOdds, aperture: float | None) -> None:
    """The statistics are found another way: SciPy's generalised eigenvectors; the laws are PyTorch's."""
    cells = seen(aperture)
    known, other = (features(density_coordinates(x))[:, cells] for x in (discs(300, 1), noise(900, 2)))
    apart, spreads = known.mean(0) - other.mean(0), [torch.cov(known.T), torch.cov(other.T)]
    floor = FLOOR * spreads[1].diagonal().mean() * torch.eye(len(cells), dtype=torch.float64)
    direction = torch.linalg.solve(0.5 * (spreads[0] + spreads[1]) + floor, apart)
    some = [0, DIRECTIONS - 1]
    _, axes = eigh(*((spread + floor).numpy() for spread in spreads), subset_by_index=some)
    basis = torch.cat([(direction / (direction @ apart).sqrt())[:, None], torch.from_numpy(axes)], 1)
    of_object, of_clutter = (basis.T @ spread @ basis for spread in spreads)
    steady = STEADY * torch.eye(1 + DIRECTIONS, dtype=torch.float64)
    of_object = (1 - SHRINKAGE) * of_object + SHRINKAGE * of_clutter
    law, other_law = (
        torch.distributions.MultivariateNormal(f.mean(0) @ basis, spread + steady)
        for f, spread in ((known, of_object), (other, of_clutter))
    )
    new = density_coordinates(torch.cat([discs(4, 3), noise(4, 4)]))
    z = features(new)[:, cells] @ basis
    # Differences of hundreds of nats in float32.
    expected = law.log_prob(z) - other_law.log_prob(z)
    torch.testing.assert_close(odds.log_odds(new).double(), expected, rtol=1e-3, atol=0.05)


def test_new_objects_and_new_clutter_are_told_apart(odds: EdgeOdds) -> None:
    new, other = (odds.log_odds(density_coordinates(x)) for x in (discs(200, 5), noise(200, 6)))
    assert float(new.min()) > float(other.max())


def test_outside_the_aperture_edges_have_no_say(odds: EdgeOdds, aperture: float | None) -> None:
    some = torch.cat([odds.direction[:, None], odds.axes], 1).abs().amax(1) > 0
    assert torch.equal(some.nonzero().flatten(), seen(aperture))


def test_an_aperture_of_hardly_a_cell_is_refused() -> None:
    with pytest.raises(InputError, match=r"aperture 1\.5: 8 features of edges lie within it, more than 32"):
        EdgeOdds.fit(torch.randn(20, 575), torch.randn(40, 575), 1.5)


def test_light_does_not_matter(odds: EdgeOdds) -> None:
    patch = discs(20, 7)
    first, second = (odds.log_odds(density_coordinates(x)) for x in (patch, 0.2 + 0.6 * patch))
    # The floor of the normalisation (5 % of the range) is what light may still change.
    assert float((first - second).abs().max()) < 0.1 * float(first.std() + first.abs().mean())


def test_scaled_odds_are_so_many_times_as_large_and_blank_ones_say_nothing(odds: EdgeOdds) -> None:
    y = density_coordinates(discs(3, 8))
    half = odds.scaled(0.5)
    torch.testing.assert_close(half.log_odds(y), 0.5 * odds.log_odds(y))
    blank = EdgeOdds.blank()
    assert torch.equal(blank.log_odds(y), torch.zeros(3))
    blank.load_state_dict(half.state_dict())
    assert torch.equal(blank.log_odds(y), half.log_odds(y))


def test_the_odds_are_differentiable_in_the_patch() -> None:
    y = density_coordinates(discs(2, 9).double()).requires_grad_()
    random = torch.randn(968, 6, dtype=torch.float64)
    odds = EdgeOdds(random[:, 0], random[0, 0], random[:, 1:], random[0, 1:])
    assert torch.autograd.gradcheck(odds.log_odds, (y,), eps=1e-7, atol=1e-4)


def test_no_patches_have_no_odds(odds: EdgeOdds) -> None:
    assert edges(torch.zeros(0, 24, 24)).shape == (0, edges(torch.zeros(1, 24, 24)).shape[1])
    assert odds.log_odds(torch.zeros(2, 0, 575)).shape == (2, 0)


def test_too_few_patches_are_refused() -> None:
    with pytest.raises(InputError, match="at least 10"):
        EdgeOdds.fit(torch.randn(4, 575), torch.randn(40, 575))


def test_odds_do_not_depend_on_how_many_patches_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = density_coordinates(discs(60, 5)).double(), density_coordinates(noise(80, 6)).double()
    at_once = EdgeOdds.fit(known, other)
    monkeypatch.setattr(of_edges, "CHUNK", 7)
    in_parts = EdgeOdds.fit(known, other)
    # Float64 sums in another order, through inverses of covariances whose least variances are 3 % of the mean; axes may
    # turn among like curvatures, the odds stay.
    new = density_coordinates(torch.cat([discs(4, 3), noise(4, 4)])).double()
    torch.testing.assert_close(in_parts.log_odds(new), at_once.log_odds(new), rtol=1e-8, atol=1e-8)
