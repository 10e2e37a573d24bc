"""The Student-t that leaps through a mode: its density and draws, its adaptation, and chains that keep their target."""

import math

import arviz
import pytest
import torch
from scipy import stats
from torch import Tensor

from foveate.inference.adaptation import HMCOptions
from foveate.inference.hmc import Chains, sample_batch
from foveate.inference.noise import KeyedNoise, Purpose, batch_streams
from foveate.inference.proposal import DEGREES, LEAST_VARIANCE, StudentProposal, adapted_proposal, spread_points

MEAN = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.1, 0.2, 0.9, 0], [0.05, 0, -0.3, 0.2]], dtype=torch.float64)


def normals_and_uniforms(count: int) -> tuple[Tensor, Tensor]:
    noise = KeyedNoise(5, batch_streams(None, (count,)))
    normal = noise.normal(Purpose.LEAP, 0, 1, 4)[0]
    return torch.from_numpy(normal), torch.from_numpy(noise.uniform(Purpose.LEAP_TAIL, 0, 1, 2)[0])


def standard(scenes: int) -> StudentProposal:
    return StudentProposal(torch.zeros(scenes, 1, 4).double(), torch.eye(4).double().expand(scenes, 1, 4, 4))


def log_normal(z: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(z)


def test_the_density_is_that_of_scipy() -> None:
    proposal = StudentProposal(MEAN, ROOT)
    z = MEAN + 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = stats.multivariate_t(MEAN.numpy(), (ROOT @ ROOT.T).numpy(), df=DEGREES).logpdf(z.numpy())
    torch.testing.assert_close(proposal.log_prob(z), torch.from_numpy(expected), rtol=1e-10, atol=0)


def test_densities_of_scenes_broadcast_against_their_points() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
    many = StudentProposal(mean, torch.stack([ROOT, 2 * ROOT, 0.5 * ROOT])[:, None])
    z = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    one_by_one = torch.stack([StudentProposal(m[0], r[0]).log_prob(p) for m, r, p in zip(*many[:2], z, strict=True)])
    torch.testing.assert_close(many.log_prob(z), one_by_one, rtol=1e-12, atol=0)


def test_draws_have_the_law_of_the_density() -> None:
    z = StudentProposal(MEAN, ROOT).place(*normals_and_uniforms(20_000))
    white = torch.linalg.solve_triangular(ROOT, (z - MEAN).T, upper=False).T
    # Squared lengths over d have Fisher's law, single coordinates Student's. Four tests: one false alarm in 2500.
    assert stats.kstest(white.square().sum(-1).numpy() / 4, stats.f(4, DEGREES).cdf).pvalue > 1e-4
    for k in (0, 2, 3):
        scale = float((ROOT @ ROOT.T)[k, k].sqrt())
        assert stats.kstest((z[:, k] - MEAN[k]).numpy() / scale, stats.t(DEGREES).cdf).pvalue > 1e-4


def test_adaptation_finds_the_mean_and_covariance_of_a_normal() -> None:
    covariance = ROOT @ ROOT.T
    proposal = StudentProposal(torch.zeros(1, 1, 4).double(), 1.5 * torch.eye(4).double()[None, None])
    for seed in range(3):
        z = spread_points(proposal, seed)
        proposal = adapted_proposal(-log_normal(z, MEAN, covariance), z, proposal.log_prob(z))

    def white(columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(ROOT, columns, upper=False)

    # In units of the normal's own axes. 200 of the 256 points count; independent ones would err by 0.07 and 0.1, the
    # Sobol set's by half of it (0.037 and 0.084 were the largest of four scramblings). A scale off by a tenth is 0.21.
    assert bool((white(proposal.mean[0].T - MEAN[:, None]).abs() < 0.1).all())
    found = white(proposal.scale_tril[0, 0])
    added = white(math.sqrt(LEAST_VARIANCE) * torch.eye(4).double())
    expected = torch.eye(4).double() + added @ added.T
    torch.testing.assert_close(found @ found.T, expected, rtol=0, atol=0.15)


def test_one_point_far_ahead_does_not_make_it_narrow() -> None:
    z = spread_points(standard(2), 0)
    energy = 0.5 * z.square().sum(-1)
    energy[0, 17] -= 1000
    energy[1, 3:] = math.inf
    proposal = adapted_proposal(energy, z, torch.zeros_like(energy))
    assert bool(torch.isfinite(proposal.scale_tril).all())
    # Two dozen points have their say in the first scene; in the second there are three.
    assert bool((proposal.scale_tril[0, 0].diagonal() > 0.2).all())
    assert bool((proposal.scale_tril[1, 0].diagonal() >= math.sqrt(1e-3) - 1e-12).all())


def test_a_scene_is_adapted_to_as_if_it_were_alone() -> None:
    z = spread_points(standard(3), 0)
    energy = torch.stack([0.5 * z[0].square().sum(-1), 40 * z[1].square().sum(-1), 5000 * z[2].square().sum(-1)])
    log_q = torch.zeros_like(energy)
    together = adapted_proposal(energy, z, log_q)
    alone = adapted_proposal(energy[1:2], z[1:2], log_q[1:2])
    torch.testing.assert_close(together.scale_tril[1:2], alone.scale_tril, rtol=1e-12, atol=0)
    torch.testing.assert_close(together.mean[1:2], alone.mean, rtol=1e-12, atol=1e-14)


WELLS = torch.tensor([[-4.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)


def two_wells(z: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and gradient of two normals of sd ½ whose means are eight apart."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        squares = (z[..., None, :] - WELLS).square().sum(-1) / 0.5**2
        energy = -(SHARES.log() - 0.5 * squares).logsumexp(-1)
        (gradient,) = torch.autograd.grad(energy.sum(), z)
    return energy.detach(), gradient


def test_leaps_find_the_weights_of_wells_that_trajectories_never_leave() -> None:
    start = WELLS[:1].expand(8, 2).clone()
    options = {"num_samples": 2000, "warmup_steps": 200, "seed": 3}
    stuck, _ = sample_batch(two_wells, start, **options)
    assert bool((stuck[..., 0] < 0).all())
    proposal = StudentProposal(torch.zeros(2).double(), torch.diag(torch.tensor([3.5, 0.8]).double()))
    draws, statistics = sample_batch(two_wells, start, proposal=proposal, **options)
    right = (draws[..., 0] > 0).double()
    mcse = float(right.std()) / math.sqrt(arviz.ess(right.numpy()))
    # Four standard errors: one false alarm in 16 000.
    assert mcse < 0.02 and abs(float(right.mean()) - 0.7) < 4 * mcse
    # What is recorded is of the position that is kept.
    torch.testing.assert_close(statistics.lp, -two_wells(draws)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [0.3, 3.0], ids=["too narrow", "too wide"])
def test_a_proposal_that_is_wrong_leaves_the_target_what_it_is(factor: float) -> None:
    covariance = ROOT @ ROOT.T
    precision = torch.linalg.inv(covariance)

    def normal(z: Tensor) -> tuple[Tensor, Tensor]:
        gradient = (z - MEAN) @ precision
        return 0.5 * (gradient * (z - MEAN)).sum(-1), gradient

    proposal = StudentProposal(MEAN + 0.5, factor * ROOT)
    draws, _ = sample_batch(
        normal, MEAN.expand(16, 4).clone(), num_samples=1500, warmup_steps=200, seed=4, proposal=proposal
    )
    for k in range(4):
        x, sd = draws[..., k].numpy(), math.sqrt(covariance[k, k])
        square = (x - float(MEAN[k])) ** 2
        # Four standard errors in sixteen comparisons: one false alarm in a thousand.
        assert abs(x.mean() - float(MEAN[k])) < 4 * sd / math.sqrt(arviz.ess(x))
        assert abs(square.mean() - sd**2) < 4 * square.std() / math.sqrt(arviz.ess(square, method="mean"))


@pytest.mark.parametrize("missing", ["energy", "gradient"])
def test_a_leap_to_where_no_trajectory_could_begin_is_refused(missing: str) -> None:
    def half(z: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = 0.5 * z.square().sum(-1), z.clone()
        beyond = z[..., 0] > 1
        if missing == "energy":
            return torch.where(beyond, math.nan, energy), gradient
        return energy, torch.where(beyond[..., None], math.nan, gradient)

    proposal = StudentProposal(torch.tensor([2.0]).double(), torch.eye(1).double())
    draws, statistics = sample_batch(
        half, torch.zeros(4, 1).double(), num_samples=300, warmup_steps=50, seed=0, proposal=proposal
    )
    assert bool((draws <= 1).all()) and bool(torch.isfinite(statistics.lp).all())
    assert bool((statistics.step_size > 1e-2).all())


def leaping(start: Tensor, proposal: StudentProposal, count: int) -> Chains:
    """Chains of a standard normal that have leapt `count` times, without a trajectory in between."""
    chains = Chains(
        gaussian, start, HMCOptions(), 0, 6, batch_streams(None, tuple(start.shape[:-1])), proposal=proposal
    )
    for _ in range(count):
        chains._leap(proposal, *chains._numbers()[3:])
        chains.draw += 1
    return chains


def gaussian(z: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * z.square().sum(-1), z.clone()


def test_after_a_leap_energy_and_gradient_are_those_of_the_position() -> None:
    start = torch.randn(50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    chains = leaping(start, StudentProposal(torch.zeros(3).double(), torch.eye(3).double()), 3)
    assert bool((chains.position != start).any(-1).double().mean() > 0.8)
    energy, gradient = gaussian(chains.position)
    assert torch.equal(chains.energy, energy) and torch.equal(chains.gradient, gradient)


def test_leaps_alone_keep_the_law_of_exact_draws() -> None:
    start = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chains = leaping(start, StudentProposal(torch.tensor([0.7]).double(), torch.tensor([[0.6]]).double()), 20)
    # One false alarm in ten thousand.
    assert stats.kstest(chains.position[:, 0].numpy(), stats.norm.cdf).pvalue > 1e-4
    assert float((chains.position != start).double().mean()) > 0.5


def test_leaps_begin_and_end_within_and_keep_the_law_there() -> None:
    start = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def within(z: Tensor) -> Tensor:
        return z[..., 0] < 0.5

    proposal = StudentProposal(torch.tensor([0.7]).double(), torch.tensor([[0.6]]).double(), within)
    chains = leaping(start, proposal, 2)
    outside = start[:, 0] >= 0.5
    assert torch.equal(chains.position[outside], start[outside])
    assert bool((chains.position[~outside] < 0.5).all())
    assert float((chains.position != start)[~outside].double().mean()) > 0.3
    assert stats.kstest(chains.position[:, 0].numpy(), stats.norm.cdf).pvalue > 1e-4


def test_a_proposal_follows_the_dtype_of_the_start() -> None:
    proposal = StudentProposal(torch.zeros(2).double(), torch.eye(2).double())
    draws, _ = sample_batch(gaussian, torch.zeros(3, 2), num_samples=2, warmup_steps=1, seed=0, proposal=proposal)
    assert draws.dtype == torch.float32
