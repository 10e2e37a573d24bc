"""The Student-t that leaps through a mode: its density and draws, its adaptation, and chains that keep their target."""

import math

import arviz
import pytest
import torch
from scipy import stats
from torch import Tensor

from foveate.inference.hmc import sample_batch
from foveate.inference.noise import KeyedNoise, Purpose, batch_streams
from foveate.inference.proposal import DEGREES, StudentProposal, adapted_proposal, spread_points

MEAN = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.1, 0.2, 0.9, 0], [0.05, 0, -0.3, 0.2]], dtype=torch.float64)


def normals_and_uniforms(count: int) -> tuple[Tensor, Tensor]:
    noise = KeyedNoise(5, batch_streams(None, (count,)))
    normal = noise.normal(Purpose.LEAP, 0, 1, 4)[0]
    return torch.from_numpy(normal), torch.from_numpy(noise.uniform(Purpose.LEAP_TAIL, 0, 1, 2)[0])


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
    one_by_one = torch.stack([StudentProposal(m[0], r[0]).log_prob(p) for m, r, p in zip(*many, z, strict=True)])
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
    for _ in range(3):
        z = spread_points(proposal)
        proposal = adapted_proposal(-log_normal(z, MEAN, covariance), z, proposal.log_prob(z))
    # 256 points, of which some 200 count: errors of the mean are sd / √200 or less, of a variance √(2 / 200); three of
    # them, and the variance that is added at least.
    away = torch.linalg.solve_triangular(ROOT, (proposal.mean[0, 0] - MEAN)[:, None], upper=False)
    assert float(away.norm()) < 3 * 2 / math.sqrt(200)
    found = proposal.scale_tril[0, 0] @ proposal.scale_tril[0, 0].T
    ratio = found.diagonal() / covariance.diagonal()
    assert bool(((ratio - 1).abs() < 0.3 + 1e-3 / covariance.diagonal()).all())
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.15)


def test_one_point_far_ahead_does_not_make_it_narrow() -> None:
    z = spread_points(
        StudentProposal(torch.zeros(2, 1, 4).double(), torch.eye(4).double()[None, None].expand(2, 1, 4, 4))
    )
    energy = 0.5 * z.square().sum(-1)
    energy[0, 17] -= 1000
    energy[1, 3:] = math.inf
    proposal = adapted_proposal(energy, z, torch.zeros_like(energy))
    assert bool(torch.isfinite(proposal.scale_tril).all())
    # Two dozen points have their say in the first scene; in the second there are three.
    assert bool((proposal.scale_tril[0, 0].diagonal() > 0.2).all())
    assert bool((proposal.scale_tril[1, 0].diagonal() >= math.sqrt(1e-3) - 1e-12).all())


def test_a_scene_is_adapted_to_as_if_it_were_alone() -> None:
    z = spread_points(
        StudentProposal(torch.zeros(3, 1, 4).double(), torch.eye(4).double()[None, None].expand(3, 1, 4, 4))
    )
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


def test_a_leap_to_where_there_is_no_energy_is_refused() -> None:
    def half(z: Tensor) -> tuple[Tensor, Tensor]:
        energy = 0.5 * z.square().sum(-1)
        return torch.where(z[..., 0] > 1, math.nan, energy), z.clone()

    proposal = StudentProposal(torch.tensor([2.0]).double(), torch.eye(1).double())
    draws, statistics = sample_batch(
        half, torch.zeros(4, 1).double(), num_samples=300, warmup_steps=50, seed=0, proposal=proposal
    )
    assert bool((draws <= 1).all()) and bool(torch.isfinite(statistics.lp).all())
