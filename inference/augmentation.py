"""What else a training window might have shown: other faces' shapes, covered parts, other cameras and lamps."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from foveate.inference.glance import VIEW_STEP
from foveate.model import gaze as gazes

__all__ = ["blended", "mirrored", "on_other_background", "partly_covered", "relit", "stretched"]

# sd of the log-ratio by which an object is stretched one way and shrunk the other.
STRETCH = 0.12


def mirrored(
    window: Float[Tensor, "n rows columns"],
    target: Float[Tensor, "n 4"],
    canonical: Float[Tensor, "n 24 24"] | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Half of the batch seen in a mirror. Targets are gazes ``(a, b, tx, ty)`` or changes ``(x, y, log-scale, angle)``.

    Convention: x → -x turns the angle round; of a gaze that negates b and tx, of a change (given with canonical images)
    the first and last coordinate.
    """
    flip = torch.rand(window.shape[0], generator=generator) < 0.5
    sign = torch.tensor([-1.0, 1.0, 1.0, -1.0] if canonical is not None else [1.0, -1.0, -1.0, 1.0], dtype=target.dtype)
    window = torch.where(flip[:, None, None], window.flip(-1), window)
    target = torch.where(flip[:, None], target * sign, target)
    if canonical is not None:
        canonical = torch.where(flip[:, None, None], canonical.flip(-1), canonical)
    return window, target, canonical


def on_other_background(
    window: Float[Tensor, "n rows columns"],
    other: Float[Tensor, "n rows columns"],
    relative: Float[Tensor, "n 4"],
    extent: float,
    share: float,
    generator: torch.Generator,
) -> Float[Tensor, "n rows columns"]:
    """In a share of the windows keep a soft ellipse about the object and put clutter everywhere else.

    Convention: `relative` ``(n, 4)`` carries the object's canonical frame into the window's.
    """
    size = window.shape[-1]
    at = gazes.lattice(size, extent, relative.dtype).reshape(1, -1, 2)
    p = gazes.apply(gazes.inverse(relative)[:, None, :], at)
    radius = torch.sqrt((p[..., 0] / 13.0).square() + ((p[..., 1] - 0.5) / 16.5).square())
    mask = torch.sigmoid((1.05 - radius) / 0.06).reshape(window.shape).to(window.dtype)
    chosen = (torch.rand(window.shape[0], generator=generator) < share).to(window.dtype)[:, None, None]
    return window + chosen * (1 - mask) * (other - window)


def stretched(
    view: Float[Tensor, "n size size"], target: Float[Tensor, "n 4"], generator: torch.Generator
) -> Float[Tensor, "n size size"]:
    """Views stretched one way and shrunk the other about the object's middle: longer, rounder and slanted faces.

    The map is symmetric with determinant 1, so the similarity nearest to it is the identity and the gaze stays right.

    Convention: a view pixel is 1.5 canonical pixels; `target` is the object's gaze in the view's canonical frame.
    """
    n, size = view.shape[0], view.shape[-1]
    ratio = STRETCH * torch.randn(n, generator=generator, dtype=torch.float32)
    direction = math.pi * torch.rand(n, generator=generator, dtype=torch.float32)
    cos, sin = torch.cos(direction), torch.sin(direction)
    # The grid says where each pixel is read: the inverse map.
    less, more = torch.exp(-ratio), torch.exp(ratio)
    across = (less - more) * cos * sin
    rows = [
        torch.stack([less * cos**2 + more * sin**2, across], -1),
        torch.stack([across, less * sin**2 + more * cos**2], -1),
    ]
    matrix = torch.stack(rows, -2)
    centre = (target[:, 2:].float() / (VIEW_STEP * size / 2)).clamp(-1.5, 1.5)
    shift = centre - (matrix @ centre[..., None])[..., 0]
    grid = functional.affine_grid(torch.cat([matrix, shift[..., None]], -1), [n, 1, size, size], align_corners=False)
    return functional.grid_sample(view[:, None].float(), grid, padding_mode="border", align_corners=False)[:, 0]


def partly_covered(
    view: Float[Tensor, "n size size"],
    other: Float[Tensor, "n size size"],
    target: Float[Tensor, "n 4"],
    generator: torch.Generator,
) -> Float[Tensor, "n size size"]:
    """In 12 % of the views clutter, or an even tone, hides one side of the object, in 18 % a box somewhere on it.

    Convention: as for `stretched`.
    """
    n = view.shape[0]
    x, y, width = _about(view, target)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((n, 1, 1), generator=generator)

    direction = uniform(0.0, 2 * math.pi)
    side = torch.cos(direction) * x + torch.sin(direction) * y > uniform(0.15, 0.6) * width
    box = ((x - uniform(-0.5, 0.5) * width).abs() < uniform(0.08, 0.28) * width) & (
        (y - uniform(-0.5, 0.5) * width).abs() < uniform(0.08, 0.28) * width
    )
    kind = uniform(0.0, 1.0)
    hidden = torch.where(kind < 0.12, side, box & (kind < 0.3))
    cover = torch.where(uniform(0.0, 1.0) < 0.5, other.float(), uniform(0.0, 1.0))
    return torch.where(hidden, cover, view.float())


def blended(
    view: Float[Tensor, "n size size"],
    second: Float[Tensor, "n size size"],
    target: Float[Tensor, "n 4"],
    generator: torch.Generator,
) -> Float[Tensor, "n size size"]:
    """In 15 % of the views a mixture of two objects at the same place, in 15 % half of each: people never seen.

    Convention: as for `stretched`; `second` shows another object at the same `target`.
    """
    n = view.shape[0]
    x, y, width = _about(view, target)
    direction = 2 * math.pi * torch.rand((n, 1, 1), generator=generator)
    kind = torch.rand((n, 1, 1), generator=generator)
    mixture = torch.rand((n, 1, 1), generator=generator)
    seam = torch.sigmoid((torch.cos(direction) * x + torch.sin(direction) * y) / (width / 8))
    weight = torch.where(kind < 0.15, mixture, torch.where(kind < 0.3, seam, 0.0))
    # Far from the object there is nothing to mix.
    weight = weight * ((x.mean((1, 2)).abs() < 48) & (y.mean((1, 2)).abs() < 48))[:, None, None]
    return view.float() + weight * (second.float() - view.float())


def _about(view: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels' positions about the object, canonical pixels of the view, and the object's patch width: ``(n, …, …)``."""
    size = view.shape[-1]
    at = (torch.arange(size) - (size - 1) / 2) * VIEW_STEP
    centre, scale, _ = gazes.parts(target.float())
    shape = (len(view), size, size)
    x = (at[None, None, :] - centre[:, 0, None, None]).expand(shape)
    y = (at[None, :, None] - centre[:, 1, None, None]).expand(shape)
    return x, y, gazes.CANONICAL_SIZE * scale[:, None, None]


def relit(window: Float[Tensor, "n rows columns"], generator: torch.Generator) -> Float[Tensor, "n rows columns"]:
    """Other cameras and lamps: gamma, tone curve, a ramp of light, gain, offset, a lamp from the side, blur, noise."""
    n, rows, columns = window.shape
    shape, dtype = (n, 1, 1), window.dtype

    def normal(sd: float) -> Tensor:
        return sd * torch.randn(shape, generator=generator, dtype=dtype)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype)

    def chosen(share: float) -> Tensor:
        return uniform() < share

    x = window.clamp(1e-3, 1.0) ** torch.exp(normal(0.4))
    y_axis, x_axis = (torch.linspace(-1, 1, pixels, dtype=dtype) for pixels in (rows, columns))
    y_axis = y_axis[:, None]
    x = x * torch.exp(normal(0.25) * x_axis + normal(0.25) * y_axis) * torch.exp(normal(0.3)) + normal(0.05)
    # A lamp from one side: beyond a soft edge of any direction the light is another one; too much of it saturates.
    direction = 2 * math.pi * uniform()
    edge = (torch.cos(direction) * x_axis + torch.sin(direction) * y_axis - normal(0.4)) / (0.05 + normal(0.2).abs())
    lamp = normal(0.7) * chosen(0.4)
    x = (x * torch.exp(lamp * torch.sigmoid(edge))).clamp(0, 1)
    soft = functional.avg_pool2d(functional.pad(x[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0]
    x = torch.where(chosen(0.25), soft, x)
    coarse = functional.interpolate(functional.avg_pool2d(x[:, None], 2), size=(rows, columns), mode="bilinear")[:, 0]
    x = torch.where(chosen(0.15), coarse, x)
    x = torch.where(chosen(0.25), _curved(x, generator), x)
    return x + uniform() * 0.04 * torch.randn(x.shape, generator=generator, dtype=dtype)


def _curved(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random increasing tone curve for each picture, linear between six knots."""
    n, knots = x.shape[0], 6
    inner = torch.sort(torch.rand(n, knots - 2, generator=generator, dtype=x.dtype), -1).values
    curve = torch.cat([inner.new_zeros(n, 1), inner, inner.new_ones(n, 1)], 1)
    place = x.clamp(0, 1) * (knots - 1)
    left = place.floor().clamp(max=knots - 2)
    index = left.long().flatten(1)
    low, high = (curve.gather(1, index + k).reshape(x.shape) for k in (0, 1))
    return low + (high - low) * (place - left)
