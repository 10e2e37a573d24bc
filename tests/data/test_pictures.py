"""Decoding: every kind of picture becomes grey luminance in [0, 1], and every broken one is named."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data import pictures
from foveate.data.pictures import PictureCache, PictureInMemory, as_luminance, decode, list_pictures, open_pictures
from foveate.model.errors import InputError

RAMP = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_an_eight_bit_grey_picture_keeps_its_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(RAMP))
    assert np.array_equal(decode(path), RAMP)
    # 1e-7: one float32 rounding of k / 255.
    assert torch.allclose(as_luminance(decode(path)), torch.from_numpy(RAMP / 255.0).float(), atol=1e-7)


def test_colour_becomes_luma_of_itu_r_601(tmp_path: Path) -> None:
    colour = np.zeros((30, 40, 3), np.uint8)
    colour[:] = (200, 100, 50)
    got = decode(save(tmp_path / "a.png", Image.fromarray(colour)))
    # One grey level: pillow rounds to bytes.
    assert abs(int(got[0, 0]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) <= 1


def test_sixteen_bits_are_scaled_and_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = (RAMP.astype(np.uint16) * 257)[:, ::-1].copy()
    paths = [save(tmp_path / f"{k}.png", Image.fromarray(deep)) for k in range(3)]
    with caplog.at_level(logging.WARNING, "foveate.data"):
        opened = open_pictures(paths)
    # 1e-6: float32 division by 65535.
    assert np.allclose(opened[0].read(), deep / 65535.0, atol=1e-6)
    assert opened[0].read().dtype == np.float32
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "3 pictures of 16 bits" in messages[0] and "0.png" in messages[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_mid_grey_and_stated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    image = Image.new(mode, (40, 30), (255,) * (len(mode) - 1) + (0,))
    path = save(tmp_path / "a.png", image)
    with caplog.at_level(logging.WARNING, "foveate.data"):
        open_pictures([path])
    assert np.all(decode(path) == 128)
    assert "transparency" in caplog.text


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("L", (40, 30), value) for value in (50, 200)]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING, "foveate.data"):
        open_pictures([path])
    assert np.all(decode(path) == 50)
    assert "first frame" in caplog.text


def test_the_exif_orientation_turns_pixels_and_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    path = save(tmp_path / "a.jpg", Image.fromarray(RAMP), exif=exif, quality=95)
    (opened,) = open_pictures([path])
    assert opened.size == (40, 30) == opened.read().shape
    # The ramp grew to the right; turned clockwise it grows downwards. Two levels: JPEG.
    assert np.abs(opened.read()[:, 0].astype(int) - RAMP[0]).max() <= 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_turned_tiff_is_read_as_the_turned_picture(tmp_path: Path, orientation: int, compression: str | None) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[pictures.EXIF_ORIENTATION] = orientation
    options = {} if compression is None else {"compression": compression}
    path = save(tmp_path / "turned.tif", image, exif=exif, **options)
    # What EXIF says: 3 is half a turn, 6 a quarter clockwise, 8 one counter-clockwise.
    wanted = np.rot90(stored, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    np.testing.assert_array_equal(pictures.decode(path), wanted)
    (opened,) = pictures.open_pictures([path])
    assert opened.size == wanted.shape


def test_sixteen_bits_whose_zero_is_white_are_read_as_they_look_and_thirty_two_are_refused(tmp_path: Path) -> None:
    white = Image.fromarray(np.full((30, 30), 65535, np.uint16))
    path = save(tmp_path / "negative.tif", white, tiffinfo={pictures.PHOTOMETRIC: pictures.WHITE_IS_ZERO})
    assert Image.open(path).tag_v2[pictures.PHOTOMETRIC] == pictures.WHITE_IS_ZERO
    np.testing.assert_array_equal(pictures.decode(path), 0.0)
    np.testing.assert_array_equal(pictures.decode(save(tmp_path / "positive.tif", white)), 1.0)
    wide = save(tmp_path / "wide.tif", Image.fromarray(np.full((30, 30), 200, np.int32)))
    with pytest.raises(InputError, match="integers of 32 bits"):
        pictures.decode(wide)


def test_a_palette_picture_is_read_through_its_palette(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(np.stack([RAMP] * 3, -1)).convert("P"))
    assert decode(path).max() > 200


def corrupted(path: Path, kind: str) -> Path:
    """A picture made unusable in one way."""
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "tiny":
        Image.new("L", (1, 1)).save(path)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        held = path.read_bytes()
        path.write_bytes(held[: len(held) // 2])
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "tiny", "truncated"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".pgm", ".tif", ".gif"])
def test_a_broken_picture_is_named_before_anything_is_decoded(tmp_path: Path, kind: str, suffix: str) -> None:
    path = corrupted(tmp_path / f"broken{suffix}", kind)
    with pytest.raises(InputError, match="broken") as caught:
        open_pictures([path])
    assert "\n" not in str(caught.value)
    assert ("24×24" in str(caught.value)) == (kind == "tiny")


def test_damage_in_the_middle_of_a_picture_is_found_when_it_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(noise))
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 0xFF
    path.write_bytes(bytes(held))
    with pytest.raises(InputError, match=r"a\.png"):
        open_pictures([path])[0].read()


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png: no such picture"):
        open_pictures([tmp_path / "gone.png"])


def test_all_pictures_that_cannot_be_used_are_named_at_once(tmp_path: Path) -> None:
    save(tmp_path / "fine.png", Image.fromarray(RAMP))
    paths = [corrupted(tmp_path / f"{i:02d}.png", "empty") for i in range(12)]
    with pytest.raises(InputError, match="and 2 more") as caught:
        open_pictures([tmp_path / "fine.png", *paths])
    assert all(path.name in str(caught.value) for path in paths[:10]) and "\n" not in str(caught.value)


def test_a_floating_point_picture_must_lie_between_zero_and_one(tmp_path: Path) -> None:
    fine = save(tmp_path / "a.tif", Image.fromarray((RAMP / 255).astype(np.float32)))
    assert np.allclose(decode(fine), RAMP / 255, atol=1e-6)  # float32
    with pytest.raises(InputError, match=r"b\.tif.*\[0, 1\]"):
        decode(save(tmp_path / "b.tif", Image.fromarray(RAMP.astype(np.float32))))


def test_folders_that_hold_no_picture_say_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.png").write_bytes(b"")
    with pytest.raises(InputError, match="holds no picture"):
        list_pictures(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        list_pictures(tmp_path / "absent")
    with pytest.raises(InputError, match="is a file"):
        list_pictures(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((30, 30), np.nan), "900 of 900 pixels are NaN"),
        (np.full((30, 30), 255.0), "divide by 255"),
        (np.full((30, 30), -0.1), r"\[0, 1\]"),
        (np.zeros((30, 30, 3)), "grey picture"),
        (np.zeros((30, 30), np.int64), "dtype int64"),
        (np.zeros((1, 1)), "24×24"),
        (np.zeros((0, 30)), "too small"),
    ],
)
def test_a_bad_picture_in_memory_is_named_by_its_place(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=f"picture 7.*{message}"):
        pictures.from_array(array, "picture 7")


def test_the_cache_decodes_once_and_forgets_the_oldest() -> None:
    class Counted:
        size = (1, 2**19)

        def __init__(self) -> None:
            self.reads = 0

        def read(self) -> np.ndarray:
            self.reads += 1
            return np.zeros(self.size, np.uint8)

    first, second, third = Counted(), Counted(), Counted()
    cache = PictureCache(megabytes=1.0)
    for picture in (first, second, first, third, first, second):
        cache.read(picture)
    # Half a megabyte each: two fit; the third drove the second out, not the first, which had been used since.
    assert (first.reads, second.reads, third.reads) == (1, 2, 1)


def test_a_picture_in_memory_is_not_copied() -> None:
    tensor = torch.rand(30, 40)
    held = pictures.from_array(tensor, "picture 0")
    assert isinstance(held, PictureInMemory) and held.read().ctypes.data == tensor.data_ptr()
