"""The command `likelihood`: what the densities know by themselves, in nats, ranks and failures."""

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from foveate.data import Scenes
from foveate.data.joining import re_expressed
from foveate.experiments.conventions import convention_of, labelled_scenes, training_scenes
from foveate.experiments.figures import EnergyPath, energy_paths_figure
from foveate.experiments.options import Common, StageBars, announce, open_run, require_at_least
from foveate.experiments.outputs import check_directory, markdown_table, save_figure, write_text
from foveate.experiments.scoring import Sampling
from foveate.inference.attend import attend, scene_pyramid, search
from foveate.inference.checkpoint import Run, write_json
from foveate.inference.evaluate import crop_bounds, jittered_starts, versions
from foveate.inference.fit import crops_of, person_numbers
from foveate.inference.guide import GazeGuide
from foveate.inference.noise import KeyedNoise, Purpose, stream_keys
from foveate.inference.posterior import Posterior
from foveate.inference.prior_training import train_dbn
from foveate.model import AttentionModel, DeepBeliefNet
from foveate.model import gaze as gazes
from foveate.model.clutter import NoisyDensity
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates

__all__ = ["Likelihood", "area_under_curve", "beats_random_gazes", "energy_path", "random_gazes"]

# Random gazes: patch width as a share of the shorter side, and rotation either way.
SHARES, TILT = (0.10, 0.65), math.radians(10)
# Scenes worked on together, modes kept of a search (all its end points), failures shown.
BATCH, EVERY_MODE, FAILURES = 16, 16, 20
# Looks of the guide before sampling: a weak start and a converged one.
LOOKS = (1, 4)
# The path from the found gaze (0) to the true one (1), a little further at both ends.
PATH = torch.linspace(-0.25, 1.25, 61, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Likelihood(Common):
    """Ask the densities of a run what they know by themselves: bounds, ranks against random gazes, what HMC adds.

    Attributes:
        source: the run.
        data: scenes with known gazes to report on: orl, caltech:DIR, webfaces:DIR, lfw:DIR, multipie:DIR or folder:DIR,
            with @train or @test; one at least; repeatable, each is reported by itself.
        clutter: pictures without the object that training did not see: folder:DIR or orl, with @train or @test.
        out: a folder for results.json, results.md and failures.png; an earlier output there is replaced.
        random: random gazes per scene that the true one is to beat.
        diagonal: scenes to train the paper's diagonal net on, whose bound then stands beside; repeatable.
        diagonal_steps: of its ascent, at most; it stops by itself. 3000 take some ten minutes.
        sampling: how much to sample.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    clutter: str
    out: Path
    random: int = 2000
    diagonal: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    diagonal_steps: int = 3000
    sampling: Sampling = field(default_factory=Sampling)

    def run(self) -> None:
        self.sampling.check()
        require_at_least("--random", self.random, 1)
        require_at_least("--diagonal-steps", self.diagonal_steps, 1)
        check_directory(self.out, {"results.json": "variant"})
        run = open_run(self.source, self.torch_device)
        if not self.data:
            raise InputError("no SPEC was given: name the scenes to report on with --data")
        scenes = {spec: Scenes.from_spec(spec, seed=self.seed).labelled() for spec in self.data}
        clutter = Scenes.from_clutter_spec(self.clutter, seed=self.seed)
        taught = labelled_scenes(self.diagonal, self.seed)[0] if self.diagonal else None
        announce(
            f"{sum(map(len, scenes.values()))} scenes and {len(clutter)} of clutter; the output goes to {self.out}"
        )
        for part in (*scenes.values(), clutter, *([] if taught is None else [taught])):
            part.preload(progress=sys.stderr.isatty())

        began = time.perf_counter()
        with StageBars() as bars:
            diagonal = None if taught is None else self._train_diagonal(taught, bars)
        empty = presence_logits(run, clutter)
        results: dict[str, Any] = {
            "run": str(self.source),
            "clutter": {"spec": self.clutter, "pictures": len(clutter)},
            "log_z": float(run.model.dbn.log_z),
            "log_z_se": float(run.model.dbn.log_z_se),
            "variant": {
                **{name: run.model.config[name] for name in ("noise", "temperature", "edges", "aperture")},
                "guide_prior": bool(run.guide.prior_weight > 0),
            },
            "data": {},
        }
        failures: list[tuple[float, EnergyPath]] = []
        for spec, part in scenes.items():
            announce(f"{spec}: bounds, {self.random} random gazes, search, {2 * len(LOOKS) + 1} times HMC")
            results["data"][spec], posterior = self._report(run, spec, part, empty, diagonal)
            failures += _failures(run.model, part, posterior)
        worst = [path for _, path in sorted(failures, key=lambda f: f[0])[:FAILURES]]
        results["failures"] = [_told(path) for path in worst]
        results |= {
            "seed": self.seed,
            "seconds": time.perf_counter() - began,
            "versions": versions(),
        }
        table = markdown_table(("figure", *scenes), _rows(results))
        self.out.mkdir(parents=True, exist_ok=True)
        save_figure(energy_paths_figure(worst), self.out / "failures.png")
        write_text(self.out / "results.md", table)
        write_json(self.out / "results.json", results)
        print(table)
        print(f"{self.out / 'results.json'}")

    def _train_diagonal(self, scenes: Scenes, bars: StageBars) -> DeepBeliefNet:
        """The paper's diagonal net, trained as the run's own prior is: on crops at the true gazes and jittered ones."""
        truth = scenes.gazes
        assert truth is not None
        return train_dbn(
            crops_of(scenes, truth, torch.Generator().manual_seed(self.seed)),
            people=person_numbers(scenes.people),
            form="diagonal",
            steps=self.diagonal_steps,
            seed=self.seed,
            progress=lambda share, monitor: bars("diagonal prior", int(1000 * share), 1000, monitor.bound),
        ).to(self.torch_device)

    def _report(
        self, run: Run, spec: str, scenes: Scenes, empty: "Presence", diagonal: DeepBeliefNet | None
    ) -> tuple[dict[str, Any], Posterior]:
        """Every figure of one SPEC, and the posterior of its scenes with no initial gaze."""
        truth = scenes.gazes
        assert truth is not None
        model = run.model
        figures: dict[str, Any] = {"scenes": len(scenes), **_bounds(model, scenes, truth, diagonal)}
        train = training_scenes(spec, self.seed)
        convention = None if train is None else convention_of(run, train, self.seed)
        figures["label_convention"] = None if convention is None else convention.tolist()
        again = None if convention is None else re_expressed(truth, convention)
        beaten = beats_random_gazes(model, scenes, again, count=self.random, seed=self.seed)
        figures["beats_random"] = {name: float(wins.double().mean()) for name, wins in beaten.items()}
        figures["ranking"] = {
            "odds": _ranked(model, _odds_alone(run.guide), scenes, truth)[0],
            **dict(zip(("evidence", "oracle"), _ranked(model, run.guide, scenes, truth), strict=True)),
        }
        present = presence_logits(run, scenes)
        figures["presence_auc"] = area_under_curve(present.evidence, empty.evidence)
        figures["presence_auc_odds"] = area_under_curve(present.odds, empty.odds)

        how_much: dict[str, Any] = {**dataclasses.asdict(self.sampling), "seed": self.seed, "progress": True}
        first = jittered_starts(truth, self.seed)
        figures["sampling"] = []
        for looks in LOOKS:
            for with_guide in (False, True):
                variant = _variant(run, with_guide)
                posterior = attend(variant.model, variant.guide, scenes, start=first, guide_steps=looks, **how_much)
                figures["sampling"].append(_added(posterior, truth, again, variant, f"jitter, looks: {looks}"))
        posterior = attend(model, run.guide, scenes, **how_much)
        figures["sampling"].append(_added(posterior, truth, again, run, "whole scene"))
        return figures, posterior


class Presence(NamedTuple):
    """Log-weight that each picture shows the object: by all evidence, and by the model's odds alone."""

    evidence: Tensor
    odds: Tensor


def random_gazes(name: str, size: Float[Tensor, "2"], count: int, seed: int = 0) -> Float[Tensor, "gaze 4"]:
    """Random gazes of a picture, the same for its name and the seed whatever else is asked.

    The patch's width is log-uniform between 0.10 and 0.65 of the shorter side, its centre uniform over the picture, its
    rotation uniform within 10° either way.

    Args:
        name: of the picture.
        size: its height and width, pixels.
        count: how many.
        seed: of the numbers.

    Convention: scene pixels, `foveate.model.gaze`; float64.
    """
    uniform = torch.from_numpy(KeyedNoise(seed, stream_keys([name])).uniform(Purpose.SEARCH, 0, count, 4)[:, 0])
    low, high = (math.log(share) for share in SHARES)
    scale = torch.exp(low + (high - low) * uniform[:, 0]) * size.double().amin() / gazes.CANONICAL_SIZE
    centre = uniform[:, 1:3] * (size.double().flip(-1) - 1)
    return gazes.from_parts(centre, scale, (2 * uniform[:, 3] - 1) * TILT)


@torch.no_grad()
def beats_random_gazes(
    model: AttentionModel,
    scenes: Scenes,
    again: Float[Tensor, "scene 4"] | None = None,
    *,
    count: int = 2000,
    seed: int = 0,
) -> dict[str, Bool[Tensor, " scene"]]:
    """Whether the true gaze of each scene has higher odds than every random one, by several odds.

    Args:
        model: whose odds are asked.
        scenes: with gazes.
        again: the true gazes re-expressed in the model's convention, where that is known.
        count: random gazes of each scene.
        seed: of these.

    Returns:
        ``"odds"``: the model's own. ``"odds_elsewhere"``: the same among random gazes with an IoU below 0.5 with the
        truth. ``"odds_re_expressed"``: the gazes of `again` in the truth's place, if given. ``"gaussian"``,
        ``"student_t"``: the baselines of the model in the object's place, seen through the same noise, all of
        the square against clutter's density of it.

    Convention: gazes in scene pixels, `foveate.model.gaze`.
    """
    truth = scenes.gazes
    assert truth is not None
    clutter = model.clutter_density()
    baselines = {n: NoisyDensity.through(model.baseline(n), model.noise) for n in ("gaussian", "student_t")}
    wins: dict[str, list[bool]] = {name: [] for name in ("odds", "odds_elsewhere", *baselines)}
    for i in tqdm(range(len(scenes)), desc="random gazes", disable=None):
        pyramid = scene_pyramid(model, scenes.pictures([i]))
        tried = torch.cat(
            [truth[i : i + 1].double(), random_gazes(scenes.names[i], scenes.sizes[i].double(), count, seed)]
        )
        patch = pyramid.extract(tried[None].to(pyramid.texels.device))[0]
        odds = model.log_odds(patch)
        if again is not None:
            of_again = model.log_odds(pyramid.extract(again[i, None, None].to(pyramid.texels.device))[0, 0])
            wins.setdefault("odds_re_expressed", []).append(bool((odds[1:] < of_again).all()))
        wins["odds"].append(bool((odds[1:] < odds[0]).all()))
        away = gazes.overlap(tried[1:], truth[i].double()).to(odds.device) < 0.5
        wins["odds_elsewhere"].append(bool((odds[1:][away] < odds[0]).all()))
        y = density_coordinates(patch)
        against = 0.0 if clutter is None else clutter.log_prob(y)
        for name, density in baselines.items():
            odds = density.log_prob(y) - against
            wins[name].append(bool((odds[1:] < odds[0]).all()))
    return {name: torch.tensor(won) for name, won in wins.items()}


def presence_logits(run: Run, scenes: Scenes) -> Presence:
    """Log-odds that each picture shows the object, summed over the modes of a search with no initial gaze."""
    both = [
        torch.cat([found.log_weight.logsumexp(-1) for _, found in _searched(run.model, guide, scenes, "presence")])
        for guide in (run.guide, _odds_alone(run.guide))
    ]
    return Presence(*both)


def area_under_curve(present: Float[Tensor, " present"], absent: Float[Tensor, " absent"]) -> float:
    """Area under the ROC curve: how often a score of the first kind exceeds one of the second, ties counted half."""
    difference = present.double()[:, None] - absent.double()
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def energy_path(
    model: AttentionModel, pyramid: Pyramid, found: Float[Tensor, "4"], truth: Float[Tensor, "4"]
) -> Float[Tensor, " point"]:
    """Energy along the straight line in `LocalChart` about the found gaze, from it (0) to the true one (1), in nats.

    Minus log odds (with the model's temperature) minus log prior minus the chart's log-determinant: what HMC climbs.

    Convention: gazes in scene pixels; `pyramid` holds the one scene; points of the line are `PATH`.
    """
    chart = gazes.LocalChart(found.double())
    z = PATH[:, None] * chart.to_chart(truth.double())
    gaze = chart.to_gaze(z)
    log_odds = model.log_odds(pyramid.extract(gaze[None].to(pyramid.texels.device))[0]).double().cpu()
    log_prior = gazes.log_prior(model.prior(pyramid.size[0].double().cpu()), gaze)
    return -(log_odds + log_prior + chart.log_det(z))


@torch.no_grad()
def _bounds(model: AttentionModel, scenes: Scenes, truth: Tensor, diagonal: DeepBeliefNet | None) -> dict[str, float]:
    """Mean log-densities of the true crops in nats, and by how much the prior's bound exceeds the Student-t's."""
    y, figures = crop_bounds(model, scenes, truth)
    figures["bound_recognition"] = float(model.dbn.log_prob_bound(y).double().mean())
    # Forward AIS flatters a bound on average: it is judged two standard errors lower.
    lower = figures["bound_nats"] - 2 * float(model.dbn.log_z_se)
    figures["margin_student_t"] = lower - figures["bound_student_t"]
    if diagonal is not None:
        figures["bound_diagonal"] = float(diagonal.log_prob_bound(y, diagonal.refine_hidden(y)).mean())
        figures["bound_diagonal_log_z_se"] = float(diagonal.log_z_se)
    return figures


def _searched(model: AttentionModel, guide: GazeGuide, scenes: Scenes, purpose: str) -> Iterator[tuple[range, Any]]:
    """Every end point of a whole-scene search, batch by batch, with the rows of its scenes."""
    for begin in tqdm(range(0, len(scenes), BATCH), desc=purpose, disable=None):
        rows = range(begin, min(begin + BATCH, len(scenes)))
        yield rows, search(model, guide, scene_pyramid(model, scenes.pictures(rows)), modes=EVERY_MODE)


def _ranked(model: AttentionModel, guide: GazeGuide, scenes: Scenes, truth: Tensor) -> tuple[float, float]:
    """Share of scenes whose heaviest end point has an IoU above 0.5 with the truth, and whose best end point has."""
    first, best = [], []
    for rows, found in _searched(model, guide, scenes, "searching"):
        overlap = gazes.overlap(found.gaze.cpu(), truth[list(rows), None].double())
        overlap = torch.where(torch.isfinite(found.log_weight.cpu()), overlap, 0.0)
        first.append(overlap[:, 0] > 0.5)
        best.append((overlap > 0.5).any(-1))
    return float(torch.cat(first).double().mean()), float(torch.cat(best).double().mean())


def _odds_alone(guide: GazeGuide) -> GazeGuide:
    """The guide with a say in where to look and none in which end point is right: integrated odds alone decide."""
    silent = copy.deepcopy(guide)
    silent.evidence.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    return silent


def _variant(run: Run, with_guide: bool) -> Run:
    """The run with the guide as a prior of the gaze or without, each at the temperature that fitting found for it."""
    guide, model = copy.deepcopy(run.guide), run.model.with_latent("full")
    guide.prior_weight.fill_(float(with_guide))
    settings = run.config.get("variants", {}).get("with_guide_prior" if with_guide else "without_guide_prior", {})
    model.temperature = settings.get("temperature", run.model.temperature)
    model.noise = settings.get("noise", run.model.noise)
    return Run(model, guide, run.config)


def _added(posterior: Posterior, truth: Tensor, again: Tensor | None, run: Run, start: str) -> dict[str, Any]:
    """Mean IoU of the guide's end point, of the posterior mean, and of their difference with its standard error."""
    reported = posterior.path[:, -2], posterior.mean_gaze
    before, after = (gazes.overlap(gaze, truth.double()) for gaze in reported)
    gain = after - before
    with_again = {}
    if again is not None:
        before_again, after_again = (gazes.overlap(gaze, again) for gaze in reported)
        with_again = {
            "iou_guide_re_expressed": float(before_again.mean()),
            "iou_posterior_mean_re_expressed": float(after_again.mean()),
            "gain_re_expressed": float((after_again - before_again).mean()),
        }
    return {
        "start": start,
        "guide_prior": bool(run.guide.prior_weight > 0),
        "noise": run.model.noise,
        "temperature": run.model.temperature,
        "iou_guide": float(before.mean()),
        "iou_posterior_mean": float(after.mean()),
        "gain": float(gain.mean()),
        "gain_se": float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else None,
        **with_again,
    }


def _failures(model: AttentionModel, scenes: Scenes, posterior: Posterior) -> list[tuple[float, EnergyPath]]:
    """The worst scenes of a posterior: IoU with the truth and the energy on the way there."""
    truth = scenes.gazes
    assert truth is not None
    overlap = gazes.overlap(posterior.mean_gaze, truth.double())
    found = []
    for i in overlap.argsort()[:FAILURES].tolist():
        pyramid = scene_pyramid(model, scenes.pictures([i]))
        with torch.no_grad():
            energy = energy_path(model, pyramid, posterior.mean_gaze[i], truth[i])
        title = f"{scenes.names[i]}  IoU {float(overlap[i]):.2f}"
        path = EnergyPath(title, scenes.pictures([i])[0], posterior.mean_gaze[i], truth[i].double(), PATH, energy)
        found.append((float(overlap[i]), path))
    return found


def _told(path: EnergyPath) -> dict[str, Any]:
    """A failure in numbers: where the truth's energy is the lower, search or sampling missed what the model prefers."""
    on_way = (path.position >= 0) & (path.position <= 1)
    found, truth = (float(path.energy[(path.position - at).abs().argmin()]) for at in (0.0, 1.0))
    return {
        "scene": path.title,
        "truth_minus_found": truth - found,
        "barrier": float(path.energy[on_way].max()) - found,
    }


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: a row for each figure, a column for each SPEC."""
    every = list(results["data"].values())
    percent, nats = "{:.1%}".format, "{:.1f}".format

    def row(name: str, values: Sequence[float | None], written: Any) -> tuple[str, ...]:
        return (name, *("" if value is None else written(value) for value in values))

    rows = [
        ("scenes", *(str(d["scenes"]) for d in every)),
        row("bound of the prior, nats per crop", [d["bound_nats"] for d in every], nats),
        row("2 s.e. of log Z, nats", [2 * results["log_z_se"] for _ in every], "{:.2f}".format),
        row("the same by the recognition posterior", [d["bound_recognition"] for d in every], nats),
        row("one Gaussian, nats", [d["bound_gaussian"] for d in every], nats),
        row("one Student-t, nats", [d["bound_student_t"] for d in every], nats),
        row("bound − 2 s.e. − Student-t, nats", [d["margin_student_t"] for d in every], "{:+.1f}".format),
    ]
    if "bound_diagonal" in every[0]:
        rows.append(row("the paper's diagonal net, bound, nats", [d["bound_diagonal"] for d in every], nats))
    names = {
        "odds": "true gaze beats all random gazes: the model's odds",
        "odds_elsewhere": "… among random gazes with IoU < 0.5",
        "odds_re_expressed": "… labels re-expressed",
        "gaussian": "… Gaussian odds",
        "student_t": "… Student-t odds",
    }
    rows += [
        row(text, [d["beats_random"].get(name) for d in every], percent)
        for name, text in names.items()
        if any(name in d["beats_random"] for d in every)
    ]
    names = {
        "odds": "whole scene: end points ranked by the odds alone",
        "evidence": "… by all evidence",
        "oracle": "… by an oracle",
    }
    rows += [row(text, [d["ranking"][name] for d in every], percent) for name, text in names.items()]
    for k, entry in enumerate(every[0]["sampling"]):
        prior = "with" if entry["guide_prior"] else "without"
        text = f"HMC mean − guide, mean IoU ({entry['start']}; {prior} guide as prior)"
        rows.append(row(text, [d["sampling"][k]["gain"] for d in every], "{:+.3f}".format))
        of_again = [d["sampling"][k].get("gain_re_expressed") for d in every]
        if any(value is not None for value in of_again):
            rows.append(row("… labels re-expressed", of_again, "{:+.3f}".format))
    rows += [
        row("presence, AUC against clutter: all evidence", [d["presence_auc"] for d in every], "{:.3f}".format),
        row("… the model's odds alone", [d["presence_auc_odds"] for d in every], "{:.3f}".format),
    ]
    return rows
