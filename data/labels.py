"""Label files: the gazes, people and splits that `landmarks.csv` and `gazes.csv` give to the pictures of a folder.

Convention: rows are in scene pixels (x right, y down, centres at integers); "left" is the left side of the image.
`landmarks.csv` has ``file, left_eye_x, left_eye_y, right_eye_x, right_eye_y, mouth_x, mouth_y``, `gazes.csv` has
``file, a, b, tx, ty``; both may have ``person`` and ``split``; other columns are ignored.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from foveate.model import gaze
from foveate.model.errors import InputError

__all__ = ["LABEL_FILES", "Label", "check_gaze", "find_label_file", "gaze_from_row", "read_labels", "read_rows"]

LANDMARK_COLUMNS = ("left_eye_x", "left_eye_y", "right_eye_x", "right_eye_y", "mouth_x", "mouth_y")
GAZE_COLUMNS = ("a", "b", "tx", "ty")
LABEL_FILES = {"landmarks.csv": LANDMARK_COLUMNS, "gazes.csv": GAZE_COLUMNS}


@dataclass(frozen=True)
class Label:
    """What one row of a label file says of one picture.

    Attributes:
        row: where it stands, such as ``"landmarks.csv, row 3"`` (the header is row 1).
        gaze: ``(a, b, tx, ty)``, or None when the gazes were not asked for.
        person: who is seen, or None.
        split: ``"train"``, ``"test"`` or another name, or None.
    """

    row: str
    gaze: tuple[float, float, float, float] | None
    person: str | None
    split: str | None


def find_label_file(directory: Path) -> Path | None:
    """The label file of a folder, or None.

    Raises:
        InputError: the folder has both `landmarks.csv` and `gazes.csv`.
    """
    found = [directory / name for name in LABEL_FILES if (directory / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{directory}: has both landmarks.csv and gazes.csv; keep the one that counts")
    return found[0] if found else None


def read_labels(path: Path, hidden: bool = False) -> dict[str, Label]:
    """Read a label file: picture name (relative to the folder, with ``/``) to its label.

    Args:
        path: a `landmarks.csv` or a `gazes.csv`.
        hidden: read the columns ``file`` and ``split`` alone; the others are not looked at and may hold anything.

    Raises:
        InputError: a column is missing, a cell is no number, a picture has two rows, or what `gaze_from_row` raises.
    """
    columns = () if hidden else LABEL_FILES[path.name]
    labels: dict[str, Label] = {}
    for row, cells in read_rows(path, ("file", *columns)):
        name = PurePosixPath(cells["file"].replace("\\", "/")).as_posix()
        if not cells["file"]:
            raise InputError(f"{row}: the cell 'file' is empty; name the picture or remove the row")
        if name in labels:
            raise InputError(f"{row}: picture '{name}' already has a row ({labels[name].row}); keep one of the two")
        numbers = [_number(cells[column], column, row) for column in columns]
        labels[name] = Label(
            row,
            None if hidden else gaze_from_row(numbers, row),
            None if hidden else cells.get("person") or None,
            cells.get("split") or None,
        )
    return labels


def read_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Rows of a CSV file as ``(where, cells)``; blank lines are passed over, cells are stripped.

    Raises:
        InputError: the file may not be read, is no text, lacks a needed column or has one twice, or a row has too few
            or too many cells.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [column.strip() for column in next(reader, [])]
            _check_header(path, header, needed)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                row = f"{path}, row {reader.line_num}"
                if len(cells) != len(header):
                    raise InputError(f"{row}: has {len(cells)} cells, the header has {len(header)}; mend the row")
                yield row, {column: cell.strip() for column, cell in zip(header, cells, strict=True)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file in UTF-8 ({error}); save it as one") from None
    except OSError as error:
        raise InputError(f"{path}: may not be read ({error.strerror})") from None


def _check_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in header]
    if missing:
        plural = "s" * (len(missing) > 1)
        in_one = next((mark for mark in (";", "\t") if any(mark in cell for cell in header)), None)
        if in_one is not None:
            raise InputError(f"{path}: row 1 is separated by {in_one!r}; save the table with commas")
        lower = {column.lower() for column in header}
        if all(column in lower for column in missing):
            raise InputError(f"{path}: the column{plural} {', '.join(missing)} must be in small letters in row 1")
        raise InputError(f"{path}: lacks the column{plural} {', '.join(missing)}; add to row 1")
    twice = [column for column in (*needed, "person", "split") if header.count(column) > 1]
    if twice:
        raise InputError(f"{path}: has the column {twice[0]} twice; keep the one that counts")


def check_gaze(label: Label, name: str, size: tuple[int, int]) -> None:
    """Refuse a gaze whose centre is not on its picture of (height, width) pixels, or that is no size of an object.

    Raises:
        InputError: the centre lies outside, or the square is less than 2 pixels or more than 4 pictures wide; the
            message names the row, the gaze and the size.
    """
    if label.gaze is None:
        return
    height, width = size
    across = gaze.CANONICAL_SIZE * math.hypot(*label.gaze[:2])
    if not 2 <= across <= 4 * max(size):
        raise InputError(
            f"{label.row}: the gaze of '{name}' is a square {across:.3g} pixels wide in a picture of "
            f"{width}×{height}; give (a, b) in this picture's pixels for each of the 24 canonical ones"
        )
    if not gaze.inside(torch.tensor(label.gaze, dtype=torch.float64), height, width):
        x, y = label.gaze[2:]
        raise InputError(
            f"{label.row}: the gaze of '{name}' has its centre at ({x:.1f}, {y:.1f}), outside the picture of "
            f"{width}×{height} pixels; give coordinates in this picture's own pixels"
        )


def gaze_from_row(numbers: Sequence[float], row: str) -> tuple[float, float, float, float]:
    """The gaze of one row.

    Four numbers are ``(a, b, tx, ty)`` itself; six are left eye, right eye and mouth, each ``(x, y)``.

    Raises:
        InputError: the scale is 0, the object is turned by 90° or more (``a`` ≤ 0), or the landmarks lie on one line or
            mirrored; the message begins with `row`.
    """
    if len(numbers) == 4:
        a, b, tx, ty = numbers
        if a == 0 and b == 0:
            raise InputError(f"{row}: a = b = 0 is a gaze of scale 0; the scale √(a² + b²) must be positive")
        _check_upright(a, row)
        return a, b, tx, ty
    left, right, mouth = (torch.tensor(numbers[k : k + 2], dtype=torch.float64) for k in (0, 2, 4))
    eyes, down = right - left, mouth - left
    # Positive when left eye, right eye, mouth run clockwise on the screen, as in the canonical frame.
    if eyes[0] * down[1] - eyes[1] * down[0] <= 0:
        raise InputError(f"{row}: eyes and mouth lie on one line or mirrored; 'left' is the left side of the image")
    a, b, tx, ty = gaze.from_landmarks(left, right, mouth).tolist()
    _check_upright(a, row)
    return a, b, tx, ty


def _check_upright(a: float, row: str) -> None:
    if a <= 0:
        raise InputError(
            f"{row}: a = {a:g} is a negative scale or a turn of 90° or more; a must be positive "
            "(turn the picture instead)"
        )


def _number(cell: str, column: str, row: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        raise InputError(
            f"{row}: '{cell}' in column {column} is not a number; mend the cell or remove the row"
        ) from None
    if not math.isfinite(value):
        raise InputError(f"{row}: '{cell}' in column {column} is not finite; mend the cell or remove the row")
    return value
