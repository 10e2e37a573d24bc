"""The batched sampler: exact moments, isolation, reproducible streams, adaptation, Pyro's MCMC, and errors."""

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from foveate.inference.adaptation import mass_windows
from foveate.inference.hmc import BatchedHMC, HMCStatistics, sample_batch
from foveate.inference.noise import KeyedNoise, Purpose, batch_streams, stream_keys
from foveate.model.errors import InputError

SCHOOL_EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
SCHOOL_ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def errors_of_moments(x: np.ndarray) -> tuple[float, float]:
    """Monte-Carlo standard errors of the mean and of the sd of draws (chain, draw), by ArviZ' effective sample sizes.

    Written out because ``arviz.mcse(method="sd")`` of 0.23 fails beside numba on numpy 2.4.
    """
    square = (x - x.mean()) ** 2
    of_square = square.std() / math.sqrt(arviz.ess(square, method="mean"))
    return x.std() / math.sqrt(arviz.ess(x, method="mean")), of_square / (2 * x.std())


def check_moments(draws: Tensor, mean: Tensor | list[float], sd: Tensor | list[float]) -> None:
    """Draws (chain, draw, d) have these means and sds within 4 MCSE (false alarms: 6e-5), and R-hat < 1.01."""
    for i, (expected_mean, expected_sd) in enumerate(zip(mean, sd, strict=True)):
        x = draws[..., i].double().numpy()
        assert arviz.rhat(x) < 1.01
        error_of_mean, error_of_sd = errors_of_moments(x)
        assert abs(x.mean() - float(expected_mean)) < 4 * error_of_mean
        assert abs(x.std() - float(expected_sd)) < 4 * error_of_sd


def gaussian(sd: Tensor):
    """Energy and gradient of independent normals, for sds (d,) or (*batch, d)."""
    precision = sd**-2
    return lambda z: (0.5 * (z * z * precision).sum(-1), z * precision)


def differentiated(potential):
    """Energy and gradient of a potential by autograd, without Pyro."""

    def call(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            energy = potential(z)
            (gradient,) = torch.autograd.grad(energy.sum(), z)
        return energy.detach(), gradient

    return call


# Right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_a_gaussian_of_condition_1_to_1000_are_exact(dtype):
    sd = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=dtype)
    draws, statistics = sample_batch(
        gaussian(sd), torch.zeros(16, 4, dtype=dtype), num_samples=500, warmup_steps=300, seed=1
    )
    assert draws.dtype == statistics.lp.dtype == dtype
    check_moments(draws, torch.zeros(4), sd)
    assert not statistics.diverging.any()


def test_moments_of_a_correlated_gaussian_are_exact():
    covariance = torch.tensor([[1.0, 0.95, 0.3], [0.95, 1.0, 0.2], [0.3, 0.2, 4.0]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance)

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        gradient = z @ precision
        return 0.5 * (z * gradient).sum(-1), gradient

    draws, _ = sample_batch(
        function, torch.zeros(16, 3, dtype=torch.float64), num_samples=1000, warmup_steps=300, seed=1
    )
    check_moments(draws, torch.zeros(3), covariance.diagonal().sqrt())


def test_moments_of_a_banana_are_exact():
    # x1 ~ N(0, 3²), x2 = N(0, 1) + 0.1 (x1² - 9): mean 0, variance 1 + 0.01 · 2 · 81.
    def potential(z: Tensor) -> Tensor:
        return 0.5 * (z[..., 0] / 3) ** 2 + 0.5 * (z[..., 1] - 0.1 * (z[..., 0] ** 2 - 9)) ** 2

    start = torch.zeros(8, 2, dtype=torch.float64)
    draws, _ = sample_batch(differentiated(potential), start, num_samples=3000, warmup_steps=300, seed=2)
    check_moments(draws, [0, 0], [3, math.sqrt(2.62)])


def test_the_non_centred_funnel_has_its_exact_moments():
    def model() -> None:
        with pyro.plate("chain", 32):
            v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
            raw = pyro.sample("raw", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.deterministic("x", torch.exp(v / 2)[:, None] * raw)

    mcmc = MCMC(BatchedHMC(model, seed=3), num_samples=300, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    v, raw = mcmc.get_samples()["v"], mcmc.get_samples()["raw"]
    log_size = v / 2 + raw[..., 0].abs().log()
    # E log|N(0, 1)| = -(γ + log 2) / 2 and Var log|N(0, 1)| = π²/8.
    mean, sd = -(np.euler_gamma + math.log(2)) / 2, math.sqrt(9 / 4 + math.pi**2 / 8)
    check_moments(torch.stack([v, log_size], -1).movedim(1, 0), [0, mean], [3, sd])


def eight_schools(chains: int) -> None:
    with pyro.plate("chain", chains):
        zero = torch.zeros((), dtype=torch.float64)
        mu = pyro.sample("mu", dist.Normal(zero, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
        eta = pyro.sample("eta", dist.Normal(zero.expand(8), 1.0).to_event(1))
        theta = mu[..., None] + tau[..., None] * eta
        pyro.sample("effect", dist.Normal(theta, SCHOOL_ERRORS).to_event(1), obs=SCHOOL_EFFECTS.expand(chains, 8))


def test_eight_schools_agrees_with_quadrature():
    # Given tau everything is Gaussian, which leaves one integral over tau; log tau has the light tails that moments
    # need.
    log_tau = torch.linspace(-12, 7, 40_001, dtype=torch.float64)
    tau = log_tau.exp()
    precision = 1 / (SCHOOL_ERRORS**2 + tau[:, None] ** 2)
    total = precision.sum(-1) + 1 / 25
    centre = (precision * SCHOOL_EFFECTS).sum(-1) / total
    log_weight = (
        0.5 * precision.log().sum(-1)
        - 0.5 * (precision * SCHOOL_EFFECTS**2).sum(-1)
        - 0.5 * total.log()
        + 0.5 * total * centre**2
        + dist.HalfCauchy(5.0).log_prob(tau)
        + log_tau
    )
    weight = (log_weight - log_weight.logsumexp(0)).exp()
    mean = torch.stack([(weight * centre).sum(), (weight * log_tau).sum()])
    square = torch.stack([(weight * (centre**2 + 1 / total)).sum(), (weight * log_tau**2).sum()])

    mcmc = MCMC(BatchedHMC(eight_schools, seed=1), num_samples=600, warmup_steps=150, disable_progbar=True)
    mcmc.run(16)
    samples = mcmc.get_samples()
    assert samples["eta"].shape == (600, 16, 8)
    draws = torch.stack([samples["mu"], samples["tau"].log()], -1).movedim(1, 0)
    check_moments(draws, mean, (square - mean**2).sqrt())


@pytest.mark.slow
def test_eight_schools_agrees_with_long_runs_of_nuts():
    mcmc = MCMC(BatchedHMC(eight_schools, seed=2), num_samples=1000, warmup_steps=300, disable_progbar=True)
    mcmc.run(32)
    ours = mcmc.get_samples()
    nuts = MCMC(NUTS(eight_schools, target_accept_prob=0.9), num_samples=4000, warmup_steps=500, disable_progbar=True)
    nuts.run(1)
    theirs = nuts.get_samples()
    for name in ("mu", "eta"):
        x = ours[name].movedim(1, 0).reshape(32, 1000, -1).numpy()
        y = theirs[name].movedim(1, 0).reshape(1, 4000, -1).numpy()
        for i in range(x.shape[-1]):
            a, b = x[..., i], y[..., i]
            for ours_at, theirs_at, *mcse in zip(
                (a.mean(), a.std()), (b.mean(), b.std()), errors_of_moments(a), errors_of_moments(b), strict=True
            ):
                assert abs(ours_at - theirs_at) < 4 * math.hypot(*mcse)


def test_a_regression_with_a_constrained_scale_agrees_with_quadrature():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 15, 2, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + torch.tensor(
        [[0.3], [2.0]], dtype=torch.float64
    ) * torch.randn(2, 15, generator=generator, dtype=torch.float64)

    def model(x: Tensor, y: Tensor) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        with pyro.plate("scene", 2, dim=-2), pyro.plate("chain", 16, dim=-1):
            slope = pyro.sample("slope", dist.Normal(zero.expand(2), 5.0).to_event(1))
            sigma = pyro.sample("sigma", dist.LogNormal(zero, 1.0))
            mean = (x[:, None] @ slope[..., None])[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y[:, None].expand(2, 16, 15))

    mcmc = MCMC(BatchedHMC(model, batch_dims=2, seed=1), num_samples=400, warmup_steps=150, disable_progbar=True)
    mcmc.run(x, y)
    samples = mcmc.get_samples()
    log_sigma = torch.linspace(-6, 6, 8001, dtype=torch.float64)
    for scene in range(2):
        # Given sigma the slopes are Gaussian: p(y | sigma) is a normal density with covariance 25 X Xᵀ + sigma² I.
        values, vectors = torch.linalg.eigh(25 * x[scene] @ x[scene].T)
        variance = values + (2 * log_sigma).exp()[:, None]
        log_weight = -0.5 * (variance.log() + (y[scene] @ vectors) ** 2 / variance).sum(-1) - 0.5 * log_sigma**2
        weight = (log_weight - log_weight.logsumexp(0)).exp()
        sigma = log_sigma.exp()
        precision = x[scene].T @ x[scene] / (sigma**2)[:, None, None] + torch.eye(2, dtype=torch.float64) / 25
        spread = torch.linalg.inv(precision)
        centre = (spread @ (x[scene].T @ y[scene] / (sigma**2)[:, None])[..., None])[..., 0]
        slope_mean = (weight[:, None] * centre).sum(0)
        slope_square = (weight[:, None] * (centre**2 + spread.diagonal(dim1=-2, dim2=-1))).sum(0)
        sigma_mean, sigma_square = (weight * sigma).sum(), (weight * sigma**2).sum()
        draws = torch.cat([samples["slope"], samples["sigma"][..., None]], -1)[:, scene].movedim(1, 0)
        mean = torch.cat([slope_mean, sigma_mean[None]])
        check_moments(draws, mean, (torch.cat([slope_square, sigma_square[None]]) - mean**2).sqrt())


def test_a_site_on_the_simplex_and_bounds_that_differ_by_element_are_sampled_in_their_support():
    high = torch.tensor([1.0, 2.0, 50.0], dtype=torch.float64)[:, None].expand(3, 8)

    def model() -> None:
        with pyro.plate("scene", 3, dim=-2), pyro.plate("chain", 8, dim=-1):
            pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)))
            pyro.sample("level", dist.Uniform(torch.zeros_like(high), high))

    mcmc = MCMC(BatchedHMC(model, batch_dims=2, seed=4), num_samples=500, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    sd_of_share = [math.sqrt(a * (1 - a) / 11) for a in (0.2, 0.3, 0.5)]
    for scene in range(3):
        top = float(high[scene, 0])
        check_moments(samples["share"][:, scene].movedim(1, 0), [0.2, 0.3, 0.5], sd_of_share)
        check_moments(samples["level"][:, scene].T[..., None], [top / 2], [top / math.sqrt(12)])


# Adaptive


def test_each_element_finds_its_own_scale():
    sd = torch.tensor([[0.01], [1.0], [100.0]], dtype=torch.float64)
    state: dict[str, Tensor] = {}
    function, start = gaussian(sd), torch.zeros(3, 1, dtype=torch.float64)
    sample_batch(function, start, num_samples=10, warmup_steps=200, seed=1, adaptation=state, adapt_mass_matrix=False)
    steps = state["log_step"].exp()
    # A factor of two either way: the target leaves that much freedom to dual averaging.
    assert ((steps / steps[1] / sd[:, 0] > 0.5) & (steps / steps[1] / sd[:, 0] < 2.0))[:1].all()
    sample_batch(function, start, num_samples=10, warmup_steps=200, seed=1, adaptation=(metric := {}))
    # The Fisher metric of a Gaussian is exact, the variance of ~100 draws is good to 14 % (sd), 3 of them.
    assert torch.allclose(metric["inverse_mass"].sqrt(), sd, rtol=0.25)


@pytest.mark.parametrize("seed", range(4))
def test_a_warm_up_of_20_draws_ends_in_a_sane_step_size(seed):
    sd = torch.tensor([0.05, 1.0, 1.0, 5.0], dtype=torch.float64)
    draws, statistics = sample_batch(
        gaussian(sd), sd * torch.ones(32, 4, dtype=torch.float64), num_samples=200, warmup_steps=20, seed=seed
    )
    acceptance = statistics.acceptance_rate.mean(-1)
    # The target is 0.8; six draws of dual averaging leave each chain some way off, but none useless.
    assert 0.4 < acceptance.min() and acceptance.mean() > 0.7
    assert torch.allclose(draws.std((0, 1)), sd, rtol=0.1)  # 6400 draws: the sd is good to about 2 %


def test_acceptance_reaches_its_target():
    covariance_scale = torch.linspace(0.5, 2.0, 50, dtype=torch.float64)
    for target in (0.65, 0.9):
        _, statistics = sample_batch(
            gaussian(covariance_scale),
            torch.zeros(8, 50, dtype=torch.float64),
            num_samples=200,
            warmup_steps=500,
            seed=1,
            target_accept_prob=target,
        )
        # The averaged iterate of dual averaging is known to err a little towards acceptance.
        assert abs(float(statistics.acceptance_rate.mean()) - target) < 0.1


def test_windows_cover_the_warm_up_and_leave_time_to_settle():
    assert mass_windows(9) == []
    assert mass_windows(20) == [2, 15]
    assert mass_windows(1000) == [2, 10, 26, 58, 122, 250, 950]
    for steps in range(10, 700):
        windows = mass_windows(steps)
        assert windows == sorted(set(windows)) and windows[-1] <= steps - 5


def test_chees_lengthens_trajectories_where_the_metric_cannot_help():
    # A long narrow diagonal ridge: marginal scales are equal, so a diagonal metric sees nothing.
    rotation = torch.linalg.qr(
        torch.ones(4, 4, dtype=torch.float64) + torch.diag(torch.arange(4, dtype=torch.float64))
    )[0]
    precision = rotation @ torch.diag(torch.tensor([0.01, 4.0, 4.0, 4.0], dtype=torch.float64)) @ rotation.T

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        gradient = z @ precision
        return 0.5 * (z * gradient).sum(-1), gradient

    lengths, ess = {}, {}
    for chees in (False, True):
        state: dict[str, Tensor] = {}
        start = torch.zeros(2, 8, 4, dtype=torch.float64)
        draws, _ = sample_batch(
            function,
            start,
            num_samples=200,
            warmup_steps=400,
            seed=1,
            chees=chees,
            trajectory_length=0.5,
            adapt_mass_matrix=False,
            adaptation=state,
        )
        lengths[chees] = state["log_length"][:, 0].exp()
        ess[chees] = arviz.ess((draws[0] @ rotation[:, 0]).numpy())
    assert lengths[True].shape == (2,)
    assert (lengths[True] > 4 * 0.5).all()
    assert ess[True] > 3 * ess[False]


def test_chees_pools_the_chains_of_one_scene_only():
    sd = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None, None]
    options = {"num_samples": 20, "warmup_steps": 60, "seed": 1, "chees": True}
    start = torch.ones(2, 4, 3, dtype=torch.float64)
    both, _ = sample_batch(gaussian(sd), start, **options)
    alone, _ = sample_batch(gaussian(sd[1:]), start[1:], streams=[1], **options)
    assert torch.equal(alone[0], both[1])


def test_adaptation_is_carried_over_by_stream_key():
    sd = torch.tensor([[0.01, 1.0], [3.0, 0.2], [40.0, 5.0]], dtype=torch.float64)

    def kernel(rows: list[int], **options) -> BatchedHMC:
        made = BatchedHMC(value_and_grad_fn=gaussian(sd[rows]), seed=1, streams=rows, **options)
        made.initial_params = {"z": torch.zeros(len(rows), 2, dtype=torch.float64)}
        return made

    first = kernel([0, 1, 2])
    MCMC(first, num_samples=5, warmup_steps=200, initial_params=first.initial_params, disable_progbar=True).run()
    state = first.state_dict()
    second = kernel([2, 0])
    second.load_state_dict(state)
    second.setup(0)
    carried = second.state_dict()
    for name in ("log_step", "inverse_mass"):
        assert torch.equal(carried[name], state[name][[2, 0]])
    unknown = kernel([1, 2])
    unknown.streams = [1, 77]
    unknown.load_state_dict(state)
    unknown.setup(0)
    assert torch.equal(unknown.state_dict()["inverse_mass"][0], state["inverse_mass"][1])
    assert torch.equal(unknown.state_dict()["inverse_mass"][1], torch.ones(2, dtype=torch.float64))
    other = BatchedHMC(value_and_grad_fn=gaussian(torch.ones(3, dtype=torch.float64)), seed=1)
    other.initial_params = {"z": torch.zeros(3, 3, dtype=torch.float64)}
    other.load_state_dict(state)
    with pytest.raises(InputError, match="of 2 coordinates, this potential has 3"):
        other.setup(0)


def test_a_carried_trajectory_length_belongs_to_its_scene():
    options = {"num_samples": 5, "seed": 1, "chees": True, "trajectory_length": 0.5}
    function, start = gaussian(torch.ones(2, dtype=torch.float64)), torch.ones(3, 4, 2, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    sample_batch(function, start, warmup_steps=60, adaptation=state, **options)
    assert (state["log_length"].std(-1) == 0).all() and state["log_length"].unique().numel() == 3
    scene = state["log_length"][2, 0].item()
    sample_batch(function, start[:1], warmup_steps=0, adaptation=state, streams=[2], **options)
    assert state["log_length"].shape == (1, 4)
    # A mean of four equal numbers, up to rounding.
    assert abs(state["log_length"][0, 0].item() - scene) < 1e-12


# Reproducible and isolated


def test_the_same_seed_gives_the_same_draws_and_another_seed_others():
    options = {"num_samples": 20, "warmup_steps": 30}
    function, start = gaussian(torch.ones(3)), torch.zeros(4, 3)
    first, _ = sample_batch(function, start, seed=7, **options)
    assert torch.equal(first, sample_batch(function, start, seed=7, **options)[0])
    assert not torch.equal(first, sample_batch(function, start, seed=8, **options)[0])


def test_pyro_seeds_the_kernel_that_has_no_seed_of_its_own():
    def run(seed: int) -> Tensor:
        pyro.set_rng_seed(seed)
        mcmc = MCMC(BatchedHMC(eight_schools), num_samples=3, warmup_steps=3, disable_progbar=True)
        mcmc.run(2)
        return mcmc.get_samples()["mu"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def schools_of(errors: Tensor) -> None:
    with pyro.plate("scene", len(errors), dim=-2), pyro.plate("chain", 2, dim=-1):
        zero = torch.zeros((), dtype=torch.float64)
        mu = pyro.sample("mu", dist.Normal(zero, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(zero + 5.0))
        eta = pyro.sample("eta", dist.Normal(zero.expand(8), 1.0).to_event(1))
        mean = mu[..., None] + tau[..., None] * eta
        observed = SCHOOL_EFFECTS.expand(len(errors), 2, 8)
        pyro.sample("effect", dist.Normal(mean, errors[:, None]).to_event(1), obs=observed)


def test_a_scene_draws_the_same_whatever_shares_its_batch():
    errors = torch.stack([SCHOOL_ERRORS * factor for factor in (1.0, 0.3, 3.0)])

    def run(scenes: list[int]) -> Tensor:
        kernel = BatchedHMC(schools_of, batch_dims=2, seed=11, streams=stream_keys([f"scene {i}" for i in scenes]))
        mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
        mcmc.run(errors[scenes])
        return torch.cat([mcmc.get_samples()["mu"][..., None], mcmc.get_samples()["eta"]], -1)

    together = run([0, 1, 2])
    # Autograd may sum in another order in another batch; twenty draws do not let rounding grow beyond this.
    assert torch.allclose(run([1])[:, 0], together[:, 1], atol=1e-6, rtol=0)
    assert torch.allclose(run([2, 0])[:, 1], together[:, 0], atol=1e-6, rtol=0)


def test_a_divergent_element_is_rejected_and_flagged_and_its_neighbours_do_not_notice():
    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = 0.5 * (z * z).sum(-1), z.clone()
        # Element 1 is not a number anywhere but near its start, element 2 jumps to an infinite energy.
        hole = torch.zeros_like(z, dtype=torch.bool)
        hole[1] = (z[1] - 1).abs().max() > 1e-9
        energy = torch.where(hole.any(-1), torch.nan, energy)
        gradient = torch.where(hole, torch.nan, gradient)
        energy[2] = torch.where((z[2] - 1).abs().max() > 1e-9, torch.inf, energy[2])
        return energy, gradient

    start = torch.ones(4, 2, dtype=torch.float64)
    options = {"num_samples": 30, "warmup_steps": 0, "seed": 3, "step_size": 0.5}
    draws, statistics = sample_batch(function, start, **options)
    alone, _ = sample_batch(gaussian(torch.ones(2, dtype=torch.float64)), start, **options)
    assert torch.equal(draws[[0, 3]], alone[[0, 3]])
    assert (draws[[1, 2]] == 1).all()
    assert statistics.diverging[[1, 2]].all() and not statistics.diverging[[0, 3]].any()
    assert (statistics.acceptance_rate[[1, 2]] == 0).all()
    assert torch.isfinite(statistics.lp).all() and torch.isfinite(statistics.energy).all()


def test_a_model_whose_distributions_validate_survives_an_element_that_diverges():
    def model() -> None:
        with pyro.plate("scene", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            # The scale of element 0 overflows, then is not a number, once z leaves (-1, 1).
            scale = torch.where(torch.tensor([True, False]) & (z.abs() > 1), torch.nan, 1.0)
            pyro.sample("x", dist.Normal(z, scale, validate_args=None), obs=torch.zeros(2))

    kernel = BatchedHMC(model, seed=1, init_strategy=pyro.infer.autoguide.init_to_value(values={"z": torch.zeros(2)}))
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(50):
        params = kernel.sample(params)
    assert kernel.statistics.diverging[0].any() and not kernel.statistics.diverging[1].any()
    assert params["z"][0].abs() <= 1


def test_a_covariance_that_cannot_be_factorised_rejects_its_element_alone():
    def potential(params: dict[str, Tensor]) -> Tensor:
        x = params["x"]
        # Beyond |x| = 1 the matrix of element 0 is not positive definite, and a factorisation raises for the whole
        # batch.
        corner = torch.where(torch.tensor([True, False]), 1.0 - x[:, 0] ** 2, torch.ones(2))
        zero = torch.zeros_like(corner)
        matrix = torch.stack([torch.stack([corner, zero], -1), torch.stack([zero, zero + 1], -1)], -2)
        normal = torch.distributions.MultivariateNormal(torch.zeros(2), covariance_matrix=matrix)
        return 0.5 * (x**2).sum(-1) - normal.log_prob(torch.ones(2, 2))

    kernel = BatchedHMC(potential_fn=potential, seed=1, step_size=1.0)
    kernel.initial_params = {"x": torch.zeros(2, 1)}
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(50):
        params = kernel.sample(params)
    assert kernel.statistics.diverging[0].any() and not kernel.statistics.diverging[1].any()
    assert params["x"][0].abs() < 1


def test_keyed_noise_is_uniform_normal_and_independent_of_batch_and_block():
    noise = KeyedNoise(5, batch_streams(None, (50, 4)))
    u = noise.uniform(Purpose.ACCEPT, 0, 100, 5)
    assert u.shape == (100, 50, 4, 5)
    counts = np.histogram(u, 50, (0, 1))[0]
    # χ² with 49 degrees of freedom exceeds 95 with probability 1e-4.
    assert ((counts - 2000) ** 2 / 2000).sum() < 95
    n = noise.normal(Purpose.MOMENTUM, 0, 100, 5)
    assert abs(n.mean()) < 4 / math.sqrt(n.size) and abs(n.var() - 1) < 4 * math.sqrt(2 / n.size)
    flat = n.reshape(100, 200, 5)
    pairs = [(flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1]), (flat[..., 1:], flat[..., :-1])]
    assert all(abs((a * b).mean()) < 4 / math.sqrt(a.size) for a, b in pairs)
    assert np.array_equal(noise.normal(Purpose.MOMENTUM, 30, 10, 5), n[30:40])
    alone = KeyedNoise(5, batch_streams([17], (1, 4)))
    assert np.array_equal(alone.normal(Purpose.MOMENTUM, 0, 100, 5)[:, 0], n[:, 17])


# Under Pyro


def test_summary_statistics_and_diagnostics_of_a_run_under_mcmc(capsys):
    kernel = BatchedHMC(eight_schools, seed=1)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run(3)
    mcmc.summary()
    assert "Number of divergences" in capsys.readouterr().out
    statistics = kernel.statistics
    assert isinstance(statistics, HMCStatistics)
    assert set(statistics._fields) == {
        "lp",
        "acceptance_rate",
        "step_size",
        "n_steps",
        "diverging",
        "energy",
        "energy_error",
    }
    assert all(value.shape == (3, 20) for value in statistics)
    assert mcmc.diagnostics()["statistics"]["chain 0"]["lp"].shape == (3, 20)
    assert (statistics.energy >= -statistics.lp).all()


def test_lp_is_the_model_density_with_the_log_determinant():
    def model() -> None:
        with pyro.plate("scene", 2):
            pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))

    mcmc = MCMC(kernel := BatchedHMC(model, seed=1), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    scale = mcmc.get_samples()["scale"].T
    # In log-scale a log-normal is a normal; equal up to rounding.
    assert torch.allclose(kernel.statistics.lp, dist.Normal(0.0, 1.0).log_prob(scale.log()), atol=1e-12)


def test_stepwise_use_follows_a_change_of_density_after_clear_cache():
    centre = torch.zeros(2, 1, dtype=torch.float64)
    kernel = BatchedHMC(potential_fn=lambda p: 0.5 * ((p["x"] - centre) ** 2).sum(-1), seed=1)
    kernel.initial_params = {"x": torch.zeros(2, 1, dtype=torch.float64)}
    kernel.setup(50)
    params = kernel.initial_params
    for _ in range(60):
        params = kernel.sample(params)
    centre += 100.0
    kernel.clear_cache()
    for _ in range(400):
        params = kernel.sample(params)
    assert (params["x"] - 100).abs().max() < 6
    assert kernel.statistics.lp.shape == (2, 410)


def test_sequential_chains_of_mcmc_differ():
    with pytest.warns(UserWarning, match="sequentially"):
        mcmc = MCMC(BatchedHMC(eight_schools), num_samples=3, warmup_steps=3, num_chains=99, disable_progbar=True)
    mcmc.num_chains = mcmc.sampler.num_chains = 2
    mcmc.run(2)
    samples = mcmc.get_samples(group_by_chain=True)["mu"]
    assert samples.shape == (2, 3, 2) and not torch.equal(samples[0], samples[1])


# Bad input


def expect(message: str, **arguments) -> None:
    start = arguments.pop("start", None)
    kernel = BatchedHMC(**arguments)
    with pytest.raises(InputError, match=message):
        MCMC(kernel, num_samples=5, warmup_steps=5, initial_params=start, disable_progbar=True).run()


def test_a_discrete_site_is_named_with_the_remedy():
    def model() -> None:
        with pyro.plate("scene", 2):
            pyro.sample("kind", dist.Bernoulli(torch.tensor(0.5)))

    expect("'kind' is discrete.*Gibbs", model=model)


def test_a_support_that_moves_with_another_site_is_named_with_the_remedy():
    def model() -> None:
        with pyro.plate("scene", 3):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(torch.zeros(3), s))

    expect("support of site 'x' depends on another.*share of the range", model=model)


def test_a_support_that_rests_is_not_named_though_the_model_is_defined_only_nearby():
    """A correlation of 0.6: half a unit further there is no covariance any more, and nothing moves."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).mask(torch.ones(2).bool()))
        one = torch.ones_like(x)
        covariance = torch.stack([torch.stack([one, x], -1), torch.stack([x, one], -1)], -1)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.zeros(2, 2))

    kernel = BatchedHMC(
        model, seed=0, init_strategy=pyro.infer.autoguide.init_to_value(values={"x": torch.full((2,), 0.6)})
    )
    kernel.setup(2)
    assert bool(torch.isfinite(kernel.sample(kernel.initial_params)["x"]).all())


def test_a_site_without_batch_dimensions_is_named():
    expect(r"'x' has shape \(\), but batch_dims=1", model=lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))


def test_an_observed_site_without_batch_dimensions_is_named():
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    expect("log_prob of site 'y' has shape", model=model)


def test_sites_of_different_batches_are_named():
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0))

    expect("'y' has shape.*'x'", model=model)


def test_a_scalar_potential_for_a_batch_is_refused():
    expect("one energy per element", potential_fn=lambda p: p["x"].square().sum(), start={"x": torch.zeros(3, 2)})


def test_a_start_without_finite_energy_names_the_element_and_the_site():
    start = torch.tensor([[1.0], [-1.0], [2.0]])
    expect("start of element 1 ", potential_fn=lambda p: p["x"].log().square().sum(-1), start={"x": start})

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("y", dist.Normal(x * torch.tensor([1.0, torch.nan]), 1.0), obs=torch.zeros(2))

    expect("start of element 1 .*'y' is not finite", model=model)


def test_an_improper_site_is_named():
    improper = dist.ImproperUniform(dist.constraints.real, (3,), ())
    expect("'u' is ImproperUniform.*proper prior", model=lambda: pyro.sample("u", improper))


def test_an_energy_that_does_not_confine_is_refused():
    expect(
        r"element 0.*coordinates \[0, 1\] have no influence",
        potential_fn=lambda p: 0.0 * p["x"][..., 1],
        start={"x": torch.zeros(1, 2)},
    )
    expect("cannot be normalised", potential_fn=lambda p: p["x"].sum(-1), start={"x": torch.zeros(1, 2).double()})


def test_chees_without_chains_to_pool_is_refused():
    expect(
        "chees=True pools",
        potential_fn=lambda p: 0.5 * p["x"].square().sum(-1),
        chees=True,
        start={"x": torch.zeros(3, 2)},
    )


def test_contradictory_or_impossible_options_are_refused():
    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.sum(-1), z

    for options, message in [
        ({"num_steps": 3, "trajectory_length": 1.0}, "both given"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"step_size": -1.0}, "step_size is -1"),
        ({"jitter": 2.0}, "jitter is 2"),
        ({"target_accept_prob": 1.0}, "target_accept_prob"),
        ({"max_num_steps": 0}, "max_num_steps"),
        ({"chees": True, "num_steps": 3}, "num_steps cannot be fixed"),
        ({"batch_dims": 0}, "batch_dims is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            BatchedHMC(value_and_grad_fn=function, **options)
    with pytest.raises(InputError, match="exactly one"):
        BatchedHMC()
    with pytest.raises(InputError, match="initial_params are needed"):
        BatchedHMC(value_and_grad_fn=function).setup(1)
    with pytest.raises(InputError, match="set up"):
        BatchedHMC(value_and_grad_fn=function).sample({})
    with pytest.raises(InputError, match="does not lead"):
        sample_batch(function, torch.zeros(3, 2), num_samples=1, warmup_steps=0, seed=0, streams=[1, 2])
