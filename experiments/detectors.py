"""What people would use instead: OpenCV's cascade of Haar features, and search for the mean face.

Each is fitted on labelled training scenes and then finds one gaze in a picture.

Convention (the whole module): gazes as in `foveate.model.gaze`, scene pixels; pictures ``(height, width)`` in [0, 1].
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foveate.data import Scenes
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import extract

__all__ = ["Detection", "Detector", "HaarDetector", "TemplateSearch", "require_opencv"]

# The detector that OpenCV's own examples use, with the settings that are its defaults: the next size is a tenth larger,
# and three neighbours must agree.
CASCADE = "haarcascade_frontalface_default.xml"
CASCADE_SIZE, CASCADE_FACTOR, CASCADE_NEIGHBOURS = 24, 1.1, 3
# Sizes at which a template is searched, and by how much they reach beyond those of the training faces.
TEMPLATE_SIZES, TEMPLATE_REACH = 28, 1.1
# Windows whose sd is less than a grey level have no pattern to correlate with.
FLATTEST = 1 / 255


class Detection(NamedTuple):
    """What a detector says of one picture.

    Attributes:
        gaze: ``(4,)`` float64; NaN where nothing was found.
        windows: how many windows were looked at.
    """

    gaze: Tensor
    windows: int


@runtime_checkable
class Detector(Protocol):
    """Finds one gaze in a picture."""

    def detect(self, picture: Float[Tensor, "height width"]) -> Detection:
        """The most likely gaze of the object in `picture`."""
        ...


@dataclass(frozen=True)
class HaarDetector:
    """OpenCV's frontal-face cascade (Viola and Jones 2001): the largest box, and the square that belongs to a box.

    Attributes:
        right, down: from the centre of a box to that of the square, in widths of the box.
        width: of the square, in widths of the box.
    """

    right: float = 0.0
    down: float = 0.0
    width: float = 1.0

    @classmethod
    def fit(cls, scenes: Scenes) -> "HaarDetector":
        """The median square of the boxes in training scenes, over the boxes whose centre lies on the true square.

        Where the cascade finds none of the faces, the square is the box itself.

        Raises:
            InputError: scenes without gazes, or no OpenCV here.
        """
        rows = []
        for scene, truth in zip(scenes, _truth(scenes), strict=True):
            box = haar_box(scene.picture)
            if box is None:
                continue
            x, y, side = box
            (tx, ty), scale, _ = gazes.parts(truth)
            offset = torch.tensor([float(tx) - x, float(ty) - y])
            if float(offset.abs().max()) < 0.5 * gazes.CANONICAL_SIZE * float(scale):
                rows.append([*(offset / side).tolist(), gazes.CANONICAL_SIZE * float(scale) / side])
        return cls(*np.median(rows, axis=0).tolist()) if rows else cls()

    def detect(self, picture: Float[Tensor, "height width"]) -> Detection:
        """The square of the largest box; windows are those of OpenCV's grid, of which the cascade may skip some."""
        box = haar_box(picture)
        windows = _haar_windows(*picture.shape)
        if box is None:
            return Detection(torch.full((4,), math.nan, dtype=torch.float64), windows)
        x, y, side = box
        scale = self.width * side / gazes.CANONICAL_SIZE
        gaze = torch.tensor([scale, 0.0, x + self.right * side, y + self.down * side], dtype=torch.float64)
        return Detection(gaze, windows)


@dataclass(frozen=True, eq=False)
class TemplateSearch:
    """Search for the mean training face, upright, at every pixel of the picture shrunk to many sizes.

    Attributes:
        template: ``(24, 24)`` the mean crop at the true gazes.
        score: ``"correlation"``, normalised, takes lighting out; ``"distance"`` is Euclidean, between intensities.
        shares: widths of the patch as shares of the picture's shorter side.
    """

    template: Tensor
    score: Literal["correlation", "distance"]
    shares: tuple[float, ...]

    @classmethod
    def fit(cls, scenes: Scenes, score: Literal["correlation", "distance"]) -> "TemplateSearch":
        """The mean crop of training scenes, and 28 sizes from the smallest to the largest of their faces.

        Raises:
            InputError: scenes without gazes.
        """
        truth = _truth(scenes)
        crops = [extract(scene.picture, gaze) for scene, gaze in zip(scenes, truth, strict=True)]
        width = gazes.CANONICAL_SIZE * gazes.parts(truth).scale / scenes.sizes.amin(-1)
        shares = np.geomspace(float(width.min()) / TEMPLATE_REACH, float(width.max()) * TEMPLATE_REACH, TEMPLATE_SIZES)
        return cls(torch.stack(crops).mean(0).float(), score, tuple(shares.tolist()))

    def detect(self, picture: Float[Tensor, "height width"]) -> Detection:
        """The best window of all sizes."""
        cv2 = require_opencv()
        grey = picture.numpy()
        height, width = grey.shape
        template, n = self.template.numpy(), gazes.CANONICAL_SIZE
        best, found, windows = -math.inf, (math.nan,) * 4, 0
        for share in self.shares:
            scale = share * min(height, width) / n
            rows, columns = round(height / scale), round(width / scale)
            if min(rows, columns) < n:
                continue
            small = cv2.resize(grey, (columns, rows), interpolation=cv2.INTER_AREA)
            if self.score == "correlation":
                values = cv2.matchTemplate(small, template, cv2.TM_CCOEFF_NORMED)
                values = np.where(_spread(cv2, small, n) > FLATTEST, values, -1.0)
            else:
                values = -cv2.matchTemplate(small, template, cv2.TM_SQDIFF)
            windows += values.size
            row, column = np.unravel_index(int(values.argmax()), values.shape)
            if values[row, column] > best:
                best = float(values[row, column])
                # OpenCV lays the edges of a shrunk picture on those of the picture: pixel centres are half in.
                x = (column + n / 2) * width / columns - 0.5
                y = (row + n / 2) * height / rows - 0.5
                found = (width / columns, 0.0, float(x), float(y))
        return Detection(torch.tensor(found, dtype=torch.float64), windows)


def haar_box(picture: Float[Tensor, "height width"]) -> tuple[float, float, float] | None:
    """Centre x, centre y and width, in scene pixels, of the largest box that the cascade finds; None without any.

    Raises:
        InputError: no OpenCV here.
    """
    grey = (picture * 255).round().to(torch.uint8).numpy()
    boxes = _cascade().detectMultiScale(grey, scaleFactor=CASCADE_FACTOR, minNeighbors=CASCADE_NEIGHBOURS)
    if len(boxes) == 0:
        return None
    x, y, width, height = max(boxes, key=lambda box: int(box[2]) * int(box[3]))
    # A box covers whole pixels, whose centres lie at integers.
    return float(x + width / 2 - 0.5), float(y + height / 2 - 0.5), float(width)


def require_opencv() -> ModuleType:
    """OpenCV, on as many threads as PyTorch has.

    Raises:
        InputError: it is not installed; the message names the extra.
    """
    try:
        import cv2  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("OpenCV is not installed: the detectors need it, pip install 'foveate[bench]'") from error
    cv2.setNumThreads(torch.get_num_threads())
    return cv2


@cache
def _cascade() -> Any:
    cv2 = require_opencv()
    return cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / CASCADE))


def _haar_windows(height: int, width: int) -> int:
    """Windows of OpenCV's grid: every second pixel of the picture shrunk by less than 2, every pixel beyond."""
    windows, factor = 0, 1.0
    while True:
        rows, columns = round(height / factor) - CASCADE_SIZE, round(width / factor) - CASCADE_SIZE
        if min(rows, columns) <= 0:
            return windows
        step = 1 if factor >= 2 else 2
        windows += math.ceil(rows / step) * math.ceil(columns / step)
        factor *= CASCADE_FACTOR


def _spread(cv2: Any, picture: np.ndarray, size: int) -> np.ndarray:
    """Standard deviation of every ``size × size`` window, ``(rows - size + 1, columns - size + 1)``."""
    wide = picture.astype(np.float64)
    inside = (slice(size // 2, picture.shape[0] - size // 2 + 1), slice(size // 2, picture.shape[1] - size // 2 + 1))
    mean = cv2.boxFilter(wide, -1, (size, size))[inside]
    square = cv2.boxFilter(wide * wide, -1, (size, size))[inside]
    return np.sqrt(np.maximum(square - mean * mean, 0.0))


def _truth(scenes: Scenes) -> Tensor:
    truth = scenes.gazes
    if truth is None or bool(truth.isnan().any()):
        raise InputError("detectors are fitted on scenes with known gazes: give scenes with landmarks.csv or gazes.csv")
    return truth
