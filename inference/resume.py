"""Where training stands, on disk: broken off, it goes on from there, to the result it would have had anyway.

A checkpoint is a folder with one safetensors file a stage, written whole or not at all, and ``made_of.json``, which
says of what: a checkpoint of other scenes or settings is refused. Nothing in it is ever unpickled.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.inference.checkpoint import atomic_file, write_json
from foveate.model.errors import InputError

__all__ = ["Checkpoint", "digest", "discard", "holds_work"]

MADE_OF = "made_of.json"

logger = logging.getLogger("foveate.inference")


class Checkpoint:
    """States of training by stage.

    Args:
        folder: where they lie; None keeps nothing.
        made_of: what the result depends on.
        every: steps from one state to the next.
    """

    def __init__(self, folder: Path | None = None, made_of: Mapping[str, Any] | None = None, every: int = 100):
        self.folder, self.made_of, self.every = folder, made_of or {}, every

    @classmethod
    def open(cls, folder: Path | None, made_of: Mapping[str, Any], resume: bool) -> "Checkpoint":
        """The checkpoint at `folder`: the one that is there, or a new one; its first state makes the folder.

        Args:
            folder: None keeps nothing.
            made_of: JSON-able; what the result depends on.
            resume: go on from what is there.

        Raises:
            InputError: something is there that is not to be resumed, was made of something else, or is no checkpoint.
        """
        if folder is not None and holds_work(folder):
            told = folder / MADE_OF
            if not told.is_file():
                raise InputError(f"{folder}: holds something else than unfinished training; move it away")
            if not resume:
                raise InputError(f"{folder}: holds unfinished training; go on with --resume, or remove that folder")
            before = json.loads(told.read_text(encoding="utf-8"))
            other = [name for name, value in made_of.items() if before.get(name) != value]
            if other:
                raise InputError(
                    f"{folder}: the training there is another one ({', '.join(other)} differ); go on with it as it "
                    "was, or remove that folder"
                )
        return cls(folder, made_of)

    def begin(
        self, stage: str, module: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator
    ) -> tuple[list[float], dict[str, Tensor]]:
        """Put a stage where it stood: its module, optimiser and generator are changed in place.

        Returns:
            The losses of the steps that are done, and the further tensors that were kept; both empty at first.

        Raises:
            InputError: the state is damaged or of another form.
        """
        path = self._path(stage)
        if path is None or not path.is_file():
            return [], {}
        try:
            # Copies: a file that is still mapped into memory cannot be replaced on Windows.
            state = {name: value.clone() for name, value in load_file(path).items()}
            module.load_state_dict(_under("module.", state))
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("optimiser.", state).items():
                number, slot = name.split(".", 1)
                slots.setdefault(int(number), {})[slot] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
            generator.set_state(state["generator"])
            losses = state["losses"].tolist()
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: is damaged ({error}); remove {path.parent} to begin anew") from error
        return losses, _under("further.", state)

    def keep(
        self,
        stage: str,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
        losses: list[float],
        last: bool,
        **further: Tensor,
    ) -> None:
        """Write where a stage stands, every so many steps and after its last.

        Args:
            stage: its name.
            module: what is trained.
            optimiser: its state goes with it.
            generator: of the stage's random numbers.
            losses: of the steps done.
            last: whether the stage is done.
            further: whatever else the next step depends on.
        """
        path = self._path(stage)
        if path is None or not (last or len(losses) % self.every == 0):
            return
        if not (path.parent / MADE_OF).is_file():
            write_json(path.parent / MADE_OF, self.made_of)
        state = {f"module.{name}": value for name, value in module.state_dict().items()}
        for number, slots in optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{number}.{name}": value for name, value in slots.items()}
        state |= {f"further.{name}": value for name, value in further.items()}
        state |= {"generator": generator.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
        with atomic_file(path) as partial:
            # Copies: safetensors refuses tensors that share memory or are not contiguous.
            save_file({name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, partial)

    def _path(self, stage: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage}.safetensors"


def holds_work(folder: Path) -> bool:
    """Whether a folder is there and holds anything but a log and what was half written; so does a file in its place."""
    if not folder.is_dir():
        return folder.exists()
    return any(not path.name.startswith(".") and path.name != "log.jsonl" for path in folder.iterdir())


def discard(folder: Path) -> None:
    """Remove a folder of unfinished work, if it is there; broken off, what is left no longer stands for work."""
    if not folder.exists():
        return
    spent = folder.with_name(f".{folder.name}.spent")
    shutil.rmtree(spent, ignore_errors=True)
    try:
        folder.rename(spent)
    except OSError:
        # It could not be removed when it was spent before: in its own place, then.
        spent = folder
    shutil.rmtree(spent, ignore_errors=True)
    if spent.exists():
        logger.warning("%s: could not be removed; nothing needs it any more", spent)


def digest(*tensors: Tensor) -> str:
    """What tells tensors from others: 16 hexadecimal digits of the SHA-256 of their bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
