r"""Patches x(u): anti-aliased extraction from packed scenes of any sizes, and the density coordinates of a patch.

Convention (the whole module): scene pixel (x right, y down), centres at integers; canonical pixels centred on the
patch; a gaze ``(a, b, tx, ty)`` maps canonical to scene (`foveate.model.gaze`). Intensities in [0, 1]. Level k of a
scene is the scene blurred by a Gaussian of sd ``0.5 · 2^{k/2}`` scene pixels (k = 1 … 12, level 0 is the scene; edges
replicated, kernel cut at 4 sd). A lattice of step ``q`` canonical pixels under a gaze of scale s reads at ``l =
max(0, 2 log2(s q))`` by linear interpolation between levels floor(l) and floor(l) + 1, bilinear within a level, edges
replicated: x(u) is continuous in u.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.threads import share

__all__ = [
    "LEVELS",
    "Pyramid",
    "density_coordinates",
    "disc",
    "extract",
    "from_density_coordinates",
    "normalise",
]

LEVELS = 12
PIXELS = gazes.CANONICAL_SIZE**2

# The noise that keeps the normalisation of a flat patch finite: 5 % of the intensity range.
NORMALISING_FLOOR = 0.05

# Samples of a coarse copy beyond the picture's edges: past 4 sd the replicated edge is all there is.
_MARGIN = 5

# Points read in some 0.2 ms: a thread is not worth its start for fewer.
_POINTS_PER_THREAD = 16384
# Products summed in some 0.2 ms, likewise.
_TAPS_PER_THREAD = 1 << 21


class Pyramid:
    """Blurred levels of one or more scenes of any sizes, packed into one flat buffer so that one gather reads them all.

    Attributes:
        texels: ``(total,)`` all levels of all scenes, row-major, one after the other; signed bytes where `in_bytes`.
        offset: ``(scene, level)`` where a level begins in `texels`.
        rows, columns: ``(scene, level)`` size of a level in its own samples.
        stride: ``(scene, level)`` scene pixels from one sample to the next; sample j lies at scene pixel ``j ·
            stride``.
        size: ``(scene, 2)`` height and width of the scenes in pixels.

    Convention: as the module. With ``oversampling=None`` every level keeps one sample a pixel and extraction equals the
    definition; with ``oversampling=r`` a level of blur sd σ keeps one sample every ``2^⌊log2(σ/r)⌋`` pixels (at least
    1), which differs from the definition only by the curvature of an image already blurred by r samples.
    """

    def __init__(self, texels: Tensor, offset: Tensor, rows: Tensor, columns: Tensor, stride: Tensor, size: Tensor):
        self.texels, self.offset, self.rows, self.columns = texels, offset, rows, columns
        self.stride, self.size = stride, size

    @classmethod
    def build(
        cls,
        pictures: Iterable[Tensor],
        oversampling: float | None = 2.0,
        smallest: float = 0.0,
        dtype: torch.dtype | None = None,
        levels: tuple[int, int] | None = None,
    ) -> "Pyramid":
        """Blur every picture to every level.

        Args:
            pictures: tensors ``(height, width)`` in [0, 1], of any sizes, on one device. Those of a generator are never
                in memory together, but for what is kept of them.
            oversampling: samples kept per blur sd, or None for one sample a pixel at every level.
            smallest: patch width as a share of a picture's shorter side below which nothing will be read sharply:
                levels finer than such a patch needs are not built and read as the finest that is. It bounds the
                memory of large photographs.
            dtype: of the texels; the pictures' own by default.
            levels: build the first to the last of these alone, in place of what `smallest` says; levels outside read as
                the nearest one.

        Raises:
            InputError: no picture, or one that is no floating tensor ``(height, width)``, both at least 2.
        """
        blocks: list[Tensor] = []
        tables: list[np.ndarray] = []
        sizes: list[list[int]] = []
        begin = 0
        for i, picture in enumerate(pictures):
            if not isinstance(picture, Tensor) or not picture.is_floating_point():
                raise InputError(
                    f"picture {i} is of {getattr(picture, 'dtype', type(picture).__name__)}: needed is a floating "
                    "tensor in [0, 1]; foveate.model.attention.as_picture makes one of arrays and 8-bit values"
                )
            if picture.ndim != 2 or min(picture.shape) < 2:
                raise InputError(
                    f"picture {i} has shape {tuple(picture.shape)}: needed is (height, width), both at least 2"
                )
            picture = picture.to(dtype or picture.dtype)
            finest = math.floor(_level(smallest * min(picture.shape) / gazes.CANONICAL_SIZE))
            finest, coarsest = levels or (finest, LEVELS)
            table = np.zeros((4, LEVELS + 1), dtype=np.int64)
            for k, block in zip(
                range(finest, coarsest + 1), _levels(picture, finest, coarsest, oversampling), strict=True
            ):
                table[:, k] = begin, block.shape[0], block.shape[1], _stride(k, oversampling)
                blocks.append(block.reshape(-1))
                begin += block.numel()
            table[:, :finest] = table[:, finest : finest + 1]
            table[:, coarsest + 1 :] = table[:, coarsest : coarsest + 1]
            tables.append(table)
            sizes.append(list(picture.shape))
        if not blocks:
            raise InputError("a pyramid needs at least one picture, got none")
        device = blocks[0].device
        offset, rows, columns, stride = torch.from_numpy(np.stack(tables, 1)).to(device)
        size = torch.tensor(sizes, dtype=torch.int64, device=device)
        return cls(torch.cat(blocks), offset, rows, columns, stride, size)

    @classmethod
    def concatenate(cls, parts: Iterable["Pyramid"], into: Tensor | None = None) -> "Pyramid":
        """The scenes of several pyramids, one after the other, in one buffer that holds the texels of no others.

        Args:
            parts: the pyramids, on one device; of a choice of scenes that shares its texels with others, its own.
            into: ``(n,)`` a buffer that the texels are copied to, each part's as it comes, in place of a new one: the
                parts of a generator are then never in memory together. What is left over at its end is not touched.

        Raises:
            InputError: for pyramids in bytes beside others, or more texels than the buffer takes.
        """
        tables: list[tuple[Tensor, ...]] = []
        texels = [] if into is None else [into[:0]]
        length = 0
        for part in parts:
            if texels and texels[0].is_floating_point() != part.texels.is_floating_point():
                raise InputError("some of these pyramids are in bytes and some are not: bring all to one form first")
            # A scene's levels lie one after the other.
            begin, end = part.offset.amin(1), (part.offset + part.rows * part.columns).amax(1)
            moved = length + (end - begin).cumsum(0) - end
            for first, last in zip(begin.tolist(), end.tolist(), strict=True):
                scene, behind = part.texels[first:last], length + last - first
                if into is not None:
                    if behind > len(into):
                        raise InputError(f"{behind} texels and a buffer of {len(into)}: give a longer one")
                    scene = into[length:behind].copy_(scene)
                texels.append(scene)
                length = behind
            tables.append((part.offset + moved[:, None], part.rows, part.columns, part.stride, part.size))
        joined = torch.cat(texels) if into is None else into[:length]
        return cls(joined, *(torch.cat(column) for column in zip(*tables, strict=True)))

    def __len__(self) -> int:
        return self.size.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of patches: the texels' own, float32 for bytes."""
        return self.texels.dtype if self.texels.is_floating_point() else torch.float32

    def __getitem__(self, index: int | slice | Tensor | np.ndarray | np.integer | Sequence[int]) -> "Pyramid":
        """The scenes of `index`, sharing this pyramid's texels."""
        pick: Any = index
        if not isinstance(index, slice | Tensor):
            chosen = np.atleast_1d(index)
            # Of nothing NumPy makes floats.
            pick = torch.as_tensor(chosen if chosen.size else chosen.astype(np.int64), device=self.size.device)
        return Pyramid(
            self.texels, self.offset[pick], self.rows[pick], self.columns[pick], self.stride[pick], self.size[pick]
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Pyramid":
        """The same pyramid with its texels in another dtype or on another device."""
        tables = [t.to(device=device) for t in (self.offset, self.rows, self.columns, self.stride, self.size)]
        texels = self.texels
        if dtype is not None and dtype.is_floating_point and not texels.is_floating_point():
            texels = (texels.to(dtype) + 128) / 255
        return Pyramid(texels.to(device=device, dtype=dtype), *tables)

    def in_bytes(self) -> "Pyramid":
        """The same pyramid in a quarter of the memory: a byte a texel, as coarse as the photographs it is made of.

        Texels t stand for intensities (t + 128) / 255; patches are float32 and at most half a 255th off. `to` with a
        floating-point dtype leads back.
        """
        texels = (self.texels.clamp(0, 1) * 255).round() - 128
        return Pyramid(texels.to(torch.int8), self.offset, self.rows, self.columns, self.stride, self.size)

    def extract(
        self,
        gaze: Float[Tensor, "*batch 4"],
        size: int | tuple[int, int] = gazes.CANONICAL_SIZE,
        extent: float = 1.0,
        scene: Int[Tensor, " lead"] | None = None,
    ) -> Float[Tensor, "*batch rows columns"]:
        """Patches under gazes, ``(scene, ..., 4) -> (scene, ..., size, size)``; differentiable in the gaze.

        Args:
            gaze: leading dimension = the scenes of this pyramid, in order, unless `scene` is given.
            size: lattice points along a side, or ``(rows, columns)``.
            extent: width of the lattice in canonical patches: 1 for x(u), 3 for the guide's window.
            scene: ``(n,)`` which scene each of the n leading rows of `gaze` looks at.

        Raises:
            InputError: for gazes that do not fit the scenes, or for a number of a scene that is not here.

        Convention: as the module. Values and dtype follow the texels. A gaze that is not finite sees NaNs.
        """
        if gaze.shape[-1:] != (4,):
            raise InputError(f"gazes of shape {tuple(gaze.shape)}: needed is (a, b, tx, ty) last")
        if scene is None:
            if gaze.ndim < 2 or gaze.shape[0] != len(self):
                raise InputError(
                    f"gazes of shape {tuple(gaze.shape)} do not match {len(self)} scenes: needed is (scene, ..., 4)"
                )
            scene = torch.arange(len(self), device=gaze.device)
        elif gaze.ndim < 2 or scene.shape[0] != gaze.shape[0]:
            raise InputError(f"{scene.shape[0]} scenes for gazes of shape {tuple(gaze.shape)}: needed is one per row")
        elif scene.numel() and not 0 <= int(scene.min()) <= int(scene.max()) < len(self):
            raise InputError(f"scenes {int(scene.min())} to {int(scene.max())} are asked for, there are {len(self)}")
        flat = gaze.reshape(gaze.shape[0], math.prod(gaze.shape[1:-1]), 4)
        rows = scene[:, None].expand(flat.shape[:2]).reshape(-1)
        shape = (size, size) if isinstance(size, int) else size
        plain = not (gaze.requires_grad and torch.is_grad_enabled()) and not self.texels.requires_grad
        if plain and self.texels.device.type == "cpu" and gaze.device.type == "cpu":
            patches = self._extract_fused(flat.reshape(-1, 4), rows, shape, extent)
        else:
            patches = self._extract_plain(flat.reshape(-1, 4), rows, shape, extent)
        if not self.texels.is_floating_point():
            patches = (patches + 128) / 255
        return patches.reshape(*gaze.shape[:-1], *shape)

    def _extract_plain(self, gaze: Tensor, scene: Tensor, size: tuple[int, int], extent: float) -> Tensor:
        """The differentiable reference, for any device: ``(n, 4), (n,) -> (n, rows · columns)``."""
        # What is infinite becomes NaN: at infinity there is no picture, not even its replicated edge.
        gaze = gaze.to(self.dtype) + 0 * gaze.detach().to(self.dtype)
        points = gazes.lattice(size, extent, gaze.dtype, gaze.device).reshape(-1, 2)
        at = gazes.apply(gaze[:, None, :], points)
        step = gazes.CANONICAL_SIZE * extent / size[1]
        square = (gaze[:, 0] ** 2 + gaze[:, 1] ** 2) * step**2
        # 2 log2(s) = log2(s²); below scale 1 the level is 0 and has no gradient.
        level = torch.log2(square.clamp(min=1.0)).clamp(max=LEVELS - 1e-9)
        # NaN has no integer; the weights carry it into the patch.
        lower = level.detach().nan_to_num().floor().clamp(max=LEVELS - 1).long()
        weight = (level - lower)[:, None]
        return (1 - weight) * self._look(at, scene, lower) + weight * self._look(at, scene, lower + 1)

    def _look(self, at: Tensor, scene: Tensor, level: Tensor) -> Tensor:
        offset, rows, columns = (t[scene, level][:, None] for t in (self.offset, self.rows, self.columns))
        stride = self.stride[scene, level][:, None].to(at.dtype)
        limit = (self.size[scene] - 1).to(at.dtype)
        x = torch.minimum(at[..., 0].clamp(min=0), limit[:, 1:]) / stride
        y = torch.minimum(at[..., 1].clamp(min=0), limit[:, :1]) / stride
        column = torch.minimum(x.detach().nan_to_num().floor().long(), (columns - 2).clamp(min=0))
        row = torch.minimum(y.detach().nan_to_num().floor().long(), (rows - 2).clamp(min=0))
        fx, fy = x - column, y - row
        right, down = (columns > 1).long(), (rows > 1).long() * columns
        here = offset + row * columns + column
        t = self.texels
        top = t[here] * (1 - fx) + t[here + right] * fx
        bottom = t[here + down] * (1 - fx) + t[here + down + right] * fx
        return top * (1 - fy) + bottom * fy

    def _extract_fused(self, gaze: Tensor, scene: Tensor, size: tuple[int, int], extent: float) -> Tensor:
        """One compiled pass over all points of all gazes; a test holds it against `_extract_plain`."""
        from foveate.model.kernels import extract_patches

        # Gazes in double precision: a float32 scene coordinate of 4000 px is only good to 2e-4 px. Points are counted
        # from a corner of the lattice, in the texels' precision.
        out = np.empty(
            (gaze.shape[0], size[0] * size[1]), dtype=np.float64 if self.texels.dtype == torch.float64 else np.float32
        )
        share(
            extract_patches,
            gaze.shape[0],
            self.texels.detach().numpy(),
            self.offset.numpy(),
            self.rows.numpy(),
            self.columns.numpy(),
            self.stride.numpy(),
            self.size.numpy(),
            gaze.detach().double().contiguous().numpy(),
            scene.contiguous().numpy(),
            size[0],
            size[1],
            gazes.CANONICAL_SIZE * extent / size[1],
            out,
            least=max(1, _POINTS_PER_THREAD // (size[0] * size[1])),
        )
        return torch.from_numpy(out).to(self.dtype)


def extract(
    pictures: Pyramid | Tensor | Sequence[Tensor],
    gaze: Float[Tensor, "*batch 4"],
    size: int | tuple[int, int] = gazes.CANONICAL_SIZE,
    extent: float = 1.0,
) -> Float[Tensor, "*batch rows columns"]:
    """The patches that gazes put into the canonical frame, ``(scene, ..., 4) -> (scene, ..., size, size)``.

    Args:
        pictures: a list of ``(height, width)`` tensors in [0, 1] of any sizes, a ``(scene, height, width)`` tensor,
            or a `Pyramid`. One ``(height, width)`` picture takes gazes ``(..., 4)`` with no scene dimension.
        gaze: canonical to scene, ``(scene, ..., 4)``.
        size: lattice points along a side, or along rows and columns.
        extent: width of the lattice in canonical patches (1: the patch, 3: the guide's window).

    Raises:
        InputError: for pictures that are none, or gazes of another shape or number than the pictures.

    Convention: as `foveate.model.patch`; of pictures, full-resolution levels, so that the value is the definition's (to
    1e-5 in float32 with up to 250 lattice points a side, 4e-5 with 1000); of a `Pyramid`, the levels it has.
    Differentiable in `gaze`. Device and dtype follow the pictures.
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 2:
        return extract([pictures], gaze[None], size, extent)[0]
    if isinstance(pictures, Pyramid):
        return pictures.extract(gaze, size, extent)
    columns = size if isinstance(size, int) else size[1]
    scale = gazes.parts(gaze.detach()).scale * (gazes.CANONICAL_SIZE * extent / columns)
    # A gaze that is not finite reads nothing, and must not say what the others read.
    scale = scale[torch.isfinite(scale)]
    if not len(scale):
        scale = torch.ones(1)
    # Only the levels that these gazes read. Where levels change over, those of both sides: the rounding of a scale must
    # not leave out the one that its slope needs.
    lowest, highest = _level(float(scale.min()) * (1 - 1e-6)), _level(float(scale.max()) * (1 + 1e-6))
    needed = math.floor(lowest), math.floor(highest) + 1
    return Pyramid.build(list(pictures), oversampling=None, levels=needed).extract(gaze, size, extent)


def normalise(patch: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """``(x - mean x) / sqrt(var x + 0.05²)``: the patch with its lighting (gain and offset) taken out."""
    centred = patch - patch.mean((-2, -1), keepdim=True)
    return centred / torch.sqrt((centred * centred).mean((-2, -1), keepdim=True) + NORMALISING_FLOOR**2)


def density_coordinates(patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch 575"]:
    """The 575 coordinates in which densities are quoted: the normalised patch without its (always zero) mean direction.

    ``y = Bᵀ n`` with B the last 575 columns of the Householder reflection that takes the constant vector to the first
    axis, applied without forming it. Inverse on normalised patches: `from_density_coordinates`.
    """
    n = normalise(patch).flatten(-2)
    return _reflect(n)[..., 1:]


def from_density_coordinates(y: Float[Tensor, "*batch 575"]) -> Float[Tensor, "*batch 24 24"]:
    """The normalised (zero-mean) patch ``n = B y`` of density coordinates."""
    padded = functional.pad(y, (1, 0))
    return _reflect(padded).unflatten(-1, (gazes.CANONICAL_SIZE, gazes.CANONICAL_SIZE))


@cache
def disc(radius: float) -> Float64[Tensor, "575 pixel"]:
    """An orthonormal basis of what the pixels less than `radius` from the centre say, in density coordinates, CPU.

    ``disc(radius).T @ y`` are as many numbers as there are such pixels, an invertible linear function of their
    normalised intensities.

    Convention: `radius` in canonical pixels; the centre of the patch is between its four middle pixels.

    Raises:
        InputError: the radius reaches no pixel, or all of them, whose intensities are not independent (they sum to 0).
    """
    half = (gazes.CANONICAL_SIZE - 1) / 2
    if not math.sqrt(0.5) < radius <= half * math.sqrt(2):
        raise InputError(
            f"radius {radius}: a disc has some pixels of the patch and not all, so 0.71 to {half * math.sqrt(2):.2f}"
        )
    place = torch.arange(gazes.CANONICAL_SIZE, dtype=torch.float64, device="cpu") - half
    inside = (place[:, None].square() + place.square() < radius**2).flatten()
    rows = from_density_coordinates(torch.eye(PIXELS - 1, dtype=torch.float64, device="cpu")).flatten(1).T[inside]
    return torch.linalg.qr(rows.T).Q


def _reflect(n: Tensor) -> Tensor:
    """``(I - 2 v vᵀ / vᵀv) n`` with ``v = 1/24 + e₀``."""
    root = 1 / math.sqrt(PIXELS)
    dot = n.sum(-1, keepdim=True) * root + n[..., :1]
    factor = 2 / (2 + 2 * root) * dot
    first = n[..., :1] - factor * (1 + root)
    return torch.cat([first, n[..., 1:] - factor * root], -1)


def _level(scale: float) -> float:
    return min(max(0.0, 2 * math.log2(max(scale, 1e-9))), LEVELS - 1e-9)


def _stride(level: int, oversampling: float | None) -> int:
    if level == 0 or oversampling is None:
        return 1
    return max(1, 2 ** math.floor(math.log2(0.5 * 2 ** (level / 2) / oversampling)))


def _levels(picture: Tensor, finest: int, coarsest: int, oversampling: float | None) -> Iterator[Tensor]:
    """The picture blurred to each level, one sample every `_stride` pixels, the last at or beyond the last pixel.

    A level that is kept at every second pixel or fewer is blurred from a coarse copy of the picture: blurred to an sd
    of one of its samples, which hides nothing that the level shows (what aliases is damped by e⁻¹⁹), and by the rest
    of the level's variance afterwards. Pixels of a large photograph are so read once, not once a level.
    """
    copy, spacing, blurred = picture, 1, 0.0
    for level in range(finest, coarsest + 1):
        stride, sd = _stride(level, oversampling), 0.5 * 2 ** (level / 2)
        if level == 0:
            yield picture
            continue
        wanted = min(stride, 2 ** max(0, math.floor(math.log2(sd / 2))))
        if wanted > spacing:
            rest = math.sqrt(wanted**2 - blurred**2) / spacing
            copy = _smoothed(copy, rest, wanted // spacing, _samples(picture, wanted), _margin(spacing), _MARGIN)
            spacing, blurred = wanted, float(wanted)
        rest = math.sqrt(sd**2 - blurred**2) / spacing
        yield _smoothed(copy, rest, stride // spacing, _samples(picture, stride), _margin(spacing), 0)


def _samples(picture: Tensor, stride: int) -> tuple[int, int]:
    rows, columns = (-(-(length - 1) // stride) + 1 for length in picture.shape)
    return rows, columns


def _margin(spacing: int) -> int:
    """Samples of a copy before the picture's first pixel: none of the picture itself."""
    return 0 if spacing == 1 else _MARGIN


def _smoothed(
    copy: Tensor, sd: float, step: int, samples: tuple[int, int], before: int, around: int
) -> Float[Tensor, "rows columns"]:
    """Every `step`-th sample of `copy` after a blur of `sd` (in its samples), edges replicated.

    Args:
        copy: begins `before` samples before the picture's first pixel.
        sd: of the Gaussian, cut at 4 sd.
        step: samples of `copy` from one to the next.
        samples: rows and columns on the picture.
        before: see `copy`.
        around: how many further ones on each side.
    """
    taps, radius = _kernel(sd)
    compiles = copy.device.type == "cpu" and copy.dtype in (torch.float32, torch.float64)
    if compiles and not (copy.requires_grad and torch.is_grad_enabled()):
        return _smoothed_fused(copy, taps, step, samples, before - around * step - radius, around)
    return _smoothed_plain(copy, taps, step, samples, before - around * step - radius, around)


def _smoothed_fused(
    copy: Tensor, taps: Tensor, step: int, samples: tuple[int, int], first: int, around: int
) -> Float[Tensor, "rows columns"]:
    """One compiled pass; a test holds it against `_smoothed_plain`."""
    from foveate.model.kernels import blur

    out = torch.empty([count + 2 * around for count in samples], dtype=copy.dtype, device="cpu")
    arrays = copy.detach().contiguous().numpy(), taps.to(copy.dtype).numpy()
    least = max(1, _TAPS_PER_THREAD // (copy.shape[1] * len(taps)))
    share(blur, len(out), *arrays, step, first, out.numpy(), least=least)
    return out


def _smoothed_plain(
    copy: Tensor, taps: Tensor, step: int, samples: tuple[int, int], first: int, around: int
) -> Float[Tensor, "rows columns"]:
    """Differentiable, for any device: the first tap of the first sample is the copy's `first` in rows and columns."""
    weights = taps.tolist()
    for axis, count in enumerate(samples):
        count += 2 * around
        index = torch.arange(first, first + (count - 1) * step + len(weights), device=copy.device)
        padded = copy.index_select(axis, index.clamp(0, copy.shape[axis] - 1))
        reach = (count - 1) * step + 1
        # Shifted sums: a convolution of one channel is several times slower, and copies more.
        shifted = [
            padded[k : k + reach : step] if axis == 0 else padded[:, k : k + reach : step] for k in range(len(weights))
        ]
        copy = weights[0] * shifted[0]
        for weight, part in zip(weights[1:], shifted[1:], strict=True):
            copy.add_(part, alpha=weight)
    return copy


@cache
def _kernel(sd: float) -> tuple[Tensor, int]:
    radius = int(4 * sd + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu") / sd) ** 2)
    return taps / taps.sum(), radius
