"""Scenes: pictures of any sizes with optional gazes, people, splits and names, decoded when they are looked at.

Convention (the whole module): a picture is a float32 tensor ``(height, width)`` of grey luminance in [0, 1], x right, y
down, pixel centres at integers; a gaze is ``(a, b, tx, ty)``, canonical to scene (`foveate.model.gaze`), float64.
"""

import logging
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, overload

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from tqdm import tqdm

from foveate.data import labels as label_files
from foveate.data.pictures import (
    Picture,
    PictureCache,
    as_luminance,
    from_array,
    list_pictures,
    open_pictures,
    passed_over,
)
from foveate.model.errors import InputError

__all__ = ["Labels", "Scene", "Scenes", "Spec", "UnlabelledScene", "UnlabelledScenes", "parse_spec", "unknown_split"]

Labels = Literal["required", "optional", "hidden"]

# How many scenes `orl` composes: as many as the training budget of the bootstrap, and enough to score to a percent.
ORL_SPEC_SCENES = {"train": 900, "test": 100}

logger = logging.getLogger("foveate.data")


class Scene(NamedTuple):
    """One scene.

    Attributes:
        picture: ``(height, width)`` float32 luminance in [0, 1].
        gaze: ``(4,)`` float64 true gaze, or None when it is not known.
        name: file name relative to its folder, or a made name.
        person: who is seen, or None.
    """

    picture: Tensor
    gaze: Tensor | None
    name: str
    person: str | None


class UnlabelledScene(NamedTuple):
    """One scene of which nothing is known but its picture ``(height, width)`` (float32 in [0, 1]) and its name."""

    picture: Tensor
    name: str


class Spec(NamedTuple):
    """A parsed SPEC.

    Attributes:
        kind: ``orl``, ``caltech``, ``webfaces``, ``lfw``, ``multipie`` or ``folder``.
        directory: the folder, or None for ``orl``.
        split: the name behind ``@``, or None.
    """

    kind: str
    directory: Path | None
    split: str | None


SPEC_KINDS = ("orl", "caltech", "webfaces", "lfw", "multipie", "folder")
SPEC_HELP = "write orl, caltech:DIR, webfaces:DIR, lfw:DIR, multipie:DIR or folder:DIR, with @train or @test if wanted"


AnyScenes = TypeVar("AnyScenes", bound="_PictureList")


class _PictureList:
    """What labelled and unlabelled scenes share: pictures, names, sizes, and the cache of what was decoded."""

    def __init__(self, pictures: Sequence[Picture], names: Sequence[str], cache: PictureCache | None = None):
        if len(pictures) != len(names):
            raise InputError(f"{len(pictures)} pictures but {len(names)} names; give one name per picture")
        names = tuple(map(str, names))
        for name in names:
            # Bytes of another encoding in a file name; no table and no report could hold it.
            if name != name.encode("utf-8", "replace").decode("utf-8"):
                raise InputError(f"{name!r}: this file name is not UTF-8; rename the file")
        self._pictures = tuple(pictures)
        self._names = names
        self._cache = PictureCache() if cache is None else cache

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each scene: its file relative to its folder, or a made name. Two folders may hold the same name."""
        return self._names

    @property
    def sizes(self) -> Int[Tensor, "scene 2"]:
        """Height and width of each picture in pixels; no picture is decoded for it."""
        return torch.tensor([p.size for p in self._pictures], dtype=torch.int64).reshape(-1, 2)

    def pictures(self, indices: Iterable[int] | Tensor | None = None) -> list[Tensor]:
        """The pictures (of `indices`, or all) as float32 tensors ``(height, width)`` in [0, 1], decoded now."""
        return [self._read(i) for i in (range(len(self)) if indices is None else self._positions(indices))]

    def source(self, index: int) -> Picture:
        """The readable picture behind a scene, not yet decoded: to build other pictures from it."""
        return self._pictures[self._position(index)]

    def preload(self: "AnyScenes", progress: bool = False) -> "AnyScenes":
        """Decode every picture now, so that a damaged one is found before any long work; returns itself.

        What fits stays in the cache (8-bit pictures take one byte a pixel).

        Raises:
            InputError: a picture is damaged; the message names it.
        """
        for picture in tqdm(self._pictures, desc="reading", unit="picture", disable=not progress):
            self._cache.read(picture)
        return self

    def _read(self, index: int) -> Tensor:
        return as_luminance(self._cache.read(self._pictures[index]))

    def _position(self, index: int) -> int:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return position

    def _positions(self, indices: slice | Iterable[int] | Tensor | np.ndarray) -> list[int]:
        if isinstance(indices, slice):
            return list(range(len(self)))[indices]
        chosen = torch.as_tensor(indices if isinstance(indices, (Tensor, np.ndarray)) else list(indices))
        if chosen.dtype == torch.bool:
            if chosen.shape != (len(self),):
                raise InputError(f"a mask of shape {tuple(chosen.shape)} cannot choose from {len(self)} scenes")
            chosen = chosen.nonzero().flatten()
        return [self._position(int(i)) for i in chosen.tolist()]


class UnlabelledScenes(_PictureList):
    """Pictures and names and nothing else: what learning without labels is given.

    No gaze, person or split is kept anywhere in it.

    Args:
        pictures: readable pictures, such as `foveate.data.pictures.PictureFile`.
        names: one name per picture.
        cache: where decoded pictures are kept; a new one by default.

    Convention: as the module.
    """

    @classmethod
    def from_folder(cls, directory: str | os.PathLike, split: str | None = None) -> "UnlabelledScenes":
        """All pictures below a folder; with `split`, those that the label file's columns ``file, split`` put there.

        Of a label file nothing but these two columns is read, and nothing at all without `split`.

        Raises:
            InputError: see `Scenes.from_folder`.
        """
        return Scenes.from_folder(directory, split, labels="hidden").without_gazes()

    @classmethod
    def from_files(cls, paths: Sequence[str | os.PathLike]) -> "UnlabelledScenes":
        """Pictures by path, named as given; a folder among them stands for all pictures below it.

        What is passed over in a folder, by its suffix or because it is a link to another folder, is logged.

        Raises:
            InputError: a path is missing or no picture, or no path was given.
        """
        if not paths:
            raise InputError("no picture was given; name at least one file or folder")
        found: list[Path] = []
        for path in map(Path, paths):
            here = list_pictures(path) if path.is_dir() else [path]
            found += here
            left = passed_over(path, here) if path.is_dir() else []
            if left:
                logger.warning(
                    "%s: %d passed over, no pictures by their suffix or links to folders (first: %s); "
                    "name them one by one to have them read",
                    path, len(left), left[0],
                )  # fmt: skip
        return cls(open_pictures(found), [path.as_posix() for path in found])

    @classmethod
    def from_spec(cls, spec: str, seed: int = 0) -> "UnlabelledScenes":
        """The pictures of one SPEC (see `Scenes.from_spec`), its labels never read."""
        return Scenes.from_spec(spec, labels="hidden", seed=seed).without_gazes()

    @classmethod
    def from_specs(cls, specs: Sequence[str], seed: int = 0) -> "UnlabelledScenes":
        """The pictures of several SPECs, one after the other."""
        return Scenes.from_specs(specs, labels="hidden", seed=seed).without_gazes()

    @overload
    def __getitem__(self, index: int) -> UnlabelledScene: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor | np.ndarray) -> "UnlabelledScenes": ...
    def __getitem__(self, index: Any) -> "UnlabelledScene | UnlabelledScenes":
        if isinstance(index, (int, np.integer)):
            position = self._position(int(index))
            return UnlabelledScene(self._read(position), self._names[position])
        return self.subset(index)

    def __iter__(self) -> Iterator[UnlabelledScene]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"UnlabelledScenes({len(self)} pictures)"

    def subset(self, indices: slice | Iterable[int] | Tensor | np.ndarray) -> "UnlabelledScenes":
        """The scenes at `indices` (integers, a slice or a boolean mask), sharing this one's cache."""
        chosen = self._positions(indices)
        return UnlabelledScenes([self._pictures[i] for i in chosen], [self._names[i] for i in chosen], self._cache)


class Scenes(_PictureList):
    """Pictures of any sizes with what is known of them.

    An integer index gives a `Scene`; a slice, a list of integers or a mask gives the `Scenes` chosen. Pictures are
    decoded when they are looked at and kept in a cache of bounded size, so memory does not grow with the number of
    scenes.

    Args:
        pictures: readable pictures, such as `foveate.data.pictures.PictureFile`.
        names: one name per picture.
        gazes: ``(scene, 4)`` float64 true gazes, a row of NaN where a gaze is not known; None when none is.
        people: who is seen in each, or None.
        splits: split of each, or None.
        cache: where decoded pictures are kept; a new one by default.

    Convention: as the module.

    Raises:
        InputError: the lengths differ.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        names: Sequence[str],
        gazes: Float[Tensor, "scene 4"] | None = None,
        people: Sequence[str | None] | None = None,
        splits: Sequence[str | None] | None = None,
        cache: PictureCache | None = None,
    ):
        super().__init__(pictures, names, cache)
        for what, given in (("gazes", gazes), ("people", people), ("splits", splits)):
            if given is not None and len(given) != len(pictures):
                raise InputError(f"{len(pictures)} pictures but {len(given)} {what}; give one per picture")
        known = gazes is not None and not bool(gazes.isnan().all())
        self._gazes = gazes.detach().to("cpu", torch.float64) if gazes is not None and known else None
        self._people = tuple(people) if people is not None and any(p is not None for p in people) else None
        self._splits = tuple(splits) if splits is not None and any(s is not None for s in splits) else None

    @classmethod
    def from_pictures(
        cls,
        pictures: Sequence[Any],
        names: Sequence[str] | None = None,
        gazes: Float[Tensor, "scene 4"] | None = None,
        people: Sequence[str | None] | None = None,
        splits: Sequence[str | None] | None = None,
    ) -> "Scenes":
        """Scenes from pictures in memory.

        Args:
            pictures: arrays or tensors ``(height, width)``, float in [0, 1] or uint8, of any sizes.
            names: ``picture_0000`` and so on by default.
            gazes: ``(scene, 4)``; a row of NaN where a gaze is not known.
            people: who is seen in each.
            splits: split of each.

        Raises:
            InputError: no picture, or one with NaN pixels, values outside [0, 1], a wrong shape or a side below 24
                pixels; a gaze of scale 0, or with its centre outside its picture.
        """
        if len(pictures) == 0:
            raise InputError("an empty list of pictures; give at least one")
        held = [from_array(picture, f"picture {i}") for i, picture in enumerate(pictures)]
        names = [f"picture_{i:04d}" for i in range(len(held))] if names is None else names
        scenes = cls(held, names, gazes, people, splits)
        for i, gaze in enumerate([] if scenes.gazes is None else scenes.gazes):
            if not gaze.isnan().any():
                if not gaze.isfinite().all() or float(gaze[:2].norm()) == 0:
                    raise InputError(f"gaze {i} is {gaze.tolist()}: it must be finite and of positive scale √(a² + b²)")
                a, b, tx, ty = gaze.tolist()
                label_files.check_gaze(
                    label_files.Label(f"gaze {i}", (a, b, tx, ty), None, None), names[i], held[i].size
                )
        return scenes

    @classmethod
    def from_folder(
        cls,
        directory: str | os.PathLike,
        split: str | None = None,
        labels: Labels = "required",
        keep: Callable[[str], bool] | None = None,
    ) -> "Scenes":
        """All pictures below a folder, with its `landmarks.csv` or `gazes.csv` (columns: `foveate.data.labels`).

        The label file and every picture's header are checked here; pixels are decoded when they are looked at.

        Args:
            directory: the folder; pictures in folders below it count too and are named by their relative path.
            split: keep the scenes of this split alone.
            labels: ``"required"``: every picture has a gaze. ``"optional"``: a missing label file or row leaves the
                gaze unknown. ``"hidden"``: no gaze and no person is read; only for `split` are the columns ``file,
                split`` read.
            keep: which pictures count, by their relative name; all by default. The others are not opened and need no
                row.

        Raises:
            InputError: the folder is missing or empty; a picture is unreadable, truncated or too small; the label file
                is missing (when required), lacks a column or a picture's row (when required), names an absent picture,
                or has two rows for one picture, a cell that is no number, a gaze turned by 90° or more, with its centre
                outside the picture or of no size of an object (`foveate.data.labels.check_gaze`); the split is unknown.
        """
        if labels not in get_args(Labels):
            raise InputError(f"labels {labels!r}: there are {', '.join(get_args(Labels))}")
        folder = Path(directory)
        listed = list_pictures(folder)
        links = [path for path in passed_over(folder, listed) if path.is_symlink() and path.is_dir()]
        if links:
            logger.warning("%s: %d linked folder(s) passed over (first: %s)", folder, len(links), links[0])
        everything = {path.relative_to(folder).as_posix(): path for path in listed}
        paths = {name: path for name, path in everything.items() if keep is None or keep(name)}
        table = label_files.find_label_file(folder)
        if table is None and labels == "required":
            raise InputError(
                f"{folder}: has neither landmarks.csv nor gazes.csv, which training and evaluation need; add one"
            )
        if table is None and split is not None:
            raise InputError(
                f"{folder}: has no label file with a column 'split', so @{split} is unknown; leave @{split} away"
            )
        found: dict[str, label_files.Label] = {}
        if table is not None and (labels != "hidden" or split is not None):
            rows = label_files.read_labels(table, hidden=labels == "hidden")
            found = _by_file_name(rows, everything)
            _check_rows(everything, paths, found, table, required=labels == "required")
        return _assemble(paths, found, split, str(table))

    @classmethod
    def from_spec(cls, spec: str, labels: Labels = "required", seed: int = 0) -> "Scenes":
        """The scenes of one SPEC of the command line.

        Args:
            spec: ``orl`` (composed scenes: 900 of the training people, 100 of the test people), ``caltech:DIR``,
                ``webfaces:DIR``, ``lfw:DIR``, ``multipie:DIR`` or ``folder:DIR``, with an optional ``@train`` or
                ``@test`` (any name that the folder's column ``split`` knows).
            labels: see `from_folder`.
            seed: of the composed scenes.

        Raises:
            InputError: an unknown SPEC or split, or what the loader of its kind raises.
        """
        # The loaders build on this module, so they are named only when a SPEC is read.
        from foveate.data import compose, faces

        kind, directory, split = parse_spec(spec)
        if directory is None:
            wanted = ["train", "test"] if split is None else [split]
            parts = [compose.orl_scenes(s, ORL_SPEC_SCENES[s], seed) for s in wanted]
            return cls.concatenate(parts)
        loaders = {
            "caltech": faces.caltech_faces,
            "webfaces": faces.webfaces,
            "lfw": faces.lfw,
            "multipie": faces.multi_pie,
            "folder": cls.from_folder,
        }
        return loaders[kind](directory, split, labels=labels)

    @classmethod
    def from_specs(cls, specs: Sequence[str], labels: Labels = "required", seed: int = 0) -> "Scenes":
        """The scenes of several SPECs, one after the other (see `from_spec`).

        Raises:
            InputError: no SPEC was given, or one is wrong.
        """
        if not specs:
            raise InputError(f"no SPEC was given; {SPEC_HELP}")
        return cls.concatenate([cls.from_spec(spec, labels, seed) for spec in specs])

    @classmethod
    def from_clutter_spec(cls, spec: str, seed: int = 0) -> "Scenes":
        """Pictures without the object: ``folder:DIR``, or ``orl`` for the photographs behind the composed scenes.

        In a folder without a label file ``@train`` is the first half of the pictures by name and ``@test`` the rest;
        with one, its columns ``file, split`` decide.

        Raises:
            InputError: an unknown SPEC or split, a SPEC that holds faces, or what `from_folder` raises.
        """
        from foveate.data import compose

        kind, directory, split = parse_spec(spec)
        if directory is None:
            wanted = ["train", "test"] if split is None else [split]
            return cls.concatenate([compose.orl_clutter(s, ORL_SPEC_SCENES[s], seed) for s in wanted])
        if kind != "folder":
            raise InputError(
                f"clutter '{spec}': {kind} pictures show faces; clutter is pictures without: folder:DIR or orl"
            )
        if split is None or label_files.find_label_file(directory) is not None:
            return cls.from_folder(directory, split, labels="hidden")
        if split not in ("train", "test"):
            raise InputError(
                f"clutter '{spec}': unknown split '{split}'; a folder without label file has @train and @test"
            )
        paths = {path.relative_to(directory).as_posix(): path for path in list_pictures(directory)}
        names = list(paths)
        half = len(names) // 2
        chosen = names[:half] if split == "train" else names[half:]
        if not chosen:
            raise InputError(
                f"clutter '{spec}': one picture cannot be split in two; add pictures or leave @{split} away"
            )
        return cls(open_pictures([paths[n] for n in chosen]), chosen, splits=[split] * len(chosen))

    @classmethod
    def concatenate(cls, parts: Sequence["Scenes"]) -> "Scenes":
        """Several scenes one after the other; a gaze, person or split that a part does not have stays unknown.

        Raises:
            InputError: there is no part.
        """
        if not parts:
            raise InputError("nothing to concatenate; give at least one Scenes")
        unknown = float("nan")
        gazes = [
            p.gazes if p.gazes is not None else torch.full((len(p), 4), unknown, dtype=torch.float64) for p in parts
        ]
        return cls(
            [picture for p in parts for picture in p._pictures],
            [name for p in parts for name in p._names],
            torch.cat(gazes),
            [person for p in parts for person in p._people or [None] * len(p)],
            [split for p in parts for split in p._splits or [None] * len(p)],
            max((p._cache for p in parts), key=lambda cache: cache.megabytes),
        )

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor | np.ndarray) -> "Scenes": ...
    def __getitem__(self, index: Any) -> "Scene | Scenes":
        if isinstance(index, (int, np.integer)):
            i = self._position(int(index))
            gaze = None if self._gazes is None or self._gazes[i].isnan().any() else self._gazes[i]
            return Scene(self._read(i), gaze, self._names[i], self._people[i] if self._people else None)
        return self.subset(index)

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        known = 0 if self._gazes is None else int((~self._gazes.isnan().any(-1)).sum())
        return f"Scenes({len(self)} pictures, {known} with a gaze)"

    @property
    def gazes(self) -> Float64[Tensor, "scene 4"] | None:
        """True gazes, a row of NaN where one is not known; None when none is."""
        return self._gazes

    @property
    def people(self) -> tuple[str | None, ...] | None:
        """Who is seen in each scene, None where it is not known; None when nothing is."""
        return self._people

    @property
    def splits(self) -> tuple[str | None, ...] | None:
        """Split of each scene, None where it has none; None when none has."""
        return self._splits

    def subset(self, indices: slice | Iterable[int] | Tensor | np.ndarray) -> "Scenes":
        """The scenes at `indices` (integers, a slice or a boolean mask), sharing this one's cache."""
        chosen = self._positions(indices)
        return Scenes(
            [self._pictures[i] for i in chosen],
            [self._names[i] for i in chosen],
            None if self._gazes is None else self._gazes[chosen],
            None if self._people is None else [self._people[i] for i in chosen],
            None if self._splits is None else [self._splits[i] for i in chosen],
            self._cache,
        )

    def split(self, name: str) -> "Scenes":
        """The scenes of one split.

        Raises:
            InputError: no scene belongs to it.
        """
        chosen = [i for i, s in enumerate(self._splits or ()) if s == name]
        if not chosen:
            raise InputError(unknown_split(name, self._splits or (), "these scenes"))
        return self.subset(chosen)

    def labelled(self) -> "Scenes":
        """The scenes whose gaze is known.

        Raises:
            InputError: there is none.
        """
        if self._gazes is None:
            raise InputError(
                f"none of the {len(self)} scenes has a gaze; add landmarks.csv or gazes.csv to their folder"
            )
        return self.subset(~self._gazes.isnan().any(-1))

    def with_people(self, people: Sequence[str | None] | None, splits: Sequence[str | None] | None = None) -> "Scenes":
        """The same scenes, people named anew; splits too if given.

        Raises:
            InputError: the lengths differ.
        """
        return Scenes(self._pictures, self._names, self._gazes, people, splits or self._splits, self._cache)

    def with_gazes(self, gazes: Float[Tensor, "scene 4"]) -> "Scenes":
        """The same scenes with other gazes.

        Raises:
            InputError: not one gaze per scene.
        """
        return Scenes(self._pictures, self._names, gazes, self._people, self._splits, self._cache)

    def without_gazes(self) -> UnlabelledScenes:
        """The pictures and names alone, in a type that carries no label."""
        return UnlabelledScenes(self._pictures, self._names, self._cache)


def parse_spec(spec: str) -> Spec:
    """Take a SPEC such as ``caltech:DIR@train`` apart.

    What follows the last ``@`` is a split, unless the folder of that whole name exists.

    Raises:
        InputError: the kind is unknown, the folder is not named, or ``orl`` has a folder or a split of another name.
    """
    kind, colon, rest = spec.partition(":")
    if not colon:
        kind, at, split = spec.partition("@")
        if kind == "orl" and (not at or split in ORL_SPEC_SCENES):
            return Spec("orl", None, split or None)
        if kind == "orl":
            raise InputError(f"SPEC '{spec}': unknown split '{split}'; orl has @train and @test")
    if kind not in SPEC_KINDS or kind == "orl" or not rest:
        raise InputError(f"unknown SPEC '{spec}'; {SPEC_HELP}")
    directory, at, split = rest.rpartition("@")
    if not at or Path(rest).is_dir() or "/" in split:
        return Spec(kind, Path(rest), None)
    if not split or not directory:
        raise InputError(f"SPEC '{spec}': nothing stands {'behind' if directory else 'before'} the @; {SPEC_HELP}")
    return Spec(kind, Path(directory), split)


def unknown_split(name: str, known: Iterable[str | None], where: str) -> str:
    """The message for a split that `where` does not have, naming those that it has."""
    names = sorted({s for s in known if s is not None})
    there = f"the splits there are {', '.join(names)}" if names else "no split is given there"
    return f"{where}: unknown split '{name}'; {there}"


def _assemble(paths: dict[str, Path], labels: dict[str, label_files.Label], split: str | None, source: str) -> Scenes:
    """Scenes of the pictures of one folder, those of `split` alone if given, every header and gaze checked."""
    if split is not None:
        of_split = {name: path for name, path in paths.items() if name in labels and labels[name].split == split}
        if not of_split:
            raise InputError(unknown_split(split, [label.split for label in labels.values()], source))
        paths = of_split
    pictures = open_pictures(list(paths.values()))
    nothing = label_files.Label("", None, None, None)
    rows = [labels.get(name, nothing) for name in paths]
    for name, row, picture in zip(paths, rows, pictures, strict=True):
        label_files.check_gaze(row, name, picture.size)
    unknown = (float("nan"),) * 4
    gazes = torch.tensor([row.gaze or unknown for row in rows], dtype=torch.float64)
    return Scenes(pictures, list(paths), gazes, [row.person for row in rows], [row.split for row in rows])


def _by_file_name(rows: dict[str, label_files.Label], names: Iterable[str]) -> dict[str, label_files.Label]:
    """Labels by the names of files as they are; some systems write é as one letter, some as two.

    A row that names a file exactly is that file's; any other that of the file whose name looks the same.
    """
    exact = set(names)
    alike: dict[str, list[str]] = {}
    for name in exact:
        alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    found: dict[str, label_files.Label] = {}
    for name, label in rows.items():
        candidates = [name] if name in exact else alike.get(unicodedata.normalize("NFC", name), [name])
        file = candidates[0] if len(candidates) == 1 else name
        if file in found:
            raise InputError(
                f"{label.row}: picture '{file}' already has a row ({found[file].row}); keep one of the two"
            )
        found[file] = label
    return found


def _check_rows(
    everything: dict[str, Path],
    paths: dict[str, Path],
    labels: dict[str, label_files.Label],
    table: Path,
    required: bool,
) -> None:
    """Refuse rows without a picture, and pictures without a row where a row is required."""
    extra = [name for name in labels if name not in everything]
    if extra:
        raise InputError(
            f"{labels[extra[0]].row}: picture '{extra[0]}' is not in {table.parent} ({len(extra)} such row"
            f"{'s' * (len(extra) > 1)}); add the picture or remove the row"
        )
    missing = [name for name in paths if name not in labels]
    if missing and required:
        raise InputError(
            f"{table}: has no row for picture '{missing[0]}' ({len(missing)} such picture{'s' * (len(missing) > 1)}); "
            "add the row or move the picture away"
        )
    if missing:
        logger.warning("%s has no row for %d of %d pictures (first: %s)", table, len(missing), len(paths), missing[0])
