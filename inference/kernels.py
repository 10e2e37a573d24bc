"""Compiled loops (numba) behind `foveate.inference.potential`, for the CPU; imported only when used.

All of them release the interpreter's lock, so that threads can share a batch, and treat each gaze by itself, so that
its numbers do not depend on the batch it comes in. Letters as in the paper: a gaze (a, b, tx, ty), scale s, rotation θ.
"""

import math
from typing import no_type_check

import numba
import numpy as np

from foveate.model.identity import FLAT, ROOT
from foveate.model.kernels import bilinear, compiled, two_levels

__all__ = [
    "contract_slopes",
    "edge_features",
    "edge_slopes",
    "local_contrast",
    "patch_slopes",
    "quadratic_energy",
    "quadratic_trajectory",
]

# Sums may be reordered so that they vectorise; infinities keep their meaning, and what is not a number never enters.
_FAST = {"contract", "arcp", "nsz", "reassoc", "nnan"}
_LOG_2 = math.log(2.0)
_TWO_PI = 2.0 * math.pi
# Beyond this scale (scene pixels per canonical pixel) or distance (scene pixels) no picture reaches; single precision
# would overflow.
_FARTHEST = 1e6
# Points of a patch.
_POINTS = 576


@compiled(fastmath=_FAST)
@no_type_check
def _frame(texels, offset, rows, columns, stride, size, scene, a, b, tx, ty, px, py):
    """What the points of one patch have in common, in the texels' dtype: the gaze and the two levels that it reads."""
    number = px.dtype.type
    reach = (abs(a) + abs(b)) * max(abs(px[0]), abs(py[0]))
    middle, last, fraction, texels_0, finer, texels_1, coarser = two_levels(
        texels, offset, rows, columns, stride, size, scene, a * a + b * b, tx, ty, reach, number
    )
    return (number(a), number(b), *middle, *last), fraction, texels_0, finer, texels_1, coarser


@numba.njit(nogil=True, inline="always")
@no_type_check
def _point(frame, fraction, texels_0, finer, texels_1, coarser, px, py):
    """Intensity of one point, and its slopes along scene x, scene y and level."""
    a, b, x_0, y_0, last_x, last_y = frame
    zero = a - a
    at_x, at_y = x_0 + a * px - b * py, y_0 + b * px + a * py
    x = at_x if at_x > zero else zero
    x = x if x < last_x else last_x
    y = at_y if at_y > zero else zero
    y = y if y < last_y else last_y
    value, along_x, along_y = bilinear(texels_0, x, y, finer[0], finer[1], finer[2], finer[3], finer[4], finer[5])
    value_1, along_x_1, along_y_1 = bilinear(
        texels_1, x, y, coarser[0], coarser[1], coarser[2], coarser[3], coarser[4], coarser[5]
    )
    rise = value_1 - value
    along_x += fraction * (along_x_1 - along_x)
    along_y += fraction * (along_y_1 - along_y)
    # Edges are replicated: beyond them the intensity does not change.
    return value + fraction * rise, along_x if x == at_x else zero, along_y if y == at_y else zero, rise


@compiled(fastmath=_FAST)
@no_type_check
def _residual(texels, offset, rows, columns, stride, size, scene, a, b, tx, ty, px, py, target, precision):
    """½ Σ precision (x(u) − target)² and its slopes along tx, ty, a, b and level, in one sweep over the points."""
    frame, fraction, texels_0, finer, texels_1, coarser = _frame(
        texels, offset, rows, columns, stride, size, scene, a, b, tx, ty, px, py
    )
    zero = px.dtype.type(0)
    energy, of_tx, of_ty, of_a, of_b, of_level = zero, zero, zero, zero, zero, zero
    for n in range(px.shape[0]):
        value, along_x, along_y, rise = _point(frame, fraction, texels_0, finer, texels_1, coarser, px[n], py[n])
        away = value - target[n]
        weight = precision[n] * away
        energy += weight * away
        x, y = weight * along_x, weight * along_y
        of_tx += x
        of_ty += y
        of_a += x * px[n] + y * py[n]
        of_b += y * px[n] - x * py[n]
        of_level += weight * rise
    return 0.5 * float(energy), (float(of_tx), float(of_ty), float(of_a), float(of_b), float(of_level))


@compiled(fastmath=_FAST)
@no_type_check
def _slopes(texels, offset, rows, columns, stride, size, scene, a, b, tx, ty, px, py, out):
    """Intensities of a patch, slopes along scene x, scene y and level: ``out (4 · 576)``, one after the other."""
    frame, fraction, texels_0, finer, texels_1, coarser = _frame(
        texels, offset, rows, columns, stride, size, scene, a, b, tx, ty, px, py
    )
    for n in range(_POINTS):
        value, along_x, along_y, rise = _point(frame, fraction, texels_0, finer, texels_1, coarser, px[n], py[n])
        out[n] = value
        out[_POINTS + n] = along_x
        out[2 * _POINTS + n] = along_y
        out[3 * _POINTS + n] = rise


@compiled(fastmath=_FAST)
@no_type_check
def _contract(weight, px, py, slopes):
    """Sums of weight × slope: along tx, ty, a, b and level."""
    zero = px.dtype.type(0)
    of_tx, of_ty, of_a, of_b, of_level = zero, zero, zero, zero, zero
    for n in range(_POINTS):
        x, y = weight[n] * slopes[_POINTS + n], weight[n] * slopes[2 * _POINTS + n]
        of_tx += x
        of_ty += y
        of_a += x * px[n] + y * py[n]
        of_b += y * px[n] - x * py[n]
        of_level += weight[n] * slopes[3 * _POINTS + n]
    return float(of_tx), float(of_ty), float(of_a), float(of_b), float(of_level)


@compiled()
@no_type_check
def _gaze(base, scales, z):
    """Chart coordinates to a gaze, ``base ∘ δ(z)``; false where no picture reaches."""
    s = math.exp(scales[2] * z[2])
    c, d = s * math.cos(scales[3] * z[3]), s * math.sin(scales[3] * z[3])
    x, y = scales[0] * z[0], scales[1] * z[1]
    a, b = base[0] * c - base[1] * d, base[1] * c + base[0] * d
    tx, ty = base[0] * x - base[1] * y + base[2], base[1] * x + base[0] * y + base[3]
    near = abs(a) < _FARTHEST and abs(b) < _FARTHEST and abs(tx) < _FARTHEST and abs(ty) < _FARTHEST
    return near and a * a + b * b > 0.0, a, b, tx, ty


@compiled()
@no_type_check
def _log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0.0 else x - math.log1p(math.exp(x))


@compiled()
@no_type_check
def _sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x > 0.0 else math.exp(x) / (1.0 + math.exp(x))


@compiled()
@no_type_check
def _edge(centre, extent, width):
    """Log density and slope of a centre that is uniform over the picture with logistic edges."""
    low, high = (centre + 0.5) / width, (centre + 0.5 - extent) / width
    value = _log_sigmoid(low) + _log_sigmoid(-high) + math.log(-math.expm1(-extent / width)) - math.log(extent)
    return value, (_sigmoid(-low) - _sigmoid(high)) / width


@compiled()
@no_type_check
def _prior(size, prior, a, b, tx, ty):
    """Log density of a gaze and its slopes along tx, ty, log s and θ.

    ``prior`` holds the four settings of a `GazePrior`, the one of a `FlatGazePrior`, or nothing.
    """
    if prior.shape[0] == 0:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    if prior.shape[0] == 1:
        half = prior[0] * min(size[0], size[1]) / 24.0
        within = abs(a) <= half and abs(b) <= half
        within = within and -0.5 <= tx <= size[1] - 0.5 and -0.5 <= ty <= size[0] - 0.5
        return -2.0 * math.log(2.0 * half) - math.log(size[0] * size[1]) if within else -math.inf, 0.0, 0.0, 0.0, 0.0
    typical, log_scale_sd, rotation_sd, edge = prior[0], prior[1], prior[2], prior[3]
    shorter = float(min(size[0], size[1]))
    value_x, of_tx = _edge(tx, float(size[1]), edge * shorter)
    value_y, of_ty = _edge(ty, float(size[0]), edge * shorter)
    log_s = 0.5 * math.log(a * a + b * b)
    away = (log_s - math.log(typical * shorter / 24.0)) / log_scale_sd
    value = value_x + value_y - 0.5 * away * away - math.log(log_scale_sd) - math.log(rotation_sd) - math.log(_TWO_PI)
    of_log_s = -away / log_scale_sd - 2.0
    rotation = math.atan2(b, a)
    total, mean = 0.0, 0.0
    # The nearest turn is the largest term.
    top = -0.5 * (rotation / rotation_sd) ** 2
    for turn in range(-2, 3):
        angle = rotation + turn * _TWO_PI
        weight = math.exp(-0.5 * (angle / rotation_sd) ** 2 - top)
        total += weight
        mean += weight * angle
    return value + top + math.log(total) - 2.0 * log_s, of_tx, of_ty, of_log_s, -mean / total / rotation_sd**2


@compiled()
@no_type_check
def _finish(n, energy, sums, size, place, a, b, tx, ty, levels, z, gradient):
    """Add prior, belief and chart to the energy of the patch of gaze n, and carry its slopes over to the chart."""
    scenes, bases, scales, prior, beliefs = place
    base, belief = bases[n], beliefs[n % beliefs.shape[0]]
    of_tx, of_ty, of_a, of_b, of_level = sums
    square = a * a + b * b
    moving = 2.0 / _LOG_2 if 1.0 <= square < 2.0 ** (levels - 1 - 1e-9) else 0.0
    log_prior, prior_tx, prior_ty, prior_log_s, prior_rotation = _prior(size[scenes[n]], prior, a, b, tx, ty)
    of_tx -= prior_tx
    of_ty -= prior_ty
    of_log_s = a * of_a + b * of_b + moving * of_level - prior_log_s
    of_rotation = a * of_b - b * of_a - prior_rotation
    gradient[0] = scales[0] * (base[0] * of_tx + base[1] * of_ty)
    gradient[1] = scales[1] * (base[0] * of_ty - base[1] * of_tx)
    gradient[2] = scales[2] * (of_log_s - 2.0)
    gradient[3] = scales[3] * of_rotation
    log_det = 2.0 * math.log(base[0] ** 2 + base[1] ** 2) + 2.0 * scales[2] * z[2]
    log_det += math.log(scales[0]) + math.log(scales[1]) + math.log(scales[2]) + math.log(scales[3])
    for i in range(4):
        energy += 0.5 * belief[i] * z[i] * z[i]
        gradient[i] += belief[i] * z[i]
    return energy - log_prior - log_det


@compiled()
@no_type_check
def _quadratic(n, pyramid, place, points, targets, precisions, z, gradient):
    near, a, b, tx, ty = _gaze(place[1][n], place[2], z)
    if not near:
        gradient[:] = math.nan
        return math.inf
    texels, offset, rows, columns, stride, size = pyramid
    target, precision = targets[n % targets.shape[0]], precisions[n % precisions.shape[0]]
    px, py = points
    energy, sums = _residual(
        texels, offset, rows, columns, stride, size, place[0][n], a, b, tx, ty, px, py, target, precision
    )
    return _finish(n, energy, sums, size, place, a, b, tx, ty, offset.shape[1], z, gradient)


@compiled()
@no_type_check
def quadratic_energy(begin, end, pyramid, place, points, target, precision, z, energy, gradient):
    """Energies and gradients of gazes ``begin … end`` under ½ Σ precision (x(u) − target)², prior, belief and chart.

    ``pyramid`` holds a pyramid's arrays, ``place`` (scene, base, scales, prior, belief), ``points`` the lattice (px,
    py).
    """
    slope = np.empty(4)
    for n in range(begin, end):
        energy[n] = _quadratic(n, pyramid, place, points, target, precision, z[n], slope)
        gradient[n] = slope


@compiled()
@no_type_check
def quadratic_trajectory(
    begin, end, pyramid, place, points, target, precision, z, momentum, gradient, size_of_step, steps, energy
):
    """Leapfrog trajectories of gazes ``begin … end``, each of its own length; overwrites positions and momenta."""
    number = z.dtype.type
    at, slope, speed = np.empty(4, z.dtype), np.empty(4), np.empty(4)
    for n in range(begin, end):
        at[:] = z[n]
        for i in range(4):
            speed[i] = momentum[n, i] - 0.5 * size_of_step[n, i] * gradient[n, i]
        value = math.inf
        for _ in range(steps[n]):
            for i in range(4):
                at[i] = number(at[i] + size_of_step[n, i] * speed[i])
            value = _quadratic(n, pyramid, place, points, target, precision, at, slope)
            if not value < math.inf:
                break
            for i in range(4):
                speed[i] -= size_of_step[n, i] * slope[i]
        for i in range(4):
            z[n, i] = at[i]
            momentum[n, i] = number(speed[i] + 0.5 * size_of_step[n, i] * slope[i])
            gradient[n, i] = number(slope[i])
        energy[n] = number(value)


@compiled()
@no_type_check
def patch_slopes(begin, end, pyramid, place, points, z, near, slopes):
    """Patches and slopes of gazes ``begin … end``, ``slopes (n, 4 · 576)``; ``near``: those within reach."""
    texels, offset, rows, columns, stride, size = pyramid
    px, py = points
    for n in range(begin, end):
        near[n], a, b, tx, ty = _gaze(place[1][n], place[2], z[n])
        if near[n]:
            _slopes(texels, offset, rows, columns, stride, size, place[0][n], a, b, tx, ty, px, py, slopes[n])
        else:
            slopes[n] = 0.0


@compiled()
@no_type_check
def contract_slopes(begin, end, pyramid, place, points, z, near, weight, slopes, energy, gradient):
    """From patches' energies and derivatives ``weight (n, 576)`` to the chart's; overwrites ``energy``."""
    _, offset, _, _, _, size = pyramid
    px, py = points
    slope = np.empty(4)
    for n in range(begin, end):
        if near[n]:
            _, a, b, tx, ty = _gaze(place[1][n], place[2], z[n])
            sums = _contract(weight[n], px, py, slopes[n])
            energy[n] = _finish(n, energy[n], sums, size, place, a, b, tx, ty, offset.shape[1], z[n], slope)
            gradient[n] = slope
        else:
            energy[n] = math.inf
            gradient[n] = math.nan


# Sides of a patch, of its blocks of two by two pixels and of the cells of two by two blocks that edges are pooled in.
_SIDE, _BLOCKS, _CELLS, _DIRECTIONS = 24, 12, 11, 8


@compiled(fastmath=_FAST, inline="always")
@no_type_check
def _cells_of(n, x, y, blocks, cells, power):
    """Gradients of a normalised patch, their pooled sizes by direction, and the power of every cell; overwrites."""
    number = n.dtype.type
    half, quarter_turn = number(0.5), number(math.sqrt(0.5))
    blocks[:] = 0
    for r in range(_SIDE):
        for c in range(_SIDE):
            gx = half * (n[r, min(c + 1, _SIDE - 1)] - n[r, max(c - 1, 0)])
            gy = half * (n[min(r + 1, _SIDE - 1), c] - n[max(r - 1, 0), c])
            x[r, c], y[r, c] = gx, gy
            up, down = quarter_turn * (gx + gy), quarter_turn * (gy - gx)
            block = blocks[r // 2, c // 2]
            # Opposite directions share an axis: one of the two is on.
            block[0 if gx > 0 else 4] += abs(gx)
            block[1 if up > 0 else 5] += abs(up)
            block[2 if gy > 0 else 6] += abs(gy)
            block[3 if down > 0 else 7] += abs(down)
    for r in range(_CELLS):
        for c in range(_CELLS):
            square = number(0)
            for k in range(_DIRECTIONS):
                pooled = blocks[r, c, k] + blocks[r, c + 1, k] + blocks[r + 1, c, k] + blocks[r + 1, c + 1, k]
                cells[r, c, k] = pooled / number(16)
                square += cells[r, c, k] * cells[r, c, k]
            power[r, c] = square


@compiled(fastmath=_FAST, inline="always")
@no_type_check
def _relative_to(power, r, c):
    """One over the root of the mean power of a cell's neighbourhood."""
    number = power.dtype.type
    near = number(0)
    for dr in range(-1, 2):
        for dc in range(-1, 2):
            near += power[min(max(r + dr, 0), _CELLS - 1), min(max(c + dc, 0), _CELLS - 1)]
    return number(1) / math.sqrt(near / number(9) + number(FLAT))


@compiled(fastmath=_FAST)
@no_type_check
def edge_features(begin, end, patches, features):
    """`foveate.model.identity.edges` of normalised patches ``(n, 576)`` as ``(n, 11, 11, 8)``: cells first."""
    number = patches.dtype.type
    x, y = np.empty((_SIDE, _SIDE), patches.dtype), np.empty((_SIDE, _SIDE), patches.dtype)
    blocks = np.empty((_BLOCKS, _BLOCKS, _DIRECTIONS), patches.dtype)
    cells = np.empty((_CELLS, _CELLS, _DIRECTIONS), patches.dtype)
    power = np.empty((_CELLS, _CELLS), patches.dtype)
    for i in range(begin, end):
        _cells_of(patches[i].reshape(_SIDE, _SIDE), x, y, blocks, cells, power)
        out = features[i]
        for r in range(_CELLS):
            for c in range(_CELLS):
                inverse = _relative_to(power, r, c)
                for k in range(_DIRECTIONS):
                    out[r, c, k] = math.sqrt(cells[r, c, k] * inverse + number(ROOT))


@compiled(fastmath=_FAST)
@no_type_check
def edge_slopes(begin, end, patches, weight, slope):
    """``Σ w ∂f/∂n``: from derivatives ``(n, 11, 11, 8)`` by `edge_features` to those by the pixels, ``(n, 576)``."""
    number = patches.dtype.type
    half, quarter_turn = number(0.5), number(math.sqrt(0.5))
    x, y = np.empty((_SIDE, _SIDE), patches.dtype), np.empty((_SIDE, _SIDE), patches.dtype)
    blocks = np.empty((_BLOCKS, _BLOCKS, _DIRECTIONS), patches.dtype)
    cells = np.empty((_CELLS, _CELLS, _DIRECTIONS), patches.dtype)
    power, of_power = np.empty((_CELLS, _CELLS), patches.dtype), np.empty((_CELLS, _CELLS), patches.dtype)
    for i in range(begin, end):
        direction, out = weight[i], slope[i].reshape(_SIDE, _SIDE)
        _cells_of(patches[i].reshape(_SIDE, _SIDE), x, y, blocks, cells, power)
        of_power[:] = 0
        blocks[:] = 0
        # Back the way that features come: first what goes through the neighbourhood's power,
        for r in range(_CELLS):
            for c in range(_CELLS):
                inverse = _relative_to(power, r, c)
                through = number(0)
                for k in range(_DIRECTIONS):
                    root = math.sqrt(cells[r, c, k] * inverse + number(ROOT))
                    of_relative = half * direction[r, c, k] / root
                    through += of_relative * cells[r, c, k]
                    # then what goes straight to the cell's blocks,
                    straight = of_relative * inverse / number(16)
                    blocks[r, c, k] += straight
                    blocks[r, c + 1, k] += straight
                    blocks[r + 1, c, k] += straight
                    blocks[r + 1, c + 1, k] += straight
                through *= -half * inverse * inverse * inverse / number(9)
                for dr in range(-1, 2):
                    for dc in range(-1, 2):
                        of_power[min(max(r + dr, 0), _CELLS - 1), min(max(c + dc, 0), _CELLS - 1)] += through
        for r in range(_CELLS):
            for c in range(_CELLS):
                for k in range(_DIRECTIONS):
                    by_power = of_power[r, c] * cells[r, c, k] / number(8)
                    blocks[r, c, k] += by_power
                    blocks[r, c + 1, k] += by_power
                    blocks[r + 1, c, k] += by_power
                    blocks[r + 1, c + 1, k] += by_power
        out[:] = 0
        # and last what the gradients of the pixels take from their block.
        for r in range(_SIDE):
            for c in range(_SIDE):
                gx, gy, block = x[r, c], y[r, c], blocks[r // 2, c // 2]
                along_x = block[0] if gx > 0 else -block[4]
                along_y = block[2] if gy > 0 else -block[6]
                up = block[1] if gx + gy > 0 else -block[5]
                down = block[3] if gy - gx > 0 else -block[7]
                of_x = half * (along_x + quarter_turn * (up - down))
                of_y = half * (along_y + quarter_turn * (up + down))
                out[r, min(c + 1, _SIDE - 1)] += of_x
                out[r, max(c - 1, 0)] -= of_x
                out[min(r + 1, _SIDE - 1), c] += of_y
                out[max(r - 1, 0), c] -= of_y


@compiled(fastmath=_FAST)
@no_type_check
def local_contrast(begin, end, views, cell, reaches, floor, out):
    """`foveate.inference.glance.local_contrast` of views ``(n, rows, columns)``, channels last: ``out (…, 2)``.

    `cell` is the side of the blocks that are averaged first, `reaches` how many of them on either side are averaged
    next, and `floor` the variance that is added.
    """
    number = views.dtype.type
    height, width = views.shape[1:]
    rows, columns = -(-height // cell), -(-width // cell)
    # Means of intensities and of their squares: of blocks, along rows of blocks, and of squares of blocks.
    blocks, along = np.empty((2, rows, columns), views.dtype), np.empty((2, rows, columns), views.dtype)
    # Mean and sd over squares of either reach, for every column of the view.
    wide = np.empty((rows, 4, width), views.dtype)
    for n in range(begin, end):
        view = views[n]
        for r in range(rows):
            for c in range(columns):
                total, square = number(0), number(0)
                bottom, right = min(cell * (r + 1), height), min(cell * (c + 1), width)
                for i in range(cell * r, bottom):
                    for j in range(cell * c, right):
                        total += view[i, j]
                        square += view[i, j] * view[i, j]
                inside = number((bottom - cell * r) * (right - cell * c))
                blocks[0, r, c], blocks[1, r, c] = total / inside, square / inside
        for which in range(2):
            reach = reaches[which]
            for r in range(rows):
                for c in range(columns):
                    left, right = max(c - reach, 0), min(c + reach + 1, columns)
                    total, square = number(0), number(0)
                    for j in range(left, right):
                        total += blocks[0, r, j]
                        square += blocks[1, r, j]
                    inside = number(right - left)
                    along[0, r, c], along[1, r, c] = total / inside, square / inside
            for r in range(rows):
                top, bottom = max(r - reach, 0), min(r + reach + 1, rows)
                inside = number(bottom - top)
                mean, sd = np.zeros(columns, views.dtype), np.zeros(columns, views.dtype)
                for i in range(top, bottom):
                    for c in range(columns):
                        mean[c] += along[0, i, c] / inside
                        sd[c] += along[1, i, c] / inside
                for c in range(columns):
                    variance = sd[c] - mean[c] * mean[c]
                    sd[c] = math.sqrt((variance if variance > number(0) else number(0)) + number(floor))
                for j in range(width):
                    at = max((j + 0.5) * columns / width - 0.5, 0.0)
                    c = int(at)
                    share, following = number(at - c), min(c + 1, columns - 1)
                    wide[r, 2 * which, j] = mean[c] + share * (mean[following] - mean[c])
                    wide[r, 2 * which + 1, j] = sd[c] + share * (sd[following] - sd[c])
        for i in range(height):
            at = max((i + 0.5) * rows / height - 0.5, 0.0)
            r = int(at)
            share = number(at - r)
            upper, lower = wide[r], wide[min(r + 1, rows - 1)]
            for j in range(width):
                mean = upper[0, j] + share * (lower[0, j] - upper[0, j])
                sd = upper[1, j] + share * (lower[1, j] - upper[1, j])
                near_mean = upper[2, j] + share * (lower[2, j] - upper[2, j])
                near_sd = upper[3, j] + share * (lower[3, j] - upper[3, j])
                out[n, i, j, 0] = (view[i, j] - mean) / sd
                out[n, i, j, 1] = (view[i, j] - near_mean) / near_sd
