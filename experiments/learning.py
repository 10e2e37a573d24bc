"""The command `learn`: a run learns a new population from pictures without labels, watched round by round."""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from foveate.data import UnlabelledScenes
from foveate.experiments.options import Common, StageBars, announce, open_run, print_table, require_steps
from foveate.experiments.outputs import check_run, save_figure
from foveate.experiments.training import default_clutter, prior_figure
from foveate.inference.checkpoint import Run, save
from foveate.inference.learn import Monitor, learn
from foveate.inference.resume import discard
from foveate.model.errors import InputError

__all__ = ["Learn", "LearningBudget", "working_folder"]

# Draws of the prior in the picture of each round.
DRAWN = 64


@dataclass(frozen=True)
class LearningBudget:
    """How long to learn.

    Attributes:
        rounds: of looking and learning, at most: it stops by itself where it has drifted or settled.
        glance_steps: of the guide's peripheral half, in each round.
        look_steps: of its foveal half, in each round.
        dbn_steps: of the deep belief network, in each round at most.
    """

    rounds: int = 8
    glance_steps: int = 1500
    look_steps: int = 800
    dbn_steps: int = 2000


@dataclass(frozen=True, kw_only=True)
class Learn(Common):
    """Learn a new population of the object from pictures without labels, starting from a run.

    Attributes:
        source: the run to start from.
        data: orl, caltech:DIR, webfaces:DIR, lfw:DIR, multipie:DIR or folder:DIR, with @train or @test; one at
            least; repeatable; labels there are not read.
        clutter: pictures without the object: folder:DIR, or orl for the photographs that scikit-image bundles; by
            default those, where scikit-image is installed, else windows that miss what was found.
        out: the run that was learned, a folder; an earlier run there is replaced.
        resume: go on with learning that was interrupted, to the same result.
        budget: how long to learn.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    clutter: str | None = None
    out: Path
    resume: bool = False
    budget: LearningBudget = field(default_factory=LearningBudget)

    def run(self) -> None:
        require_steps(self.budget)
        check_run(self.out)
        working = working_folder(self.out)
        if working.exists() and not self.resume:
            raise InputError(f"{working}: holds unfinished learning; go on with --resume, or remove that folder")
        start = open_run(self.source, self.torch_device)
        scenes = UnlabelledScenes.from_specs(self.data, seed=self.seed)
        clutter = default_clutter(self.clutter, self.seed)
        announce(
            f"learning from {len(scenes)} scenes without labels; it grows in {working}, the run goes to {self.out}"
        )
        watched = Watched(working)
        with StageBars() as bars:
            watched.bars = bars
            run = learn(
                start,
                scenes,
                clutter,
                **dataclasses.asdict(self.budget),
                seed=self.seed,
                checkpoint=working,
                resume=self.resume,
                progress=watched.progress,
                each_round=watched.each_round,
            )
        run = Run(run.model, run.guide, run.config | {"learned_from": list(self.data)})
        save(run, self.out, watched.log())
        for earlier in self.out.glob("prior_round_*.png"):
            earlier.unlink()
        for picture in working.glob("prior_round_*.png"):
            shutil.move(picture, self.out / picture.name)
        discard(working)
        rows = [[str(m["round"]), *(monitor_cells(Monitor(**m)))] for m in run.config["learning"]]
        print_table(("round", "learned from", "presence", "retained", "moved", "chains agree", "bound", "kept"), rows)
        print(f"\n{self.out}")


class Watched:
    """The bar, the log and the pictures of learning in a folder; the log goes on where an interrupted one ended.

    Args:
        folder: where the log and the pictures grow.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bars: StageBars | None = None
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        path = folder / "log.jsonl"
        if path.is_file():
            # A line that was being written when the power went is none.
            whole = path.read_bytes().rpartition(b"\n")
            with path.open("r+b") as file:
                file.truncate(len(whole[0]) + len(whole[1]))
            for line in path.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))
        self.began = time.perf_counter() - max((entry["seconds"] for entry in self._lines.values()), default=0.0)

    def progress(self, stage: str, done: int, total: int, figure: float) -> None:
        """A step was done."""
        if self.bars is not None:
            self.bars(stage, done, total, figure)
        # A hundred lines of each stage tell how it went; reading has nothing to tell.
        if not stage.startswith("reading") and (done % max(1, total // 100) == 0 or done >= total - 1):
            self._write({"stage": stage, "done": done, "total": total, "figure": figure})

    def each_round(self, monitor: Monitor, run: Run) -> None:
        """A round was done: its monitor is logged and draws of its prior are pictured."""
        self._write({"stage": "monitor", **monitor._asdict()})
        figure = prior_figure(run.model.dbn, DRAWN, seed=0)
        save_figure(figure, self.folder / f"prior_round_{monitor.round}.png")
        names = ("learned from", "presence", "retained", "moved", "chains agree", "bound", "kept")
        told = ", ".join(f"{name} {cell}" for name, cell in zip(names, monitor_cells(monitor), strict=True))
        announce(f"round {monitor.round}: {told}")

    def log(self) -> list[dict[str, Any]]:
        """Every line so far; of what was told once more after an interruption, the first."""
        return list(self._lines.values())

    def _keep(self, entry: dict[str, Any]) -> None:
        key = entry["stage"], entry["round"] if entry["stage"] == "monitor" else entry["done"]
        self._lines.setdefault(key, entry)

    def _write(self, entry: dict[str, Any]) -> None:
        entry = {"seconds": round(time.perf_counter() - self.began, 2), **entry}
        self._keep(entry)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def monitor_cells(monitor: Monitor) -> list[str]:
    """A round's monitor as the cells of a table, without its number."""
    return [
        str(monitor.learned_from),
        *(f"{v:.3f}" for v in (monitor.presence, monitor.retained, monitor.moved, monitor.chains_agree)),
        f"{monitor.bound:.1f}",
        "yes" if monitor.accepted else "no",
    ]


def working_folder(out: Path) -> Path:
    """Where learning for `out` grows until it is done."""
    out = out.resolve()
    return out.with_name(f"{out.name}.learning")
