"""The command `likelihood`: its figures against their definitions, and the whole command on composed scenes."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.experiments import likelihood
from foveate.experiments.figures import EnergyPath, energy_paths_figure
from foveate.experiments.likelihood import (
    Likelihood,
    area_under_curve,
    beats_random_gazes,
    energy_path,
    random_gazes,
)
from foveate.experiments.scoring import Sampling
from foveate.inference.ais import exact_log_z
from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.inference.potential import GazePotential, OddsScore
from foveate.inference.prior_training import train_dbn
from foveate.model import AttentionModel, BernoulliRBM, ClutterModel, DeepBeliefNet, InputError
from foveate.model import gaze as gazes
from foveate.model.dbn import DiagonalLayer
from foveate.model.density import EllipticalDensity
from foveate.model.patch import Pyramid, density_coordinates, extract

SMALL = ((96, 120), (120, 96))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return orl_scenes("test", 3, sizes=SMALL)


@pytest.fixture(scope="module")
def run(scenes: Scenes) -> Run:
    """A run whose object density is narrow about the first scene's own crop, and whose guide knows nothing."""
    torch.manual_seed(2)
    truth = scenes.gazes
    assert truth is not None
    y = density_coordinates(extract(scenes[0].picture, truth[0]).float())
    core = EllipticalDensity.from_axes(y, torch.eye(575), torch.full((575,), 0.1), 8.0)
    dbn = DeepBeliefNet(DiagonalLayer(6), BernoulliRBM(6, 4), core)
    with torch.no_grad():
        dbn.layer.weight.normal_(std=0.05)
        dbn.top.weight.normal_()
    dbn.set_log_z(exact_log_z(dbn.top).estimate, 0.25)
    model = AttentionModel(dbn, ClutterModel.blank(575), temperature=20.0)
    model.baselines["gaussian"] = EllipticalDensity.from_axes(y, torch.eye(575), torch.full((575,), 0.1))
    model.baselines["student_t"] = model.baselines["gaussian"]
    return Run(model, GazeGuide(4).eval(), {})


def test_random_gazes_keep_to_their_ranges_and_to_the_pictures_name() -> None:
    size = torch.tensor([200.0, 300.0]).double()
    gaze = random_gazes("a.jpg", size, 4000, seed=3)
    centre, scale, rotation = gazes.parts(gaze)
    share = scale * 24 / 200
    # Uniform draws come within 1 % of their ends: the chance that 4000 of them do not is below 1e-17.
    for values, low, high in (
        (centre[:, 0], 0.0, 299.0),
        (centre[:, 1], 0.0, 199.0),
        (share.log(), math.log(0.1), math.log(0.65)),
        (rotation, -math.pi / 18, math.pi / 18),
    ):
        assert low <= float(values.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(values.max()) <= high
    assert torch.equal(gaze[:7], random_gazes("a.jpg", size, 7, seed=3))
    assert not torch.isclose(gaze, random_gazes("b.jpg", size, 4000, seed=3)).any()
    assert not torch.isclose(gaze, random_gazes("a.jpg", size, 4000, seed=4)).any()


def test_the_area_under_the_curve_is_mann_and_whitneys_with_ties() -> None:
    present, absent = torch.randint(0, 8, (30,)).double(), torch.randint(-3, 6, (50,)).double()
    expected = stats.mannwhitneyu(present.numpy(), absent.numpy()).statistic / (30 * 50)
    assert area_under_curve(present, absent) == pytest.approx(expected, abs=1e-12)  # float64
    assert area_under_curve(torch.tensor([2.0, math.inf]), torch.tensor([1.0, -math.inf])) == 1.0


def test_the_true_gaze_beats_random_ones_where_the_model_knows_the_object(run: Run, scenes: Scenes) -> None:
    assert scenes.gazes is not None
    # Re-expressed by nothing, a gaze wins where it won; moved away from the object, it does not.
    one = torch.ones(()).double()
    moved = gazes.compose(scenes.gazes, gazes.from_parts(torch.tensor([30.0, 30.0]).double(), one, 0 * one))
    for again, same in ((scenes.gazes.double(), True), (moved, False)):
        wins = beats_random_gazes(run.model, scenes, again, count=200)
        re_expressed = wins.pop("odds_re_expressed")
        assert bool(re_expressed[0]) is same
        assert all(bool(won[0]) for won in wins.values())
    assert "odds_re_expressed" not in beats_random_gazes(run.model, scenes, count=2)
    # Odds of a density against itself are 0 everywhere: nothing beats anything.
    core = run.model.dbn.core
    level = AttentionModel(
        run.model.dbn, ClutterModel(EllipticalDensity.from_axes(core.mean, core.axes, core.variances, core.nu))
    )
    level.baselines = run.model.baselines
    wins = beats_random_gazes(level, scenes, count=200)
    assert not bool(wins["odds"].any()) and not bool(wins["odds_elsewhere"].any())


def test_the_energy_on_the_way_is_the_potential_that_sampling_climbs(run: Run, scenes: Scenes) -> None:
    truth = scenes.gazes
    assert truth is not None
    pyramid = Pyramid.build(scenes.pictures([1]), oversampling=2.0, smallest=0.07)
    found = gazes.LocalChart(truth[1]).to_gaze(torch.tensor([3.0, -2.0, 1.0, 0.5]).double())
    energy = energy_path(run.model, pyramid, found, truth[1])
    chart = gazes.LocalChart(found[None, None])
    score = OddsScore(*run.model.marginal_densities(), run.model.temperature)
    potential = GazePotential(pyramid, chart, score, run.model.prior(pyramid.size.double()))
    z = likelihood.PATH[:, None] * chart.to_chart(truth[1][None, None])[0]
    torch.testing.assert_close(energy, potential(z[None])[0][0].double(), rtol=1e-4, atol=0.02)  # float32 patches


def test_energy_paths_are_drawn_under_their_scenes_relative_to_the_truth() -> None:
    gaze = torch.tensor([1.0, 0.0, 30.0, 25.0]).double()
    energy = torch.linspace(7.0, 3.0, 61).double()
    paths = [EnergyPath(f"scene {k}", torch.rand(50, 60), gaze, gaze, likelihood.PATH, energy) for k in range(3)]
    figure = energy_paths_figure(paths, columns=2)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["scene 0", "scene 1", "scene 2"]
    curve = next(line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 61)
    assert float(curve.get_ydata()[(likelihood.PATH - 1).abs().argmin()]) == pytest.approx(0.0, abs=1e-12)
    assert float(curve.get_ydata()[0]) == pytest.approx(4.0 * 50 / 60, abs=1e-5)  # float32 energies


def test_the_command_reports_every_figure_of_every_spec(
    tmp_path: Path, run: Run, scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood.Scenes, "from_spec", classmethod(lambda cls, spec, **_: scenes[:2]))
    taught = orl_scenes("train", 12, sizes=SMALL)
    monkeypatch.setattr(likelihood, "labelled_scenes", lambda specs, seed: (taught, {}))
    monkeypatch.setattr(
        likelihood.Scenes, "from_clutter_spec", classmethod(lambda cls, spec, **_: orl_clutter("test", 2, sizes=SMALL))
    )
    # The paper's 1024 and 256 units take their time; four and two say as much here.
    monkeypatch.setattr(likelihood, "train_dbn", functools.partial(train_dbn, diagonal_units=4, top_units=2))
    save(run, tmp_path / "run")
    Likelihood(
        source=tmp_path / "run",
        data=("orl@train", "orl@test"),
        clutter="none",
        out=tmp_path / "out",
        random=20,
        diagonal=("train",),
        diagonal_steps=2,
        sampling=Sampling(chains=2, draws=6, warmup=4),
    ).run()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "failures.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["data"]) == ["orl@train", "orl@test"]
    of_train, of_test = results["data"].values()
    # Labels are compared on the training scenes of what is tested.
    assert of_train["label_convention"] is None and "odds_re_expressed" not in of_train["beats_random"]
    assert len(of_test["label_convention"]) == 4 and "gain_re_expressed" in of_test["sampling"][0]
    for found in results["data"].values():
        margin = found["bound_nats"] - 2 * 0.25 - found["bound_student_t"]
        assert found["margin_student_t"] == pytest.approx(margin, abs=1e-3)
        assert found["bound_nats"] >= found["bound_recognition"] and math.isfinite(found["bound_diagonal"])
        assert [(s["start"], s["guide_prior"]) for s in found["sampling"]] == [
            ("jitter, looks: 1", False),
            ("jitter, looks: 1", True),
            ("jitter, looks: 4", False),
            ("jitter, looks: 4", True),
            ("whole scene", False),
        ]
        shares = [*found["beats_random"].values(), *found["ranking"].values(), found["presence_auc"]]
        assert all(0 <= share <= 1 for share in shares)
        assert found["ranking"]["oracle"] >= max(found["ranking"]["odds"], found["ranking"]["evidence"])
    assert len(results["failures"]) == 4
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[0] == "| figure | orl@train | orl@test |" and all(line.count("|") == 4 for line in table)
    assert "bound of the prior" in capsys.readouterr().out


def test_no_scenes_are_refused_before_any_work(tmp_path: Path, run: Run) -> None:
    save(run, tmp_path / "run")
    with pytest.raises(InputError, match="--data"):
        Likelihood(source=tmp_path / "run", clutter="orl", out=tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
