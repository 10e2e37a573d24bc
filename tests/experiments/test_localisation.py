"""The first experiment: errors of the size asked for, labels compared, and the whole command on miniature scenes."""

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.experiments import localisation
from foveate.experiments.cli import main
from foveate.experiments.conventions import label_convention
from foveate.experiments.detectors import Detection
from foveate.experiments.localisation import ERRORS, METHODS, Collection, Localisation, Robustness, Seen, starts_off_by
from foveate.experiments.scoring import Sampling
from foveate.experiments.training import Budget
from foveate.inference.checkpoint import Run, load, save
from foveate.inference.evaluate import jittered_starts
from foveate.inference.guide import GazeGuide
from foveate.inference.posterior import Posterior
from foveate.model import AttentionModel, ClutterModel, DeepBeliefNet
from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid, extract

SMALL = ((96, 120), (120, 96))


def _some_gazes(n: int) -> torch.Tensor:
    centre, scale = 100 + 50 * torch.rand(n, 2).double(), torch.exp(torch.randn(n).double())
    return gazes.from_parts(centre, scale, 0.3 * torch.randn(n).double())


@pytest.mark.parametrize(("kind", "size"), [(kind, float(size)) for kind, sizes in ERRORS.items() for size in sizes])
def test_a_start_is_off_by_one_error_of_the_size_asked_for_in_any_direction(kind: str, size: float) -> None:
    truth = _some_gazes(40)
    start = starts_off_by(truth, kind, size, torch.Generator().manual_seed(0))
    error = gazes.parts(gazes.compose(gazes.inverse(truth), start))
    wanted = {"offset": 0.0, "scale": 1.0, "rotation": 0.0} | {kind: size}
    # Float64 rounding of coordinates of some hundred pixels.
    torch.testing.assert_close(
        error.centre.norm(dim=-1) / 24, torch.full((40,), wanted["offset"], dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(error.scale, torch.full((40,), wanted["scale"], dtype=torch.float64), atol=1e-12, rtol=0)
    degrees = torch.rad2deg(error.rotation)
    torch.testing.assert_close(
        degrees.abs(), torch.full((40,), wanted["rotation"], dtype=torch.float64), atol=1e-9, rtol=0
    )
    if kind == "offset":
        assert bool((error.centre.amin(0) < 0).all()) and bool((error.centre.amax(0) > 0).all())
    if kind == "rotation":
        assert 0 < int((degrees > 0).sum()) < 40


def test_the_labels_own_similarity_is_found_among_failures_and_noise() -> None:
    convention = gazes.from_parts(
        torch.tensor([0.4, -1.1]).double(), torch.tensor(1.06).double(), torch.tensor(0.03).double()
    )
    found = _some_gazes(200)
    noise = gazes.LocalChart(found).to_gaze(torch.tensor([0.5, 0.5, 0.3, 0.3]) * torch.randn(200, 4).double())
    truth = gazes.compose(noise, convention)
    truth[::9, 2:] += 500.0  # the run looked elsewhere
    known = label_convention(found, truth)
    assert known is not None
    parts = gazes.parts(known)
    # 4 standard errors of a median of about 180, 1.25 sd / √180 each, in the units of the noise above.
    torch.testing.assert_close(parts.centre, torch.tensor([0.4, -1.1]).double(), atol=4 * 1.25 * 0.5 / 13, rtol=0)
    assert float(parts.scale.log()) == pytest.approx(math.log(1.06), abs=4 * 1.25 * 0.3 / 8 / 13)
    assert float(parts.rotation) == pytest.approx(0.03, abs=4 * 1.25 * 0.3 / 8 / 13)


def test_the_labels_own_similarity_is_a_median_part_by_part() -> None:
    right = torch.tensor([0.1, 3.0, 0.3, 0.2, 3.5]).double()
    log_scale = torch.tensor([0.2, 0.0, 0.02, 0.25, 0.01]).double()
    turned = torch.tensor([0.3, 0.01, 0.25, -0.02, 0.02]).double()
    found = _some_gazes(5)
    each = gazes.from_parts(torch.stack([right, -right], -1), log_scale.exp(), turned)
    truth = gazes.compose(found, each)
    assert float(gazes.overlap(found, truth).min()) > 0.5
    known = label_convention(found, truth)
    assert known is not None
    (dx, dy), scale, rotation = gazes.parts(known)
    # The numbers above are float32 before they are float64.
    assert (float(dx), float(dy)) == pytest.approx((0.3, -0.3), abs=1e-6)
    assert (float(scale.log()), float(rotation)) == pytest.approx((0.02, 0.02), abs=1e-6)


def test_labels_are_not_compared_where_nothing_is_found() -> None:
    truth = _some_gazes(3)
    assert label_convention(truth + 900, truth) is None


@pytest.mark.parametrize(
    ("looks", "after"), [([0.1, 0.6, 0.895, 0.9, 0.9], 2), ([0.9, 0.9, 0.9], 0), ([0.9, 0.5, 0.9], 2)]
)
def test_looks_have_converged_once_they_stay_where_they_end(looks: list[float], after: int) -> None:
    assert localisation._converged_after(torch.tensor(looks)) == after


TRUTH = torch.tensor([[1.5, 0.0, 40.0, 40.0], [1.0, 0.0, 50.0, 30.0], [2.0, 0.0, 60.0, 50.0]]).double()
# What the labels of a collection differ by from those trained on: 2 canonical pixels to the right, 1 down.
DIFFERENCE = torch.tensor([1.0, 0.0, 2.0, 1.0]).double()


def _faces(label: str = "faces") -> Collection:
    scenes = Scenes.from_pictures(list(torch.rand(3, 90, 120)), gazes=TRUTH)
    return Collection(f"{label}@test", label, scenes, TRUTH, scenes)


@pytest.fixture
def seen_with(posterior_of: Callable[..., Posterior], with_iou: Callable[..., torch.Tensor]) -> Callable[..., Seen]:
    """What a run saw of `_faces`, by the IoUs of the gazes it reports."""

    def made(iou: tuple[float, float, float], **changes: Any) -> Seen:
        reported = with_iou(TRUTH, *iou)
        path = torch.stack([with_iou(TRUTH, *of) for of in ((0.1,) * 3, (0.4, 0.45, 0.3), (0.6, 0.55, 0.3), iou)], 1)
        costs = {name: {"windows": float(k), "scenes_per_second": 2.0} for k, name in enumerate(METHODS)}
        robustness = {("offset", 0.5): Robustness(torch.linspace(0.1, 0.9, 9), 0.75, 0.625)}
        seen = Seen(with_iou(TRUTH, 0.7, 0.4, 0.4), posterior_of(reported), path, costs, robustness, None, None)
        return seen._replace(**changes)

    return made


class _Sees:
    """A detector that finds the truth moved by half a width, and looks at 70 windows."""

    def detect(self, picture: torch.Tensor) -> Detection:
        return Detection(TRUTH[0] + torch.tensor([0.0, 0.0, 18.0, 0.0]).double(), 70)


DETECTORS = {name: _Sees() for name in ("haar", "correlation", "distance")}


def test_every_method_is_scored_by_its_own_gazes_over_scenes_and_then_over_seeds(
    seen_with: Callable[..., Seen],
) -> None:
    seen = [seen_with((0.9, 0.55, 0.3)), seen_with((0.8, 0.45, 0.1))]
    told = localisation._told(_faces(), seen, DETECTORS)
    methods = told["methods"]
    for name, accuracy, iou in (
        ("guide", (1 / 3, 1 / 3), (0.5, 0.5)),
        ("posterior", (2 / 3, 1 / 3), (1.75 / 3, 1.35 / 3)),
        ("protocol_guide", (2 / 3, 2 / 3), (1.45 / 3, 1.45 / 3)),
        ("protocol_posterior", (2 / 3, 1 / 3), (1.75 / 3, 1.35 / 3)),
    ):
        for key, each in (("accuracy", accuracy), ("mean_iou", iou)):
            assert methods[name][key]["each"] == pytest.approx(each), (name, key)
            assert methods[name][key]["mean"] == pytest.approx(sum(each) / 2), (name, key)
            assert methods[name][key]["sd"] == pytest.approx(statistics.stdev(each), abs=1e-12), (name, key)
        assert methods[name]["windows"]["mean"] == list(METHODS).index(name)
    # Half a width off the first truth is an IoU of a third; the other two faces are elsewhere.
    overlap = gazes.overlap(_Sees().detect(torch.rand(9, 9)).gaze.expand(3, 4), TRUTH)
    assert float(overlap[0]) == pytest.approx(1 / 3)
    of_haar = methods["haar"]["mean_iou"]
    assert of_haar["mean"] == pytest.approx(float(overlap.mean())) and of_haar["sd"] is None
    assert methods["haar"]["windows"]["mean"] == 70.0
    steps = [0.1, 1.15 / 3, 1.45 / 3, (1.75 + 1.35) / 6]
    assert told["protocol_iou_by_step"] == pytest.approx(steps)
    (row,) = told["robustness"]
    assert (row["kind"], row["size"], row["accuracy"]["mean"], row["mean_iou"]["mean"]) == ("offset", 0.5, 0.75, 0.625)
    # Found in the first run: the first two scenes; in the second: the first.
    assert [(f["run"], f["iou"]) for f in told["failures"]] == [
        (0, pytest.approx(0.3)), (1, pytest.approx(0.45)), (1, pytest.approx(0.1))
    ]  # fmt: skip
    table = {row[0]: row[1:] for row in localisation._table_1(told)}
    assert table["foveate, posterior mean"] == ["0.500 ± 0.236", "0.517 ± 0.094", "1 ± 0", "2.0 ± 0.0"]


def test_what_labels_differ_by_is_told_in_its_units_and_taken_out_of_the_scores(
    seen_with: Callable[..., Seen], posterior_of: Callable[..., Posterior]
) -> None:
    difference = gazes.from_parts(
        torch.tensor([2.0, 1.0]).double(), torch.tensor(1.25).double(), torch.tensor(0.1).double()
    )
    as_taught = gazes.compose(TRUTH, gazes.inverse(difference))
    seen = seen_with((0.9, 0.9, 0.9), convention=difference, posterior=posterior_of(as_taught))
    told = localisation._told(_faces(), [seen, seen_with((0.1, 0.1, 0.1))], DETECTORS)["label_convention"]
    assert told["scenes_compared"] == 3
    known = {
        "right_canonical_pixels": 2.0,
        "down_canonical_pixels": 1.0,
        "log_scale": math.log(1.25),
        "rotation_degrees": math.degrees(0.1),
        "accuracy": 1.0,
        "mean_iou": 1.0,  # the run reports what its own labels would be
    }
    assert {name: told[name]["each"] for name in known} == {name: [pytest.approx(v)] for name, v in known.items()}


def test_coverage_is_the_share_of_all_scenes_within_reach_as_sampled_and_with_the_factor(
    seen_with: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here 0.02 times the x of the true centre: 0.8, 1 and 1.2, and with labels re-expressed (2 canonical pixels to the
    # left, of 1.5, 1 and 2 pixels each) 0.74, 0.96 and 1.12.
    monkeypatch.setattr(localisation, "reach", lambda draws, truth: 0.02 * truth[:, 2])
    collections = [_faces("a"), _faces("b")]
    moved = torch.tensor([0.0, 0.0, 20.0, 0.0]).double()  # reaches of 1.2, 1.4 and 1.6
    collections[1] = collections[1]._replace(truth=TRUTH + moved, scenes=collections[1].scenes[:3])
    seen = [
        [seen_with((0.9, 0.9, 0.9), convention=DIFFERENCE, factor=1.15), seen_with((0.9, 0.9, 0.9), factor=1.3)],
        [seen_with((0.9, 0.9, 0.9), convention=DIFFERENCE, factor=1.15), seen_with((0.9, 0.9, 0.9), factor=1.3)],
    ]
    of_a, of_b, of_all = localisation._calibration(collections, seen)
    assert [of["scenes"] for of in (of_a, of_b, of_all)] == [3, 3, 6]
    assert of_a["coverage"]["each"] == pytest.approx([2 / 3, 2 / 3])
    assert of_b["coverage"]["each"] == [0.0, 0.0]
    assert of_all["coverage"]["each"] == pytest.approx([2 / 6, 2 / 6])
    assert of_a["coverage_recalibrated"]["each"] == pytest.approx([2 / 3, 1.0])
    assert of_all["coverage_recalibrated"]["each"] == pytest.approx([2 / 6, 4 / 6])
    assert of_all["factor"]["each"] == [1.15, 1.3]
    # Of what one run alone knows no mean over runs is told.
    assert "coverage_re_expressed" not in of_a
    first = [[of_collection[0]] for of_collection in seen]
    of_a, of_b, of_all = localisation._calibration(collections, first)
    assert of_a["coverage_recalibrated_re_expressed"]["each"] == [1.0]
    assert of_b["coverage_recalibrated_re_expressed"]["each"] == pytest.approx([1 / 3])  # 1.14, 1.36 and 1.52
    assert of_all["coverage_recalibrated_re_expressed"]["each"] == pytest.approx([4 / 6])
    assert of_all["coverage_re_expressed"]["each"] == pytest.approx([2 / 6])


def test_presence_comes_true_where_the_object_is_and_a_modes_weight_where_it_overlaps_it(
    seen_with: Callable[..., Seen], posterior_of: Callable[..., Posterior], with_iou: Callable[..., torch.Tensor]
) -> None:
    modes = torch.stack([with_iou(TRUTH, 0.8, 0.3, 0.9), with_iou(TRUTH, 0.4, 0.6, 0.9)], 1)
    weights = torch.tensor([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0]])
    posterior = posterior_of(TRUTH, modes=modes, weights=weights, presence=torch.tensor([0.95, 0.95, 0.65]))
    seen = [[seen_with((0.9, 0.9, 0.9), posterior=posterior)]]
    panels = localisation._reliability_panels([_faces()], seen, [torch.tensor([0.05, 0.05, 0.65])])
    presence, mode = panels["presence of the object"], panels["weight of a mode"]
    assert presence.happened.tolist() == [0.0, 0.5, 1.0] and presence.count.tolist() == [2, 2, 2]
    assert presence.stated.tolist() == pytest.approx([0.05, 0.65, 0.95])
    # A second mode without weight is none. Of three quarters one in two is right, of a quarter the same.
    assert mode.count.tolist() == [2, 2, 1] and mode.stated.tolist() == [0.25, 0.75, 1.0]
    assert mode.happened.tolist() == [0.5, 0.5, 1.0]


def test_every_initial_error_is_scored_on_the_scenes_that_were_started_with_it(
    blank_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def searched(run: Run, scenes: Scenes, start: torch.Tensor, steps: int) -> Any:
        asked["searched"] = steps
        true = torch.stack([TRUTH[int(name[-1])] for name in scenes.names])
        return SimpleNamespace(path=torch.stack([start, *[true] * steps], 1))

    def attended(model: Any, guide: Any, scenes: Scenes, *, start: torch.Tensor, **options: Any) -> Any:
        asked.update(start=start, names=scenes.names, looks=options["guide_steps"])
        return SimpleNamespace(mean_gaze=start)

    monkeypatch.setattr(localisation, "_search", searched)
    monkeypatch.setattr(localisation, "attend", attended)
    found = localisation._robustness(load(blank_run), _faces().scenes, TRUTH, 0)
    assert (asked["searched"], asked["looks"]) == (8, 4)
    assert asked["names"] == ("picture_0000", "picture_0001", "picture_0002") * len(found)
    assert list(found) == [(kind, size) for kind, sizes in ERRORS.items() for size in sizes]
    for (kind, size), start in zip(found, asked["start"].split(3), strict=True):
        overlap = gazes.overlap(start, TRUTH)
        told = found[kind, size]
        assert told.looks.tolist() == pytest.approx([float(overlap.mean()), *[1.0] * 8])
        assert told.sampled == pytest.approx(float(overlap.mean()))
        assert told.found == float((overlap > 0.5).double().mean())
        if kind == "scale":
            # One square within the other about the same centre.
            assert overlap.tolist() == pytest.approx([min(size, 1 / size) ** 2] * 3)


def test_a_run_is_asked_by_the_protocol_and_a_leapfrog_step_and_a_leap_are_windows(
    blank_run: Path, posterior_of: Callable[..., Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Any] = []
    # 2 chains × 3 draws × 1, 2 and 6 steps and one leap: 24 windows a scene on average.
    steps = torch.tensor([1, 2, 6])[:, None, None].expand(3, 2, 3)
    ends = torch.stack([TRUTH, TRUTH + 1], 1)

    def attended(model: Any, guide: Any, scenes: Scenes, *, start: Any = None, seed: int = 0, **asked: Any) -> Any:
        # One scene alone is attended to before anything is timed.
        if len(scenes) > 1:
            assert (seed, asked["guide_steps"], asked["draws"]) == (5, 4, 20)
            starts.append(start)
        return posterior_of(TRUTH[: len(scenes)], statistics={"n_steps": steps[: len(scenes)]})

    def robust(run: Run, scenes: Scenes, truth: torch.Tensor, seed: int) -> dict[Any, Any]:
        return {"shown": scenes.names, "truth": truth, "seed": seed}

    monkeypatch.setattr(localisation, "attend", attended)
    monkeypatch.setattr(localisation, "_search", lambda *_: SimpleNamespace(gaze=ends))
    monkeypatch.setattr(localisation, "_robustness", robust)
    monkeypatch.setattr(localisation, "convention_of", lambda run, train, seed: DIFFERENCE + seed)
    seen = localisation._look_at(load(blank_run), _faces(), Sampling(draws=20), 2, 5)
    assert starts[0] is None and torch.equal(starts[1], jittered_starts(TRUTH, 5)) and len(starts) == 2
    windows = {name: cost["windows"] for name, cost in seen.costs.items()}
    assert windows == {"guide": 0.0, "posterior": 24.0, "protocol_guide": 0.0, "protocol_posterior": 24.0}
    assert torch.equal(seen.guide, TRUTH) and torch.equal(seen.convention, DIFFERENCE + 5)
    # Two of three scenes, from one end to the other.
    robustness: Any = seen.robustness
    assert (robustness["shown"], robustness["seed"]) == (("picture_0000", "picture_0002"), 5)
    assert torch.equal(robustness["truth"], TRUTH[[0, 2]])


def test_runs_have_seeds_of_their_own_and_detectors_are_fitted_on_what_is_trained_on(
    tmp_path: Path, blank_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    asked: dict[str, Any] = {"seeds": [], "empty": []}
    train, test = (_faces().scenes.subset([k]) for k in (0, 1))

    def told(collection: Collection, seen: Any, fitted: dict[str, Any]) -> None:
        asked["fitted"] = fitted
        raise Enough

    monkeypatch.setattr(localisation, "labelled_scenes", lambda specs, seed: (train, {}))
    monkeypatch.setattr(localisation, "_collections", lambda specs, seed: [_faces()._replace(scenes=test)])
    monkeypatch.setattr(localisation, "default_clutter", lambda *given: asked["empty"].append(given))
    monkeypatch.setattr(localisation, "_look_at", lambda *given: asked["seeds"].append(given[-1]))
    monkeypatch.setattr(localisation, "_told", told)
    experiment = Localisation(out=tmp_path / "out", runs=(blank_run, blank_run), data=("a@test",), seed=5)
    with pytest.raises(Enough):
        experiment.run()
    assert asked["seeds"] == [5, 6]
    # Presence is judged on photographs that no run was trained on.
    assert asked["empty"] == [(None, 5, "test")]
    for name in ("correlation", "distance"):
        assert asked["fitted"][name].score == name
        torch.testing.assert_close(asked["fitted"][name].template, extract(train[0].picture, TRUTH[0]).float())


def _write(scenes: Scenes, folder: Path, split: str = "") -> list[str]:
    folder.mkdir(exist_ok=True)
    rows = []
    for scene in scenes:
        name = f"{scene.name}.png"
        Image.fromarray((scene.picture.numpy() * 255).round().astype(np.uint8)).save(folder / name)
        if scene.gaze is not None:
            rows.append(",".join([name, *map(str, scene.gaze.tolist()), split]))
    return rows


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where runs were trained; in place of training, a run of the right form that has learned nothing."""
    folders: list[Path] = []

    def untrained(
        scenes: Scenes,
        clutter: Scenes | None,
        out: Path,
        budget: Budget,
        seed: int,
        device: str,
        labels: dict[str, Any],
    ) -> Run:
        folders.append(out)
        dbn = DeepBeliefNet.from_config({"layer": "diagonal", "hidden": 6, "top": 4, "dimension": 575})
        dbn.set_log_z(10 * math.log(2), 0.0)
        config = {**dataclasses.asdict(budget), "seed": seed, "scenes": len(scenes), "coverage_factor": 1.5, **labels}
        torch.manual_seed(seed)
        run = Run(AttentionModel(dbn, ClutterModel.blank(575)), GazeGuide(4), config)
        save(run, out)
        return run

    monkeypatch.setattr(localisation, "fit_logged", untrained)
    return folders


@pytest.fixture
def command(tmp_path: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The whole experiment in miniature, two seeds."""
    monkeypatch.setattr(localisation, "LIGHT", {"chains": 1, "draws": 4, "warmup": 2})
    rows = _write(orl_scenes("train", 3, sizes=SMALL), tmp_path / "faces", "train")
    rows += _write(orl_scenes("test", 2, sizes=SMALL), tmp_path / "faces", "test")
    (tmp_path / "faces" / "gazes.csv").write_text("\n".join(["file,a,b,tx,ty,split", *rows]))
    _write(orl_clutter("train", 2, sizes=SMALL), tmp_path / "clutter")
    return [
        *("localisation", "--out", str(tmp_path / "out"), "--seeds", "2", "--starts", "1"),
        *("--train", f"folder:{tmp_path / 'faces'}@train", "--data", f"folder:{tmp_path / 'faces'}@test"),
        *("--clutter", f"folder:{tmp_path / 'clutter'}", "--empty", f"folder:{tmp_path / 'clutter'}"),
        *("--chains", "2", "--draws", "6", "--warmup", "2", *threads),
    ]


def test_collections_of_one_name_are_told_apart(tmp_path: Path) -> None:
    specs = []
    # Also in the names of files, where @ is not used.
    for place, name in (("a", "faces"), ("b", "faces"), ("b", "faces@test_2"), ("b", "others_test"), ("b", "others")):
        folder = tmp_path / place / name
        folder.parent.mkdir(exist_ok=True)
        rows = _write(orl_scenes("test", 1, sizes=SMALL), folder, "test")
        split = "@test" if name in ("faces", "others") else ""
        (folder / "gazes.csv").write_text("\n".join(["file,a,b,tx,ty,split", *rows]))
        specs.append(f"folder:{folder}{split}")
    found = localisation._collections(specs, 0)
    assert [collection.label for collection in found] == [
        *("faces@test", "faces@test_2", "faces@test_2_2", "others_test", "others@test_2")
    ]
    assert [collection.spec for collection in found] == specs


def test_the_experiment_scores_every_method_and_draws_every_figure(
    tmp_path: Path, command: list[str], trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    out = tmp_path / "out"
    assert trained == [out / "seed_0", out / "seed_1"]
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    (told,) = results["collections"]
    assert (told["label"], told["scenes"], results["seeds"]) == ("faces@test", 2, 2)
    assert list(told["methods"]) == list(METHODS)
    for name, scores in told["methods"].items():
        assert len(scores["accuracy"]["each"]) == (1 if name in ("haar", "correlation", "distance") else 2)
        assert 0 <= scores["mean_iou"]["mean"] <= 1
        assert scores["scenes_per_second"]["mean"] > 0
    windows = {name: scores["windows"]["mean"] for name, scores in told["methods"].items()}
    # A given start needs its looks alone, a whole scene also a glance and looks from every proposal, a sampler more.
    assert 4 <= windows["protocol_guide"] < windows["guide"] < windows["posterior"]
    assert windows["protocol_guide"] < windows["protocol_posterior"]
    assert len(told["robustness"]) == sum(map(len, ERRORS.values()))
    assert all(len(row["iou_by_look"]) == 9 for row in told["robustness"])
    assert len(told["protocol_iou_by_step"]) == 6
    (calibration,) = results["calibration"]
    assert 0 <= calibration["coverage"]["mean"] <= calibration["coverage_recalibrated"]["mean"] <= 1
    assert calibration["factor"]["each"] == [1.5, 1.5]
    presence = results["reliability"]["presence of the object"]
    assert sum(presence["count"]) == 2 * (2 + 2)  # seeds × (scenes + pictures without)
    drawn = {path.name for path in out.glob("*.png")}
    # What runs that have learned nothing fail at is on one sheet.
    failed = {"failures.png"} if told["failures"] else set()
    assert drawn == {"figure_4_faces_test.png", "figure_5_faces_test.png", "reliability.png"} | failed
    # What is not known, labels not being comparable with what these runs have learned, is not told.
    known = told["label_convention"] is not None
    assert ("coverage_re_expressed" in calibration) == known
    spec = f"folder:{tmp_path / 'faces'}@train"
    assert results["trained_on"] == [[spec], [spec]] and results["detectors_fitted_on"] == [spec]
    text = (out / "results.md").read_text()
    assert f"Trained on {spec}. Haar and templates fitted on {spec}. 2 runs" in text
    assert all(method in text for method in METHODS.values())
    assert METHODS["haar"] in capsys.readouterr().out


def test_runs_that_are_there_are_used_again_and_none_of_another_kind(
    tmp_path: Path, command: list[str], trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"folder:{tmp_path / 'faces'}@train"
    train = Scenes.from_spec(spec)
    experiment = Localisation(out=tmp_path / "out", seeds=1, clutter=f"folder:{tmp_path / 'clutter'}", train=(spec,))
    experiment._trained(train, {})
    two = dataclasses.replace(experiment, seeds=2)
    assert len(two._trained(train, {})) == 2
    assert trained == [tmp_path / "out" / "seed_0", tmp_path / "out" / "seed_1"]
    assert main([*command, "--look-steps", "3"]) == 2
    assert "this run has other look_steps than is asked for" in capsys.readouterr().err
    # As many scenes, but others; other clutter.
    for word, other in ((spec, spec.replace("faces", "people")), (f"folder:{tmp_path / 'clutter'}", "orl")):
        shutil.copytree(tmp_path / "faces", tmp_path / "people", dirs_exist_ok=True)
        place = command.index(word)
        assert main([*command[:place], other, *command[place + 1 :]]) == 2
        assert f"this run has other {'clutter' if other == 'orl' else 'trained_on'} than" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_before_any_work(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(command) == 2
    assert "holds other things" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_window_of_the_looks_counts_once_whichever_half_of_the_guide_looks_at_it() -> None:
    guide, pyramid = GazeGuide(4).eval(), Pyramid.build([torch.rand(60, 80)])
    gaze = torch.tensor([[1.0, 0.0, 40.0, 30.0]] * 3)
    with torch.no_grad(), localisation._counting(guide) as looked:
        guide.look(pyramid, gaze, torch.zeros(3, 24, 24), torch.zeros(3, dtype=torch.long))
        assert looked.total() == 3
        guide.recognise(pyramid, gaze, torch.zeros(3, dtype=torch.long), torch.zeros(3))
        assert looked.total() == 6
        guide.glance(torch.rand(1, 64, 40))
    assert looked.total() == 6 + 16 * 10
