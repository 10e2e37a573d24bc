"""Scores of a run against scenes with known gazes.

Convention (the whole module): gazes ``(scene, 4)`` in scene pixels, `foveate.model.gaze`.
"""

import math
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from foveate.inference.attend import attend
from foveate.inference.checkpoint import Run
from foveate.inference.noise import made_on_cpu
from foveate.inference.posterior import Posterior
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.errors import InputError
from foveate.model.patch import density_coordinates, extract

__all__ = ["EvaluationScenes", "crop_bounds", "evaluate", "jittered_starts", "versions"]

Start = Literal["scene", "jitter"]


@runtime_checkable
class EvaluationScenes(Protocol):
    """Pictures by index, with true gazes and names: `foveate.data.Scenes`."""

    def __len__(self) -> int: ...

    def pictures(self, indices: Any = None) -> list[Tensor]: ...

    @property
    def gazes(self) -> Tensor | None: ...

    @property
    def names(self) -> Sequence[str]: ...


def evaluate(
    run: Run,
    scenes: EvaluationScenes,
    *,
    start: Start = "scene",
    chains: int = 4,
    draws: int = 100,
    warmup: int = 60,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], Posterior]:
    """Attend to scenes with known gazes and score the result; the true gazes are looked at only to score.

    Args:
        run: what to score.
        scenes: with a true gaze each.
        start: ``"scene"``: no initial gaze. ``"jitter"``: the paper's protocol, from random gazes about the truth.
        chains: of the sampler, per scene.
        draws: kept per chain.
        warmup: draws that adapt, not kept.
        seed: of the sampler and of the jitter.
        progress: show a bar.

    Returns:
        The results (accuracy is the share of scenes with IoU > 0.5; bounds are in nats per crop) and the posterior.

    Raises:
        InputError: for scenes without true gazes, or another `start`.
    """
    if start not in get_args(Start):
        raise InputError(f"start {start!r}: there are {' and '.join(get_args(Start))}")
    truth = scenes.gazes
    if truth is None or bool(truth.isnan().any()):
        raise InputError("scoring needs a true gaze for every scene: give scenes with landmarks.csv or gazes.csv")
    first = jittered_starts(truth, seed) if start == "jitter" else None
    begun = time.perf_counter()
    how_much: dict[str, Any] = {"chains": chains, "draws": draws, "warmup": warmup, "seed": seed, "progress": progress}
    posterior = attend(run.model, run.guide, scenes, start=first, **how_much)
    seconds = (time.perf_counter() - begun) / len(scenes)
    iou = gazes.overlap(posterior.mean_gaze, truth)
    by_step = gazes.overlap(posterior.path, truth[:, None])
    _, bounds = crop_bounds(run.model, scenes, truth, progress)
    statistics, rhat, ess = posterior.statistics, posterior.rhat(), posterior.ess()
    rhat, ess = rhat[rhat.isfinite()], ess[ess.isfinite()]
    results: dict[str, Any] = {
        "scenes": len(scenes),
        "accuracy": float((iou > 0.5).double().mean()),
        "mean_iou": float(iou.mean()),
        "median_iou": float(iou.quantile(0.5)),
        "iou_by_step": [float(v) for v in by_step.mean(0)],
        "seconds_per_scene": seconds,
        **bounds,
        "log_z": float(run.model.dbn.log_z),
        "log_z_se": float(run.model.dbn.log_z_se),
        "acceptance_rate": float(statistics["acceptance_rate"].double().mean()),
        "divergences": int(statistics["diverging"].sum()),
        "rhat_max": float(rhat.max()) if len(rhat) else None,
        # Chains that never move have none, and must not pass for chains that agree.
        "rhat_undefined": len(scenes) - len(rhat),
        "ess_min": float(ess.min()) if len(ess) else None,
        "presence_mean": float(posterior.presence.mean()),
        "start": start,
        "seed": seed,
        "versions": versions(),
    }
    return results, posterior


def crop_bounds(
    model: AttentionModel, scenes: EvaluationScenes, truth: Float[Tensor, "scene 4"], progress: bool = False
) -> tuple[Float[Tensor, "scene 575"], dict[str, Any]]:
    """Density coordinates of the crops at the true gazes, and their mean log-densities in nats.

    Returns:
        The coordinates, and the results ``bound_nats``, ``bound_nats_se``, ``bound_gaussian``, ``bound_student_t``.
    """
    rows = tqdm(range(len(scenes)), desc="scoring crops", disable=None if progress else True)
    crops = torch.stack([extract(scenes.pictures([i])[0], truth[i]).float() for i in rows])
    y = density_coordinates(crops).to(model.dbn.core.mean.device)
    with torch.no_grad():
        bound = model.dbn.log_prob_bound(y, model.dbn.refine_hidden(y)).double()
        return y, {
            "bound_nats": float(bound.mean()),
            "bound_nats_se": float(bound.std() / math.sqrt(len(bound))) if len(bound) > 1 else None,
            "bound_gaussian": float(model.baseline("gaussian").log_prob(y).mean()),
            "bound_student_t": float(model.baseline("student_t").log_prob(y).mean()),
        }


@made_on_cpu
def jittered_starts(truth: Float[Tensor, "scene 4"], seed: int) -> Float[Tensor, "scene 4"]:
    """Random initial gazes about the truth: up to a face width off, ×0.5–2 in scale, ±30°.

    Convention: gazes in scene pixels; the offset is uniform in a disc of one patch width in the truth's own pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(truth)
    uniform = torch.rand(n, 4, generator=generator, dtype=torch.float64)
    radius, angle = gazes.CANONICAL_SIZE * uniform[:, 0].sqrt(), 2 * math.pi * uniform[:, 1]
    offset = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    local = gazes.from_parts(
        offset, torch.exp((2 * uniform[:, 2] - 1) * math.log(2)), (2 * uniform[:, 3] - 1) * math.pi / 6
    )
    return gazes.compose(truth.double(), local)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    names = ("foveate", "torch", "pyro-ppl", "numpy", "arviz")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
