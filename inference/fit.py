"""The bootstrap: train prior, clutter model and guide on scenes with known gazes, and calibrate them on scenes held out."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.inference.attend import SMALLEST, search
from foveate.inference.checkpoint import Run
from foveate.inference.guide import GazeGuide, change_chart
from foveate.inference.guide_training import GuideData, random_gazes, train_glance, train_looks
from foveate.inference.prior_training import augmented_coordinates, train_dbn
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.density import choose_elliptical
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates, extract

__all__ = ["LabelledScenes", "ScenePictures", "calibrate", "crops_of", "fit"]

# Stage, steps done, steps in all, and a figure to watch (the loss, or the bound in nats).
Progress = Callable[[str, int, int, float], None]

FEWEST = 12
# Versions of each crop that the prior is trained on: the exact one and jittered ones.
VERSIONS = 6
# Shares of the training scenes held out to calibrate on, and at most so many.
HELD_OUT, MOST_HELD_OUT = 0.12, 60


class ScenePictures(Protocol):
    """Pictures by index: `foveate.data.Scenes` or `UnlabelledScenes`."""

    def __len__(self) -> int: ...

    def pictures(self, indices: Any = None) -> list[Tensor]: ...


class LabelledScenes(ScenePictures, Protocol):
    """What `fit` needs of scenes: pictures by index, true gazes, and people where they are known."""

    @property
    def gazes(self) -> Tensor | None: ...

    @property
    def people(self) -> Sequence[str | None] | None: ...


def fit(
    scenes: LabelledScenes,
    clutter: ScenePictures | None = None,
    *,
    glance_steps: int = 1500,
    look_steps: int = 2500,
    dbn_steps: int = 2000,
    noise: float = 1.0,
    width: int = 24,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Run:
    """Train everything from scenes with known gazes.

    Args:
        scenes: labelled scenes; a tenth (whole people, where people are known) is held out to calibrate on.
        clutter: pictures without the object; None takes windows of the scenes that miss it.
        glance_steps: steps of the guide's peripheral half; 600 take about half a minute on two cores.
        look_steps: steps of its foveal half; 600 take about 45 s.
        dbn_steps: steps of the prior at most (it stops itself).
        noise: σ of the likelihood, in normalised intensities.
        width: channels of the guide's first layer.
        seed: of every random number used.
        device: where the guide is trained.
        progress: called after every step with stage, step, steps and the figure to watch.

    Returns:
        The run: model, guide and the configuration that made them.

    Raises:
        InputError: for scenes without gazes, or fewer than 12.
    """
    truth = scenes.gazes
    if truth is None or bool(truth.isnan().any()):
        raise InputError("training needs a true gaze for every scene: give scenes with landmarks.csv or gazes.csv")
    if len(scenes) < FEWEST:
        raise InputError(f"{len(scenes)} scenes to train on: at least {FEWEST} are needed")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    held = held_out(len(scenes), scenes.people, generator)
    train = (~held).nonzero().flatten()
    report = progress or (lambda stage, done, total, figure: None)

    pyramid = coarse_pyramid(scenes, range(len(scenes)), lambda i, n: report("reading", i, n, 0.0))
    crops = crops_of(scenes, truth, generator)
    background = coarse_pyramid(clutter, range(len(clutter))) if clutter is not None else None
    person = _numbered(scenes.people)

    guide = GazeGuide(width).to(device)
    data = GuideData(
        pyramid[train], truth[train], crops[train, 0], background, None if person is None else person[train]
    )
    train_glance(guide, data, steps=glance_steps, seed=seed, progress=lambda i, n, loss: report("glance", i, n, loss))
    train_looks(guide, data, steps=look_steps, seed=seed, progress=lambda i, n, loss: report("look", i, n, loss))
    guide.to("cpu")

    dbn = train_dbn(
        crops[train],
        people=None if person is None else person[train],
        validation=crops[held, 0],
        steps=dbn_steps,
        seed=seed,
        progress=lambda share, monitor: report("prior", int(1000 * share), 1000, monitor.bound),
    )
    model = AttentionModel(dbn, fit_clutter(data, generator), noise=noise, prior_options=_prior_options(pyramid, truth))
    y = augmented_coordinates(crops[train]).flatten(0, 1)
    validation = density_coordinates(crops[held, 0])
    for name in ("gaussian", "student_t"):
        model.baselines[name], _ = choose_elliptical(y, validation, student=name == "student_t")
    figures = calibrate(model, guide, scenes, held.nonzero().flatten(), truth)
    report("calibrating", 1, 1, figures["validation_accuracy"])
    config = {
        "scenes": len(scenes), "held_out": int(held.sum()), "clutter_pictures": 0 if clutter is None else len(clutter),
        "glance_steps": glance_steps, "look_steps": look_steps, "dbn_steps": dbn_steps, "seed": seed, **figures,
    }  # fmt: skip
    return Run(model=model, guide=guide, config=config)


def coarse_pyramid(
    scenes: ScenePictures, indices: Sequence[int] | range, progress: Callable[[int, int], None] | None = None
) -> Pyramid:
    """The scenes as the guide's training reads them: one sample a blur sd, no finer than a patch of 0.14 of the shorter side."""
    parts = []
    for done, i in enumerate(indices):
        parts.append(Pyramid.build(scenes.pictures([i]), oversampling=1.0, smallest=0.14))
        if progress:
            progress(done, len(indices))
    return Pyramid.concatenate(parts)


def crops_of(
    scenes: ScenePictures, truth: Float[Tensor, "scene 4"], generator: torch.Generator
) -> Float[Tensor, "scene version 24 24"]:
    """Crops at the true gazes by the definition of `extract`: the exact one first, then jittered ones.

    Jitter: sd 0.4 canonical pixels, 2 % in scale and 0.02 radians, about what one labeller differs from another.
    """
    kept = []
    for i in range(len(scenes)):
        n = VERSIONS - 1
        local = gazes.from_parts(
            0.4 * torch.randn(n, 2, generator=generator, dtype=torch.float64),
            torch.exp(0.02 * torch.randn(n, generator=generator, dtype=torch.float64)),
            0.02 * torch.randn(n, generator=generator, dtype=torch.float64),
        )
        every = torch.cat([truth[i : i + 1].double(), gazes.compose(truth[i].double(), local)])
        kept.append(extract(scenes.pictures([i])[0], every).float())
    return torch.stack(kept)


def fit_clutter(data: GuideData, generator: torch.Generator, count: int = 6000) -> ClutterModel:
    """Clutter's density from windows of pictures without the object and from windows of the scenes that miss it."""
    samples = []
    if data.clutter is not None:
        scene = torch.randint(len(data.clutter), (count,), generator=generator)
        samples.append(data.clutter.extract(random_gazes(data.clutter.size[scene], generator), scene=scene))
    scene = data.draw(count, generator)
    gaze = random_gazes(data.pyramid.size[scene], generator)
    missed = gazes.overlap(gaze, data.gaze[scene].double()) < 0.05
    samples.append(data.pyramid.extract(gaze[missed], scene=scene[missed]))
    return ClutterModel.fit(density_coordinates(torch.cat(samples)).float())


def calibrate(
    model: AttentionModel, guide: GazeGuide, scenes: ScenePictures, held: Tensor, truth: Float[Tensor, "scene 4"]
) -> dict[str, Any]:
    """Fit, on held-out scenes, the guide's sds and the weights of the evidence for a mode; returns figures for the log.

    The weights of (integrated log-odds, glance logit, presence logit) maximise the likelihood of the true mode among the modes
    found (a conditional logit, ridge towards weak equal weights); the constant sets presence against "no object".
    """
    found = []
    for begin in range(0, len(held), 16):
        rows = held[begin : begin + 16].tolist()
        pyramid = Pyramid.build(scenes.pictures(rows), smallest=SMALLEST)
        found.append(search(model, guide, pyramid, modes=6))
        with torch.no_grad():
            own = found[-1]
            best = gazes.overlap(own.gaze, truth[rows][:, None].double()).argmax(1)
            near = own.gaze[torch.arange(len(rows)), best]
            mean_v = model.dbn.to_canonical(model.dbn.core.mean).expand(len(rows), -1, -1)
            change = guide.look(pyramid, near, mean_v, torch.arange(len(rows)))
            wanted = change_chart(near).to_chart(truth[rows].double())
            residual = (wanted - change.mean.double()) / change.log_sd.double().exp()
            found[-1] = (own, residual, gazes.overlap(near, truth[rows].double()))
    close = torch.cat([f[2] for f in found]) > 0.5
    residual = torch.cat([f[1] for f in found])[close]
    if len(residual) >= 8:
        # A robust sd (median absolute residual / 0.6745): one impossible scene must not widen all.
        guide.log_sd_offset += torch.log(residual.abs().median(0).values / 0.6745).clamp(-1.0, 1.5).float()
    features = torch.cat([f[0].features for f in found])
    overlap = torch.cat(
        [gazes.overlap(f[0].gaze, truth[held[i * 16 : (i + 1) * 16]][:, None].double()) for i, f in enumerate(found)]
    )
    valid = torch.cat([torch.isfinite(f[0].log_weight) for f in found])
    guide.evidence.copy_(_evidence_weights(features, overlap > 0.5, valid))
    score = (features.nan_to_num() * guide.evidence[:3].double()).sum(-1)
    chosen = torch.where(valid, score, -math.inf).argmax(-1)
    accuracy = float((overlap[torch.arange(len(overlap)), chosen] > 0.5).double().mean())
    by_odds = torch.where(valid, features[..., 0], -math.inf).argmax(-1)
    return {
        "validation_accuracy": accuracy,
        "validation_accuracy_odds_alone": float((overlap[torch.arange(len(overlap)), by_odds] > 0.5).double().mean()),
        "evidence": [round(float(w), 6) for w in guide.evidence],
        "log_sd_offset": [round(float(w), 4) for w in guide.log_sd_offset],
    }


def _evidence_weights(
    features: Float[Tensor, "scene mode 3"], right: Bool[Tensor, "scene mode"], valid: Bool[Tensor, "scene mode"]
) -> Float[Tensor, "4"]:
    """Conditional logit over modes, then the constant at which right modes outweigh "no object" and wrong ones do not."""
    start = torch.tensor([0.02, 0.5, 0.5], dtype=torch.float64)
    x = features.nan_to_num(neginf=-30.0).double()
    usable = (right & valid).any(-1)
    w = start.clone().requires_grad_(True)
    if bool(usable.any()):
        optimiser = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            score = torch.where(valid, (x * w).sum(-1), -math.inf)
            good = torch.where(right, score, -math.inf)
            loss = (
                -(torch.logsumexp(good, -1) - torch.logsumexp(score, -1))[usable].sum()
                + 2.0 * ((w - start) / (start + 0.05)).square().sum()
            )
            loss.backward()
            return loss

        optimiser.step(closure)
    found = w.detach().clamp(min=0.0)
    score = torch.where(valid, (x * found).sum(-1), -math.inf)
    good, bad = score[right & valid], score[~right & valid]
    if len(good) == 0 or len(bad) == 0:
        constant = -float(score[valid].mean())
    else:
        # Midway between the weakest tenth of the right modes and the strongest tenth of the wrong ones.
        constant = -0.5 * float(good.quantile(0.1) + bad.quantile(0.9))
    return torch.tensor([*found.tolist(), constant]).float()


def held_out(count: int, people: Sequence[str | None] | None, generator: torch.Generator) -> Bool[Tensor, " scene"]:
    """Which scenes are kept for calibration: about 12 %, at most 60, whole people where people are known."""
    wanted = min(max(4, round(HELD_OUT * count)), MOST_HELD_OUT)
    person = _numbered(people)
    group = torch.arange(count) if person is None else person
    held = torch.zeros(count, dtype=torch.bool)
    for g in torch.randperm(int(group.max()) + 1, generator=generator).tolist():
        members = group == g
        if int(held.sum()) + int(members.sum()) <= 1.5 * wanted:
            held |= members
        if int(held.sum()) >= wanted:
            break
    return held


def _numbered(people: Sequence[str | None] | None) -> Tensor | None:
    """People as numbers; a scene whose person is not known counts as a person of its own."""
    if people is None:
        return None
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(p if p is not None else f"?{i}", len(number)) for i, p in enumerate(people)])


def _prior_options(pyramid: Pyramid, truth: Float[Tensor, "scene 4"]) -> dict[str, float]:
    """The gaze prior's settings from the training gazes, widened by a half: the next pictures are by other hands."""
    parts = gazes.parts(truth.double())
    share = torch.log(gazes.CANONICAL_SIZE * parts.scale / pyramid.size.amin(-1))
    return {
        "typical": float(share.mean().exp()),
        "log_scale_sd": max(0.3, 1.5 * float(share.std())),
        "rotation_sd": max(0.15, 1.5 * float(parts.rotation.std())),
    }
