"""What every test stands on: checked shapes, fixed seeds, one thread per worker, and the optional real scenes."""

import os
from collections.abc import Iterator
from pathlib import Path

# Workers share the cores, so each has one thread; BLAS and numba read these when they are first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Before any import of foveate: from here on every annotated function checks its shapes and types when called.
install_import_hook("foveate", "beartype.beartype")

import pyro
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test begins from the same global seeds and an empty parameter store, whatever ran before it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)  # torch, numpy and random alike


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A test, or a command in it, may set the number of PyTorch's threads; it is the whole process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real scenes: `FOVEATE_SHARED_DATA`, or `../shared/data` beside the project. Skips without one."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FOVEATE_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the real scenes are not here: no folder {folder} (set FOVEATE_SHARED_DATA to name another)")
    return folder
