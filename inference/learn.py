"""Monte-Carlo EM: a run learns a new population from pictures without labels (Tang et al. 2014, sec. 3).

E-step: in every scene the run looks for the object; two chains draw gazes from the heaviest mode's posterior, from
where they ended in the round before if the mode is still there; patches at and about their mean are kept. M-step:
guide, prior, clutter model and the prior over gazes are trained on what was found, and the evidence for a mode is
weighed anew.

Patches about the mean, not under the draws: the posterior is tempered (see `fit`) until a draw is as far from the mean
as the mean is from the truth. A prior that has learned from patches under draws is blurred by both, so that the next
posterior is wider, and so on from round to round. Instead they lie about the mean much as `fit`'s lie about labels,
equally widely in every round.

Where exactly the square lies about what was found, its middle decides: from the second E-step on the mean is that of
the odds of the pixels within the aperture alone, by the round's own prior and clutter model. Edges, as the model
weighs them, and what a square shows towards its corners have been learned from squares that were found with them, and
hold new ones to the outline: of a head that is turned aside the square then takes the middle of the head, not that of
the face. Nothing tells it so afterwards, since all that is trained is trained on those squares. Not in the first
E-step: pixels of another population do not know where this one's objects are.

Where the start takes its guide's belief as a prior of the gaze, the first E-step does so, too: it holds the chains
where the odds do not know the population yet. From the first M-step on the guide proposes and no more: the odds have
then seen the population, and a guide that was trained on draws would confirm them, wrong ones as well, so that what is
found would scatter more from round to round.

Which scenes an M-step learns from is itself drawn: a scene takes part with its *certainty*. The odds that the object
has been found are squared, as if it had been seen twice, and it must be at the same place as in the round before. What
the run doubts seldom takes part, and where it has changed its mind it waits for the next round; nothing is cut off
for good.

Some scenes are held out of what an M-step trains: their crops tell the prior when to stop, what is found in them
weighs the evidence for a mode anew, and watches the rest (`Monitor`). A round that no longer finds what the start was
sure of in them has drifted; one that is less sure of them than the start was has learned its own scenes by heart.
Either is dropped, and learning stops. It has also ended where the run grows no surer of what it learns from: a few
thousand scenes take four or five rounds, a few hundred take more.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.inference.attend import (
    MERGE,
    TRAJECTORIES,
    chain_starts,
    mode_points,
    mode_potential,
    scene_pyramid,
    search,
)
from foveate.inference.checkpoint import Run, atomic_file, load, require_known_prior, save, write_json
from foveate.inference.fit import (
    APERTURE,
    Progress,
    ScenePictures,
    coarse_pyramid,
    fit_clutter,
    gaze_prior_options,
    jittered,
    weigh_evidence,
)
from foveate.inference.guide import GazeGuide
from foveate.inference.guide_training import GuideData, train_glance, train_looks
from foveate.inference.hmc import sample_batch
from foveate.inference.noise import KeyedNoise, Purpose, made_on_cpu, stream_keys
from foveate.inference.posterior import picture_hash
from foveate.inference.prior_training import augmented_coordinates, train_dbn
from foveate.inference.resume import digest, holds_work
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.density import choose_elliptical
from foveate.model.edges import require_wide_enough
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates, disc, extract
from foveate.model.threads import in_parallel

__all__ = ["Monitor", "UnlabelledPictures", "learn"]

# Scenes that are attended to together and written together; chains in each, draws that adapt and draws that are kept.
PART = 16
CHAINS, WARMUP, DRAWS = 2, 8, 10
# Patches that are kept of each scene beside the one at the posterior mean, and their jitter about it: canonical pixels,
# and log-scale and radians (see the module).
JITTERED, JITTER = 5, (0.4, 0.035)
# The middle places the square: temperature of the odds of the pixels within the aperture, and points about a mode at
# which they are read (see the module).
MIDDLE_TEMPERATURE, MIDDLE_POINTS = 8.0, 256
# An M-step reads at most so many texels of scenes (a byte each), whatever their number and size.
MOST_TEXELS = 800_000_000
# Pictures without the object that an M-step reads at most.
MOST_CLUTTER = 200
# Fewer scenes teach nothing; as for the bootstrap.
FEWEST = 12
# The prior and the clutter model read the crops of at most so many scenes, whatever the number of scenes.
MOST_CROPPED = 8000
# Share of the scenes held out to watch, and at most so many.
HELD_OUT, MOST_HELD_OUT = 0.1, 120
# Of what the start was sure of, a round must find at least this share again. A start is not always right where it is
# surest, so that a better round may well lose some of it.
RETAINED = 0.75
# Learning has settled where a round is surer of the scenes it learns from than the one before by less than this.
SETTLED = 0.03
# Learning rates, as shares of the bootstrap's: the guide goes on from where it is.
RATE = 0.7


@runtime_checkable
class UnlabelledPictures(ScenePictures, Protocol):
    """What `learn` needs: pictures by index and their names, as `foveate.data.UnlabelledScenes` has them."""

    @property
    def names(self) -> Sequence[str]: ...


class Monitor(NamedTuple):
    """What a round was, and what the held-out scenes say of it; no label is used anywhere.

    Attributes:
        round: 0 is the start.
        learned_from: scenes that the round's M-step was trained on.
        certainty: mean certainty of the training scenes, in [0, 1].
        presence: mean probability that the gaze reported for a held-out scene is on the object.
        retained: share of what the start was sure of that is found again at the same place.
        moved: share of held-out scenes whose gaze is elsewhere (IoU below 0.5) than in the round before.
        chains_agree: mean IoU of the two chains' mean gazes.
        bound: mean bound of the round's prior on the crops found in held-out scenes, weighted by presence, nats;
            a little flattering, as the prior stopped where it was best on the crops found there before.
        accepted: whether the round was kept.
    """

    round: int
    learned_from: int
    certainty: float
    presence: float
    retained: float
    moved: float
    chains_agree: float
    bound: float
    accepted: bool


# Called after every round with the run as it is then.
EachRound = Callable[[Monitor, Run], None]


@made_on_cpu
def learn(
    run: Run,
    scenes: UnlabelledPictures,
    clutter: ScenePictures | None = None,
    *,
    rounds: int = 8,
    glance_steps: int = 1500,
    look_steps: int = 800,
    dbn_steps: int = 2000,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    each_round: EachRound | None = None,
) -> Run:
    """Learn the objects of scenes without labels, by rounds of Monte-Carlo EM.

    Time grows linearly with the number of scenes, memory does not: scenes are attended to in parts, each written to
    disk before the next is read, and an M-step reads a bounded number of them.

    Args:
        run: where to start: knows the object from other pictures (`foveate.inference.fit`). It is not changed.
        scenes: pictures and names; a type that carries labels is refused.
        clutter: pictures without the object; None takes windows that miss what was found.
        rounds: of E-step and M-step, at most: learning stops where a round has drifted and where it has settled.
        glance_steps: of the guide's peripheral half in each round.
        look_steps: of its foveal half in each round.
        dbn_steps: of the prior in each round, at most (it stops itself).
        seed: of every random number used.
        checkpoint: a folder that is written after every part of an E-step and every stage of an M-step; by default
            one that is gone afterwards.
        resume: go on from `checkpoint`, to the same result bit for bit as without an interruption, on as many threads.
        progress: called with stage, steps done, steps in all and a figure to watch.
        each_round: called after every round, and once before the first.

    Returns:
        The last run that was kept, with ``config["learning"]`` holding the `Monitor` of every round as a dict.

    Raises:
        InputError: for scenes with labels, fewer than 24 scenes, a start without clutter model or one that recognises
            the object in fewer than 12 scenes, numbers below 1, a checkpoint that exists where none is resumed,
            or one of other scenes or settings.
    """
    numbers = {"rounds": rounds, "glance_steps": glance_steps, "look_steps": look_steps, "dbn_steps": dbn_steps}
    _check(run, scenes, numbers)
    plan = _Plan(scenes, clutter, seed, numbers, progress or (lambda stage, done, total, figure: None))
    if checkpoint is None:
        with tempfile.TemporaryDirectory(prefix="foveate_learn_") as folder:
            return _learn(run, plan, Path(folder), each_round)
    _open_checkpoint(Path(checkpoint), run, plan, resume)
    return _learn(run, plan, Path(checkpoint), each_round)


@dataclass(frozen=True)
class _Plan:
    """What does not change from round to round."""

    scenes: UnlabelledPictures
    clutter: ScenePictures | None
    seed: int
    numbers: dict[str, int]
    report: Progress

    def generator(self, *key: int) -> torch.Generator:
        """A generator for one purpose of one round; key 8 serves two: what weighs the evidence, order of reading."""
        return torch.Generator().manual_seed(self.seed_of(*key))

    def seed_of(self, *key: int) -> int:
        number = self.seed
        for k in key:
            number = (number * 1_000_003 + k + 1) % 2**31
        return number

    def split(self) -> tuple[list[int], list[int]]:
        """Scenes to learn from and scenes held out, each in ascending order."""
        count = len(self.scenes)
        wanted = min(max(FEWEST, round(HELD_OUT * count)), MOST_HELD_OUT)
        order = torch.randperm(count, generator=self.generator(0)).tolist()
        return sorted(order[wanted:]), sorted(order[:wanted])


class _Parts(NamedTuple):
    """What an E-step wrote: a folder of parts, the scenes in them, and the step's name."""

    folder: Path
    scenes: list[int]
    stage: str

    def files(self) -> list[Path]:
        return [self.folder / f"part_{k:05d}.safetensors" for k in range(math.ceil(len(self.scenes) / PART))]

    def read(self, name: str, rows: Tensor | None = None) -> Tensor:
        """One tensor of all scenes, or of the scenes at `rows` (ascending), part by part."""
        kept = []
        for k, path in enumerate(self.files()):
            with safe_open(path, "pt") as part:
                found = part.get_tensor(name)
            if rows is not None:
                found = found[rows[(rows >= k * PART) & (rows < (k + 1) * PART)] - k * PART]
            kept.append(found)
        return torch.cat(kept)


def _learn(start: Run, plan: _Plan, folder: Path, each_round: EachRound | None) -> Run:
    train, held = plan.split()
    device = _device(start)
    run = _stage(folder / "start", lambda: start, device)
    first = before_held = _expectation(run, plan, _Parts(folder / "round_0" / "held", held, "looking, start"), None, 0)
    before: _Parts | None = None
    sure = 0.0
    monitors = [_monitor(run, 0, before_held, first, first, 0, 0.0)]
    if each_round:
        each_round(monitors[0], run)
    for number in range(1, plan.numbers["rounds"] + 1):
        place = folder / f"round_{number}"
        found = _expectation(run, plan, _Parts(place / "parts", train, f"looking, round {number}"), before, number)
        certainty = _certainty(found, before)
        chosen = _chosen(certainty, plan.generator(number, 1))
        if len(chosen) < FEWEST:
            if number > 1:
                break
            raise InputError(
                f"the run recognises the object in {len(chosen)} of {len(train)} scenes, at least {FEWEST} are needed: "
                "start from one that was trained on more or nearer scenes"
            )
        learned = _maximisation(run, plan, place, number, found, before_held, chosen)
        after = _Parts(place / "held", held, f"watching, round {number}")
        after = _expectation(learned, plan, after, before_held, number)
        monitor = _monitor(learned, number, after, before_held, first, len(chosen), float(certainty.mean()))
        monitors.append(monitor)
        if each_round:
            each_round(monitor, learned)
        if not monitor.accepted:
            break
        run, before, before_held = learned, found, after
        if monitor.certainty < sure + SETTLED:
            break
        sure = monitor.certainty
    return Run(run.model, run.guide, run.config | {"learning": [m._asdict() for m in monitors]})


def _stage(place: Path, make: Callable[[], Run], device: torch.device) -> Run:
    """The run at `place`, made and written there if it is not yet: what goes on is always what was read from disk."""
    if not (place / "config.json").exists():
        save(make(), place)
    run = load(place)
    return Run(run.model.to(device), run.guide.to(device), run.config)


def _expectation(run: Run, plan: _Plan, parts: _Parts, before: _Parts | None, number: int) -> _Parts:
    """Attend to the scenes of `parts` and write what was found; parts that are there already are kept."""
    parts.folder.mkdir(parents=True, exist_ok=True)
    run.guide.eval()
    keys = stream_keys(plan.scenes.names)
    paths = parts.files()

    def attended(k: int) -> dict[str, Tensor] | None:
        if paths[k].exists():
            return None
        carried = None
        if before is not None:
            with safe_open(before.files()[k], "pt") as part:
                carried = {name: part.get_tensor(name) for name in part.keys()}
        rows = parts.scenes[k * PART : (k + 1) * PART]
        return _attended(run, plan.scenes.pictures(rows), keys[rows], carried, plan.seed_of(number, 2))

    sure, done = 0.0, 0
    for path, found in zip(paths, in_parallel(attended, range(len(paths)), _device(run)), strict=True):
        if found is not None:
            with atomic_file(path) as beside:
                save_file(found, beside)
        with safe_open(path, "pt") as part:
            presence = part.get_tensor("presence")
        sure, done = sure + float(presence.sum()), done + len(presence)
        plan.report(parts.stage, done, len(parts.scenes), sure / done)
    return parts


@torch.no_grad()
def _attended(
    run: Run, pictures: list[Tensor], keys: Int[Tensor, " scene"], before: dict[str, Tensor] | None, seed: int
) -> dict[str, Tensor]:
    """One part of an E-step; `keys` are those of the scenes' random numbers.

    Returns:
        ``presence (scene)``: probability that the heaviest mode is the object; ``gaze (scene, 4)``: its mean, from
        the scene's second E-step on `_recentred`;
        ``draws (scene, chain, draw, 4)``; ``crops (scene, 1 + JITTERED, 24, 24)``: at the mean and about it; and what
        the next round's chains carry.
    """
    pyramid = scene_pyramid(run.model, pictures)
    found = search(run.model, run.guide, pyramid)
    base, sd = found.gaze[:, 0], found.sd[:, 0]
    potential = mode_potential(run.model, run.guide, pyramid, base, sd)
    streams = keys[:, None] * 1009 + torch.arange(CHAINS, device=keys.device)
    z = chain_starts(potential, base, sd, KeyedNoise(seed, streams))
    adaptation: dict[str, Tensor] = {}
    if before is not None:
        stayed = gazes.overlap(before["gaze"].to(base), base) > MERGE
        carried = potential.chart.to_chart(before["draws"][:, :, -1].to(base))
        stayed = stayed & torch.isfinite(potential(carried)[0]).all(-1)
        z = torch.where(stayed[:, None, None], carried, z)
        names_carried = ("streams", "log_step", "inverse_mass", "log_length")
        adaptation = {name: before[name][stayed.cpu()] for name in names_carried} if bool(stayed.any()) else {}
    z, _ = sample_batch(
        potential,
        z,
        num_samples=DRAWS,
        warmup_steps=WARMUP,
        seed=seed,
        streams=streams,
        adaptation=adaptation,
        **TRAJECTORIES["batched"],
    )
    draws = gazes.LocalChart(base[:, None, None]).to_gaze(z)
    mean = draws.mean((1, 2))
    if before is not None:
        mean = _recentred(run.model, pyramid, mean, sd)
    noise = torch.from_numpy(KeyedNoise(seed, keys).normal(Purpose.JITTER, 0, JITTERED, 4))
    about = jittered(mean.cpu(), noise, *JITTER)
    at = torch.cat([mean.cpu()[:, None], about.transpose(0, 1)], 1)
    # By the definition of extraction, as the bootstrap's crops are, not as the search reads the scene.
    crops = torch.stack([extract(picture, gaze).float() for picture, gaze in zip(pictures, at, strict=True)])
    present = torch.sigmoid(torch.logsumexp(found.log_weight, -1))
    result = {
        "presence": present * torch.softmax(found.log_weight, -1)[:, 0],
        "gaze": mean,
        "draws": draws,
        "crops": crops,
        **adaptation,
    }
    return {name: value.detach().cpu().contiguous() for name, value in result.items()}


def _recentred(
    model: AttentionModel, pyramid: Pyramid, gaze: Float[Tensor, "scene 4"], sd: Float[Tensor, "scene 4"]
) -> Float[Tensor, "scene 4"]:
    """Where the middle of the square says that the square is: the mean of its own posterior about `gaze`.

    Convention: gazes in scene pixels, `foveate.model.gaze`; `sd`, of the points, in the units of `LocalChart`.
    """
    points = mode_points(gaze[:, None], sd[:, None], MIDDLE_POINTS)
    at = points.gaze[:, 0]
    y = density_coordinates(pyramid.extract(at))
    of_object, of_clutter = model.marginal_densities()
    assert of_clutter is not None
    if model.aperture is None:
        # A run of an earlier version.
        of_object, of_clutter = (density.within(disc(APERTURE).to(y)) for density in (of_object, of_clutter))
    log_odds = (of_object.log_prob(y) - of_clutter.log_prob(y)).double()
    rest = gazes.log_prior(model.prior(pyramid.size.double()[:, None]), at) + (points.log_det - points.log_q)[:, 0]
    # Where the prior forbids all points they weigh the same.
    weight = torch.softmax((log_odds / MIDDLE_TEMPERATURE + rest).clamp(min=-1e30), -1)
    return (weight[..., None] * at).sum(1)


def _certainty(found: _Parts, before: _Parts | None) -> Float[Tensor, " scene"]:
    """How sure the run is of what it found, and of having found it before; see the module."""
    present = found.read("presence")
    certainty = present.square() / (present.square() + (1 - present).square())
    if before is None:
        return certainty
    return certainty * (gazes.overlap(found.read("gaze"), before.read("gaze")) > 0.5)


def _chosen(certainty: Float[Tensor, " scene"], generator: torch.Generator) -> Int[Tensor, " chosen"]:
    """Rows drawn with their certainty as probability, ascending."""
    uniform = torch.rand(len(certainty), generator=generator, dtype=torch.float64)
    return (uniform < certainty).nonzero().flatten()


def _maximisation(
    run: Run, plan: _Plan, place: Path, number: int, found: _Parts, held: _Parts, chosen: Int[Tensor, " chosen"]
) -> Run:
    """One M-step, stage by stage: the guide's glance, its looks, then everything that is believed."""
    device = _device(run)
    steps, report = plan.numbers, plan.report
    read: list[GuideData] = []

    def data() -> GuideData:
        if not read:
            read.append(_guide_data(plan, found, chosen, number))
        return read[0]

    def guided(half: str, train: Callable[..., float], before: Path, rate: float, key: int) -> Run:
        following = load(before)
        train(
            following.guide.to(device),
            data(),
            steps=steps[f"{half}_steps"],
            rate=RATE * rate,
            seed=plan.seed_of(number, key),
            progress=lambda i, n, loss: report(f"{half}, round {number}", i, n, loss),
        )
        return following

    def believe() -> Run:
        following = load(place / "look")
        some = torch.randperm(len(chosen), generator=plan.generator(number, 10))[:MOST_CROPPED].sort().values
        crops = found.read("crops", chosen[some])
        sure = _chosen(_certainty(held, None), plan.generator(number, 9))
        watched = held.read("crops")[:, 0]
        dbn = train_dbn(
            crops,
            # Too few: then a share of the crops is set aside.
            validation=watched[sure] if len(sure) >= FEWEST else None,
            steps=steps["dbn_steps"],
            seed=plan.seed_of(number, 6),
            progress=lambda share, seen: report(f"prior, round {number}", int(1000 * share), 1000, seen.bound),
        )
        # Where the crops are; the stage that comes back from disk is moved to the device.
        model = following.model
        # In place: what else belongs to the model (noise, temperature, ...) stays as the bootstrap calibrated it.
        model.dbn = dbn
        guide = following.guide.eval()
        config = _without_guide_prior(model, guide, following.config)
        if model.gaze_prior == "proper":
            model.prior_options = gaze_prior_options(data().pyramid, data().gaze)
        y = augmented_coordinates(crops).flatten(0, 1)
        fit_clutter(model, y, data(), plan.generator(number, 7))
        validation = density_coordinates(watched)
        for name in ("gaussian", "student_t"):
            model.baselines[name], _ = choose_elliptical(y, validation, student=name == "student_t")
        # What was found out on labels is the start's: the guide's sds have been trained anew, on more scenes than they
        # were calibrated on, and for the posterior's scenes without labels know no other factor.
        of_start = ("coverage_factor", "log_sd_offset", "calibrated_on")
        config = {n: v for n, v in config.items() if n not in of_start and not n.startswith("validation_")}
        return _weighed(Run(model, guide, config), plan, held, number)

    start = place.parent / ("start" if number == 1 else f"round_{number - 1}/run")
    # The rates are the bootstrap's, see `train_glance` and `train_looks`.
    _stage(place / "glance", lambda: guided("glance", train_glance, start, 3e-3, 3), device)
    _stage(place / "look", lambda: guided("look", train_looks, place / "glance", 2e-3, 4), device)
    return _stage(place / "run", believe, device)


@torch.no_grad()
def _without_guide_prior(model: AttentionModel, guide: GazeGuide, config: dict[str, Any]) -> dict[str, Any]:
    """Let the guide propose and no more, in place: with the noise and temperature that `fit` chose for that variant."""
    if float(guide.prior_weight) == 0:
        return config
    guide.prior_weight.zero_()
    variant = config.get("variants", {}).get("without_guide_prior")
    if variant is not None:
        model.temperature, model.noise = variant["temperature"], variant["noise"]
    return config | {"guide_prior": False}


@torch.no_grad()
def _weighed(run: Run, plan: _Plan, held: _Parts, number: int) -> Run:
    """The run with the evidence for a mode weighed anew, in place.

    In scenes held out, drawn with the certainty of the round before, what was found then counts as the truth: the run
    that found it is not the one whose modes are weighed, and neither has learned from these scenes.
    """
    chosen = _chosen(_certainty(held, None), plan.generator(number, 8))
    if len(chosen) < FEWEST:
        return run
    gaze = held.read("gaze", chosen)
    found, truth = [], []
    for begin in range(0, len(chosen), PART):
        rows = [held.scenes[i] for i in chosen[begin : begin + PART].tolist()]
        found.append(search(run.model, run.guide, scene_pyramid(run.model, plan.scenes.pictures(rows)), modes=6))
        truth.append(gaze[begin : begin + PART].to(found[-1].gaze))
    figures = weigh_evidence(run.guide, found, truth)
    return Run(run.model, run.guide, run.config | {"evidence": figures["evidence"]})


def _device(run: Run) -> torch.device:
    return run.model.dbn.core.mean.device


def _guide_data(plan: _Plan, found: _Parts, chosen: Int[Tensor, " chosen"], number: int) -> GuideData:
    """Windows of the chosen scenes for the guide, in random order until the memory set aside for them is full."""
    generator = plan.generator(number, 8)
    order = chosen[torch.randperm(len(chosen), generator=generator)]
    count = 0

    def parts() -> Iterator[Pyramid]:
        nonlocal count
        texels = 0
        for part in _one_by_one(plan.scenes, [found.scenes[row] for row in order.tolist()]):
            texels += part.texels.numel()
            if texels > MOST_TEXELS:
                return
            count += 1
            plan.report(f"reading, round {number}", count, len(order), 0.0)
            yield part

    # Pages that are never written to take no memory.
    pyramid = Pyramid.concatenate(parts(), torch.empty(MOST_TEXELS, dtype=torch.int8))
    rows, place = order[:count].sort()
    clutter = None
    if plan.clutter is not None:
        some = torch.randperm(len(plan.clutter), generator=generator)[:MOST_CLUTTER].sort().values
        clutter = Pyramid.concatenate(_one_by_one(plan.clutter, some.tolist()))
    return GuideData(pyramid[place], found.read("gaze", rows), found.read("crops", rows)[:, 0], clutter)


def _one_by_one(scenes: ScenePictures, rows: Sequence[int]) -> Iterator[Pyramid]:
    """Scenes as the guide's training reads them, in bytes; never two as the floats they are built from."""
    for row in rows:
        yield coarse_pyramid(scenes, [row]).in_bytes()


@torch.no_grad()
def _monitor(
    run: Run, number: int, after: _Parts, before: _Parts, first: _Parts, learned_from: int, certainty: float
) -> Monitor:
    gaze, presence, draws = after.read("gaze"), after.read("presence"), after.read("draws")
    sure = first.read("presence").square()
    same = (gazes.overlap(gaze, first.read("gaze")) > 0.5).double()
    retained = float((sure * same).sum() / sure.sum())
    y = density_coordinates(after.read("crops")[:, 0]).to(run.model.dbn.core.mean)
    bound = run.model.dbn.log_prob_bound(y).double().cpu()
    chain = draws.mean(2)
    # EM drives certainty up wherever it works at all, right or wrong: where it falls on scenes held out, it does not.
    # A start that is sure of all is not to be followed: few scenes' crops would replace those it has learned from.
    surer = float(presence.mean()) >= float(first.read("presence").mean())
    return Monitor(
        round=number,
        learned_from=learned_from,
        certainty=certainty,
        presence=float(presence.mean()),
        retained=retained,
        moved=float((gazes.overlap(gaze, before.read("gaze")) < 0.5).double().mean()),
        chains_agree=float(gazes.overlap(chain[:, 0], chain[:, 1]).mean()),
        bound=float((presence * bound).sum() / presence.sum()),
        accepted=retained >= RETAINED and surer and math.isfinite(float(bound.mean())),
    )


def _check(run: Run, scenes: UnlabelledPictures, numbers: dict[str, int]) -> None:
    if hasattr(scenes, "gazes"):
        raise InputError("these scenes carry labels, which learning must not see: give scenes.without_gazes()")
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name}={number}: at least 1 is needed")
    if len(scenes) < 2 * FEWEST:
        raise InputError(f"{len(scenes)} scenes to learn from: at least {2 * FEWEST} are needed")
    require_known_prior(run.model, "learned with")
    if run.model.clutter is None:
        raise InputError("the run has no clutter model, so it cannot search scenes: train it anew with `foveate train`")
    require_wide_enough(run.model.aperture)


def _open_checkpoint(folder: Path, run: Run, plan: _Plan, resume: bool) -> None:
    """Make the folder, or see that what lies there is the same work."""
    scenes, settings = plan.scenes, run.model.config
    described = {
        "scenes": len(scenes),
        "names": digest(stream_keys(scenes.names)),
        "pictures": _some_hashes(scenes),
        "clutter": None if plan.clutter is None else [len(plan.clutter), *_some_hashes(plan.clutter)],
        "seed": plan.seed,
        "start": digest(*(v for part in (run.model, run.guide) for v in part.state_dict().values())),
        "start_settings": [settings[n] for n in ("temperature", "noise", "aperture", "gaze_prior", "prior_options")],
        **plan.numbers,
    }
    path = folder / "plan.json"
    # A folder whose plan could not be written, on a full disk say, is a beginning with resume, too.
    if not holds_work(folder) and (folder.is_dir() or not resume):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, described)
        return
    if not resume:
        raise InputError(f"{folder}: holds unfinished learning; go on from it with resume, or remove it")
    if not path.is_file():
        raise InputError(f"{folder}: holds no learning to resume; leave resume away")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in described.items() if earlier.get(name) != value]
    if different:
        raise InputError(f"{path}: the work there is another one ({', '.join(different)} differ); resume it as it was")


def _some_hashes(scenes: ScenePictures) -> list[str]:
    """What tells the pictures from others without reading all of them: the first, the last, and some in between."""
    last = len(scenes) - 1
    return [picture_hash(scenes.pictures([i])[0]) for i in sorted({k * last // 4 for k in range(5)})]
