"""Compiled loops (numba) over packed pyramids: fast twins of plain PyTorch code for the CPU."""

import math
import warnings
from collections.abc import Callable
from typing import Any, no_type_check

import numba

__all__ = ["compiled", "extract_patches"]


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


@compiled(fastmath={"contract", "arcp", "nsz"})
@no_type_check
def extract_patches(
    begin, end, texels, offset, rows, columns, stride, size, gaze, scene, points_y, points_x, step, out
):
    """Fill rows ``begin … end`` of ``out (n, points_y · points_x)`` with patches: ``gaze (n, 4)``, ``scene (n,)``.

    Convention: as `foveate.model.patch`; `step` is the lattice step in canonical pixels.
    """
    top_level = offset.shape[1] - 1
    for n in range(begin, end):
        i = scene[n]
        a, b, tx, ty = gaze[n, 0], gaze[n, 1], gaze[n, 2], gaze[n, 3]
        square = (a * a + b * b) * step * step
        if not (square < math.inf and abs(tx) < math.inf and abs(ty) < math.inf):
            out[n] = math.nan
            continue
        level = min(math.log2(max(square, 1.0)), top_level - 1e-9)
        lower = int(level)
        fraction = level - lower
        limit_x, limit_y = float(size[i, 1] - 1), float(size[i, 0] - 1)
        half_x, half_y = (points_x - 1) / 2, (points_y - 1) / 2
        for which in range(2):
            weight = 1.0 - fraction if which == 0 else fraction
            k = lower + which
            first, width, height = offset[i, k], columns[i, k], rows[i, k]
            inverse = 1.0 / stride[i, k]
            right = 1 if width > 1 else 0
            down = width if height > 1 else 0
            last_x, last_y = max(width - 2, 0), max(height - 2, 0)
            for r in range(points_y):
                py = (r - half_y) * step
                for c in range(points_x):
                    px = (c - half_x) * step
                    x = min(max(a * px - b * py + tx, 0.0), limit_x) * inverse
                    y = min(max(b * px + a * py + ty, 0.0), limit_y) * inverse
                    column, row = min(int(x), last_x), min(int(y), last_y)
                    fx, fy = x - column, y - row
                    here = first + row * width + column
                    top = texels[here] + fx * (texels[here + right] - texels[here])
                    bottom = texels[here + down] + fx * (texels[here + down + right] - texels[here + down])
                    value = weight * (top + fy * (bottom - top))
                    if which == 0:
                        out[n, r * points_x + c] = value
                    else:
                        out[n, r * points_x + c] += value
