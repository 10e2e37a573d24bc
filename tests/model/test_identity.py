"""Telling people apart: the Bayes factor is that of its normal laws, and what is learned serves people never seen."""

import math

import pytest
import torch
from torch import Tensor

from foveate.model.identity import FEWEST_PEOPLE, IdentityModel, _Spread, edges


def faces(people: int, pictures: int, seed: int) -> tuple[Tensor, Tensor]:
    """Crops ``(picture, 2 versions, 24, 24)`` of drawn people; every picture has its own noise, light and shift."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, 24)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    crops, who = [], []
    for person in range(people):
        place = 1.4 * torch.rand(5, 2, generator=generator) - 0.7
        height = torch.randn(5, generator=generator)
        for _ in range(pictures):
            versions = []
            for _ in range(2):
                dx, dy = 0.05 * torch.randn(2, generator=generator)
                spots = [
                    h * torch.exp(-((x - a - dx) ** 2 + (y - b - dy) ** 2) / 0.05)
                    for (a, b), h in zip(place, height, strict=True)
                ]
                versions.append(0.5 + 0.1 * torch.stack(spots).sum(0) + 0.01 * torch.randn(24, 24, generator=generator))
            light = 0.05 * torch.randn(2, generator=generator)
            crops.append((torch.stack(versions) + light[0] * x + light[1] * y).clamp(0, 1))
            who.append(person)
    return torch.stack(crops), torch.tensor(who)


def test_the_log_ratio_is_that_of_the_normal_laws_it_is_derived_from() -> None:
    b, weight = torch.tensor([0.3, 2.0]), 0.25
    model = IdentityModel(torch.zeros(3), torch.zeros(3, 2), b, weight)
    t, of_v = torch.tensor([0.4, -1.2]), torch.tensor([1.1, 0.7])
    joint = torch.distributions.MultivariateNormal
    exact = 0.0
    for k in range(2):
        # Two pictures of one person share z ~ N(0, b); each adds e ~ N(0, 1).
        same = torch.stack([torch.stack([b[k] + 1, b[k]]), torch.stack([b[k], b[k] + 1])])
        both = torch.stack([t[k], of_v[k]])
        apart = torch.distributions.Normal(0.0, math.sqrt(float(b[k]) + 1)).log_prob(both).sum()
        exact += float(joint(torch.zeros(2), same).log_prob(both) - apart)
    assert float(model.log_ratio(t, of_v)) == pytest.approx(weight * exact, abs=1e-5)
    assert float(model.log_ratio(of_v, t)) == pytest.approx(weight * exact, abs=1e-5)


def test_people_never_seen_are_told_apart() -> None:
    model = IdentityModel.fit(*faces(24, 6, seed=0))
    assert model is not None and 0 < float(model.weight) <= 1
    crops, _ = faces(20, 2, seed=1)
    t = model.coordinates(crops[:, 1])
    ratio = model.log_ratio(t[0::2, None], t[None, 1::2])
    # The matching picture of twenty; by chance 1 in 20 is right.
    assert float((ratio.argmax(1) == torch.arange(20)).float().mean()) > 0.8
    # A Bayes factor says how sure it is: the same person's is above 1 for most, and others' below.
    assert float((ratio.diagonal() > 0).float().mean()) > 0.8
    assert float((ratio[~torch.eye(20, dtype=torch.bool)] < 0).float().mean()) > 0.8


def test_too_few_people_teach_nothing() -> None:
    crops, who = faces(FEWEST_PEOPLE - 1, 2, seed=0)
    assert IdentityModel.fit(crops, who) is None
    # People with one picture do not count.
    single = torch.arange(FEWEST_PEOPLE + 3)
    assert IdentityModel.fit(crops[:1].expand(len(single), -1, -1, -1), single) is None


@pytest.mark.parametrize("people", range(FEWEST_PEOPLE, FEWEST_PEOPLE + 6))
def test_any_number_of_people_leaves_two_or_more_in_every_fold(people: int) -> None:
    model = IdentityModel.fit(*faces(people, 2, seed=0))
    assert model is not None and bool(torch.isfinite(model.between).all())


def test_lighting_leaves_the_coordinates_as_they_are() -> None:
    model = IdentityModel.fit(*faces(8, 3, seed=0))
    assert model is not None
    patch = 0.5 * torch.rand(3, 24, 24) + 0.1
    t = model.coordinates(patch)
    # The floor of the normalisation sees the contrast: 0.05² beside a variance of 0.02.
    torch.testing.assert_close(model.coordinates(patch + 0.2), t, rtol=0, atol=1e-3)
    assert float((model.coordinates(1.5 * patch) - t).abs().max()) < 0.1 * float(t.abs().max())


def test_edges_have_a_gradient_that_finite_differences_confirm() -> None:
    patch = torch.rand(24, 24, dtype=torch.float64, requires_grad=True)
    step = torch.randn(24, 24, dtype=torch.float64)
    weight = torch.randn(968, dtype=torch.float64)
    (slope,) = torch.autograd.grad((edges(patch) * weight).sum(), patch)
    h = 1e-6
    with torch.no_grad():
        numeric = ((edges(patch + h * step) - edges(patch - h * step)) * weight).sum() / (2 * h)
    # Rectified gradients have kinks; a random patch stays clear of them at steps of 1e-6.
    assert float((slope * step).sum()) == pytest.approx(float(numeric), rel=1e-4)


def test_people_are_not_taken_to_differ_by_what_their_pictures_do() -> None:
    generator = torch.Generator().manual_seed(0)
    people, b, w = 1000, torch.tensor([1.0, 0.25]), 2.0
    f = (torch.randn(people, 1, 2, generator=generator) * b.sqrt()).repeat_interleave(2, 0)
    f = f + math.sqrt(w) * torch.randn(f.shape, generator=generator)
    between = _Spread(f, torch.arange(people).repeat_interleave(2)).between
    # Means of two pictures scatter by B + W / 2, whose estimate has this relative error; four of them.
    error = (b + w / 2) * math.sqrt(2 / (people - 1))
    assert bool(((between.diagonal().float() - b).abs() < 4 * error).all())
