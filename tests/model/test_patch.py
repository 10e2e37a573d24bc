"""Extraction against its definition in SciPy and against kornia, its slopes against differences."""

import importlib.util
import inspect
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import (
    LEVELS,
    Pyramid,
    density_coordinates,
    disc,
    extract,
    from_density_coordinates,
    normalise,
)

SIZES = [(40, 57), (90, 64), (33, 120), (2, 2)]
LATTICES = [(24, 1.0), (48, 3.0), ((10, 14), 2.0)]


def pictures(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """White noise: the hardest picture to read between its pixels."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(*size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]


def photograph(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise with the 1/f spectrum that photographs have, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.fft.rfft2(torch.randn(height, width, generator=generator, dtype=torch.float64))
    frequency = torch.sqrt(torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).double()
    picture = torch.fft.irfft2(noise / frequency.clamp(min=1 / height), s=(height, width))
    return (picture - picture.amin()) / (picture.amax() - picture.amin())


def gazes_of_every_kind(size: tuple[int, int]) -> Tensor:
    """Scales from 0.3 to 40 (beyond the coarsest level for wide lattices), all rotations, on and off the picture."""
    height, width = size
    scales = torch.tensor([0.3, 0.99, 1.0, 1.01, 1.9, 3.3, 7.7, 16.0, 25.0, 40.0], dtype=torch.float64)
    angles = torch.tensor([0.0, 0.4, -2.5, 3.1, 1.2, -0.9, 0.2, 2.0, -0.1, 0.7], dtype=torch.float64)
    share = torch.tensor([[0.5, 0.5], [0.1, 0.8], [0.9, 0.3], [-0.2, 0.5], [1.3, 1.2]], dtype=torch.float64)
    centres = share * torch.tensor([width, height], dtype=torch.float64)
    return gazes.from_parts(centres[:, None], scales, angles).reshape(-1, 4)


def defined(picture: Tensor, gaze: Tensor, size: int | tuple[int, int] = 24, extent: float = 1.0) -> np.ndarray:
    """The definition, one gaze at a time, from SciPy's blur and SciPy's bilinear lookup, in float64."""
    scene = picture.double().numpy()
    a, b, tx, ty = gaze.tolist()
    rows, columns = (size, size) if isinstance(size, int) else size
    step = 24.0 * extent / columns
    py, px = np.mgrid[:rows, :columns] * 1.0
    px, py = (px - (columns - 1) / 2) * step, (py - (rows - 1) / 2) * step
    at = np.stack([b * px + a * py + ty, a * px - b * py + tx])
    level = np.clip(2 * np.log2(step * np.sqrt(a * a + b * b)), 0, 12 - 1e-9)

    def read(k: int) -> np.ndarray:
        blurred = gaussian_filter(scene, 0.5 * 2 ** (k / 2), mode="nearest", truncate=4.0) if k else scene
        return map_coordinates(blurred, at, order=1, mode="nearest")

    lower = int(level)
    return (1 - (level - lower)) * read(lower) + (level - lower) * read(lower + 1)


def reference(shared_data: Path) -> ModuleType:
    path = shared_data.parent / "reference" / "extract.py"
    if not path.is_file():
        pytest.skip(f"the definition is not here: no {path}")
    spec = importlib.util.spec_from_file_location("reference_extract", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- values


@pytest.mark.parametrize(("size", "extent"), LATTICES)
def test_extraction_is_the_definition_for_packed_pictures_of_any_sizes(
    size: int | tuple[int, int], extent: float
) -> None:
    at = torch.stack([gazes_of_every_kind(s) for s in SIZES])[:, ::3]
    wanted = np.stack([[defined(p, g, size, extent) for g in gs] for p, gs in zip(pictures(), at, strict=True)])
    pyramid = Pyramid.build(pictures(), oversampling=None)
    # float64: sums of up to 257 taps of numbers below 1, and coordinates of up to 2000 px.
    np.testing.assert_allclose(pyramid.extract(at, size, extent).numpy(), wanted, rtol=0, atol=1e-12)
    slowly = pyramid.extract(at.clone().requires_grad_(), size, extent).detach()
    np.testing.assert_allclose(slowly.numpy(), wanted, rtol=0, atol=1e-12)
    single = Pyramid.build(pictures(torch.float32), oversampling=None).extract(at, size, extent)
    assert single.dtype == torch.float32
    # float32: the same sums, and points that are good to 1e-5 of a pixel of the level that is read.
    np.testing.assert_allclose(single.numpy(), wanted, rtol=0, atol=1e-5)


def test_extraction_is_the_reference_extraction(shared_data: Path) -> None:
    definition = reference(shared_data)
    picture = photograph(70, 90)
    at = gazes_of_every_kind((70, 90))[::2]
    for size, extent in ((24, 1.0), (48, 3.0)):
        wanted = np.stack([definition.extract(picture.numpy(), g.numpy(), size, extent) for g in at])
        np.testing.assert_allclose(extract(picture, at, size, extent).numpy(), wanted, rtol=0, atol=1e-12)  # float64
        single = extract(picture.float(), at.float(), size, extent)
        # float32 gazes of 100 px are good to 4e-6 px, and neighbours differ by less than 1.
        np.testing.assert_allclose(single.numpy(), wanted, rtol=0, atol=2e-5)


def test_fine_extraction_is_kornias_warp() -> None:
    warp_affine = pytest.importorskip("kornia.geometry.transform").warp_affine
    picture = pictures()[1]
    scales = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)  # scale <= 1 reads the picture itself
    at = gazes.from_parts(torch.tensor([31.3, 44.2], dtype=torch.float64), scales, torch.tensor([0.3, -1.0, 2.0]))
    # kornia takes the map from source pixels to patch pixels, whose origin is the patch's top left pixel.
    corner = torch.tensor([1.0, 0.0, -11.5, -11.5], dtype=torch.float64)
    a, b, tx, ty = gazes.inverse(gazes.compose(at, corner)).unbind(-1)
    matrix = torch.stack([torch.stack([a, -b, tx], -1), torch.stack([b, a, ty], -1)], -2)
    sources = picture.expand(3, 1, -1, -1)
    wanted = warp_affine(sources, matrix, (24, 24), mode="bilinear", padding_mode="border", align_corners=True)
    torch.testing.assert_close(extract(picture, at), wanted[:, 0], rtol=0, atol=1e-11)  # normalised coordinates


def test_patches_do_not_depend_on_the_number_of_threads_and_leave_it_alone() -> None:
    pyramid = Pyramid.build(pictures(torch.float32))
    at = torch.stack([gazes_of_every_kind(s) for s in SIZES])
    found = []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(pyramid.extract(at))
        assert torch.get_num_threads() == number
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("oversampling", [None, 2.0])
def test_the_compiled_path_equals_the_differentiable_one(oversampling: float | None) -> None:
    pyramid = Pyramid.build(pictures(torch.float32), oversampling)
    at = torch.stack([gazes_of_every_kind(s) for s in SIZES])
    for size, extent in LATTICES:
        fast = pyramid.extract(at, size, extent)
        plain = pyramid.extract(at.clone().requires_grad_(), size, extent).detach()
        # The plain path computes where to look in float32: 1500 px are good to 1.2e-4 px, and noise differs by 1 a px.
        torch.testing.assert_close(fast, plain, rtol=0, atol=2e-4)


@pytest.mark.parametrize("oversampling", [None, 2.0])
def test_the_compiled_blur_equals_the_differentiable_one(oversampling: float | None) -> None:
    # float32: sums of up to 385 taps, in another order.
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        # The last one is higher than two threads' shares and wider than the widest kernel.
        noise = [*pictures(dtype), photograph(700, 450).to(dtype)]
        for fast, plain in zip(
            Pyramid.build(noise, oversampling).texels.split(50_000),
            Pyramid.build([n.requires_grad_() for n in noise], oversampling).texels.detach().split(50_000),
            strict=True,
        ):
            torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("points", "tolerance"), [(250, 1e-5), (1000, 4e-5)])
def test_wide_lattices_in_single_precision_are_as_near_as_is_said(points: int, tolerance: float) -> None:
    picture = torch.rand(40, points, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    at = torch.tensor([[1.0, 0.003, points / 2, 20.0]], dtype=torch.float64)
    exact, single = (extract(p, at, (4, points), points / 24) for p in (picture, picture.float()))
    # Noise: neighbours differ by up to 1, and so does an error of place count.
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=tolerance)


def test_a_pyramid_is_built_where_the_pictures_are() -> None:
    picture = photograph(90, 120)
    with torch.device("meta"):
        built = Pyramid.build([picture])
    assert built.texels.device == picture.device
    assert torch.equal(built.texels, Pyramid.build([picture]).texels)


def test_a_generator_of_pictures_is_read_one_by_one() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Iterator[Tensor]:
        for seed in range(4):
            # The one before may still be in use, no other.
            assert sum(ref() is not None for ref in alive) <= 1
            picture = photograph(120, 90, seed)
            alive.append(weakref.ref(picture))
            yield picture

    lazily = Pyramid.build(read(), smallest=0.4)
    at_once = Pyramid.build([photograph(120, 90, seed) for seed in range(4)], smallest=0.4)
    for name in ("texels", "offset", "rows", "columns", "stride", "size"):
        assert torch.equal(getattr(lazily, name), getattr(at_once, name))


def test_with_two_samples_a_blur_width_the_error_is_a_thousandth() -> None:
    picture = photograph(200, 300)
    at = gazes_of_every_kind((200, 300))
    exact = Pyramid.build([picture], oversampling=None)
    wanted = exact.extract(at[None])
    errors = []
    for oversampling in (1.0, 2.0, 4.0):
        pyramid = Pyramid.build([picture], oversampling)
        errors.append(float((pyramid.extract(at[None]) - wanted).square().mean().sqrt()))
        assert pyramid.texels.numel() < exact.texels.numel()
    # Linear interpolation errs with the square of the spacing: each doubling gains about 4, half of that at least.
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    assert errors[1] < 1e-3


@pytest.mark.parametrize("size", [(200, 300), (61, 47)])
def test_levels_kept_coarsely_are_the_picture_blurred_once(size: tuple[int, int]) -> None:
    picture = photograph(*size)
    pyramid = Pyramid.build([picture], oversampling=2.0)
    for level in range(1, pyramid.stride.shape[1]):
        rows, columns, step = (int(table[0, level]) for table in (pyramid.rows, pyramid.columns, pyramid.stride))
        begin = int(pyramid.offset[0, level])
        kept = pyramid.texels[begin : begin + rows * columns].reshape(rows, columns)
        # SciPy blurs the whole picture, replicates its edges and cuts the Gaussian at 4 sd, as the definition does; the
        # last sample may lie beyond the picture, so that it is widened by its last pixels first.
        wide = np.pad(picture.numpy(), ((0, step), (0, step)), mode="edge")
        wanted = gaussian_filter(wide, 0.5 * 2 ** (level / 2), mode="nearest", truncate=4.0)[::step, ::step]
        # A Gaussian of two is cut twice at 4 sd and aliases by e^-19: 6e-5 of the contrast, which is below 1.
        torch.testing.assert_close(kept, torch.from_numpy(wanted[:rows, :columns]), rtol=0, atol=6e-5)


def test_levels_finer_than_the_smallest_patch_are_not_built_and_nothing_else_changes() -> None:
    picture = photograph(200, 300)
    whole = Pyramid.build([picture])
    bounded = Pyramid.build([picture], smallest=0.3)
    # 0.3 of 200 px is a patch of scale 2.5, level 2.6: levels 0 and 1, at one sample a pixel, are left out.
    assert bounded.texels.numel() == whole.texels.numel() - 2 * 200 * 300
    scales = 200 / 24 * torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    at = gazes.from_parts(torch.tensor([120.0, 90.0], dtype=torch.float64), scales, torch.zeros(3))[None]
    torch.testing.assert_close(bounded.extract(at), whole.extract(at), rtol=0, atol=0)
    torch.testing.assert_close(bounded.extract(at, 48, 3.0), whole.extract(at, 48, 3.0), rtol=0, atol=0)
    small = gazes.from_parts(torch.tensor([[120.0, 90.0]], dtype=torch.float64), torch.ones(1), torch.zeros(1))[None]
    # What lies below is seen as sharply as the finest level that is there: blurred, by no more than that level's blur.
    level = int(2 * np.log2(0.3 * 200 / 24))
    blurred = gaussian_filter(picture.numpy(), 0.5 * 2 ** (level / 2), mode="nearest", truncate=4.0)
    at_small = gazes.apply(small[0, 0], gazes.lattice(dtype=torch.float64)).flip(-1).permute(2, 0, 1).numpy()
    wanted = map_coordinates(blurred, at_small, order=1, mode="nearest")
    np.testing.assert_allclose(bounded.extract(small)[0, 0].numpy(), wanted, atol=2e-3)  # oversampled by 2


def test_a_flat_picture_is_flat_under_every_gaze() -> None:
    patches = extract(torch.full((37, 50), 0.3, dtype=torch.float64), gazes_of_every_kind((37, 50)))
    torch.testing.assert_close(patches, torch.full_like(patches, 0.3), rtol=0, atol=1e-13)  # weights sum to 1


def test_a_checkerboard_seen_from_far_is_grey() -> None:
    board = (torch.arange(200)[:, None] + torch.arange(200)) % 2
    patch = extract(board.double(), torch.tensor([4.0, 0.0, 99.5, 99.5], dtype=torch.float64))
    # Level 4 blurs by 2 px, which leaves exp(-(2π)²) of the finest pattern, and the kernel's cut at 4 sd a little more.
    torch.testing.assert_close(patch, torch.full_like(patch, 0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.7, 1.6, 3.1])
def test_a_picture_moved_by_whole_pixels_under_a_gaze_moved_along_gives_the_same_patch(scale: float) -> None:
    picture = photograph(260, 260)
    at = gazes.from_parts(torch.tensor([120.3, 131.8]).double(), torch.tensor(scale).double(), torch.tensor(0.5))
    moved = torch.tensor([0.0, 0.0, -17.0, -29.0], dtype=torch.float64)
    # 120 px from every border: the kernel of the coarsest level that is read does not reach it.
    torch.testing.assert_close(extract(picture[29:, 17:], at + moved), extract(picture, at), rtol=0, atol=1e-13)


def test_a_mirrored_picture_under_the_mirrored_gaze_gives_the_mirrored_patch() -> None:
    picture = photograph(60, 80)
    at = gazes_of_every_kind((60, 80))
    mirrored = at * torch.tensor([1.0, -1.0, -1.0, 1.0]) + torch.tensor([0.0, 0.0, 79.0, 0.0])
    for size, extent in ((24, 1.0), (48, 3.0)):
        found = extract(picture.flip(1), mirrored, size, extent)
        torch.testing.assert_close(found, extract(picture, at, size, extent).flip(-1), rtol=0, atol=1e-12)


# ---- slopes


def smooth_at(gaze: Tensor) -> Tensor:
    return extract(photograph(50, 60), gaze, 6)


@pytest.mark.parametrize("scale", [0.15, 0.4, 1.1, 2.9])
def test_slopes_in_the_gaze_are_those_of_differences(scale: float) -> None:
    # A lattice of step 4: scales beyond 0.25 read blurred levels.
    at = gazes.from_parts(torch.tensor([[30.37, 22.71]]).double(), torch.tensor(scale).double(), torch.tensor([0.3]))
    assert torch.autograd.gradcheck(smooth_at, at.double().requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("edge", [(1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (2.0, 2.0)], ids=["0", "1", "2", "3"])
def test_patches_are_continuous_where_levels_meet_and_slopes_are_one_sided(edge: tuple[float, float]) -> None:
    """At |u|² a power of two the levels change over; the reported slope is that of the side of the larger scale."""
    picture = photograph(50, 60)
    at = torch.tensor([*edge, 30.37, 22.71], dtype=torch.float64)
    outwards = torch.tensor([*edge, 0.0, 0.0], dtype=torch.float64)

    def along(share: float) -> Tensor:
        return extract(picture, at + share * outwards)

    tiny, step = 1e-12, 1e-7
    # Slopes of a picture in [0, 1] are below some 20 an e-fold of scale.
    torch.testing.assert_close(along(-tiny), along(tiny), rtol=0, atol=1e-10)

    def slope(share: float) -> Tensor:
        return torch.autograd.functional.jvp(lambda g: extract(picture, g), at + share * outwards, outwards)[1]

    # Second differences: slopes change by some 10 in a pixel, so by 1e-5 in a step.
    torch.testing.assert_close((along(step) - along(0)) / step, slope(0), rtol=0, atol=1e-4)
    torch.testing.assert_close((along(0) - along(-step)) / step, slope(-tiny), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rounded", "off"), [(1 - 1e-9, 0.0), (1 + 1e-9, -1e-10)], ids=["down", "up"])
def test_a_rounded_scale_leaves_out_no_level_that_is_read(
    rounded: float, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors round square roots differently; where levels meet, the slope is still that of all levels."""
    picture, parts = photograph(50, 60), gazes.parts
    at = torch.tensor([1 + off, 1 + off, 30.37, 22.71], dtype=torch.float64)
    outwards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    whole = Pyramid.build([picture], oversampling=None)
    monkeypatch.setattr(gazes, "parts", lambda gaze: parts(gaze)._replace(scale=rounded * parts(gaze).scale))
    _, found = torch.autograd.functional.jvp(lambda g: extract(picture, g), at, outwards)
    _, wanted = torch.autograd.functional.jvp(lambda g: whole.extract(g[None, None])[0, 0], at, outwards)
    # The same sums over the same levels.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_point_beyond_the_edge_has_no_slope() -> None:
    at = torch.tensor([0.5, 0.0, -100.0, 20.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(extract(photograph(50, 60), at).sum(), at)
    # It still sees the rows of the left edge: sliding along the picture changes the patch, going further away does not.
    assert slope[2] == 0 and slope[3] != 0


def test_texels_can_be_learned() -> None:
    pyramid = Pyramid.build([photograph(30, 40)], oversampling=None)
    pyramid.texels.requires_grad_()
    pyramid.extract(torch.tensor([[1.0, 0.2, 20.0, 15.0]], dtype=torch.float64)).sum().backward()
    assert float(pyramid.texels.grad.sum()) == pytest.approx(576)  # the weights of each of 576 points sum to 1


# ---- packing


def test_a_part_of_a_pyramid_reads_its_own_scenes_and_shares_the_texels() -> None:
    pyramid = Pyramid.build(pictures())
    at = torch.stack([gazes_of_every_kind(s) for s in SIZES])
    wanted = pyramid.extract(at)
    assert len(pyramid) == 4
    mask = [True, False, True, False]
    for index in (2, np.int64(2), slice(1, 3), [3, 0], torch.tensor([1, 1, 2]), mask, np.array(mask)):
        part = pyramid[index]
        rows = at[[index] if isinstance(index, int | np.integer) else index]
        torch.testing.assert_close(part.extract(rows), wanted[index].reshape(part.extract(rows).shape), rtol=0, atol=0)
        assert part.texels is pyramid.texels
    which = torch.tensor([3, 1, 1, 0])
    torch.testing.assert_close(pyramid.extract(at[which], scene=which), wanted[which], rtol=0, atol=0)


def test_pyramids_put_together_read_as_they_did() -> None:
    first, second = Pyramid.build(pictures()[:3]), Pyramid.build(pictures()[3:], smallest=0.5)
    at = torch.stack([gazes_of_every_kind(s) for s in SIZES])
    both = Pyramid.concatenate([first, second])
    assert len(both) == 4
    wanted = torch.cat([first.extract(at[:3]), second.extract(at[3:])])
    torch.testing.assert_close(both.extract(at), wanted, rtol=0, atol=0)
    # A part shares the texels of the whole; it may be put together with others all the same.
    parts = Pyramid.concatenate([both[3], both[[1, 0]]])
    torch.testing.assert_close(parts.extract(at[[3, 1, 0]]), wanted[[3, 1, 0]], rtol=0, atol=0)
    # Into a buffer with room to spare, one part after the other.
    buffer = both.texels.new_full((both.texels.numel() + 5,), -1.0)
    copied = Pyramid.concatenate((part for part in (first, second)), buffer)
    torch.testing.assert_close(copied.extract(at), wanted, rtol=0, atol=0)
    assert copied.texels.data_ptr() == buffer.data_ptr()
    assert torch.equal(copied.texels, both.texels) and bool((buffer[-5:] == -1).all())
    with pytest.raises(InputError, match="give a longer one"):
        Pyramid.concatenate([first, second], buffer[:-6])
    with pytest.raises(InputError, match="in bytes"):
        Pyramid.concatenate([first.in_bytes()], buffer)


def test_a_choice_of_scenes_put_together_keeps_the_texels_of_no_others() -> None:
    pyramid = Pyramid.concatenate([Pyramid.build(pictures()[:3]), Pyramid.build(pictures()[3:], smallest=0.5)])
    at = torch.stack([gazes_of_every_kind(s) for s in SIZES])
    wanted = pyramid.extract(at)
    lengths = [Pyramid.concatenate([pyramid[i]]).texels.numel() for i in range(4)]
    assert sum(lengths) == pyramid.texels.numel()
    for chosen, beside in (([3], [0]), ([2, 0], [1]), ([3, 1, 2], [3])):
        part = Pyramid.concatenate([pyramid[chosen], pyramid[beside]])
        torch.testing.assert_close(part.extract(at[chosen + beside]), wanted[chosen + beside], rtol=0, atol=0)
        assert part.texels.numel() == sum(lengths[i] for i in chosen + beside)


def test_leading_dimensions_are_kept() -> None:
    pyramid = Pyramid.build(pictures())
    at = torch.stack([gazes_of_every_kind(s)[:12] for s in SIZES])
    flat = pyramid.extract(at)
    assert flat.shape == (4, 12, 24, 24)
    torch.testing.assert_close(pyramid.extract(at.reshape(4, 3, 2, 2, 4)), flat.reshape(4, 3, 2, 2, 24, 24))
    assert pyramid.extract(at[:, :0], (5, 7)).shape == (4, 0, 5, 7)
    assert pyramid.extract(at[:0, 0], scene=torch.arange(0)).shape == (0, 24, 24)
    assert pyramid.extract(at[:, 0]).shape == (4, 24, 24)


def test_one_picture_a_stack_and_a_list_are_all_pictures() -> None:
    one = pictures()[0]
    at = gazes_of_every_kind(SIZES[0])[:3]
    wanted = extract([one], at[None])[0]
    torch.testing.assert_close(extract(one, at), wanted)
    torch.testing.assert_close(extract(torch.stack([one, one]), torch.stack([at, at]))[1], wanted)
    torch.testing.assert_close(extract(Pyramid.build([one], oversampling=None), at[None])[0], wanted)
    assert extract(one, at[0]).shape == (24, 24)


def test_a_pyramid_in_bytes_reads_alike_by_both_paths_in_a_quarter_of_the_memory() -> None:
    pictures = [torch.rand(40, 50, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    pyramid = Pyramid.build(pictures)
    small = pyramid.in_bytes()
    centre = 40 * torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(9)).double()
    scale = torch.linspace(0.5, 2.0, 30).double().expand(2, 30)
    gaze = gazes.from_parts(centre, scale, torch.tensor(0.3).double())
    expected, found = pyramid.extract(gaze), small.extract(gaze)
    assert found.dtype == torch.float32
    # A texel is off by half of a 255th at most, and a patch's value is a weighted mean of texels.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 / 255 + 1e-5)
    assert float((found - expected).abs().mean()) > 1e-4
    torch.testing.assert_close(small.extract(gaze.requires_grad_()).detach(), found, rtol=0, atol=2e-5)
    assert 4 * small.texels.numpy().nbytes == pyramid.texels.numpy().nbytes
    torch.testing.assert_close(small.to(dtype=torch.float32).extract(gaze.detach()), found, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="in bytes"):
        Pyramid.concatenate([pyramid, small])


def test_a_pyramid_changes_its_dtype_and_keeps_its_tables() -> None:
    pyramid = Pyramid.build(pictures()).to(dtype=torch.float32)
    at = torch.stack([gazes_of_every_kind(s)[:5] for s in SIZES])
    assert pyramid.extract(at).dtype == torch.float32
    assert pyramid.offset.dtype == torch.int64
    assert Pyramid.build(pictures(), dtype=torch.float32).texels.dtype == torch.float32


# ---- bad input


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (3, 20, 20), (7,)])
def test_a_picture_that_is_none_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"picture 1 has shape .*both at least 2"):
        Pyramid.build([torch.rand(9, 9), torch.rand(shape)])


def test_bytes_and_arrays_are_not_taken_for_intensities() -> None:
    build = inspect.unwrap(Pyramid.build.__func__)
    with pytest.raises(InputError, match=r"picture 1 is of torch.uint8: .*as_picture"):
        build(Pyramid, [torch.rand(9, 9), torch.zeros(9, 9, dtype=torch.uint8)])
    with pytest.raises(InputError, match=r"picture 0 is of float64: "):
        build(Pyramid, [np.zeros((9, 9))])


def test_no_pictures_make_no_pyramid() -> None:
    with pytest.raises(InputError, match="at least one picture"):
        Pyramid.build([])


def test_gazes_that_do_not_fit_the_scenes_are_refused() -> None:
    pyramid = Pyramid.build(pictures())
    with pytest.raises(InputError, match=r"do not match 4 scenes"):
        pyramid.extract(torch.rand(3, 4))
    with pytest.raises(InputError, match=r"2 scenes for gazes of shape \(3, 4\)"):
        pyramid.extract(torch.rand(3, 4), scene=torch.tensor([0, 1]))
    with pytest.raises(InputError, match="scenes 0 to 4 are asked for, there are 4"):
        pyramid.extract(torch.rand(2, 4), scene=torch.tensor([0, 4]))
    # Where autograd reads, too, which would count from the end.
    with pytest.raises(InputError, match="scenes -1 to -1 are asked for, there are 4"):
        pyramid.extract(torch.rand(1, 4).requires_grad_(), scene=torch.tensor([-1]))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_gaze_that_is_not_finite_sees_nothing_and_reads_no_foreign_memory(
    number: float, differentiable: bool
) -> None:
    pyramid = Pyramid.build(pictures())[:2]
    for coordinate in range(4):
        at = torch.tensor([[1.5, 0.3, 20.0, 20.0]] * 2, dtype=torch.float64)
        at[0, coordinate] = number
        patches = pyramid.extract(at.requires_grad_(differentiable)).detach()
        assert patches[0].isnan().all() and patches[1].isfinite().all()


def test_an_unknown_gaze_does_not_change_what_the_others_see() -> None:
    picture = pictures()[0]
    wide = torch.tensor([[4.0, 0.0, 20.0, 20.0]], dtype=torch.float64)
    alone = extract(picture, wide)
    beside = extract(picture, torch.cat([wide, torch.full((1, 4), math.nan, dtype=torch.float64)]))
    assert torch.equal(beside[:1], alone) and bool(beside[1].isnan().all())
    assert bool(extract(picture, torch.full((1, 4), math.nan)).isnan().all())
    assert extract([picture], torch.empty(1, 0, 4)).shape == (1, 0, 24, 24)


# ---- density coordinates


def test_density_coordinates_are_the_reference_coordinates(shared_data: Path) -> None:
    definition = reference(shared_data)
    patches = torch.rand(3, 2, 24, 24, dtype=torch.float64)
    found = density_coordinates(patches)
    np.testing.assert_allclose(found.numpy(), definition.density_coordinates(patches.numpy()), atol=1e-12)  # float64
    single = density_coordinates(patches.float())
    np.testing.assert_allclose(single.numpy(), found.numpy(), atol=2e-5)  # float32 sums of 576 numbers


def test_density_coordinates_are_an_orthonormal_view_of_the_normalised_patch() -> None:
    # The definition written out: the columns of a Householder reflection without its first.
    v = torch.full((576,), 1 / 24, dtype=torch.float64)
    v[0] += 1
    basis = (torch.eye(576, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))[:, 1:]
    patches = torch.rand(5, 24, 24, dtype=torch.float64)
    y = density_coordinates(patches)
    torch.testing.assert_close(y, normalise(patches).flatten(1) @ basis, rtol=0, atol=1e-12)
    torch.testing.assert_close(from_density_coordinates(y), normalise(patches), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), normalise(patches).flatten(1).norm(dim=-1))
    back = torch.randn(5, 575, dtype=torch.float64)
    torch.testing.assert_close(from_density_coordinates(back).mean((1, 2)), torch.zeros(5).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("radius", "pixels"), [(0.8, 4), (9.0, 256), (12.0, 448)])
def test_a_disc_says_what_its_pixels_say_and_nothing_else(radius: float, pixels: int) -> None:
    inside = torch.tensor([math.hypot(r - 11.5, c - 11.5) < radius for r in range(24) for c in range(24)])
    basis = disc(radius)
    assert basis.shape == (575, pixels)
    torch.testing.assert_close(basis.T @ basis, torch.eye(pixels, dtype=torch.float64), rtol=0, atol=1e-12)
    normalised = torch.randn(576, dtype=torch.float64)
    normalised -= normalised.mean()
    reflected = from_density_coordinates(torch.eye(575, dtype=torch.float64)).flatten(1).T
    y = reflected.T @ normalised
    # The pixels inside follow from it.
    torch.testing.assert_close((reflected @ (basis @ (basis.T @ y)))[inside], normalised[inside], rtol=0, atol=1e-11)
    # It does not know of those outside.
    other = normalised.clone()
    other[~inside] = other[~inside].flip(0)
    torch.testing.assert_close(basis.T @ (reflected.T @ other), basis.T @ y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("radius", [0.5, 16.3, math.nan])
def test_a_disc_without_pixels_or_with_all_is_refused(radius: float) -> None:
    with pytest.raises(InputError, match=r"a disc has some pixels of the patch and not all, so 0.71 to 16.26"):
        disc(radius)


def test_light_changes_nothing_but_what_the_floor_lets_through() -> None:
    patch = 0.2 + 0.6 * torch.rand(24, 24, dtype=torch.float64)
    torch.testing.assert_close(density_coordinates(patch + 0.1), density_coordinates(patch), rtol=0, atol=1e-12)
    wanted = patch.var(correction=0)
    gain = torch.sqrt((0.49 * wanted + 0.05**2) / (wanted + 0.05**2)) / 0.7
    torch.testing.assert_close(gain * density_coordinates(0.7 * patch), density_coordinates(patch), rtol=0, atol=1e-12)


def test_a_flat_patch_has_coordinates_and_a_slope() -> None:
    patch = torch.full((24, 24), 0.4, dtype=torch.float64, requires_grad=True)
    y = density_coordinates(patch)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(y[0], patch)
    assert slope.isfinite().all() and slope.abs().sum() > 0


def test_slopes_of_density_coordinates_are_those_of_differences() -> None:
    patch = torch.rand(24, 24, dtype=torch.float64)
    direction = torch.randn(24, 24, dtype=torch.float64)
    slope = torch.autograd.functional.jvp(density_coordinates, patch, direction)[1]
    step = 1e-6
    central = (density_coordinates(patch + step * direction) - density_coordinates(patch - step * direction)) / step / 2
    torch.testing.assert_close(slope, central, rtol=0, atol=1e-7)  # third derivatives of some 1e3 times step²


def test_there_are_twelve_blurred_levels() -> None:
    assert Pyramid.build(pictures()).offset.shape == (4, LEVELS + 1) == (4, 13)
