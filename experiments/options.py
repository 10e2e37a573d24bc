"""What all commands share: seed, device, threads, and how they tell where they are."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from tqdm import tqdm

from foveate.inference.checkpoint import Run, load
from foveate.model.errors import InputError

__all__ = ["Common", "StageBars", "announce", "open_run", "print_table", "require_at_least", "require_steps"]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command.

    Attributes:
        seed: of everything that is random.
        device: auto takes CUDA where PyTorch sees it, else the CPU.
        threads: of the CPU; all cores by default (bench: one, then two).
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def prepare(self) -> None:
        """Check these options and set the number of threads.

        Raises:
            InputError: a negative or huge seed, no thread, or CUDA where there is none.
        """
        require_at_least("--seed", self.seed, 0)
        if self.seed >= 2**31:
            raise InputError(f"--seed {self.seed}: at most {2**31 - 1} is possible")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch sees no CUDA device here; leave --device away, or say cpu")
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.threads is not None:
            require_at_least("--threads", self.threads, 1)
            threads = self.threads
        torch.set_num_threads(threads)

    @property
    def torch_device(self) -> str:
        """The device that `device` stands for."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def run(self) -> None:
        """Do what the command does.

        Raises:
            InputError: for input that cannot be used, before any long work.
        """
        raise NotImplementedError


class StageBars:
    """Progress of work in stages: a bar with the time left for each, or a line for each where nobody watches.

    An instance is called with ``(stage, done, total, figure)``, as `foveate.inference.fit.fit` reports. On a terminal
    that is a bar; elsewhere a line when a stage ends, with its seconds.
    """

    def __init__(self) -> None:
        self.watched = sys.stderr.isatty()
        self.stage, self.figure = "", 0.0
        self.bar: tqdm | None = None
        self.began = time.perf_counter()

    def __enter__(self) -> "StageBars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, stage: str, done: int, total: int, figure: float) -> None:
        if stage != self.stage:
            self._end()
            self.stage, self.began = stage, time.perf_counter()
            self.bar = tqdm(total=total, initial=done, desc=stage, disable=not self.watched, dynamic_ncols=True)
        self.figure = figure
        if self.bar is not None:
            self.bar.update(max(0, done - self.bar.n))
            self.bar.set_postfix_str(f"{figure:.4g}", refresh=False)

    def _end(self) -> None:
        if self.bar is None:
            return
        self.bar.close()
        self.bar = None
        if not self.watched:
            seconds = time.perf_counter() - self.began
            figure = f" ({self.figure:.4g})" if self.figure else ""
            print(f"{self.stage}: {seconds:.0f} s{figure}", file=sys.stderr, flush=True)


def announce(text: str) -> None:
    """Tell on standard error what begins and where its output goes."""
    print(text, file=sys.stderr, flush=True)


def open_run(path: Path, device: str) -> Run:
    """Read a run and put it on a device.

    Raises:
        InputError: see `foveate.inference.checkpoint.load`.
    """
    run = load(path)
    return Run(run.model.to(device), run.guide.to(device), run.config)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: first column to the left, the others to the right."""
    # A name may have a line's end in it.
    header, *rows = [[cell.replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    rule = ["-" * width for width in widths]
    for row in [header, rule, *rows]:
        right = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *right]))


def require_steps(budget: Any) -> None:
    """Refuse a budget, a dataclass of numbers of steps, with a part that has none.

    Raises:
        InputError: naming the option.
    """
    for name, steps in dataclasses.asdict(budget).items():
        require_at_least(f"--{name.replace('_', '-')}", steps, 1)


def require_at_least(option: str, value: int, least: int) -> None:
    """Refuse an option below its least value.

    Raises:
        InputError: naming the option.
    """
    if value < least:
        raise InputError(f"{option} {value}: at least {least} is needed")
