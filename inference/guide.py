"""The guide: from a window around a gaze and a canonical image to where the object lies (Tang et al. 2014, sec. 4).

Convention (the whole module): gazes in scene pixels, `foveate.model.gaze`; changes of them in the chart of
`change_chart`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pyro.distributions import Independent, Normal
from torch import Tensor, nn

from foveate.inference.glance import Glance, cell_centres
from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid, normalise

__all__ = ["CHANGE_SCALES", "GazeChange", "GazeGuide", "WINDOW", "WINDOW_EXTENT", "change_chart"]

# The window is three patches (72 canonical pixels) wide and is read at two thirds of the canonical resolution.
WINDOW, WINDOW_EXTENT = 48, 3.0
# The cells of the window that look at the middle patch: within 12.8 canonical pixels of the middle.
MIDDLE = slice(4, 9)
# One unit of change: half a patch in x and y, a factor e in scale, a radian.
CHANGE_SCALES = (12.0, 12.0, 1.0, 1.0)


class GazeChange(NamedTuple):
    """What the guide believes of the object's gaze, seen from the current one.

    Attributes:
        mean: ``(..., 4)`` change of gaze in the chart of `change_chart`: x and y in half patches, log-scale, radians.
        log_sd: ``(..., 4)`` log standard deviations of the same.
        presence: ``(...)`` logit that there is an object within reach of the window.
        recognition: ``(...)`` logit of the glance that an object lies in just the current gaze, in the window as it is
            (`GazeGuide.recognise` looks in the mirror, too).
    """

    mean: Tensor
    log_sd: Tensor
    presence: Tensor
    recognition: Tensor

    def distribution(self) -> Independent:
        """The change as a distribution with event shape (4,)."""
        return Independent(Normal(self.mean, self.log_sd.exp()), 1)


class GazeGuide(nn.Module):
    """A ConvNet on a window around the gaze, conditioned on a canonical image: a distribution over changes of gaze.

    Every cell of the window votes for the change of gaze and says how much its vote counts; the mean is the weighted
    vote. The canonical image modulates the features (one gain and one offset a channel), so which of two near objects
    is meant depends on whom it shows. `glance` is the guide's peripheral half, for scenes with no gaze yet; its
    features, trained densely on whole views, are also the window's.

    Convention: windows ``(n, 48, 48)`` cover 72×72 canonical pixels around the current gaze; canonical images are
    ``(n, 24, 24)``; both are normalised inside.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        self.config = {"width": width}
        self.glance = Glance(width)
        self.canonical = nn.Sequential(
            nn.Conv2d(1, width, 5, 2, 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(36 * width, 6 * width),
        )
        self.votes = nn.Sequential(
            nn.Conv2d(3 * width, 3 * width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(3 * width),
            nn.ReLU(inplace=True),
            nn.Conv2d(3 * width, 10, 1),
        )
        for layer in (self.votes[-1], self.canonical[-1]):
            assert isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        # sds are stored after a recalibration on held-out scenes: one factor per coordinate, 1 until then.
        self.register_buffer("log_sd_offset", torch.zeros(4))

        # Weights of (integrated log-odds, recognition logit, presence logit, 1) in the log-weight of a mode against "no
        # object here": what makes modes and presence calibrated; fitted on held-out scenes, the plain odds until then.
        self.register_buffer("evidence", torch.tensor([1.0, 0.0, 0.0, 0.0]))
        # 1 where the guide's own distribution of the gaze also acts as a prior p(u | I): a named variant of the model.
        self.register_buffer("prior_weight", torch.zeros(()))

    log_sd_offset: Tensor
    evidence: Tensor
    prior_weight: Tensor

    def forward(self, window: Float[Tensor, "n 48 48"], canonical: Float[Tensor, "n 24 24"]) -> GazeChange:
        # No gradient to the features: looks see far fewer windows than glances see cells, and would overfit them.
        with torch.no_grad():
            features = self.glance.see(window)
            recognition = self._in_the_middle(self.glance.head(features))
        gain, offset = self.canonical(normalise(canonical)[:, None]).chunk(2, -1)
        features = features * (1 + gain[..., None, None]) + offset[..., None, None]
        output = self.votes(features)
        rows, columns = output.shape[-2:]
        cells = cell_centres(rows, columns, output.dtype, output.device).permute(2, 0, 1) / CHANGE_SCALES[0]
        position = output[:, :2] + cells
        weight = torch.softmax(output[:, 4].flatten(1), -1)
        every = torch.cat([position, output[:, 2:4], output[:, 5:]], 1).flatten(2)
        pooled = (every * weight[:, None, :]).sum(-1)
        log_sd = (pooled[:, 4:8] - 2.0).clamp(-6, 2) + self.log_sd_offset
        return GazeChange(pooled[:, :4], log_sd, pooled[:, 8], recognition)

    def look(
        self,
        pyramid: Pyramid,
        gaze: Float[Tensor, "n 4"],
        canonical: Float[Tensor, "n 24 24"],
        scene: Int[Tensor, " n"],
    ) -> GazeChange:
        """What the guide sees at gazes: `scene` says which scene of the pyramid each row looks at."""
        window = pyramid.extract(gaze, WINDOW, WINDOW_EXTENT, scene)
        return self(window.to(self.log_sd_offset), canonical.to(self.log_sd_offset))

    @torch.no_grad()
    def recognise(
        self,
        pyramid: Pyramid,
        gaze: Float[Tensor, "n 4"],
        scene: Int[Tensor, " n"],
        upright: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Logit that an object lies in just these gazes: the glance's presence in the middle cells of their windows.

        A proposal is seen at one of a few scales and anywhere in a cell; here the gaze itself sets the window, which is
        seen a second time in a mirror: the mean of the two ranks modes better than either.

        Args:
            pyramid: the scenes.
            gaze: where to look.
            scene: which scene of the pyramid each row looks at.
            upright: `GazeChange.recognition` of looks at the same gazes, which spares looking again.

        Convention: gazes in scene pixels.
        """
        window = pyramid.extract(gaze, WINDOW, WINDOW_EXTENT, scene).to(self.log_sd_offset)
        if upright is None:
            upright = self._in_the_middle(self.glance(window))
        return (upright + self._in_the_middle(self.glance(window.flip(-1)))) / 2

    @staticmethod
    def _in_the_middle(output: Float[Tensor, "n 5 rows columns"]) -> Float[Tensor, " n"]:
        """The glance's best presence logit about the middle of a window."""
        return output[:, 0, MIDDLE, MIDDLE].flatten(1).amax(1)

    def step(
        self,
        pyramid: Pyramid,
        gaze: Float[Tensor, "n 4"],
        canonical: Float[Tensor, "n 24 24"],
        scene: Int[Tensor, " n"],
    ) -> tuple[Float[Tensor, "n 4"], GazeChange]:
        """One move: the gaze that the mean change leads to (see `follow`), and the change itself."""
        change = self.look(pyramid, gaze, canonical, scene)
        return self.follow(gaze, change), change

    @staticmethod
    def follow(gaze: Float[Tensor, "n 4"], change: GazeChange) -> Float[Tensor, "n 4"]:
        """The gazes that the mean changes seen from `gaze` lead to.

        Convention: scene pixels; a step is at most two patches long and a factor e in scale, whatever the network says.
        """
        mean = torch.stack(
            [
                *change.mean[:, :2].clamp(-4, 4).unbind(-1),
                change.mean[:, 2].clamp(-1, 1),
                change.mean[:, 3].clamp(-1, 1),
            ],
            -1,
        )
        return change_chart(gaze).to_gaze(mean.to(gaze))


def change_chart(gaze: Float[Tensor, "*batch 4"]) -> gazes.LocalChart:
    """The chart in which the guide speaks of changes from `gaze`: half patches, log-scale, radians."""
    return gazes.LocalChart(gaze, CHANGE_SCALES)
