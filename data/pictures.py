"""Pictures as grey luminance: checked by their headers up front, decoded when asked for, kept in a bounded cache.

Convention (the whole module): a picture is an array ``(height, width)``, x right, y down; ``uint8`` holds 255 times the
luminance (ITU-R 601, as pillow's mode ``L``), ``float32`` the luminance itself in [0, 1].
"""

import logging
import os
import struct
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from foveate.model.errors import InputError

__all__ = [
    "MINIMUM_SIDE",
    "SUFFIXES",
    "Picture",
    "PictureCache",
    "PictureFile",
    "PictureInMemory",
    "as_luminance",
    "decode",
    "from_array",
    "list_pictures",
    "open_pictures",
    "passed_over",
]

# A patch has 24 × 24 canonical pixels: a picture with a shorter side holds less than one patch at scale 1.
MINIMUM_SIDE = 24

# Those of the formats below that the installed pillow reads.
SUFFIXES = tuple(
    suffix
    for suffix in (
        ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
        ".tiff", ".webp",
    )
    if suffix in Image.registered_extensions()
)  # fmt: skip

# What a picture that is not simply 8 bits, still and opaque is made into; stated once per kind and folder.
CONVERSIONS = {
    "16-bit": "of 16 bits a channel, scaled to [0, 1] (grey) or rounded to 8 bits (colour)",
    "transparent": "with transparency, composited on mid-grey",
    "animated": "animated or of several pages, first frame taken",
    "turned": "turned or mirrored as their EXIF orientation says",
}

# Files that cannot be used which an error names one by one.
TOLD = 10
EXIF_ORIENTATION = 0x0112
# Tags of TIFF files.
WIDTH_HEIGHT, BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = (256, 257), 258, 262, 0
MID_GREY = (128, 128, 128, 255)

logger = logging.getLogger("foveate.data")


@runtime_checkable
class Picture(Protocol):
    """Anything that knows its size and can be read; held by identity, so that no two are confused in the cache."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def read(self) -> np.ndarray:
        """The picture, ``(height, width)`` uint8 or float32."""
        ...


@dataclass(frozen=True, eq=False)
class PictureFile:
    """A picture on disk whose header has been read.

    Attributes:
        path: the file.
        size: height and width in pixels, after the EXIF orientation is applied.
    """

    path: Path
    size: tuple[int, int]

    def read(self) -> np.ndarray:
        """Decode the file: see `decode`."""
        return decode(self.path)


@dataclass(frozen=True, eq=False)
class PictureInMemory:
    """A picture that is already an array ``(height, width)``, uint8 or float32."""

    array: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.array.shape[0], self.array.shape[1]

    def read(self) -> np.ndarray:
        """The array itself, not a copy."""
        return self.array


class PictureCache:
    """Decoded pictures, the least recently used dropped first, so that memory does not grow with the number of scenes.

    Args:
        megabytes: how much decoded picture is kept; an 8-bit picture takes one byte a pixel, any other four.
    """

    def __init__(self, megabytes: float = 512.0):
        self.megabytes = megabytes
        self._kept: OrderedDict[Picture, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, picture: Picture) -> np.ndarray:
        """The picture's array, decoded at most once while it is kept."""
        if isinstance(picture, PictureInMemory):
            return picture.array
        with self._lock:
            if picture in self._kept:
                self._kept.move_to_end(picture)
                return self._kept[picture]
        array = picture.read()
        with self._lock:
            if picture not in self._kept:
                self._kept[picture] = array
                self._bytes += array.nbytes
            while self._bytes > self.megabytes * 2**20 and self._kept:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return array


def as_luminance(array: np.ndarray) -> Float[Tensor, "height width"]:
    """A uint8 or float32 array as a float32 tensor in [0, 1]."""
    tensor = torch.from_numpy(array)
    return tensor.to(torch.float32).div_(255) if array.dtype == np.uint8 else tensor


def list_pictures(directory: Path) -> list[Path]:
    """All pictures below a folder, by name; hidden files and other suffixes are passed over.

    Raises:
        InputError: the folder is not there, is a file, may not be listed, or holds no picture.
    """
    if not directory.exists():
        raise InputError(f"{directory}: no such folder; give a folder of pictures")
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file; give the folder that holds it")

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: may not be listed ({error.strerror}); change its permissions")

    found: list[Path] = []
    for parent, folders, files in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = (Path(parent, name) for name in files if not name.startswith("."))
        found += [path for path in here if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise InputError(
            f"{directory}: holds no picture ({', '.join(SUFFIXES)}; links to folders are not followed); give a folder "
            "with at least one"
        )
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def passed_over(directory: Path, found: Sequence[Path]) -> list[Path]:
    """What lies below a folder and is not among the pictures that `list_pictures` found there.

    Files of other suffixes (but tables), links that lead nowhere, and links to folders, which are not followed; nothing
    that is hidden.
    """
    known = set(found)
    return sorted(
        path
        for path in directory.rglob("*")
        if path not in known
        and (path.is_symlink() or not path.is_dir())
        and path.suffix.lower() != ".csv"
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def open_pictures(paths: Sequence[Path]) -> list[PictureFile]:
    """Read the headers of pictures and refuse, before any long work, those that cannot be used.

    A JPEG or PNG must end as its format ends; one that does not, and a picture of any other format, is decoded once
    here. What is converted (16 bits, transparency, animation, EXIF orientation) is logged once per kind.

    Raises:
        InputError: files are missing, unreadable, truncated or smaller than 24 × 24 pixels; the message names them.
    """
    kinds: Counter[str] = Counter()
    examples: dict[str, Path] = {}
    pictures = []
    refused: list[str] = []
    for path in paths:
        try:
            size, of_file = _header(path)
        except InputError as error:
            refused.append(str(error))
            continue
        for kind in of_file:
            kinds[kind] += 1
            examples.setdefault(kind, path)
        pictures.append(PictureFile(path, size))
    if refused:
        more = f"; and {len(refused) - TOLD} more" if len(refused) > TOLD else ""
        raise InputError("; ".join(refused[:TOLD]) + more)
    for kind, count in kinds.items():
        noun = "picture" if count == 1 else "pictures"
        logger.warning("%d %s %s (first: %s)", count, noun, CONVERSIONS[kind], examples[kind])
    return pictures


def decode(path: Path) -> np.ndarray:
    """Decode a picture into grey luminance ``(height, width)``.

    The result is uint8, or float32 in [0, 1] for 16-bit and floating-point pictures. Colour goes to ITU-R 601 luma,
    transparency is composited on mid-grey, an animation gives its first frame, the EXIF orientation is applied.

    Raises:
        InputError: the file cannot be decoded to its end or has values that are no luminance; the message names it.
    """
    with _opened(path) as image:
        tags = _tiff_tags(image)
        if tags.get(BITS_PER_SAMPLE) == (32,) and image.mode == "I":
            raise InputError(f"{path}: has integers of 32 bits, whose white nobody knows; save it with 8 or 16 bits")
        grey = _grey(ImageOps.exif_transpose(image) if _orientation(image) != 1 else image, path)
        # Pillow turns 8 bits round itself.
        return 1 - grey if image.mode.startswith("I") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def from_array(picture: Any, where: str) -> PictureInMemory:
    """A picture from memory: an array or tensor ``(height, width)``, float in [0, 1] or uint8.

    A tensor is brought to the CPU and, if floating, to float32; a float32 CPU tensor is kept without a copy.

    Args:
        picture: NumPy array or tensor.
        where: what to call it in an error, such as ``"picture 3"``.

    Raises:
        InputError: wrong shape or dtype, NaN or infinite pixels, values outside [0, 1], or a side below 24 pixels.
    """
    array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if array.ndim != 2:
        raise InputError(f"{where} has shape {array.shape}: needed is a grey picture (height, width)")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"{where} has dtype {array.dtype}: needed is a floating dtype in [0, 1], or uint8")
        array = array.astype(np.float32, copy=False)
        _check_range(array, where)
    _check_size((array.shape[0], array.shape[1]), where)
    return PictureInMemory(np.ascontiguousarray(array))


def _header(path: Path) -> tuple[tuple[int, int], list[str]]:
    """Height and width of a picture, and which conversions it will need."""
    with _opened(path) as image:
        tags = _tiff_tags(image)
        # As stored: of a turned TIFF, and of no other format, Pillow tells the upright size.
        width, height = (tags[tag] for tag in WIDTH_HEIGHT) if tags else image.size
        orientation = _orientation(image)
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        kinds = []
        if ";16" in str(image.tile) or image.mode.startswith("I"):
            kinds.append("16-bit")
        if _is_transparent(image):
            kinds.append("transparent")
        if getattr(image, "is_animated", False):
            kinds.append("animated")
        if orientation in range(2, 9):
            kinds.append("turned")
        kind = image.format
    _check_size((height, width), str(path))
    if not _ends_well(path, kind):
        decode(path)
    return (height, width), kinds


def _ends_well(path: Path, kind: str | None) -> bool:
    """Whether the file's last bytes are those with which its format ends; only JPEG and PNG have such bytes."""
    marker = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "")
    if marker is None:
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        return marker in file.read()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever pillow raises on a broken file into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture; check the path") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read; change its permissions") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        reason = "its format is unknown or damaged" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(f"{path}: cannot be read as a picture ({reason}); replace or remove it") from None


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """A picture, opened; what pillow raises on it names it."""
    # By a file, not by its path: of one that it opens itself Pillow maps the bytes of a turned TIFF in the wrong shape.
    with _naming(path), path.open("rb") as file, Image.open(file) as image:
        yield image


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF, none of a picture of another format."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8."""
    # Pillow decodes a whole PNG to look for an EXIF block behind the pixels, where hardly a program writes one.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _grey(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode.startswith("I"):
        array = np.asarray(image)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise InputError(f"{path}: has integers from {low} to {high}; save it with 8 or 16 bits a pixel")
        return (array / np.float32(65535)).astype(np.float32)
    if image.mode == "F":
        array = np.array(image, dtype=np.float32)
        _check_range(array, str(path))
        return array
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, MID_GREY), image)
    # A copy, as above: pillow's own buffer is read-only, and torch wants one that is not.
    return np.array(image.convert("L"))


def _check_size(size: tuple[int, int], where: str) -> None:
    height, width = size
    if min(height, width) < MINIMUM_SIDE:
        raise InputError(
            f"{where}: is {width}×{height} pixels, too small; at least {MINIMUM_SIDE}×{MINIMUM_SIDE} are needed"
        )


def _check_range(array: np.ndarray, where: str) -> None:
    broken = int(np.size(array) - np.isfinite(array).sum())
    if broken:
        raise InputError(f"{where}: {broken} of {array.size} pixels are NaN or infinite; mend or leave out the picture")
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if low < 0 or high > 1:
        raise InputError(
            f"{where}: values run from {low:.4g} to {high:.4g}; scale them to [0, 1] (8-bit values: divide by 255)"
        )
