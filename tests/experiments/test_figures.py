"""Figures: what they hold, that they keep to the picture, and that small images stand where they should."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import rgb_to_hsv
from matplotlib.figure import Figure

from foveate.experiments.figures import (
    Convergence,
    Sheet,
    convergence_figure,
    gaze_colours,
    iou_by_step_figure,
    legend_figure,
    patches_figure,
    reliability_figure,
    scene_figure,
    scenes_figure,
    sheets_figure,
    steps_figure,
)
from foveate.inference.calibration import reliability
from foveate.model import gaze as gazes


def _gazes(*shape: int) -> torch.Tensor:
    """Gazes about the middle of a 60 × 80 picture."""
    centre = torch.tensor([40.0, 30.0]).double() + 5 * torch.randn(*shape, 2).double()
    return gazes.from_parts(centre, torch.full(shape, 0.8).double(), 0.1 * torch.randn(*shape).double())


def test_a_path_runs_from_yellow_to_blue_and_gets_darker_all_the_way() -> None:
    colours = np.array(gaze_colours(6))[:, :3]
    hue = rgb_to_hsv(colours)[:, 0] * 360
    assert 45 < hue[0] < 65
    assert 215 < hue[-1] < 245
    # Rec. 709 luma: lightness alone, all that is left to the colour-blind, tells the order.
    luma = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) < 0).all()


def test_a_scene_shows_every_gaze_of_its_path_some_draws_and_the_truth() -> None:
    path, draws, truth = _gazes(6), _gazes(50), _gazes(1)[0]
    figure = scene_figure(torch.rand(60, 80), path, draws, truth=truth, title="presence 0.9")
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    outlines = [line for line in axes.lines if len(line.get_xdata()) == 8]
    assert len(outlines) == 16 + 6 + 1
    last = np.array(outlines[-2].get_xydata())[[0, 4, 5, 6]]
    np.testing.assert_allclose(last, gazes.corners(path[-1:])[0].numpy(), atol=1e-9)  # both in float64
    assert axes.get_title() == "presence 0.9"


def test_a_picture_like_a_column_is_drawn_no_higher_than_three_times_the_width() -> None:
    path = _gazes(2)
    figure = scene_figure(torch.rand(3000, 30), path, width=4.0)
    assert figure.get_size_inches().tolist() == [4.0, 12.0]
    box = figure.axes[0].get_position()
    assert box.height / box.width == pytest.approx(100 * 4 / 12)


def test_the_view_is_the_pictures_own_even_if_a_gaze_reaches_beyond_it() -> None:
    far = gazes.from_parts(torch.tensor([[200.0, -50.0]]), torch.tensor([3.0]), torch.tensor([0.0]))
    axes = scene_figure(torch.rand(60, 80), far, far, truth=far[0]).axes[0]
    assert axes.get_xlim() == (-0.5, 79.5)
    assert axes.get_ylim() == (59.5, -0.5)


def test_scenes_of_different_sizes_stand_in_one_grid_and_unknown_truths_are_left_out() -> None:
    pictures = [torch.rand(60, 80), torch.rand(90, 50), torch.rand(60, 80)]
    truths = _gazes(3)
    truths[1] = math.nan
    figure = scenes_figure(pictures, _gazes(3, 5), _gazes(3, 4), truths=truths, titles=["a", "b", "c"], columns=2)
    assert [a.get_title() for a in figure.axes] == ["a", "b", "c", ""]
    lines = [sum(len(line.get_xdata()) == 8 for line in a.lines) for a in figure.axes]
    assert lines == [4 + 5 + 1, 4 + 5, 4 + 5 + 1, 0]


def test_the_legend_names_every_kind_of_line() -> None:
    texts = [text.get_text() for text in legend_figure(4).legends[0].get_texts()]
    assert texts == ["where it began", "look 1", "look 2", "posterior mean", "posterior draws", "true gaze"]
    assert "true gaze" not in [t.get_text() for t in legend_figure(4, truth=False).legends[0].get_texts()]


@pytest.mark.parametrize("count", [1, 7, 13])
def test_each_patch_stands_above_its_canonical_image(count: int) -> None:
    patches, canonical = torch.rand(count, 24, 24), torch.rand(count, 24, 24)
    figure = patches_figure(patches, canonical, titles=[str(i) for i in range(count)], columns=5)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == count
    for i, pair in enumerate(shown):
        np.testing.assert_array_equal(pair[:24], patches[i].numpy())
        np.testing.assert_array_equal(pair[-24:], canonical[i].numpy())


def test_the_mean_overlap_is_drawn_at_every_step() -> None:
    overlap = torch.rand(9, 5)
    figure = iou_by_step_figure(overlap, labels=["a", "b", "c", "d", "e"])
    mean = figure.axes[0].collections[-1].get_offsets()[:, 1]
    np.testing.assert_allclose(mean, overlap.double().mean(0), atol=1e-12)  # the same sum in float64
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c", "d", "e"]


def test_signed_images_have_zero_at_mid_grey_and_grey_ones_keep_their_levels() -> None:
    filters = torch.randn(3, 6, 6)
    filters[0, 2, 3] = 0.0
    figure = sheets_figure(
        [Sheet("draws", torch.full((2, 6, 6), 0.25)), Sheet("filters", filters, signed=True)], columns=4
    )
    draws, signed = (axes.images[0].get_array() for axes in figure.axes)
    assert np.unique(draws[:6, :6]).tolist() == [0.25]
    assert signed[2, 3] == 0.5
    assert signed.shape == (6, 4 * 8 - 2)


def test_a_figure_of_a_constant_filter_divides_by_nothing() -> None:
    board = sheets_figure([Sheet("flat", torch.zeros(1, 6, 6), signed=True)]).axes[0].images[0].get_array()
    assert np.isfinite(board).all()


def test_every_step_shows_its_patch_above_its_canonical_image() -> None:
    patches, canonical = torch.rand(2, 4, 24, 24), torch.rand(2, 4, 24, 24)
    pictures = [torch.rand(60, 80), torch.rand(90, 50)]
    figure = steps_figure(pictures, _gazes(2, 4), patches, canonical, truths=_gazes(2), steps=["a", "b", "c", "d"])
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 2 * (1 + 2 * 4)
    for i in range(2):
        of_scene = shown[9 * i : 9 * i + 9]
        np.testing.assert_array_equal(of_scene[0], pictures[i].numpy())
        for k in range(4):
            np.testing.assert_array_equal(of_scene[1 + 2 * k], patches[i, k].numpy())
            np.testing.assert_array_equal(of_scene[2 + 2 * k], canonical[i, k].numpy())
    # The frames of the small images run through the same colours as the squares on the scene.
    frames = [axes.patches[0].get_edgecolor() for axes in figure.axes[1:9:2]]
    np.testing.assert_allclose(frames, gaze_colours(4))


def test_curves_of_convergence_are_means_over_seeds_with_the_sampled_mean_behind() -> None:
    curves = [Convergence(name, torch.rand(3, 9), torch.rand(3)) for name in ("near", "far")]
    figure = convergence_figure({"offset": curves, "scale": curves[:1]})
    first, second = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["offset", "scale"]
    lines = [line for line in first.lines if len(line.get_xdata()) == 9]
    for line, curve in zip(lines, curves, strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve.looks.double().mean(0).numpy(), atol=1e-12)  # float64 sums
    diamonds = [line for line in first.lines if line.get_marker() == "D"]
    assert [float(line.get_ydata()[0]) for line in diamonds] == pytest.approx([float(c.sampled.mean()) for c in curves])
    assert all(line.get_xdata()[0] > 8 for line in diamonds)
    # A single seed has no spread, and so no band.
    alone = [Convergence("near", torch.rand(1, 9), torch.rand(1))]
    assert not convergence_figure({"offset": alone}).axes[0].collections


def test_reliability_shows_every_bin_with_its_count() -> None:
    found = reliability(torch.tensor([0.05, 0.05, 0.95]), torch.tensor([True, False, True]))
    (axes,) = reliability_figure({"presence": found}).axes
    assert [text.get_text() for text in axes.texts] == ["2", "1"]
    points = axes.containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[0.05, 0.5], [0.95, 1.0]], atol=1e-7)  # stated in float32
