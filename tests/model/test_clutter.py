"""Clutter densities, and elliptical densities seen through noise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from foveate.model.clutter import ClutterModel, NoisyDensity
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError


def core(nu: float, dimension: int = 4) -> EllipticalDensity:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    mean = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return EllipticalDensity(mean, root @ root.T + 0.2 * torch.eye(dimension, dtype=torch.float64), nu)


def covariance(density: EllipticalDensity) -> np.ndarray:
    return ((density.axes * density.variances) @ density.axes.T).numpy()


@pytest.fixture(scope="module")
def patches() -> torch.Tensor:
    """Coordinates of 3000 patches: a mean and 575 different variances."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.2, 2.0, 575)
    noise = torch.randn(3000, 575, generator=generator) * scale
    return torch.linspace(-1, 1, 575) + noise


def test_a_gaussian_through_noise_is_the_gaussian_of_the_sum() -> None:
    density, noise = core(math.inf), 0.7
    y = torch.randn(9, 4, dtype=torch.float64)
    found = NoisyDensity.through(density, noise).log_prob(y)
    expected = stats.multivariate_normal(density.mean.numpy(), covariance(density) + noise**2 * np.eye(4)).logpdf(y)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)  # float64


def test_a_student_t_through_noise_is_one_of_the_summed_covariance_and_the_same_tail() -> None:
    density, noise, nu = core(7.0), 0.7, 7.0
    y = 3 * torch.randn(9, 4, dtype=torch.float64)
    found = NoisyDensity.through(density, noise).log_prob(y)
    shape = (covariance(density) + noise**2 * np.eye(4)) * (nu - 2) / nu
    expected = stats.multivariate_t(density.mean.numpy(), shape, df=nu).logpdf(y.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)  # float64


def test_sums_of_draws_and_noise_have_the_covariance_of_the_density_through_noise() -> None:
    density, noise = core(math.inf), 0.7
    draws = density.sample(50_000, torch.Generator().manual_seed(1))
    draws = draws + noise * torch.randn(draws.shape, generator=torch.Generator().manual_seed(2), dtype=draws.dtype)
    expected = covariance(NoisyDensity.through(density, noise))
    # 50000 draws: a covariance is known to sqrt(2 / n) = 0.6 % of the variances; five of those.
    np.testing.assert_allclose(torch.cov(draws.T).numpy(), expected, rtol=0, atol=0.03 * expected.max())


@pytest.mark.parametrize("nu", [math.inf, 6.0])
def test_without_noise_the_density_is_unchanged(nu: float) -> None:
    density = core(nu)
    y = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(NoisyDensity.through(density, 0.0).log_prob(y), density.log_prob(y), rtol=0, atol=0)


def test_looking_through_noise_leaves_the_core_as_it_was() -> None:
    density = core(6.0)
    before = {name: value.clone() for name, value in density.state_dict().items()}
    NoisyDensity.through(density, 2.0)
    for name, value in density.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_density_through_noise_keeps_the_dtype() -> None:
    assert NoisyDensity.through(EllipticalDensity.blank(3), 0.5).mean.dtype == torch.float32
    assert NoisyDensity.through(core(6.0), 0.5).log_prob(torch.zeros(4, dtype=torch.float64)).dtype == torch.float64


def test_negative_noise_is_refused() -> None:
    with pytest.raises(InputError, match=r"noise -0\.5"):
        NoisyDensity.through(core(6.0), -0.5)


def test_clutter_has_the_mean_and_covariance_of_its_patches_and_a_floor(patches: torch.Tensor) -> None:
    density = ClutterModel.fit(patches, floor=0.25, nu=9.0).density
    data = patches.double().numpy()
    # Reassembled from float32 axes: rounding of 575 terms of size 4, some 1e-5.
    np.testing.assert_allclose(density.mean.numpy(), data.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(covariance(density), np.cov(data.T) + 0.25 * np.eye(575), rtol=0, atol=1e-4)
    assert float(density.nu) == 9.0


def test_patches_of_the_kind_it_was_fitted_on_are_likelier_than_others(patches: torch.Tensor) -> None:
    clutter = ClutterModel.fit(patches[:2000])
    held_out = clutter.log_prob(patches[2000:])
    # The same patches with their coordinates in reverse order: same length, other covariance.
    assert float(held_out.mean()) > float(clutter.log_prob(patches[2000:].flip(-1)).mean()) + 100


def test_its_log_density_has_the_gradient_of_the_student_t(patches: torch.Tensor) -> None:
    clutter = ClutterModel.fit(patches[:600].double(), nu=8.0)
    y = patches[700:703].double().requires_grad_()
    (found,) = torch.autograd.grad(clutter.log_prob(y).sum(), y)
    density = clutter.density
    precision = np.linalg.inv(covariance(density))
    away = (y.detach() - density.mean).numpy()
    square = np.einsum("ni,ij,nj->n", away, precision, away)
    expected = -(8 + 575) / (8 - 2 + square)[:, None] * (away @ precision)
    # float64; the covariance of 600 patches in 575 dimensions has a condition number of some 1e4.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_a_blank_one_takes_a_state(patches: torch.Tensor) -> None:
    clutter = ClutterModel.fit(patches[:600], nu=5.0)
    blank = ClutterModel.blank(575)
    blank.load_state_dict(clutter.state_dict())
    torch.testing.assert_close(blank.log_prob(patches[:7]), clutter.log_prob(patches[:7]), rtol=0, atol=0)


def test_too_few_patches_are_refused(patches: torch.Tensor) -> None:
    with pytest.raises(InputError, match="99 patches of clutter: at least 100"):
        ClutterModel.fit(patches[:99])
