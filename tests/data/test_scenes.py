"""Scenes: indexing, folders with label files, SPECs, and every kind of bad input."""

import csv
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data import Scene, Scenes, UnlabelledScene, UnlabelledScenes
from foveate.data.scenes import parse_spec
from foveate.model import gaze
from foveate.model.errors import InputError

LANDMARKS = ["file", "person", "split", "left_eye_x", "left_eye_y", "right_eye_x", "right_eye_y", "mouth_x", "mouth_y"]
TRUE_GAZE = torch.tensor([[1.5, 0.2, 40.0, 30.0], [1.2, -0.1, 50.0, 35.0]], dtype=torch.float64)


def landmark_row(name: str, of: torch.Tensor, person: str = "p", split: str = "train") -> list[str]:
    points = gaze.apply(of, torch.tensor([[-5.0, -3], [5, -3], [0, 7]], dtype=torch.float64))
    return [name, person, split, *(f"{v:.6f}" for v in points.flatten().tolist())]


def write(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two labelled pictures of different sizes, one of each split."""
    for name, size in (("a.png", (100, 80)), ("b.png", (120, 90))):
        Image.new("L", size, 90).save(tmp_path / name)
    rows = [landmark_row("a.png", TRUE_GAZE[0], "ann"), landmark_row("b.png", TRUE_GAZE[1], "bob", "test")]
    write(tmp_path / "landmarks.csv", LANDMARKS, rows)
    return tmp_path


def edit(folder: Path, old: str, new: str) -> None:
    table = folder / "landmarks.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))


def test_a_folder_gives_pictures_gazes_people_and_splits(folder: Path) -> None:
    scenes = Scenes.from_folder(folder)
    assert len(scenes) == 2 and scenes.names == ("a.png", "b.png")
    assert scenes.people == ("ann", "bob") and scenes.splits == ("train", "test")
    assert scenes.sizes.tolist() == [[80, 100], [90, 120]]
    assert scenes.gazes is not None and scenes.gazes.dtype == torch.float64
    # 1e-5: the landmarks were written with six decimals.
    assert torch.allclose(scenes.gazes, TRUE_GAZE, atol=1e-5)
    scene = scenes[1]
    assert isinstance(scene, Scene) and scene.person == "bob" and scene.picture.shape == (90, 120)
    assert scene.picture.dtype == torch.float32
    assert [p.shape for p in scenes.pictures()] == [(80, 100), (90, 120)]
    assert [p.shape for p in scenes.pictures([1])] == [(90, 120)]


def test_scenes_are_chosen_by_slice_list_mask_and_negative_index(folder: Path) -> None:
    scenes = Scenes.from_folder(folder)
    assert scenes[1:].names == scenes[[1]].names == scenes[torch.tensor([False, True])].names == ("b.png",)
    assert scenes[-1].name == "b.png"
    assert scenes[torch.tensor([1, 0])].people == ("bob", "ann")
    assert [scene.name for scene in scenes] == ["a.png", "b.png"]
    with pytest.raises(IndexError, match="2 of 2"):
        scenes[2]
    with pytest.raises(InputError, match="mask"):
        scenes[torch.tensor([True])]


def test_a_subset_shares_the_decoded_pictures(folder: Path) -> None:
    scenes = Scenes.from_folder(folder).preload()
    (folder / "a.png").unlink()
    assert scenes[:1][0].picture.shape == (80, 100)


def test_preloading_names_a_picture_damaged_in_the_middle(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 100), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    held = bytearray((folder / "a.png").read_bytes())
    held[len(held) // 2] ^= 0xFF
    (folder / "a.png").write_bytes(bytes(held))
    with pytest.raises(InputError, match=r"a\.png"):
        Scenes.from_folder(folder).preload()


def test_gazes_csv_is_read_as_it_is_and_unknown_columns_are_ignored(folder: Path) -> None:
    (folder / "landmarks.csv").unlink()
    rows = [["b.png", "1.2", "0", "50", "35", "hm"], ["a.png", "1.5", "-.2", "40", "30", "hm"]]
    write(folder / "gazes.csv", ["file", "a", "b", "tx", "ty", "remark"], rows)
    scenes = Scenes.from_folder(folder)
    assert scenes.gazes is not None and scenes.gazes.tolist() == [[1.5, -0.2, 40, 30], [1.2, 0, 50, 35]]
    assert scenes.people is None and scenes.splits is None


def test_labels_are_wanted_in_three_ways_and_no_other(folder: Path) -> None:
    labels: Any = "some"
    with pytest.raises(InputError, match="labels 'some': there are required, optional, hidden"):
        inspect.unwrap(Scenes.from_folder.__func__)(Scenes, folder, labels=labels)


def test_splits_come_from_their_column(folder: Path) -> None:
    assert Scenes.from_folder(folder, "test").names == Scenes.from_folder(folder).split("test").names == ("b.png",)
    for attempt in (lambda: Scenes.from_folder(folder, "dev"), lambda: Scenes.from_folder(folder).split("dev")):
        with pytest.raises(InputError, match=r"unknown split 'dev'; the splits there are test, train"):
            attempt()


def test_a_picture_in_a_folder_below_is_named_by_its_relative_path(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "a.png").rename(folder / "more" / "a.png")
    edit(folder, "a.png", "more\\a.png")
    assert Scenes.from_folder(folder).names == ("b.png", "more/a.png")


def test_without_required_labels_unknown_gazes_are_none(folder: Path) -> None:
    table = folder / "landmarks.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    scenes = Scenes.from_folder(folder, labels="optional")
    assert scenes[0].gaze is not None and scenes[1].gaze is None and scenes[1].person is None
    assert scenes.gazes is not None and scenes.gazes[1].isnan().all()
    assert scenes.labelled().names == ("a.png",)
    table.unlink()
    bare = Scenes.from_folder(folder, labels="optional")
    assert bare.gazes is None and bare[0].gaze is None
    with pytest.raises(InputError, match="none of the 2 scenes has a gaze"):
        bare.labelled()


BAD_TABLES = {
    "missing row": (lambda f: edit(f, "b.png", "a.png") or edit_rows(f, 2), r"no row for picture 'b.png'"),
    "absent picture": (lambda f: edit(f, "b.png", "c.png"), r"row 3: picture 'c.png' is not in"),
    "duplicate": (lambda f: edit(f, "b.png", "a.png"), r"row 3: picture 'a.png' already has a row .*row 2"),
    "not a number": (lambda f: edit_cell(f, 2, 3, "left"), r"row 3: 'left' in column left_eye_x is not a number"),
    "empty cell": (lambda f: edit_cell(f, 2, 3, ""), r"row 3: '' in column left_eye_x is not a number"),
    "infinite": (lambda f: edit_cell(f, 1, 4, "inf"), r"row 2: 'inf' in column left_eye_y is not finite"),
    "nan": (lambda f: edit_cell(f, 1, 4, "nan"), r"row 2: 'nan' in column left_eye_y is not finite"),
    "too few cells": (lambda f: edit_cell(f, 2, 8, None), r"row 3: has 8 cells, the header has 9"),
    "no name": (lambda f: edit_cell(f, 2, 0, ""), r"row 3: the cell 'file' is empty"),
    "missing columns": (lambda f: edit(f, "mouth_x,mouth_y", "x,y"), r"lacks the columns mouth_x, mouth_y"),
    "empty file": (lambda f: (f / "landmarks.csv").write_text(""), r"lacks the columns file"),
    "not text": (lambda f: (f / "landmarks.csv").write_bytes(b"\xff\xfe\x00\xd8"), r"not a CSV file in UTF-8"),
    "outside": (lambda f: shift(f, 500), r"row 2: the gaze of 'a.png' has its centre at \(540.0, 30.0\), outside"),
    "mirrored": (lambda f: swap_eyes(f), r"row 2: eyes and mouth lie on one line or mirrored"),
    "upside down": (lambda f: turn_over(f), r"row 2: a = -1.5 is a negative scale or a turn of 90° or more"),
    "semicolons": (lambda f: replace(f, ",", ";"), r"row 1 is separated by ';'; save the table with commas"),
    "capitals": (lambda f: replace(f, "mouth_x", "Mouth_X"), r"column mouth_x must be in small letters"),
    "column twice": (lambda f: replace(f, "mouth_x,", "mouth_y,mouth_x,"), r"has the column mouth_y twice"),
    "both files": (lambda f: (f / "gazes.csv").write_text("file,a,b,tx,ty"), r"both landmarks.csv and gazes.csv"),
    "no file": (lambda f: (f / "landmarks.csv").unlink(), r"neither landmarks.csv nor gazes.csv"),
}


def rows_of(folder: Path) -> list[list[str]]:
    with (folder / "landmarks.csv").open(newline="") as file:
        return list(csv.reader(file))


def put(folder: Path, rows: list[list[str]]) -> None:
    write(folder / "landmarks.csv", rows[0], rows[1:])


def edit_rows(folder: Path, keep: int) -> None:
    put(folder, rows_of(folder)[:keep])


def edit_cell(folder: Path, row: int, column: int, value: str | None) -> None:
    rows = rows_of(folder)
    if value is None:
        del rows[row][column]
    else:
        rows[row][column] = value
    put(folder, rows)


def shift(folder: Path, by: float) -> None:
    rows = rows_of(folder)
    rows[1][3::2] = [str(float(cell) + by) for cell in rows[1][3::2]]
    put(folder, rows)


def replace(folder: Path, old: str, new: str) -> None:
    table = folder / "landmarks.csv"
    table.write_text(table.read_text().replace(old, new))


def turn_over(folder: Path) -> None:
    rows = rows_of(folder)
    rows[1] = landmark_row("a.png", torch.tensor([-1.5, 0.2, 40.0, 30.0]).double())
    put(folder, rows)


def swap_eyes(folder: Path) -> None:
    rows = rows_of(folder)
    rows[1][3:7] = rows[1][5:7] + rows[1][3:5]
    put(folder, rows)


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_a_bad_label_file_is_refused_in_one_line_that_names_the_row(folder: Path, fault: str) -> None:
    spoil, message = BAD_TABLES[fault]
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        Scenes.from_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (["0", "0", "40", "30"], "scale 0"),
        (["-1.5", "0", "40", "30"], "negative scale"),
        (["1.5", "0", "-40", "30"], "outside"),
        (["1.5", "0", "40", "80"], "outside"),
        (["1.5", "0", "40", "x"], "not a number"),
        (["1e-3", "0", "40", "30"], r"a square 0.024 pixels wide in a picture of 100×80"),
        (["1e5", "0", "40", "30"], r"pixels wide in a picture of 100×80"),
    ],
)
def test_a_gaze_that_cannot_be_is_refused(folder: Path, numbers: list[str], message: str) -> None:
    (folder / "landmarks.csv").unlink()
    (folder / "b.png").unlink()
    write(folder / "gazes.csv", ["file", "a", "b", "tx", "ty"], [["a.png", *numbers]])
    with pytest.raises(InputError, match=f"gazes.csv, row 2.*{message}"):
        Scenes.from_folder(folder)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.text(max_size=8), min_size=1, max_size=9), position=st.integers(0, 60))
def test_whatever_stands_in_a_label_file_the_answer_is_scenes_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], position: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    Image.new("L", (100, 80)).save(folder / "a.png")
    text = ",".join(LANDMARKS) + "\n" + ",".join(landmark_row("a.png", TRUE_GAZE[0])) + "\n"
    junk = ",".join(cells)
    (folder / "landmarks.csv").write_text(text[:position] + junk + text[position:], errors="ignore")
    try:
        scenes = Scenes.from_folder(folder)
    except InputError as error:
        assert str(folder) in str(error)
    else:
        assert scenes.gazes is not None and scenes.gazes.isfinite().all()


def test_a_broken_picture_in_a_folder_is_named(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"b\.png"):
        Scenes.from_folder(folder)
    assert len(Scenes.from_folder(folder, "train")) == 1


def test_pictures_in_memory_become_scenes() -> None:
    pictures = [torch.rand(30, 40, dtype=torch.float64), np.full((50, 60), 255, np.uint8)]
    scenes = Scenes.from_pictures(pictures, gazes=torch.tensor([[1.0, 0, 20, 15], [1.0, 0, 30, 25]]))
    assert scenes.names == ("picture_0000", "picture_0001")
    assert scenes[0].picture.dtype == torch.float32 and scenes[1].picture.eq(1).all()
    with pytest.raises(InputError, match=r"gaze 1.*outside the picture of 60×50"):
        Scenes.from_pictures(pictures, gazes=torch.tensor([[1.0, 0, 20, 15], [1.0, 0, 300, 25]]))
    with pytest.raises(InputError, match=r"gaze 0.*positive scale"):
        Scenes.from_pictures(pictures, gazes=torch.tensor([[0.0, 0, 20, 15], [1.0, 0, 30, 25]]))
    with pytest.raises(InputError, match="2 pictures but 1 gazes"):
        Scenes.from_pictures(pictures, gazes=torch.ones(1, 4))
    with pytest.raises(InputError, match="2 pictures but 1 names"):
        Scenes.from_pictures(pictures, names=["a"])
    with pytest.raises(InputError, match="empty list"):
        Scenes.from_pictures([])


def test_concatenation_keeps_what_each_part_knows(folder: Path) -> None:
    labelled, bare = Scenes.from_folder(folder), Scenes.from_pictures([torch.zeros(30, 30)])
    both = Scenes.concatenate([bare, labelled])
    assert both.names == ("picture_0000", "a.png", "b.png") and both.people == (None, "ann", "bob")
    assert both[0].gaze is None and both[2].gaze is not None
    assert both.split("test").names == ("b.png",)
    with pytest.raises(InputError, match="nothing to concatenate"):
        Scenes.concatenate([])


def test_unlabelled_scenes_carry_no_label_anywhere(folder: Path) -> None:
    blind = Scenes.from_folder(folder).without_gazes()
    assert isinstance(blind, UnlabelledScenes) and not isinstance(blind, Scenes)
    assert isinstance(blind[0], UnlabelledScene) and blind[0]._fields == ("picture", "name")
    for label in ("gazes", "people", "splits", "_gazes", "_people", "_splits"):
        assert not hasattr(blind, label)
    assert blind[1:].names == ("b.png",) and [scene.name for scene in blind] == ["a.png", "b.png"]


def test_hidden_labels_are_not_even_read(folder: Path) -> None:
    for column in range(1, 9):
        if column != 2:
            edit_cell(folder, 1, column, "secret")
    assert UnlabelledScenes.from_folder(folder, "train").names == ("a.png",)
    (folder / "landmarks.csv").write_bytes(b"\xff\xfe\x00")
    assert len(UnlabelledScenes.from_folder(folder)) == 2


def test_files_and_folders_are_taken_as_given(folder: Path) -> None:
    given_paths = [folder / "b.png", folder]
    scenes = UnlabelledScenes.from_files(given_paths)
    assert scenes.names == tuple((folder / n).as_posix() for n in ("b.png", "a.png", "b.png"))
    with pytest.raises(InputError, match="no picture was given"):
        UnlabelledScenes.from_files([])
    with pytest.raises(InputError, match="no such picture"):
        UnlabelledScenes.from_files([folder / "c.png"])


def test_what_a_folder_holds_beside_pictures_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(UnlabelledScenes.from_files([folder])) == 2 and not caplog.messages
    (folder / "c.heic").write_bytes(b"")
    (folder / "elsewhere").symlink_to(folder.parent, target_is_directory=True)
    assert len(UnlabelledScenes.from_files([folder])) == 2
    assert "2 passed over" in caplog.text and "c.heic" in caplog.text


def test_links_to_folders_are_told_and_names_that_look_the_same_are_the_same(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "elsewhere").symlink_to(folder.parent, target_is_directory=True)
    # As a Mac's archives have it: the letter and its accent are two.
    (folder / "a.png").rename(folder / "Jose\u0301.png")
    replace(folder, "a.png", "Jos\u00e9.png")
    scenes = Scenes.from_folder(folder)
    assert scenes.names == ("Jose\u0301.png", "b.png") and scenes.people == ("ann", "bob")
    assert "1 linked folder(s) passed over" in caplog.text and "elsewhere" in caplog.text
    # Two rows for what is one file are two rows, and two files with such names are each their own row's.
    both = [*rows_of(folder), landmark_row("Jose\u0301.png", TRUE_GAZE[1])]
    put(folder, both)
    with pytest.raises(InputError, match=r"row 4: picture 'Jose\u0301.png' already has a row .*row 2"):
        Scenes.from_folder(folder)
    shutil.copy(folder / "b.png", folder / "Jos\u00e9.png")
    scenes = Scenes.from_folder(folder)
    assert scenes.gazes is not None
    by_name = dict(zip(scenes.names, scenes.gazes, strict=True))
    assert torch.allclose(by_name["Jos\u00e9.png"], TRUE_GAZE[0]) and torch.allclose(
        by_name["Jose\u0301.png"], TRUE_GAZE[1]
    )


def test_a_spec_names_kind_folder_and_split(folder: Path) -> None:
    assert Scenes.from_spec(f"folder:{folder}@test").names == ("b.png",)
    assert Scenes.from_specs([f"folder:{folder}@test", f"caltech:{folder}@train"]).names == ("b.png", "a.png")
    assert UnlabelledScenes.from_spec(f"webfaces:{folder}@test").names == ("b.png",)
    assert len(UnlabelledScenes.from_specs([f"folder:{folder}"] * 2)) == 4
    assert parse_spec("orl@train") == ("orl", None, "train") and parse_spec("orl") == ("orl", None, None)


def test_an_at_sign_in_a_folder_name_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "me@home").mkdir()
    assert parse_spec(f"folder:{tmp_path}/me@home") == ("folder", tmp_path / "me@home", None)
    assert parse_spec(f"folder:{tmp_path}/me@home@test") == ("folder", tmp_path / "me@home", "test")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown SPEC ''"),
        ("faces", "unknown SPEC 'faces'"),
        ("coco:dir", "unknown SPEC 'coco:dir'"),
        ("caltech", "unknown SPEC"),
        ("caltech:", "unknown SPEC"),
        ("orl:dir", "unknown SPEC"),
        ("orl@dev", "unknown split 'dev'; orl has @train and @test"),
        ("orl@", "unknown split ''"),
        ("folder:dir@", "nothing stands behind the @"),
        ("folder:@train", "nothing stands before the @"),
        ("folder:/no/such/dir@train", "no such folder"),
        ("lfw:/no/such/dir", "no LFW there"),
        ("multipie:/no/such/dir", "no such folder"),
    ],
)
def test_a_wrong_spec_says_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Scenes.from_spec(spec)
    assert "\n" not in str(caught.value)


def test_no_spec_at_all_says_what_to_write() -> None:
    with pytest.raises(InputError, match="no SPEC was given; write orl"):
        Scenes.from_specs([])


def test_clutter_without_a_label_file_is_halved_by_name(tmp_path: Path) -> None:
    for k in range(5):
        Image.new("L", (30, 30), k).save(tmp_path / f"{k}.png")
    spec = f"folder:{tmp_path}"
    assert Scenes.from_clutter_spec(f"{spec}@train").names == ("0.png", "1.png")
    assert Scenes.from_clutter_spec(f"{spec}@test").names == ("2.png", "3.png", "4.png")
    everything = Scenes.from_clutter_spec(spec)
    assert len(everything) == 5 and everything.gazes is None
    with pytest.raises(InputError, match="unknown split 'dev'"):
        Scenes.from_clutter_spec(f"{spec}@dev")
    with pytest.raises(InputError, match="clutter is pictures without"):
        Scenes.from_clutter_spec(f"caltech:{tmp_path}")
    write(tmp_path / "landmarks.csv", ["file", "split"], [[f"{k}.png", "train" if k < 4 else "test"] for k in range(5)])
    assert len(Scenes.from_clutter_spec(f"{spec}@train")) == 4


def test_the_shared_scenes_load_with_their_splits_and_crops(shared_data: Path) -> None:
    from foveate.model.patch import extract

    scenes = Scenes.from_spec(f"caltech:{shared_data / 'caltech_faces'}@test")
    assert scenes.gazes is not None and len(scenes) == 75 and len(set(scenes.people or ())) == 5
    crops = torch.from_numpy(np.load(shared_data / "crops.npz")["caltech_test"][:4])
    # 1e-5: extraction equals the reference to that, in float32.
    assert (extract(scenes.pictures(range(4)), scenes.gazes[:4].float()) - crops).abs().max() < 1e-5
    assert len(Scenes.from_spec(f"webfaces:{shared_data / 'webfaces'}@test")) == 200
    assert len(UnlabelledScenes.from_spec(f"webfaces:{shared_data / 'webfaces'}@train")) == 784
    assert len(Scenes.from_clutter_spec(f"folder:{shared_data / 'clutter'}@train")) == 100
