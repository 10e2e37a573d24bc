"""The command `attend`: where the object is in pictures without labels, and how sure that is, written as it comes."""

import csv
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from foveate.data import UnlabelledScenes
from foveate.experiments.figures import legend_figure, patches_figure, scene_figure
from foveate.experiments.options import Common, announce, open_run, print_table, require_at_least
from foveate.experiments.outputs import check_directory, merge_netcdf, save_figure, write_text
from foveate.experiments.report import Report, add_summary
from foveate.experiments.scoring import Sampling
from foveate.inference.attend import attend_batches
from foveate.inference.checkpoint import Run
from foveate.inference.posterior import Posterior
from foveate.inference.resume import digest, discard
from foveate.model import gaze as gazes
from foveate.model.errors import InputError

__all__ = ["COLUMNS", "Attend", "rows_of"]

# Columns of gazes.csv; the first five are those of a label file, which has names relative to its folder. Scene pixels
# and degrees; sd_size is the log-scale's. Objects of a file are numbered from 1. `docs/how-to/attend.md` tells users.
COLUMNS = (
    "file", "a", "b", "tx", "ty", "centre_x", "centre_y", "width", "rotation_degrees", "presence", "weight",
    "sd_x", "sd_y", "sd_size", "sd_rotation_degrees", "object",
)  # fmt: skip

# Where outputs grow until they are whole, and the file there that tells of what.
UNFINISHED, MADE_OF = "foveate_unfinished", "made_of.txt"
# Pictures that are attended to, and written, together.
BATCH = 16
# Pictures that the report shows; the other files have all.
REPORTED = 60
# An object beyond the first is told of where it is likelier there than not.
LIKELY = 0.5


@dataclass(frozen=True, kw_only=True)
class Attend(Common):
    """Where is the object in each picture, and how sure is that.

    Attributes:
        source: the run.
        pictures: pictures, or folders of them; one at least.
        out: a folder; an earlier output there is replaced. Where the same command was interrupted it goes on.
        max_objects: attend to up to so many objects of each picture one after the other, what is explained taken out;
            of those beyond the first the ones that are told of have a presence of 0.5 or more.
        sampling: how much to sample.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    pictures: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PICTURE...")]
    out: Path
    max_objects: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(draws=200, warmup=100))

    def run(self) -> None:
        self.sampling.check()
        require_at_least("--max-objects", self.max_objects, 1)
        check_directory(self.out, {"posterior.nc": None, UNFINISHED: None})
        run = open_run(self.source, self.torch_device)
        scenes = _each_once(UnlabelledScenes.from_files(self.pictures), self.out)
        unfinished = self.out / UNFINISHED
        noun = "picture" if len(scenes) == 1 else "pictures"
        announce(f"attending to {len(scenes)} {noun}; rows appear in {unfinished}, the whole output in {self.out}")
        scenes.preload(progress=sys.stderr.isatty())

        how_much = {**dataclasses.asdict(self.sampling), "max_objects": self.max_objects, "seed": self.seed}
        made_of = _made_of(run, scenes, how_much)
        earlier = _begun(unfinished, made_of)
        if earlier:
            (unfinished / "overlays").mkdir(exist_ok=True)
            for partial in (unfinished / "overlays").glob(".*"):
                partial.unlink()
            done = min(BATCH * len(earlier), len(scenes))
            announce(f"going on after the {done} that were done before an interruption")
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / "overlays").mkdir(parents=True)
            write_text(unfinished / MADE_OF, made_of)
        rest = range(BATCH * len(earlier), len(scenes))
        posteriors = (
            attend_batches(run.model, run.guide, scenes.subset(rest), **how_much, batch=BATCH, progress=True)
            if rest
            else iter(())
        )
        factor = float(run.config.get("coverage_factor", 1.0))
        kept, parts = _stream(earlier, posteriors, scenes, unfinished, factor)
        _report(kept, len(scenes), unfinished, factor)
        merge_netcdf(parts, unfinished / "posterior.nc")
        # What every batch gave stays until all is in its place: the same command puts it there after an interruption.
        for name in ("gazes.csv", "report.html", "posterior.nc"):
            (unfinished / name).replace(self.out / name)
        shutil.rmtree(self.out / "overlays", ignore_errors=True)
        (unfinished / "overlays").replace(self.out / "overlays")
        discard(unfinished)
        shown = [[str(row[0]), *(f"{v:.2f}" for v in row[5:10])] for row in rows_of(kept)]
        print_table(("file", "x", "y", "width", "degrees", "presence"), shown)
        if len(scenes) > REPORTED:
            print(f"... and {len(scenes) - REPORTED} more pictures in gazes.csv")
        print(f"\n{self.out / 'report.html'}")


def rows_of(posterior: Posterior, factor: float = 1.0) -> list[tuple[Any, ...]]:
    """A row of gazes.csv (see `COLUMNS`) for each object: the reported gaze and how sure it is.

    Args:
        posterior: what was found.
        factor: on the sds, as sampled: the run's ``coverage_factor`` (`foveate.inference.calibration`).
    """
    gaze, sd = posterior.mean_gaze, factor * posterior.sd
    centre, scale, rotation = gazes.parts(gaze)
    rows: list[tuple[Any, ...]] = []
    for i, (name, (_, number)) in enumerate(zip(posterior.names, _numbered(posterior), strict=True)):
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
        rows.append((name, *(round(v, 6) for v in numbers), number))
    return rows


def _numbered(posterior: Posterior) -> list[tuple[int, int]]:
    """Of every row the picture, from 0, and which of its objects, from 1: those of a picture follow one another."""
    objects = Counter[str]()
    numbers = []
    for name in posterior.names:
        objects[name] += 1
        numbers.append((len(objects) - 1, objects[name]))
    return numbers


def _each_once(scenes: UnlabelledScenes, out: Path) -> UnlabelledScenes:
    """The scenes without those named twice, by themselves and by their folder say, and without earlier overlays.

    Raises:
        InputError: nothing is left.
    """
    drawn = [(out / name).resolve() for name in ("overlays", UNFINISHED)]
    first: dict[Path, int] = {}
    for i, name in enumerate(scenes.names):
        place = Path(name).resolve()
        if not any(place.is_relative_to(folder) for folder in drawn):
            first.setdefault(place, i)
    if not first:
        raise InputError(f"{out}: every picture given is an overlay of an earlier output there; name other pictures")
    return scenes.subset(list(first.values()))


def _made_of(run: Run, scenes: UnlabelledScenes, how_much: dict[str, Any]) -> str:
    """What tells this work from any other: 64 hexadecimal digits."""
    files = [(name, (stat := Path(name).stat()).st_size, stat.st_mtime_ns) for name in scenes.names]
    tensors = [digest(*part.state_dict().values()) for part in (run.model, run.guide)]
    told = [run.model.config, run.guide.config, run.config.get("coverage_factor"), tensors, files, how_much]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _begun(folder: Path, made_of: str) -> list[Path]:
    """The posteriors' files that were written before the same work was interrupted."""
    told = folder / MADE_OF
    if not told.is_file() or told.read_text(encoding="utf-8") != made_of:
        return []
    return list(takewhile(Path.is_file, (_part(folder, number) for number in count())))


def _part(folder: Path, number: int) -> Path:
    return folder / f"posterior.{number:06d}.nc"


def _stream(
    earlier: Sequence[Path], posteriors: Iterable[Posterior], scenes: UnlabelledScenes, folder: Path, factor: float
) -> tuple[Posterior, list[Path]]:
    """Write rows, posteriors and overlays batch by batch; returns what the report shows, and the posteriors' files.

    Args:
        earlier: files of the posteriors of the first pictures; of their overlays those that are not there are drawn.
        posteriors: of the other pictures.
        scenes: all pictures.
        folder: where everything is written.
        factor: see `rows_of`.
    """
    kept: list[Posterior] = []
    parts: list[Path] = []
    done = 0
    with (folder / "gazes.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(COLUMNS)
        for number, posterior in enumerate(chain(map(Posterior.load, earlier), map(_told_of, posteriors))):
            numbers = [(done + picture, which) for picture, which in _numbered(posterior)]
            writer.writerows(rows_of(posterior, factor))
            table.flush()
            for i, (index, which) in enumerate(numbers):
                overlay = folder / "overlays" / overlay_name(index, scenes.names[index], which)
                if number >= len(earlier) or not overlay.is_file():
                    draws = posterior.gaze[i].flatten(0, 1)
                    title = _sure(posterior, i, factor)
                    save_figure(scene_figure(scenes[index].picture, posterior.path[i], draws, title=title), overlay)
            parts.append(_part(folder, number))
            if number >= len(earlier):
                posterior.save(parts[-1])
            if done < REPORTED:
                kept.append(posterior.subset([i for i, (index, _) in enumerate(numbers) if index < REPORTED]))
            done = numbers[-1][0] + 1
    return Posterior.concatenate(kept), parts


def _told_of(posterior: Posterior) -> Posterior:
    """The first object of every picture, and of the others those that are likely to be there."""
    objects = posterior.settings["max_objects"]
    return posterior.subset((torch.arange(len(posterior)) % objects == 0) | (posterior.presence >= LIKELY))


def overlay_name(index: int, name: str, number: int = 1) -> str:
    """File name of an object's overlay: numbered, for pictures may have the same name, and not too long."""
    return f"{index:05d}_{Path(name).stem[:60]}{f'_{number}' if number > 1 else ''}.png"


def _sure(posterior: Posterior, i: int, factor: float) -> str:
    x, y, size, turn = (factor * posterior.sd[i]).tolist()
    presence = float(posterior.presence[i])
    return f"presence {presence:.2f}, ±{max(x, y):.1f} px, ±{100 * size:.0f} %, ±{math.degrees(turn):.1f}°"


def _report(posterior: Posterior, count: int, folder: Path, factor: float) -> None:
    report = Report("Where the object is, and how sure")
    shown = f"the first {REPORTED} of {count} pictures" if count > REPORTED else f"{count} pictures"
    report.paragraph(
        f"This page shows {shown}; gazes.csv has all. The gaze moves from yellow to blue (where no look moved it, the "
        "first squares lie under a later one); thin squares are draws of its posterior. Presence is the probability "
        "that the picture shows the object at all; ± is the posterior standard deviation of the position (scene "
        "pixels), the size and the rotation, times the factor that scenes held out of training asked for."
    )
    report.figure(legend_figure(posterior.path.shape[1], truth=False), "what the colours of the lines mean")
    header = ("file", "x", "y", "width", "rotation, degrees", "presence", "weight of the mode", "object")
    report.table(header, [[row[0], *row[5:11], row[-1]] for row in rows_of(posterior)])
    report.heading("What is seen there")
    report.paragraph("Above the patch under the gaze, below the canonical image that explains it.")
    titles = [Path(name).name[:14] for name in posterior.names]
    figure = patches_figure(posterior.patch, posterior.canonical, titles=titles)
    report.figure(figure, "the patch and the canonical image of each picture")
    report.heading("Pictures")
    for name, (picture, number) in zip(posterior.names, _numbered(posterior), strict=True):
        overlay = folder / "overlays" / overlay_name(picture, name, number)
        report.picture(
            overlay, f"{name} with the gaze drawn over it", name if number == 1 else f"{name}, object {number}"
        )
    report.heading("Posterior")
    if factor != 1:
        report.paragraph(
            "The standard deviations here are those of the draws. With the pictures and in gazes.csv they are "
            f"{factor:.2f} times as wide."
        )
    add_summary(report, posterior)
    report.write(folder / "report.html")
