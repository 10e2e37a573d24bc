"""Outputs: refused before any work where they would replace something else, written whole, merged file by file."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5netcdf
from matplotlib.figure import Figure
from PIL import Image

from foveate.inference.checkpoint import atomic_file, require_replaceable
from foveate.model.errors import InputError

__all__ = [
    "check_directory",
    "check_json",
    "check_picture",
    "check_run",
    "markdown_table",
    "merge_netcdf",
    "save_figure",
    "write_text",
]

# Written into every picture, so that a picture of somebody else's is never taken for one of ours.
SOFTWARE = "foveate"


def check_json(path: Path, key: str) -> None:
    """Refuse a JSON output that would replace anything but an earlier output of the same kind.

    Args:
        path: the file to be written.
        key: what every output of the kind holds at its top level.

    Raises:
        InputError: `path` is a folder, another file, or in a place that cannot be written.
    """
    _check_file(path, ".json", lambda: _holds(path, key))


def check_picture(path: Path) -> None:
    """Refuse a PNG output that would replace anything but a picture drawn by this project.

    Raises:
        InputError: `path` is a folder, another file, has another suffix, or is in a place that cannot be written.
    """

    def ours() -> bool:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE

    _check_file(path, ".png", ours)


def check_directory(path: Path, marks: Mapping[str, str | None]) -> None:
    """Refuse an output folder that exists, is not empty and holds none of the files of an earlier output.

    Args:
        path: the folder.
        marks: names of such files and folders; of a JSON file, what every output of the kind holds at its top level,
            for other people's programs write a `results.json`, too: one without it is refused whatever else is there.

    Raises:
        InputError: also when `path` is a file, or is in a place that cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, and the output is a folder; name another place with --out")
    if path.is_dir() and any(path.iterdir()):
        present = {mark: key for mark, key in marks.items() if (path / mark).exists()}
        if not present or not all(key is None or _holds(path / mark, key) for mark, key in present.items()):
            raise InputError(
                f"{path}: this folder holds other things than an earlier output of this command (its "
                f"{' or '.join(marks)}); name another place with --out, or empty it"
            )
    _check_place(path)


def check_run(path: Path) -> None:
    """Refuse before the work what saving a run would refuse after it; an earlier run may be replaced.

    Raises:
        InputError: `path` is a file or a folder with other things, or is in a place that cannot be written.
    """
    require_replaceable(path)
    # A run is made beside its place and moved there, and so is what is unfinished.
    _check_place(path.resolve(), beside=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: first column to the left, the others to the right; `|` in a cell is escaped."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, rule, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, marked as drawn by this project."""
    with atomic_file(path) as beside:
        figure.savefig(beside, dpi=110, metadata={"Software": SOFTWARE})


def merge_netcdf(parts: Sequence[Path], path: Path, dimension: str = "scene") -> None:
    """Join netCDF files along one dimension into one, file by file, so that memory does not grow with their number.

    Groups, attributes and the variables without `dimension` are those of the first file; the others must have the same
    groups and variables, of the same shapes but for `dimension`.

    Args:
        parts: at least one file.
        path: replaced once the joint file is whole.
        dimension: along which variables are joined, wherever it stands among their dimensions.
    """
    with atomic_file(path) as beside:
        if len(parts) == 1:
            shutil.copyfile(parts[0], beside)
            return
        counts = []
        for part in parts:
            with h5netcdf.File(part, "r") as file:
                counts.append(_length(file, dimension))
        with h5netcdf.File(beside, "w") as joint:
            begin = 0
            for part, count in zip(parts, counts, strict=True):
                with h5netcdf.File(part, "r") as file:
                    if begin == 0:
                        _lay_out(file, joint, dimension, sum(counts))
                    _copy(file, joint, dimension, slice(begin, begin + count))
                begin += count


def _holds(path: Path, key: str) -> bool:
    """Whether a file is JSON with `key` at its top level."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and key in content


def _check_file(path: Path, suffix: str, ours: Callable[[], bool]) -> None:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, and the output is a {suffix} file; name a file with --out")
    if path.suffix.lower() != suffix:
        raise InputError(f"{path}: the output is a {suffix} file; name one that ends so with --out")
    if path.exists():
        try:
            replaceable = ours()
        except (OSError, ValueError, TypeError):
            replaceable = False
        if not replaceable:
            raise InputError(
                f"{path}: exists and is no earlier output of this command; name another file, or remove it"
            )
    _check_place(path)


def _check_place(path: Path, beside: bool = False) -> None:
    """Refuse a path below a file, and one that may not be written: in it if it is a folder, or `beside` it."""
    place = path if path.is_dir() and not beside else path.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{path}: {place} is a file, not a folder; name another place with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the folder {place} may not be written; name another place with --out")


def _length(group: Any, dimension: str) -> int:
    """How long `dimension` is in a file, wherever in it the dimension is defined."""
    if dimension in group.dimensions:
        return group.dimensions[dimension].size
    return max((_length(inner, dimension) for inner in group.groups.values()), default=0)


def _lay_out(source: Any, target: Any, dimension: str, total: int) -> None:
    """Make the groups, dimensions, variables and attributes of `source` in `target`, `dimension` of length `total`."""
    target.attrs.update(dict(source.attrs))
    for name, found in source.dimensions.items():
        if name not in target.dimensions:
            target.dimensions[name] = total if name == dimension else found.size
    for name, variable in source.variables.items():
        made = target.create_variable(name, variable.dimensions, variable.dtype)
        made.attrs.update(dict(variable.attrs))
    for name, inner in source.groups.items():
        _lay_out(inner, target.create_group(name), dimension, total)


def _copy(source: Any, target: Any, dimension: str, rows: slice) -> None:
    """Copy the variables of `source`: those along `dimension` to `rows` of it, the others once, as a whole."""
    for name, variable in source.variables.items():
        if dimension in variable.dimensions:
            place = tuple(rows if d == dimension else slice(None) for d in variable.dimensions)
            target.variables[name][place] = variable[...]
        elif rows.start == 0:
            target.variables[name][...] = variable[...]
    for name, inner in source.groups.items():
        _copy(inner, target.groups[name], dimension, rows)
