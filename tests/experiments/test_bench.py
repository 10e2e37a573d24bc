"""The bench's rows on a small problem; the peers on JAX where they are installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.experiments import bench, peers
from foveate.experiments.bench import SAMPLERS, Bench
from foveate.model.errors import InputError

KEYS = {"sampler", "us_per_leapfrog", "cpu_us_per_leapfrog", "acceptance", "ess", "ess_per_second"}


def few(name: str, most: int) -> Any:
    """A peer's sampler with fewer draws than the bench asks of it."""
    sampler = getattr(peers, name)

    def sampled(*args: Any, draws: int, warmup: int, **options: Any) -> Any:
        return sampler(*args, draws=min(draws, most), warmup=min(warmup, most), **options)

    return sampled


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Two scenes, two chains, on a thread; Pyro's chain stands in for the peers on JAX."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"SIZES": ((2, 2),), "DRAWS": 20, "FEW_DRAWS": 10, "REPEATS": 1, "PEER_STEPS": (2, 3)}
        for name, value in small.items():
            patch.setattr(bench, name, value)
        patch.setattr(bench, "pyro_chain", few("pyro_chain", 5))

        def stand_in(potential: Any, chains: int, *, repeats: int = 1, **options: Any) -> list[peers.Run]:
            run = few("pyro_chain", 5)(potential, 0, **options)
            return [run._replace(draws=np.repeat(run.draws, chains, 1))] * repeats

        patch.setattr(bench, "blackjax_hmc", stand_in)
        patch.setattr(bench, "numpyro_hmc", stand_in)
        problem, odds = bench._problem(2, seed=0), bench._odds(seed=0)
        found = list(bench._rows(problem, odds, 2, 2, seed=0, steps={"numpyro-hmc": 3}))
        found = [row | {"scenes": 2, "chains": 2, "threads": 1} for row in found]
        assert set(bench._ratios(found)[0]) >= {"leapfrog_to_pyro-hmc", "ess_per_second_to_blackjax-hmc"}
    return found


def test_every_sampler_has_a_row(rows: list[dict[str, Any]]) -> None:
    assert sorted(row["sampler"] for row in rows) == sorted(SAMPLERS)
    for row in rows:
        assert set(row) >= KEYS
        assert row["us_per_leapfrog"] > 0 and 0 <= row["acceptance"] <= 1
        # All but the bare pass give draws, of which some count.
        assert (row["ess_per_second"] is None) == (row["sampler"] == "fused-pass")


def test_peers_have_the_best_of_several_numbers_of_steps_or_the_one_given(rows: list[dict[str, Any]]) -> None:
    at = {row["sampler"]: row for row in rows}
    for name in ("blackjax-hmc", "pyro-hmc"):
        each = at[name]["ess_per_second_by_num_steps"]
        assert set(each) == {"2", "3"}
        assert str(at[name]["ess_num_steps"]) in each
    # Pyro's have few draws in all; the others' choice is between two in full.
    assert each[str(at["pyro-hmc"]["ess_num_steps"])] == max(each.values())
    assert at["numpyro-hmc"]["ess_num_steps"] == 3 and "ess_per_second_by_num_steps" not in at["numpyro-hmc"]
    assert bench._steps(rows) == {
        name: at[name]["ess_num_steps"] for name in ("blackjax-hmc", "numpyro-hmc", "pyro-hmc")
    }


@pytest.mark.parametrize(("draws", "steps", "wanted"), [(bench.DRAWS, 4, 540.0), (bench.FEW_DRAWS, 6, 141.0)])
def test_steps_are_chosen_by_few_draws_and_then_between_two_by_all(draws: int, steps: int, wanted: float) -> None:
    """What a number of steps gives is written down here: few draws take 6 for the best, and chains of 20 never move."""
    asked: list[tuple[int | None, int]] = []

    def effect(number: int | None, draws: int) -> dict[str, Any]:
        assert number is not None
        asked.append((number, draws))
        of = {4: 40.0, 6: 41.0 if draws == bench.FEW_DRAWS else 20.0, 20: np.nan}
        return {"ess_per_second": of.get(number, -float(number)) + draws}

    found = bench._best(effect, None, draws)
    assert (found["ess_num_steps"], found["ess_per_second"]) == (steps, wanted)
    assert set(found["ess_per_second_by_num_steps"]) == {str(n) for n in bench.PEER_STEPS}
    few = [(n, bench.FEW_DRAWS) for n in bench.PEER_STEPS]
    assert asked == few + ([(6, draws), (4, draws)] if draws == bench.DRAWS else [])
    asked.clear()
    assert bench._best(effect, 3, draws) == {"ess_per_second": draws - 3.0, "ess_num_steps": 3}
    assert asked == [(3, draws)]


def test_one_chain_of_pyro_stands_for_all_of_them() -> None:
    """Two chains of 50 draws in 3 and 5 seconds: 16 × 4 chains of 500 draws take 10 · 64 · 4 seconds."""

    def run(scene: int, *, draws: int, warmup: int, num_steps: int | None) -> peers.Run:
        assert (draws, warmup, num_steps) == (50, 50, 3)
        z = np.random.default_rng(scene).normal(size=(1, 1, draws, 4))
        return peers.Run(z, (3.0, 5.0)[scene], 0.0, 1, 1.0)

    found = bench._effect_of_pyro(run, 16, 4, 3, 50)
    each = [bench._effective(run(scene, draws=50, warmup=50, num_steps=3).draws) for scene in (0, 1)]
    assert found["ess"] == pytest.approx(10 * 4 * np.mean(each))
    assert found["ess_per_second"] == pytest.approx(found["ess"] / (10 * 64 * 4.0))
    assert found["subsampled"] == "2 chains of 50 + 50 draws"


def test_what_was_measured_is_kept_where_the_bench_is_broken_off(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that stops after two rows; what it was asked says that no steps were chosen before."""

    class Worker:
        def __init__(self, command: list[str], **options: Any) -> None:
            assert command[-3:] == ["1", "7", "{}"] and options["env"]["OMP_NUM_THREADS"] == "1"
            self.stdout, self.returncode = [json.dumps(["rows", row]) for row in rows[:2]], 3

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setattr(bench, "require_peers", lambda: None)
    monkeypatch.setattr(bench, "_versions", dict)
    monkeypatch.setattr(bench.subprocess, "Popen", Worker)
    out = tmp_path / "deep" / "bench.json"
    with pytest.raises(RuntimeError, match=r"on 1 thread\(s\) stopped with status 3"):
        bench.run_bench(out, seed=7, threads=(1,))
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert [row["sampler"] for row in kept["rows"]] == [row["sampler"] for row in rows[:2]] and kept["seconds"] >= 0


def test_the_rows_are_drawn(rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIZES", ((2, 2),))
    bench._plot(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_plain_definition_has_the_energy_and_slope_of_the_fused_pass() -> None:
    problem = bench._problem(2, seed=0)
    z = 0.3 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    for fused, plain in zip(problem(z), bench._Differentiated(problem)(z), strict=True):
        # Float32 sums of 576 squares over σ² = 0.0025.
        torch.testing.assert_close(fused, plain.to(fused.dtype), rtol=1e-3, atol=0.5)


def test_the_bench_is_refused_on_cuda_where_it_would_not_run() -> None:
    with pytest.raises(InputError, match="--device cuda"):
        Bench(out=Path("never.json"), device="cuda").prepare()


def test_the_density_in_jax_is_ours() -> None:
    pytest.importorskip("jax", reason="needs the extra 'bench'")
    problem = bench._problem(3, seed=0)
    z = 0.2 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert peers.agreement(problem, z) < 1e-4  # of the spread of energies, float32 on both sides


@pytest.mark.parametrize("name", ["blackjax_hmc", "numpyro_hmc"])
def test_peers_on_jax_draw_from_the_posterior_that_ours_draws_from(name: str) -> None:
    """Means of two samplers of 4 × 400 draws agree to what such means scatter by."""
    pytest.importorskip(name.split("_")[0], reason="needs the extra 'bench'")
    problem = bench._problem(2, seed=0)
    settings = {"draws": 400, "warmup": 400, "step_size": bench.STEP_SIZE, "num_steps": 3, "seed": 1}
    (run,) = getattr(peers, name)(problem, 4, **settings)
    start = torch.zeros(2, 4, 4)
    z, _ = bench.sample_batch(problem, start, num_samples=400, warmup_steps=400, seed=1)
    assert run.draws.shape == tuple(z.shape)
    ours, sd = z.double().mean((1, 2)), z.double().std((1, 2))
    theirs = torch.from_numpy(np.array(run.draws)).double().mean((1, 2))
    # Some 200 independent draws on each side: a standard error of 0.1 sd of the difference; five of them.
    assert bool(((theirs - ours).abs() < 0.5 * sd).all())
