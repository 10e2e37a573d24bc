"""The commands `train` (a run from labelled scenes) and `sample` (what a run's prior believes in)."""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib.figure import Figure

from foveate.data import Scenes, orl_clutter
from foveate.experiments.conventions import labelled_scenes
from foveate.experiments.figures import Sheet, sheets_figure
from foveate.experiments.options import Common, StageBars, announce, open_run, require_at_least, require_steps
from foveate.experiments.outputs import check_picture, check_run, save_figure, write_text
from foveate.inference.checkpoint import Run, save
from foveate.inference.fit import fit
from foveate.inference.prior_training import Monitor
from foveate.inference.resume import discard
from foveate.model import DeepBeliefNet
from foveate.model.errors import InputError

__all__ = [
    "Budget",
    "Sample",
    "Train",
    "default_clutter",
    "fit_logged",
    "prior_figure",
    "remove_unfinished",
    "unfinished_training",
]

# Crops of the bundled photographs that serve as clutter where none is given.
BUNDLED_CLUTTER = 200
# Small images in a row of a picture.
COLUMNS = 16


@dataclass(frozen=True)
class Budget:
    """How long to train: steps of each part; every one shortens its learning rate to its own end.

    Attributes:
        glance_steps: of the guide's peripheral half.
        look_steps: of the guide's foveal half.
        dbn_steps: of the deep belief network at most; it stops by itself.
    """

    glance_steps: int = 3000
    look_steps: int = 1500
    dbn_steps: int = 2000


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Learn the model and the guide from scenes with known gazes.

    Attributes:
        data: orl, caltech:DIR, webfaces:DIR, lfw:DIR, multipie:DIR or folder:DIR, with @train or @test; one at
            least; repeatable: labels of later collections are re-expressed as the first one's labeller would have drawn
            them.
        clutter: pictures without the object: folder:DIR, or orl for the photographs that scikit-image bundles; by
            default those, where scikit-image is installed, else windows of the scenes that miss the object.
        out: the run, a folder; an earlier run there is replaced.
        resume: go on with training that was interrupted, to the same result.
        budget: how long to train.
    """

    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    clutter: str | None = None
    out: Path
    resume: bool = False
    budget: Budget = field(default_factory=Budget)

    def run(self) -> None:
        require_steps(self.budget)
        check_run(self.out)
        unfinished = unfinished_training(self.out)
        if unfinished.exists() and not self.resume:
            raise InputError(f"{unfinished}: holds unfinished training; go on with --resume, or remove that folder")
        scenes, labels = labelled_scenes(self.data, self.seed)
        labels |= {"trained_on": list(self.data), "clutter": self.clutter}
        clutter = default_clutter(self.clutter, self.seed)
        announce(f"training on {len(scenes)} scenes; the run goes to {self.out}")
        scenes.preload(progress=sys.stderr.isatty())
        if clutter is not None:
            clutter.preload(progress=sys.stderr.isatty())
        run = fit_logged(scenes, clutter, self.out, self.budget, self.seed, self.torch_device, labels)
        remove_unfinished(self.out)
        print(f"{self.out}: accuracy on scenes held out {run.config['validation_accuracy']:.3f}")


@dataclass(frozen=True, kw_only=True)
class Sample(Common):
    """Draw canonical images from a run's prior, with its filters below.

    Attributes:
        source: the run.
        out: a .png file.
        count: how many draws.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    out: Path
    count: int = 64

    def run(self) -> None:
        require_at_least("--count", self.count, 1)
        check_picture(self.out)
        run = open_run(self.source, self.torch_device)
        announce(f"drawing {self.count} canonical images; the picture goes to {self.out}")
        save_figure(prior_figure(run.model.dbn, self.count, self.seed), self.out)


def fit_logged(
    scenes: Scenes,
    clutter: Scenes | None,
    out: Path,
    budget: Budget,
    seed: int,
    device: str,
    labels: dict[str, Any] | None = None,
) -> Run:
    """`foveate.inference.fit.fit` with progress bars; the run, with the log of its training, goes to `out`.

    What is known of the scenes' `labels` (see `labelled_scenes`) goes into its configuration.

    Training that was interrupted goes on from `unfinished_training`, and its log with it. That folder stays until
    `remove_unfinished`: a command that does more with the run need not train again where it is interrupted later.
    """
    unfinished = unfinished_training(out)
    lines = unfinished / "log.jsonl"
    # What was done after the last state that was kept is done, and logged, once more.
    log: dict[tuple[Any, ...], dict[str, Any]] = {}
    if lines.is_file():
        earlier = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        log = {_line(entry): entry for entry in earlier}
    # What the last check of the prior's training saw, for the log's next line.
    seen: dict[str, Any] = {}

    def watch(monitor: Monitor) -> None:
        seen.update(monitor._asdict())
        seen["part"] = seen.pop("stage")

    began = time.perf_counter() - max((entry["seconds"] for entry in log.values()), default=0.0)
    with StageBars() as bars:

        def progress(stage: str, done: int, total: int, figure: float) -> None:
            bars(stage, done, total, figure)
            # A hundred lines of each stage tell how it went, or all checks of the prior; reading has nothing to tell.
            at_last = done >= total - 1
            if stage == "prior" or (stage != "reading" and (done % max(1, total // 100) == 0 or at_last)):
                seconds = round(time.perf_counter() - began, 2)
                entry = {"stage": stage, "done": done, "total": total, "figure": figure, "seconds": seconds}
                entry |= seen if stage == "prior" else {}
                log[_line(entry)] = entry
                if unfinished.is_dir():
                    write_text(lines, "".join(json.dumps(entry) + "\n" for entry in log.values()))

        run = fit(
            scenes,
            clutter,
            **dataclasses.asdict(budget),
            seed=seed,
            device=device,
            progress=progress,
            watch=watch,
            checkpoint=unfinished,
            resume=True,
        )
    run = Run(run.model, run.guide, run.config | (labels or {}))
    save(run, out, log.values())
    return run


def _line(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a line of the log is about: a later one about the same takes its place."""
    return entry["stage"], entry.get("part"), entry["done"]


def unfinished_training(out: Path) -> Path:
    """Where the training of a run is kept until the run is whole."""
    out = out.resolve()
    return out.with_name(f"{out.name}.training")


def remove_unfinished(out: Path) -> None:
    """Forget how a run came about: it is whole, and whatever else was to be made of it."""
    discard(unfinished_training(out))


def default_clutter(spec: str | None, seed: int, split: str = "train") -> Scenes | None:
    """The clutter of a SPEC; without one bundled photographs of `split`, where scikit-image is installed, else None."""
    if spec is not None:
        return Scenes.from_clutter_spec(spec, seed=seed)
    return orl_clutter(split, BUNDLED_CLUTTER, seed) if find_spec("skimage") is not None else None


@torch.no_grad()
def prior_figure(dbn: DeepBeliefNet, count: int, seed: int) -> Figure:
    """What a prior believes in: draws of v, the mean of v given the hidden units of each draw, and the units' filters.

    Args:
        dbn: the prior.
        count: how many draws.
        seed: of the draws.
    """
    generator = torch.Generator(dbn.core.mean.device).manual_seed(seed)
    hidden = dbn.sample_hidden(count, generator)
    filters = dbn.filters()
    shown = filters[: 8 * COLUMNS]
    of_all = "" if len(shown) == len(filters) else f", {len(shown)} of {len(filters)}"
    sheets = [
        Sheet("draws of the canonical image v", dbn.to_canonical(dbn.layer.sample(hidden, generator))),
        Sheet(
            "mean of v given the hidden units of the first draws", dbn.to_canonical(dbn.layer.mean(hidden[:COLUMNS]))
        ),
        Sheet(f"filters: what each hidden unit changes{of_all}", shown, signed=True),
    ]
    return sheets_figure(sheets, columns=COLUMNS)
