"""Work on PyTorch's number of threads: compiled loops over one batch, and several batches beside each other."""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch

__all__ = ["in_parallel", "on_one_thread", "share"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Pieces of work beside each other, however many processors there are: each holds its own memory.
_BESIDE = 4


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device | None = None
) -> Generator[Result, None, None]:
    """``work(item)`` of every item, in their order, several beside each other on the CPU.

    PyTorch's threads are dealt out: two batches on a thread each are done sooner than one after the other on two,
    for operations as small as a gaze's keep two threads waiting for each other. Fewer batches than threads have more of
    them each, which changes the last digits of what comes of them.

    Args:
        work: runs on a thread of its own, with the caller's grad mode; what it raises is raised when its turn comes.
        items: what to work on. Up to five results wait for the caller.
        device: where the work is done; on anything but a CPU one piece follows the other.
    """
    threads = torch.get_num_threads()
    beside = min(threads, len(items), _BESIDE)
    if beside <= 1 or (device is not None and device.type != "cpu"):
        yield from map(work, items)
        return
    grad = torch.is_grad_enabled()

    def one(item: Item) -> Result:
        with torch.set_grad_enabled(grad):
            return work(item)

    waiting: deque[Future[Result]] = deque()
    # PyTorch counts its threads for each thread that calls it; the caller's own number stays.
    with ThreadPoolExecutor(beside, "foveate-batch", torch.set_num_threads, (threads // beside,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) > beside:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            # What threads of the future begin with.
            torch.set_num_threads(threads)


@contextmanager
def on_one_thread() -> Generator[None, None, None]:
    """What is computed here has the same last bits on any number of threads; it may be slower for it."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def share(kernel: Callable[..., None], count: int, *args: Any, least: int) -> None:
    """Call ``kernel(begin, end, *args)`` on parts of ``0 … count``, on as many threads as PyTorch uses.

    numba's own parallel loops are not used: their OpenMP runtime changes PyTorch's number of threads for good.

    Args:
        kernel: releases the interpreter's lock, and writes for different parts to different places.
        count: length of the batch.
        args: what the kernel takes after the two numbers.
        least: below this many elements a thread costs more than it saves.
    """
    threads = min(torch.get_num_threads(), count // least)
    if threads <= 1:
        kernel(0, count, *args)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    # As many as batches that are worked on beside each other ask for; threads are begun when they are needed.
    pool = _pool(_BESIDE * (threads - 1))
    futures = [pool.submit(kernel, begin, end, *args) for begin, end in pairwise(edges[1:])]
    kernel(edges[0], edges[1], *args)
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="foveate-gaze")


# Threads do not survive a fork, which Windows does not have; a forked worker makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
