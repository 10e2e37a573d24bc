"""The peripheral half of the guide: one convolutional sweep over a coarse scene that says where it is worth looking."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid
from foveate.model.threads import share

__all__ = [
    "Glance",
    "Proposals",
    "VIEW_STEP",
    "cell_centres",
    "feature_layers",
    "glance_loss",
    "local_contrast",
    "propose",
]

# Canonical pixels from one pixel of a view to the next, and view pixels from one output cell to the next.
VIEW_STEP = 1.5
CELL = 4
# Patch widths, as shares of the shorter side, at which a scene is viewed; a cell answers for half a step either way.
SCALES = tuple(0.085 * 2 ** (k / 2) for k in range(8))
# Cells on either side over which local contrast is taken, and the variance that keeps flat views finite.
REACHES, LEAST_VARIANCE = (4, 1), 0.05**2


class Proposals(NamedTuple):
    """Gazes worth a look, best first.

    Attributes:
        gaze: ``(scene, count, 4)``, scene pixels.
        logit: ``(scene, count)`` of presence; where fewer were found the rest have -inf.
    """

    gaze: Tensor
    logit: Tensor


class Glance(nn.Module):
    """A fully convolutional network: in each cell of a view, the presence of an object and the way to it.

    ``forward`` takes views ``(n, rows, columns)`` with intensities in [0, 1], one view pixel = 1.5 canonical pixels
    of the gaze that made the view, and returns ``(n, 5, rows // 4, columns // 4)``: presence logit, offset from the
    cell's centre ``(dx, dy)`` in units of 12 canonical pixels, change of log-scale, change of rotation (radians).

    Convention: `foveate.model.gaze`; the offset is in the view's own canonical frame.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        self.features = feature_layers(width)
        self.head = nn.Conv2d(3 * width, 5, 1)
        assert self.head.bias is not None
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            # Objects are rare: begin by believing one cell in a hundred has one, or the first steps only unlearn that.
            self.head.bias[0] = -4.6

    def forward(self, views: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n 5 cell_rows cell_columns"]:
        return self.head(self.see(views))

    def see(self, views: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n channels cell_rows cell_columns"]:
        """The features of views: ``(n, 3 width, rows / 4, columns / 4)``."""
        if self.training or torch.is_grad_enabled():
            return self.features(local_contrast(views))
        compiles = views.device.type == "cpu" and views.dtype in (torch.float32, torch.float64)
        contrast = _local_contrast_fused(views) if compiles else local_contrast(views)
        # With a pixel's channels side by side CPUs convolve a fifth to a third faster; training gains nothing.
        x = contrast.contiguous(memory_format=torch.channels_last)
        layers = list(self.features)
        for convolution, norm in zip(layers[::3], layers[1::3], strict=True):
            assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None and norm.running_var is not None
            # The normalisation is part of the convolution, which spares a sweep over its output.
            weight, bias = fuse_conv_bn_weights(
                convolution.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            x = functional.conv2d(x, weight, bias, convolution.stride, convolution.padding, convolution.dilation)
            x = x.relu_()
        return x


def feature_layers(width: int) -> nn.Sequential:
    """Convolutions ``(n, 2, rows, columns) -> (n, 3 width, rows / 4, columns / 4)``; a cell sees 49×49 pixels."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride, dilation in (
        (2, width, 5, 2, 1),
        (width, 2 * width, 3, 2, 1),
        (2 * width, 3 * width, 3, 1, 1),
        (3 * width, 3 * width, 3, 1, 2),
        (3 * width, 3 * width, 3, 1, 2),
    ):
        padding = dilation * (kernel - 1) // 2
        layers += [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def glance_loss(
    output: Float[Tensor, "n 5 rows columns"],
    target: Float[Tensor, "n 4"],
    has_object: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Quality-focal loss of presence against a soft target, Huber loss of the change where the target is high.

    Args:
        output: of `Glance.forward` on square views.
        target: gaze of the object in each view's canonical frame (``compose(inverse(view), truth)``).
        has_object: 1 where the view's scene has an object at `target`, 0 for clutter.

    Convention: the soft target of a cell falls off as a Gaussian of sd 3 canonical pixels in position and 0.25 in
    log-scale.
    """
    n, _, rows, columns = output.shape
    cells = cell_centres(rows, columns, output.dtype, output.device)
    centre, scale, rotation = gazes.parts(target)
    offset = centre[:, None, None, :] - cells
    log_scale = torch.log(scale)
    quality = (
        torch.exp(-0.5 * (offset / 3.0).square().sum(-1) - 0.5 * (log_scale / 0.25).square()[:, None, None])
        * has_object[:, None, None]
    )
    logit = output[:, 0]
    probability = torch.sigmoid(logit)
    presence = functional.binary_cross_entropy_with_logits(logit, quality, reduction="none")
    weight = quality.sum().clamp(min=1.0)
    presence = (presence * (probability - quality).square()).sum() / weight * 4
    wanted = torch.stack(
        [
            offset[..., 0] / 12,
            offset[..., 1] / 12,
            log_scale[:, None, None].expand(n, rows, columns),
            rotation[:, None, None].expand(n, rows, columns),
        ],
        1,
    )
    error = functional.smooth_l1_loss(output[:, 1:], wanted, reduction="none", beta=0.1).sum(1)
    change = (error * quality).sum() / weight
    return presence + change


def cell_centres(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "rows columns 2"]:
    """Canonical positions ``(px, py)`` of a view's output cells; the view has ``4 rows × 4 columns`` pixels.

    Convention: the stride-2 convolutions centre their first output on pixel 0, so cell j looks at view pixel 4 j.
    """
    x = (CELL * torch.arange(columns, dtype=dtype, device=device) - (CELL * columns - 1) / 2) * VIEW_STEP
    y = (CELL * torch.arange(rows, dtype=dtype, device=device) - (CELL * rows - 1) / 2) * VIEW_STEP
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1], grid[0]], -1)


@torch.no_grad()
def propose(glance: Glance, pyramid: Pyramid, count: int = 12, scales: Sequence[float] = SCALES) -> Proposals:
    """The `count` most promising gazes of every scene, no initial gaze needed.

    Every scene is viewed whole at each of `scales` (patch width as a share of its shorter side); cells are ranked by
    presence and thinned so that no two proposals lie within half a patch and half an octave of each other. Time and
    memory grow with the number of cells (about 7000 for any picture), not with pixels.

    Convention: `foveate.model.gaze`, scene pixels.
    """
    glance.eval()
    kept_gaze, kept_logit = [], []
    device, dtype = pyramid.texels.device, pyramid.dtype
    for i in range(len(pyramid)):
        height, width = (int(v) for v in pyramid.size[i])
        found_gaze, found_logit = [], []
        for width_share in scales:
            scale = width_share * min(height, width) / gazes.CANONICAL_SIZE
            pixel = scale * VIEW_STEP
            # Half a patch of margin, so that an object cut by the border is still seen whole by its cell.
            margin = gazes.CANONICAL_SIZE / VIEW_STEP
            rows, columns = (CELL * math.ceil((side / pixel + margin) / CELL) for side in (height, width))
            view = torch.tensor([scale, 0.0, (width - 1) / 2, (height - 1) / 2], dtype=torch.float64, device=device)
            extent = columns * VIEW_STEP / gazes.CANONICAL_SIZE
            seen = pyramid[i].extract(view[None, None], (rows, columns), extent)[0]
            output = glance(seen.to(glance.head.weight))[0].to(device, dtype)
            cells = cell_centres(rows // CELL, columns // CELL, torch.float64, device).reshape(-1, 2)
            flat = output.reshape(5, -1)
            keep = flat[0].topk(min(32, flat.shape[1])).indices
            change = flat[1:, keep].double()
            centre = cells[keep] + 12 * change[:2].T
            local = gazes.from_parts(centre, torch.exp(change[2].clamp(-1, 1)), change[3].clamp(-1.5, 1.5))
            found_gaze.append(gazes.compose(view, local))
            found_logit.append(flat[0, keep])
        gaze, logit = _thin(torch.cat(found_gaze), torch.cat(found_logit), count)
        kept_gaze.append(gaze)
        kept_logit.append(logit)
    return Proposals(torch.stack(kept_gaze).to(dtype), torch.stack(kept_logit))


def _thin(gaze: Tensor, logit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy choice of the best, dropping what lies within half a patch and half an octave of a better one."""
    order = logit.argsort(descending=True)
    gaze, logit = gaze[order], logit[order]
    centre, scale, _ = gazes.parts(gaze)
    mean_width = gazes.CANONICAL_SIZE * torch.minimum(scale[:, None], scale[None, :])
    near = (torch.cdist(centre, centre) < 0.5 * mean_width) & ((scale[:, None] / scale[None, :]).log().abs() < 0.35)
    near_rows = near.cpu().numpy()
    chosen: list[int] = []
    for j in range(gaze.shape[0]):
        if len(chosen) == count:
            break
        if not near_rows[j, chosen].any():
            chosen.append(j)
    missing = count - len(chosen)
    rows = torch.tensor(chosen, device=gaze.device)
    gaze, logit = gaze[rows], logit[rows]
    if missing:
        gaze = torch.cat([gaze, gaze[:1].expand(missing, 4)])
        logit = torch.cat([logit, logit.new_full((missing,), -math.inf)])
    return gaze, logit


def local_contrast(views: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n 2 rows columns"]:
    """Views less the local mean, over the local sd: over about two patches, and over three quarters of one.

    The wide one leaves the lighting of the scene outside, the narrow one the shadow on one side of an object.
    """
    small = functional.avg_pool2d(views[:, None], CELL, ceil_mode=True, count_include_pad=False)
    square = functional.avg_pool2d((views * views)[:, None], CELL, ceil_mode=True, count_include_pad=False)
    channels = []
    for reach in REACHES:
        mean = functional.avg_pool2d(small, 2 * reach + 1, 1, reach, count_include_pad=False)
        variance = functional.avg_pool2d(square, 2 * reach + 1, 1, reach, count_include_pad=False) - mean * mean
        both = torch.cat([mean, torch.sqrt(variance.clamp(min=0) + LEAST_VARIANCE)], 1)
        both = functional.interpolate(both, size=views.shape[1:], mode="bilinear", align_corners=False)
        channels.append((views - both[:, 0]) / both[:, 1])
    return torch.stack(channels, 1)


def _local_contrast_fused(views: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n 2 rows columns"]:
    """The same on a CPU in one compiled pass, with a pixel's channels side by side; a test holds it against that."""
    from foveate.inference import kernels

    out = torch.empty(*views.shape, 2, dtype=views.dtype, device="cpu")
    arrays = views.detach().contiguous().numpy(), CELL, REACHES, LEAST_VARIANCE, out.numpy()
    share(kernels.local_contrast, len(views), *arrays, least=8)
    return out.permute(0, 3, 1, 2)
