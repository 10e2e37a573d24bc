"""The command `localisation`, the paper's first experiment (Tang et al. 2014, Fig. 4, Fig. 5 and Table 1).

Where is the object in whole scenes, with no initial gaze and by the paper's own protocol, beside what people would use
instead; how far a start may be off; and whether the probabilities that come with a gaze are true.

Convention (the whole module): gazes as in `foveate.model.gaze`, scene pixels; IoU between the squares of two gazes; an
object is found where its IoU is above 0.5.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from foveate.data import Scenes
from foveate.data.joining import re_expressed
from foveate.data.scenes import parse_spec
from foveate.experiments.conventions import (
    COMPARED,
    LIGHT,
    convention_of,
    labelled_scenes,
    training_scenes,
)
from foveate.experiments.detectors import Detector, HaarDetector, TemplateSearch, require_opencv
from foveate.experiments.figures import (
    Convergence,
    convergence_figure,
    reliability_figure,
    scenes_figure,
    steps_figure,
)
from foveate.experiments.options import Common, announce, open_run, print_table, require_at_least, require_steps
from foveate.experiments.outputs import check_directory, markdown_table, save_figure, write_text
from foveate.experiments.scoring import Sampling
from foveate.experiments.training import Budget, default_clutter, fit_logged, remove_unfinished
from foveate.inference.attend import Candidates, attend, canonical_draws, scene_pyramid, search
from foveate.inference.calibration import LEVEL, Reliability, reach, reliability
from foveate.inference.checkpoint import Run, write_json
from foveate.inference.evaluate import jittered_starts, versions
from foveate.inference.guide import WINDOW, GazeGuide
from foveate.inference.posterior import Posterior
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.threads import in_parallel

__all__ = ["ERRORS", "Localisation", "starts_off_by"]

# Initial errors of Fig. 5 (offsets in patch widths, factors of scale, degrees), and how they are told.
ERRORS = {"offset": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5), "scale": (0.5, 0.71, 1.41, 2.0), "rotation": (10, 20, 30, 45)}
TOLD = {"offset": "{:g} widths off", "scale": "scale × {:g}", "rotation": "{:g}° turned"}
# Looks of the guide before sampling; how many are followed to see where they end, and what counts as being there.
LOOKS, FOLLOWED, THERE = 4, 8, 0.01
# Scenes of a collection that are shown step by step.
SHOWN = 5
# Failures in one sheet.
SHEET = 200
BATCH = 16

METHODS = {
    "guide": "foveate, before sampling",
    "posterior": "foveate, posterior mean",
    "haar": "Haar cascade (OpenCV)",
    "correlation": "normalised cross-correlation",
    "distance": "Euclidean template",
    "protocol_guide": f"random initial gaze, {LOOKS} looks",
    "protocol_posterior": f"random initial gaze, {LOOKS} looks and HMC",
}
# Columns of Table 1: heading, score and its digits; and what is told of coverage.
TABLE_1 = ("method", "accuracy", "mean IoU", "windows a scene", "scenes a second")
COLUMNS = (("accuracy", 3), ("mean_iou", 3), ("windows", 0), ("scenes_per_second", 1))
COVERAGES = {
    "factor": "factor on the sds",
    "coverage": "as sampled",
    "coverage_recalibrated": "with the factor",
    "coverage_re_expressed": "as sampled, labels re-expressed",
    "coverage_recalibrated_re_expressed": "with the factor, labels re-expressed",
}


@dataclass(frozen=True, kw_only=True)
class Localisation(Common):
    """The paper's first experiment: where the object is in whole scenes, beside Haar and template search.

    Attributes:
        out: a folder; runs that an earlier call has trained there are used again, everything else is replaced.
        runs: a trained run; repeatable, one a seed. Without any, runs are trained.
        data: scenes to find the object in; repeatable, each SPEC is scored by itself. By default orl@test.
        train: scenes to train on, and to fit the classical detectors on; repeatable. By default orl@train.
        clutter: pictures without the object to train on, as for the command train.
        empty: pictures without the object to judge presence by, folder:DIR or orl; by default crops of photographs
            that scikit-image bundles, where it is installed.
        seeds: how many runs are trained.
        starts: scenes of each SPEC that are started from every initial error.
        budget: how long to train each.
        sampling: how much to sample.
    """

    out: Path
    runs: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(name="run")] = ()
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    train: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    clutter: str | None = None
    empty: str | None = None
    seeds: int = 3
    starts: int = 24
    budget: Budget = field(default_factory=Budget)
    sampling: Sampling = field(default_factory=lambda: Sampling(draws=200, warmup=100))

    def run(self) -> None:
        require_steps(self.budget)
        self.sampling.check()
        require_at_least("--seeds", self.seeds, 1)
        require_at_least("--starts", self.starts, 1)
        check_directory(self.out, {"results.json": "collections", "seed_0": None, "seed_0.training": None})
        require_opencv()
        began = time.perf_counter()
        collections = _collections(self.data or ("orl@test",), self.seed)
        train, labels = labelled_scenes(self.train or ("orl@train",), self.seed)
        empty = default_clutter(self.empty, self.seed, "test")
        given = [open_run(path, self.torch_device) for path in self.runs]
        announce(f"{len(collections)} collections, {len(given) or self.seeds} seeds; everything goes to {self.out}")
        for scenes in (train, *(c.scenes for c in collections), *([] if empty is None else [empty])):
            scenes.preload(progress=sys.stderr.isatty())

        runs = given or self._trained(train, labels)
        seen: list[list[Seen]] = [[] for _ in collections]
        presence: list[Tensor] = []
        for k, run in enumerate(runs):
            for seen_there, collection in zip(seen, collections, strict=True):
                announce(f"run {k}, {collection.label}: {len(collection.scenes)} scenes")
                seen_there.append(_look_at(run, collection, self.sampling, self.starts, self.seed + k))
            if empty is not None:
                presence.append(_search(run, empty).log_weight.logsumexp(-1).sigmoid())
        announce("Haar and template search")
        detectors: dict[str, Detector] = {
            "haar": HaarDetector.fit(train),
            "correlation": TemplateSearch.fit(train, "correlation"),
            "distance": TemplateSearch.fit(train, "distance"),
        }
        told = [_told(c, s, detectors) for c, s in zip(collections, seen, strict=True)]
        reliable = _reliability_panels(collections, seen, presence)
        results = {
            "collections": told,
            "calibration": _calibration(collections, seen),
            "reliability": {
                name: {k: v.tolist() if isinstance(v, Tensor) else v for k, v in found._asdict().items()}
                for name, found in reliable.items()
            },
            "trained_on": [_learned_from(run) for run in runs],
            "detectors_fitted_on": list(self.train or ("orl@train",)),
            "runs": [str(path) for path in self.runs],
            "seeds": len(runs),
            "seed": self.seed,
            "sampling": dataclasses.asdict(self.sampling),
            "seconds": time.perf_counter() - began,
            "versions": versions(),
        }
        write_text(self.out / "results.md", _markdown(results))
        write_json(self.out / "results.json", results)
        for collection, seen_there in zip(collections, seen, strict=True):
            name = _in_file_names(collection.label)
            save_figure(_steps(runs[0], collection, seen_there[0]), self.out / f"figure_4_{name}.png")
            save_figure(convergence_figure(_curves(seen_there), sampled_after=LOOKS), self.out / f"figure_5_{name}.png")
        save_figure(reliability_figure(reliable), self.out / "reliability.png")
        _write_failures(collections, seen, self.out / "failures.png")
        for of_collection in told:
            print(f"\n{of_collection['label']}")
            print_table(TABLE_1, _table_1(of_collection))
        print(f"\n{self.out / 'results.md'}")

    def _trained(self, train: Scenes, labels: dict[str, Any]) -> list[Run]:
        """A run for every seed; those that are there already, of the same seed, budget and SPECs, are kept.

        Raises:
            InputError: a folder holds a run of another kind.
        """
        clutter = default_clutter(self.clutter, self.seed)
        runs = []
        for k in range(self.seeds):
            folder = self.out / f"seed_{k}"
            taught = {"trained_on": list(self.train or ("orl@train",)), "clutter": self.clutter}
            wanted = {**dataclasses.asdict(self.budget), "seed": self.seed + k, "scenes": len(train), **taught}
            if (folder / "config.json").is_file():
                config = open_run(folder, self.torch_device).config
                # Runs of earlier versions do not tell what they have learned from.
                told = wanted.keys() - (taught.keys() - config.keys())
                other = [name for name, value in wanted.items() if name in told and config.get(name) != value]
                if other:
                    raise InputError(
                        f"{folder}: this run has other {', '.join(other)} than is asked for; name another place with "
                        "--out, or remove it"
                    )
            else:
                announce(f"training on {len(train)} scenes, seed {k}; the run goes to {folder}")
                fit_logged(train, clutter, folder, self.budget, self.seed + k, self.torch_device, labels | taught)
                remove_unfinished(folder)
            runs.append(open_run(folder, self.torch_device))
        return runs


def _learned_from(run: Run) -> list[str]:
    """The SPECs that a run has learned from, as far as it tells them."""
    without = [f"{spec} without labels" for spec in run.config.get("learned_from", ())]
    return [*run.config.get("trained_on", ()), *without]


class Collection(NamedTuple):
    """Scenes that are scored together.

    Attributes:
        spec: where they come from.
        label: a short name of it.
        scenes: with a true gaze each.
        truth: ``(scene, 4)``.
        train: labelled scenes of the same collection, to compare labels on; None where there is no such split.
    """

    spec: str
    label: str
    scenes: Scenes
    truth: Tensor
    train: Scenes | None


class Robustness(NamedTuple):
    """What became of one initial error.

    Attributes:
        looks: ``(look,)`` mean IoU after each look, the first before any.
        found: share found after `LOOKS` looks and sampling.
        sampled: mean IoU of the posterior mean after `LOOKS` looks.
    """

    looks: Tensor
    found: float
    sampled: float


class Seen(NamedTuple):
    """What one run saw in one collection.

    Attributes:
        guide: ``(scene, 4)`` the heaviest mode before any sampling.
        posterior: with no initial gaze; its draws of canonical images are left out.
        protocol: ``(scene, step, 4)`` from a random initial gaze: start, looks, posterior mean.
        costs: windows looked at and seconds, by method.
        robustness: by kind and size of the initial error.
        convention: ``(4,)`` the labels' own similarity, see `label_convention`; None where it cannot be known.
        factor: by which the run was found to understate its sds; None where it was not looked for.
    """

    guide: Tensor
    posterior: Posterior
    protocol: Tensor
    costs: dict[str, dict[str, float]]
    robustness: dict[tuple[str, float], Robustness]
    convention: Tensor | None
    factor: float | None


def starts_off_by(
    truth: Float[Tensor, "scene 4"], kind: str, size: float, generator: torch.Generator
) -> Float[Tensor, "scene 4"]:
    """Initial gazes with one error each, of one size, in a random direction.

    Args:
        truth: true gazes.
        kind: ``"offset"`` (patch widths of the truth), ``"scale"`` (a factor) or ``"rotation"`` (degrees, either way).
        size: of the error.
        generator: of the directions.
    """
    n = len(truth)
    turn = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    centre, scale, rotation = torch.zeros(n, 2).double(), torch.ones(n).double(), torch.zeros(n).double()
    if kind == "offset":
        centre = gazes.CANONICAL_SIZE * size * torch.stack([turn.cos(), turn.sin()], -1)
    elif kind == "scale":
        scale = scale * size
    else:
        rotation = math.radians(size) * turn.cos().sign()
    return gazes.compose(truth.double(), gazes.from_parts(centre, scale, rotation))


def _collections(specs: Sequence[str], seed: int) -> list[Collection]:
    """The collections, each under a name of its own: folders may have the same name, and figures are called by it."""
    found: dict[str, Collection] = {}
    for collection in (_collection(spec, seed) for spec in specs):
        labels = [collection.label, *(f"{collection.label}_{k}" for k in range(2, len(specs) + 1))]
        label = next(label for label in labels if _in_file_names(label) not in found)
        found[_in_file_names(label)] = collection._replace(label=label)
    return list(found.values())


def _in_file_names(label: str) -> str:
    return label.replace("@", "_")


def _collection(spec: str, seed: int) -> Collection:
    scenes = Scenes.from_spec(spec, seed=seed).labelled()
    kind, directory, split = parse_spec(spec)
    name = directory.name if directory is not None and kind == "folder" else kind
    assert scenes.gazes is not None
    label = name if split is None else f"{name}@{split}"
    return Collection(spec, label, scenes, scenes.gazes, training_scenes(spec, seed))


def _look_at(run: Run, collection: Collection, sampling: Sampling, starts: int, seed: int) -> Seen:
    """Everything that one run is asked about one collection."""
    scenes, truth, train = collection.scenes, collection.truth, collection.train
    count = len(scenes)
    how_much: dict[str, Any] = {**dataclasses.asdict(sampling), "seed": seed, "guide_steps": LOOKS}
    costs: dict[str, dict[str, float]] = {}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        with _counting(run.guide) as looked:
            began = _clocks()
            yield
            costs[name] = _cost(looked.total(), began, count)

    # What is compiled at its first use is compiled before anything is timed.
    attend(run.model, run.guide, scenes.subset([0]), chains=1, draws=2, warmup=1)
    with measured("guide"):
        candidates = _search(run, scenes)
    with measured("posterior"):
        posterior = attend(run.model, run.guide, scenes, progress=True, **how_much)
    first = jittered_starts(truth, seed)
    with measured("protocol_guide"):
        _search(run, scenes, first)
    with measured("protocol_posterior"):
        protocol = attend(run.model, run.guide, scenes, start=first, progress=True, **how_much)
    for name, of_method in (("posterior", posterior), ("protocol_posterior", protocol)):
        # The sampler looks at one patch a leapfrog step, and at one a leap.
        costs[name]["windows"] += float((of_method.statistics["n_steps"].double() + 1).sum((1, 2)).mean())

    shown = torch.linspace(0, count - 1, min(starts, count)).round().long()
    convention = None if train is None else convention_of(run, train, seed)
    return Seen(
        candidates.gaze[:, 0],
        dataclasses.replace(posterior, canonical_draws=posterior.canonical_draws[:, :, :0].clone()),
        protocol.path,
        costs,
        _robustness(run, scenes.subset(shown), truth[shown], seed),
        convention,
        run.config.get("coverage_factor"),
    )


def _robustness(run: Run, scenes: Scenes, truth: Tensor, seed: int) -> dict[tuple[str, float], Robustness]:
    """Every initial error of `ERRORS` on every scene, all in one batch after the other."""
    errors = [(kind, float(size)) for kind, sizes in ERRORS.items() for size in sizes]
    generator = torch.Generator().manual_seed(seed)
    start = torch.cat([starts_off_by(truth, kind, size, generator) for kind, size in errors])
    again = scenes.subset(list(range(len(scenes))) * len(errors))
    true = truth.repeat(len(errors), 1)
    path = _search(run, again, start, FOLLOWED).path
    sampled = attend(
        run.model, run.guide, again, start=start, guide_steps=LOOKS, progress=True, seed=seed, **LIGHT
    ).mean_gaze
    looks = gazes.overlap(path, true[:, None]).unflatten(0, (len(errors), -1))
    overlap = gazes.overlap(sampled, true).unflatten(0, (len(errors), -1))
    return {
        error: Robustness(looks[k].mean(0), float((overlap[k] > 0.5).double().mean()), float(overlap[k].mean()))
        for k, error in enumerate(errors)
    }


def _search(run: Run, scenes: Scenes, start: Tensor | None = None, steps: int = LOOKS) -> Candidates:
    """`foveate.inference.attend.search` on all scenes, in batches; results on the CPU."""

    def searched(rows: range) -> Candidates:
        first = None if start is None else start[rows.start : rows.stop]
        return search(run.model, run.guide, scene_pyramid(run.model, scenes.pictures(rows)), start=first, steps=steps)

    every = [range(begin, min(begin + BATCH, len(scenes))) for begin in range(0, len(scenes), BATCH)]
    parts = list(in_parallel(searched, every, run.model.dbn.core.mean.device))
    return Candidates(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


@contextmanager
def _counting(guide: GazeGuide) -> Iterator[Counter[str]]:
    """Count what the guide looks at: cells of its glances and windows of its looks."""
    looked: Counter[str] = Counter()
    # Scenes are looked at on several threads.
    lock = Lock()

    def cells(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        with lock:
            # One window of the looks' size is one window here, too: `GazeGuide.recognise` looks at it in a mirror.
            window = inputs[0].shape[1:] == (WINDOW, WINDOW)
            looked["cells"] += len(inputs[0]) if window else output[:, 0].numel()

    def windows(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        with lock:
            looked["windows"] += len(inputs[0])

    hooks = [guide.glance.register_forward_hook(cells), guide.register_forward_hook(windows)]
    try:
        yield looked
    finally:
        for hook in hooks:
            hook.remove()


def _told(collection: Collection, seen: Sequence[Seen], detectors: Mapping[str, Detector]) -> dict[str, Any]:
    """The results of one collection, seeds put together."""
    truth = collection.truth
    methods: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for one in seen:
        found = {
            "guide": one.guide,
            "posterior": one.posterior.mean_gaze,
            "protocol_guide": one.protocol[:, -2],
            "protocol_posterior": one.protocol[:, -1],
        }
        for name, gaze in found.items():
            methods[name].append(_scores(gaze, truth) | one.costs[name])
    for name, detector in detectors.items():
        began = _clocks()
        detections = [detector.detect(scene.picture) for scene in collection.scenes]
        cost = _cost(sum(d.windows for d in detections), began, len(truth))
        methods[name].append(_scores(torch.stack([d.gaze for d in detections]), truth) | cost)
    by_step = torch.stack([gazes.overlap(one.protocol, truth[:, None]).mean(0) for one in seen]).mean(0)
    looks = torch.stack([torch.stack([r.looks for r in one.robustness.values()]) for one in seen]).mean(0)
    return {
        "spec": collection.spec,
        "label": collection.label,
        "scenes": len(truth),
        "methods": {name: _over_seeds(rows) for name, rows in methods.items()},
        "protocol_iou_by_step": by_step.tolist(),
        "robustness": [
            {
                "kind": kind,
                "size": size,
                "iou_by_look": looks[k].tolist(),
                **_over_seeds(
                    [{"accuracy": r.found, "mean_iou": r.sampled} for r in (s.robustness[kind, size] for s in seen)]
                ),
                "converged_after": _converged_after(looks[k]),
            }
            for k, (kind, size) in enumerate(seen[0].robustness)
        ],
        "label_convention": _convention_told(collection, seen),
        "failures": [
            {"name": collection.scenes.names[i], "run": k, "iou": iou, "presence": presence}
            for k, i, iou, presence in _failures(collection, seen)
        ],
    }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _cost(windows: int, began: tuple[float, float], count: int) -> dict[str, float]:
    """What a method took for one of `count` scenes; processor seconds are those of all threads."""
    seconds, processor = (now - before for now, before in zip(_clocks(), began, strict=True))
    return {
        "windows": windows / count,
        "scenes_per_second": count / seconds,
        "processor_seconds": processor / count,
    }


def _scores(found: Tensor, truth: Tensor) -> dict[str, float]:
    overlap = gazes.overlap(found.double(), truth.double())
    return {"accuracy": float((overlap > 0.5).double().mean()), "mean_iou": float(overlap.mean())}


def _over_seeds(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds of every figure that all of them have, and each seed's own."""
    return {
        name: {
            "mean": statistics.fmean(row[name] for row in rows),
            "sd": statistics.stdev(row[name] for row in rows) if len(rows) > 1 else None,
            "each": [row[name] for row in rows],
        }
        for name in rows[0]
        if all(name in row for row in rows)
    }


def _converged_after(looks: Tensor) -> int:
    """The first look from which on the mean IoU stays within `THERE` of where the looks end."""
    away = ((looks - looks[-1]).abs() > THERE).nonzero().flatten()
    return int(away[-1]) + 1 if len(away) else 0


def _convention_told(collection: Collection, seen: Sequence[Seen]) -> dict[str, Any] | None:
    """How the labels differ from those trained on, and the scores with that difference taken out."""
    known = [one for one in seen if one.convention is not None]
    if not known:
        return None
    rows = []
    for one in known:
        assert one.convention is not None
        (dx, dy), scale, rotation = gazes.parts(one.convention)
        of_labels = {
            "right_canonical_pixels": float(dx),
            "down_canonical_pixels": float(dy),
            "log_scale": float(scale.log()),
            "rotation_degrees": math.degrees(float(rotation)),
        }
        rows.append(of_labels | _scores(one.posterior.mean_gaze, re_expressed(collection.truth, one.convention)))
    assert collection.train is not None
    return {"scenes_compared": min(COMPARED, len(collection.train)), **_over_seeds(rows)}


def _calibration(collections: Sequence[Collection], seen: Sequence[Sequence[Seen]]) -> list[dict[str, Any]]:
    """Coverage of the posterior's 90 % region in each collection, and in all their scenes together."""
    reached = [[_reached(c, one) for one in of_c] for c, of_c in zip(collections, seen, strict=True)]
    groups = [(c.label, [k]) for k, c in enumerate(collections)]
    if len(collections) > 1:
        groups.append(("all", list(range(len(collections)))))
    factors = [one.factor for one in seen[0]]
    names = list(dict.fromkeys(name for of_collection in reached for one in of_collection for name in one))
    told = []
    for label, members in groups:
        rows = []
        for seed, factor in enumerate(factors):
            row = {}
            # Of what is known in every collection of the group.
            for name in [name for name in names if all(name in reached[k][seed] for k in members)]:
                values = torch.cat([reached[k][seed][name] for k in members])
                row[f"coverage{name}"] = float((values <= 1).double().mean())
                if factor is not None:
                    row |= {"factor": factor, f"coverage_recalibrated{name}": float((values <= factor).double().mean())}
            rows.append(row)
        told.append({"label": label, "scenes": sum(len(collections[k].scenes) for k in members), **_over_seeds(rows)})
    return told


def _reached(collection: Collection, one: Seen) -> dict[str, Tensor]:
    """How far out the truth lies among the draws: the labels as they are, and re-expressed where that is known."""
    found = {"": reach(one.posterior.gaze, collection.truth)}
    if one.convention is not None:
        found["_re_expressed"] = reach(one.posterior.gaze, re_expressed(collection.truth, one.convention))
    return found


def _reliability_panels(
    collections: Sequence[Collection], seen: Sequence[Sequence[Seen]], presence: Sequence[Tensor]
) -> dict[str, Reliability]:
    """Presence, over scenes with the object and pictures without; and the weights of modes, over all modes found."""
    stated, right = [], []
    for collection, of_collection in zip(collections, seen, strict=True):
        for one in of_collection:
            weights = one.posterior.weights
            stated.append(weights[weights > 0])
            overlap = gazes.overlap(one.posterior.modes, collection.truth[:, None])
            right.append((overlap > 0.5)[weights > 0])
    panels = {}
    if presence:
        present = torch.cat([one.posterior.presence.double() for of_collection in seen for one in of_collection])
        absent = torch.cat([p.double() for p in presence])
        outcome = torch.cat([torch.ones_like(present), torch.zeros_like(absent)]) > 0
        panels["presence of the object"] = reliability(torch.cat([present, absent]), outcome)
    return panels | {"weight of a mode": reliability(torch.cat(stated), torch.cat(right))}


def _failures(collection: Collection, seen: Sequence[Seen]) -> list[tuple[int, int, float, float]]:
    """Run, number, IoU and presence of every scene whose object was not found."""
    failures = []
    for k, one in enumerate(seen):
        overlap = gazes.overlap(one.posterior.mean_gaze, collection.truth)
        failures += [
            (k, i, float(overlap[i]), float(one.posterior.presence[i]))
            for i in (overlap <= 0.5).nonzero().flatten().tolist()
        ]
    return failures


def _write_failures(collections: Sequence[Collection], seen: Sequence[Sequence[Seen]], path: Path) -> None:
    """The first `SHEET` failures of all runs in one picture; an earlier picture is removed where there is none."""
    pictures, paths, draws, truths, titles = [], [], [], [], []
    for collection, of_collection in zip(collections, seen, strict=True):
        for k, i, overlap, presence in _failures(collection, of_collection):
            posterior = of_collection[k].posterior
            pictures.append(collection.scenes[i].picture)
            # From the lightest mode (yellow) to the reported gaze (blue).
            paths.append(torch.cat([posterior.modes[i, 1:].flip(0), posterior.mean_gaze[i : i + 1]]))
            draws.append(posterior.gaze[i].flatten(0, 1))
            truths.append(collection.truth[i])
            name = Path(collection.scenes.names[i]).name
            titles.append(f"{name}, run {k}\nIoU {overlap:.2f}, presence {presence:.2f}")
    path.unlink(missing_ok=True)
    if len(pictures) > SHEET:
        announce(f"{path} shows {SHEET} of {len(pictures)} failures; results.json names all")
        pictures, paths, draws, truths, titles = (of[:SHEET] for of in (pictures, paths, draws, truths, titles))
    if pictures:
        both = torch.stack(paths), torch.stack(draws)
        save_figure(scenes_figure(pictures, *both, truths=torch.stack(truths), titles=titles, columns=5), path)


def _steps(run: Run, collection: Collection, one: Seen) -> Figure:
    """Fig. 4: some scenes by the paper's protocol, the gaze from yellow to blue, x and v at every step."""
    rows = torch.linspace(0, len(collection.scenes) - 1, min(SHOWN, len(collection.scenes))).round().long()
    pictures = collection.scenes.subset(rows).pictures()
    pyramid = scene_pyramid(run.model, pictures)
    path = one.protocol[rows].to(pyramid.texels.device)
    streams = torch.arange(len(rows), device=path.device)[:, None].expand(path.shape[:2])
    # The mean of some draws of v at each step; the first look has the mean canonical image in mind.
    v = canonical_draws(run.model, pyramid, path[:, :, None].expand(-1, -1, 8, -1), None, 0, streams).mean(2)
    v[:, 0] = run.model.dbn.to_canonical(run.model.dbn.core.mean.float())
    steps = ["start", *(f"look {k}" for k in range(1, LOOKS + 1)), "HMC"]
    patches = pyramid.extract(path).float().cpu()
    return steps_figure(pictures, path.cpu(), patches, v.cpu(), truths=collection.truth[rows], steps=steps)


def _curves(seen: Sequence[Seen]) -> dict[str, list[Convergence]]:
    """Fig. 5: curves by kind of the initial error."""
    panels: dict[str, list[Convergence]] = {}
    for kind, size in seen[0].robustness:
        of_seed = [one.robustness[kind, size] for one in seen]
        looks = torch.stack([r.looks for r in of_seed])
        sampled = torch.tensor([r.sampled for r in of_seed])
        panels.setdefault(kind, []).append(Convergence(TOLD[kind].format(size), looks, sampled))
    return panels


def _table_1(of_collection: Mapping[str, Any]) -> list[list[str]]:
    return [
        [METHODS[name], *(_plus_minus(scores[key], digits) for key, digits in COLUMNS)]
        for name, scores in of_collection["methods"].items()
    ]


def _plus_minus(figure: Mapping[str, Any], digits: int) -> str:
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread}"


def _markdown(results: Mapping[str, Any]) -> str:
    seeds = results["seeds"]
    learned_from = list(dict.fromkeys(", ".join(of) for of in results["trained_on"] if of))
    runs = f"Runs {', '.join(results['runs'])}. " if results["runs"] else ""
    parts = [
        "# Localisation\n\n"
        f"{runs}{f'Trained on {learned_from[0]}. ' if len(learned_from) == 1 else ''}Haar and templates fitted on "
        f"{', '.join(results['detectors_fitted_on'])}. {seeds} run{'s' * (seeds > 1)}, mean ± standard deviation. "
        "Accuracy is the share of scenes with IoU > 0.5. Windows are the cells of the glance, the windows of the looks "
        "and the patches of the kept draws' leapfrog steps and leaps; for Haar and templates the positions of their "
        "grids.\n"
    ]
    for told in results["collections"]:
        parts.append(f"## {told['label']}, {told['scenes']} scenes\n\n{markdown_table(TABLE_1, _table_1(told))}")
        rows = [
            [
                TOLD[row["kind"]].format(row["size"]),
                *(f"{row['iou_by_look'][k]:.3f}" for k in (0, 1, 2, LOOKS, FOLLOWED)),
                str(row["converged_after"]),
                _plus_minus(row["mean_iou"], 3),
                _plus_minus(row["accuracy"], 3),
            ]
            for row in told["robustness"]
        ]
        header = (
            *("initial error", "IoU before", "look 1", "look 2", f"look {LOOKS}", f"look {FOLLOWED}"),
            *("converged after", f"IoU, {LOOKS} looks + HMC", "accuracy"),
        )
        parts.append(markdown_table(header, rows))
        convention = told["label_convention"]
        if convention is not None:
            parts.append(
                f"Labels on {convention['scenes_compared']} training scenes of the same collection, against the run's "
                f"own: {_plus_minus(convention['right_canonical_pixels'], 2)} canonical pixels to the right, "
                f"{_plus_minus(convention['down_canonical_pixels'], 2)} down, log-scale "
                f"{_plus_minus(convention['log_scale'], 3)}, {_plus_minus(convention['rotation_degrees'], 2)}°. With "
                "the test labels re-expressed by that one similarity the posterior mean has accuracy "
                f"{_plus_minus(convention['accuracy'], 3)} and mean IoU {_plus_minus(convention['mean_iou'], 3)}; the "
                "tables above are without.\n"
            )
    rows = [
        [row["label"], str(row["scenes"]), *(_plus_minus(row[key], 3) if key in row else "" for key in COVERAGES)]
        for row in results["calibration"]
    ]
    header = ("scenes of", "count", *COVERAGES.values())
    parts.append(f"## Coverage of the {100 * LEVEL:.0f} % region\n\n{markdown_table(header, rows)}")
    rows = [
        [name, f"{found['gap']:.3f}", f"{found['brier']:.3f}", str(sum(found["count"]))]
        for name, found in results["reliability"].items()
    ]
    table = markdown_table(("probability", "mean gap", "Brier score", "cases"), rows)
    parts.append(f"## Reliability\n\n{table}")
    return "\n".join(parts)
