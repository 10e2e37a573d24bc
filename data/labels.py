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
        InputError: a column is missing, a cell is no number, a picture has two rows, or three landmarks make no gaze.
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
        InputError: the file is no text or lacks a needed column, or a row has too few or too many cells.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [column.strip() for column in next(reader, [])]
            missing = [column for column in needed if column not in header]
            if missing:
                raise InputError(
                    f"{path}: lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; add to row 1"
                )
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                row = f"{path}, row {reader.line_num}"
                if len(cells) != len(header):
                    raise InputError(f"{row}: has {len(cells)} cells, the header has {len(header)}; mend the row")
                yield row, {column: cell.strip() for column, cell in zip(header, cells, strict=True)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file in UTF-8 ({error}); save it as one") from None


def check_gaze(label: Label, name: str, size: tuple[int, int]) -> None:
    """Refuse a gaze whose centre is not on its picture of (height, width) pixels.

    Raises:
        InputError: the centre lies outside; the message names the row, the gaze and the size.
    """
    height, width = size
    if label.gaze is not None and not gaze.inside(torch.tensor(label.gaze, dtype=torch.float64), height, width):
        x, y = label.gaze[2:]
        raise InputError(
            f"{label.row}: the gaze of '{name}' has its centre at ({x:.1f}, {y:.1f}), outside the picture of "
            f"{width}×{height} pixels; give coordinates in this picture's own pixels"
        )


def gaze_from_row(numbers: Sequence[float], row: str) -> tuple[float, float, float, float]:
    """The gaze of one row.

    Four numbers are ``(a, b, tx, ty)`` itself; six are left eye, right eye and mouth, each ``(x, y)``.

    Raises:
        InputError: the scale is 0 or negative (``a`` ≤ 0), or the landmarks lie on one line or mirrored; the message
            begins with `row`.
    """
    if len(numbers) == 4:
        a, b, tx, ty = numbers
        if a == 0 and b == 0:
            raise InputError(f"{row}: a = b = 0 is a gaze of scale 0; the scale √(a² + b²) must be positive")
        if a <= 0:
            raise InputError(
                f"{row}: a = {a:g} is a negative scale or a turn of 90° or more; a must be positive "
                "(turn the picture instead)"
            )
        return a, b, tx, ty
    left, right, mouth = (torch.tensor(numbers[k : k + 2], dtype=torch.float64) for k in (0, 2, 4))
    eyes, down = right - left, mouth - left
    # Positive when left eye, right eye, mouth run clockwise on the screen, as in the canonical frame.
    if eyes[0] * down[1] - eyes[1] * down[0] <= 0:
        raise InputError(f"{row}: eyes and mouth lie on one line or mirrored; 'left' is the left side of the image")
    a, b, tx, ty = gaze.from_landmarks(left, right, mouth).tolist()
    return a, b, tx, ty


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
