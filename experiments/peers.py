"""The samplers that the bench runs beside ours: Pyro's, NumPyro's and BlackJAX's HMC on the same gaze posterior.

Each peer gets the posterior in its own language, as fast as we know how: Pyro the differentiable PyTorch definition,
the two on JAX a pure function that `jit(vmap(vmap(...)))` compiles. Convention: as `foveate.model.gaze`; coordinates
are those of the problem's chart.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# The peers come with the extra `bench` alone.

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer import HMC, MCMC, NUTS
from torch import Tensor

from foveate.inference.potential import GazePotential, QuadraticScore
from foveate.model.errors import InputError
from foveate.model.gaze import LocalChart

__all__ = ["Run", "agreement", "blackjax_hmc", "numpyro_hmc", "pyro_chain", "require_peers", "timed"]


class Run(NamedTuple):
    """One timed run.

    Attributes:
        draws: coordinates ``(scene, chain, draw, 4)``.
        seconds: wall-clock time of warm-up and draws, without compilation.
        cpu_seconds: processor time of the same, of all threads.
        leapfrogs: leapfrog steps of all chains together, warm-up included.
        acceptance: mean acceptance probability of the draws.
    """

    draws: np.ndarray
    seconds: float
    cpu_seconds: float
    leapfrogs: int
    acceptance: float


def require_peers() -> None:
    """Refuse to begin where a peer is not installed.

    Raises:
        InputError: naming the extra to install.
    """
    try:
        import blackjax  # noqa: F401
        import numpyro  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: the bench needs it, pip install 'foveate[bench]'") from error


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its wall-clock and its processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - processor


def blackjax_hmc(
    potential: GazePotential,
    chains: int,
    *,
    draws: int,
    warmup: int,
    step_size: float,
    num_steps: int,
    seed: int,
    repeats: int = 1,
) -> list[Run]:
    """`jit(vmap(vmap(hmc)))` over scenes and chains; with warm-up, each chain by BlackJAX' own window adaptation."""
    import blackjax
    import jax
    import jax.numpy as jnp

    texels, scenes, log_density = _jax_scenes(potential)

    def chain(key: Any, texels: Any, scene: Any) -> Any:
        of_scene = partial(log_density, texels, scene)
        start, key_warmup, key_run = jnp.zeros(4, jnp.float32), *jax.random.split(key)
        if warmup:
            adapt = blackjax.window_adaptation(blackjax.hmc, of_scene, num_integration_steps=num_steps)
            (state, settings), _ = adapt.run(key_warmup, start, num_steps=warmup)
        else:
            settings = {
                "step_size": step_size,
                "inverse_mass_matrix": jnp.ones(4, jnp.float32),
                "num_integration_steps": num_steps,
            }
            state = blackjax.hmc(of_scene, **settings).init(start)
        kernel = blackjax.hmc(of_scene, **settings)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state)
            return state, (state.position, info.acceptance_rate)

        return jax.lax.scan(step, state, jax.random.split(key_run, draws))[1]

    size = (len(potential.pyramid), chains)
    return _jax_runs(chain, texels, scenes, size, (draws + warmup) * num_steps, seed, repeats)


def numpyro_hmc(
    potential: GazePotential,
    chains: int,
    *,
    draws: int,
    warmup: int,
    step_size: float,
    num_steps: int,
    seed: int,
    repeats: int = 1,
) -> list[Run]:
    """NumPyro's HMC kernel, all scenes and chains in one program as its `chain_method="vectorized"` does."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer.hmc import hmc

    texels, scenes, log_density = _jax_scenes(potential)

    def chain(key: Any, texels: Any, scene: Any) -> Any:
        init, sample = hmc(potential_fn=lambda z: -log_density(texels, scene, z), algo="HMC")
        state = init(
            jnp.zeros(4, jnp.float32),
            warmup,
            step_size=step_size,
            num_steps=num_steps,
            trajectory_length=None,  # pyright: ignore[reportArgumentType] -- or it would override the step size
            adapt_step_size=warmup > 0,
            adapt_mass_matrix=warmup > 0,
            rng_key=key,
        )

        def step(state: Any, _: Any) -> Any:
            state = sample(state)
            return state, (state.z, state.accept_prob)

        z, rate = jax.lax.scan(step, state, None, length=warmup + draws)[1]
        return z[warmup:], rate[warmup:]

    size = (len(potential.pyramid), chains)
    return _jax_runs(chain, texels, scenes, size, (draws + warmup) * num_steps, seed, repeats)


def pyro_chain(
    potential: GazePotential,
    scene: int,
    *,
    draws: int,
    warmup: int,
    step_size: float,
    num_steps: int | None,
    seed: int,
) -> Run:
    """One chain of one scene by Pyro: HMC of ``num_steps`` steps, or NUTS where that is ``None``."""
    pyro.set_rng_seed(seed)
    target = _single(potential, scene)
    evaluations = 0

    def energy(params: dict[str, Tensor]) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return target.energy(params["z"][None, None])[0, 0]

    options: dict[str, Any] = {
        "potential_fn": energy,
        "step_size": step_size,
        "adapt_step_size": warmup > 0,
        "adapt_mass_matrix": warmup > 0,
    }
    kernel = NUTS(**options) if num_steps is None else HMC(**options, num_steps=num_steps)
    if num_steps is not None:
        # Pyro keeps the length of a trajectory and lets the number of steps follow the step size; here the number is
        # fixed.
        kernel.__class__ = type("FixedHMC", (HMC,), {"num_steps": num_steps})
    start = torch.zeros(4, dtype=potential.pyramid.texels.dtype)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, initial_params={"z": start}, disable_progbar=True)
    _, seconds, cpu_seconds = timed(mcmc.run)
    rate = float(mcmc.diagnostics()["acceptance rate"]["chain 0"])
    return Run(mcmc.get_samples()["z"].numpy()[None, None], seconds, cpu_seconds, evaluations, rate)


def _single(potential: GazePotential, scene: int) -> GazePotential:
    assert isinstance(potential.score, QuadraticScore)
    score = QuadraticScore(
        potential.score.target[scene].unflatten(-1, (24, 24)), potential.score.precision.unflatten(-1, (24, 24)) ** -0.5
    )
    chart = LocalChart(potential.chart.base[scene : scene + 1], potential.chart.scales)
    return GazePotential(potential.pyramid[scene], chart, score)


def _jax_runs(
    chain: Any, texels: Any, scenes: Any, size: tuple[int, int], leapfrogs: int, seed: int, repeats: int
) -> list[Run]:
    import jax

    keys = jax.random.split(jax.random.PRNGKey(seed), size)
    # The texels are an argument: as a constant they would be copied into the program.
    several = jax.vmap(jax.vmap(chain, (0, None, None)), (0, None, 0))
    program = jax.jit(several).lower(keys, texels, scenes).compile()
    runs = []
    for _ in range(repeats):
        (z, rate), *seconds = timed(lambda: jax.block_until_ready(program(keys, texels, scenes)))
        runs.append(Run(np.asarray(z), *seconds, leapfrogs * size[0] * size[1], float(np.mean(rate))))
    return runs


def _jax_scenes(potential: GazePotential) -> tuple[Any, Any, Any]:
    """Texels, arrays with a leading scene dimension, and the log density ``(texels, scene, z (4,)) -> ()`` in JAX."""
    import jax.numpy as jnp

    assert isinstance(potential.score, QuadraticScore)
    pyramid, chart = potential.pyramid, potential.chart
    texels = jnp.asarray(pyramid.texels.numpy())
    integers = {
        name: jnp.asarray(getattr(pyramid, name).numpy(), jnp.int32)
        for name in ("offset", "rows", "columns", "stride", "size")
    }
    base = jnp.asarray(chart.base.reshape(len(pyramid), 4).numpy(), jnp.float32)
    target, precision = (jnp.asarray(t.numpy()) for t in (potential.score.target, potential.score.precision))
    scenes = {**integers, "base": base, "target": target}
    k0, k1, k2, k3 = chart.scales
    axis = jnp.arange(24, dtype=jnp.float32) - 11.5
    px, py = jnp.tile(axis, 24), jnp.repeat(axis, 24)

    def look(texels: Any, scene: Any, level: Any, x: Any, y: Any) -> Any:
        stride = scene["stride"][level].astype(jnp.float32)
        columns, rows = scene["columns"][level], scene["rows"][level]
        u, v = x / stride, y / stride
        column = jnp.clip(jnp.floor(u).astype(jnp.int32), 0, columns - 2)
        row = jnp.clip(jnp.floor(v).astype(jnp.int32), 0, rows - 2)
        u, v = u - column, v - row
        here = scene["offset"][level] + row * columns + column
        top = texels[here] * (1 - u) + texels[here + 1] * u
        bottom = texels[here + columns] * (1 - u) + texels[here + columns + 1] * u
        return top * (1 - v) + bottom * v

    def log_density(texels: Any, scene: Any, z: Any) -> Any:
        s = jnp.exp(k2 * z[2])
        c, d = s * jnp.cos(k3 * z[3]), s * jnp.sin(k3 * z[3])
        a0, b0, x0, y0 = scene["base"]
        a, b = a0 * c - b0 * d, b0 * c + a0 * d
        tx, ty = a0 * k0 * z[0] - b0 * k1 * z[1] + x0, b0 * k0 * z[0] + a0 * k1 * z[1] + y0
        level = jnp.clip(jnp.log2(jnp.maximum(a * a + b * b, 1.0)), 0.0, 12 - 1e-5)
        lower = jnp.floor(level).astype(jnp.int32)
        weight = level - lower
        height, width = scene["size"][0] - 1, scene["size"][1] - 1
        x = jnp.clip(a * px - b * py + tx, 0.0, width.astype(jnp.float32))
        y = jnp.clip(b * px + a * py + ty, 0.0, height.astype(jnp.float32))
        seen = (1 - weight) * look(texels, scene, lower, x, y) + weight * look(texels, scene, lower + 1, x, y)
        away = seen - scene["target"]
        # The chart's log-determinant, without its constant.
        return -0.5 * jnp.sum(precision * away * away) + 2 * k2 * z[2]

    return texels, scenes, log_density


def agreement(potential: GazePotential, z: Float[Tensor, "scene chain 4"]) -> float:
    """Largest difference between the log density in JAX and ours, relative to the spread of ours."""
    import jax

    texels, scenes, log_density = _jax_scenes(potential)
    every = jax.vmap(jax.vmap(log_density, (None, None, 0)), (None, 0, 0))
    theirs = np.asarray(every(texels, scenes, z.numpy()))
    energy, _ = potential(z)
    ours = -energy.double().numpy()
    difference = (ours - theirs) - (ours - theirs)[:, :1]
    return float(np.abs(difference).max() / np.std(ours))
