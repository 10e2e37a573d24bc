"""Runs on disk: a folder of JSON and safetensors, written whole or not at all, and nothing in it is ever unpickled.

A run holds ``config.json`` (forms and settings), ``model.safetensors``, ``guide.safetensors`` and ``log.jsonl`` (one
JSON object a line, what training said of itself). A run is first written beside its place and then moved there, so that
a crash leaves either the old run or the new one.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.inference.guide import GazeGuide
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.identity import IdentityModel

__all__ = ["FORMAT", "Run", "atomic_file", "load", "require_replaceable", "save", "write_json"]

# Counts the layouts of a run's files; raised when an older program would not read rightly what a newer one writes.
# 2: the odds of edges are divided by the temperature as those of the pixels are, and have no weight of their own.
# 3: the odds may have an aperture. Runs of format 2 have none, and are read.
FORMAT, READ = 3, (2, 3)


@dataclass(frozen=True, eq=False)
class Run:
    """What training makes and attention needs.

    Attributes:
        model: the generative model, with ``latent="full"`` after `load`.
        guide: proposes gazes.
        config: how the run was made; JSON-able.
    """

    model: AttentionModel
    guide: GazeGuide
    config: dict[str, Any] = field(default_factory=dict)


def save(run: Run, path: str | os.PathLike, log: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Write a run to the folder `path`, whole or not at all.

    A run that is there already is replaced; files in its folder that are not part of a run stay.

    Args:
        run: what to write; parameters may live on any device and have any floating dtype.
        path: the folder; its parents are made.
        log: JSON-able objects for ``log.jsonl``; None keeps the log of the run that is replaced.

    Raises:
        InputError: when `path` is a file or a folder that holds something else than a run, when `run.config` or
            `log` is not JSON-able, or for a model with a prior over gazes of its own. Nothing is changed then.
    """
    require_known_prior(run.model, "saved")
    target = Path(path).resolve()
    previous = _previous(target)
    if previous.is_dir():
        _finish_replacing(target, previous)
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        _write_run(run, partial, log, target / "log.jsonl")
        if target.exists():
            # A folder cannot be renamed onto another in one step; between the two steps `load` reads the previous one.
            os.rename(target, previous)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if previous.is_dir():
        _finish_replacing(target, previous)


def load(path: str | os.PathLike) -> Run:
    """Read a run from the folder `path`, onto the CPU, modules in evaluation mode.

    Raises:
        InputError: for no folder, a folder that is no run, a run of another format, a file that is missing or damaged,
            tensors that do not fit the form in ``config.json``; the message names the file.
    """
    folder = Path(path)
    if not folder.exists():
        previous = _previous(folder.resolve())
        if not previous.is_dir():
            raise InputError(f"{path}: there is no such run; make one with `foveate train --out {path}`")
        folder = previous
    config = _read_config(folder)
    where = folder / "config.json"
    try:
        stated, model_form, guide_form = config["settings"], config["model"], config["guide"]
        dbn = DeepBeliefNet.from_config(model_form["dbn"])
        clutter = ClutterModel.blank(dbn.core.dimension) if model_form["clutter"] else None
        directions = model_form["identity"]
        model = AttentionModel(
            dbn,
            clutter,
            noise=model_form["noise"],
            temperature=model_form["temperature"],
            gaze_prior=model_form["gaze_prior"],
            prior_options=model_form["prior_options"],
            identity=None if directions is None else IdentityModel.blank(directions),
            edges=EdgeOdds.blank() if model_form["edges"] else None,
            # Runs of earlier versions have none.
            aperture=model_form.get("aperture"),
        )
        # Its first weights are thrown away, and nobody's random numbers with them.
        with torch.random.fork_rng(devices=[]):
            guide = GazeGuide(**guide_form)
        if not isinstance(stated, dict):
            raise TypeError(f"settings are {stated!r}")
        # What does not fit is told here, not at the first picture or after the last.
        model.prior(torch.ones(2))
        if not stated.get("coverage_factor", 1.0) > 0:
            raise ValueError(f"coverage_factor is {stated['coverage_factor']!r}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{where}: {_named(error)} is missing or of the wrong kind; train or copy the run again"
        ) from error
    _fill(model, folder / "model.safetensors")
    _fill(guide, folder / "guide.safetensors")
    return Run(model.eval(), guide.eval(), stated)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all; numbers that JSON does not know (NaN, ±∞) become null.

    Raises:
        InputError: when `content` holds something that JSON cannot.
    """
    text = _json(content, str(path), indent=2)
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to instead of `path`: moved there when the block ends, removed when it fails.

    Parent folders are made.

    Raises:
        InputError: `path` is a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise InputError(f"{path}: is a folder; name a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: some writers choose their format by it.
    partial = target.with_name(f".{uuid.uuid4().hex}.partial{target.suffix}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write_run(run: Run, folder: Path, log: Iterable[Mapping[str, Any]] | None, old_log: Path) -> None:
    content = {
        "format": FORMAT,
        "model": {**run.model.config, "dbn": run.model.dbn.config},
        "guide": run.guide.config,
        "settings": run.config,
    }
    write_json(folder / "config.json", content)
    for name, module in (("model", run.model), ("guide", run.guide)):
        # Copies: safetensors refuses tensors that share memory or are not contiguous.
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")
        _flush(folder / f"{name}.safetensors")
    destination = folder / "log.jsonl"
    if log is None and old_log.is_file():
        shutil.copyfile(old_log, destination)
    else:
        lines = [_json(entry, "log.jsonl") for entry in log or ()]
        destination.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    _flush(destination)


def require_known_prior(model: AttentionModel, done: str) -> None:
    """Refuse a subclass with a prior of its own, which would come back from disk as another: `InputError`."""
    if type(model).prior is not AttentionModel.prior:
        raise InputError(
            f"a {type(model).__name__} has a prior over gazes of its own, which is code and in no run's folder, so it "
            f"cannot be {done}: give an AttentionModel, its prior by gaze_prior and prior_options"
        )


def require_replaceable(target: Path) -> None:
    """Refuse to put a run where anything but an earlier run lies: `InputError`."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file, and a run is a folder: choose another name")
    if any(target.iterdir()) and not _is_run(target):
        raise InputError(
            f"{target} holds files but no run, so it is not overwritten: choose another folder or empty it"
        )


def _is_run(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "format" in config and "model" in config


def _previous(target: Path) -> Path:
    """Where the run that is being replaced waits."""
    return target.with_name(f".{target.name}.previous")


def _finish_replacing(target: Path, previous: Path) -> None:
    """End a replacement, this one or one that was interrupted: keep what is not part of a run, drop the rest."""
    if not target.exists():
        os.rename(previous, target)
        return
    for entry in previous.iterdir():
        if not (target / entry.name).exists():
            os.rename(entry, target / entry.name)
    shutil.rmtree(previous)


def _read_config(folder: Path) -> dict[str, Any]:
    where = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, and a run is a folder: name the folder that holds config.json")
    if not where.is_file():
        raise InputError(f"{folder} is no run: it has no config.json; name a folder that `foveate train` wrote")
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); train or copy the run again") from error
    if not isinstance(config, dict) or "format" not in config:
        raise InputError(f"{where} is not a run's: it names no format; name a folder that `foveate train` wrote")
    found = config["format"]
    if found not in READ:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "install a newer foveate" if newer else "train the run again, or install the foveate that wrote it"
        raise InputError(
            f"{where}: the run has format {found!r} and this foveate reads format {READ[0]} to {FORMAT}; {remedy}"
        )
    return config


def _fill(module: nn.Module, where: Path) -> None:
    if not where.is_file():
        raise InputError(f"{where} is missing: the run is not whole; train or copy it again")
    try:
        tensors = load_file(where)
    except SafetensorError as error:
        raise InputError(f"{where} is damaged ({error}); train or copy the run again") from error
    expected = module.state_dict()
    for name in expected.keys() - tensors.keys():
        raise InputError(f"{where}: tensor {name} is missing; train or copy the run again")
    for name, tensor in tensors.items():
        if name not in expected or tensor.shape != expected[name].shape:
            wanted = f"shape {tuple(expected[name].shape)}" if name in expected else "no such tensor"
            raise InputError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)} where config.json asks for {wanted}; the "
                "files are not of one run: copy it again"
            )
        _require_numbers(name, tensor, where)
    # assign: the tensors keep the dtype they were saved with. Copies begin where memory is aligned, as tensors that
    # never were in a file do: BLAS sums in another order elsewhere.
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)


def _require_numbers(name: str, tensor: Tensor, where: Path) -> None:
    # Infinity and NaN mean something in single numbers (degrees of freedom, a log Z not yet known), elsewhere never.
    if tensor.ndim > 0 and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{where}: tensor {name} holds values that are not numbers; train the run again")


def _named(error: Exception) -> str:
    return f"the entry {error}" if isinstance(error, KeyError) else f"an entry ({error})"


def _json(content: Any, where: str, indent: int | None = None) -> str:
    try:
        return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise InputError(f"{where}: {error}; turn it into numbers, strings, lists and dicts") from error


def _finite(content: Any) -> Any:
    """The same with null for NaN and ±∞, which readers of JSON other than Python refuse."""
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _flush(path: Path) -> None:
    """Onto the disk, so that a rename never overtakes what it names."""
    # Windows flushes only what may be written to.
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
