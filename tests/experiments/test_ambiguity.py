"""Whom to attend to: starts lie where they are said to, intervals are Wilson's, and the command asks every question."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from foveate.experiments import ambiguity
from foveate.experiments.ambiguity import Basins, between, wilson
from foveate.experiments.cli import main
from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet


def gaze_at(x: float, y: float, scale: float, rotation: float) -> torch.Tensor:
    return gazes.from_parts(
        torch.tensor([x, y]).double(), torch.tensor(scale).double(), torch.tensor(rotation).double()
    )


def test_between_two_gazes_lie_their_ends_and_the_geometric_middle() -> None:
    first, second = gaze_at(10, 20, 1.0, -0.2), gaze_at(50, 30, 4.0, 0.4)
    torch.testing.assert_close(between(first, second, 0.0), first)
    torch.testing.assert_close(between(first, second, 1.0), second)
    torch.testing.assert_close(between(first, second, 0.5), gaze_at(30, 25, 2.0, 0.1))
    torch.testing.assert_close(between(second, first, 0.5), between(first, second, 0.5))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (9, 10), (55, 60)])
def test_intervals_are_those_of_scipy(successes: int, trials: int) -> None:
    exact = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson(successes / trials, trials) == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_starts_go_from_the_other_face_to_the_target_and_are_scaled_and_turned_in_place() -> None:
    people = torch.stack([gaze_at(40, 50, 2.0, 0.1), gaze_at(140, 60, 2.5, -0.1)])
    asker = ambiguity._Asker.__new__(ambiguity._Asker)
    asker.two = type("Two", (), {"gazes": people[None]})()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(asker.starts(1, position=1.0), people)
    torch.testing.assert_close(asker.starts(1, position=0.0), people.flip(0))
    left, right = asker.starts(1)
    torch.testing.assert_close(left, right)
    larger = gazes.parts(asker.starts(1, scale=2.0, rotation=30.0)[0])
    torch.testing.assert_close(larger.centre, left[2:])
    assert float(larger.scale) == pytest.approx(2 * math.sqrt(5.0))
    assert float(larger.rotation) == pytest.approx(math.radians(30), abs=1e-6)
    assert asker.succeeded(people).tolist() == [True, True] and asker.succeeded(people.flip(0)).tolist() == [
        False,
        False,
    ]


def test_shares_count_the_starts_that_lead_to_the_person_asked_for() -> None:
    attended, led = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 2]])
    basins = Basins(0, torch.zeros(4, 2), attended, led)
    assert basins.shares() == {"attended": [0.5, 0.75], "led": [0.0, 0.5]}


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["ambiguity", *arguments]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_asked_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "leave @test away" in refused(*out, "--data", "orl@test", capsys=capsys)
    assert "--scenes 0" in refused(*out, "--scenes", "0", capsys=capsys)
    dbn = DeepBeliefNet.from_config({"layer": "diagonal", "hidden": 6, "top": 4, "dimension": 575})
    dbn.set_log_z(0.0, 0.0)
    save(Run(AttentionModel(dbn, ClutterModel.blank(575)), GazeGuide(4)), tmp_path / "run")
    assert "nobody taught this run to tell people apart" in refused(*out, "--run", str(tmp_path / "run"), capsys=capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_trains_asks_every_question_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ambiguity, "SCENES", 60)
    monkeypatch.setattr(ambiguity, "CLUTTER", 2)
    monkeypatch.setattr(ambiguity, "GRID", 3)
    out = tmp_path / "ambiguity"
    steps = ["--glance-steps", "3", "--look-steps", "3", "--dbn-steps", "4", "--draws", "4", "--warmup", "2"]
    assert main(["ambiguity", "--out", str(out), "--scenes", "2", "--swept", "1", "--threads", "1", *steps]) == 0
    written = {path.name for path in out.iterdir()}
    assert {"run", "results.json", "results.md", "ends.png", "curves.png", "basins.png"} <= written
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in ("success_other_picture", "success_same_crop", "success_from_other_face", "both_modes"):
        low, high = results["interval"][name]
        assert 0 <= low <= results[name] <= high <= 1
    assert results["n"] == {**results["n"], "success_other_picture": 4, "both_modes": 2}
    assert set(results["curves"]) == {"scale", "position", "rotation"}
    assert all(len(curve["other_picture"]) == len(curve["values"]) == 5 for curve in results["curves"].values())
    assert "| start midway, v is the crop itself |" in (out / "results.md").read_text(encoding="utf-8")
