"""The command `density`: what learning without labels is worth, in nats and in scenes found.

It answers what table 2 and figure 6 of Tang et al. 2014 answer.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from foveate.data import Scenes
from foveate.experiments.figures import Sheet, sheets_figure
from foveate.experiments.options import Common, announce, open_run, require_at_least
from foveate.experiments.outputs import check_directory, markdown_table, save_figure, write_text
from foveate.experiments.scoring import Sampling
from foveate.inference.checkpoint import Run, write_json
from foveate.inference.evaluate import evaluate, versions
from foveate.model.errors import InputError

__all__ = ["Density", "recovered", "samples_figure", "table_rows"]

# What is kept of `evaluate` for each run and each set of scenes.
KEPT = (
    "scenes", "bound_nats", "bound_nats_se", "bound_gaussian", "bound_student_t", "log_z", "log_z_se", "accuracy",
    "mean_iou",
)  # fmt: skip
# Small images in a row of the picture.
COLUMNS = 16


@dataclass(frozen=True, kw_only=True)
class Density(Common):
    """Set a run before learning without labels beside the one after it, and one that had the labels.

    Attributes:
        before: the run that learning started from.
        after: what `foveate learn` made of it.
        labelled: a run that was trained on the same scenes with their labels; may be left away.
        data: scenes with known gazes to score on: orl, caltech:DIR, webfaces:DIR, lfw:DIR, multipie:DIR or folder:DIR,
            with @train or @test; one at least; repeatable, a column each.
        out: a folder for results.json, results.md and samples.png; an earlier output there is replaced.
        samples: of each prior in the picture.
        sampling: how much to sample.
    """

    before: Path
    after: Path
    labelled: Path | None = None
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: Path
    samples: int = 48
    sampling: Sampling = field(default_factory=lambda: Sampling(chains=2, draws=60, warmup=30))

    def run(self) -> None:
        self.sampling.check()
        require_at_least("--samples", self.samples, 1)
        check_directory(self.out, {"results.json": "scores"})
        places = {"before": self.before, "after": self.after, "with labels": self.labelled}
        runs = {name: open_run(path, self.torch_device) for name, path in places.items() if path is not None}
        if not self.data:
            raise InputError("no SPEC was given: name the scenes to score on with --data")
        scenes = {spec: Scenes.from_spec(spec, seed=self.seed).labelled() for spec in self.data}
        announce(f"{len(runs)} runs on {sum(map(len, scenes.values()))} scenes; the output goes to {self.out}")
        for part in scenes.values():
            part.preload(progress=sys.stderr.isatty())

        began = time.perf_counter()
        scores: dict[str, dict[str, dict[str, Any]]] = {}
        how_much: dict[str, Any] = dataclasses.asdict(self.sampling)
        for name, run in runs.items():
            for spec, part in scenes.items():
                announce(f"{name}: {spec}")
                found, _ = evaluate(run, part, **how_much, seed=self.seed, progress=True)
                scores.setdefault(name, {})[spec] = {key: found[key] for key in KEPT}
        table = markdown_table(("", *scenes), table_rows(scores))
        results = {
            "runs": {name: str(path) for name, path in places.items() if path is not None},
            "scores": scores,
            "recovered": {spec: recovered(scores, spec) for spec in scenes} if self.labelled else None,
            "seed": self.seed,
            "seconds": time.perf_counter() - began,
            "versions": versions(),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        save_figure(samples_figure(runs, self.samples, self.seed), self.out / "samples.png")
        write_text(self.out / "results.md", table)
        write_json(self.out / "results.json", results)
        print(table)
        print(f"{self.out / 'results.json'}")


def recovered(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], spec: str) -> dict[str, float | None]:
    """Shares of what labels would have gained that learning without them gained; None where labels gained nothing.

    Args:
        scores: by run (``"before"``, ``"after"``, ``"with labels"``), scenes and figure.
        spec: the scenes.

    Returns:
        ``{"bound_nats": …, "accuracy": …, "mean_iou": …}``.
    """
    shares: dict[str, float | None] = {}
    for key in ("bound_nats", "accuracy", "mean_iou"):
        before, after, labelled = (scores[name][spec][key] for name in ("before", "after", "with labels"))
        shares[key] = (after - before) / (labelled - before) if labelled > before else None
    return shares


def table_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """A row for each run and figure, a column for each set of scenes; last what was recovered, if there are labels."""
    rows: list[list[str]] = []
    for name, by_spec in scores.items():
        found = list(by_spec.values())
        rows += [
            [f"{name}: bound, nats", *(_with_error(s["bound_nats"], s["bound_nats_se"], 1) for s in found)],
            [f"{name}: one Gaussian on the same crops, nats", *(f"{s['bound_gaussian']:.1f}" for s in found)],
            [f"{name}: log Z, nats", *(_with_error(s["log_z"], s["log_z_se"], 2) for s in found)],
            [f"{name}: accuracy (IoU > 0.5)", *(f"{s['accuracy']:.3f}" for s in found)],
            [f"{name}: mean IoU", *(f"{s['mean_iou']:.3f}" for s in found)],
        ]
    if "with labels" in scores:
        shares = [recovered(scores, spec) for spec in scores["with labels"]]
        for key, told in (("bound_nats", "nats"), ("accuracy", "accuracy"), ("mean_iou", "mean IoU")):
            cells = ["labels gain nothing" if (v := s[key]) is None else f"{100 * v:.0f} %" for s in shares]
            rows.append([f"share of the labels' gain in {told}", *cells])
    return rows


@torch.no_grad()
def samples_figure(runs: Mapping[str, Run], count: int, seed: int) -> Figure:
    """Draws of every run's prior, one sheet below the other (Tang et al. 2014, fig. 6).

    Args:
        runs: by name.
        count: draws of each.
        seed: of the draws.
    """
    sheets = []
    for name, run in runs.items():
        dbn = run.model.dbn
        generator = torch.Generator(dbn.core.mean.device).manual_seed(seed)
        sheets.append(Sheet(f"draws of the prior, {name}", dbn.to_canonical(dbn.sample(count, generator))))
    return sheets_figure(sheets, columns=COLUMNS)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
