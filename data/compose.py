"""Scenes composed at known gazes: objects, such as the ORL faces, pasted into the photographs of scikit-image.

Convention (the whole module): gazes, canonical and scene pixels as in `foveate.model.gaze`. The **width of a face** is
the width of its 24×24 canonical square, ``24 s`` scene pixels for a gaze of scale s. Scene i of a seed is the same
however many are asked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from foveate.data.faces import locate_package, orl_faces
from foveate.data.pictures import MINIMUM_SIDE, Picture, decode
from foveate.data.scenes import Scenes
from foveate.model import gaze
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid

__all__ = [
    "SIZES",
    "TwoFaceScenes",
    "compose_scenes",
    "orl_clutter",
    "orl_scenes",
    "photographs",
    "two_face_scenes",
]

# Height and width of composed scenes in pixels, drawn evenly.
SIZES = ((240, 320), (224, 288), (256, 256), (300, 400), (320, 240))
TWO_FACE_SIZES = ((240, 400), (224, 360), (256, 384), (300, 450))

# The 17 photographs inside the scikit-image wheel on which no human face is to be seen, each in one split alone. Left
# out are the astronaut (a face), the second view of the motorcycle (the same place twice) and what is no photograph
# (logo, phantom, ...). Of `camera` only the right third counts, the meadow beside the photographer; the cat `chelsea`
# is a hard example to train on.
PHOTOGRAPHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "train": (
            "brick.png",
            "camera.png",
            "chelsea.png",
            "clock_motion.png",
            "coins.png",
            "grass.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "moon.png",
            "motorcycle_left.png",
            "page.png",
        ),
        "test": ("cell.png", "coffee.png", "gravel.png", "retina.jpg", "rocket.jpg", "text.png"),
    }
)
# (top, bottom, left, right) of what counts of a photograph.
PART_THAT_COUNTS = {"camera.png": (0, 512, 330, 512)}

# Share of the shorter side that a face is wide, and largest turn: the range of the main job.
FACE_WIDTH = (0.12, 0.45)
LARGEST_TURN = math.radians(25.0)
TWO_FACE_WIDTH = (0.24, 0.42)
TWO_FACE_TURN = math.radians(15.0)

# Independent streams of random numbers under one seed.
STREAMS = {
    "train": 1,
    "test": 2,
    "clutter train": 3,
    "clutter test": 4,
    "two train": 5,
    "two test": 6,
    "joined": 7,
    "own": 8,
}

# A head in canonical pixels: centre of the ellipse, range of its half-axes across, up (hair) and down (chin); the neck
# is this wide and ends with the portrait.
HEAD_CENTRE = (0.0, -0.8)
HEAD_HALF_AXES = ((9.0, 11.5), (12.0, 16.5), (11.8, 13.2))
NECK_HALF_WIDTH = 5.5
# Where a stand-in for a portrait has its face: the median of the ORL gazes.
TYPICAL_PORTRAIT = (3.43, 0.0, 46.0, 60.0)
PORTRAIT_SIZE = (112, 92)


def photographs(split: str) -> dict[str, np.ndarray]:
    """The photographs behind the composed scenes of one split, by name: uint8 ``(height, width)``.

    They ship inside the scikit-image wheel, which is found but not imported; nothing is downloaded. No human face is on
    them, and no photograph is in both splits.

    Raises:
        InputError: scikit-image is not installed or lacks one of them, or an unknown split.
    """
    if split not in PHOTOGRAPHS:
        raise InputError(f"unknown split '{split}'; composed scenes have train and test")
    return dict(_photographs(split))


def orl_scenes(split: str, n: int, seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> Scenes:
    """Composed scenes: one ORL face each, at a known random gaze in a photograph, with lighting, blur and noise.

    Train and test share no person and no photograph. The face is 0.12 to 0.45 of the shorter side wide (log-uniform),
    turned by at most ±25°, its square wholly inside the picture. Scene i is the same whatever `n` is; scenes are
    rendered when looked at.

    Args:
        split: people 1 to 30 and 11 photographs for ``"train"``, people 31 to 40 and 6 others for ``"test"``.
        n: how many scenes.
        seed: of all that is random.
        sizes: (height, width) in pixels, drawn evenly.

    Returns:
        `Scenes` with gazes, people and splits, their pictures quantised to 8 bits.

    Convention: as the module.

    Raises:
        InputError: a package is missing (``pip install 'foveate[demo]'``), or an unknown split.
    """
    backgrounds = list(photographs(split).values())
    faces = orl_faces(split)
    scenes = _compose(
        faces, backgrounds, n, (seed, STREAMS[split]), sizes, FACE_WIDTH, LARGEST_TURN, f"orl_{split}", True
    )
    return scenes.with_people(scenes.people, [split] * n)


def orl_clutter(split: str, n: int, seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> Scenes:
    """Scenes made like `orl_scenes` with nobody in them: `Scenes` without gazes, on the same photographs.

    Raises:
        InputError: see `orl_scenes`.
    """
    _check_request(n, seed, sizes)
    backgrounds = tuple(photographs(split).values())
    pictures = []
    for i in range(n):
        entropy = (seed, STREAMS[f"clutter {split}"], i)
        size = sizes[int(_uniforms(entropy, 1)[0] * len(sizes))]
        pictures.append(ComposedPicture(size, backgrounds, (), entropy))
    return Scenes(pictures, [f"orl_clutter_{split}_{i:05d}" for i in range(n)], splits=[split] * n)


def compose_scenes(
    objects: Scenes,
    backgrounds: Sequence[np.ndarray],
    n: int,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = SIZES,
    width: tuple[float, float] = FACE_WIDTH,
    turn: float = LARGEST_TURN,
    shoulders: bool = False,
) -> Scenes:
    """Paste objects of any kind into photographs at known random gazes, behind a soft ellipse.

    Args:
        objects: labelled pictures to cut the objects from, each drawn with equal chance.
        backgrounds: uint8 ``(height, width)`` photographs.
        n: how many scenes.
        seed: of all that is random.
        sizes: (height, width) of the scenes in pixels, drawn evenly.
        width: least and largest width of the canonical square as a share of the shorter side, log-uniform between.
        turn: largest rotation in radians, uniform in ± it.
        shoulders: put a clothed torso below most objects, as suits heads.

    Returns:
        `Scenes` with gazes and the objects' people.

    Convention: as the module.

    Raises:
        InputError: an object has no gaze; there is no object, no photograph or one of another kind; a size or width is
            none; or a square of the largest width, turned, does not fit into the smallest scene.
    """
    entropy = (seed, STREAMS["own"])
    return _compose(objects, backgrounds, n, entropy, sizes, width, turn, "composed", shoulders)


@dataclass(frozen=True)
class TwoFaceScenes:
    """Scenes with two people side by side, for asking who is attended.

    Attributes:
        scenes: the pictures, without gazes (each has two).
        gazes: ``(scene, person, 4)`` float64 true gazes, the left person first.
        people: who the two are.
        other_crops: ``(scene, person, 24, 24)`` in [0, 1]: the true crop of **another** picture of the same person.

    Convention: as the module.
    """

    scenes: Scenes
    gazes: Float64[Tensor, "scene 2 4"]
    people: tuple[tuple[str, str], ...]
    other_crops: Float[Tensor, "scene 2 24 24"]

    def __len__(self) -> int:
        return len(self.scenes)

    @cached_property
    def own_crops(self) -> Float[Tensor, "scene 2 24 24"]:
        """``(scene, person, 24, 24)``: the crops at the true gazes in the scenes themselves; renders every scene."""
        rows = [
            Pyramid.build([scene.picture]).extract(of[None].float())[0]
            for scene, of in zip(self.scenes, self.gazes, strict=True)
        ]
        return torch.stack(rows)


def two_face_scenes(n: int, split: str = "test", seed: int = 0, source: Scenes | None = None) -> TwoFaceScenes:
    """Scenes with two different people side by side whose canonical squares do not overlap.

    Without `source`: two ORL people of the split in one photograph, faces 0.24 to 0.42 of the height wide, turned by at
    most ±15°. With `source` (such as ``caltech_faces(DIR, "test")``): two of its scenes, of two people, joined along a
    vertical edge as in the paper; the taller is cut to the height of the lower, around its face.

    Args:
        n: how many scenes.
        split: of the ORL people and photographs; `source` brings its own people.
        seed: of all that is random; scene i is the same whatever `n` is.
        source: labelled scenes with people, at least two of whom have two scenes or more.

    Raises:
        InputError: `source` has no gazes or people, or fewer than two people with two scenes; or see `orl_scenes`.
    """
    _check_request(n, seed)
    if source is None:
        return _two_orl_faces(n, split, seed)
    return _joined_faces(source, n, seed)


class _Paste(NamedTuple):
    """One object to be pasted: its picture, its gaze there, its gaze in the scene; whether a torso is put below."""

    portrait: Tensor
    own_gaze: tuple[float, ...]
    scene_gaze: tuple[float, ...]
    shoulders: bool


@dataclass(frozen=True, eq=False)
class ComposedPicture:
    """A scene that is rendered when it is read.

    Attributes:
        size: height and width in pixels.
        backgrounds: the photographs to draw from.
        pastes: objects with their gazes, painted in order.
        entropy: seeds everything that is random about the rendering.
    """

    size: tuple[int, int]
    backgrounds: tuple[np.ndarray, ...]
    pastes: tuple["_Paste", ...]
    entropy: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Render: uint8 ``(height, width)``."""
        # The last number keeps the rendering's random numbers apart from those that placed the objects.
        rng = np.random.default_rng([*self.entropy, 1])
        scene = _background(rng, self.backgrounds, self.size)
        self._add_decoys(rng, scene)
        # All torsos before all heads, so that none covers another's face.
        for paste in self.pastes:
            if paste.shoulders and rng.random() < 0.75:
                _paint_shoulders(rng, scene, paste.scene_gaze, self.backgrounds)
        for paste in self.pastes:
            portrait = _lit(rng, paste.portrait.numpy())
            _paint(rng, scene, portrait, paste.own_gaze, paste.scene_gaze, neck=paste.shoulders)
        return _photographed(rng, scene)

    def _add_decoys(self, rng: np.random.Generator, scene: np.ndarray) -> None:
        """Paste pieces of photographs behind the same soft ellipse, so that the paste itself betrays no object."""
        height, width = self.size
        for _ in range(rng.integers(0, 3)):
            scale = min(self.size) * rng.uniform(*FACE_WIDTH) / gaze.CANONICAL_SIZE
            turn = rng.uniform(-LARGEST_TURN, LARGEST_TURN)
            at = (scale * math.cos(turn), scale * math.sin(turn), rng.uniform(0, width), rng.uniform(0, height))
            piece = _crop(rng, self.backgrounds, PORTRAIT_SIZE)
            shoulders = bool(rng.random() < 0.5)
            if all(_apart(at, paste.scene_gaze) for paste in self.pastes):
                if shoulders:
                    _paint_shoulders(rng, scene, at, self.backgrounds)
                _paint(rng, scene, _lit(rng, piece), TYPICAL_PORTRAIT, at, neck=shoulders)


@dataclass(frozen=True, eq=False)
class JoinedPicture:
    """Two pictures side by side, each cut to the rows ``[top, top + height)``.

    Attributes:
        parts: the left and the right picture.
        tops: first row kept of each.
        height: rows kept.
    """

    parts: tuple[Picture, Picture]
    tops: tuple[int, int]
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, sum(part.size[1] for part in self.parts)

    def read(self) -> np.ndarray:
        """Decode both and join them: uint8 if both are, float32 otherwise."""
        cut = [part.read()[top : top + self.height] for part, top in zip(self.parts, self.tops, strict=True)]
        if any(part.dtype != np.uint8 for part in cut):
            cut = [part / np.float32(255) if part.dtype == np.uint8 else part for part in cut]
        return np.concatenate(cut, 1)


def _check_request(n: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    if n < 1:
        raise InputError(f"{n} composed scenes; ask for at least one")
    if seed < 0:
        raise InputError(f"seed {seed}: composed scenes need a seed of 0 or more")
    if not sizes:
        raise InputError("composing needs at least one size (height, width)")
    for size in sizes:
        if len(size) != 2 or min(size) < MINIMUM_SIDE:
            raise InputError(f"a scene of size {tuple(size)}: needed is (height, width), both at least {MINIMUM_SIDE}")


def _check_backgrounds(backgrounds: Sequence[np.ndarray]) -> None:
    if not len(backgrounds):
        raise InputError("composing needs at least one photograph")
    for i, photograph in enumerate(backgrounds):
        kind = getattr(photograph, "dtype", type(photograph).__name__)
        if kind != np.uint8 or photograph.ndim != 2 or min(photograph.shape) < MINIMUM_SIDE:
            raise InputError(
                f"photograph {i} is of {kind} and shape {np.shape(photograph)}: needed is a uint8 array "
                f"(height, width), both at least {MINIMUM_SIDE}"
            )


def _uniforms(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """The first uniforms of a scene's own stream: they place its objects."""
    return np.random.default_rng([*entropy, 0]).random(count)


@lru_cache(maxsize=2)
def _photographs(split: str) -> dict[str, np.ndarray]:
    folder = locate_package("skimage") / "data"
    held = {}
    for name in PHOTOGRAPHS[split]:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: this scikit-image lacks the photograph; run: pip install 'foveate[demo]'"
            )
        top, bottom, left, right = PART_THAT_COUNTS.get(name, (0, None, 0, None))
        held[name] = decode(folder / name)[top:bottom, left:right]
    return held


def _compose(
    objects: Scenes,
    backgrounds: Sequence[np.ndarray],
    n: int,
    entropy: tuple[int, ...],
    sizes: Sequence[tuple[int, int]],
    width: tuple[float, float],
    turn: float,
    name: str,
    shoulders: bool,
) -> Scenes:
    """`compose_scenes` with its stream of random numbers chosen."""
    _check_request(n, entropy[0], sizes)
    _check_backgrounds(backgrounds)
    if objects.gazes is None or bool(objects.gazes.isnan().any()):
        raise InputError("every object needs a gaze to be cut out by; leave out those without: objects.labelled()")
    if not 0 < width[0] <= width[1]:
        raise InputError(f"width={width}: needed are the least and the largest share of the shorter side, above 0")
    for height, across in sizes:
        if width[1] * min(height, across) * (math.cos(turn) + math.sin(turn)) > min(height, across):
            raise InputError(
                f"a square {width[1]:g} of the shorter side wide, turned by {turn:g} rad, does not fit; take less"
            )
    u = np.stack([_uniforms((*entropy, i), 6) for i in range(n)])
    chosen_sizes = [sizes[k] for k in (u[:, 0] * len(sizes)).astype(int)]
    chosen = (u[:, 1] * len(objects)).astype(int)
    v = torch.from_numpy(u)
    size = v.new_tensor(chosen_sizes).reshape(-1, 2)
    share = width[0] * (width[1] / width[0]) ** v[:, 2]
    scale = share * size.amin(-1) / gaze.CANONICAL_SIZE
    rotation = turn * (2 * v[:, 3] - 1)
    gazes = _placed(scale, rotation, size, v[:, 4:6])
    portraits = dict(zip(chosen.tolist(), objects.pictures(chosen.tolist()), strict=True))
    pictures = [
        ComposedPicture(
            chosen_sizes[i],
            tuple(backgrounds),
            (_Paste(portraits[k], tuple(objects.gazes[k].tolist()), tuple(gazes[i].tolist()), shoulders),),
            (*entropy, i),
        )
        for i, k in enumerate(chosen.tolist())
    ]
    people = None if objects.people is None else [objects.people[k] for k in chosen.tolist()]
    return Scenes(pictures, [f"{name}_{i:05d}" for i in range(n)], gazes, people)


def _placed(scale: Tensor, rotation: Tensor, size: Tensor, uniform: Tensor, offset: Tensor | None = None) -> Tensor:
    """Gazes ``(n, 4)`` whose square is wholly inside a box of `size` (height, width), the centre uniform there."""
    centred = gaze.from_parts(torch.zeros_like(uniform), scale, rotation)
    half = gaze.corners(centred).amax(-2)
    extent = size.flip(-1)
    centre = half - 0.5 + (extent - 2 * half) * uniform
    return gaze.from_parts(centre if offset is None else centre + offset, scale, rotation)


def _two_orl_faces(n: int, split: str, seed: int) -> TwoFaceScenes:
    faces, backgrounds = orl_faces(split), tuple(photographs(split).values())
    gazes_of_faces = _known(faces)
    pairs = [_pair(faces, (seed, STREAMS[f"two {split}"], i)) for i in range(n)]
    u = np.stack([_uniforms((seed, STREAMS[f"two {split}"], i), 10) for i in range(n)])
    v = torch.from_numpy(u)
    chosen_sizes = [TWO_FACE_SIZES[k] for k in (u[:, 0] * len(TWO_FACE_SIZES)).astype(int)]
    size = torch.tensor(chosen_sizes, dtype=torch.float64).reshape(-1, 2)
    share = TWO_FACE_WIDTH[0] + (TWO_FACE_WIDTH[1] - TWO_FACE_WIDTH[0]) * v[:, 1]
    half_size = torch.stack([size[:, 0], (size[:, 1] / 2).floor()], -1)
    both = []
    for side in range(2):
        # The two people stand about as far away: their widths differ by a tenth at most, both ways.
        scale = share * (0.9 + 0.2 * v[:, 2 + side]) * size[:, 0] / gaze.CANONICAL_SIZE
        rotation = TWO_FACE_TURN * (2 * v[:, 4 + side] - 1)
        offset = side * torch.stack([half_size[:, 1], torch.zeros(n, dtype=torch.float64)], -1)
        both.append(_placed(scale, rotation, half_size, v[:, 6 + 2 * side : 8 + 2 * side], offset))
    gazes = torch.stack(both, 1)
    pictures = []
    for i, pair in enumerate(pairs):
        pastes = tuple(
            _Paste(faces.pictures([k])[0], tuple(gazes_of_faces[k].tolist()), tuple(gazes[i, side].tolist()), True)
            for side, k in enumerate(pair.shown)
        )
        pictures.append(ComposedPicture(chosen_sizes[i], backgrounds, pastes, (seed, STREAMS[f"two {split}"], i)))
    scenes = Scenes(pictures, [f"two_faces_{split}_{i:05d}" for i in range(n)])
    return TwoFaceScenes(scenes, gazes, tuple(pair.people for pair in pairs), _crops(faces, pairs))


def _joined_faces(source: Scenes, n: int, seed: int) -> TwoFaceScenes:
    gazes_of_source = _known(source)
    pairs = [_pair(source, (seed, STREAMS["joined"], i)) for i in range(n)]
    pictures, gazes = [], []
    for pair in pairs:
        parts = [source.source(k) for k in pair.shown]
        height = min(part.size[0] for part in parts)
        tops = [
            int(min(max(0, round(float(gazes_of_source[k, 3]) - height / 2)), part.size[0] - height))
            for k, part in zip(pair.shown, parts, strict=True)
        ]
        joined = JoinedPicture((parts[0], parts[1]), (tops[0], tops[1]), height)
        shift = torch.tensor([[0, 0, 0, -tops[0]], [0, 0, parts[0].size[1], -tops[1]]], dtype=torch.float64)
        pictures.append(joined)
        gazes.append(gazes_of_source[list(pair.shown)] + shift)
    scenes = Scenes(pictures, [f"joined_{i:05d}" for i in range(n)])
    return TwoFaceScenes(scenes, torch.stack(gazes), tuple(pair.people for pair in pairs), _crops(source, pairs))


class _Pair(NamedTuple):
    """Two people, which picture of each is shown, and which other picture of each is given as v."""

    people: tuple[str, str]
    shown: tuple[int, int]
    other: tuple[int, int]


def _known(scenes: Scenes) -> Tensor:
    if scenes.gazes is None or scenes.people is None or bool(scenes.gazes.isnan().any()):
        raise InputError(
            "two-face scenes need the gaze and the person of every scene; add the column 'person' to its label file"
        )
    return scenes.gazes


def _pair(scenes: Scenes, entropy: tuple[int, ...]) -> _Pair:
    """Two people with two pictures each, from a scene's own stream."""
    of_person: dict[str, list[int]] = {}
    for i, person in enumerate(scenes.people or ()):
        if person is not None:
            of_person.setdefault(person, []).append(i)
    several = {person: held for person, held in of_person.items() if len(held) > 1}
    if len(several) < 2:
        raise InputError(f"two-face scenes need two people with two pictures each; there are {len(several)}")
    rng = np.random.default_rng([*entropy, 2])
    left, right = (list(several)[k] for k in rng.choice(len(several), 2, replace=False))
    first, second = (rng.choice(several[person], 2, replace=False).tolist() for person in (left, right))
    return _Pair((left, right), (first[0], second[0]), (first[1], second[1]))


def _crops(scenes: Scenes, pairs: Sequence[_Pair]) -> Tensor:
    """``(pair, 2, 24, 24)``: the true crops of the pictures that are not shown."""
    gazes = _known(scenes)
    crops = {}
    for k in {k for pair in pairs for k in pair.other}:
        crops[k] = Pyramid.build(scenes.pictures([k])).extract(gazes[k][None].float())[0]
    return torch.stack([torch.stack([crops[k] for k in pair.other]) for pair in pairs])


def _crop(rng: np.random.Generator, photos: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """A random piece of a random photograph, turned, mirrored, zoomed and toned: float32 of `size`, in [0, 1]."""
    height, width = size
    photo = photos[int(rng.integers(len(photos)))]
    if rng.random() < 0.25:
        photo = np.rot90(photo)
    largest = min(photo.shape[0] / height, photo.shape[1] / width)
    # Not enlarged more than twice where the photograph allows it.
    zoom = largest * min(1.0, 0.5 / largest) ** rng.random()
    h, w = zoom * height, zoom * width
    y, x = rng.uniform(0, photo.shape[0] - h), rng.uniform(0, photo.shape[1] - w)
    box = (max(x, 0.0), max(y, 0.0), min(x + w, photo.shape[1]), min(y + h, photo.shape[0]))
    image = Image.fromarray(np.ascontiguousarray(photo)).resize((width, height), Image.Resampling.BILINEAR, box=box)
    piece = np.asarray(image, dtype=np.float32) / np.float32(255)
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    gain = rng.uniform(0.5, 1.1)
    return np.clip(gain * piece + (1 - gain) * np.float32(rng.random()), 0, 1).astype(np.float32)


def _background(rng: np.random.Generator, photos: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """One piece of a photograph, or several side by side and over one another as things stand in a room."""
    height, width = size
    scene = np.ascontiguousarray(_crop(rng, photos, size))
    if rng.random() < 0.6:
        for _ in range(rng.integers(1, 5)):
            h, w = int(height * rng.uniform(0.2, 1.0)), int(width * rng.uniform(0.15, 0.7))
            y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            scene[y : y + h, x : x + w] = _crop(rng, photos, (h, w))
    return scene


def _lit(rng: np.random.Generator, portrait: np.ndarray) -> np.ndarray:
    """A portrait under another light: gamma, gain, offset and a ramp across it."""
    height, width = portrait.shape
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    toned = np.power(portrait, math.exp(rng.normal(0, 0.25)), dtype=np.float32)
    ramp = rng.normal(0, 0.12) * x + rng.normal(0, 0.06) * y
    return np.clip(toned * (rng.uniform(0.7, 1.15) + ramp) + rng.uniform(-0.08, 0.12), 0, 1).astype(np.float32)


def _smooth(t: np.ndarray) -> np.ndarray:
    """Smooth step from 0 to 1 over [0, 1]."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _window(
    scene: np.ndarray, at: Sequence[float], box: tuple[float, float, float, float]
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The part of a scene that covers a box (left, top, right, bottom) in canonical pixels.

    Returns:
        Its rows and columns, and the canonical x and y of its pixels, each ``(rows, columns)`` float32.
    """
    where = torch.tensor(at, dtype=torch.float64)
    left, top, right, bottom = box
    outline = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=torch.float64)
    corners = gaze.apply(where, outline)
    low, high = corners.amin(0).floor().int().tolist(), corners.amax(0).ceil().int().tolist()
    height, width = scene.shape
    rows = slice(max(low[1], 0), max(min(high[1] + 1, height), 0))
    columns = slice(max(low[0], 0), max(min(high[0] + 1, width), 0))
    a, b, tx, ty = gaze.inverse(where).tolist()
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :]
    return (rows, columns), a * x - b * y + tx, b * x + a * y + ty


def _paint(
    rng: np.random.Generator,
    scene: np.ndarray,
    portrait: np.ndarray,
    own_gaze: Sequence[float],
    scene_gaze: Sequence[float],
    neck: bool,
) -> None:
    """Paste a portrait into the scene, in place, so that its own gaze lands on the scene's, behind a soft ellipse.

    Within the ellipse the portrait is opaque; a wider one adds hair and ears, wherever the portrait differs from its
    backdrop.
    """
    half_x, up, down = (rng.uniform(*axes) for axes in HEAD_HALF_AXES)
    part, px, py = _window(scene, scene_gaze, (-1.5 * half_x, -1.6 * up, 1.5 * half_x, 18.0))
    if px.size == 0:
        return
    y = py - HEAD_CENTRE[1]
    radius = np.hypot((px - HEAD_CENTRE[0]) / half_x, y / np.where(y < 0, np.float32(up), np.float32(down)))
    weight, wide = _smooth((1.06 - radius) / 0.2), _smooth((1.45 - radius) / 0.3)
    if neck:
        below = _smooth((NECK_HALF_WIDTH + 1 - np.abs(px)) / 2) * _smooth((py - 5) / 3)
        weight = np.maximum(weight, below)
    a, b, tx, ty = own_gaze
    x, y = a * px - b * py + tx, b * px + a * py + ty
    matte = _matte(portrait)
    step = math.hypot(*own_gaze[:2]) / math.hypot(*scene_gaze[:2])
    if step > 1:
        # Portrait pixels per scene pixel: blurred to half a scene pixel, of which the portrait's own pixels have half
        # of theirs.
        sd = 0.5 * math.sqrt(step * step - 1)
        portrait, matte = (gaussian_filter(layer, sd, mode="nearest") for layer in (portrait, matte))
    at = np.stack([y, x])
    weight = np.maximum(weight, wide * map_coordinates(matte, at, order=1, mode="nearest"))
    # The mask goes out before the portrait does.
    height, width = portrait.shape
    edge = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y))
    weight *= _smooth(edge / (0.07 * width))
    painted = map_coordinates(portrait, at, order=1, mode="nearest")
    scene[part] += weight * (painted - scene[part])


def _matte(portrait: np.ndarray) -> np.ndarray:
    """How surely each pixel of a portrait is not backdrop, in [0, 1]: by its difference from the grey at the sides."""
    height, width = portrait.shape
    strip = max(1, width // 15)
    left, right = (np.median(side[: height // 2]) for side in (portrait[:, :strip], portrait[:, -strip:]))
    backdrop = np.linspace(left, right, width, dtype=np.float32)
    differs = gaussian_filter(np.abs(portrait - backdrop), 1.0, mode="nearest")
    return _smooth((differs - 0.05) / 0.08).astype(np.float32)


def _paint_shoulders(
    rng: np.random.Generator, scene: np.ndarray, at: Sequence[float], photos: Sequence[np.ndarray]
) -> None:
    """Paint a clothed torso below a head, in place: a silhouette filled with a toned-down piece of a photograph."""
    slope, half = rng.uniform(6, 11), rng.uniform(20, 30)
    part, px, py = _window(scene, at, (-half - 20, 9.0, half + 20, 200.0))
    if px.size == 0 or min(px.shape) < 2:
        return
    across = np.abs(px)
    top = 12.5 + slope * (across / half) ** 2.5
    weight = _smooth((py - top) / 0.8 + 0.5) * _smooth((half + 0.1 * (py - 14) - across) / 1.5 + 0.5)
    cloth = rng.uniform(0.05, 0.9) + rng.uniform(0.05, 0.5) * (_crop(rng, photos, px.shape) - 0.5)
    cloth += rng.normal(0, 0.1) * px / half
    scene[part] += weight * (np.clip(cloth, 0, 1) - scene[part])


def _photographed(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """Light, lens and sensor: a ramp and gamma over the scene, a little blur and noise, 8 bits."""
    height, width = scene.shape
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = (
        rng.uniform(0.85, 1.1) + rng.normal(0, 0.08) * x.astype(np.float32) + rng.normal(0, 0.08) * y.astype(np.float32)
    )
    scene = np.power(np.clip(scene * light, 0, 1), np.float32(math.exp(rng.normal(0, 0.15))))
    if rng.random() < 0.5:
        scene = gaussian_filter(scene, rng.uniform(0.3, 0.9), mode="nearest")
    scene = scene + np.float32(rng.uniform(0.0, 0.03)) * rng.standard_normal(scene.shape, dtype=np.float32)
    return (np.clip(scene, 0, 1) * 255 + 0.5).astype(np.uint8)


def _apart(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two heads at these gazes cannot touch, torsos aside."""
    reach = 15 * (math.hypot(*first[:2]) + math.hypot(*second[:2]))
    return math.dist(first[2:], second[2:]) > reach
