"""One batch on many threads: compiled loops that release the interpreter's lock, on PyTorch's number of threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

__all__ = ["share"]


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
    futures = [_pool(threads - 1).submit(kernel, begin, end, *args) for begin, end in pairwise(edges[1:])]
    kernel(edges[0], edges[1], *args)
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="foveate-gaze")


# Threads do not survive a fork; a forked worker makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
