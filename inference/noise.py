"""Random numbers keyed by (seed, stream, draw, purpose): what a chain sees does not depend on what shares its batch.

A counter-based generator in the sense of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011): there is no state to advance, so the numbers of one stream are the same alone and in any batch, on any
device. The mixing function is the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

Where PyTorch's own generators are used they are of the CPU, and `made_on_cpu` keeps there what they fill.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from foveate.model.errors import InputError

__all__ = ["KeyedNoise", "Purpose", "batch_streams", "made_on_cpu", "stream_keys"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent."""

    MOMENTUM = 1
    ACCEPT = 2
    JITTER = 3
    START = 4
    SEARCH = 5
    GIBBS = 6
    KERNEL = 7
    LEAP = 8
    LEAP_TAIL = 9
    LEAP_ACCEPT = 10


class KeyedNoise:
    """Uniform and normal numbers keyed by a seed, the stream of each element, a draw counter and a purpose.

    Args:
        seed: any integer.
        streams: one integer for every element of the batch, see :func:`batch_streams`.
    """

    def __init__(self, seed: int, streams: Int[Tensor, "..."]) -> None:
        self.batch_shape = tuple(streams.shape)
        keys = streams.detach().cpu().reshape(-1).numpy().astype(np.int64).view(np.uint64)
        root = _fold(np.zeros(1, np.uint64), np.asarray([seed & _MASK], np.uint64))
        self._keys = _fold(root, keys)

    def uniform(self, purpose: Purpose, first_draw: int, draws: int = 1, size: int = 1) -> np.ndarray:
        """Uniform numbers in the open interval (0, 1): (draws, *batch, size), float64."""
        words = self._words(purpose, first_draw, draws, size)
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, purpose: Purpose, first_draw: int, draws: int = 1, size: int = 1) -> np.ndarray:
        """Standard normal numbers by Box and Muller: (draws, *batch, size), float64."""
        pairs = (size + 1) // 2
        u = self.uniform(purpose, first_draw, draws, 2 * pairs)
        radius = np.sqrt(-2.0 * np.log(np.ascontiguousarray(u[..., :pairs])))
        angle = (2.0 * np.pi) * np.ascontiguousarray(u[..., pairs:])
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], -1)[..., :size]

    def _words(self, purpose: Purpose, first_draw: int, draws: int, size: int) -> np.ndarray:
        keys = _fold(self._keys, np.asarray([int(purpose)], np.uint64))
        keys = _fold(keys[None, :], np.arange(first_draw, first_draw + draws, dtype=np.uint64)[:, None])
        words = _fold(keys[..., None], np.arange(size, dtype=np.uint64))
        return words.reshape(draws, *self.batch_shape, size)


def stream_keys(names: Sequence[str]) -> Int[Tensor, " name"]:
    """Stable stream keys of names, of scenes' files for example: the same name has the same noise in any batch.

    Names that come again, as files of two folders may, have a key of their own each time.
    """
    earlier: Counter[str] = Counter()
    told = []
    for name in names:
        told.append(f"{name}\0{earlier[name]}" if earlier[name] else name)
        earlier[name] += 1
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in told)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def batch_streams(
    streams: Sequence[int] | Int[Tensor, "..."] | None, batch_shape: tuple[int, ...]
) -> Int[Tensor, "..."]:
    """One stream for every element of a batch.

    Args:
        streams: integers whose shape is the batch shape or its leading part: with a batch of (scene, chain), one key
            per scene is enough and the chains of a scene get keys of their own. ``None`` numbers the leading dimension.
        batch_shape: the batch.

    Raises:
        InputError: the shape of ``streams`` is not a leading part of the batch shape.
    """
    if streams is None:
        streams = torch.arange(batch_shape[0] if batch_shape else 1)
        streams = streams if batch_shape else streams.reshape(())
    keys = torch.as_tensor(streams, dtype=torch.int64).cpu()
    if tuple(keys.shape) != batch_shape[: keys.ndim]:
        raise InputError(
            f"streams has shape {tuple(keys.shape)}, which does not lead the batch shape {batch_shape}: give one "
            "integer per element, "
            f"or one per index of the leading dimension{'s' if len(batch_shape) > 1 else ''}"
        )
    words = keys.numpy().view(np.uint64)
    for length in batch_shape[keys.ndim :]:
        words = _fold(words[..., None], np.arange(length, dtype=np.uint64))
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64)).clone()


_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _fold(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """The counter-th output of the SplitMix64 generator whose state is the key; arithmetic modulo 2**64."""
    x = key + _GOLDEN * (counter + np.uint64(1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def made_on_cpu(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A decorator: tensors that the function makes are on the CPU, as its generators are, unless it names a device.

    Otherwise they would be where `torch.set_default_device` says, and no generator of the CPU can fill them there.
    """

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # The context costs time at every operation.
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped
