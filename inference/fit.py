"""The bootstrap: train prior, clutter model and guide on scenes with known gazes, calibrate on scenes held out.

Convention (the whole module): gazes in scene pixels, `foveate.model.gaze`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from foveate.inference.attend import SPREAD, Candidates, mode_points, odds_score, scene_pyramid, search
from foveate.inference.calibration import calibrated_factor
from foveate.inference.checkpoint import Run
from foveate.inference.guide import GazeGuide, change_chart
from foveate.inference.guide_training import GuideData, random_gazes, train_glance, train_looks
from foveate.inference.noise import made_on_cpu
from foveate.inference.prior_training import (
    FEWEST_PICTURES,
    FOLDS,
    Monitor,
    augmented_coordinates,
    fit_core,
    people_folds,
    train_dbn,
)
from foveate.inference.resume import Checkpoint, digest
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.density import choose_elliptical
from foveate.model.edges import CHUNK, EdgeOdds
from foveate.model.errors import InputError
from foveate.model.identity import IdentityModel
from foveate.model.patch import Pyramid, density_coordinates, extract

__all__ = [
    "LabelledScenes",
    "ScenePictures",
    "calibrate",
    "crops_of",
    "fit",
    "fit_clutter",
    "gaze_prior_options",
    "jittered",
    "person_numbers",
    "weigh_evidence",
]

# Stage, steps done, steps in all, and a figure to watch (the loss, or the bound in nats).
Progress = Callable[[str, int, int, float], None]

# Of fewer, too few are left beside the four that are held out at least.
FEWEST = 14
# Versions of each crop that the prior is trained on: the exact one and jittered ones.
VERSIONS = 6
# Shares of the training scenes held out to calibrate on, and at most so many.
HELD_OUT, MOST_HELD_OUT = 0.12, 60
# Of fewer held out, mostly of one or two people, noise and temperature are not told; nine people's photographs chose
# temperatures of 5.7 to 23 by which fourteen of them were held out.
ENOUGH_HELD_OUT = 30
# Scenes that are worked on together while calibrating, and the fewest from which sds are estimated.
BATCH, FEWEST_TO_CALIBRATE = 16, 8
# What the model's variant is chosen among; without the guide as a prior, as many nats lower are as good.
NOISES, TEMPERATURES, PREFERENCE = (0.125, 0.25, 0.5, 1.0), tuple(2.0 ** (k / 2) for k in range(17)), 0.05
# Windows that show the object in part: sds about it (canonical pixels; log-scale and radians), and their IoU.
NEAR_MISS, PARTLY = (5.0, 0.25), (0.2, 0.7)
WORST = -25.0
# Points that a mode's posterior is normalised with: how many, and over what share of the mode's width they are spread.
WIDE_POINTS, NARROW_POINTS, NARROW = 512, 256, (0.25, 0.0625)
# What tells the object from clutter is taken from this disc of its square, canonical pixels about the middle.
APERTURE = 9.0
# Windows of clutter, and of those that show the object in part, that the object is told from.
WINDOWS = 6000
# How much edges say beside pixels, and from how many times as many windows the likeliest are taken to tell them from.
EDGES_SAY, MINED = 3.0, 12
# Weights of (integrated log-odds, recognition logit, presence logit) where scenes held out do not say otherwise, as few
# do in which hardly anything is missed: chosen on scenes of a population that was not learned from. (A weight
# that follows the temperature was tried, see docs/results/likelihood.md.)
EVIDENCE = (0.3, 1.0, 0.2)


@runtime_checkable
class ScenePictures(Protocol):
    """Pictures by index: `foveate.data.Scenes` or `UnlabelledScenes`."""

    def __len__(self) -> int: ...

    def pictures(self, indices: Any = None) -> list[Tensor]: ...


@runtime_checkable
class LabelledScenes(ScenePictures, Protocol):
    """What `fit` needs of scenes: pictures by index, true gazes, and people where they are known."""

    @property
    def gazes(self) -> Tensor | None: ...

    @property
    def people(self) -> Sequence[str | None] | None: ...


@made_on_cpu
def fit(
    scenes: LabelledScenes,
    clutter: ScenePictures | None = None,
    *,
    glance_steps: int = 3000,
    look_steps: int = 1500,
    dbn_steps: int = 2000,
    noise: float = 1.0,
    width: int = 24,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    watch: Callable[[Monitor], None] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Run:
    """Train everything from scenes with known gazes.

    Args:
        scenes: labelled scenes; some (see `held_out`) are kept to calibrate on.
        clutter: pictures without the object; None takes windows of the scenes that miss it.
        glance_steps: steps of the guide's peripheral half; 600 take about half a minute on two cores.
        look_steps: steps of its foveal half; 600 take about 45 s.
        dbn_steps: steps of the prior at most (it stops itself).
        noise: σ of the likelihood to begin with, in normalised intensities; calibration chooses another one where it
            finds the object in scenes held out.
        width: channels of the guide's first layer.
        seed: of every random number used.
        device: where the guide is trained.
        progress: called after every step with stage, step, steps and the figure to watch.
        watch: called with everything that a check of the prior's training saw, before `progress` is.
        checkpoint: a folder where the guide's training is kept every 100 steps, to be removed when the run is saved.
            (The prior takes a minute or two and is begun anew.)
        resume: go on from what is at `checkpoint`, if anything is, to the same result as without an interruption, on as
            many threads.

    Returns:
        The run: model, guide and the configuration that made them.

    Raises:
        InputError: for scenes without gazes, or fewer than 14, or fewer than 10 beside those held out; for a
            checkpoint of other scenes or settings, or one that is not to be resumed.
    """
    truth = scenes.gazes
    if truth is None or bool(truth.isnan().any()):
        raise InputError("training needs a true gaze for every scene: give scenes with landmarks.csv or gazes.csv")
    if len(scenes) < FEWEST:
        raise InputError(f"{len(scenes)} scenes to train on: at least {FEWEST} are needed")
    generator = torch.Generator().manual_seed(seed)
    held = held_out(len(scenes), scenes.people, generator)
    train = (~held).nonzero().flatten()
    if len(train) < FEWEST_PICTURES:
        raise InputError(
            f"{len(scenes)} scenes, of which {int(held.sum())} are held out: the prior learns from "
            f"{FEWEST_PICTURES} or more, give a few more scenes"
        )
    report = progress or (lambda stage, done, total, figure: None)

    pyramid = coarse_pyramid(scenes, range(len(scenes)), lambda i, n: report("reading", i, n, 0.0))
    crops = crops_of(scenes, truth, generator)
    background = coarse_pyramid(clutter, range(len(clutter))) if clutter is not None else None
    person = person_numbers(scenes.people)

    # The first weights are of this seed, and nobody else's random numbers are touched.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guide = GazeGuide(width).to(device)
    data = GuideData(
        pyramid[train], truth[train], crops[train, 0], background, None if person is None else person[train]
    )
    made_of = {
        "scenes": digest(truth, crops, train, *(() if person is None else (person,))),
        "clutter": None if background is None else digest(background.texels),
        "settings": [glance_steps, look_steps, width, seed],
    }
    kept = Checkpoint.open(checkpoint, made_of, resume)
    budget: dict[str, Any] = {"seed": seed, "checkpoint": kept}
    train_glance(guide, data, steps=glance_steps, progress=lambda i, n, loss: report("glance", i, n, loss), **budget)
    train_looks(guide, data, steps=look_steps, progress=lambda i, n, loss: report("look", i, n, loss), **budget)
    guide.to("cpu")

    def checked(share: float, monitor: Monitor) -> None:
        if watch is not None:
            watch(monitor)
        report("prior", int(1000 * share), 1000, monitor.bound)

    dbn = train_dbn(
        crops[train],
        people=None if person is None else person[train],
        validation=crops[held, 0],
        steps=dbn_steps,
        seed=seed,
        progress=checked,
    )
    model = AttentionModel(dbn, noise=noise, prior_options=gaze_prior_options(pyramid, truth), aperture=APERTURE)
    if person is not None:
        beside = _misaligned(pyramid[train], truth[train], torch.Generator().manual_seed(seed))
        model.identity = IdentityModel.fit(torch.cat([crops[train, :1], beside], 1), person[train], seed)
    y = augmented_coordinates(crops[train]).flatten(0, 1)
    fit_clutter(model, y, data, generator)
    validation = density_coordinates(crops[held, 0])
    for name in ("gaussian", "student_t"):
        model.baselines[name], _ = choose_elliptical(y, validation, student=name == "student_t")
    every = GuideData(pyramid, truth, crops[:, 0], background, person)
    refitted = None
    if int(held.sum()) < ENOUGH_HELD_OUT:
        refitted = []
        for part in without_each_fold(model, every, crops, seed):
            refitted.append(part)
            report("folds", len(refitted), FOLDS, 0.0)
    figures = calibrate(model, guide, scenes, held.nonzero().flatten(), truth, refitted)
    factor = calibrated_factor(refitted or [(model, held.nonzero().flatten())], guide, scenes, truth)
    report("calibrating", 1, 1, figures["validation_accuracy"])
    config = {
        "scenes": len(scenes),
        "held_out": int(held.sum()),
        "clutter_pictures": 0 if clutter is None else len(clutter),
        "glance_steps": glance_steps,
        "look_steps": look_steps,
        "dbn_steps": dbn_steps,
        "seed": seed,
        **figures,
        "coverage_factor": factor,
        "calibrated_on": "held out" if refitted is None else "folds",
    }
    return Run(model=model, guide=guide, config=config)


def coarse_pyramid(
    scenes: ScenePictures, indices: Sequence[int] | range, progress: Callable[[int, int], None] | None = None
) -> Pyramid:
    """The scenes as the guide's training reads them: a sample a blur sd, no finer than patches of 0.14 of the side."""
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
        about = jittered(truth[i].double(), _normal(VERSIONS - 1, generator), 0.4, 0.02)
        every = torch.cat([truth[i : i + 1].double(), about])
        kept.append(extract(scenes.pictures([i])[0], every).float())
    return torch.stack(kept)


def _normal(count: int, generator: torch.Generator) -> Float64[Tensor, "count 4"]:
    """Standard normal numbers for `jittered`."""
    parts = [torch.randn(count, k, generator=generator, dtype=torch.float64) for k in (2, 1, 1)]
    return torch.cat(parts, -1)


def jittered(
    truth: Float[Tensor, "*#batch 4"], noise: Float[Tensor, "*batch 4"], pixels: float, share: float
) -> Float[Tensor, "*batch 4"]:
    """Gazes about true ones.

    Convention: gazes in scene pixels, `foveate.model.gaze`; offsets on the canonical side.

    Args:
        truth: the gazes; one may stand for many.
        noise: standard normal numbers: right, down, log-scale, rotation.
        pixels: sd of both offsets, canonical pixels.
        share: sd of log-scale and of the rotation in radians.

    Returns:
        One gaze for each row of `noise`.
    """
    local = gazes.from_parts(pixels * noise[..., :2], torch.exp(share * noise[..., 2]), share * noise[..., 3])
    return gazes.compose(truth, local)


def _misaligned(
    pyramid: Pyramid, truth: Float[Tensor, "scene 4"], generator: torch.Generator
) -> Float[Tensor, "scene version 24 24"]:
    """Crops as far off as found gazes are: sd 0.8 canonical pixels, 5 % in scale and 0.05 radians.

    Where gazes are found and not marked, people are told apart better so than by crops with a labeller's jitter.
    """
    gaze = torch.stack([jittered(of, _normal(4, generator), 0.8, 0.05) for of in truth.double()])
    return pyramid.extract(gaze).float()


def fit_clutter(
    model: AttentionModel,
    of_object: Float[Tensor, "crop 575"],
    data: GuideData,
    generator: torch.Generator,
    count: int = WINDOWS,
) -> None:
    """What tells the object from clutter, in place: clutter's density and the odds of edges.

    Clutter is seen in windows of pictures without the object and in windows of the scenes that miss it. Edges are told
    from those, from as many windows that show the object in part (what tells the object from clutter alone does not
    tell where exactly it is), and then once more with as many that a first fit takes for the object: the likeliest of
    `MINED` times as many.

    What edges say is scaled to have a gap between the object's crops and clutter that is `EDGES_SAY` times as wide as
    that of the pixels. Scenes held out could not weigh the two: they are of the training scenes' kind, where pixels
    judge best, and on another kind it is edges that are still known.

    Args:
        model: whose clutter model and edges are replaced; its prior is what the pixels are weighed by.
        of_object: density coordinates of crops of the object.
        data: scenes with gazes (scene pixels, `foveate.model.gaze`), and pictures without the object if there are any.
        generator: of the windows.
        count: windows of each kind.
    """
    y = density_coordinates(_other_windows(data, count, 0.05, generator)).float()
    model.clutter = ClutterModel.fit(y)
    scene = data.draw(2 * len(y), generator)
    gaze = jittered(data.gaze[scene].double(), _normal(len(scene), generator), *NEAR_MISS)
    overlap = gazes.overlap(gaze, data.gaze[scene].double())
    partly = ((overlap > PARTLY[0]) & (overlap < PARTLY[1])).nonzero().flatten()[: len(y)]
    in_part = density_coordinates(data.pyramid.extract(gaze[partly], scene=scene[partly])).float()
    others = torch.cat([y, in_part])
    model.edges = _with_their_say(model, EdgeOdds.fit(of_object, others, model.aperture), of_object, y)
    alike = _likeliest_windows(model, data, count, generator)
    with_those = EdgeOdds.fit(of_object, torch.cat([others, alike]), model.aperture)
    model.edges = _with_their_say(model, with_those, of_object, y)


def _other_windows(data: GuideData, count: int, most: float, generator: torch.Generator) -> Float[Tensor, "n 24 24"]:
    """Windows of pictures without the object, if there are any, and of scenes whose object they overlap by less."""
    samples = []
    if data.clutter is not None:
        scene = torch.randint(len(data.clutter), (count,), generator=generator)
        samples.append(data.clutter.extract(random_gazes(data.clutter.size[scene], generator), scene=scene))
    scene = data.draw(count, generator)
    gaze = random_gazes(data.pyramid.size[scene], generator)
    missed = gazes.overlap(gaze, data.gaze[scene].double()) < most
    samples.append(data.pyramid.extract(gaze[missed], scene=scene[missed]))
    return torch.cat(samples)


def _with_their_say(
    model: AttentionModel, edges: EdgeOdds, of_object: Float[Tensor, "crop 575"], of_clutter: Float[Tensor, "other 575"]
) -> EdgeOdds:
    """The odds scaled to have `EDGES_SAY` times as wide a gap between object and clutter as the model's pixels have."""
    pixels, clutter = model.marginal_densities()
    assert clutter is not None
    by_pixels, by_edges = (
        [float((pixels.log_prob(part) - clutter.log_prob(part)).mean()) for part in (of_object, of_clutter)],
        [float(torch.cat([edges.log_odds(y) for y in part.split(CHUNK)]).mean()) for part in (of_object, of_clutter)],
    )
    return edges.scaled(EDGES_SAY * max(0.0, by_pixels[0] - by_pixels[1]) / (by_edges[0] - by_edges[1]))


@torch.no_grad()
def _likeliest_windows(
    model: AttentionModel, data: GuideData, count: int, generator: torch.Generator
) -> Float[Tensor, "n 575"]:
    """Of `MINED` times `count` windows that are not the object those with the highest odds of being it."""
    score = odds_score(model)
    kept, energies = torch.empty(0, 24, 24), torch.empty(0)
    for _ in range(MINED):
        windows = _other_windows(data, count, 0.5, generator)
        found = torch.cat([score.energy_of_many(part) for part in windows.split(CHUNK)])
        energies, order = torch.cat([energies, found]).sort()
        kept, energies = torch.cat([kept, windows])[order[:count]], energies[:count]
    return density_coordinates(kept).float()


@torch.no_grad()
def without_each_fold(
    model: AttentionModel, data: GuideData, crops: Float[Tensor, "scene version 24 24"], seed: int
) -> Iterator[tuple[AttentionModel, Int[Tensor, " of_fold"]]]:
    """Copies of a model that know nothing of some people, and the scenes that show these; every scene comes once.

    What is fitted anew to the other scenes is all that scores patches: the prior's core, clutter and the odds of edges.
    Folds are of whole people, or of single scenes where one person has nearly all of them.

    Args:
        model: with its clutter model, and with the noise that it was fitted with.
        data: all scenes.
        crops: of all scenes, as of `crops_of`.
        seed: of the windows of clutter.
    """
    fold = people_folds(len(crops), data.person)
    if len(fold) - int(torch.bincount(fold).max()) < FEWEST_PICTURES:
        fold = people_folds(len(crops), None)
    for number in fold.unique().tolist():
        others = (fold != number).nonzero().flatten()
        person = None if data.person is None else data.person[others]
        rest = GuideData(data.pyramid[others], data.gaze[others], crops[others, 0], data.clutter, person)
        there = copy.deepcopy(model)
        there.dbn.core = fit_core(crops[others], person)
        y = augmented_coordinates(crops[others]).flatten(0, 1)
        # Half as many windows of clutter: each of the folds costs as much as the model itself.
        fit_clutter(there, y, rest, torch.Generator().manual_seed(seed), WINDOWS // 2)
        yield there, (fold == number).nonzero().flatten()


def calibrate(
    model: AttentionModel,
    guide: GazeGuide,
    scenes: ScenePictures,
    held: Tensor,
    truth: Float[Tensor, "scene 4"],
    refitted: Sequence[tuple[AttentionModel, Tensor]] | None = None,
) -> dict[str, Any]:
    """Everything that is chosen on scenes not learned from; changes `model` and `guide`, returns figures for the log.

    First the guide's sds. Then the model's variant: noise, temperature, and whether the guide's belief acts as a prior
    of the gaze. Last the weights of the evidence for a mode.

    Args:
        model: scores gazes.
        guide: proposes them.
        scenes: all of them.
        held: which were held out.
        truth: true gazes, scene pixels.
        refitted: copies of the model that know nothing of some scenes, and which these are: where few are held out,
            noise and temperature are chosen on these, all taken together, and are then the copies', too. The guide has
            learned from most of the scenes, so that its belief is no prior then.
    """

    def read(rows: Tensor) -> Pyramid:
        return scene_pyramid(model, scenes.pictures(rows.tolist()))

    def of(rows: Tensor) -> Tensor:
        return truth[rows].double().to(model.dbn.core.mean.device)

    def near(there: AttentionModel, pyramid: Pyramid, rows: Tensor) -> tuple[Tensor, Tensor]:
        return _nearest(search(there, guide, pyramid, modes=6), of(rows))

    parts = held.split(BATCH)
    pyramids, true = [read(rows) for rows in parts], [of(rows) for rows in parts]
    found_near = [near(model, p, rows) for p, rows in zip(pyramids, parts, strict=True)]
    _calibrate_sds(model, guide, pyramids, found_near, true)
    # Once more: the width of a mode follows the guide's sds.
    if refitted is None:
        found_near = [near(model, p, rows) for p, rows in zip(pyramids, parts, strict=True)]
        figures = _choose_variant(model, guide, pyramids, found_near, true)
    else:
        by = [(there, rows) for there, of_fold in refitted for rows in of_fold.split(BATCH)]
        found_near = [near(there, read(rows), rows) for there, rows in by]
        # All scenes may be many: they are read once more, and never in memory together.
        again = (read(rows) for _, rows in by)
        figures = _choose_variant(
            model, guide, again, found_near, [of(rows) for _, rows in by], [there for there, _ in by]
        )
        for there, _ in refitted:
            there.noise, there.temperature = model.noise, model.temperature

    found = [search(model, guide, p, modes=6) for p in pyramids]
    return (
        figures
        | weigh_evidence(guide, found, true)
        | {"log_sd_offset": [round(float(w), 4) for w in guide.log_sd_offset]}
    )


def weigh_evidence(guide: GazeGuide, found: Sequence[Candidates], truth: Sequence[Tensor]) -> dict[str, Any]:
    """Fit the weights of the evidence for a mode, in place, to the modes found in scenes whose gazes are known.

    Args:
        guide: whose weights they are.
        found: modes of batches of scenes.
        truth: the gazes, ``(scene, 4)`` batch by batch.

    Returns:
        The weights, and how often the heaviest mode is right in these scenes: by all evidence, and by the odds alone.

    Convention: gazes in scene pixels, `foveate.model.gaze`; a mode is right where its IoU with the truth is above 0.5.
    """
    features, log_weight = torch.cat([f.features for f in found]), torch.cat([f.log_weight for f in found])
    overlap = torch.cat([gazes.overlap(f.gaze, t[:, None]) for f, t in zip(found, truth, strict=True)])
    valid = torch.isfinite(log_weight)
    guide.evidence.copy_(_evidence_weights(features, overlap > 0.5, valid))
    score = (features.nan_to_num(neginf=-1e30) * guide.evidence[:3].double()).sum(-1)
    figures: dict[str, Any] = {"evidence": [round(float(w), 6) for w in guide.evidence]}
    for name, by in (("", score), ("_odds_alone", features[..., 0])):
        chosen = torch.where(valid, by, -math.inf).argmax(-1)
        right = overlap[torch.arange(len(overlap)), chosen] > 0.5
        figures[f"validation_accuracy{name}"] = float(right.double().mean())
    return figures


def _nearest(found: Candidates, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Gaze and sds of the mode nearest to the truth: what is calibrated is precision, not the choice of the mode."""
    best = torch.arange(len(truth)), gazes.overlap(found.gaze, truth[:, None]).argmax(1)
    return found.gaze[best], found.sd[best]


def _calibrate_sds(
    model: AttentionModel,
    guide: GazeGuide,
    pyramids: list[Pyramid],
    near: list[tuple[Tensor, Tensor]],
    true: list[Tensor],
) -> None:
    """One factor for each of the guide's sds, so that they are right on the median held-out scene."""
    residuals = []
    for pyramid, (gaze, _), truth in zip(pyramids, near, true, strict=True):
        mean_v = model.dbn.to_canonical(model.dbn.core.mean).expand(len(truth), -1, -1)
        with torch.no_grad():
            change = guide.look(pyramid, gaze, mean_v, torch.arange(len(truth)))
        residual = (change_chart(gaze).to_chart(truth) - change.mean.double()) / change.log_sd.double().exp()
        residuals.append(residual[gazes.overlap(gaze, truth) > 0.5])
    residual = torch.cat(residuals)
    if len(residual) >= FEWEST_TO_CALIBRATE:
        # Median absolute residual / 0.6745 is the sd of a normal; one impossible scene does not widen all.
        guide.log_sd_offset += torch.log(residual.abs().median(0).values / 0.6745).clamp(-1.0, 1.5).float()


def _choose_variant(
    model: AttentionModel,
    guide: GazeGuide,
    pyramids: Iterable[Pyramid],
    near: list[tuple[Tensor, Tensor]],
    true: list[Tensor],
    by: list[AttentionModel] | None = None,
) -> dict[str, Any]:
    """Noise, temperature and the guide's part as a prior: the variant under which the true gazes are most probable.

    Score: mean log posterior density of the truth within its mode, in the mode's chart, nats; a proper score: an
    overconfident variant loses as much as a vague one. The posterior is normalised by importance sampling
    (`_points_about`). A scene counts for no less than `WORST`, so that no single one decides. Where no scene has a mode
    near its truth nothing is changed, and there are no figures.

    With `by` each part is scored by a model of its own, and the guide's belief does not become a prior.
    """
    if not any(bool((gazes.overlap(gaze, truth) > 0.3).any()) for (gaze, _), truth in zip(near, true, strict=True)):
        return {}
    scores: dict[tuple[bool, float, float], list[Tensor]] = {}
    means: dict[tuple[bool, float, float], list[Tensor]] = {}
    start: list[Tensor] = []
    for there, pyramid, (gaze, sd), truth in zip(by or [model] * len(near), pyramids, near, true, strict=True):
        close = gazes.overlap(gaze, truth) > 0.3
        start.append(gazes.overlap(gaze, truth)[close])
        chart = gazes.LocalChart(gaze[:, None])
        of_truth = chart.to_chart(truth[:, None])
        z, log_q = _points_about(gaze, sd, of_truth)
        at = torch.cat([chart.to_gaze(z), truth[:, None]], 1)
        z = torch.cat([z, of_truth], 1)
        patch = density_coordinates(pyramid.extract(at))
        rest = gazes.log_prior(there.prior(pyramid.size.double()[:, None]), at) + chart.log_det(z)
        belief = -0.5 * (z / sd[:, None]).square().sum(-1)
        edges = EdgeOdds.blank() if there.edges is None else there.edges
        log_edges = edges.log_odds(patch).double()
        for noise in NOISES:
            there.noise = noise
            dense_object, dense_clutter = there.marginal_densities()
            assert dense_clutter is not None
            log_odds = (dense_object.log_prob(patch) - dense_clutter.log_prob(patch)).double() + log_edges
            for temperature, with_guide in itertools.product(TEMPERATURES, (False, True)):
                log_p = log_odds / temperature + rest + with_guide * belief
                weight = log_p[:, :-1] - log_q
                score = log_p[:, -1] - torch.logsumexp(weight, -1) + math.log(weight.shape[-1])
                key = with_guide, temperature, noise
                scores.setdefault(key, []).append(score[close].clamp(min=WORST))
                mean = (torch.softmax(weight, -1)[..., None] * at[:, :-1]).sum(1)
                means.setdefault(key, []).append(gazes.overlap(mean, truth)[close])
    figures = {key: float(torch.cat(score).mean()) for key, score in scores.items()}
    iou = {key: float(torch.cat(values).mean()) for key, values in means.items()}
    allowed = [key for key in figures if by is None or not key[0]]
    best = max(allowed, key=lambda key: figures[key] + (0.0 if key[0] else PREFERENCE))
    alone, aided = (
        max((key for key in figures if key[0] == with_guide), key=figures.__getitem__) for with_guide in (False, True)
    )
    guide.prior_weight.fill_(float(best[0]))
    model.temperature, model.noise = best[1], best[2]
    return {
        "guide_prior": best[0],
        "validation_log_density": figures[best],
        "validation_log_density_without_guide_prior": figures[alone],
        "validation_iou_guide": float(torch.cat(start).mean()),
        "validation_iou_posterior": iou[best],
        "validation_iou_posterior_without_guide_prior": iou[alone],
        "variants": {
            name: {"temperature": key[1], "noise": key[2]}
            for name, key in (("without_guide_prior", alone), ("with_guide_prior", aided))
        },
    }


def _points_about(
    gaze: Float[Tensor, "scene 4"], sd: Float[Tensor, "scene 4"], truth: Float[Tensor, "scene 1 4"]
) -> tuple[Float[Tensor, "scene point 4"], Float[Tensor, "scene point"]]:
    """Points of an importance sampler over a mode's chart, and the log density of the mixture they are drawn from.

    Most are spread as in `mode_points`. The others lie closely about the truth: a posterior that peaks there and falls
    off between two of the wide points would else be taken for one with hardly any mass, and its density at the
    truth for huge; the narrowest variant would always be the best where labels are exact, as in composed scenes.

    Convention: `gaze` in scene pixels; `sd` and `truth` in the units of `LocalChart` at it.
    """
    components = [(torch.zeros_like(truth), 1.0, WIDE_POINTS)] + [(truth, share, NARROW_POINTS) for share in NARROW]
    z = torch.cat([at + mode_points(gaze[:, None], s * sd[:, None], n).z[:, 0] for at, s, n in components], 1)
    parts = []
    for at, share, count in components:
        law = torch.distributions.Normal(at, share * SPREAD * sd[:, None])
        parts.append(law.log_prob(z).sum(-1) + math.log(count / z.shape[1]))
    return z, torch.logsumexp(torch.stack(parts), 0)


def _evidence_weights(
    features: Float[Tensor, "scene mode 3"], right: Bool[Tensor, "scene mode"], valid: Bool[Tensor, "scene mode"]
) -> Float[Tensor, "4"]:
    """Weights of a mode's evidence, and the constant that sets it against "no object here".

    The weights of (integrated log-odds, recognition logit, presence logit) maximise the likelihood of the true mode
    among the modes found: a conditional logit, with a ridge towards `EVIDENCE`. The constant lies midway between the
    weakest tenth of the right modes and the strongest tenth of the wrong ones.
    """
    everything = features.nan_to_num(neginf=-30.0).double()
    start, width = everything.new_tensor(EVIDENCE), everything.new_tensor([0.3, 0.5, 0.3])
    # Scenes whose object is not among the modes say nothing about how to choose among them.
    usable = (right & valid).any(-1)
    x, good, present = everything[usable], (right & valid)[usable], valid[usable]
    w = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        score = (x * w).sum(-1)
        of_right = torch.logsumexp(torch.where(good, score, -math.inf), -1)
        of_all = torch.logsumexp(torch.where(present, score, -math.inf), -1)
        loss = (of_all - of_right).sum() + 0.5 * ((w - start) / width).square().sum()
        loss.backward()
        return loss

    if len(x):
        optimiser.step(closure)
    found = w.detach().clamp(min=0.0)
    score = (everything * found).sum(-1)
    of_right, of_wrong = score[right & valid], score[~right & valid]
    if len(of_right) == 0 or len(of_wrong) == 0:
        constant = -float(score[valid].mean())
    else:
        constant = -0.5 * float(of_right.quantile(0.1) + of_wrong.quantile(0.9))
    return torch.tensor([*found.tolist(), constant]).float()


def held_out(count: int, people: Sequence[str | None] | None, generator: torch.Generator) -> Bool[Tensor, " scene"]:
    """Which scenes are kept for calibration: about 12 %, at most 60, whole people where people are known.

    Whole people may make them half as many again; where every person has more scenes than that, single scenes are held
    out. Where few are wanted one person is taken before several whose scenes are as many: there is the more variety
    left to learn from.
    """
    wanted = min(max(4, round(HELD_OUT * count)), MOST_HELD_OUT)
    person = person_numbers(people)
    group = torch.arange(count) if person is None else person
    held = torch.zeros(count, dtype=torch.bool)
    size = torch.bincount(group)
    order = torch.randperm(len(size), generator=generator).tolist()
    if wanted < ENOUGH_HELD_OUT:
        order.sort(key=lambda g: not wanted <= int(size[g]) <= 1.5 * wanted)
    for g in order:
        if int(held.sum()) + int(size[g]) <= 1.5 * wanted:
            held |= group == g
        if int(held.sum()) >= wanted:
            break
    if not bool(held.any()):
        held[torch.randperm(count, generator=generator)[:wanted]] = True
    return held


def person_numbers(people: Sequence[str | None] | None) -> Tensor | None:
    """People as numbers from 0, ``(scene,)``; a scene whose person is not known counts as a person of its own."""
    if people is None:
        return None
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(p if p is not None else f"?{i}", len(number)) for i, p in enumerate(people)])


def gaze_prior_options(pyramid: Pyramid, truth: Float[Tensor, "scene 4"]) -> dict[str, float]:
    """The gaze prior's settings from the training gazes, widened by a half: the next pictures are by other hands."""
    parts = gazes.parts(truth.double())
    share = torch.log(gazes.CANONICAL_SIZE * parts.scale / pyramid.size.amin(-1))
    return {
        "typical": float(share.mean().exp()),
        "log_scale_sd": max(0.3, 1.5 * float(share.std())),
        "rotation_sd": min(max(0.15, 1.5 * float(parts.rotation.std())), math.pi),
    }
