"""The command `attend`: where the object is in pictures without labels, and how sure that is, written as it comes."""

import csv
import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from foveate.data import UnlabelledScenes
from foveate.experiments.figures import legend_figure, patches_figure, scene_figure
from foveate.experiments.options import Common, announce, open_run, print_table
from foveate.experiments.outputs import check_directory, merge_netcdf, save_figure
from foveate.experiments.report import Report, add_summary
from foveate.experiments.scoring import Sampling
from foveate.inference.attend import attend_batches
from foveate.inference.posterior import Posterior
from foveate.model import gaze as gazes

__all__ = ["COLUMNS", "Attend", "rows_of"]

# Columns of gazes.csv; the first five make it a label file of its own. Scene pixels and degrees; sd_size is the
# log-scale's.
COLUMNS = (
    "file", "a", "b", "tx", "ty", "centre_x", "centre_y", "width", "rotation_degrees", "presence", "weight",
    "sd_x", "sd_y", "sd_size", "sd_rotation_degrees",
)  # fmt: skip

# Where outputs grow until they are whole.
UNFINISHED = "unfinished"
# Pictures that the report shows; the other files have all.
REPORTED = 60


@dataclass(frozen=True, kw_only=True)
class Attend(Common):
    """Where is the object in each picture, and how sure is that.

    Attributes:
        source: the run.
        pictures: pictures, or folders of them.
        out: a folder; an earlier output there is replaced.
        sampling: how much to sample.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    pictures: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PICTURE...")]
    out: Path
    sampling: Sampling = field(default_factory=lambda: Sampling(draws=200, warmup=100))

    def run(self) -> None:
        self.sampling.check()
        check_directory(self.out, ("gazes.csv", UNFINISHED))
        run = open_run(self.source, self.torch_device)
        scenes = _each_once(UnlabelledScenes.from_files(self.pictures))
        unfinished = self.out / UNFINISHED
        announce(f"attending to {len(scenes)} pictures; rows appear in {unfinished}, the whole output in {self.out}")
        scenes.preload(progress=sys.stderr.isatty())

        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "overlays").mkdir(parents=True)
        how_much: dict[str, Any] = dataclasses.asdict(self.sampling)
        posteriors = attend_batches(run.model, run.guide, scenes, **how_much, seed=self.seed, progress=True)
        kept, parts = _stream(posteriors, scenes, unfinished)
        _report(kept, len(scenes), unfinished)
        merge_netcdf(parts, unfinished / "posterior.nc")
        for part in parts:
            part.unlink()
        shutil.rmtree(self.out / "overlays", ignore_errors=True)
        for made in unfinished.iterdir():
            made.replace(self.out / made.name)
        unfinished.rmdir()
        shown = [[str(row[0]), *(f"{v:.2f}" for v in row[5:10])] for row in rows_of(kept)]
        print_table(("file", "x", "y", "width", "degrees", "presence"), shown)
        if len(scenes) > len(kept):
            print(f"... and {len(scenes) - len(kept)} more in gazes.csv")
        print(f"\n{self.out / 'report.html'}")


def rows_of(posterior: Posterior) -> list[tuple[Any, ...]]:
    """A row of gazes.csv (see `COLUMNS`) for each scene: the reported gaze and how sure it is."""
    gaze, sd = posterior.mean_gaze, posterior.sd
    centre, scale, rotation = gazes.parts(gaze)
    rows: list[tuple[Any, ...]] = []
    for i, name in enumerate(posterior.names):
        numbers = [
            *gaze[i].tolist(),
            *centre[i].tolist(),
            gazes.CANONICAL_SIZE * float(scale[i]),
            math.degrees(float(rotation[i])),
            float(posterior.presence[i]),
            float(posterior.weights[i, 0]),
            *sd[i, :3].tolist(),
            math.degrees(float(sd[i, 3])),
        ]
        rows.append((name, *(round(v, 6) for v in numbers)))
    return rows


def _each_once(scenes: UnlabelledScenes) -> UnlabelledScenes:
    """The scenes without those named twice, by themselves and by their folder say."""
    first: dict[Path, int] = {}
    for i, name in enumerate(scenes.names):
        first.setdefault(Path(name).resolve(), i)
    return scenes.subset(list(first.values()))


def _stream(posteriors: Iterator[Posterior], scenes: UnlabelledScenes, folder: Path) -> tuple[Posterior, list[Path]]:
    """Write rows, posteriors and overlays batch by batch; returns what the report shows, and the posteriors' files."""
    kept: list[Posterior] = []
    parts: list[Path] = []
    done = 0
    with (folder / "gazes.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(COLUMNS)
        for posterior in posteriors:
            for i, row in enumerate(rows_of(posterior)):
                writer.writerow(row)
                picture, name = scenes[done + i]
                draws = posterior.gaze[i].flatten(0, 1)
                figure = scene_figure(picture, posterior.path[i], draws, title=_sure(posterior, i))
                save_figure(figure, folder / "overlays" / overlay_name(done + i, name))
            table.flush()
            part = folder / f"posterior.{len(parts):06d}.nc"
            posterior.save(part)
            parts.append(part)
            if done < REPORTED:
                kept.append(posterior.subset(slice(0, REPORTED - done)))
            done += len(posterior)
    return Posterior.concatenate(kept), parts


def overlay_name(index: int, name: str) -> str:
    """File name of a picture's overlay: numbered, for pictures of different folders may have the same name."""
    return f"{index:05d}_{Path(name).stem}.png"


def _sure(posterior: Posterior, i: int) -> str:
    x, y, size, turn = posterior.sd[i].tolist()
    presence = float(posterior.presence[i])
    return f"presence {presence:.2f}, ±{max(x, y):.1f} px, ±{100 * size:.0f} %, ±{math.degrees(turn):.1f}°"


def _report(posterior: Posterior, count: int, folder: Path) -> None:
    report = Report("Where the object is, and how sure")
    shown = f"the first {len(posterior)} of {count} pictures" if count > len(posterior) else f"{count} pictures"
    report.paragraph(
        f"This page shows {shown}; gazes.csv has all. The gaze moves from yellow to blue; thin squares are draws of "
        "its posterior. Presence is the probability that the picture shows the object at all; ± is the posterior "
        "standard deviation of the position (scene pixels), the size and the rotation."
    )
    report.figure(legend_figure(posterior.path.shape[1], truth=False), "what the colours of the lines mean")
    header = ("file", "x", "y", "width", "rotation, degrees", "presence", "weight of the mode")
    report.table(header, [[row[0], *row[5:11]] for row in rows_of(posterior)])
    report.heading("What is seen there")
    report.paragraph("Above the patch under the gaze, below the canonical image that explains it.")
    titles = [Path(name).name[:14] for name in posterior.names]
    figure = patches_figure(posterior.patch, posterior.canonical, titles=titles)
    report.figure(figure, "the patch and the canonical image of each picture")
    report.heading("Pictures")
    for i, name in enumerate(posterior.names):
        report.picture(folder / "overlays" / overlay_name(i, name), f"{name} with the gaze drawn over it", name)
    report.heading("Posterior")
    add_summary(report, posterior)
    report.write(folder / "report.html")
