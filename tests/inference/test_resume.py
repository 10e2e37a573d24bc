"""Training that was broken off and resumed ends where it would have ended anyway, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.inference.guide import GazeGuide
from foveate.inference.guide_training import GuideData, train_glance, train_looks
from foveate.inference.resume import Checkpoint, digest, discard
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid

STEPS, EVERY = 7, 2


def _data() -> GuideData:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(5, 1, 8, 10, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, (60, 76), mode="bicubic")[:, 0].clamp(0, 1)
    truth = gazes.from_parts(torch.tensor([38.0, 30.0]), torch.linspace(0.8, 1.4, 4), torch.zeros(4))
    return GuideData(Pyramid.build(list(pictures[:4])), truth, torch.rand(4, 24, 24), Pyramid.build([pictures[4]]))


class _PulledPlug(Exception):
    pass


def _until(step: int) -> Callable[[int, int, float], None]:
    def progress(done: int, total: int, loss: float) -> None:
        if done == step:
            raise _PulledPlug

    return progress


def _begun() -> GazeGuide:
    torch.manual_seed(0)
    return GazeGuide(4)


@pytest.mark.parametrize("train", [train_glance, train_looks])
@pytest.mark.parametrize("broken_off_at", [1, 3, 4, STEPS - 1])
def test_a_resumed_stage_ends_as_an_uninterrupted_one(tmp_path: Path, train: Any, broken_off_at: int) -> None:
    data = _data()
    whole = _begun()
    loss = train(whole, data, steps=STEPS, batch=12, seed=3)

    folder = tmp_path / "training"
    with pytest.raises(_PulledPlug):
        keeping = Checkpoint(folder, {"seed": 3}, EVERY)
        train(_begun(), data, steps=STEPS, batch=12, seed=3, checkpoint=keeping, progress=_until(broken_off_at))
    assert folder.exists() == (broken_off_at >= EVERY - 1)
    again, done = _begun(), []
    keeping = Checkpoint.open(folder, {"seed": 3}, resume=True)
    # Whatever else draws from the global generator in between must not matter.
    torch.rand(17)
    resumed = train(
        again, data, steps=STEPS, batch=12, seed=3, checkpoint=keeping, progress=lambda i, n, loss: done.append(i)
    )
    kept = broken_off_at + 1 if broken_off_at == STEPS - 1 else (broken_off_at + 1) // EVERY * EVERY
    assert done == list(range(kept, STEPS))
    assert resumed == loss
    for (name, value), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, msg=name)


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = Checkpoint.open(None, {"seed": 3}, resume=False)
    train_glance(_begun(), _data(), steps=2, batch=12, checkpoint=nothing)
    assert list(tmp_path.iterdir()) == []


def _kept(folder: Path) -> None:
    train_glance(_begun(), _data(), steps=2, batch=12, checkpoint=Checkpoint(folder, {"seed": 3, "scenes": "ab"}))


def test_unfinished_training_is_resumed_on_request_alone_and_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    _kept(folder)
    with pytest.raises(InputError, match="holds unfinished training; go on with --resume"):
        Checkpoint.open(folder, {"seed": 3, "scenes": "ab"}, resume=False)
    with pytest.raises(InputError, match=r"another one \(seed differ\)"):
        Checkpoint.open(folder, {"seed": 4, "scenes": "ab"}, resume=True)
    assert Checkpoint.open(folder, {"seed": 3, "scenes": "ab"}, resume=True).folder == folder


def test_a_folder_of_something_else_is_neither_read_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something else than unfinished training"):
        Checkpoint.open(tmp_path, {}, resume=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_which_nothing_could_be_written_is_a_beginning(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / ".0123.partial.json").write_text("")
    assert Checkpoint.open(tmp_path, {"seed": 3}, resume).made_of == {"seed": 3}


def test_discarded_work_is_gone_and_half_discarded_work_is_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "training"
    discard(folder)
    for _ in range(2):
        # Once broken off while files are removed, once not.
        _kept(folder)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", lambda path, **options: None)
            discard(folder)
        assert not folder.exists() and [path.name for path in tmp_path.iterdir()] == [".training.spent"]
        discard(folder)
        shutil.rmtree(tmp_path / ".training.spent")
    _kept(folder)
    discard(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "narrower"])
def test_a_damaged_state_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "training"
    _kept(folder)
    path = folder / "glance.safetensors"
    guide = _begun()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        guide = GazeGuide(8)
    with pytest.raises(InputError, match=r"glance\.safetensors: is damaged"):
        train_glance(guide, _data(), steps=2, batch=12, checkpoint=Checkpoint(folder))


def test_a_digest_tells_tensors_apart() -> None:
    a: Tensor = torch.arange(6.0)
    assert digest(a) == digest(a.clone())
    assert len({digest(a), digest(a.flip(0)), digest(a, a), digest(a + 1e-6)}) == 4


def test_a_state_that_was_read_is_a_file_like_any_other(tmp_path: Path) -> None:
    """A file that is mapped into memory cannot be replaced on Windows, as the next state is to replace it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells which files are mapped")
    folder, guide = tmp_path / "training", _begun()
    train_looks(guide, _data(), steps=STEPS, batch=12, checkpoint=Checkpoint(folder, {}, EVERY))
    (file,) = folder.glob("look*")
    optimiser = torch.optim.AdamW(torch.nn.ModuleList([guide.canonical, guide.votes]).parameters())
    losses, further = Checkpoint(folder, {}, EVERY).begin(
        "look", torch.nn.ModuleList([guide.canonical, guide.votes]), optimiser, torch.Generator()
    )
    assert len(losses) == STEPS and further and optimiser.state
    assert str(file) not in maps.read_text()
