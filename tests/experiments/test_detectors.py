"""The detectors that people would use instead find what is there to be found, where it is."""

import builtins
import math
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data import Scenes
from foveate.experiments import detectors
from foveate.experiments.demo import astronaut
from foveate.experiments.detectors import HaarDetector, TemplateSearch, haar_box, require_opencv
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import extract


def _scene(gain: float = 1.0, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A picture with a smooth pattern at twice the canonical size, its gaze, and the pattern's canonical image."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 1, 6, 6, generator=generator)
    pattern = torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic", align_corners=True)[0, 0].clamp(0, 1)
    picture = 0.5 + 0.1 * torch.rand(120, 160, generator=generator)
    picture[30:78, 50:98] = (gain * pattern + offset).clamp(0, 1)
    # The 48 pixels from 50 to 97 have their centre at 73.5.
    gaze = torch.tensor([2.0, 0.0, 73.5, 53.5], dtype=torch.float64)
    return picture, gaze, torch.nn.functional.avg_pool2d(pattern[None, None], 2)[0, 0]


@pytest.mark.parametrize(("score", "gain", "offset"), [("correlation", 0.4, 0.3), ("distance", 1.0, 0.0)])
def test_a_template_is_found_where_it_was_put_at_its_size(score: Any, gain: float, offset: float) -> None:
    picture, gaze, template = _scene(gain, offset)
    shares = tuple(np.geomspace(0.25, 0.64, 9).tolist())  # 48 / 120 = 0.4 is the middle one
    found = TemplateSearch(template, score, shares).detect(picture)
    # The picture shrunk by 2 has the pattern at whole pixels: it is found exactly, but for the size's rounding.
    torch.testing.assert_close(found.gaze, gaze, rtol=0, atol=0.02)


def test_correlation_does_not_take_flat_windows_for_the_template() -> None:
    picture, gaze, template = _scene()
    picture[:, 110:] = 1.0
    picture[90:] = 0.0
    found = TemplateSearch(template, "correlation", (0.4,)).detect(picture)
    torch.testing.assert_close(found.gaze, gaze, rtol=0, atol=0.02)


def test_every_position_of_a_template_counts_as_a_window() -> None:
    _, _, template = _scene()
    assert TemplateSearch(template, "distance", (0.4, 0.5)).detect(torch.rand(120, 160)).windows == (
        (60 - 23) * (80 - 23) + (48 - 23) * (64 - 23)
    )


def test_a_template_larger_than_the_picture_finds_nothing() -> None:
    _, _, template = _scene()
    found = TemplateSearch(template, "distance", (1.5,)).detect(torch.rand(120, 160))
    assert found.windows == 0
    assert bool(found.gaze.isnan().all())


def test_a_template_is_the_mean_crop_and_sizes_reach_beyond_those_seen() -> None:
    picture, gaze, _ = _scene()
    larger = gazes.compose(gaze, torch.tensor([1.5, 0.0, 0.0, 0.0], dtype=torch.float64))
    fitted = TemplateSearch.fit(Scenes.from_pictures([picture, picture], gazes=torch.stack([gaze, larger])), "distance")
    assert fitted.shares[0] == pytest.approx(0.4 / 1.1)
    assert fitted.shares[-1] == pytest.approx(0.6 * 1.1)
    crops = extract(picture, torch.stack([gaze, larger]))
    torch.testing.assert_close(fitted.template, crops.mean(0), rtol=0, atol=1e-6)  # the same sum in float32


def test_haar_finds_the_astronaut_and_nothing_in_a_flat_picture() -> None:
    scene = astronaut()[0]
    found = HaarDetector().detect(scene.picture)
    assert scene.gaze is not None
    # Marked by eye, and a box has no more than sixteen sizes from 24 pixels to 120.
    assert float(gazes.overlap(found.gaze, scene.gaze)) > 0.6
    nothing = HaarDetector().detect(torch.full((100, 100), 0.5))
    assert bool(nothing.gaze.isnan().all())
    assert float(gazes.overlap(nothing.gaze, scene.gaze)) == 0.0


def test_the_square_that_belongs_to_a_box_is_learned_from_the_boxes_that_meet_the_face(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = gazes.from_parts(
        torch.tensor([[50.0, 40.0], [70.0, 60.0], [30.0, 30.0], [60.0, 60.0]]).double(),
        torch.tensor([1.0, 2.0, 1.5, 1.0]).double(),
        torch.zeros(4).double(),
    )
    scenes = Scenes.from_pictures([torch.full((100, 120), k / 10) for k in range(4)], gazes=truth)

    def boxes(picture: torch.Tensor) -> tuple[float, float, float] | None:
        k = round(float(picture[0, 0]) * 10)
        if k == 2:
            return None
        if k == 3:
            return 10.0, 10.0, 30.0  # far off: a false alarm teaches nothing
        (x, y), scale, _ = gazes.parts(truth[k])
        side = 30.0 * float(scale)
        return float(x) - 0.1 * side, float(y) + 0.05 * side, side

    monkeypatch.setattr(detectors, "haar_box", boxes)
    fitted = HaarDetector.fit(scenes)
    # Offsets are held in float32 until they are divided by the side.
    assert (fitted.right, fitted.down, fitted.width) == pytest.approx((0.1, -0.05, 0.8), abs=1e-6)
    found = fitted.detect(scenes[0].picture)
    torch.testing.assert_close(found.gaze, truth[0], rtol=0, atol=1e-5)


def test_the_square_of_a_box_is_a_median_of_boxes_whose_centre_lies_on_the_face(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offsets to the right, in pixels of boxes 24 wide: 0, 1 and 7; one of 14 is off the square, which is 24 wide."""
    offsets = (0.0, 1.0, 7.0, 14.0)
    truth = torch.tensor([1.0, 0.0, 60.0, 50.0]).double().expand(4, 4)
    scenes = Scenes.from_pictures([torch.full((100, 120), k / 10) for k in range(4)], gazes=truth)
    monkeypatch.setattr(
        detectors, "haar_box", lambda picture: (60.0 - offsets[round(float(picture[0, 0]) * 10)], 50.0, 24.0)
    )
    fitted = HaarDetector.fit(scenes)
    # Offsets are held in float32 until they are divided by the side.
    assert (fitted.right, fitted.down, fitted.width) == pytest.approx((1 / 24, 0.0, 1.0), abs=1e-6)


def test_shrunk_by_two_or_more_the_cascade_looks_at_every_pixel() -> None:
    # 60 × 70 shrunk by 1.1 again and again, less 24: eight sizes at every second pixel, then 28 × 33 and 25 × 30.
    apart = 18 * 23 + 16 * 20 + 13 * 17 + 11 * 15 + 9 * 12 + 7 * 10 + 5 * 8 + 4 * 6
    assert detectors._haar_windows(60, 70) == apart + 4 * 9 + 1 * 6


def test_the_grid_of_the_cascade_is_counted() -> None:
    # 26 × 28: at factor 1 two rows and four columns every second pixel; at 1.1 (24 × 25) nothing is left over.
    assert HaarDetector().detect(torch.rand(26, 28)).windows == 1 * 2


def test_a_box_is_centred_on_pixel_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cascade:
        def detectMultiScale(self, grey: np.ndarray, **options: Any) -> list[tuple[int, int, int, int]]:
            assert grey.dtype == np.uint8
            return [(0, 0, 10, 10), (4, 6, 20, 20)]

    monkeypatch.setattr(detectors, "_cascade", Cascade)
    # Pixels 4 to 23 and 6 to 25.
    assert haar_box(torch.rand(40, 40)) == (13.5, 15.5, 20.0)


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *arguments: Any, imported: Any = builtins.__import__, **options: Any) -> Any:
        if name == "cv2":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"foveate\[bench\]"):
        require_opencv()


def test_scenes_without_gazes_teach_no_detector() -> None:
    scenes = Scenes.from_pictures([torch.rand(40, 40)])
    with pytest.raises(InputError, match="known gazes"):
        HaarDetector.fit(scenes)
    unknown = torch.full((1, 4), math.nan, dtype=torch.float64)
    with pytest.raises(InputError, match="known gazes"):
        TemplateSearch.fit(Scenes.from_pictures([torch.rand(40, 40)], gazes=unknown), "distance")
