"""Elliptical densities against SciPy and against the definition of the baselines."""

import importlib.util
import inspect
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from foveate.model.density import EllipticalDensity, choose_elliptical
from foveate.model.errors import InputError
from foveate.model.patch import density_coordinates


def problem(dimension: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    root = torch.randn(dimension, dimension, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(dimension, dtype=torch.float64)
    return torch.randn(dimension, dtype=torch.float64), covariance, torch.randn(11, dimension, dtype=torch.float64) * 3


def test_the_student_t_is_scipys_with_the_scale_that_gives_the_covariance() -> None:
    mean, covariance, y = problem()
    found = EllipticalDensity(mean, covariance, nu=7.0).log_prob(y)
    scipys = stats.multivariate_t(mean.numpy(), covariance.numpy() * 5 / 7, df=7).logpdf(y.numpy())
    np.testing.assert_allclose(found.numpy(), scipys, rtol=1e-10)  # float64


def test_without_degrees_of_freedom_it_is_the_gaussian() -> None:
    mean, covariance, y = problem()
    scipys = stats.multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(y.numpy())
    np.testing.assert_allclose(EllipticalDensity(mean, covariance).log_prob(y).numpy(), scipys, rtol=1e-10)  # float64


def basis_of(seen: int, dimension: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dimension, seen, dtype=torch.float64)).Q


@pytest.mark.parametrize("nu", [math.inf, 6.0])
def test_within_a_line_it_is_the_integral_over_the_rest(nu: float) -> None:
    mean, covariance, _ = problem(2)
    density = EllipticalDensity(mean, covariance, nu)
    turn = basis_of(2, 2)
    seen = density.within(turn[:, :1])

    def along(rest: float, at: float) -> float:
        return float(density.log_prob(turn @ torch.tensor([at, rest], dtype=torch.float64)).exp())

    for at in (-1.0, 0.5, 2.0):
        expected = integrate.quad(along, -np.inf, np.inf, args=(at,), epsabs=1e-12, epsrel=1e-10)[0]
        # What lies beside the line does not matter.
        found = float(seen.log_prob(turn @ torch.tensor([at, 7.0], dtype=torch.float64)).exp())
        assert found == pytest.approx(expected, rel=1e-7)  # the quadrature's


@pytest.mark.parametrize("nu", [math.inf, 6.0])
def test_within_a_subspace_it_is_scipys_marginal_whatever_the_basis(nu: float) -> None:
    mean, covariance, y = problem()
    basis, density = basis_of(3, 5), EllipticalDensity(mean, covariance, nu)
    seen = density.within(basis)
    m, c = (basis.T @ mean).numpy(), (basis.T @ covariance @ basis).numpy()
    law = stats.multivariate_normal(m, c) if math.isinf(nu) else stats.multivariate_t(m, c * (nu - 2) / nu, df=nu)
    np.testing.assert_allclose(seen.log_prob(y).numpy(), law.logpdf((y @ basis).numpy()), rtol=1e-10)  # float64
    assert (seen.dimension, seen.seen, density.seen) == (5, 3, 5)
    turned = density.within(basis @ basis_of(3, 3)).log_prob(y)
    torch.testing.assert_close(turned, seen.log_prob(y), rtol=1e-10, atol=1e-10)


def test_draws_within_a_subspace_vary_there_alone() -> None:
    mean, covariance, _ = problem()
    basis = basis_of(2, 5)
    draws = EllipticalDensity(mean, covariance, 6.0).within(basis).sample(40_000, torch.Generator().manual_seed(0))
    rest = draws - mean - (draws - mean) @ basis @ basis.T
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-10)
    expected = basis.T @ covariance @ basis
    # Kurtosis 3 + 6 / (ν - 4): a covariance of 40 000 draws has a standard error of some 2 % of the variances.
    torch.testing.assert_close(
        torch.cov((draws @ basis).T), expected, rtol=0, atol=0.1 * float(expected.diagonal().max())
    )


@pytest.mark.parametrize("nu", [math.inf, 6.0])
def test_samples_have_the_mean_and_covariance(nu: float) -> None:
    mean, covariance, _ = problem(3)
    draws = EllipticalDensity(mean, covariance, nu).sample(100_000, torch.Generator().manual_seed(2))
    # 10^5 draws, kurtosis up to 3 × 2 at ν = 6: relative error of a variance 0.7 %, allowed 4 %.
    scale = covariance.diagonal().max()
    torch.testing.assert_close(torch.cov(draws.T), covariance, rtol=0, atol=float(0.04 * scale))
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=float(0.02 * scale.sqrt()))


def test_the_log_density_is_differentiable() -> None:
    mean, covariance, y = problem(3)
    density = EllipticalDensity(mean, covariance, 5.0)
    assert torch.autograd.gradcheck(density.log_prob, y[:3].requires_grad_())


def test_it_is_restored_from_its_state() -> None:
    mean, covariance, y = problem(4)
    density = EllipticalDensity(mean, covariance, 5.0)
    restored = EllipticalDensity.blank(4, torch.float64)
    restored.load_state_dict(density.state_dict())
    torch.testing.assert_close(restored.log_prob(y), density.log_prob(y), rtol=0, atol=0)
    for name, value in restored.state_dict().items():
        assert value.stride() == density.state_dict()[name].stride()


def test_validation_chooses_the_heavier_tail_for_heavy_tailed_data() -> None:
    mean, covariance, _ = problem(6)
    truth = EllipticalDensity(mean, covariance, 4.0)
    train, validation = truth.sample(4000), truth.sample(1000)
    student, setting = choose_elliptical(train, validation, student=True)
    gaussian, _ = choose_elliptical(train, validation, student=False)
    assert setting["nu"] <= 6
    assert float(student.log_prob(validation).mean()) == pytest.approx(setting["validation"], abs=1e-9)
    assert float(student.log_prob(validation).mean()) > float(gaussian.log_prob(validation).mean())


def test_a_density_from_its_axes_is_that_of_the_covariance() -> None:
    covariance = torch.cov(torch.randn(5, 40, dtype=torch.float64))
    whole = EllipticalDensity(torch.arange(5.0).double(), covariance, 6.0)
    made = EllipticalDensity.from_axes(whole.mean, whole.axes, whole.variances, whole.nu)
    y = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(made.log_prob(y), whole.log_prob(y))
    made.variances.mul_(2)  # buffers of its own
    assert not torch.equal(made.variances, whole.variances)


def test_wrong_parameters_are_refused() -> None:
    mean, covariance, _ = problem(3)
    with pytest.raises(InputError, match="above 2"):
        EllipticalDensity(mean, covariance, 2.0)
    with pytest.raises(InputError, match="floor"):
        EllipticalDensity(mean, torch.zeros(3, 3, dtype=torch.float64))
    build, log_prob = inspect.unwrap(EllipticalDensity.__init__), EllipticalDensity(mean, covariance).log_prob
    with pytest.raises(InputError, match=r"\(dimension, dimension\)"):
        build(EllipticalDensity.__new__(EllipticalDensity), mean[:1], covariance)
    with pytest.raises(InputError, match="in 3 dimensions"):
        log_prob(torch.zeros(4, 1, dtype=torch.float64))


def reference_baselines(shared_data: Path):
    folder = shared_data.parent / "reference"
    if not (folder / "baselines.py").is_file():
        pytest.skip(f"the definition of the baselines is not here: no {folder / 'baselines.py'}")
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("reference_baselines", folder / "baselines.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize("student", [False, True], ids=["gaussian", "student-t"])
def test_the_baselines_equal_their_definition_on_the_real_crops(shared_data: Path, student: bool) -> None:
    reference = reference_baselines(shared_data)
    crops = np.load(shared_data / "crops.npz")
    train, held = crops["webfaces_train"][100:300], crops["webfaces_train"][:100, 0]
    y = reference.augmented(train)
    setting, expected = reference.fit(y, reference.density_coordinates(held), student)
    ours = density_coordinates(torch.from_numpy(np.concatenate([train.reshape(-1, 24, 24)] * 2)).double())
    mirrored = torch.from_numpy(train.reshape(-1, 24, 24)).double().flip(-1)
    ours[len(mirrored) :] = density_coordinates(mirrored)
    validation = density_coordinates(torch.from_numpy(held).double())
    density, chosen = choose_elliptical(ours, validation, student=student)
    assert chosen["floor"] == setting[0]
    assert chosen["nu"] == (setting[1] or math.inf)
    test = density_coordinates(torch.from_numpy(crops["caltech_test"]).double())
    # float64 throughout; the smallest eigenvalues are 1e-4 and amplify rounding to some 1e-7 nats
    np.testing.assert_allclose(density.log_prob(test).numpy(), expected(test.numpy()), rtol=0, atol=1e-5)
