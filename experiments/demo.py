"""The command `demo`, the main job on embedded data: learn faces, then find and understand unseen ones."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.data.faces import locate_package
from foveate.data.pictures import decode
from foveate.experiments.figures import (
    iou_by_step_figure,
    legend_figure,
    patches_figure,
    scene_figure,
    scenes_figure,
)
from foveate.experiments.options import Common, announce, print_table, require_at_least, require_steps
from foveate.experiments.outputs import check_directory, save_figure
from foveate.experiments.report import Report, add_summary
from foveate.experiments.scoring import Sampling, score_rows
from foveate.experiments.training import Budget, fit_logged, prior_figure, remove_unfinished
from foveate.inference.attend import attend
from foveate.inference.checkpoint import write_json
from foveate.inference.evaluate import evaluate
from foveate.inference.posterior import Posterior
from foveate.model import DeepBeliefNet
from foveate.model import gaze as gazes

__all__ = ["Demo", "astronaut"]

# Left eye, right eye and mouth of the astronaut in scene pixels, read off the photograph by eye.
ASTRONAUT_LANDMARKS = ((203.0, 101.0), (246.0, 103.5), (223.0, 145.0))
# A figure of scenes holds so many; more would not fit a screen.
SCENES_IN_FIGURE = 12


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The main job on embedded data: learn faces, find unseen ones with no initial gaze, and report.

    Attributes:
        out: a folder; an earlier demo there is replaced. Training that was interrupted there goes on.
        scenes: to learn from, composed of ORL people 1 to 30.
        clutter: pictures without a face to learn from.
        unseen: scenes to attend to, composed of ORL people 31 to 40 in other photographs.
        budget: how long to train.
        sampling: how much to sample.
    """

    out: Path = Path("runs/demo")
    scenes: int = 640
    clutter: int = 160
    unseen: int = 60
    budget: Budget = field(default_factory=lambda: Budget(glance_steps=1500, look_steps=800, dbn_steps=1000))
    sampling: Sampling = field(default_factory=Sampling)

    def run(self) -> None:
        require_steps(self.budget)
        self.sampling.check()
        require_at_least("--scenes", self.scenes, 14)
        require_at_least("--clutter", self.clutter, 1)
        require_at_least("--unseen", self.unseen, 1)
        check_directory(self.out, {"results.json": "astronaut", "run.training": None})
        began = time.perf_counter()
        train = orl_scenes("train", self.scenes, self.seed)
        clutter = orl_clutter("train", self.clutter, self.seed)
        unseen = orl_scenes("test", self.unseen, self.seed)
        photograph = astronaut()
        announce(
            f"learning from {len(train)} composed scenes, then attending to {len(unseen)} unseen; output: {self.out}"
        )
        labels = {"trained_on": ["orl@train"]}
        run = fit_logged(train, clutter, self.out / "run", self.budget, self.seed, self.torch_device, labels)
        trained = time.perf_counter()

        how_much: dict[str, Any] = dataclasses.asdict(self.sampling)
        results, posterior = evaluate(run, unseen, **how_much, seed=self.seed, progress=True)
        real = attend(run.model, run.guide, photograph, **how_much, seed=self.seed)
        truth = photograph.gazes
        assert truth is not None
        overlap = float(gazes.overlap(real.mean_gaze[0], truth[0]))
        results["astronaut"] = {
            "found": overlap > 0.5,
            "iou": overlap,
            "presence": float(real.presence[0]),
            "gaze": real.mean_gaze[0].tolist(),
        }
        results["seconds_training"] = trained - began

        pictures = _draw(run.model.dbn, unseen, posterior, photograph, real, self.seed)
        for name, figure in pictures.items():
            save_figure(figure, self.out / "pictures" / f"{name}.png")
        results["seconds"] = time.perf_counter() - began
        rows = [*score_rows(results), *_further_rows(results)]
        _report(rows, list(pictures), self.out / "pictures", posterior).write(self.out / "report.html")
        write_json(self.out / "results.json", results)
        remove_unfinished(self.out / "run")
        print_table(("score", "value"), rows)
        print(f"\n{self.out / 'report.html'}")


def astronaut() -> Scenes:
    """A photograph that was never composed, with its face's gaze as marked by eye: scikit-image's astronaut, in grey.

    Raises:
        InputError: scikit-image is not installed, or lacks the photograph.
    """
    path = locate_package("skimage") / "data" / "astronaut.png"
    marks = torch.tensor(ASTRONAUT_LANDMARKS, dtype=torch.float64)
    return Scenes.from_pictures([decode(path)], ["astronaut.png"], gazes.from_landmarks(*marks)[None])


def _draw(
    dbn: DeepBeliefNet, scenes: Scenes, posterior: Posterior, photograph: Scenes, real: Posterior, seed: int
) -> dict[str, Figure]:
    """The figures of the report by name, in its order."""
    truth, own = scenes.gazes, photograph.gazes
    assert truth is not None and own is not None
    overlap = gazes.overlap(posterior.mean_gaze, truth)
    scores = [f"IoU {v:.2f}" for v in overlap.tolist()]
    spread = posterior.sd[:, :2].amax(-1)
    titles = [
        f"{score}, presence {presence:.2f}, ±{sd:.1f} px"
        for score, presence, sd in zip(scores, posterior.presence.tolist(), spread.tolist(), strict=True)
    ]
    draws = posterior.gaze.flatten(1, 2)
    figures = {"legend": legend_figure(posterior.path.shape[1])}
    for begin in range(0, len(scenes), SCENES_IN_FIGURE):
        part = slice(begin, begin + SCENES_IN_FIGURE)
        figures[f"scenes_{begin // SCENES_IN_FIGURE + 1}"] = scenes_figure(
            scenes[part].pictures(), posterior.path[part], draws[part], truths=truth[part], titles=titles[part]
        )
    figures["canonical"] = patches_figure(posterior.patch, posterior.canonical, titles=scores)
    by_step = gazes.overlap(posterior.path, truth[:, None])
    figures["iou_by_step"] = iou_by_step_figure(by_step, labels=_step_names(by_step))
    seen = float(gazes.overlap(real.mean_gaze[0], own[0]))
    figures["astronaut"] = scene_figure(
        photograph[0].picture,
        real.path[0],
        real.gaze[0].flatten(0, 1),
        truth=own[0],
        title=f"IoU {seen:.2f} with the face as marked by eye, presence {float(real.presence[0]):.2f}",
        width=6.0,
    )
    figures["astronaut_canonical"] = patches_figure(real.patch, real.canonical)
    figures["prior"] = prior_figure(dbn, 64, seed)
    return figures


# What each figure shows, in words, and what is said below it.
CAPTIONS = {
    "legend": ("what the colours of the lines mean", ""),
    "scenes": (
        "unseen scenes with the gaze moving from yellow to blue",
        "Unseen scenes, attended to with no initial gaze. Presence is the probability that a face is there; ± is the "
        "posterior standard deviation of its position in scene pixels.",
    ),
    "canonical": (
        "the patch under each gaze with the canonical image below",
        "Above the patch under the reported gaze, below the posterior mean of the canonical image that explains it.",
    ),
    "iou_by_step": (
        "overlap of the gaze with the truth at every step",
        "Overlap with the true gaze at every step: the glance, the looks of the guide, the mean of the posterior.",
    ),
    "astronaut": (
        "a photograph of an astronaut with the gaze drawn over it",
        "A photograph that was never composed (scikit-image's astronaut). The white square was marked by eye.",
    ),
    "astronaut_canonical": ("the patch under the gaze and the canonical image", ""),
    "prior": (
        "draws and filters of the deep belief network",
        "The deep belief network: what it believes a face may look like.",
    ),
}
HEADINGS = {
    "legend": "Unseen scenes",
    "canonical": "What is seen there",
    "iou_by_step": "From the first glance to the posterior",
    "astronaut": "A photograph that was never composed",
    "prior": "The prior over faces",
}


def _report(rows: list[tuple[str, str]], names: list[str], folder: Path, posterior: Posterior) -> Report:
    report = Report("foveate: faces learned, found and understood")
    report.paragraph(
        "A deep belief network, a clutter model and a guide were trained on faces of 30 people in composed scenes. "
        "Then the program attended to scenes of 10 other people in other photographs: nothing told it where to begin."
    )
    report.table(("score", "value"), rows)
    for name in names:
        key = name.rsplit("_", 1)[0] if name.startswith("scenes_") else name
        if key in HEADINGS:
            report.heading(HEADINGS[key])
        report.picture(folder / f"{name}.png", *CAPTIONS[key])
    report.heading("Posterior")
    add_summary(report, posterior)
    return report


def _further_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    real = results["astronaut"]
    return [
        ("astronaut's face", f"{'found' if real['found'] else 'not found'}, IoU {real['iou']:.2f}"),
        ("minutes to train", f"{results['seconds_training'] / 60:.1f}"),
        ("minutes in all", f"{results['seconds'] / 60:.1f}"),
    ]


def _step_names(by_step: Float[Tensor, "scene step"]) -> list[str]:
    looks = by_step.shape[1] - 2
    return ["glance", *(f"look {k}" for k in range(1, looks + 1)), "posterior"]
