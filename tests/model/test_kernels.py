"""Compiled loops: what they are compiled with where nothing can be kept."""

from collections.abc import Callable
from typing import Any

import numba
import pytest

from foveate.model import kernels


def test_loops_are_compiled_where_no_folder_can_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly:
        """numba where neither the module's folder nor the user's can be written to."""

        @staticmethod
        def njit(*, cache: bool = False, **options: Any) -> Callable[..., Any]:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return numba.njit(**options)

    monkeypatch.setattr(kernels, "numba", ReadOnly)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        doubled = kernels.compiled(fastmath=True)(lambda x: 2 * x)
    assert doubled(1.5) == 3.0
