"""Work beside each other on PyTorch's threads: order, errors, and what the threads know."""

import os
import runpy
import threading
import time

import pytest
import torch

from foveate.model import threads as threads_module
from foveate.model.threads import in_parallel, share


@pytest.fixture(params=[1, 2, 8])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


def test_results_come_in_the_order_of_the_items(threads: int):
    def slowest_first(i: int) -> int:
        time.sleep(0.002 * (9 - i))
        return i * i

    assert list(in_parallel(slowest_first, range(10))) == [i * i for i in range(10)]


def test_as_many_beside_each_other_as_there_are_threads_and_no_more_than_four(threads: int):
    expected = min(threads, 4)
    # Every piece waits until the others of its kind are there: fewer at once would break the barrier by its timeout.
    together = threading.Barrier(expected)

    def work(i: int) -> tuple[int, int]:
        together.wait(timeout=30)
        return threading.get_ident(), torch.get_num_threads()

    seen = list(in_parallel(work, range(2 * expected)))
    assert len({thread for thread, _ in seen}) == expected
    # One thread has all; eight are dealt out, two to each of four.
    assert {inside for _, inside in seen} == {threads // expected}


def test_results_that_nobody_takes_do_not_pile_up():
    torch.set_num_threads(2)
    begun: list[int] = []
    results = in_parallel(begun.append, range(50))
    next(results)
    time.sleep(0.2)
    # The one taken, and two that wait.
    assert len(begun) <= 3
    results.close()
    assert len(begun) <= 3


def test_an_error_is_raised_when_its_turn_comes(threads: int):
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("the fourth")
        return i

    taken = []
    with pytest.raises(ValueError, match="the fourth"):
        for result in in_parallel(work, range(100)):
            taken.append(result)
    assert taken == [0, 1, 2]
    assert torch.get_num_threads() == threads


def test_threads_of_later_begin_with_the_callers_number(threads: int):
    results = in_parallel(lambda i: i, range(10))
    next(results)
    assert torch.get_num_threads() == threads
    results.close()
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [threads]


def test_batches_beside_each_other_do_not_wait_for_one_anothers_helpers():
    """Eight threads: four batches of two parts each. Every part waits for the seven others, or the barrier breaks."""
    torch.set_num_threads(8)
    together = threading.Barrier(8)
    done: list[int] = []

    def kernel(begin: int, end: int) -> None:
        together.wait(timeout=30)
        done.extend(range(begin, end))

    list(in_parallel(lambda i: share(kernel, 2, least=1), range(4)))
    assert sorted(done) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("grad", [True, False])
def test_the_callers_grad_mode_holds_inside(threads: int, grad: bool):
    with torch.set_grad_enabled(grad):
        assert set(in_parallel(lambda i: torch.is_grad_enabled(), range(6))) == {grad}


def test_on_a_gpu_one_piece_follows_the_other():
    torch.set_num_threads(2)
    where = set(in_parallel(lambda i: threading.get_ident(), range(4), torch.device("cuda")))
    assert where == {threading.get_ident()}


def test_a_system_without_forks_has_them_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "register_at_fork")  # as on Windows
    module = runpy.run_path(str(threads_module.__file__))
    assert list(module["in_parallel"](lambda i: 2 * i, range(3))) == [0, 2, 4]
