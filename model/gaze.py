"""Gazes, similarities from canonical to scene coordinates: their algebra, charts and priors (Tang et al. 2014, sec. 3).

Convention (the whole module): a gaze is a tensor ``(..., 4)`` holding ``(a, b, tx, ty)``; it maps the canonical point
``(px, py)`` to the scene point ``(a px - b py + tx, b px + a py + ty)``. Scene pixels: x right, y down, pixel centres
at integers. Canonical pixels: centred on the patch, ``-11.5 ... 11.5``, the patch covers ``[-12, 12]²``. Scale ``s =
sqrt(a² + b²)`` is in scene pixels per canonical pixel, rotation ``atan2(b, a)`` in radians (x axis towards y axis).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Num
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import biject_to, constraints

from foveate.model.errors import InputError

__all__ = [
    "CANONICAL_SIZE",
    "FlatGazePrior",
    "GazeParts",
    "GazePrior",
    "LocalChart",
    "apply",
    "compose",
    "corners",
    "from_landmarks",
    "from_parts",
    "identity",
    "inside",
    "inverse",
    "lattice",
    "log_prior",
    "overlap",
    "parts",
]

CANONICAL_SIZE = 24

# Left eye, right eye and mouth of a face in canonical pixels: the frame that all data sets share.
FACE_LANDMARKS = ((-5.0, -3.0), (5.0, -3.0), (0.0, 7.0))


class GazeParts(NamedTuple):
    """A gaze taken apart.

    Attributes:
        centre: ``(..., 2)`` scene pixels.
        scale: ``(...)`` scene pixels per canonical pixel.
        rotation: ``(...)`` radians.
    """

    centre: Tensor
    scale: Tensor
    rotation: Tensor


def identity(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Float[Tensor, "4"]:
    """The gaze ``(1, 0, 0, 0)``: canonical coordinates are scene coordinates."""
    return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)


def compose(outer: Float[Tensor, "*#batch 4"], inner: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch 4"]:
    """The gaze that applies `inner` first and `outer` to its result; leading dimensions broadcast."""
    a, b, tx, ty = outer.unbind(-1)
    c, d, ux, uy = inner.unbind(-1)
    return torch.stack([a * c - b * d, b * c + a * d, a * ux - b * uy + tx, b * ux + a * uy + ty], -1)


def inverse(gaze: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """The gaze that undoes `gaze`: scene to canonical. A scale of 0 has no inverse: what comes back is not finite."""
    a, b, tx, ty = gaze.unbind(-1)
    square = a * a + b * b
    c, d = a / square, -b / square
    return torch.stack([c, d, -(c * tx - d * ty), -(d * tx + c * ty)], -1)


def apply(gaze: Float[Tensor, "*#batch 4"], points: Float[Tensor, "*#batch 2"]) -> Float[Tensor, "*batch 2"]:
    """Canonical `points` ``(..., 2)`` holding ``(px, py)`` carried to the scene; leading dimensions broadcast.

    Convention: as the module. A set of points under each gaze is ``apply(gaze[..., None, :], points)``.
    """
    a, b, tx, ty = gaze.unbind(-1)
    px, py = points.unbind(-1)
    return torch.stack([a * px - b * py + tx, b * px + a * py + ty], -1)


def from_parts(
    centre: Float[Tensor, "*#batch 2"], scale: Float[Tensor, "*#batch"], rotation: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch 4"]:
    """A gaze from its centre (scene pixels), scale (scene px per canonical px) and rotation (radians)."""
    a, b = scale * torch.cos(rotation), scale * torch.sin(rotation)
    tx, ty = centre.unbind(-1)
    return torch.stack(torch.broadcast_tensors(a, b, tx, ty), -1)


def parts(gaze: Float[Tensor, "*batch 4"]) -> GazeParts:
    """Centre, scale and rotation of a gaze: the inverse of `from_parts`."""
    a, b = gaze[..., 0], gaze[..., 1]
    return GazeParts(gaze[..., 2:], torch.sqrt(a * a + b * b), torch.atan2(b, a))


def from_landmarks(
    left_eye: Float[Tensor, "*batch 2"], right_eye: Float[Tensor, "*batch 2"], mouth: Float[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch 4"]:
    """Least-squares similarity that maps the canonical eyes (-5, -3), (5, -3) and mouth (0, 7) onto three scene points.

    Convention: "left" is the left side of the image; scene pixels, x right, y down.
    """
    scene = torch.stack([left_eye, right_eye, mouth], -2)
    canonical = torch.tensor(FACE_LANDMARKS, dtype=scene.dtype, device=scene.device)
    p = canonical - canonical.mean(0)
    q = scene - scene.mean(-2, keepdim=True)
    # Complex least squares: multiplier = sum(conj(p) q) / sum |p|².
    square = (p * p).sum()
    a = (p * q).sum((-2, -1)) / square
    b = (p[:, 0] * q[..., 1] - p[:, 1] * q[..., 0]).sum(-1) / square
    mx, my = canonical.mean(0)
    tx, ty = scene.mean(-2).unbind(-1)
    return torch.stack([a, b, tx - (a * mx - b * my), ty - (b * mx + a * my)], -1)


def lattice(
    size: int | tuple[int, int] = CANONICAL_SIZE,
    extent: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "rows columns 2"]:
    """Canonical points ``(row, column, (px, py))`` of a lattice that is `extent` canonical patches wide.

    Args:
        size: points along a side, or ``(rows, columns)``.
        extent: the width (all columns) in canonical patches.
        dtype: of the points.
        device: of the points.

    Convention: centred on the patch; the step is ``24 extent / columns`` canonical pixels both ways, outermost points
    half a step inside.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    step = CANONICAL_SIZE * extent / columns
    cx = (torch.arange(columns, dtype=dtype, device=device) - (columns - 1) / 2) * step
    cy = (torch.arange(rows, dtype=dtype, device=device) - (rows - 1) / 2) * step
    py, px = torch.meshgrid(cy, cx, indexing="ij")
    return torch.stack([px, py], -1)


def corners(gaze: Float[Tensor, "*batch 4"], extent: float = 1.0) -> Float[Tensor, "*batch 4 2"]:
    """Scene corners of the patch's outline ``[-12, 12]² · extent``, clockwise on the screen from the top left."""
    h = CANONICAL_SIZE / 2 * extent
    square = torch.tensor([[-h, -h], [h, -h], [h, h], [-h, h]], dtype=gaze.dtype, device=gaze.device)
    return apply(gaze[..., None, :], square)


def inside(gaze: Float[Tensor, "*batch 4"], height: int, width: int) -> Bool[Tensor, "*batch"]:
    """Whether the gaze's centre lies on a picture of `height` × `width` pixels (pixel centres at integers)."""
    x, y = gaze[..., 2], gaze[..., 3]
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def overlap(first: Float[Tensor, "*#batch 4"], second: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Intersection over union of the two 24×24 squares that two gazes put on the scene, exact, in [0, 1].

    Convention: the squares are those of `corners`. Leading dimensions broadcast. Computed in the first square's own
    frame, where it is the unit square, so that float32 does not lose the area of a small patch far from the origin.
    """
    first, second = torch.broadcast_tensors(first, second)
    dtype = first.dtype
    relative = compose(inverse(first.double()), second.double())
    moved = corners(relative) / (CANONICAL_SIZE / 2)
    unit = corners(identity(torch.float64, first.device)) / (CANONICAL_SIZE / 2)
    unit = unit.expand_as(moved)
    tolerance = 1e-9
    # The intersection of two convex polygons is the hull of: corners of each inside the other, and crossings of their
    # edges.
    back = apply(inverse(relative)[..., None, :], unit * (CANONICAL_SIZE / 2)) / (CANONICAL_SIZE / 2)
    unit_in = (back.abs() <= 1 + tolerance).all(-1)
    moved_in = (moved.abs() <= 1 + tolerance).all(-1)
    p, r = unit[..., :, None, :], (unit.roll(-1, -2) - unit)[..., :, None, :]
    q, s = moved[..., None, :, :], (moved.roll(-1, -2) - moved)[..., None, :, :]
    cross = r[..., 0] * s[..., 1] - r[..., 1] * s[..., 0]
    parallel = cross.abs() < 1e-12
    safe = torch.where(parallel, torch.ones_like(cross), cross)
    d = q - p
    t = (d[..., 0] * s[..., 1] - d[..., 1] * s[..., 0]) / safe
    w = (d[..., 0] * r[..., 1] - d[..., 1] * r[..., 0]) / safe
    crossing_in = ~parallel & (t >= 0) & (t <= 1) & (w >= 0) & (w <= 1)
    crossing = p + t[..., None] * r
    points = torch.cat([unit, moved, crossing.flatten(-3, -2)], -2)
    valid = torch.cat([unit_in, moved_in, crossing_in.flatten(-2)], -1)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    middle = (points * valid[..., None]).sum(-2, keepdim=True) / count[..., None]
    offset = torch.where(valid[..., None], points - middle, torch.zeros_like(points))
    angle = torch.where(valid, torch.atan2(offset[..., 1], offset[..., 0]), torch.full_like(offset[..., 0], math.inf))
    order = angle.argsort(-1)
    ring = offset.gather(-2, order[..., None].expand_as(offset))
    # Points that are not valid sort last; put the first point in their place so that they enclose no area.
    ring_valid = valid.gather(-1, order)
    ring = torch.where(ring_valid[..., None], ring, ring[..., :1, :])
    following = ring.roll(-1, -2)
    area = 0.5 * (ring[..., 0] * following[..., 1] - ring[..., 1] * following[..., 0]).sum(-1).clamp(min=0)
    union = 4.0 + 4.0 * (relative[..., 0] ** 2 + relative[..., 1] ** 2) - area
    return torch.nan_to_num(area / union, nan=0.0).to(dtype)


class LocalChart:
    """Coordinates ``z (..., 4)`` of gazes near a base gaze: ``u = base ∘ δ(z)``.

    ``δ(z)`` has centre ``(scales[0] z1, scales[1] z2)`` in the base's own canonical pixels, scale ``exp(scales[2]
    z3)`` and rotation ``scales[3] z4`` radians, so z = 0 is the base itself. The default scales make unit steps
    comparable for HMC.

    Convention: as `foveate.model.gaze`; `base` broadcasts against ``z``'s leading dimensions.
    """

    def __init__(
        self, base: Float[Tensor, "*batch 4"], scales: tuple[float, float, float, float] = (1.0, 1.0, 0.125, 0.125)
    ):
        self.base = base
        self.scales = scales

    def to_gaze(self, z: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
        """Chart coordinates to gazes."""
        k = self.scales
        change = from_parts(
            torch.stack([k[0] * z[..., 0], k[1] * z[..., 1]], -1), torch.exp(k[2] * z[..., 2]), k[3] * z[..., 3]
        )
        return compose(self.base, change)

    def to_chart(self, gaze: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
        """Gazes to chart coordinates; the rotation comes back in (-π, π]."""
        centre, scale, rotation = parts(compose(inverse(self.base), gaze))
        k = self.scales
        return torch.stack([centre[..., 0] / k[0], centre[..., 1] / k[1], torch.log(scale) / k[2], rotation / k[3]], -1)

    def log_det(self, z: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
        r"""Log of \|∂(a, b, tx, ty)/∂z\|: add it to a log density over (a, b, tx, ty) to have the density over z.

        ``da db = s² dlog s dθ`` and the offsets are in the base's own pixels, another ``s₀²``:
        :math:`4\log s_0 + 2 k_3 z_3 + \sum_i \log k_i`.
        """
        base_log_scale = torch.log(self.base[..., 0] ** 2 + self.base[..., 1] ** 2) / 2
        return 4 * base_log_scale + 2 * self.scales[2] * z[..., 2] + sum(math.log(k) for k in self.scales)


class GazePrior(TorchDistribution):
    r"""A proper prior over gazes, given the size of each picture; a density over ``(a, b, tx, ty)``.

    The centre is uniform over the picture with logistic edges of width `edge` × shorter side (uniform plus logistic
    noise, so the density is smooth and HMC meets no wall); ``log s`` is normal about ``log(typical × shorter side /
    24)`` with sd `log_scale_sd`; the rotation is a wrapped normal about 0 with sd `rotation_sd`. With s and θ in
    polar form the density over (a, b) carries ``1/s²``.

    Args:
        size: ``(..., 2)`` holding (height, width) of each picture in pixels; its leading shape is the batch shape.
        typical: median patch width as a share of the shorter side.
        log_scale_sd: sd of the log-scale.
        rotation_sd: radians, at most π: all rotations are about as likely then.
        edge: width of the logistic edge as a share of the shorter side.

    Settings may also be tensors, for one of each picture of the batch shape, and be learned: `log_prob` is
    differentiable in them.

    Raises:
        InputError: `rotation_sd` is larger, or a setting is not positive.
    """

    arg_constraints = {}  # pyright: ignore[reportAssignmentType]
    support = constraints.real_vector  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        size: Num[Tensor, "*batch 2"],
        typical: float | Tensor = 0.3,
        log_scale_sd: float | Tensor = 0.6,
        rotation_sd: float | Tensor = 0.25,
        edge: float | Tensor = 0.05,
        validate_args: bool | None = None,
    ):
        _check_positive(typical=typical, log_scale_sd=log_scale_sd, rotation_sd=rotation_sd, edge=edge)
        # The turns that `log_prob` sums over hold the mass of no wider a normal.
        if not bool(torch.as_tensor(rotation_sd <= math.pi).all()):
            raise InputError(f"rotation_sd={rotation_sd}: at most π; all rotations are about as likely then")
        self.size = _floating(size)
        self.typical, self.log_scale_sd, self.rotation_sd, self.edge = typical, log_scale_sd, rotation_sd, edge
        super().__init__(size.shape[:-1], torch.Size([4]), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "GazePrior":
        return _expanded(self, GazePrior, batch_shape, _instance)

    def _shorter(self) -> Tensor:
        return self.size.amin(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            size, shorter = self.size.expand(*shape, 2), self._shorter().expand(shape)
            uniform = torch.rand(*shape, 2, dtype=size.dtype, device=size.device)
            noise = torch.rand(*shape, 2, dtype=size.dtype, device=size.device).clamp(1e-6, 1 - 1e-6)
            extent = size.flip(-1)  # (width, height), to go with (x, y)
            centre = -0.5 + extent * uniform + torch.logit(noise) * (self.edge * shorter)[..., None]
            normal = torch.randn(*shape, 2, dtype=size.dtype, device=size.device)
            scale = self.typical * shorter / CANONICAL_SIZE * torch.exp(self.log_scale_sd * normal[..., 0])
            return from_parts(centre, scale, self.rotation_sd * normal[..., 1])

    def log_prob(self, value: Tensor) -> Tensor:
        centre, scale, rotation = parts(value)
        shorter = self._shorter()
        root = math.sqrt(2 * math.pi)
        w = (self.edge * shorter)[..., None]
        extent = self.size.flip(-1)
        low, high = (centre + 0.5) / w, (centre + 0.5 - extent) / w
        # log[(σ(low) - σ(high)) / extent], written with logsigmoids so that it keeps its gradient far outside the
        # picture.
        position = (
            torch.nn.functional.logsigmoid(low)
            + torch.nn.functional.logsigmoid(-high)
            + torch.log(-torch.expm1(-extent / w))
            - torch.log(extent)
        ).sum(-1)
        log_scale = torch.log(scale) - torch.log(self.typical * shorter / CANONICAL_SIZE)
        of_scale = -0.5 * (log_scale / self.log_scale_sd) ** 2 - _log(self.log_scale_sd * root)
        turns = 2 * math.pi * torch.arange(-2, 3, dtype=value.dtype, device=value.device)
        sd = self.rotation_sd
        of_each = ((rotation[..., None] + turns) / (sd[..., None] if isinstance(sd, Tensor) else sd)) ** 2
        of_rotation = torch.logsumexp(-0.5 * of_each, -1) - _log(sd * root)
        return position + of_scale + of_rotation - 2 * torch.log(scale)


class FlatGazePrior(TorchDistribution):
    """The paper's flat prior made proper: uniform over a bounded box in ``(a, b, tx, ty)``.

    ``a`` and ``b`` lie within ±`largest` × shorter side / 24, the centre on the picture.

    Args:
        size: ``(..., 2)`` holding (height, width) of each picture in pixels.
        largest: largest patch width as a share of the shorter side.

    Raises:
        InputError: `largest` is not positive.
    """

    arg_constraints = {}  # pyright: ignore[reportAssignmentType]

    def __init__(self, size: Num[Tensor, "*batch 2"], largest: float = 1.5, validate_args: bool | None = None):
        _check_positive(largest=largest)
        self.size, self.largest = _floating(size), largest
        super().__init__(size.shape[:-1], torch.Size([4]), validate_args=validate_args)

    def _box(self) -> tuple[Tensor, Tensor]:
        half = self.largest * self.size.amin(-1) / CANONICAL_SIZE
        low = torch.full_like(half, -0.5)
        return (
            torch.stack([-half, -half, low, low], -1),
            torch.stack([half, half, self.size[..., 1] - 0.5, self.size[..., 0] - 0.5], -1),
        )

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        low, high = self._box()
        return constraints.independent(constraints.interval(low, high), 1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "FlatGazePrior":
        return _expanded(self, FlatGazePrior, batch_shape, _instance)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with torch.no_grad():
            low, high = self._box()
            shape = torch.Size(sample_shape) + low.shape
            return low + (high - low) * torch.rand(shape, dtype=low.dtype, device=low.device)

    def log_prob(self, value: Tensor) -> Tensor:
        low, high = self._box()
        within = ((value >= low) & (value <= high)).all(-1)
        log_volume = torch.log(high - low).sum(-1)
        return torch.where(within, -log_volume, torch.full_like(log_volume, -math.inf))


def log_prior(prior: TorchDistributionMixin, gaze: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Log-density of gazes under a prior of any kind, -inf outside its support.

    What lies outside, as the end of a trajectory that diverged does, is not shown to a distribution that may refuse it.

    Convention: gazes as the module; the prior's batch broadcasts against theirs.
    """
    if type(prior) in (GazePrior, FlatGazePrior):
        return prior.log_prob(gaze)
    within = prior.support.check(gaze)
    if bool(within.all()):
        return prior.log_prob(gaze)
    inside = biject_to(prior.support)(torch.ones_like(gaze))
    return torch.where(within, prior.log_prob(torch.where(within[..., None], gaze, inside)), -math.inf)


def _check_positive(**settings: float | Tensor) -> None:
    for name, value in settings.items():
        if isinstance(value, Tensor):
            positive = bool(((value > 0) & value.isfinite()).all())
        else:
            positive = value > 0 and math.isfinite(value)
        if not positive:
            raise InputError(f"{name}={value}: a positive number is needed")


def _log(value: float | Tensor) -> float | Tensor:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _floating(size: Tensor) -> Tensor:
    """Sizes in pixels are integers in a `Pyramid`."""
    return size if size.is_floating_point() else size.to(torch.get_default_dtype())


_Prior = TypeVar("_Prior", GazePrior, FlatGazePrior)


def _expanded(prior: _Prior, kind: type[_Prior], batch_shape: Sequence[int], instance: object) -> _Prior:
    """A prior for more scenes, of its own subclass; one with an ``__init__`` of its own needs an `expand`, too."""
    new = cast(_Prior, prior._get_checked_instance(kind, instance))
    new.__dict__.update(prior.__dict__)
    new.size = prior.size.expand(*batch_shape, 2)
    TorchDistribution.__init__(new, torch.Size(batch_shape), torch.Size([4]), validate_args=False)
    new._validate_args = prior._validate_args
    return new
