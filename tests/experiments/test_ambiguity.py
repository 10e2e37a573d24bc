"""Whom to attend to: starts lie where they are said to, intervals are Wilson's, and the command asks every question."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

from foveate.data import Scenes, TwoFaceScenes
from foveate.experiments import ambiguity
from foveate.experiments.ambiguity import Basins, between, wilson
from foveate.experiments.cli import main
from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.inference.posterior import Posterior
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


@pytest.fixture
def asker() -> ambiguity._Asker:
    """Two scenes with two people each; v tells scene, person and kind: the crop itself is brighter by a half."""
    people = torch.stack(
        [
            torch.stack([gaze_at(40, 50, 2.0, 0.0), gaze_at(140, 60, 2.0, 0.0)]),
            torch.stack([gaze_at(45, 40, 1.5, 0.0), gaze_at(130, 45, 1.5, 0.0)]),
        ]
    )
    of_person = torch.tensor([[0.1, 0.2], [0.3, 0.4]])[..., None, None].expand(2, 2, 24, 24)
    scenes = Scenes.from_pictures(list(torch.rand(2, 90, 180)), names=["first", "second"])
    two = TwoFaceScenes(scenes, people, (("ann", "bob"), ("cy", "di")), of_person)
    two.__dict__["own_crops"] = of_person + 0.5
    dbn = DeepBeliefNet.from_config({"layer": "diagonal", "hidden": 6, "top": 4, "dimension": 575})
    run = Run(AttentionModel(dbn, ClutterModel.blank(575)), GazeGuide(4))
    return ambiguity._Asker(run, two, {"chains": 1}, 7)


def test_every_question_is_answered_by_its_own_starts_and_its_own_pictures(
    asker: ambiguity._Asker, posterior_of: Callable[..., Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is found is laid down by what is asked: trials are first left and right, second left and right."""
    people = asker.two.gazes.flatten(0, 1)
    nobody = gaze_at(90, 85, 1.0, 0.0)
    modes = torch.stack(
        [
            torch.stack([people[0], people[1], nobody]),  # both people of the first scene
            torch.stack([people[2], nobody, people[2]]),  # and one of the second, twice
        ]
    )
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.6, 0.3, 0.1]])

    def attended(model: Any, guide: Any, scenes: Scenes, *, seed: int, chains: int, **asked: Any) -> Any:
        assert (seed, chains) == (7, 1)
        if not asked:
            return posterior_of(modes[:, 0], modes=modes, weights=weights)
        assert scenes.names == ("first", "first", "second", "second")
        v = asked["canonical"][:, 0, 0]
        own = bool(v[0] > 0.5)
        torch.testing.assert_close(v, torch.tensor([0.1, 0.2, 0.3, 0.4]) + 0.5 * own)
        # Midway a trial and its neighbour have one start.
        midway = torch.equal(asked["start"][0], asked["start"][1])
        if not midway:
            torch.testing.assert_close(asked["start"], people[[1, 0, 3, 2]])
        found = [own, True, own, True] if midway else [False, False, True, False]
        return posterior_of(torch.where(torch.tensor(found)[:, None], people, people[[1, 0, 3, 2]]))

    alone = torch.stack([people[0], people[1], nobody, people[3]])
    monkeypatch.setattr(ambiguity, "attend", attended)
    monkeypatch.setattr(ambiguity._Asker, "guide_alone", lambda self, canonical, start: alone)
    monkeypatch.setattr(ambiguity, "_curve", lambda *_: {})
    monkeypatch.setattr(ambiguity._Asker, "basins", lambda self, scene: Basins(scene, *[torch.zeros(2, 1)] * 3))
    for name in ("_ends_figure", "_curves_figure", "_basins_figure"):
        monkeypatch.setattr(ambiguity, name, lambda *_: Figure())
    results, _ = ambiguity._asked(asker, 1)
    expected = {
        "success_other_picture": 2 / 4,
        "success_same_crop": 1.0,
        "success_from_other_face": 1 / 4,
        "both_people_of_a_scene": 0.0,
        "guide_alone": 3 / 4,
        "both_modes": 1 / 2,
    }
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    # The two trials of a scene count as one: intervals are those of two trials, rounded to four digits.
    for name, share in expected.items():
        assert results["interval"][name] == pytest.approx(wilson(share, 2), abs=1e-4), name
    # Weights on left and right: 0.5 and 0.2 in the first scene, 0.7 and none in the second.
    assert results["weight_of_the_lighter_person"] == pytest.approx((0.2 + 0.0) / 2)
    rows = {row[0]: row[1:] for row in ambiguity._rows(results)}
    assert rows["start midway, v is the crop itself"][::2] == ("1.000", "4")
    assert rows["no v, no start: both people among the modes"][::2] == ("0.500", "2")


def test_curves_follow_their_starts_by_both_kinds_of_picture(
    asker: ambiguity._Asker, posterior_of: Callable[..., Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    people = asker.two.gazes.flatten(0, 1)

    def attended(model: Any, guide: Any, scenes: Scenes, *, canonical: Any, start: Any, **options: Any) -> Any:
        # By another picture whoever is nearest to the start is found, by the crop itself who is asked for.
        if float(canonical[0, 0, 0]) > 0.5:
            return posterior_of(people[: len(start)])
        pairs = asker.two.gazes[: len(start) // 2].repeat_interleave(2, 0)
        nearest = (pairs - start[:, None])[..., 2:].norm(dim=-1).argmin(-1)
        return posterior_of(pairs[torch.arange(len(start)), nearest])

    monkeypatch.setattr(ambiguity, "attend", attended)
    told = ambiguity._curve(asker, "position", 2)
    assert told["values"] == [0.0, 0.25, 0.5, 0.75, 1.0] and told["scenes"] == 2
    assert told["same_crop"] == [1.0] * 5
    # Midway both are as near; the two ends are not.
    assert [told["other_picture"][k] for k in (0, 1, 3, 4)] == [0.0, 0.0, 1.0, 1.0]
    assert told["other_picture_interval"][4] == pytest.approx(wilson(1.0, 2), abs=1e-4)


def test_a_gaze_is_on_the_person_whom_it_overlaps_more_or_on_nobody(asker: ambiguity._Asker) -> None:
    left, right = asker.two.gazes[0]
    near = right + torch.tensor([0.0, 0.0, 10.0, 0.0]).double()  # 10 of 48 pixels: an IoU of 38 / 58
    far = right + torch.tensor([0.0, 0.0, 20.0, 0.0]).double()  # 28 / 68
    assert ambiguity._whose(torch.stack([left, near, far]), asker.two.gazes[0]).tolist() == [0, 1, 2]


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
