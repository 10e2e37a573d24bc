"""Scores against known gazes: the keys of the design, what they mean, and starts that do not leave the protocol."""

import importlib
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.data import Scenes
from foveate.inference.attend import attend
from foveate.inference.checkpoint import Run
from foveate.inference.evaluate import crop_bounds, evaluate, jittered_starts
from foveate.inference.guide import GazeGuide
from foveate.inference.posterior import Posterior
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError
from foveate.model.patch import density_coordinates, extract
from foveate.model.rbm import BernoulliRBM

# The design's keys, and `start`, which says by which protocol the others were measured.
KEYS = {
    *("scenes", "accuracy", "mean_iou", "median_iou", "iou_by_step", "seconds_per_scene"),
    *("bound_nats", "bound_nats_se", "bound_gaussian", "bound_student_t", "log_z", "log_z_se"),
    *("acceptance_rate", "divergences", "rhat_max", "rhat_undefined", "ess_min", "presence_mean", "seed", "versions"),
    "start",
}
SHORT: dict[str, Any] = {"chains": 2, "draws": 8, "warmup": 4}


def density(spread: float, nu: float) -> EllipticalDensity:
    made = EllipticalDensity.blank(575)
    made.mean.normal_(std=0.1)
    made.variances.uniform_(0.5 * spread, spread)
    made.nu.fill_(nu)
    return made


@pytest.fixture(scope="module")
def run() -> Run:
    """A run that has learned nothing: scoring does not depend on what was learned."""
    torch.manual_seed(0)
    dbn = DeepBeliefNet(DiagonalLayer(4), BernoulliRBM(4, 3), density(1.0, 8.0))
    dbn.set_log_z(7.5, 0.25)
    model = AttentionModel(dbn, ClutterModel(density(2.0, 6.0)), temperature=20.0)
    model.baselines["gaussian"], model.baselines["student_t"] = density(1.0, math.inf), density(1.0, 5.0)
    return Run(model, GazeGuide(4).eval(), {})


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    generator = torch.Generator().manual_seed(1)
    pictures = []
    for height, width in [(60, 80), (64, 48), (50, 50)]:
        coarse = torch.rand(1, 1, 8, 8, generator=generator)
        picture = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        pictures.append(picture[0, 0].clamp(0, 1))
    truth = torch.tensor([[1.2, 0.1, 40.0, 30.0], [1.0, -0.2, 24.0, 30.0], [0.9, 0.0, 20.0, 25.0]])
    return Scenes.from_pictures(pictures, gazes=truth.double())


@pytest.fixture(scope="module")
def jittered(run: Run, scenes: Scenes) -> tuple[dict[str, Any], Posterior]:
    return evaluate(run, scenes, start="jitter", seed=3, **SHORT)


def test_the_keys_are_those_of_the_design(jittered: tuple[dict[str, Any], Posterior]) -> None:
    results, _ = jittered
    assert set(results) == KEYS
    assert (results["scenes"], results["seed"], results["start"]) == (3, 3, "jitter")
    assert {"python", "foveate", "torch", "pyro-ppl", "numpy", "arviz"} == set(results["versions"])


def test_figures_are_those_of_the_posterior(jittered: tuple[dict[str, Any], Posterior], scenes: Scenes) -> None:
    results, posterior = jittered
    iou = gazes.overlap(posterior.mean_gaze, scenes.gazes)
    assert results["mean_iou"] == pytest.approx(float(iou.mean()))
    assert results["median_iou"] == pytest.approx(float(np.median(iou.numpy())))
    assert results["accuracy"] == float((iou > 0.5).double().mean())
    assert results["acceptance_rate"] == pytest.approx(float(posterior.statistics["acceptance_rate"].mean()))
    assert results["divergences"] == int(posterior.statistics["diverging"].sum())
    assert results["rhat_max"] == pytest.approx(float(posterior.rhat().max()))
    assert results["ess_min"] == pytest.approx(float(posterior.ess().min()))
    assert results["presence_mean"] == pytest.approx(float(posterior.presence.mean()))


def test_chains_that_stand_still_do_not_pass_for_chains_that_agree(
    run: Run, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both chains of the first scene never move, 30 pixels apart: no R-hat, and it must be told."""

    def stuck(*arguments: Any, **options: Any) -> Posterior:
        posterior = attend(*arguments, **options)
        posterior.gaze[0] = posterior.gaze[0, :1, :1]
        posterior.gaze[0, 1, :, 2] += 30
        return posterior

    # The package's attribute of that name is the function.
    monkeypatch.setattr(importlib.import_module("foveate.inference.evaluate"), "attend", stuck)
    results, posterior = evaluate(run, scenes, **SHORT)
    assert results["rhat_undefined"] == 1
    assert results["rhat_max"] == pytest.approx(float(posterior.rhat()[1:].max()))


def test_seconds_are_those_of_one_scene_and_the_sampler_is_asked_as_told(
    jittered: tuple[dict[str, Any], Posterior], run: Run, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    clock = [100.0]

    def attended(model: AttentionModel, guide: GazeGuide, given: Scenes, **options: Any) -> Posterior:
        asked.update(options)
        clock[0] += 6.0
        return jittered[1]

    module = importlib.import_module("foveate.inference.evaluate")
    monkeypatch.setattr(module, "attend", attended)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    results, _ = evaluate(run, scenes, start="jitter", chains=3, draws=9, warmup=5, seed=8)
    assert results["seconds_per_scene"] == 2.0
    assert torch.equal(asked.pop("start"), jittered_starts(scenes.gazes, 8))
    assert asked == {"chains": 3, "draws": 9, "warmup": 5, "seed": 8, "progress": False}


def test_iou_by_step_begins_at_the_start_and_ends_with_the_mean_iou(
    jittered: tuple[dict[str, Any], Posterior], scenes: Scenes
) -> None:
    results, posterior = jittered
    first = jittered_starts(scenes.gazes, 3)
    assert torch.equal(posterior.path[:, 0], first)
    assert results["iou_by_step"][0] == pytest.approx(float(gazes.overlap(first, scenes.gazes).mean()))
    assert results["iou_by_step"][-1] == pytest.approx(results["mean_iou"])
    assert len(results["iou_by_step"]) == posterior.path.shape[1]


def test_densities_are_scored_on_the_crops_at_the_true_gazes(
    jittered: tuple[dict[str, Any], Posterior], run: Run, scenes: Scenes
) -> None:
    results, _ = jittered
    crops = torch.stack([extract(scene.picture, scene.gaze) for scene in scenes]).float()
    y = density_coordinates(crops)
    bound = run.model.dbn.log_prob_bound(y).detach()
    # Float32 sums of 575 terms of up to a thousand nats.
    assert results["bound_nats"] == pytest.approx(float(bound.mean()), rel=1e-5)
    assert results["bound_nats_se"] == pytest.approx(float(bound.std() / math.sqrt(3)), rel=1e-4)
    for name in ("gaussian", "student_t"):
        expected = float(run.model.baselines[name].log_prob(y).mean())
        assert results[f"bound_{name}"] == pytest.approx(expected, rel=1e-5)
    assert (results["log_z"], results["log_z_se"]) == (7.5, 0.25)


def test_the_true_gazes_do_not_enter_a_search_of_the_whole_scene(run: Run, scenes: Scenes) -> None:
    """Other truths change the scores and leave the posterior as it is."""
    other = Scenes.from_pictures(scenes.pictures(), scenes.names, scenes.gazes + torch.tensor([0.0, 0.0, 5.0, -4.0]))
    results, posterior = evaluate(run, scenes.subset([0]), **SHORT)
    moved, same = evaluate(run, other.subset([0]), **SHORT)
    assert torch.equal(posterior.gaze, same.gaze)
    assert results["bound_nats"] != moved["bound_nats"]
    assert results["start"] == "scene" and results["bound_nats_se"] is None
    # Of an even number of scenes the median lies midway between two.
    two, found = evaluate(run, scenes.subset([0, 1]), **SHORT)
    assert two["median_iou"] == pytest.approx(float(gazes.overlap(found.mean_gaze, scenes.gazes[:2]).mean()))


def within(truth: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centre, scale, rotation = gazes.parts(gazes.compose(gazes.inverse(truth), starts))
    return centre.norm(dim=-1), torch.log2(scale), torch.rad2deg(rotation)


def test_jittered_starts_lie_within_a_patch_width_a_factor_of_two_and_thirty_degrees() -> None:
    truth = torch.tensor([2.0, 0.7, 100.0, 60.0]).double().expand(4000, 4)
    distance, octaves, degrees = within(truth, jittered_starts(truth, 0))
    # The bounds are kept up to rounding, and used: of 4000 draws some lie within 1 % of each.
    for value, bound in ((distance, 24.0), (octaves, 1.0), (-octaves, 1.0), (degrees, 30.0), (-degrees, 30.0)):
        assert 0.99 * bound < value.max() < bound * (1 + 1e-9)
    # Uniform in the disc and in the other two: mean and sd within 4 standard errors (0.0063 of the width each).
    assert abs(float((distance / 24).square().mean()) - 0.5) < 4 * 0.29 / 4000**0.5
    assert abs(float(octaves.mean())) < 4 * 0.58 / 4000**0.5
    assert abs(float(degrees.mean())) < 4 * 17.3 / 4000**0.5


def test_jittered_starts_are_off_in_every_direction_and_in_nothing_together() -> None:
    truth = torch.tensor([2.0, 0.7, 100.0, 60.0]).double().expand(4000, 4)
    error = gazes.parts(gazes.compose(gazes.inverse(truth), jittered_starts(truth, 0)))
    # Each coordinate of a point that is uniform in the disc has mean 0 and an sd of half the radius: 4 standard errors.
    assert float(error.centre.mean(0).abs().max()) < 4 * 12 / 4000**0.5
    together = torch.corrcoef(torch.stack([*error.centre.T, error.scale.log(), error.rotation]))
    # Correlations of what is independent have standard errors of 1 / √4000.
    torch.testing.assert_close(together, torch.eye(4).double(), rtol=0, atol=4 / 4000**0.5)


def test_jittered_starts_follow_their_seed() -> None:
    truth = torch.tensor([[2.0, 0.7, 100.0, 60.0]]).double()
    assert torch.equal(jittered_starts(truth, 4), jittered_starts(truth, 4))
    assert not torch.isclose(jittered_starts(truth, 4), jittered_starts(truth, 5)).any()


def test_scenes_without_true_gazes_are_refused(run: Run, scenes: Scenes) -> None:
    bare = Scenes.from_pictures(scenes.pictures())
    with pytest.raises(InputError, match="scoring needs a true gaze for every scene"):
        evaluate(run, bare)
    partly = scenes.gazes.clone()
    partly[1] = math.nan
    with pytest.raises(InputError, match="scoring needs a true gaze"):
        evaluate(run, Scenes.from_pictures(scenes.pictures(), gazes=partly))


def test_an_unknown_start_is_refused(run: Run, scenes: Scenes) -> None:
    start: Any = "truth"
    with pytest.raises(InputError, match="start 'truth': there are scene and jitter"):
        inspect.unwrap(evaluate)(run, scenes, start=start)


def test_starts_are_drawn_the_same_whatever_the_default_device() -> None:
    truth = gazes.from_parts(torch.tensor([[30.0, 20.0]]), torch.tensor([1.5]), torch.zeros(1))
    wanted = jittered_starts(truth, seed=3)
    # Another device than the generator's; PyTorch's "meta" would hold no numbers.
    with torch.device("meta"):
        assert torch.equal(jittered_starts(truth, seed=3), wanted)


def test_bounds_are_quoted_with_the_refined_posterior() -> None:
    generator = torch.Generator().manual_seed(2)
    layer, top = DiagonalLayer(6), BernoulliRBM(6, 3)
    with torch.no_grad():
        layer.weight.copy_(0.15 * torch.randn(575, 6, generator=generator))
        top.weight.copy_(torch.randn(6, 3, generator=generator))
    net = DeepBeliefNet(layer, top, EllipticalDensity.blank(575))
    net.set_log_z(0.0, 0.0)
    model = AttentionModel(net, ClutterModel(EllipticalDensity.blank(575)))
    truth = torch.tensor([[1.0, 0.0, 20.0, 20.0]] * 4).double()
    y, figures = crop_bounds(model, Scenes.from_pictures(list(torch.rand(4, 40, 40)), gazes=truth), truth)
    with torch.no_grad():
        quick, refined = net.log_prob_bound(y).mean(), net.log_prob_bound(y, net.refine_hidden(y)).mean()
    assert float(refined) > float(quick) + 0.1
    assert figures["bound_nats"] == pytest.approx(float(refined), rel=1e-6)
