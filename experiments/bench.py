"""The command `bench`: our sampler beside Pyro, NumPyro and BlackJAX on the gaze posterior of embedded scenes.

The posterior is p(u | v, I) of composed scenes of 448 × 296 pixels, σ = 0.05, v the true patch seen through that noise,
in the chart of offsets (canonical pixels), log-scale / 10 and angle / 10. Leapfrog steps are timed at a fixed step size
of 0.02 and 20 steps; effective draws per second on 500 + 500 draws (100 + 100 where a sampler is slow: `ess_draws` and
`subsampled` in the results say so), each sampler with its own warm-up: the smallest bulk ESS of a scene's four
coordinates over its chains, median over scenes, by the seconds of warm-up and draws together. The HMC of the peers does
not choose the number of its steps, so each has the best of several, which 100 + 100 draws of 16 scenes × 4 chains tell.
Compilation is left out everywhere.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from foveate.data import orl_scenes
from foveate.data.compose import orl_clutter
from foveate.experiments.options import Common, announce
from foveate.experiments.outputs import check_json, check_picture, save_figure
from foveate.experiments.peers import Run, agreement, blackjax_hmc, numpyro_hmc, pyro_chain, require_peers, timed
from foveate.inference.adaptation import HMCOptions
from foveate.inference.checkpoint import write_json
from foveate.inference.hmc import Chains, sample_batch
from foveate.inference.noise import batch_streams
from foveate.inference.potential import GazePotential, OddsScore, QuadraticScore
from foveate.model import gaze as gazes
from foveate.model.density import EllipticalDensity
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates

__all__ = ["SAMPLERS", "Bench", "run_bench"]

SAMPLERS = (
    "foveate-batched-hmc",
    "foveate-batched-hmc-odds",
    "blackjax-hmc",
    "numpyro-hmc",
    "pyro-hmc",
    "pyro-nuts",
    "torch-batched-autograd",
    "fused-pass",
)
# Scenes × chains; every sampler has the first.
SIZES = ((16, 4), (1, 1), (256, 4))
HEIGHT, WIDTH, SIGMA = 296, 448, 0.05
STEP_SIZE, NUM_STEPS = 0.02, 20
# Steps of a trajectory among which a peer's HMC has those that give it the most effective draws a second.
PEER_STEPS = (2, 3, 4, 6, 10, 20)
# Draws, and as many of warm-up, that tell effective draws a second; and where a sampler is slow or a setting is chosen.
DRAWS, FEW_DRAWS = 500, 100
REPEATS = 3
TEMPERATURE = 16.0


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """Time our sampler beside Pyro, NumPyro and BlackJAX, on one thread and on two (or on `threads` alone).

    Attributes:
        out: a .json file, written anew after every row; a plot of the same name with .png goes beside it.
    """

    out: Path

    def prepare(self) -> None:
        """As every command, and all of it on the CPU."""
        if self.device == "cuda":
            raise InputError("--device cuda: the bench compares on the CPU; leave --device away")
        super().prepare()

    def run(self) -> None:
        check_json(self.out, "rows")
        check_picture(self.out.with_suffix(".png"))
        threads = (1, 2) if self.threads is None else (self.threads,)
        announce(f"{len(SAMPLERS)} samplers on {' and on '.join(map(str, threads))} thread(s); output: {self.out}")
        run_bench(self.out, seed=self.seed, threads=threads)


def run_bench(out: Path, seed: int = 0, threads: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Run the table, each number of threads in a process of its own, and write JSON and plot.

    The HMC of the peers has the best of `PEER_STEPS` steps a trajectory; what each gave is told in the row that chose.

    Args:
        out: the .json file, written anew after every row; the plot goes beside it.
        seed: of scenes and samplers.
        threads: numbers of threads; a process is bound to as many processors.

    Returns:
        What was written: ``rows`` (``sampler, scenes, chains, threads, us_per_leapfrog, ess_per_second`` and details),
        ``ratios``, ``scaling``, ``memory``, ``versions``, ``machine``, ``seed``.

    Raises:
        InputError: a peer is not installed.
    """
    require_peers()
    began = time.time()
    out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"rows": [], "scaling": [], "machine": _machine(), "versions": _versions(), "seed": seed}
    for count in threads:
        # Before any library starts its own threads; the binding holds XLA, which has no setting of its own that would.
        environment = {
            **os.environ,
            **{f"{name}_NUM_THREADS": str(count) for name in ("OMP", "MKL", "NUMBA", "OPENBLAS")},
        }
        environment["JAX_PLATFORMS"] = "cpu"
        chosen = json.dumps(_steps(result["rows"]))
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "foveate.experiments.bench", str(count), str(seed), chosen],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            kind, value = json.loads(line)
            if kind == "rows":
                announce(_told(value))
            result[kind] = [*result[kind], value] if isinstance(result.get(kind), list) else value
            write_json(out, result | {"seconds": time.time() - began})
        if process.wait() != 0:
            raise RuntimeError(
                f"the bench on {count} thread(s) stopped with status {process.returncode}; its output is above"
            )
    result["ratios"] = _ratios(result["rows"])
    result["load_at_end"] = _load()
    result["seconds"] = time.time() - began
    write_json(out, result)
    _plot(result["rows"], out.with_suffix(".png"))
    return result


def _steps(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The number of steps that was chosen for each peer's HMC in these rows."""
    return {row["sampler"]: row["ess_num_steps"] for row in rows if "ess_num_steps" in row}


def _worker(threads: int, seed: int, steps: dict[str, int]) -> None:
    """All rows of one number of threads, each printed as a line of JSON; `steps` of peers, where chosen before."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[-threads:])
    torch.set_num_threads(threads)
    most = max(scenes for scenes, _ in SIZES)
    problem = _problem(most, seed)
    odds = _odds(seed)
    for scenes, chains in SIZES:
        # One chain alone has nothing for a second thread.
        if threads > 1 and scenes * chains == 1:
            continue
        potential = _first(problem, scenes)
        if scenes == SIZES[0][0]:
            z = 0.1 * torch.randn(scenes, chains, 4, generator=torch.Generator().manual_seed(seed))
            _tell("agreement_with_jax", agreement(potential, z))
        for row in _rows(potential, odds, scenes, chains, seed, steps):
            steps = steps | _steps([row])
            _tell("rows", {**row, "scenes": scenes, "chains": chains, "threads": threads, "load": _load()})
    for value in _scaling(problem):
        _tell("scaling", {**value, "threads": threads})
    _tell("memory", _memory(problem))


def _rows(
    potential: GazePotential, odds: OddsScore, scenes: int, chains: int, seed: int, steps: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The rows of one size; a peer's HMC makes the `steps` that were chosen for it, or chooses them here."""
    first = (scenes, chains) == SIZES[0]
    large = scenes > SIZES[0][0]
    with_odds = GazePotential(potential.pyramid, potential.chart, odds)
    start = torch.zeros(scenes, chains, 4)
    fixed = {
        "step_size": STEP_SIZE,
        "num_steps": NUM_STEPS,
        "jitter": 0.0,
        "adapt_step_size": False,
        "adapt_mass_matrix": False,
    }
    # The peers take several times as long.
    timing, timing_of_peers = (20, 5) if large else (200, 50)

    def ours(function: Any, draws: int, warmup: int, **options: Any) -> Run:
        (z, statistics), seconds, cpu = timed(
            lambda: sample_batch(function, start, num_samples=draws, warmup_steps=warmup, seed=seed, **options)
        )
        return Run(z.numpy(), seconds, cpu, int(statistics.n_steps.sum()), float(statistics.acceptance_rate.mean()))

    def adapted(function: Any, draws: int) -> Run:
        ours(function, 2, 20)
        return ours(function, draws, draws)

    passes = 50 if large else 500 if first else 5000
    potential(start)
    runs = [timed(lambda: [potential(start) for _ in range(passes)])[1:] for _ in range(REPEATS)]
    yield _row("fused-pass", [Run(np.empty(0), *seconds, passes * scenes * chains, 1.0) for seconds in runs], None)

    for sampler, function, draws in (
        ("foveate-batched-hmc", potential, timing),
        ("foveate-batched-hmc-odds", with_odds, timing // 10),
    ):
        ours(function, 2, 0, **fixed)
        runs = [ours(function, draws, 0, **fixed) for _ in range(REPEATS)]
        if function is potential:
            effective = adapted(function, DRAWS)
        else:
            effective = None if large else adapted(function, FEW_DRAWS)
        yield _row(sampler, runs, effective)

    for sampler, run in (("blackjax-hmc", blackjax_hmc), ("numpyro-hmc", numpyro_hmc)):
        run = partial(run, potential, chains, step_size=STEP_SIZE, seed=seed)
        row = _row(sampler, run(draws=timing_of_peers, warmup=0, num_steps=NUM_STEPS, repeats=REPEATS), None)
        if not large:
            row |= _best(partial(_effect_of_jax, run), steps.get(sampler), DRAWS)
        yield row

    if not large:
        plain = _Differentiated(potential)
        runs = [ours(plain, timing // 10, 0, **fixed) for _ in range(REPEATS)]
        yield _row("torch-batched-autograd", runs, adapted(plain, FEW_DRAWS))
        for sampler, number in (("pyro-hmc", NUM_STEPS), ("pyro-nuts", None)):
            run = partial(pyro_chain, potential, step_size=STEP_SIZE, seed=seed)
            runs = [run(0, draws=10, warmup=0, num_steps=number) for _ in range(REPEATS)]
            effect = partial(_effect_of_pyro, run, scenes, chains)
            best = effect(None, FEW_DRAWS) if number is None else _best(effect, steps.get(sampler), FEW_DRAWS)
            yield _row(sampler, runs, None) | best


def _effect_of_jax(run: Callable[..., list[Run]], number: int | None, draws: int) -> dict[str, Any]:
    return _effect(run(draws=draws, warmup=draws, num_steps=number)[0])


def _effect_of_pyro(
    run: Callable[..., Run], scenes: int, chains: int, number: int | None, draws: int
) -> dict[str, Any]:
    """Pyro runs one chain at a time: two of them, from which the time of all and of `DRAWS` draws follows."""
    sampled = [run(scene, draws=draws, warmup=draws, num_steps=number) for scene in range(min(2, scenes))]
    longer = DRAWS / draws
    # All scenes and chains one after the other; a scene's ESS is that of its chains.
    seconds = longer * float(np.mean([run.seconds for run in sampled])) * scenes * chains
    ess = longer * chains * float(np.median([_effective(run.draws) for run in sampled]))
    subsampled = f"{len(sampled)} chain{'s' * (len(sampled) > 1)} of {draws} + {draws} draws"
    return {"ess": ess, "ess_per_second": ess / seconds, "subsampled": subsampled}


def _row(sampler: str, runs: list[Run], adapted: Run | None) -> dict[str, Any]:
    """The best of several timings, and the effective draws of one adapted run."""
    row: dict[str, Any] = {
        "sampler": sampler,
        "us_per_leapfrog": min(run.seconds / run.leapfrogs for run in runs) * 1e6,
        "cpu_us_per_leapfrog": min(run.cpu_seconds / run.leapfrogs for run in runs) * 1e6,
        "acceptance": runs[0].acceptance,
        "ess": None,
        "ess_per_second": None,
    }
    return row if adapted is None else row | _effect(adapted)


def _effect(adapted: Run) -> dict[str, Any]:
    """Effective draws of an adapted run."""
    ess = _effective(adapted.draws)
    return {
        "ess": ess,
        "ess_per_second": ess / adapted.seconds,
        "ess_per_cpu_second": ess / adapted.cpu_seconds,
        "ess_draws": adapted.draws.shape[2],
        "ess_acceptance": adapted.acceptance,
    }


def _best(effect: Callable[[int | None, int], dict[str, Any]], number: int | None, draws: int) -> dict[str, Any]:
    """The effect of `number` steps a trajectory, or of the best of `PEER_STEPS` and then what each gave.

    Args:
        effect: of a number of steps, by so many draws.
        number: of steps; None to choose it, by few draws and then, between the two best, by all.
        draws: that tell the effect.
    """
    if number is not None:
        return effect(number, draws) | {"ess_num_steps": number}

    def given(found: dict[str, Any]) -> float:
        # Chains that never move have no number of effective draws.
        return float(np.nan_to_num(found["ess_per_second"], nan=-1.0))

    few = {n: effect(n, FEW_DRAWS) for n in PEER_STEPS}
    two = sorted(few, key=lambda n: given(few[n]), reverse=True)[:2]
    tried = {n: few[n] if draws == FEW_DRAWS else effect(n, draws) for n in two}
    number = max(tried, key=lambda n: given(tried[n]))
    each = {str(n): found["ess_per_second"] for n, found in few.items()}
    return tried[number] | {"ess_num_steps": number, "ess_per_second_by_num_steps": each}


def _effective(draws: np.ndarray) -> float:
    """Smallest bulk ESS of a scene's four coordinates, median over scenes; draws (scene, chain, draw, 4)."""
    import arviz

    smallest = [min(float(arviz.ess(scene[..., i])) for i in range(4)) for scene in draws]
    return float(np.median(smallest))


class _Differentiated:
    """The plain definition and PyTorch's autograd: what one would write without a fused pass."""

    def __init__(self, potential: GazePotential) -> None:
        self.potential = potential

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            energy = self.potential.energy(z)
            (gradient,) = torch.autograd.grad(energy.sum(), z)
        return energy.detach(), gradient


def _problem(count: int, seed: int) -> GazePotential:
    """The gaze posterior of composed scenes given their true patches seen through noise; float32."""
    scenes = orl_scenes("test", count, seed=seed, sizes=[(HEIGHT, WIDTH)])
    pyramid = Pyramid.build(scenes.pictures(), smallest=0.08)
    truth = scenes.gazes
    assert truth is not None
    noise = torch.randn(count, 24, 24, generator=torch.Generator().manual_seed(seed))
    target = pyramid.extract(truth.float()) + SIGMA * noise
    return GazePotential(
        pyramid, gazes.LocalChart(truth.float()[:, None], (1.0, 1.0, 0.1, 0.1)), QuadraticScore(target, SIGMA)
    )


def _first(problem: GazePotential, count: int, repeat: int = 1) -> GazePotential:
    """The posterior of the first scenes, each several times over."""
    assert isinstance(problem.score, QuadraticScore)
    index = torch.arange(count * repeat) % count
    target = problem.score.target[index].unflatten(-1, (24, 24))
    chart = gazes.LocalChart(problem.chart.base[index], problem.chart.scales)
    pyramid = problem.pyramid[index]
    if count < len(problem.pyramid):
        # Scenes lie one after the other: those behind the last are left out, which a peer would copy.
        pyramid.texels = pyramid.texels[: int(problem.pyramid.offset[count].min())]
    return GazePotential(pyramid, chart, QuadraticScore(target, SIGMA))


def _odds(seed: int) -> OddsScore:
    """Odds of composed faces against patches that show none: Student-t densities through noise of 1, and edges.

    At a temperature as `fit` chooses them: as they are, the odds of edges make peaks that no chain leaves.
    """
    faces, clutter = orl_scenes("train", 150, seed=seed), orl_clutter("train", 30, seed=seed)
    assert faces.gazes is not None
    examples = []
    looks = Pyramid.build(clutter.pictures())
    prior = gazes.GazePrior(looks.size.float()[:, None].expand(-1, 10, -1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        anywhere = prior.sample()
    for patches in (
        Pyramid.build(faces.pictures()).extract(faces.gazes.float()),
        looks.extract(anywhere).flatten(0, 1),
    ):
        examples.append(density_coordinates(patches))
    face, other = (EllipticalDensity.fit(y, floor=1.0, nu=8.0) for y in examples)
    return OddsScore(face, other, TEMPERATURE, edges=EdgeOdds.fit(*examples))


def _scaling(problem: GazePotential) -> Iterator[dict[str, Any]]:
    """Time of a leapfrog step for ever more scenes: the pictures of 256, over and over."""
    options = {"seed": 0, "warmup_steps": 0, "step_size": STEP_SIZE, "num_steps": NUM_STEPS, "adapt_step_size": False}
    for repeat in (1, 4, 16):
        potential = _first(problem, len(problem.pyramid), repeat)
        start = torch.zeros(len(potential.pyramid), 1, 4)
        run = partial(sample_batch, potential, start, num_samples=5, **options)
        run()
        runs = [timed(run) for _ in range(REPEATS)]
        steps = 5 * NUM_STEPS * len(start) * 1e-6
        yield {
            "scenes": len(start),
            "us_per_leapfrog": min(run[1] for run in runs) / steps,
            "cpu_us_per_leapfrog": min(run[2] for run in runs) / steps,
        }


def _memory(problem: GazePotential) -> dict[str, float]:
    """Bytes that a chain, a kept draw of one chain and a scene take."""
    start = torch.zeros(len(problem.pyramid), 4, 4)
    count, texels = start.shape[0] * start.shape[1], problem.pyramid.texels
    chains = Chains(problem, start, HMCOptions(), 20, 0, batch_streams(None, tuple(start.shape[:-1])))
    statistics = chains.step()
    return {
        "bytes_per_chain": _bytes([*vars(chains).values(), *vars(chains.adaptation).values()]) / count,
        "bytes_per_draw": _bytes([chains.position, *statistics]) / count,
        "bytes_per_scene": _bytes([texels]) / len(start),
    }


def _bytes(values: Iterable[Any]) -> int:
    """Of all tensors among some values, tuples looked into."""
    flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return sum(tensor.numel() * tensor.element_size() for tensor in flat if isinstance(tensor, Tensor))


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, int | float]]:
    """What the race is about, at 16 × 4: by wall clock and by processor time."""
    ratios = []
    for threads in sorted({row["threads"] for row in rows}):
        at = {
            row["sampler"]: row
            for row in rows
            if (row["scenes"], row["chains"], row["threads"]) == (*SIZES[0], threads)
        }
        ours = at["foveate-batched-hmc"]
        ratio: dict[str, int | float] = {"threads": threads}
        for key, name in (("us_per_leapfrog", ""), ("cpu_us_per_leapfrog", "cpu_")):
            for sampler in ("blackjax-hmc", "pyro-hmc", "fused-pass"):
                ratio[f"{name}leapfrog_to_{sampler}"] = ours[key] / at[sampler][key]
        ratio["ess_per_second_to_blackjax-hmc"] = ours["ess_per_second"] / at["blackjax-hmc"]["ess_per_second"]
        ratios.append(ratio)
    return ratios


def _load() -> list[float] | None:
    """What else the machine does, over 1, 5 and 15 minutes; Windows does not tell."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": _load(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _versions() -> dict[str, str]:
    names = ("torch", "pyro-ppl", "numpy", "numba", "arviz", "numpyro", "blackjax", "jax")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def _told(row: dict[str, Any]) -> str:
    effective = "" if row["ess_per_second"] is None else f", {row['ess_per_second']:.4g} effective draws a second"
    where = f"{row['scenes']} × {row['chains']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['sampler']:26s} {where:22s} {row['us_per_leapfrog']:9.2f} µs a leapfrog step{effective}"


def _tell(kind: str, value: Any) -> None:
    print(json.dumps([kind, value]), flush=True)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of both measures at 16 × 4."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    measures: tuple[tuple[Any, str, str], ...] = (
        (left, "us_per_leapfrog", "µs per leapfrog step and chain"),
        (right, "ess_per_second", "effective draws per second"),
    )
    all_threads = sorted({row["threads"] for row in rows})
    for axes, key, label in measures:
        for i, threads in enumerate(all_threads):
            at = {
                row["sampler"]: row[key]
                for row in rows
                if (row["scenes"], row["chains"], row["threads"]) == (*SIZES[0], threads)
            }
            height = 0.8 / len(all_threads)
            values = [at.get(sampler) or np.nan for sampler in SAMPLERS]
            axes.barh(
                np.arange(len(SAMPLERS)) + i * height,
                values,
                height,
                label=f"{threads} thread{'s' if threads > 1 else ''}",
            )
        axes.set_xscale("log")
        axes.set_xlabel(label)
    left.set_yticks(np.arange(len(SAMPLERS)) + 0.4 - 0.4 / len(all_threads), SAMPLERS)
    left.invert_yaxis()
    right.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    _worker(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
