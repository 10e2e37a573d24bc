"""Figures of gazes, posteriors, canonical images and priors.

Every function takes its data first and returns a `Figure`.

Convention (the whole module): gazes and scene pixels as in `foveate.model.gaze`, drawn over pictures whose pixel
centres lie at integers. A gaze's path runs from yellow (where attending began) to blue (where it ended), colours that
every common form of colour blindness tells apart; the posterior's draws are thin blue squares, the true gaze is dashed
and white.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from foveate.inference.calibration import Reliability
from foveate.model import gaze as gazes

__all__ = [
    "Convergence",
    "EnergyPath",
    "Sheet",
    "convergence_figure",
    "energy_paths_figure",
    "gaze_colours",
    "iou_by_step_figure",
    "legend_figure",
    "patches_figure",
    "reliability_figure",
    "scene_figure",
    "scenes_figure",
    "sheets_figure",
    "steps_figure",
]

# Yellow to blue through the hues between them at falling lightness; blue stays bright enough for dark photographs.
PATH_COLOURS = LinearSegmentedColormap.from_list("gaze", ["#ffe51f", "#c3d24a", "#62b58f", "#2f8fd0", "#1d4fff"])
BLUE, DRAW_BLUE = PATH_COLOURS(1.0), "#7fa8ff"
DRAWS_SHOWN = 16
# Small errors dark, large ones light.
ERROR_COLOURS = colormaps["viridis"]
# Inches of a page that a report shows at full width.
PAGE = 11.0


def gaze_colours(steps: int) -> list[tuple[float, float, float, float]]:
    """Colours of the `steps` gazes of a path, yellow first, blue last."""
    return [PATH_COLOURS(k / max(1, steps - 1)) for k in range(steps)]


def scene_figure(
    picture: Float[Tensor, "height width"],
    path: Float[Tensor, "step 4"],
    draws: Float[Tensor, "draw 4"] | None = None,
    *,
    truth: Float[Tensor, "4"] | None = None,
    title: str = "",
    width: float = 5.0,
) -> Figure:
    """One scene with the gaze moving from yellow to blue, the posterior's spread and, if known, the truth.

    Args:
        picture: luminance in [0, 1].
        path: gaze by step; the last is the reported one.
        draws: draws of the posterior; 16 spread evenly over them are shown.
        truth: the true gaze.
        title: above the picture.
        width: inches; a picture more than three times as high as wide is drawn smaller, and so high.

    Convention: as the module.
    """
    height, across = picture.shape
    room = 0.3 if title else 0.0
    high = min(width * height / across, 3 * width)
    share = high * across / height / width
    figure = Figure(figsize=(width, high + room))
    axes = figure.add_axes(((1 - share) / 2, 0.0, share, high / (high + room)))
    _draw_scene(axes, picture, path, draws, truth, line=max(1.2, 0.35 * width))
    if title:
        axes.set_title(title, fontsize=10, parse_math=False)
    return figure


def scenes_figure(
    pictures: Sequence[Float[Tensor, "_ _"]],
    paths: Float[Tensor, "scene step 4"],
    draws: Float[Tensor, "scene draw 4"],
    *,
    truths: Float[Tensor, "scene 4"] | None = None,
    titles: Sequence[str] = (),
    columns: int = 4,
) -> Figure:
    """Scenes beside one another in a grid, each as `scene_figure` draws it.

    Args:
        pictures: ``(height, width)`` luminance in [0, 1], of any sizes.
        paths: gaze by step of each scene.
        draws: draws of each scene's posterior.
        truths: true gazes; a row of NaN where one is not known.
        titles: one for each scene, or none.
        columns: scenes in a row.

    Convention: as the module.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    # Cells as high as the usual picture is; others are centred in theirs.
    aspect = float(np.median([p.shape[0] / p.shape[1] for p in pictures]))
    cell = PAGE / max(columns, 3)
    figure = Figure(figsize=(columns * cell, rows * (cell * aspect + 0.25)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, picture in enumerate(pictures):
        truth = None if truths is None or bool(truths[i].isnan().any()) else truths[i]
        _draw_scene(axes[i], picture, paths[i], draws[i], truth, line=1.2)
        if titles:
            axes[i].set_title(titles[i], fontsize=8, pad=2, parse_math=False)
    for unused in axes[len(pictures) :]:
        unused.set_axis_off()
    return figure


def legend_figure(steps: int, *, truth: bool = True) -> Figure:
    """What the lines over a scene mean, as one strip; `steps` gazes to a path."""
    figure = Figure(figsize=(PAGE, 0.45))
    colours = gaze_colours(steps)
    entries: list[Line2D] = [
        Line2D([], [], color=colours[0], lw=3, label="where it began"),
        *(Line2D([], [], color=c, lw=3, label=f"look {k}") for k, c in enumerate(colours[1:-1], 1)),
        Line2D([], [], color=colours[-1], lw=3, label="posterior mean"),
        Line2D([], [], color=DRAW_BLUE, lw=1, label="posterior draws"),
    ]
    if truth:
        entries.append(Line2D([], [], color="white", lw=2, ls=(0, (2, 1.5)), label="true gaze"))
    legend = figure.legend(handles=entries, loc="center", ncols=len(entries), frameon=True, fontsize=9)
    legend.get_frame().set(facecolor="#8a8a8a", edgecolor="none")
    return figure


def patches_figure(
    patches: Float[Tensor, "scene 24 24"],
    canonical: Float[Tensor, "scene 24 24"],
    *,
    titles: Sequence[str] = (),
    columns: int = 10,
) -> Figure:
    """Each scene's patch x(u) with the canonical image v that explains it below; grey levels in [0, 1].

    Args:
        patches: what the reported gaze sees.
        canonical: posterior mean of v.
        titles: one for each scene, or none.
        columns: pairs in a row.
    """
    columns = min(columns, len(patches))
    rows = math.ceil(len(patches) / columns)
    gap = torch.ones(len(patches), 1, patches.shape[-1])
    pairs = torch.cat([patches, gap, canonical], 1)
    cell = PAGE / max(columns, 6)
    figure = Figure(figsize=(columns * cell, rows * (2 * cell + 0.2)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axis in enumerate(axes):
        axis.set_axis_off()
        if i < len(pairs):
            _show(axis, pairs[i])
            axis.set_title(titles[i] if titles else "", fontsize=8, pad=2, parse_math=False)
        if i < len(pairs) and i % columns == 0:
            for height, name in ((0.75, "patch x(u)"), (0.25, "canonical v")):
                axis.text(
                    -0.06, height, name, rotation=90, ha="right", va="center", fontsize=8, transform=axis.transAxes
                )
    return figure


def iou_by_step_figure(overlap: Float[Tensor, "scene step"], *, labels: Sequence[str] = ()) -> Figure:
    """How the overlap with the true gaze grows from step to step: every scene, the quartiles and the mean.

    Args:
        overlap: IoU of each scene's gaze with the truth at each step, in [0, 1].
        labels: names of the steps; numbers by default.
    """
    values = overlap.double().numpy()
    steps = np.arange(values.shape[1])
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values.T, color="0.6", lw=0.6, alpha=0.5, zorder=1)
    low, high = np.quantile(values, [0.25, 0.75], axis=0)
    axes.fill_between(steps, low, high, color=DRAW_BLUE, alpha=0.45, lw=0, label="middle half of the scenes", zorder=2)
    axes.plot(steps, values.mean(0), color="black", lw=1.5, zorder=3, label="mean")
    axes.scatter(steps, values.mean(0), c=gaze_colours(len(steps)), s=55, edgecolor="black", zorder=4)
    axes.axhline(0.5, color="black", lw=0.8, ls=":")
    axes.annotate("found", (steps[-1], 0.5), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8)
    axes.set(ylim=(0, 1), ylabel="IoU with the true gaze", xlim=(steps[0] - 0.2, steps[-1] + 0.2))
    axes.set_xticks(steps, list(labels) or [str(k) for k in steps])
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


class EnergyPath(NamedTuple):
    """A scene with the energy along the way from the gaze that was found to the true one.

    Attributes:
        title: above the picture.
        picture: ``(height, width)`` luminance in [0, 1].
        found: ``(4,)`` the reported gaze.
        truth: ``(4,)`` the true gaze.
        position: ``(point,)`` along the way: 0 is found, 1 is true.
        energy: ``(point,)`` nats.
    """

    title: str
    picture: Tensor
    found: Tensor
    truth: Tensor
    position: Tensor
    energy: Tensor


def energy_paths_figure(paths: Sequence[EnergyPath], *, columns: int = 5) -> Figure:
    """Scenes with the found gaze (yellow) and the true one (white), and below each the energy on the way between them.

    Energies are relative to the true gaze: a curve that ends above where it begins says that the model prefers the gaze
    it found, one that ends below that the search missed the better one. Convention: as the module.
    """
    columns = min(columns, len(paths))
    rows = math.ceil(len(paths) / columns)
    cell = PAGE / max(columns, 3)
    figure = Figure(figsize=(columns * cell, rows * 1.75 * cell), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.0, 0.6] * rows)
    for k in range(rows * columns):
        above, below = axes[2 * (k // columns)][k % columns], axes[2 * (k // columns) + 1][k % columns]
        if k >= len(paths):
            above.set_axis_off()
            below.set_axis_off()
            continue
        path = paths[k]
        _draw_scene(above, path.picture, path.found[None], None, path.truth, line=1.4)
        above.set_title(path.title, fontsize=7, pad=2, parse_math=False)
        at_truth = path.energy[(path.position - 1).abs().argmin()]
        below.plot(path.position.numpy(), (path.energy - at_truth).double().numpy(), color="black", lw=1)
        for position, colour in ((0.0, gaze_colours(1)[0]), (1.0, "white")):
            height = float(path.energy[(path.position - position).abs().argmin()] - at_truth)
            below.plot(position, height, "o", color=colour, mec="black", ms=5)
        below.tick_params(labelsize=6)
        below.set_xticks([0, 1], ["found", "true"])
        below.spines[["top", "right"]].set_visible(False)
    axes[1][0].set_ylabel("energy, nats", fontsize=7)
    return figure


def steps_figure(
    pictures: Sequence[Float[Tensor, "_ _"]],
    paths: Float[Tensor, "scene step 4"],
    patches: Float[Tensor, "scene step 24 24"],
    canonical: Float[Tensor, "scene step 24 24"],
    *,
    truths: Float[Tensor, "scene 4"] | None = None,
    steps: Sequence[str] = (),
) -> Figure:
    """Scenes with the gaze moving from yellow to blue, and beside each the patch x and the image v at every step.

    Args:
        pictures: ``(height, width)`` luminance in [0, 1], of any sizes.
        paths: gaze by step.
        patches: x(u) at every step, in [0, 1].
        canonical: v at every step, in [0, 1].
        truths: true gazes.
        steps: names of the steps; numbers by default.

    Convention: as the module.
    """
    count, length = paths.shape[:2]
    # A picture is as wide as three of the small images.
    cell = PAGE / (length + 3)
    figure = Figure(figsize=(PAGE, count * (2 * cell + 0.15) + 0.2), layout="constrained")
    grid = figure.add_gridspec(2 * count, length + 1, width_ratios=[3.0, *[1.0] * length])
    colours = gaze_colours(length)
    for i, picture in enumerate(pictures):
        scene = figure.add_subplot(grid[2 * i : 2 * i + 2, 0])
        _draw_scene(scene, picture, paths[i], None, None if truths is None else truths[i], line=1.2)
        for k in range(length):
            for row, (name, image) in enumerate((("x", patches[i, k]), ("v", canonical[i, k]))):
                axes = figure.add_subplot(grid[2 * i + row, k + 1])
                _show(axes, image)
                frame = Rectangle((-0.5, -0.5), image.shape[1], image.shape[0], fill=False, ec=colours[k], lw=3)
                axes.add_patch(frame).set_clip_on(False)
                if k == 0:
                    axes.text(-0.12, 0.5, name, ha="right", va="center", style="italic", transform=axes.transAxes)
                if i == 0 and row == 0:
                    axes.set_title(steps[k] if steps else str(k), fontsize=8)
    return figure


class Convergence(NamedTuple):
    """How a gaze comes in from one initial error.

    Attributes:
        label: of the error.
        looks: ``(seed, step)`` mean IoU after each look of the guide, the first before any.
        sampled: ``(seed,)`` mean IoU of the posterior mean after `sampled_after` looks.
    """

    label: str
    looks: Tensor
    sampled: Tensor


def convergence_figure(panels: Mapping[str, Sequence[Convergence]], *, sampled_after: int = 4) -> Figure:
    """IoU by step for several initial errors, a panel for each kind: lines are the guide's, diamonds add HMC.

    Means over scenes and seeds; bands are one standard deviation over the seeds.

    Args:
        panels: curves by the kind of the error.
        sampled_after: looks after which HMC begins.
    """
    figure = Figure(figsize=(PAGE, 3.4), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(every, panels.items(), strict=True):
        steps = np.arange(curves[0].looks.shape[1])
        # Where the diamonds stand: behind the last look, side by side.
        behind = steps[-1] + 1.5
        for k, curve in enumerate(curves):
            colour = ERROR_COLOURS(k / max(1, len(curves) - 1))
            values = curve.looks.double().numpy()
            axes.plot(steps, values.mean(0), color=colour, lw=1.5, label=curve.label)
            if len(values) > 1:
                sd = values.std(0, ddof=1)
                axes.fill_between(steps, values.mean(0) - sd, values.mean(0) + sd, color=colour, alpha=0.2, lw=0)
            axes.plot(behind + 0.25 * k, float(curve.sampled.double().mean()), "D", color=colour, mec="black", ms=5)
        axes.axvline(sampled_after, color="black", lw=0.8, ls=":")
        axes.axhline(0.5, color="black", lw=0.8, ls=":")
        middle = behind + 0.125 * (len(curves) - 1)
        axes.set_xticks([*steps, middle], [*map(str, steps), f"{sampled_after}+HMC"], fontsize=8)
        axes.set(title=name, xlabel="looks of the guide", ylim=(0, 1))
        axes.legend(fontsize=7, loc="lower right", frameon=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean IoU with the true gaze")
    return figure


def reliability_figure(panels: Mapping[str, Reliability]) -> Figure:
    """Stated probabilities against the share that came true, with binomial standard errors and each bin's count."""
    figure = Figure(figsize=(4.2 * len(panels), 4.0), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, found) in zip(every, panels.items(), strict=True):
        stated, happened, count = (v.double().numpy() for v in found[:3])
        # Of an outcome that always came true the error is still not 0: one pseudo-count each way.
        share = (happened * count + 1) / (count + 2)
        error = np.sqrt(share * (1 - share) / count)
        axes.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":")
        axes.errorbar(stated, happened, error, fmt="o-", color=BLUE, ecolor="0.4", lw=1.2, ms=5)
        for x, y, n in zip(stated, happened, count, strict=True):
            axes.annotate(f"{n:.0f}", (x, y), xytext=(4, -10), textcoords="offset points", fontsize=7, color="0.3")
        axes.set(title=f"{name}\ngap {found.gap:.3f}, Brier score {found.brier:.3f}", xlabel="stated probability")
        axes.set(ylabel="share that came true", xlim=(-0.02, 1.02), ylim=(-0.04, 1.04), aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


class Sheet(NamedTuple):
    """Small images under one title.

    Attributes:
        title: above them.
        images: ``(image, height, width)`` grey levels in [0, 1], or, if `signed`, values about 0.
        signed: every image is drawn on a scale of its own, 0 at mid-grey, positive values bright.
    """

    title: str
    images: Tensor
    signed: bool = False


def sheets_figure(sheets: Sequence[Sheet], *, columns: int = 16) -> Figure:
    """Sheets of small images, `columns` in a row, one sheet below the other: draws of the prior, or filters."""
    boards = [_board(sheet, columns) for sheet in sheets]
    room = 0.4
    # A row is as high in every sheet, whatever the other rows hold.
    heights = [PAGE * board.shape[0] / board.shape[1] for board in boards]
    total = sum(heights) + room * len(sheets)
    figure = Figure(figsize=(PAGE, total))
    top = total
    for sheet, board, height in zip(sheets, boards, heights, strict=True):
        top -= room + height
        axes = figure.add_axes((0.0, top / total, 1.0, height / total))
        _show(axes, board)
        axes.set_title(sheet.title, fontsize=11, loc="left")
    return figure


def _board(sheet: Sheet, columns: int) -> np.ndarray:
    """The images of a sheet beside one another in one picture, white between them."""
    count, height, width = sheet.images.shape
    gap = 2
    rows = math.ceil(count / columns)
    board = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap))
    for i, image in enumerate(sheet.images.detach().cpu().double().numpy()):
        grey = 0.5 + 0.5 * image / _reach(image) if sheet.signed else image
        row, column = divmod(i, columns)
        top, left = row * (height + gap), column * (width + gap)
        board[top : top + height, left : left + width] = grey
    return board


def _reach(image: np.ndarray) -> float:
    """The absolute value that is drawn white or black: the 1 % largest lie beyond, so that no one pixel sets it."""
    return max(float(np.quantile(np.abs(image), 0.99)), 1e-12)


def _draw_scene(
    axes: Axes, picture: Tensor, path: Tensor, draws: Tensor | None, truth: Tensor | None, *, line: float
) -> None:
    """The picture with gazes over it; the view stays the picture's own, whatever the gazes reach to."""
    _show(axes, picture, interpolation="antialiased")
    if draws is not None:
        chosen = torch.linspace(0, draws.shape[0] - 1, min(DRAWS_SHOWN, draws.shape[0])).round().long()
        for draw in draws[chosen]:
            axes.plot(*_outline(draw), color=DRAW_BLUE, lw=0.35 * line, alpha=0.6)
    colours = gaze_colours(len(path))
    halo = [Stroke(linewidth=1.9 * line, foreground="black", alpha=0.55), Normal()]
    centres = path[:, 2:].double().numpy()
    axes.plot(centres[:, 0], centres[:, 1], color="black", lw=0.5 * line, alpha=0.6)
    for gaze, colour in zip(path, colours, strict=True):
        last = colour == colours[-1]
        x, y = _outline(gaze)
        axes.plot(x, y, color=colour, lw=line if last else 0.6 * line, path_effects=halo if last else None)
        axes.plot(float(gaze[2]), float(gaze[3]), "o", color=colour, ms=1.4 * line, mec="black", mew=0.25 * line)
    if truth is not None:
        ring = [Stroke(linewidth=1.4 * line, foreground="black", alpha=0.6), Normal()]
        axes.plot(*_outline(truth), color="white", lw=0.7 * line, ls=(0, (2, 1.6)), path_effects=ring)
    height, width = picture.shape
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _outline(gaze: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The patch's square with a tick from its upper edge outwards, so that one sees which way is up."""
    corner = gazes.corners(gaze[None].double())[0]
    up = gazes.apply(gaze[None].double(), torch.tensor([[0.0, -12.0], [0.0, -15.0], [0.0, -12.0]], dtype=torch.float64))
    ring = torch.cat([corner[:1], up, corner[1:], corner[:1]])
    return ring[:, 0].numpy(), ring[:, 1].numpy()


def _show(axes: Axes, image: Any, *, interpolation: str = "nearest") -> None:
    axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1, interpolation=interpolation)
    axes.set_axis_off()
