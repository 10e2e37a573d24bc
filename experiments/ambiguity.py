"""The command `ambiguity`, the paper's third experiment: two people in a scene, and a picture that says who is meant.

Convention (the whole module): gazes as in `foveate.model.gaze`, scene pixels. In a scene with two people each is asked
for in turn, which makes two trials a scene, ``(trial, …) = (scene, person, …)`` flattened. A trial succeeds where the
posterior mean overlaps the gaze of the person asked for by an IoU above 0.5.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from foveate.data import Scenes, TwoFaceScenes, orl_clutter, orl_scenes, two_face_scenes
from foveate.data.scenes import parse_spec
from foveate.experiments.figures import scenes_figure
from foveate.experiments.options import Common, announce, open_run, print_table, require_at_least, require_steps
from foveate.experiments.outputs import check_directory, markdown_table, save_figure, write_text
from foveate.experiments.scoring import Sampling
from foveate.experiments.training import Budget, default_clutter, fit_logged, remove_unfinished
from foveate.inference.attend import attend, scene_pyramid, search
from foveate.inference.checkpoint import Run, write_json
from foveate.inference.evaluate import versions
from foveate.inference.posterior import Posterior
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid

__all__ = ["Ambiguity", "between", "wilson"]

# Starts of the three curves: factors on the two faces' mean size, places from on the other face (0) to on the target
# (1), and degrees.
SWEEPS = {
    "scale": (0.5, 0.71, 1.0, 1.41, 2.0),
    "position": (0.0, 0.25, 0.5, 0.75, 1.0),
    "rotation": (-30, -15, 0, 15, 30),
}
AXES = {
    "scale": "size of the start, × the faces'",
    "position": "start, from the other face (0) to the target (1)",
    "rotation": "turn of the start, degrees",
}
MIDWAY, LOOKS, FOUND = 0.5, 4, 0.5
# Training on embedded scenes where no run is given, alone or beside others: what tells people apart is learned from
# many people only. From the nine of Caltech's training split 76 to 98 % of triples (v, the same person, another) of
# people left out come out right, from ORL's thirty more than 99 %.
SCENES, BESIDE, CLUTTER = 640, 320, 160
# Scenes in the figure of ends, scenes whose basins are mapped, and starts along the longer side of their maps.
SHOWN, MAPPED, GRID = 6, 2, 18
BATCH = 32
BASINS = {"attended": "attending", "led": "guide alone"}
COLOURS = ("#e69f00", "#0072b2", "#999999")


@dataclass(frozen=True, kw_only=True)
class Ambiguity(Common):
    """Whom to attend to where two people are in sight: a picture of one of them says who is meant.

    Attributes:
        out: a folder; an earlier output there is replaced.
        trained: a run that has learned from scenes with people; by default one is trained, into the output folder.
        data: orl pastes two unseen people into a photograph; caltech:DIR (or another SPEC with people and splits, named
            without @) joins two scenes of its test people along an edge, and trains on orl, too: many people teach what
            tells people apart.
        scenes: with two people each.
        swept: how many of them are attended to from every start of the curves.
        budget: how long to train.
        sampling: how much to sample.
    """

    out: Path = Path("runs/ambiguity")
    trained: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    data: str = "orl"
    scenes: int = 60
    swept: int = 20
    budget: Budget = field(default_factory=lambda: Budget(glance_steps=1200, look_steps=800, dbn_steps=1000))
    sampling: Sampling = field(default_factory=lambda: Sampling(chains=2, draws=60, warmup=40))

    def run(self) -> None:
        require_steps(self.budget)
        self.sampling.check()
        require_at_least("--scenes", self.scenes, 1)
        require_at_least("--swept", self.swept, 1)
        kind, _, split = parse_spec(self.data)
        if split is not None:
            raise InputError(f"--data {self.data}: leave @{split} away; it trains on @train and asks on @test")
        check_directory(self.out, {"results.json": "basins", "run.training": None, "ends.png": None})
        began = time.perf_counter()
        source = None if kind == "orl" else Scenes.from_spec(f"{self.data}@test").labelled()
        two = two_face_scenes(self.scenes, "test", self.seed, source)
        run = self._trained(kind) if self.trained is None else open_run(self.trained, self.torch_device)
        if run.model.identity is None:
            raise InputError(
                f"{self.trained or self.data}: nobody taught this run to tell people apart; train on labelled scenes "
                "with the column 'person', at least six people with two scenes each beside the people held out"
            )
        announce(f"attending to {len(two)} scenes with two people each; output: {self.out}")
        two.scenes.preload(progress=sys.stderr.isatty())

        ask = _Asker(run, two, dataclasses.asdict(self.sampling), self.seed)
        results, pictures = _asked(ask, min(self.swept, len(two)))
        results |= {"data": self.data, "seed": self.seed, "seconds": time.perf_counter() - began}
        results["versions"] = versions()
        for name, figure in pictures.items():
            save_figure(figure, self.out / f"{name}.png")
        write_text(self.out / "results.md", _markdown(results))
        write_json(self.out / "results.json", results)
        remove_unfinished(self.out / "run")
        print_table(HEADER, _rows(results))
        print(f"\n{self.out / 'results.md'}")

    def _trained(self, kind: str) -> Run:
        if kind == "orl":
            train, clutter = orl_scenes("train", SCENES, self.seed), orl_clutter("train", CLUTTER, self.seed)
            specs = ["orl@train"]
        else:
            own = Scenes.from_spec(f"{self.data}@train").labelled()
            train = Scenes.concatenate([own, orl_scenes("train", BESIDE, self.seed)])
            clutter = default_clutter(None, self.seed)
            specs = [f"{self.data}@train", "orl@train"]
        announce(f"learning from {len(train)} scenes of other people; the run goes to {self.out / 'run'}")
        labels = {"trained_on": specs}
        return fit_logged(train, clutter, self.out / "run", self.budget, self.seed, self.torch_device, labels)


class _Asker:
    """Asks a run for each of the two people of scenes.

    Args:
        run: that can tell people apart.
        two: the scenes.
        sampling: arguments of `attend`.
        seed: of the sampler.
    """

    def __init__(self, run: Run, two: TwoFaceScenes, sampling: dict[str, Any], seed: int) -> None:
        self.run, self.two, self.sampling, self.seed = run, two, sampling, seed

    def images(self, own: bool, count: int) -> Float[Tensor, "trial 24 24"]:
        """V of each trial of the first `count` scenes: the crop itself, or that of another picture of the person."""
        crops = self.two.own_crops if own else self.two.other_crops
        return crops[:count].flatten(0, 1).float()

    def starts(
        self, count: int, position: float = MIDWAY, scale: float = 1.0, rotation: float = 0.0
    ) -> Float[Tensor, "trial 4"]:
        """The start of each trial of the first `count` scenes; rotation in degrees."""
        target = self.two.gazes[:count]
        start = between(target.flip(1), target, position).flatten(0, 1)
        turn = gazes.from_parts(
            torch.zeros(2, dtype=torch.float64),
            torch.tensor(scale, dtype=torch.float64),
            torch.tensor(math.radians(rotation), dtype=torch.float64),
        )
        return gazes.compose(start, turn)

    def attend(self, canonical: Tensor, start: Tensor) -> Posterior:
        """The posterior of each trial."""
        scenes = self.two.scenes.subset(torch.arange(len(start)) // 2)
        return attend(
            self.run.model, self.run.guide, scenes, start=start, canonical=canonical, seed=self.seed, **self.sampling
        )

    def succeeded(self, gaze: Float[Tensor, "trial 4"]) -> Bool[Tensor, " trial"]:
        """Whether each trial's gaze is on the person asked for."""
        return gazes.overlap(gaze, self.two.gazes.flatten(0, 1)[: len(gaze)]) > FOUND

    def guide_alone(self, canonical: Tensor, start: Tensor) -> Float[Tensor, "trial 4"]:
        """Where the guide's looks lead, without a glance, weights or sampling."""
        ends = []
        for rows in torch.arange(len(start)).split(BATCH):
            ends.append(self._looked(self._pyramid(rows // 2), torch.arange(len(rows)), canonical[rows], start[rows]))
        return torch.cat(ends)

    def basins(self, scene: int) -> "Basins":
        """Who is found from a grid of starts at the faces' mean size, for v of each person (another picture)."""
        truth = self.two.gazes[scene]
        height, width = (int(side) for side in self.two.scenes.sizes[scene])
        step = max(height, width) / GRID
        x, y = (torch.arange(step / 2, side, step, dtype=torch.float64) for side in (width, height))
        size = gazes.parts(between(truth[0], truth[1], MIDWAY)).scale
        at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        start = gazes.from_parts(at, size.expand(len(at)), torch.zeros(len(at), dtype=torch.float64))
        pyramid = self._pyramid(torch.tensor([scene]))
        attended, led = [], []
        for v in self.two.other_crops[scene].float():
            ends = []
            for part in start.split(BATCH):
                again = pyramid[torch.zeros(len(part), dtype=torch.long)]
                images = v.expand(len(part), -1, -1).to(pyramid.texels.device)
                found = search(self.run.model, self.run.guide, again, start=part, canonical=images, steps=LOOKS)
                ends.append(found.gaze[:, 0].cpu())
            attended.append(_whose(torch.cat(ends), truth))
            alone = self._looked(
                pyramid, torch.zeros(len(start), dtype=torch.long), v.expand(len(start), -1, -1), start
            )
            led.append(_whose(alone, truth))
        return Basins(scene, at, torch.stack(attended), torch.stack(led))

    def _looked(self, pyramid: Pyramid, scene: Tensor, canonical: Tensor, start: Tensor) -> Tensor:
        """The ends of the guide's looks."""
        device = pyramid.texels.device
        gaze = start.to(device)
        with torch.no_grad():
            for _ in range(LOOKS):
                gaze, _ = self.run.guide.step(pyramid, gaze, canonical.to(device), scene.to(device))
        return gaze.cpu()

    def _pyramid(self, scenes: Tensor) -> Pyramid:
        distinct, rows = scenes.unique(return_inverse=True)
        return scene_pyramid(self.run.model, self.two.scenes.pictures(distinct.tolist()))[rows]


class Basins(NamedTuple):
    """Who is found from where.

    Attributes:
        scene: number of the scene.
        start: ``(start, 2)`` scene pixels.
        attended: ``(person, start)`` whom attending finds for v of either person: 0 and 1 the left and right one, 2
            nobody.
        led: the same, of the guide's looks alone.
    """

    scene: int
    start: Float[Tensor, "start 2"]
    attended: Int[Tensor, "person start"]
    led: Int[Tensor, "person start"]

    def shares(self) -> dict[str, list[float]]:
        """Share of the starts that lead to the person asked for, by person."""
        return {
            how: [float((found == person).double().mean()) for person, found in enumerate(getattr(self, how))]
            for how in BASINS
        }


def between(
    first: Float[Tensor, "*batch 4"], second: Float[Tensor, "*batch 4"], share: float
) -> Float[Tensor, "*batch 4"]:
    """The gaze at a share of the way: centres and rotations on straight lines, sizes in equal ratios."""
    one, two = gazes.parts(first), gazes.parts(second)
    log_scale = torch.lerp(one.scale.log(), two.scale.log(), share)
    return gazes.from_parts(
        torch.lerp(one.centre, two.centre, share), log_scale.exp(), torch.lerp(one.rotation, two.rotation, share)
    )


def wilson(share: float, trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), given the share of successes."""
    z = 1.959964
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


HEADER = ("question", "success", "95 % interval", "trials")
QUESTIONS = {
    "success_other_picture": "start midway, v is another picture of the person",
    "success_same_crop": "start midway, v is the crop itself",
    "success_from_other_face": "start on the other face, v is another picture",
    "both_people_of_a_scene": "start midway, another picture: both people of a scene found, each by their v",
    "guide_alone": "start midway, another picture: four looks of the guide alone",
    "both_modes": "no v, no start: both people among the modes",
}


def _asked(ask: _Asker, swept: int) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Every question of the experiment: results and figures."""
    count = len(ask.two)
    other, own = ask.images(False, count), ask.images(True, count)
    midway = ask.starts(count)
    posterior = ask.attend(other, midway)
    by_other = ask.succeeded(posterior.mean_gaze)
    free = attend(ask.run.model, ask.run.guide, ask.two.scenes, seed=ask.seed, **ask.sampling)
    on = (gazes.overlap(free.modes[:, :, None], ask.two.gazes[:, None]) > FOUND).double()
    outcomes = {
        "success_other_picture": by_other,
        "success_same_crop": ask.succeeded(ask.attend(own, midway).mean_gaze),
        "success_from_other_face": ask.succeeded(ask.attend(other, ask.starts(count, position=0.0)).mean_gaze),
        "both_people_of_a_scene": by_other.reshape(count, 2).all(1),
        "guide_alone": ask.succeeded(ask.guide_alone(other, midway)),
        "both_modes": on.any(1).all(1),
    }
    curves = {name: _curve(ask, name, swept) for name in SWEEPS}
    maps = [ask.basins(scene) for scene in range(min(MAPPED, count))]
    results: dict[str, Any] = {name: float(right.double().mean()) for name, right in outcomes.items()}
    results["interval"] = {name: _interval(right, count) for name, right in outcomes.items()}
    results["n"] = {name: len(right) for name, right in outcomes.items()}
    results["scenes"] = count
    # Weight of the modes that overlap either person, where nobody in particular was asked for.
    results["weight_of_the_lighter_person"] = float((free.weights[..., None] * on).sum(1).amin(-1).mean())
    results["curves"] = curves
    results["basins"] = [{"scene": m.scene, "share_of_starts": m.shares()} for m in maps]
    pictures = {
        "ends": _ends_figure(ask, posterior, other),
        "curves": _curves_figure(curves),
        "basins": _basins_figure(ask, maps),
    }
    return results, pictures


def _curve(ask: _Asker, name: str, count: int) -> dict[str, Any]:
    """Success over one property of the start, by both kinds of v."""
    told: dict[str, Any] = {"values": list(SWEEPS[name]), "scenes": count}
    for kind, own in (("other_picture", False), ("same_crop", True)):
        images = ask.images(own, count)
        right = [
            ask.succeeded(ask.attend(images, ask.starts(count, **{name: float(value)})).mean_gaze)
            for value in SWEEPS[name]
        ]
        told[kind] = [float(r.double().mean()) for r in right]
        told[f"{kind}_interval"] = [_interval(r, count) for r in right]
    return told


def _interval(right: Tensor, scenes: int) -> list[float]:
    """95 % interval that counts the two trials of a scene as one: they share its difficulties."""
    share = float(right.double().mean())
    return [round(v, 4) for v in wilson(share, scenes)]


def _whose(gaze: Float[Tensor, "start 4"], truth: Float[Tensor, "2 4"]) -> Int[Tensor, " start"]:
    """Whose face each gaze is on: 0 or 1, or 2 for nobody's."""
    overlap = gazes.overlap(gaze[:, None], truth)
    return torch.where(overlap.amax(-1) > FOUND, overlap.argmax(-1), 2)


def _ends_figure(ask: _Asker, posterior: Posterior, images: Tensor) -> Figure:
    """The paper's figure: the same yellow start, one end for each v, which is shown in the corner."""
    count = 2 * min(SHOWN, len(ask.two))
    pictures = [p for p in ask.two.scenes.pictures(list(range(count // 2))) for _ in range(2)]
    truth = ask.two.gazes.flatten(0, 1)[:count]
    figure = scenes_figure(
        pictures, posterior.path[:count], posterior.gaze[:count].flatten(1, 2), truths=truth, columns=4
    )
    for i, axes in enumerate(figure.axes[:count]):
        _inset(axes, images[i], ask.two.gazes[i // 2], pictures[i].shape, "white")
    return figure


def _inset(axes: Axes, image: Tensor, people: Float[Tensor, "person 4"], size: Sequence[int], colour: str) -> None:
    """Show v in the corner of a scene that is farthest from its people."""
    height, width = size
    corners = torch.tensor([[x * width, y * height] for y in (0.14, 0.86) for x in (0.1, 0.9)], dtype=torch.float64)
    best = int(torch.cdist(corners, people[:, 2:]).amin(1).argmax())
    side = 0.28 * height
    left, top = best % 2 * (width - side), best // 2 * (height - side)
    inset = axes.inset_axes((left - 0.5, top - 0.5, side, side), transform=axes.transData)
    inset.imshow(image, cmap="gray", vmin=0, vmax=1)
    inset.set(xticks=[], yticks=[])
    inset.spines[:].set(color=colour, linewidth=2)


def _curves_figure(curves: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for kind, colour in zip(("other_picture", "same_crop"), COLOURS, strict=False):
            value = torch.tensor(curve[kind])
            low, high = torch.tensor(curve[f"{kind}_interval"]).T
            error = torch.stack([value - low, high - value]).clamp(min=0).numpy()
            label = f"v is {'another picture' if kind == 'other_picture' else 'the crop itself'}"
            axes.errorbar(curve["values"], value, error, color=colour, marker="o", capsize=3, label=label)
        axes.set(xlabel=AXES[name], ylim=(0, 1.03))
        if name == "scale":
            axes.set_xscale("log", base=2)
            axes.set_xticks(curve["values"], [f"{v:g}" for v in curve["values"]])
            axes.set(ylabel="attends to the person asked for")
            axes.legend(loc="lower left", fontsize=8)
    return figure


def _basins_figure(ask: _Asker, maps: Sequence[Basins]) -> Figure:
    """Starts coloured by whom they lead to: a row for each scene, for each v a column of attending and of the guide."""
    figure = Figure(figsize=(13, 2.4 * len(maps)), layout="constrained")
    panels = figure.subplots(len(maps), 4, squeeze=False)
    for row, basins in zip(panels, maps, strict=True):
        picture, people = ask.two.scenes[basins.scene].picture, ask.two.gazes[basins.scene]
        for column, axes in enumerate(row):
            person, how = column % 2, tuple(BASINS)[column // 2]
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            colours = [COLOURS[k] for k in getattr(basins, how)[person].tolist()]
            axes.scatter(*basins.start.T.numpy(), c=colours, s=9, linewidths=0)
            for which, gaze in enumerate(people):
                ring = gazes.corners(gaze)[[0, 1, 2, 3, 0]].numpy()
                axes.plot(ring[:, 0], ring[:, 1], color=COLOURS[which], lw=2)
            _inset(axes, ask.two.other_crops[basins.scene, person], people, picture.shape, COLOURS[person])
            axes.set_axis_off()
            share = basins.shares()[how][person]
            whom = ("left", "right")[person]
            axes.set_title(f"{BASINS[how]}, v of the {whom}: found from {share:.0%}", fontsize=9)
    return figure


def _rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, question in QUESTIONS.items():
        low, high = results["interval"][name]
        rows.append((question, f"{results[name]:.3f}", f"{low:.3f}–{high:.3f}", str(results["n"][name])))
    return rows


def _markdown(results: Mapping[str, Any]) -> str:
    parts = [
        "# Whom to attend to\n",
        f"{results['scenes']} scenes ({results['data']}) with two people each, none of whom was seen in training. "
        "Success is an IoU above 0.5 with the person asked for. Intervals count the two trials of a scene as one.\n",
        markdown_table(HEADER, _rows(results)),
    ]
    for name, curve in results["curves"].items():
        rows = [
            (f"{value:g}", *(f"{curve[kind][k]:.3f}" for kind in ("other_picture", "same_crop")))
            for k, value in enumerate(curve["values"])
        ]
        parts.append(f"\n{curve['scenes']} scenes:\n")
        parts.append(markdown_table((AXES[name], "v is another picture", "v is the crop itself"), rows))
    parts.append(
        "\nFigures: ends.png (same start, one end for each v), curves.png, basins.png (starts by whom they lead to).\n"
    )
    return "\n".join(parts)
