"""HMC within Gibbs: exact on a small model, under Pyro's MCMC, keyed by element, and its refusals."""

import inspect
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from torch import Tensor

from foveate.inference.gibbs import ElementNoise, HMCWithinGibbs, attention_kernel
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError
from foveate.model.rbm import BernoulliRBM

OBSERVED = torch.tensor([-1.5, 0.2, 2.5], dtype=torch.float64)
CENTRES = torch.tensor([-2.0, 1.0], dtype=torch.float64)


def mixture(observed: Tensor) -> None:
    """Observed: y ~ N(x, s²), x ~ N(centre of kind, 1), kind ~ Bernoulli(0.3), log s ~ N(0, 0.5²)."""
    zero = torch.zeros((), dtype=torch.float64)
    with pyro.plate("scene", observed.shape[0], dim=-2), pyro.plate("chain", observed.shape[1], dim=-1):
        kind = pyro.sample("kind", dist.Bernoulli(zero + 0.3))
        x = pyro.sample("x", dist.Normal(CENTRES[kind.long()], 1.0))
        scale = pyro.sample("scale", dist.LogNormal(zero, 0.5))
        pyro.sample("y", dist.Normal(x, scale), obs=observed)


def draw_kind(values: dict[str, Tensor], noise: ElementNoise) -> Tensor:
    log_odds = math.log(0.3 / 0.7) - 0.5 * ((values["x"] - CENTRES[1]) ** 2 - (values["x"] - CENTRES[0]) ** 2)
    return (noise.uniform() < torch.sigmoid(log_odds)).to(values["x"])


def mixture_potential(observed: Tensor):
    """The energy of x and log s given the kind, in closed form; coordinates in sorted order: log s, x."""

    def given(values: dict[str, Tensor]):
        centre = CENTRES[values["kind"].long()]

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            log_s, x = z.unbind(-1)
            square = ((observed - x) / log_s.exp()) ** 2
            energy = 0.5 * (x - centre) ** 2 + 2 * log_s**2 + 0.5 * square + log_s
            of_x = (x - centre) - (observed - x) * torch.exp(-2 * log_s)
            return energy, torch.stack([4 * log_s - square + 1, of_x], -1)

        return value_and_grad

    return given


def exact_moments(observed: float) -> tuple[float, float, float]:
    """P(kind = 1), E x and E log s by quadrature over log s."""
    log_s = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    variance = 1 + torch.exp(2 * log_s)
    prior = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    away = observed - CENTRES[:, None]
    log_weight = prior[:, None] - 0.5 * (variance.log() + away**2 / variance) - 2 * log_s**2
    weight = (log_weight - log_weight.flatten().logsumexp(0)).exp()
    mean = CENTRES[:, None] + away / variance
    return float(weight[1].sum()), float((weight * mean).sum()), float((weight * log_s).sum())


@pytest.mark.parametrize("by", ["model", "potential"])
def test_a_mixture_has_its_exact_moments_under_mcmc(by, capsys):
    chains, draws = 24, 400
    observed = OBSERVED[:, None].expand(3, chains)
    options: dict[str, Any] = {"updates": {"kind": draw_kind}, "batch_dims": 2, "seed": 5}
    if by == "model":
        kernel = HMCWithinGibbs(mixture, **options)
        start = None
    else:
        kernel = HMCWithinGibbs(potential=mixture_potential(observed), **options)
        start = {name: torch.zeros(3, chains, dtype=torch.float64) for name in ("kind", "scale", "x")}
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=150, initial_params=start, disable_progbar=True)
    mcmc.run(observed)
    samples = mcmc.get_samples()
    log_s = samples["scale"].log() if by == "model" else samples["scale"]
    for scene in range(3):
        for x, expected in zip(
            (samples["kind"], samples["x"], log_s), exact_moments(float(OBSERVED[scene])), strict=True
        ):
            means = x[:, scene].mean(0)
            # The chains are independent: the standard error comes from their means. Four of them.
            assert abs(means.mean() - expected) < 4 * means.std() / math.sqrt(chains)
    mcmc.summary()
    assert "kind" in capsys.readouterr().out
    assert kernel.statistics.lp.shape == (3, chains, draws)


def test_draws_of_a_scene_do_not_depend_on_what_shares_its_batch():
    def run(scenes: list[int]) -> dict[str, Tensor]:
        observed = OBSERVED[scenes][:, None].expand(-1, 2)
        start = {name: torch.zeros(len(scenes), 2, dtype=torch.float64) for name in ("kind", "scale", "x")}
        kernel = HMCWithinGibbs(
            potential=mixture_potential(observed),
            updates={"kind": draw_kind},
            batch_dims=2,
            seed=5,
            streams=scenes,
            hmc_steps=2,
        )
        mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, initial_params=start, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()

    together, alone = run([0, 1, 2]), run([2])
    for name, value in alone.items():
        assert torch.equal(value[:, 0], together[name][:, 2])


def test_several_numbers_of_one_update_differ():
    seen = []

    def update(values: dict[str, Tensor], noise: ElementNoise) -> Tensor:
        seen.append((noise.uniform(2), noise.uniform(2), noise.normal(3)))
        return draw_kind(values, noise)

    observed = OBSERVED[:, None]
    kernel = HMCWithinGibbs(mixture, updates={"kind": update}, batch_dims=2, seed=1)
    MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True).run(observed)
    flat = torch.cat([part.flatten() for group in seen for part in group])
    assert seen[0][2].shape == (3, 1, 3)
    assert flat.unique().numel() == flat.numel()


@pytest.mark.parametrize("update", ["exact", "recognition"])
def test_the_attention_model_runs_with_hidden_and_canonical_by_gibbs_and_the_gaze_by_hmc(update):
    generator = torch.Generator().manual_seed(2)
    layer, top = DiagonalLayer(4), BernoulliRBM(4, 3)
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.randn(575, 4, generator=generator))
    dbn = DeepBeliefNet(layer, top, EllipticalDensity.blank(575))
    dbn.set_log_z(0.0, 0.0)
    model = AttentionModel(dbn, ClutterModel(EllipticalDensity.blank(575)), noise=0.5, temperature=0.5)
    pictures = [torch.rand(40, 60, generator=generator), torch.rand(50, 44, generator=generator)]
    start = {
        "gaze": torch.tensor([[1.0, 0.0, 30.0, 20.0], [1.2, 0.1, 22.0, 25.0]]),
        "hidden": torch.zeros(2, 4),
        "canonical": torch.zeros(2, 575),
    }
    kernel = attention_kernel(model, pictures, hidden_update=update, seed=1, step_size=0.01, num_steps=3)
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=6, initial_params=start, disable_progbar=True)
    mcmc.run(pictures)
    samples = mcmc.get_samples()
    assert samples["gaze"].shape == (6, 2, 4) and samples["canonical"].shape == (6, 2, 575)
    assert ((samples["hidden"] == 0) | (samples["hidden"] == 1)).all()
    assert kernel.statistics.acceptance_rate.mean() > 0.1
    # v sees the patch, of variance 1, at noise 0.5 √0.5, and its prior at a noise of 1: closer to the patch than that.
    assert samples["canonical"].std() < 1.0
    with pytest.raises(InputError, match="no site 'hidden'"):
        attention_kernel(model.with_latent("collapsed"), pictures)
    with pytest.raises(InputError, match="hidden_update='guess'"):
        inspect.unwrap(attention_kernel)(model, pictures, hidden_update="guess")
    with pytest.raises(InputError, match="made for other pictures"):
        mcmc.run([1 - p for p in pictures])


@pytest.mark.parametrize("update", ["exact", "recognition"])
def test_the_kernels_updates_are_the_programs_conditionals(monkeypatch: pytest.MonkeyPatch, update: Any) -> None:
    dbn = DeepBeliefNet(DiagonalLayer(4), BernoulliRBM(4, 3), EllipticalDensity.blank(575))
    dbn.set_log_z(0.0, 0.0)
    model = AttentionModel(dbn, ClutterModel(EllipticalDensity.blank(575)), noise=0.5, temperature=4.0)
    noises: set[float] = set()
    updates: set[str] = set()
    seeds: list[int] = []

    def canonical(self: Any, seen: Tensor, noise: float, v: Tensor, h: Tensor, generator: torch.Generator) -> Tensor:
        noises.add(noise)
        seeds.append(generator.initial_seed())
        return v

    def hidden(self: Any, v: Tensor, h: Tensor, generator: torch.Generator, *, update: str) -> Tensor:
        updates.add(update)
        seeds.append(generator.initial_seed())
        return h

    monkeypatch.setattr(DeepBeliefNet, "gibbs_canonical", canonical)
    monkeypatch.setattr(DeepBeliefNet, "gibbs_hidden", hidden)
    pictures = [torch.rand(40, 60)]
    kernel = attention_kernel(model, pictures, hidden_update=update, seed=1, step_size=0.01, num_steps=2)
    start = torch.tensor([[1.0, 0.0, 30.0, 20.0]])
    kernel.initial_params = {"gaze": start, "hidden": torch.zeros(1, 4), "canonical": torch.zeros(1, 575)}
    kernel.setup(0, pictures)
    params = kernel.initial_params
    for _ in range(3):
        params = kernel.sample(params)
    # A normal likelihood to the power 1 / T has σ √T; exact in binary.
    assert noises == {1.0} and updates == {update}
    # Every update of every round has random numbers of its own.
    assert len(set(seeds)) == len(seeds) == 6


def test_bad_arguments_are_refused():
    observed = OBSERVED[:, None]
    with pytest.raises(InputError, match="exactly one of model and potential"):
        HMCWithinGibbs(updates={"kind": draw_kind})
    with pytest.raises(InputError, match="no Gibbs update"):
        HMCWithinGibbs(mixture, updates={})
    with pytest.raises(InputError, match="hmc_steps is 0"):
        HMCWithinGibbs(mixture, updates={"kind": draw_kind}, hmc_steps=0)
    with pytest.raises(InputError, match="'sort', which is no latent site"):
        HMCWithinGibbs(mixture, updates={"sort": draw_kind}, batch_dims=2).setup(1, observed)
    with pytest.raises(InputError, match="no initial value for site 'kind'"):
        HMCWithinGibbs(potential=mixture_potential(observed), updates={"kind": draw_kind}).setup(1)
    wrong = HMCWithinGibbs(mixture, updates={"kind": lambda values, noise: torch.zeros(7)}, batch_dims=2)
    wrong.setup(1, observed)
    with pytest.raises(InputError, match=r"'kind' returned shape \(7,\)"):
        wrong.sample(wrong.initial_params)
