"""The command `likelihood`: its figures against their definitions, and the whole command on composed scenes."""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.experiments import likelihood
from foveate.experiments.figures import EnergyPath, energy_paths_figure
from foveate.experiments.likelihood import (
    Likelihood,
    Presence,
    area_under_curve,
    beats_random_gazes,
    energy_path,
    presence_logits,
    random_gazes,
)
from foveate.experiments.scoring import Sampling
from foveate.inference.ais import exact_log_z
from foveate.inference.checkpoint import Run, save
from foveate.inference.guide import GazeGuide
from foveate.inference.posterior import Posterior
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


def test_baselines_stand_in_the_objects_place_against_the_same_clutter_through_the_same_noise(
    run: Run, scenes: Scenes
) -> None:
    """A baseline that is the clutter's own density has odds of 0 everywhere, whatever the noise: it beats nothing.

    By itself, or through less noise, it would have the first scene's own crop, its mean, above all.
    """
    core = run.model.dbn.core
    level = AttentionModel(run.model.dbn, ClutterModel(core), noise=0.05, temperature=20.0)
    level.baselines["gaussian"] = level.baselines["student_t"] = core
    wins = beats_random_gazes(level, scenes[:1], count=40)
    assert not bool(wins["gaussian"].any()) and not bool(wins["student_t"].any())


def test_only_gazes_elsewhere_count_where_no_other_are_asked_for(
    run: Run, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scenes.gazes is not None
    best = scenes.gazes[:1]
    # The density's own crop, a tenth of a patch off the label: an IoU of 21.6 / 26.4.
    beside = gazes.compose(best, torch.tensor([1.0, 0.0, 2.4, 0.0]).double())
    monkeypatch.setattr(likelihood, "random_gazes", lambda *_: best)
    wins = beats_random_gazes(run.model, scenes[:1].with_gazes(beside), count=1)
    assert (bool(wins["odds"]), bool(wins["odds_elsewhere"])) == (False, True)


def test_the_diagonal_nets_bound_is_quoted_with_the_refined_posterior_like_the_priors_own(
    run: Run, scenes: Scenes
) -> None:
    truth = scenes.gazes
    assert truth is not None
    core = run.model.dbn.core
    diagonal = DeepBeliefNet(DiagonalLayer(6), BernoulliRBM(6, 3), core)
    with torch.no_grad():
        diagonal.layer.weight.normal_(std=0.15)
        diagonal.top.weight.normal_()
    diagonal.set_log_z(1.0, 0.125)
    figures = likelihood._bounds(run.model, scenes, truth, diagonal)
    y = density_coordinates(torch.stack([extract(s.picture, g).float() for s, g in zip(scenes, truth, strict=True)]))
    with torch.no_grad():
        quick, refined = diagonal.log_prob_bound(y).mean(), diagonal.log_prob_bound(y, diagonal.refine_hidden(y)).mean()
        recognised = run.model.dbn.log_prob_bound(y).mean()
    assert float(refined) > float(quick) + 0.1
    # Float32 sums of 575 terms.
    assert figures["bound_diagonal"] == pytest.approx(float(refined), rel=1e-5)
    assert figures["bound_recognition"] == pytest.approx(float(recognised), rel=1e-5)
    assert figures["bound_diagonal_log_z_se"] == 0.125


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


UPRIGHT = torch.tensor([[1.5, 0.0, 40.0, 40.0], [1.0, 0.0, 50.0, 30.0], [2.0, 0.0, 60.0, 50.0]]).double()


def test_what_sampling_adds_is_the_posterior_means_iou_less_that_of_the_guides_last_look(
    run: Run, posterior_of: Callable[..., Posterior], with_iou: Callable[..., torch.Tensor]
) -> None:
    before, after = (0.5, 0.6, 0.9), (0.75, 0.6, 0.8)
    guided, reported = with_iou(UPRIGHT, *before), with_iou(UPRIGHT, *after)
    path = torch.stack([with_iou(UPRIGHT, 0.1, 0.1, 0.1), with_iou(UPRIGHT, 0.3, 0.3, 0.3), guided, reported], 1)
    told = likelihood._added(posterior_of(reported, path=path), UPRIGHT, reported, run, "whole scene")
    gain = [there - here for here, there in zip(before, after, strict=True)]
    assert told["iou_guide"] == pytest.approx(2.0 / 3)
    assert told["iou_posterior_mean"] == pytest.approx(2.15 / 3)
    assert told["gain"] == pytest.approx(0.15 / 3)
    assert told["gain_se"] == pytest.approx(statistics.stdev(gain) / math.sqrt(3))
    # Re-expressed as the very gazes that are reported, the labels leave the guide behind.
    assert told["iou_posterior_mean_re_expressed"] == pytest.approx(1.0)
    assert told["iou_guide_re_expressed"] == pytest.approx(float(gazes.overlap(guided, reported).mean()))
    assert told["gain_re_expressed"] == pytest.approx(1.0 - told["iou_guide_re_expressed"])
    assert likelihood._added(posterior_of(reported[:1]), UPRIGHT[:1], None, run, "whole scene")["gain_se"] is None


def test_each_way_of_sampling_has_the_settings_that_were_fitted_for_it(run: Run) -> None:
    fitted = {"with_guide_prior": {"temperature": 7.0, "noise": 0.02}, "without_guide_prior": {"temperature": 11.0}}
    chosen = dataclasses.replace(run, config={"variants": fitted})
    by, alone = (likelihood._variant(chosen, with_guide) for with_guide in (True, False))
    assert (float(by.guide.prior_weight), by.model.temperature, by.model.noise) == (1.0, 7.0, 0.02)
    assert (float(alone.guide.prior_weight), alone.model.temperature) == (0.0, 11.0)
    assert alone.model.noise == run.model.noise != 0.02 and run.model.temperature == 20.0
    assert likelihood._variant(run, True).model.temperature == 20.0


def test_a_scene_is_ranked_right_by_its_heaviest_end_point_and_by_an_oracle_by_any_that_counts(
    run: Run, scenes: Scenes, with_iou: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = with_iou(UPRIGHT, 0.8, 0.8, 0.8), with_iou(UPRIGHT, 0.4, 0.4, 0.4)
    ends = torch.stack([far, far, far], 1)
    ends[0, 0], ends[1, 1], ends[2, 2] = near[0], near[1], near[2]
    weight = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, -math.inf]])
    found = SimpleNamespace(gaze=ends, log_weight=weight)
    monkeypatch.setattr(likelihood, "_searched", lambda *_: iter([(range(3), found)]))
    # The third scene has two end points alone, and both are far off.
    assert likelihood._ranked(run.model, run.guide, scenes, UPRIGHT) == pytest.approx((1 / 3, 2 / 3))


def test_presence_sums_the_weights_of_all_end_points_by_all_evidence_and_by_the_odds_alone(
    run: Run, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    knowing = GazeGuide(4).eval()
    knowing.evidence.copy_(torch.tensor([0.5, 2.0, 1.0, -3.0]))
    weight = torch.log(torch.tensor([[2.0, 1.0], [0.5, 0.25]]))

    def searched(model: Any, guide: GazeGuide, *_: Any) -> Any:
        # Odds alone: the first feature, integrated log-odds, with a factor of one and nothing beside it.
        odds = guide.evidence.tolist() == [1.0, 0.0, 0.0, 0.0]
        return iter([(range(2), SimpleNamespace(log_weight=weight + (10.0 if odds else 0.0)))])

    monkeypatch.setattr(likelihood, "_searched", searched)
    found = presence_logits(Run(run.model, knowing, {}), scenes[:2])
    expected = torch.log(torch.tensor([3.0, 0.75]))
    torch.testing.assert_close(found.evidence, expected)
    torch.testing.assert_close(found.odds, expected + 10.0)
    assert knowing.evidence.tolist() == [0.5, 2.0, 1.0, -3.0]


def test_a_failure_tells_which_end_the_model_prefers_and_what_lies_between() -> None:
    energy = torch.full((61,), 12.0).double()
    for at, value in ((-0.25, 99.0), (0.0, 10.0), (0.5, 17.0), (1.0, 4.0), (1.25, 50.0)):
        energy[(likelihood.PATH - at).abs().argmin()] = value
    path = EnergyPath("a.jpg", torch.rand(50, 60), UPRIGHT[0], UPRIGHT[1], likelihood.PATH, energy)
    assert likelihood._told(path) == {"scene": "a.jpg", "truth_minus_found": -6.0, "barrier": 7.0}


def test_the_worst_scenes_are_the_failures(
    run: Run,
    scenes: Scenes,
    posterior_of: Callable[..., Posterior],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "FAILURES", 2)
    assert scenes.gazes is not None
    reported = scenes.gazes.clone()
    for i, away in ((0, 3.0), (1, 0.0), (2, 9.0)):
        reported[i, 2] += away * gazes.parts(reported[i]).scale
    found = likelihood._failures(run.model, scenes, posterior_of(reported))
    assert [path.title.split()[0] for _, path in found] == [scenes.names[2], scenes.names[0]]
    assert [iou for iou, _ in found] == pytest.approx(gazes.overlap(reported, scenes.gazes)[[2, 0]].tolist())


def test_every_figure_stands_in_the_row_that_names_it() -> None:
    sampled = {"start": "jitter, looks: 1", "guide_prior": True, "gain": 0.0321, "gain_re_expressed": -0.0123}
    of_spec = {
        "scenes": 75,
        "bound_nats": 401.2,
        "bound_recognition": 399.3,
        "bound_gaussian": 380.4,
        "bound_student_t": 390.5,
        "margin_student_t": 10.2,
        "bound_diagonal": 350.6,
        "beats_random": {
            "odds": 0.97,
            "odds_elsewhere": 0.98,
            "odds_re_expressed": 0.96,
            "gaussian": 0.75,
            "student_t": 0.85,
        },
        "ranking": {"odds": 0.81, "evidence": 0.92, "oracle": 0.99},
        "presence_auc": 0.9876,
        "presence_auc_odds": 0.8765,
        "sampling": [sampled],
    }
    rows = likelihood._rows({"log_z_se": 0.25, "data": {"a": of_spec}})
    assert rows == [
        ("scenes", "75"),
        ("bound of the prior, nats per crop", "401.2"),
        ("2 s.e. of log Z, nats", "0.50"),
        ("the same by the recognition posterior", "399.3"),
        ("one Gaussian, nats", "380.4"),
        ("one Student-t, nats", "390.5"),
        ("bound − 2 s.e. − Student-t, nats", "+10.2"),
        ("the paper's diagonal net, bound, nats", "350.6"),
        ("true gaze beats all random gazes: the model's odds", "97.0%"),
        ("… among random gazes with IoU < 0.5", "98.0%"),
        ("… labels re-expressed", "96.0%"),
        ("… Gaussian odds", "75.0%"),
        ("… Student-t odds", "85.0%"),
        ("whole scene: end points ranked by the odds alone", "81.0%"),
        ("… by all evidence", "92.0%"),
        ("… by an oracle", "99.0%"),
        ("HMC mean − guide, mean IoU (jitter, looks: 1; with guide as prior)", "+0.032"),
        ("… labels re-expressed", "-0.012"),
        ("presence, AUC against clutter: all evidence", "0.988"),
        ("… the model's odds alone", "0.876"),
    ]


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

    def told(run: Run, asked: Scenes) -> Presence:
        presence_logits(run, asked)
        shown = asked.gazes is not None
        return Presence(torch.tensor([2.0, 3.0] if shown else [1.0, 0.0]), torch.tensor([0.0, 2.0 if shown else 3.0]))

    monkeypatch.setattr(likelihood, "presence_logits", told)
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
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "failures.png"}
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
        # Of the four pairs, evidence has all right; of odds one is right, one a tie and two are wrong.
        assert (found["presence_auc"], found["presence_auc_odds"]) == (1.0, 0.375)
        assert found["ranking"]["oracle"] >= max(found["ranking"]["odds"], found["ranking"]["evidence"])
    assert len(results["failures"]) == 4
    table = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert table[0] == "| figure | orl@train | orl@test |" and all(line.count("|") == 4 for line in table)
    assert "bound of the prior" in capsys.readouterr().out


def test_no_scenes_are_refused_before_any_work(tmp_path: Path, run: Run) -> None:
    save(run, tmp_path / "run")
    with pytest.raises(InputError, match="--data"):
        Likelihood(source=tmp_path / "run", clutter="orl", out=tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
