"""Compiled loops (numba) over packed pyramids: fast twins of plain PyTorch code for the CPU."""

import math
import warnings
from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

__all__ = ["bilinear", "blur", "compiled", "extract_patches", "two_levels"]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.njit` without the interpreter's lock, kept on disk for other processes where that can be.

    Args:
        options: of `numba.njit`.
    """

    def decorated(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            # Neither the folder of the module nor the user's own can be written to, as in some containers.
            warnings.warn(
                "no folder can be written to that would keep compiled loops: every process compiles its own before it "
                "begins; set NUMBA_CACHE_DIR to a folder that can",
                # One place for all loops, which is told once.
                stacklevel=1,
            )
            return numba.njit(nogil=True, **options)(function)

    return decorated


# What follows is also part of loops in `foveate.inference.kernels`, which numba keeps on disk by the date of that file
# alone: whoever changes one of these three has to touch it, or the old ones go on there.
@numba.njit(nogil=True, inline="always")
@no_type_check
def _level(rows, columns, stride, corner_x, corner_y, number):
    """Where a level begins at a corner (scene pixels, multiples of the stride), and its settings for `bilinear`."""
    index = np.uint32
    column, row = corner_x // stride, corner_y // stride
    return row * columns + column, (
        number(1.0 / stride),
        index(max(columns - 2, 0) - column),
        index(max(rows - 2, 0) - row),
        index(columns),
        index(1 if columns > 1 else 0),
        index(columns if rows > 1 else 0),
    )


@numba.njit(nogil=True, inline="always")
@no_type_check
def two_levels(texels, offset, rows, columns, stride, size, scene, square, tx, ty, reach, number):
    """What `bilinear` needs of the two levels that a lattice reads.

    The lattice is about ``(tx, ty)`` and reaches `reach` from there in x and in y; `square` is that of its step, all in
    scene pixels. Positions are of type `number` and counted from a corner left of and above the lattice, so that single
    precision loses nothing on a large picture.

    Returns its middle and the picture's last pixel, both from the corner, the coarser level's share, and the texels and
    settings of either level.

    Convention: as `foveate.model.patch`, and so are the pyramid's arrays.
    """
    level = min(math.log2(max(square, 1.0)), offset.shape[1] - 1 - 1e-9)
    k = int(level)
    coarsest = stride[scene, k + 1]
    width, height = float(size[scene, 1] - 1), float(size[scene, 0] - 1)
    corner_x = coarsest * int(min(max(tx - reach, 0.0), max(width - coarsest, 0.0)) / coarsest)
    corner_y = coarsest * int(min(max(ty - reach, 0.0), max(height - coarsest, 0.0)) / coarsest)
    middle = (number(tx - corner_x), number(ty - corner_y))
    last = (number(width - corner_x), number(height - corner_y))
    first_0, finer = _level(rows[scene, k], columns[scene, k], stride[scene, k], corner_x, corner_y, number)
    first_1, coarser = _level(rows[scene, k + 1], columns[scene, k + 1], coarsest, corner_x, corner_y, number)
    texels_0, texels_1 = texels[offset[scene, k] + first_0 :], texels[offset[scene, k + 1] + first_1 :]
    return middle, last, number(level - k), texels_0, finer, texels_1, coarser


@numba.njit(nogil=True, inline="always")
@no_type_check
def bilinear(texels, x, y, per, last_column, last_row, wide, right, down):
    """Intensity and slopes of one level at a point inside the picture."""
    number = type(per)
    u, v = x * per, y * per
    column, row = np.uint32(u), np.uint32(v)
    column = column if column < last_column else last_column
    row = row if row < last_row else last_row
    u, v = u - number(column), v - number(row)
    here = row * wide + column
    left = number(texels[here])
    top = number(texels[here + right]) - left
    below = here + down
    left_below = number(texels[below])
    bottom = number(texels[below + right]) - left_below
    upper = left + u * top
    fall = left_below + u * bottom - upper
    return upper + v * fall, (top + v * (bottom - top)) * per, fall * per


@compiled()
@no_type_check
def _finite(square, tx, ty):
    """Apart, for where comparisons are fast they may take what is not a number for one."""
    return square < math.inf and abs(tx) < math.inf and abs(ty) < math.inf


@compiled(fastmath={"contract", "arcp", "nsz", "reassoc", "nnan"})
@no_type_check
def extract_patches(
    begin, end, texels, offset, rows, columns, stride, size, gaze, scene, points_y, points_x, step, out
):
    """Fill rows ``begin … end`` of ``out (n, points_y · points_x)`` with patches: ``gaze (n, 4)``, ``scene (n,)``.

    Convention: as `foveate.model.patch`; `step` is the lattice step in canonical pixels.
    """
    number = out.dtype.type
    zero, half_x, half_y = number(0), (points_x - 1) / 2, (points_y - 1) / 2
    places = np.empty(points_x, out.dtype)
    for c in range(points_x):
        places[c] = c - half_x
    for n in range(begin, end):
        a, b, tx, ty = gaze[n, 0] * step, gaze[n, 1] * step, gaze[n, 2], gaze[n, 3]
        square = a * a + b * b
        reach = (abs(a) + abs(b)) * max(half_x, half_y)
        if not _finite(square, tx, ty):
            out[n] = math.nan
            continue
        middle, last, fraction, texels_0, finer, texels_1, coarser = two_levels(
            texels, offset, rows, columns, stride, size, scene[n], square, tx, ty, reach, number
        )
        (middle_x, middle_y), (last_x, last_y) = middle, last
        along, across = number(a), number(b)
        for r in range(points_y):
            py = number(r - half_y)
            x_0, y_0 = middle_x - across * py, middle_y + along * py
            row = out[n, r * points_x : (r + 1) * points_x]
            for c in range(points_x):
                x, y = x_0 + along * places[c], y_0 + across * places[c]
                x = x if x > zero else zero
                x = x if x < last_x else last_x
                y = y if y > zero else zero
                y = y if y < last_y else last_y
                value, _, _ = bilinear(texels_0, x, y, finer[0], finer[1], finer[2], finer[3], finer[4], finer[5])
                value_1, _, _ = bilinear(
                    texels_1, x, y, coarser[0], coarser[1], coarser[2], coarser[3], coarser[4], coarser[5]
                )
                row[c] = value + fraction * (value_1 - value)


@compiled(fastmath={"contract", "nsz", "reassoc"})
@no_type_check
def blur(begin, end, picture, taps, step, first, out):
    """Rows ``begin … end`` of every `step`-th sample of a picture after a blur both ways, edges replicated.

    `first` says which sample of the picture, down and across, the first tap of the first one reads.
    """
    height, width = picture.shape
    columns = out.shape[1]
    down = np.empty(width, picture.dtype)
    padded = np.empty((columns - 1) * step + len(taps), picture.dtype)
    for r in range(begin, end):
        down[:] = 0
        for k in range(len(taps)):
            weight, line = taps[k], picture[min(max(first + r * step + k, 0), height - 1)]
            for c in range(width):
                down[c] += weight * line[c]
        for c in range(len(padded)):
            padded[c] = down[min(max(first + c, 0), width - 1)]
        across = out[r]
        across[:] = 0
        for k in range(len(taps)):
            weight, line = taps[k], padded[k:]
            # Samples side by side are summed several at once.
            if step == 1:
                for c in range(columns):
                    across[c] += weight * line[c]
            else:
                for c in range(columns):
                    across[c] += weight * line[c * step]
