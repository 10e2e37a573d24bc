"""The guide: proposes gazes from a whole scene, and from a 72×72 window and a canonical image where the object lies (Tang et al. 2014, sec. 4)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pyro.distributions import Independent, Normal
from torch import Tensor, nn

from foveate.inference.glance import Glance
from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid, normalise

__all__ = ["CHANGE_SCALES", "GazeChange", "GazeGuide", "WINDOW", "WINDOW_EXTENT", "change_chart"]

# The window is three patches (72 canonical pixels) wide and is read at two thirds of the canonical resolution.
WINDOW, WINDOW_EXTENT = 48, 3.0
# One unit of change: half a patch in x and y, a factor e in scale, a radian.
CHANGE_SCALES = (12.0, 12.0, 1.0, 1.0)


class GazeChange(NamedTuple):
    """What the guide believes of the object's gaze, seen from the current one.

    Attributes:
        mean: ``(..., 4)`` change of gaze in the chart of `change_chart`: x and y in half patches, log-scale, radians.
        log_sd: ``(..., 4)`` log standard deviations of the same.
        presence: ``(...)`` logit that there is an object within reach of the window.
    """

    mean: Tensor
    log_sd: Tensor
    presence: Tensor

    def distribution(self) -> Independent:
        """The change as a distribution with event shape (4,)."""
        return Independent(Normal(self.mean, self.log_sd.exp()), 1)


class GazeGuide(nn.Module):
    """A ConvNet on a window around the gaze, conditioned on a canonical image, that returns a distribution over gaze changes.

    The canonical image modulates the window's features (one gain and one offset a channel), so which of two near objects is
    meant depends on whom the canonical image shows. `glance` is the guide's peripheral half, for scenes with no gaze yet.

    Convention: windows ``(n, 48, 48)`` cover 72×72 canonical pixels around the current gaze; canonical images are
    ``(n, 24, 24)``; both are normalised inside.
    """

    def __init__(self, width: int = 32, hidden: int = 256, glance_width: int = 24):
        super().__init__()
        self.config = {"width": width, "hidden": hidden, "glance_width": glance_width}
        self.glance = Glance(glance_width)
        self.window = nn.Sequential(
            _block(1, width, 5, 2), _block(width, 2 * width, 3, 2), _block(2 * width, 3 * width, 3, 1), _block(3 * width, 3 * width, 3, 2)
        )
        self.canonical = nn.Sequential(_block(1, width, 5, 2), _block(width, 2 * width, 3, 2), nn.Flatten(), nn.Linear(72 * width, 6 * width))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * width * 36, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(hidden, 9)
        )
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        # sds are stored after a recalibration on held-out scenes: one factor per coordinate, 1 until then.
        self.register_buffer("log_sd_offset", torch.zeros(4))

    log_sd_offset: Tensor

    def forward(self, window: Float[Tensor, "n 48 48"], canonical: Float[Tensor, "n 24 24"]) -> GazeChange:
        features = self.window(normalise(window)[:, None])
        gain, offset = self.canonical(normalise(canonical)[:, None]).chunk(2, -1)
        features = torch.relu(features * (1 + gain[..., None, None]) + offset[..., None, None])
        mean, log_sd, presence = self.head(features).split((4, 4, 1), -1)
        return GazeChange(mean, (log_sd - 2.0).clamp(-6, 2) + self.log_sd_offset, presence[..., 0])

    def look(
        self,
        pyramid: Pyramid,
        gaze: Float[Tensor, "n 4"],
        canonical: Float[Tensor, "n 24 24"],
        scene: Int[Tensor, " n"],
    ) -> GazeChange:
        """What the guide sees at gazes: `scene` says which scene of the pyramid each row looks at."""
        window = pyramid.extract(gaze, WINDOW, WINDOW_EXTENT, scene)
        return self(window.to(self.log_sd_offset.dtype), canonical.to(self.log_sd_offset.dtype))

    def step(
        self,
        pyramid: Pyramid,
        gaze: Float[Tensor, "n 4"],
        canonical: Float[Tensor, "n 24 24"],
        scene: Int[Tensor, " n"],
    ) -> tuple[Float[Tensor, "n 4"], GazeChange]:
        """One move: the gaze that the guide's mean change leads to, and the change itself (in the chart of the old gaze).

        Convention: scene pixels; a step is at most two patches long and a factor e in scale, whatever the network says.
        """
        change = self.look(pyramid, gaze, canonical, scene)
        mean = torch.stack([*change.mean[:, :2].clamp(-4, 4).unbind(-1), change.mean[:, 2].clamp(-1, 1), change.mean[:, 3].clamp(-1, 1)], -1)
        return change_chart(gaze).to_gaze(mean.to(gaze.dtype)), change


def change_chart(gaze: Float[Tensor, "*batch 4"]) -> gazes.LocalChart:
    """The chart in which the guide speaks of changes from `gaze`: half patches, log-scale, radians."""
    return gazes.LocalChart(gaze, CHANGE_SCALES)


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )
