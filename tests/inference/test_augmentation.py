"""Augmented windows: the gaze stays right, and what is said to change changes, as often as it is said to."""

import pytest
import torch
from torch import Tensor

from foveate.inference import augmentation
from foveate.inference.glance import VIEW_STEP
from foveate.inference.guide import WINDOW, WINDOW_EXTENT, change_chart
from foveate.inference.guide_training import _perturbed, random_gazes
from foveate.model import extract
from foveate.model import gaze as gazes

SIZE = 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def targets(n: int, reach: float = 30.0) -> Tensor:
    centre = reach * (2 * torch.rand(n, 2, generator=generator(9)) - 1)
    return gazes.from_parts(centre, 0.8 + 0.4 * torch.rand(n, generator=generator(8)), torch.zeros(n))


def in_the_mirror(gaze: Tensor, width: int) -> Tensor:
    """The gaze that sees in the mirrored picture what `gaze` sees in the picture, mirrored."""
    return gaze * torch.tensor([1.0, -1.0, -1.0, 1.0]) + torch.tensor([0.0, 0.0, width - 1.0, 0.0])


@pytest.mark.parametrize("change", [False, True], ids=["gazes", "changes"])
def test_mirroring_a_window_and_its_target_is_looking_at_the_mirrored_picture(change: bool) -> None:
    picture = torch.rand(50, 60, dtype=torch.float64)
    n = 24
    at = random_gazes(torch.tensor([50, 60]).expand(n, 2), generator(1))
    truth = _perturbed(at, generator(2))

    def seen(picture: Tensor, at: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        target = change_chart(at).to_chart(truth) if change else gazes.compose(gazes.inverse(at), truth)
        return extract(picture, at, WINDOW, WINDOW_EXTENT), target

    window, target = seen(picture, at, truth)
    canonical = torch.rand(n, 24, 24, dtype=torch.float64) if change else None
    new_window, new_target, new_canonical = augmentation.mirrored(window, target, canonical, generator(3))
    there_window, there_target = seen(picture.flip(1), in_the_mirror(at, 60), in_the_mirror(truth, 60))
    flipped = (new_window != window).flatten(1).any(1)
    assert 4 < int(flipped.sum()) < 20  # half of 24
    torch.testing.assert_close(new_window[flipped], there_window[flipped], rtol=0, atol=1e-12)
    torch.testing.assert_close(new_target[flipped], there_target[flipped], rtol=0, atol=1e-9)
    torch.testing.assert_close(new_target[~flipped], target[~flipped], rtol=0, atol=0)
    if canonical is not None:
        assert new_canonical is not None
        torch.testing.assert_close(new_canonical[flipped], canonical[flipped].flip(-1), rtol=0, atol=0)
        torch.testing.assert_close(new_canonical[~flipped], canonical[~flipped], rtol=0, atol=0)


def test_a_swapped_background_leaves_the_object_and_nothing_else() -> None:
    n = 6
    window, other = torch.zeros(n, WINDOW, WINDOW), torch.ones(n, WINDOW, WINDOW)
    relative = _perturbed(gazes.identity(torch.float64).expand(n, 4), generator()).float()
    swapped = augmentation.on_other_background(window, other, relative, WINDOW_EXTENT, 1.0, generator())
    at = gazes.lattice(WINDOW, WINDOW_EXTENT).reshape(1, -1, 2)
    p = gazes.apply(gazes.inverse(relative)[:, None], at).reshape(n, WINDOW, WINDOW, 2)
    on_the_face = p.abs().amax(-1) < 9
    beyond = p.norm(dim=-1) > 24
    assert float(swapped[on_the_face].max()) < 0.1  # the soft edge of the mask
    assert float(swapped[beyond].min()) > 0.99
    torch.testing.assert_close(augmentation.on_other_background(window, other, relative, 3.0, 0.0, generator()), window)


def test_stretching_keeps_the_middle_the_area_and_the_nearest_similarity() -> None:
    n = 40
    target = targets(n, reach=20.0)
    # Views that show their own coordinates tell where every pixel was read.
    at = (torch.arange(SIZE) - (SIZE - 1) / 2) * VIEW_STEP
    x, y = at[None, None, :].expand(n, SIZE, SIZE), at[None, :, None].expand(n, SIZE, SIZE)
    read_x, read_y = (augmentation.stretched(plane, target, generator(1)) for plane in (x, y))
    inner = slice(24, 40)  # whatever the stretch, these are read inside the view

    def slopes(plane: Tensor) -> Tensor:
        part = plane[:, inner, inner].double()
        across = (part[:, :, 1:] - part[:, :, :-1]).mean((1, 2)) / VIEW_STEP
        return torch.stack([across, (part[:, 1:] - part[:, :-1]).mean((1, 2)) / VIEW_STEP], -1)

    matrix = torch.stack([slopes(read_x), slopes(read_y)], -2)
    # float32 interpolation of coordinates up to 48 leaves 1e-5 of a pixel.
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(n).double(), rtol=0, atol=1e-4)
    assert float((torch.linalg.eigvalsh(matrix)[:, 1]).log().std()) > 0.03
    # Read at p is c + M (p - c): the plane through the inner pixels gives back c.
    middle = torch.stack([plane[:, inner, inner].double().mean((1, 2)) for plane in (read_x, read_y)], -1)
    p = at[inner].double().mean()
    offset = middle - (matrix @ torch.stack([p, p]))
    still = torch.eye(2).double() - matrix
    centre = target[:, 2:].double()
    torch.testing.assert_close(offset, (still @ centre[..., None])[..., 0], rtol=0, atol=1e-3)


def test_a_share_of_the_objects_is_partly_covered_and_the_rest_left_alone() -> None:
    n = 2000
    view, other = torch.full((n, 16, 16), -1.0), torch.full((n, 16, 16), 2.0)
    target = gazes.from_parts(torch.zeros(n, 2), torch.full((n,), 0.6), torch.zeros(n))
    covered = augmentation.partly_covered(view, other, target, generator())
    changed = covered != -1
    # 12 % + 18 %, less the boxes that fall between pixels; 2000 draws have a sd of 0.010.
    assert float(changed.flatten(1).any(1).double().mean()) == pytest.approx(0.3, abs=0.04)
    cover = covered[changed]
    by_clutter = float((cover == 2).double().mean())
    assert 0.3 < by_clutter < 0.7 and bool(((cover == 2) | ((cover >= 0) & (cover <= 1))).all())
    assert not bool(changed.all((1, 2)).any())


def test_a_share_of_the_objects_is_mixed_with_another_at_the_same_place() -> None:
    n = 2000
    view, second = torch.zeros(n, 16, 16), torch.ones(n, 16, 16)
    near = gazes.identity().expand(n, 4)
    mixed = augmentation.blended(view, second, near, generator())
    assert float(mixed.min()) >= 0 and float(mixed.max()) <= 1
    touched = (mixed > 0).flatten(1).any(1)
    assert float(touched.double().mean()) == pytest.approx(0.3, abs=0.04)  # sd 0.010
    even = mixed.flatten(1).std(1) < 1e-6
    assert float((touched & even).double().mean()) == pytest.approx(0.15, abs=0.03)  # sd 0.008
    far = gazes.from_parts(torch.full((n, 2), 60.0), torch.ones(n), torch.zeros(n))
    torch.testing.assert_close(augmentation.blended(view, second, far, generator()), view)


def test_a_tone_curve_is_increasing_and_keeps_black_and_white() -> None:
    ramp = torch.linspace(0, 1, 64).reshape(1, 8, 8).expand(20, 8, 8)
    curved = augmentation._curved(ramp, generator()).flatten(1)
    assert bool((curved[:, 1:] >= curved[:, :-1]).all())
    torch.testing.assert_close(curved[:, [0, -1]], torch.tensor([[0.0, 1.0]]).expand(20, 2))


def test_light_changes_values_and_nothing_else() -> None:
    # Smooth, as pictures are: white noise would not survive the coarser cameras.
    small = torch.rand(5, 1, 12, 12, generator=generator(7))
    windows = torch.nn.functional.interpolate(small, size=(48, 48), mode="bilinear")[:, 0]
    first, again = (augmentation.relit(windows, generator(4)) for _ in range(2))
    assert first.shape == windows.shape and first.isfinite().all()
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    # Bright stays bright: the order of intensities survives but for lamps, ramp, blur and noise.
    for before, after in zip(windows.flatten(1), first.flatten(1), strict=True):
        assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.5
