"""Calibration on pictures whose law given a gaze is known exactly: ranks of the truth, and Geweke's joint test.

Pictures I₀ ~ N(0, C) of 32 × 32 pixels, C = K ⊗ K + nugget · 1; the features of a gaze are the 6 × 6 patch read
bilinearly, z = A_u I. Replacing the law of z by the object's and keeping the rest of the picture, I = I₀ + C A_uᵀ (A_u
C A_uᵀ)⁻¹ (z − A_u I₀), gives p(I | u) = p_c(I) p_o(z) / p_c(z | u) exactly (Baggenstoss's projection theorem). Gazes
are coordinates (centre x, centre y, log-scale about 1.6, rotation).
"""

import math

import pytest
import torch
from pyro.infer import MCMC
from scipy import stats
from torch import Tensor

from foveate.inference.gibbs import ElementNoise, HMCWithinGibbs
from foveate.inference.hmc import BatchedHMC
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer
from foveate.model.density import EllipticalDensity
from foveate.model.rbm import BernoulliRBM

SIDE, POINTS = 32, 6
NUGGET = 0.05
# At this scale neighbouring points do not read the same pixels, or the covariance of the features would be singular.
SCALE = 1.6
# Prior sds of the gaze's coordinates: centre (pixels from the middle), log-scale, rotation.
PRIOR_SD = torch.tensor([1.0, 1.0, 0.08, 0.15], dtype=torch.float64)

_AXIS = torch.arange(SIDE, dtype=torch.float64)
_KERNEL = torch.exp(-0.5 * ((_AXIS[:, None] - _AXIS) / 1.5) ** 2)


def draw_gaze(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) coordinates from the prior."""
    return PRIOR_SD * torch.randn(count, 4, generator=generator, dtype=torch.float64)


def energy_of_prior(u: Tensor) -> Tensor:
    return 0.5 * ((u / PRIOR_SD) ** 2).sum(-1)


def clutter_pictures(count: int, generator: torch.Generator) -> Tensor:
    """(count, 32, 32) draws of N(0, C)."""
    factor = torch.linalg.cholesky(_KERNEL + 1e-9 * torch.eye(SIDE, dtype=torch.float64))
    smooth = factor @ torch.randn(count, SIDE, SIDE, generator=generator, dtype=torch.float64) @ factor.T
    return smooth + math.sqrt(NUGGET) * torch.randn(count, SIDE, SIDE, generator=generator, dtype=torch.float64)


def readings(u: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear weights of each point along x and along y: (n, 36, 32) each, differentiable in u."""
    scale, middle = SCALE * torch.exp(u[:, 2]), (SIDE - 1) / 2
    offsets = torch.arange(POINTS, dtype=torch.float64) - (POINTS - 1) / 2
    py, px = (grid.flatten() for grid in torch.meshgrid(offsets, offsets, indexing="ij"))
    a, b = (scale * torch.cos(u[:, 3]))[:, None], (scale * torch.sin(u[:, 3]))[:, None]
    x, y = a * px - b * py + u[:, :1] + middle, b * px + a * py + u[:, 1:2] + middle
    along_x, along_y = ((1 - (at.clamp(0, SIDE - 1)[..., None] - _AXIS).abs()).clamp(min=0) for at in (x, y))
    return along_x, along_y


def features(u: Tensor, pictures: Tensor) -> Tensor:
    """Features A_u I: (n, 36), differentiable in u."""
    along_x, along_y = readings(u)
    return ((along_y @ pictures) * along_x).sum(-1)


def clutter_covariance(u: Tensor) -> Tensor:
    """Covariance A_u C A_uᵀ: (n, 36, 36), differentiable in u. Both parts of C are products of a factor per axis."""
    x, y = readings(u)
    smooth = (x @ _KERNEL @ x.mT) * (y @ _KERNEL @ y.mT)
    return smooth + NUGGET * (x @ x.mT) * (y @ y.mT)


def clutter_log_prob(u: Tensor, z: Tensor) -> Tensor:
    """Log density N(z; 0, A_u C A_uᵀ) up to a constant: (n,)."""
    # A gaze far outside the prior reads too few pixels, and its covariance is singular: no number, so that it is
    # rejected.
    factor, failed = torch.linalg.cholesky_ex(clutter_covariance(u))
    factor = factor.masked_fill(failed[:, None, None] != 0, math.nan)
    white = torch.linalg.solve_triangular(factor, z[..., None], upper=False)[..., 0]
    return -0.5 * (white**2).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def picture_given(u: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """A picture whose features at u are z and whose rest is clutter: (n, 32, 32)."""
    pictures = clutter_pictures(len(u), generator)
    weight = torch.linalg.solve(clutter_covariance(u), z - features(u, pictures))
    x, y = readings(u)
    pictures = pictures + torch.einsum("np,npy,npx->nyx", weight, y @ _KERNEL, x @ _KERNEL)
    pictures = pictures + NUGGET * torch.einsum("np,npy,npx->nyx", weight, y, x)
    return pictures


def object_density() -> torch.distributions.MultivariateNormal:
    """A blob that is brighter on one side, of variable contrast: it tells the gaze to some tenths of a pixel."""
    offsets = torch.arange(6, dtype=torch.float64) - 2.5
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    mean = (2.0 * torch.exp(-(x**2 + 2 * y**2) / 8) + 0.3 * x).flatten()
    covariance = 0.15 * torch.eye(36, dtype=torch.float64) + 0.05 * torch.outer(mean, mean)
    return torch.distributions.MultivariateNormal(mean, covariance)


def simulate(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gazes from the prior and pictures that show the object there."""
    generator = torch.Generator().manual_seed(seed)
    u = draw_gaze(count, generator)
    density = object_density()
    noise = torch.randn(count, 36, generator=generator, dtype=torch.float64)
    z = density.mean + noise @ torch.linalg.cholesky(density.covariance_matrix).T
    return u, picture_given(u, z, generator)


def energy(u: Tensor, pictures: Tensor) -> Tensor:
    """Minus the log of prior × odds: the posterior of the gaze of each picture."""
    z = features(u, pictures)
    return energy_of_prior(u) - object_density().log_prob(z) + clutter_log_prob(u, z)


def test_a_simulated_picture_has_the_features_it_was_made_for_and_its_clutter_the_stated_law():
    generator = torch.Generator().manual_seed(0)
    u = draw_gaze(50, generator)
    z = torch.randn(50, 36, generator=generator, dtype=torch.float64)
    # A linear solve with a condition number below 1e4.
    assert torch.allclose(features(u, picture_given(u, z, generator)), z, atol=1e-9)
    one = u[:1].expand(4000, 4)
    sampled = torch.cov(features(one, clutter_pictures(4000, generator)).T)
    expected = clutter_covariance(u[:1])[0]
    # An entry of a sample covariance of 4000 draws has an sd of at most sqrt(2 / 4000) times the variance; five of
    # them.
    assert (sampled - expected).abs().max() < 5 * (2 / 4000) ** 0.5 * expected.diagonal().max()


@pytest.mark.slow
def test_ranks_of_the_true_gaze_among_posterior_draws_are_uniform():
    replications, draws, thin = 520, 99, 2
    u, pictures = simulate(replications, seed=1)
    kernel = BatchedHMC(potential_fn=lambda p: energy(p["u"], pictures), max_num_steps=8, seed=2)
    mcmc = MCMC(
        kernel,
        num_samples=draws * thin,
        warmup_steps=120,
        initial_params={"u": torch.zeros_like(u)},
        disable_progbar=True,
    )
    mcmc.run()
    samples = mcmc.get_samples()["u"][thin - 1 :: thin]
    assert kernel.statistics.diverging.float().mean() < 0.001
    ranks = (samples < u).sum(0)
    for coordinate in range(4):
        counts = torch.bincount(ranks[:, coordinate] // 5, minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01


# Geweke, "Getting it right: joint distribution tests of posterior simulators" (JASA 2004)

NOISE = 0.4


def small_net() -> DeepBeliefNet:
    """Four hidden units over 36 pixels, with overlapping features so that the recognition posterior would be wrong."""
    generator = torch.Generator().manual_seed(11)
    layer, top = DiagonalLayer(4, 36).double(), BernoulliRBM(4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(0.6 * torch.randn(36, 4, generator=generator, dtype=torch.float64) + 0.5)
        layer.visible_bias.copy_(torch.randn(36, generator=generator, dtype=torch.float64))
        layer.log_sigma.fill_(math.log(0.5))
    top.randomise(1.0, generator)
    return DeepBeliefNet(layer, top, EllipticalDensity.blank(36, torch.float64))


def draw_joint(net: DeepBeliefNet, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Gaze, hidden units and canonical image from the prior; the hidden ones by enumeration."""
    states = torch.tensor([[(i >> j) & 1 for j in range(4)] for i in range(16)], dtype=torch.float64)
    with torch.no_grad():
        probability = torch.softmax(-net.top.free_energy(states), 0)
        h = states[torch.multinomial(probability, count, replacement=True, generator=generator)]
        return draw_gaze(count, generator), h, net.layer.sample(h, generator)


def show(u: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures given gaze and canonical image."""
    z = v + NOISE * torch.randn(v.shape, generator=generator, dtype=torch.float64)
    return picture_given(u, z, generator)


def geweke_p_values(update: str, count: int, rounds: int) -> list[float]:
    """From the joint law on, alternate kernel and data; p-values of the latents' moments against fresh draws of it."""
    generator = torch.Generator().manual_seed(3)
    net = small_net()
    u, h, v = draw_joint(net, count, generator)
    data = {"pictures": show(u, v, generator)}

    def energy_given(values: dict[str, Tensor]):
        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = z.detach().requires_grad_(True)
                seen = features(z, data["pictures"])
                energy = energy_of_prior(z) + 0.5 * ((seen - values["canonical"]) ** 2).sum(-1) / NOISE**2
                energy = energy + clutter_log_prob(z, seen)
                (gradient,) = torch.autograd.grad(energy.sum(), z)
            return energy.detach(), gradient

        return value_and_grad

    def hidden(values: dict[str, Tensor], noise: ElementNoise) -> Tensor:
        return net.gibbs_hidden(values["canonical"], values["hidden"], noise.generator, update=update)

    def canonical(values: dict[str, Tensor], noise: ElementNoise) -> Tensor:
        seen = features(values["gaze"], data["pictures"])
        return net.gibbs_canonical(seen, NOISE, values["canonical"], values["hidden"], noise.generator)

    kernel = HMCWithinGibbs(
        potential=energy_given, updates={"hidden": hidden, "canonical": canonical}, seed=4, step_size=0.012, num_steps=8
    )
    kernel.initial_params = {"gaze": u, "hidden": h, "canonical": v}
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(rounds):
        params = kernel.sample(params)
        data["pictures"] = show(params["gaze"], params["canonical"], generator)
    assert 0.3 < kernel.statistics.acceptance_rate.mean() < 0.999
    fresh = draw_joint(net, count, generator)

    def moments(u: Tensor, h: Tensor, v: Tensor) -> Tensor:
        pairs = h[:, :, None] * h[:, None, :]
        above, beside = torch.triu_indices(4, 4, 1)
        mean = v.mean(-1)
        parts = [u, u**2, h, pairs[:, above, beside], v[:, ::7], v[:, ::7] ** 2, h * mean[:, None], (u * mean[:, None])]
        return torch.cat(parts, -1)

    ours = moments(params["gaze"], params["hidden"], params["canonical"])
    return [float(stats.ttest_ind(a, b).pvalue) for a, b in zip(ours.T.numpy(), moments(*fresh).T.numpy(), strict=True)]


@pytest.mark.slow
def test_the_kernel_leaves_the_joint_law_of_latents_and_pictures_as_it_is():
    p_values = geweke_p_values("exact", count=2000, rounds=12)
    # Bonferroni: the least of m p-values of a right sampler is below 0.01 / m in one of a hundred seeds.
    assert min(p_values) > 0.01 / len(p_values)


@pytest.mark.slow
def test_the_papers_recognition_update_is_found_to_be_biased():
    p_values = geweke_p_values("recognition", count=2000, rounds=12)
    assert min(p_values) < 1e-6
