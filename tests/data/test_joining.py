"""Collections that different people labelled, joined: the difference of their labels is found and taken out."""

import math

import pytest
import torch
from torch import Tensor

from foveate.data import Scenes
from foveate.data.joining import in_one_convention, label_difference
from foveate.model import gaze as gazes
from foveate.model.errors import InputError

SIDE = 120


def drawn(gaze: Tensor, seed: int, hair: float = 0.0) -> Tensor:
    """A lopsided face of blobs under a gaze, on a background of its own: blobs that move, or hair of some length."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    at = gazes.apply(gazes.inverse(gaze), torch.stack([column, row], -1).double())
    picture = 0.5 + 0.1 * torch.rand(SIDE, SIDE, generator=generator, dtype=torch.float64)
    blobs = [(-5, -3, 2.0, -0.3), (5, -3, 2.0, -0.4), (0, 7, 2.5, -0.25), (2, 1, 3.0, 0.2), (0, -11, 3.5, -0.2)]
    for x, y, wide, dark in blobs:
        moved = torch.tensor([x, y]) + (0.1 if hair else 0.5) * torch.randn(2, generator=generator, dtype=torch.float64)
        picture += dark * torch.exp(-(at - moved).square().sum(-1) / (2 * wide**2))
    if hair:
        length = hair * float(torch.rand(1, generator=generator))
        picture -= 0.5 * torch.sigmoid(at[..., 0].abs() - 8) * torch.sigmoid(length - 12 - at[..., 1])
    return picture.clamp(0, 1)


def collection(count: int, seed: int, hair: float = 0.0) -> Scenes:
    generator = torch.Generator().manual_seed(seed)
    centre = SIDE / 2 + 6 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    scale = torch.exp(0.15 * torch.randn(count, generator=generator, dtype=torch.float64)) * 2
    truth = gazes.from_parts(centre, scale, 0.1 * torch.randn(count, generator=generator, dtype=torch.float64))
    return Scenes.from_pictures([drawn(g, 1000 * seed + i, hair) for i, g in enumerate(truth)], gazes=truth)


def relabelled(scenes: Scenes, difference: Tensor) -> Scenes:
    assert scenes.gazes is not None
    return scenes.with_gazes(gazes.compose(scenes.gazes, difference))


def a_difference() -> Tensor:
    centre = torch.tensor([0.8, -0.5], dtype=torch.float64)
    return gazes.from_parts(centre, torch.tensor(1.07).double(), torch.tensor(-0.05).double())


def test_labels_drawn_differently_on_the_same_pictures_tell_the_difference() -> None:
    """The same pictures twice: δ is known exactly, but for the interpolation of the means (five times that is allowed).

    A tenth of δ would be 0.09 canonical pixels, 0.007 in log-scale and 0.005 radians.
    """
    scenes = collection(12, 1)
    found = label_difference(scenes, relabelled(scenes, a_difference()))
    assert found is not None
    centre, scale, rotation = gazes.parts(gazes.compose(found, gazes.inverse(a_difference())))
    assert centre.norm() < 0.02
    assert abs(math.log(float(scale))) < 0.002
    assert abs(float(rotation)) < 0.002


def test_other_pictures_of_the_object_tell_it_too_and_joining_takes_it_out() -> None:
    """Blobs move by half a pixel from picture to picture, means over 30 by about 0.1: three times that is allowed."""
    first, second = collection(30, 1), collection(30, 2)
    other = relabelled(second, a_difference())
    (kept, changed), (difference,) = in_one_convention([first, other])
    assert kept is first
    assert difference is not None
    assert changed.gazes is not None and second.gazes is not None and other.gazes is not None
    torch.testing.assert_close(gazes.compose(changed.gazes, difference), other.gazes)
    off = gazes.parts(gazes.compose(gazes.inverse(second.gazes), changed.gazes))
    before = gazes.parts(gazes.compose(gazes.inverse(second.gazes), other.gazes))
    assert off.centre.norm(dim=-1).max() < 0.3 < before.centre.norm(dim=-1).min()
    assert off.scale.log().abs().max() < 0.03 < before.scale.log().abs().min()
    assert gazes.overlap(changed.gazes, second.gazes).mean() > gazes.overlap(other.gazes, second.gazes).mean()


def test_what_differs_from_picture_to_picture_says_little_of_labels() -> None:
    """Faces between hair of any length: means of 15 and 15 differ by how long it happens to be, and by little else.

    The five blobs move by 0.1, so that means over 15 place them together to about 0.1 √(2/15) / √5 = 0.016; twice that
    is allowed, and as much at six canonical pixels from the middle in size (0.013 to 0.014 over other draws: 0.015).
    Where all pixels count alike, these two draws give 0.057 and 0.063, and 0.020 and 0.029.
    """
    for seed in (1, 7):
        difference = label_difference(collection(15, seed, hair=24.0), collection(15, seed + 1, hair=24.0))
        assert difference is not None
        centre, scale, _ = gazes.parts(difference)
        assert centre.norm() < 0.032
        assert abs(math.log(float(scale))) < 0.015


def test_collections_may_change_places() -> None:
    """δ of the second against the first is the inverse, but for where Nelder and Mead's simplex stops (1e-3)."""
    first, second = collection(15, 1), relabelled(collection(15, 2), a_difference())
    there, back = label_difference(first, second), label_difference(second, first)
    assert there is not None and back is not None
    torch.testing.assert_close(gazes.inverse(there), back, atol=5e-3, rtol=0)


def test_what_does_not_show_the_object_keeps_its_labels() -> None:
    first, other = collection(12, 1), collection(12, 3)
    assert other.gazes is not None
    upside_down = other.with_gazes(gazes.compose(other.gazes, torch.tensor([-1.0, 0.0, 0.0, 0.0]).double()))
    (_, kept), (difference,) = in_one_convention([first, upside_down])
    assert difference is None
    assert kept is upside_down


def test_neither_does_what_has_too_few_scenes_to_tell() -> None:
    scenes = collection(12, 1)
    assert label_difference(scenes, scenes) is not None
    assert label_difference(scenes, scenes[:11]) is None
    assert label_difference(scenes[:11], scenes) is None


def test_without_labels_or_collections_nothing_is_joined() -> None:
    scenes = collection(12, 1)
    with pytest.raises(InputError, match="no collections to join"):
        in_one_convention([])
    bare = Scenes.from_pictures(scenes.pictures(), names=scenes.names)
    with pytest.raises(InputError, match=r"give scenes\.labelled"):
        label_difference(scenes, bare)
