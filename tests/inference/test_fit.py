"""The bootstrap: what is held out, what calibration recovers from simulations, and a run that comes back from disk."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.data import Scenes, orl_scenes
from foveate.inference.attend import Candidates, attend
from foveate.inference.checkpoint import Run, load, save
from foveate.inference.fit import crops_of, fit
from foveate.inference.guide import GazeChange, GazeGuide, change_chart
from foveate.inference.guide_training import GuideData
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel, SceneLikelihood
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer
from foveate.model.density import EllipticalDensity
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates, extract
from foveate.model.rbm import BernoulliRBM

# The package's function `fit` hides the module of the same name.
fitting = importlib.import_module("foveate.inference.fit")
STEPS: dict[str, Any] = {"glance_steps": 3, "look_steps": 2, "dbn_steps": 2, "width": 4}


def soft_scenes(count: int, people: list[str | None] | None = None) -> Scenes:
    """Pictures of soft noise of two sizes with gazes near their middles."""
    generator = torch.Generator().manual_seed(2)
    pictures, truth = [], []
    for i in range(count):
        height, width = ((60, 80), (72, 56))[i % 2]
        coarse = torch.rand(1, 1, 9, 9, generator=generator)
        picture = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        pictures.append(picture[0, 0].clamp(0, 1))
        truth.append([1.1, 0.2, width / 2 + i % 3, height / 2])
    return Scenes.from_pictures(pictures, gazes=torch.tensor(truth).double(), people=people)


def quick_net(crops: Tensor, **options: Any) -> DeepBeliefNet:
    """In place of `train_dbn`: an elliptical core fitted to the crops, under units that have learned nothing."""
    dbn = DeepBeliefNet(DiagonalLayer(4), BernoulliRBM(4, 3), quick_core(crops, None))
    dbn.set_log_z(7 * math.log(2), 0.0)
    return dbn


def quick_core(crops: Tensor, people: Tensor | None) -> EllipticalDensity:
    """In place of `fit_core`, which takes a few seconds to choose how it regularises."""
    return EllipticalDensity.fit(density_coordinates(crops).flatten(0, 1), 0.05, 8.0)


def quick_model() -> AttentionModel:
    dbn = DeepBeliefNet(DiagonalLayer(4), BernoulliRBM(4, 3), EllipticalDensity.blank(575))
    return AttentionModel(dbn, ClutterModel(EllipticalDensity.blank(575)))


@pytest.mark.parametrize("count", [24, 100, 900])
def test_held_out_scenes_are_about_an_eighth_and_at_most_sixty(count: int) -> None:
    held = fitting.held_out(count, None, torch.Generator().manual_seed(0))
    assert int(held.sum()) == min(max(4, round(0.12 * count)), 60)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_people_are_whole(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(0, 30, (300,), generator=generator).tolist()
    people = [None if n == 0 else f"person {n}" for n in number]
    held = fitting.held_out(300, people, generator)
    for n in range(1, 31):
        of_person = held[torch.tensor(number) == n]
        assert bool(of_person.all()) or not bool(of_person.any())
    # Wanted are 36; a last person may bring it to half as many more.
    assert 36 <= int(held.sum()) <= 54


@pytest.mark.parametrize("seed", range(5))
def test_one_person_is_held_out_rather_than_several(seed: int) -> None:
    people = [
        name for name, count in (("a", 40), ("b", 3), ("c", 5), ("d", 14), ("e", 4), ("f", 12)) for _ in range(count)
    ]
    held = fitting.held_out(78, people, torch.Generator().manual_seed(seed))
    # Wanted are 9, and at most 13: of f's twelve enough alone; d would be too many, b, c and e are too few.
    assert {people[i] for i in held.nonzero().flatten().tolist()} == {"f"} and int(held.sum()) == 12


@pytest.mark.parametrize("people", [["only one"] * 24, ["one", "other"] * 12], ids=["one person", "two people"])
def test_with_too_few_people_to_hold_one_out_single_scenes_are(people: list[str]) -> None:
    held = fitting.held_out(24, people, torch.Generator().manual_seed(0))
    assert int(held.sum()) == 4


def test_people_are_numbered_and_strangers_are_people_of_their_own() -> None:
    assert fitting.person_numbers(None) is None
    number = fitting.person_numbers(["a", None, "b", "a", None])
    assert number is not None and number[0] == number[3] and len(number.unique()) == 4


def test_crops_begin_with_the_exact_one_and_are_jittered_a_little() -> None:
    scenes = soft_scenes(3)
    truth = scenes.gazes
    assert truth is not None
    crops = crops_of(scenes, truth, torch.Generator().manual_seed(0))
    assert crops.shape == (3, fitting.VERSIONS, 24, 24)
    for i in range(3):
        torch.testing.assert_close(crops[i, 0], extract(scenes.pictures([i])[0], truth[i]).float())
        # Less than two canonical pixels (4 sds), 8 % and 0.08 rad away: far nearer than a patch moved by six pixels.
        moved = extract(scenes.pictures([i])[0], gazes.compose(truth[i], torch.tensor([1.0, 0.0, 6.0, 0.0]).double()))
        away = (crops[i, 1:] - crops[i, 0]).square().mean((-2, -1))
        assert bool((away > 0).all()) and bool((away < 0.3 * (moved - crops[i, 0]).square().mean()).all())


def simulated_features(direction: Tensor, scenes: int = 800, modes: int = 4) -> tuple[Tensor, Tensor]:
    """Features of modes, and which one is right: chosen with the probabilities of a conditional logit."""
    generator = torch.Generator().manual_seed(6)
    spread = torch.tensor([40.0, 2.0, 2.0]).double()
    features = spread * torch.randn(scenes, modes, 3, generator=generator, dtype=torch.float64)
    chosen = torch.multinomial(torch.softmax((features * direction).sum(-1), -1), 1, generator=generator)
    return features, torch.zeros(scenes, modes, dtype=torch.bool).scatter(1, chosen, True)


def test_weights_of_the_evidence_recover_the_conditional_logit_that_made_the_choices() -> None:
    direction = torch.tensor([0.05, 1.0, 0.3]).double()
    features, right = simulated_features(direction)
    weights = fitting._evidence_weights(features, right, torch.ones_like(right)).double()
    # Standard errors of 800 choices are about 6 % of the weights, or 0.06 for those of unit size; 4 of them.
    torch.testing.assert_close(weights[:3], direction, rtol=0.25, atol=0.1 * direction.min().item())
    # The constant lies between right modes and wrong ones: most of each fall on their side of 0.
    score = (features * weights[:3]).sum(-1) + weights[3]
    assert (score[right] > 0).double().mean() > 0.5 and (score[~right] < 0).double().mean() > 0.5


def test_modes_that_are_not_there_say_nothing_about_the_weights() -> None:
    features, right = simulated_features(torch.tensor([0.05, 1.0, 0.3]).double(), scenes=60)
    padded = torch.cat([features, torch.full((60, 2, 3), -math.inf).double()], 1)
    nowhere = torch.zeros(60, 2, dtype=torch.bool)
    found = fitting._evidence_weights(
        padded, torch.cat([right, nowhere], 1), torch.cat([torch.ones_like(right), nowhere], 1)
    )
    torch.testing.assert_close(found, fitting._evidence_weights(features, right, torch.ones_like(right)))


@pytest.mark.parametrize("which", ["no wrong mode", "no right mode"])
def test_weights_are_those_they_start_from_where_there_is_nothing_to_choose(which: str) -> None:
    features, _ = simulated_features(torch.tensor([0.05, 1.0, 0.3]).double(), scenes=10)
    features[:, :, 1] = -math.inf  # a start was given: no glance
    valid = torch.ones(10, 4, dtype=torch.bool)
    right = valid if which == "no wrong mode" else ~valid
    weights = fitting._evidence_weights(features, right, valid)
    # The likelihood is the same for all weights, and the ridge alone decides.
    torch.testing.assert_close(weights[:3], torch.tensor(fitting.EVIDENCE))
    assert bool(torch.isfinite(weights[3]))


class OverconfidentGuide(GazeGuide):
    """A guide whose looks are right on average and twice as far off as it says."""

    def __init__(self, truth: Tensor) -> None:
        super().__init__(4)
        self.truth, self.claimed = truth, torch.tensor([0.02, 0.03, 0.02, 0.04])

    def look(self, pyramid: Any, gaze: Tensor, canonical: Tensor, scene: Tensor) -> GazeChange:
        generator = torch.Generator().manual_seed(1)
        error = 2 * self.claimed * torch.randn(len(gaze), 4, generator=generator)
        mean = change_chart(gaze).to_chart(self.truth[scene]).float() + error
        log_sd = self.claimed.log().expand_as(mean) + self.log_sd_offset
        return GazeChange(mean, log_sd, *torch.zeros(2, len(gaze)))


def test_calibration_of_sds_recovers_a_factor_of_two() -> None:
    count = 400
    truth = torch.tensor([1.2, 0.1, 40.0, 30.0]).double().expand(count, 4)
    guide = OverconfidentGuide(truth)
    near = gazes.LocalChart(truth).to_gaze(torch.tensor([0.5, -0.5, 0.3, 0.2]).double().expand(count, 4))
    unseen = [Pyramid.build([torch.zeros(8, 8)])]
    fitting._calibrate_sds(quick_model(), guide, unseen, [(near, torch.ones(count, 4).double())], [truth])
    # The median of 400 absolute normals has a relative standard error of 1.17 / 20 = 6 %; 4 of them.
    torch.testing.assert_close(guide.log_sd_offset, torch.full((4,), math.log(2.0)), rtol=0, atol=0.24)


def test_sds_stay_as_they_are_when_few_scenes_are_close() -> None:
    truth = torch.tensor([1.2, 0.1, 40.0, 30.0]).double().expand(20, 4)
    guide = OverconfidentGuide(truth)
    far = gazes.compose(truth, torch.tensor([1.0, 0.0, 30.0, 0.0]).double())
    far[:7] = truth[:7]
    unseen = [Pyramid.build([torch.zeros(8, 8)])]
    fitting._calibrate_sds(quick_model(), guide, unseen, [(far, torch.ones(20, 4).double())], [truth])
    assert torch.equal(guide.log_sd_offset, torch.zeros(4))


@pytest.mark.parametrize("with_guide", [False, True])
def test_the_guide_becomes_a_prior_where_pictures_say_nothing_and_it_is_right(with_guide: bool) -> None:
    """The odds of blank pictures are flat: left are the prior and a belief that is right or far too narrow."""
    generator = torch.Generator().manual_seed(4)
    scenes, sd = 12, torch.ones(4).double()
    pyramid = Pyramid.build([torch.full((80, 80), 0.5)] * scenes)
    gaze = torch.tensor([1.0, 0.0, 40.0, 40.0]).double().expand(scenes, 4)
    # Right: truths spread as the belief says. Wrong: five times as far, where the belief makes them improbable.
    z = (1 if with_guide else 5) * sd * torch.randn(scenes, 4, generator=generator, dtype=torch.float64)
    z = z.clamp(-1, 1) if with_guide else z
    truth = gazes.LocalChart(gaze).to_gaze(z)
    model, guide = quick_model(), GazeGuide(4)
    figures = fitting._choose_variant(model, guide, [pyramid], [(gaze, sd.expand(scenes, 4))], [truth])
    assert figures["guide_prior"] is with_guide and float(guide.prior_weight) == with_guide
    assert model.temperature in fitting.TEMPERATURES and model.noise in fitting.NOISES
    assert figures["validation_log_density"] >= figures["validation_log_density_without_guide_prior"] - 0.05


@pytest.fixture
def one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank pictures look the same through any noise."""
    monkeypatch.setattr(fitting, "NOISES", fitting.NOISES[:1])


def flat_scenes(z: Tensor) -> tuple[Pyramid, Tensor, Tensor]:
    """Blank pictures, the gaze found in each, and true gazes at z in its chart: in sight, far from the border."""
    gaze = torch.tensor([1.5, 0.0, 100.0, 100.0]).double().expand(len(z), 4)
    return Pyramid.build([torch.full((200, 200), 0.5)] * len(z)), gaze, gazes.LocalChart(gaze).to_gaze(z)


@pytest.mark.usefixtures("one_noise")
def test_a_variant_is_scored_by_the_posterior_density_of_the_truth() -> None:
    """In closed form: where the odds are flat, the prior is normal in the chart, as the guide's belief is."""
    sd = torch.tensor([1.0, 0.7, 1.2, 0.8]).double()
    z = sd * torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).clamp(-1.2, 1.2)
    z[:, 2] += 0.5  # not about 0, where a wrong Jacobian would do no harm
    pyramid, gaze, truth = flat_scenes(z)
    model, guide = quick_model(), GazeGuide(4)
    figures = fitting._choose_variant(model, guide, [pyramid], [(gaze, sd.expand(4, 4))], [truth])
    prior = gazes.GazePrior(torch.tensor([200, 200]))
    assert not isinstance(prior.typical, Tensor)
    # Log-scale and rotation are counted in units of 0.125; the centre is uniform.
    away = (math.log(prior.typical * 200 / 24) - math.log(1.5)) / 0.125
    of_prior = torch.tensor([0.0, 0.0, (0.125 / 0.6) ** 2, (0.125 / 0.25) ** 2]).double()
    precision = sd**-2 + of_prior
    mean = torch.tensor([0.0, 0.0, away, 0.0]).double() * of_prior / precision
    exact = float(torch.distributions.Normal(mean, precision**-0.5).log_prob(z).sum(-1).mean())
    assert figures["guide_prior"] is True
    # 512 quasi-random points of the normaliser; the chart's volume with its sign changed would cost over 0.1.
    assert figures["validation_log_density"] == pytest.approx(exact, abs=0.02)


@pytest.mark.usefixtures("one_noise")
def test_no_single_scene_decides_about_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """One truth 30 sds away counts for `WORST` = -25 nats, not for -450."""
    monkeypatch.setattr(fitting, "PREFERENCE", -1e6)
    z, sd = torch.zeros(2, 4).double(), torch.full((2, 4), 0.05).double()
    scores = []
    for far in (0.0, 30 * 0.05):
        z[0, 2] = far
        pyramid, gaze, truth = flat_scenes(z)
        figures = fitting._choose_variant(quick_model(), GazeGuide(4), [pyramid], [(gaze, sd)], [truth])
        scores.append(figures["validation_log_density"])
    assert scores[1] == pytest.approx((scores[0] - 25) / 2, rel=1e-6)


@pytest.mark.usefixtures("one_noise")
def test_the_guide_must_be_better_than_none_by_the_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    z, sd = torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    pyramid, gaze, truth = flat_scenes(z)
    chosen = []
    for preference in (-1e6, fitting.PREFERENCE, 1e6):
        monkeypatch.setattr(fitting, "PREFERENCE", preference)
        chosen.append(
            fitting._choose_variant(quick_model(), GazeGuide(4), [pyramid], [(gaze, sd)], [truth])["guide_prior"]
        )
    assert chosen == [True, True, False]


@pytest.mark.parametrize("aperture", [None, 7.0])
def test_edges_are_given_their_say_beside_pixels(monkeypatch: pytest.MonkeyPatch, aperture: float | None) -> None:
    generator = torch.Generator().manual_seed(8)
    pyramid = Pyramid.build([torch.rand(80, 80, generator=generator) for _ in range(6)])
    truth = torch.tensor([1.0, 0.0, 40.0, 40.0]).double().expand(6, 4)
    x = torch.linspace(-3, 3, 24)
    crops = 0.5 + 0.2 * torch.cos(x)[:, None] * torch.cos(x) + 0.03 * torch.randn(20, 24, 24, generator=generator)
    y, others = density_coordinates(crops), []
    model = quick_model()
    model.aperture = aperture
    model.dbn.core = EllipticalDensity.from_axes(y.mean(0), torch.eye(575), torch.full((575,), 0.3))
    proper = ClutterModel.fit
    monkeypatch.setattr(ClutterModel, "fit", classmethod(lambda cls, y: others.append(y) or proper(y)))
    fitting.fit_clutter(model, y, GuideData(pyramid, truth, crops[:6]), generator, 1000)
    edges = model.edges
    assert edges is not None
    pixels = SceneLikelihood(*model.marginal_densities(), 1.0, torch.Size([]))
    gaps = [float(score(y).mean() - score(others[0]).mean()) for score in (pixels.log_prob, edges.log_odds)]
    # Float32 sums of hundreds of nats.
    assert gaps[0] > 0 and gaps[1] == pytest.approx(fitting.EDGES_SAY * gaps[0], rel=1e-3)
    # The corner cells, in all eight directions, have a say where all of the square is seen.
    corners = edges.direction.reshape(8, 11, 11)[:, ::10, ::10].abs()
    assert float(corners.min()) > 0 if aperture is None else float(corners.max()) == 0


def test_of_many_windows_those_with_the_highest_odds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MINED", 4)
    pyramid = Pyramid.build([torch.rand(80, 80, generator=torch.Generator().manual_seed(k)) for k in range(6)])
    data = GuideData(pyramid, torch.tensor([1.0, 0.0, 40.0, 40.0]).double().expand(6, 4), torch.rand(6, 24, 24))
    model = quick_model()
    kept = fitting._likeliest_windows(model, data, 40, torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)
    every = torch.cat([fitting._other_windows(data, 40, 0.5, again) for _ in range(4)])
    best = model.log_odds(every).topk(40).values
    likelihood = SceneLikelihood(*model.marginal_densities(), model.temperature, torch.Size([]))
    # Compiled float32 energies against PyTorch's.
    torch.testing.assert_close(likelihood.log_prob(kept).sort(descending=True).values, best, rtol=1e-4, atol=1e-2)


def test_edges_count_what_shows_the_object_in_part_to_what_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside odds that were fitted to clutter alone, windows that are off the face a little lie farther from it."""
    pyramid, truth = {}, {}
    for split in ("train", "test"):
        scenes = orl_scenes(split, 60, sizes=((96, 120),))
        pyramid[split], truth[split] = fitting.coarse_pyramid(scenes, range(60)), scenes.gazes
    crops = pyramid["train"].extract(truth["train"][:, None])[:, 0].float()
    y = density_coordinates(crops)
    model, others = quick_model(), []
    proper = ClutterModel.fit
    monkeypatch.setattr(ClutterModel, "fit", classmethod(lambda cls, y: others.append(y) or proper(y)))
    data = GuideData(pyramid["train"], truth["train"], crops)
    fitting.fit_clutter(model, y, data, torch.Generator().manual_seed(9), 1000)
    off = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double()
    error = gazes.from_parts(off, torch.tensor([1.0, 1.0, 0.65, 1.5]).double(), torch.zeros(4).double())
    beside = gazes.compose(truth["test"][:, None], error)
    whole, in_part = (
        density_coordinates(pyramid["test"].extract(gaze).float()).flatten(0, 1)
        for gaze in (truth["test"][:, None], beside)
    )

    def nearness(edges: EdgeOdds) -> float:
        """Where windows that show a part lie between clutter (0) and the object (1)."""
        part, object_, clutter = (float(edges.log_odds(v).mean()) for v in (in_part, whole, others[0]))
        return (part - clutter) / (object_ - clutter)

    # 0.78 of it as seen; without such windows among the negatives, 1.
    assert nearness(model.edges) < 0.9 * nearness(EdgeOdds.fit(y, others[0]))


def test_edges_share_the_temperature_which_is_low_where_they_know_where_the_object_is() -> None:
    """The model of the pixels knows nothing; the edges' odds peak at the true gazes by construction, or elsewhere."""
    generator = torch.Generator().manual_seed(6)
    texture = torch.nn.functional.interpolate(torch.rand(1, 1, 12, 12, generator=generator), (80, 80), mode="bicubic")
    pyramid = Pyramid.build([texture[0, 0].clamp(0, 1)] * 10)
    truth = torch.tensor([1.0, 0.0, 40.0, 40.0]).double().expand(10, 4)
    sd = torch.ones(10, 4).double()
    gaze = gazes.LocalChart(truth).to_gaze(0.7 * torch.randn(10, 4, generator=generator, dtype=torch.float64))
    seen = density_coordinates(pyramid.extract(truth[:, None])[:1, 0])
    other = density_coordinates(
        pyramid.extract(gazes.LocalChart(truth[:, None]).to_gaze(8 * torch.randn(10, 30, 4).double()))
    )
    temperatures = []
    for right in (True, False):
        model, guide = quick_model(), GazeGuide(4)
        model.edges = EdgeOdds.fit(seen.expand(12, -1), other.flatten(0, 1))
        if not right:
            model.edges = model.edges.scaled(-1.0)
        figures = fitting._choose_variant(model, guide, [pyramid], [(gaze, sd)], [truth])
        chosen = figures["variants"]["with_guide_prior" if figures["guide_prior"] else "without_guide_prior"]
        assert chosen == {"temperature": model.temperature, "noise": model.noise}
        temperatures.append(model.temperature)
    assert temperatures[0] < temperatures[1]


def test_scenes_that_were_learned_from_are_scored_by_models_that_were_not() -> None:
    """A model that knows these scenes would choose a low temperature; the guide, which knows them too, has no say."""
    generator = torch.Generator().manual_seed(6)
    texture = torch.nn.functional.interpolate(torch.rand(1, 1, 12, 12, generator=generator), (80, 80), mode="bicubic")
    pyramid = Pyramid.build([texture[0, 0].clamp(0, 1)] * 10)
    truth = torch.tensor([1.0, 0.0, 40.0, 40.0]).double().expand(10, 4)
    near = [(gazes.LocalChart(truth).to_gaze(0.1 * torch.randn(10, 4, generator=generator).double()), 0.2 + 0 * truth)]
    seen = density_coordinates(pyramid.extract(truth[:, None])[:1, 0])
    elsewhere = gazes.LocalChart(truth[:, None]).to_gaze(8 * torch.randn(10, 30, 4, generator=generator).double())
    other = density_coordinates(pyramid.extract(elsewhere))
    knowing, unknowing, guide = quick_model(), quick_model(), GazeGuide(4)
    knowing.edges = EdgeOdds.fit(seen.expand(12, -1), other.flatten(0, 1))
    unknowing.edges = knowing.edges.scaled(-1.0)
    chosen = []
    for by in (None, [knowing], [unknowing]):
        figures = fitting._choose_variant(knowing, guide, [pyramid], near, [truth], by)
        chosen.append(knowing.temperature)
        assert figures["guide_prior"] is (by is None) and float(guide.prior_weight) == (by is None)
    assert chosen[1] < chosen[2]


def test_where_one_person_has_nearly_all_scenes_folds_are_of_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "fit_core", quick_core)
    monkeypatch.setattr(fitting, "fit_clutter", lambda *given: None)
    pyramid = Pyramid.build([torch.zeros(30, 30)] * 20)
    data = GuideData(pyramid, torch.ones(20, 4), torch.rand(20, 24, 24), person=torch.tensor([0] * 19 + [1]))
    parts = [rows for _, rows in fitting.without_each_fold(quick_model(), data, torch.rand(20, 2, 24, 24), 0)]
    assert sorted(torch.cat(parts).tolist()) == list(range(20)) and max(map(len, parts)) <= 10


def test_copies_that_scored_the_scenes_are_left_with_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor on the sds is then told by their posteriors."""
    scenes, model = soft_scenes(7), quick_model()
    copies = [(quick_model(), torch.tensor([0, 1, 2, 3])), (quick_model(), torch.tensor([4, 5, 6]))]
    scored: list[AttentionModel] = []

    def chosen(model: AttentionModel, guide: GazeGuide, pyramids: Any, near: Any, true: Any, by: Any) -> dict[str, Any]:
        scored.extend(by)
        assert torch.equal(torch.cat(true), scenes.gazes)
        assert [len(pyramid) for pyramid in pyramids] == [4, 3]
        model.noise, model.temperature = 0.5, 7.0
        return {}

    monkeypatch.setattr(fitting, "_choose_variant", chosen)
    assert scenes.gazes is not None
    fitting.calibrate(model, GazeGuide(4), scenes, torch.tensor([0, 5]), scenes.gazes, copies)
    assert scored == [there for there, _ in copies]
    assert all((there.noise, there.temperature) == (0.5, 7.0) for there in (model, *scored))


def test_models_without_a_fold_know_nothing_of_its_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MINED", 1)
    monkeypatch.setattr(fitting, "fit_core", quick_core)
    quick = fitting.fit_clutter
    monkeypatch.setattr(fitting, "fit_clutter", lambda *given: quick(*given[:-1], 700))
    scenes = orl_scenes("train", 20, sizes=((96, 120),))
    assert scenes.gazes is not None
    person = torch.arange(20) // 2
    model = quick_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    crops = crops_of(scenes, scenes.gazes, torch.Generator().manual_seed(0))

    def fitted(crops: Tensor, pyramid: Pyramid) -> list[tuple[AttentionModel, Tensor]]:
        data = GuideData(pyramid, scenes.gazes, crops[:, 0], person=person)
        return list(fitting.without_each_fold(model, data, crops, 3))

    pyramid = fitting.coarse_pyramid(scenes, range(20))
    parts = fitted(crops, pyramid)
    assert sorted(torch.cat([rows for _, rows in parts]).tolist()) == list(range(20)) and len(parts) == 5
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    # What the first fold's scenes show changes entirely: its own model does not, every other does.
    rows = parts[0][1]
    assert all(sorted(person[person == p].tolist()) == person[rows][person[rows] == p].tolist() for p in person[rows])
    black = [torch.zeros_like(p) if i in rows.tolist() else p for i, p in enumerate(scenes.pictures())]
    changed = crops.clone()
    changed[rows] = crops[rows].flip(-2)
    again = fitted(changed, fitting.coarse_pyramid(Scenes.from_pictures(black, gazes=scenes.gazes), range(20)))
    for number, ((one, of_one), (two, of_two)) in enumerate(zip(parts, again, strict=True)):
        assert torch.equal(of_one, of_two)
        for same in (
            torch.equal(one.dbn.core.variances, two.dbn.core.variances),
            torch.equal(one.clutter.density.mean, two.clutter.density.mean),
            torch.equal(one.edges.direction, two.edges.direction),
        ):
            assert same is (number == 0)


def test_the_variant_stays_as_it_is_when_no_mode_is_near_the_truth() -> None:
    pyramid = Pyramid.build([torch.rand(80, 80)] * 2)
    gaze = torch.tensor([1.0, 0.0, 20.0, 20.0]).double().expand(2, 4)
    truth = torch.tensor([1.0, 0.0, 60.0, 60.0]).double().expand(2, 4)
    model, guide = quick_model(), GazeGuide(4)
    model.noise, model.temperature = 0.8, 5.0
    assert fitting._choose_variant(model, guide, [pyramid], [(gaze, torch.ones(2, 4).double())], [truth]) == {}
    assert (model.noise, model.temperature, float(guide.prior_weight)) == (0.8, 5.0, 0.0)


def assert_same_run_from_disk(run: Run, scenes: Scenes, path: Path) -> None:
    save(run, path)
    found = load(path)
    options: dict[str, Any] = {"chains": 2, "draws": 5, "warmup": 3, "guide_steps": 1, "seed": 7}
    first = attend(run.model, run.guide, scenes.subset([0, 1]), **options)
    second = attend(found.model, found.guide, scenes.subset([0, 1]), **options)
    for name in ("gaze", "modes", "weights", "presence", "path", "canonical_draws"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=0, atol=0, equal_nan=True)
    assert bool(torch.isfinite(first.gaze).all())


def test_fitting_returns_a_run_that_attends_the_same_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "train_dbn", quick_net)
    monkeypatch.setattr(fitting, "fit_core", quick_core)
    monkeypatch.setattr(fitting, "WINDOWS", 600)
    scenes = soft_scenes(14, [f"person {i // 2}" for i in range(14)])
    seen: list[str] = []
    before = torch.get_rng_state()
    run = fit(scenes, progress=lambda stage, done, total, figure: seen.append(stage), **STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(dict.fromkeys(seen)) == ["reading", "glance", "look", "folds", "calibrating"]
    assert (seen.count("reading"), seen.count("glance"), seen.count("look")) == (14, 3, 2)
    assert run.config["scenes"] == 14 and run.config["held_out"] == 4 and run.config["clutter_pictures"] == 0
    assert 0 <= run.config["validation_accuracy"] <= 1
    assert run.model.aperture == fitting.APERTURE
    assert bool(torch.isfinite(run.guide.evidence).all())
    for name in ("gaussian", "student_t"):
        assert float(run.model.baselines[name].variances.sum()) != 575.0  # no longer blank
    assert_same_run_from_disk(run, scenes, tmp_path / "run")


@pytest.mark.slow
def test_fitting_composed_faces_with_clutter_and_the_real_prior(tmp_path: Path) -> None:
    scenes = orl_scenes("train", 24, seed=0, sizes=[(120, 160), (100, 100)])
    run = fit(scenes, soft_scenes(3), **STEPS)
    assert run.config["clutter_pictures"] == 3
    assert math.isfinite(float(run.model.dbn.log_z))
    assert_same_run_from_disk(run, scenes, tmp_path / "run")


def test_the_gaze_prior_is_that_of_the_training_gazes_made_wider() -> None:
    pyramid = Pyramid.build([torch.zeros(100, 200)])[torch.zeros(50, dtype=torch.int64)]
    generator = torch.Generator().manual_seed(0)
    log_scale = math.log(30.0 / 24) + 0.4 * torch.randn(50, generator=generator, dtype=torch.float64)
    truth = gazes.from_parts(torch.rand(50, 2).double(), log_scale.exp(), torch.zeros(50).double())
    options = fitting.gaze_prior_options(pyramid, truth)
    # Median width 30 pixels of 100, to 4 standard errors of a mean of 50 (23 %); half as wide again as the sample.
    assert options["typical"] == pytest.approx(0.3, rel=0.23)
    assert options["log_scale_sd"] == pytest.approx(1.5 * float(log_scale.std()))
    assert options["rotation_sd"] == 0.15


def test_scenes_without_gazes_or_too_few_are_refused() -> None:
    scenes = soft_scenes(14)
    with pytest.raises(InputError, match="training needs a true gaze for every scene"):
        fit(Scenes.from_pictures(scenes.pictures()), **STEPS)
    with pytest.raises(InputError, match="13 scenes to train on: at least 14"):
        fit(scenes.subset(range(13)), **STEPS)


def test_too_few_scenes_beside_those_held_out_are_refused_before_the_guide_is_trained() -> None:
    stages: list[str] = []
    # Whole people are held out: two of three scenes each.
    scenes = soft_scenes(15, [f"person {i // 3}" for i in range(15)])
    with pytest.raises(InputError, match="15 scenes, of which 6 are held out: the prior learns from 10 or more"):
        fit(scenes, **STEPS, progress=lambda stage, done, total, figure: stages.append(stage))
    assert stages == []


@pytest.mark.parametrize("width", [1.0, 0.3, 0.1, 0.05])
def test_a_posterior_of_any_width_about_the_truth_is_normalised(width: float) -> None:
    """A normal law with sds of `width` times the mode's, one of them off the truth: its integral is one."""
    gaze, sd = torch.tensor([[1.0, 0.0, 40.0, 40.0]]).double(), torch.tensor([[0.6, 0.5, 0.4, 0.7]]).double()
    truth = torch.tensor([[[0.4, -0.7, 0.3, 0.2]]]).double() * sd
    z, log_q = fitting._points_about(gaze, sd, truth)
    peak = truth + width * sd * torch.tensor([0.5, 0.0, 0.0, 0.0]).double()
    weight = torch.distributions.Normal(peak, width * sd[:, None]).log_prob(z).sum(-1) - log_q
    log_integral = float(torch.logsumexp(weight, -1) - math.log(z.shape[1]))
    # A scrambled Sobol rule of some hundred points: 0.024 nats at most. The wide points alone miss by 0.6, 15 and 72.
    assert abs(log_integral) < 0.05


def test_the_sharpest_variant_does_not_win_by_a_peak_that_lies_between_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odds that are a narrow normal law of the gaze, known exactly: at a temperature T it is √T as wide.

    Truths lie 4 s off its peak in each coordinate, s its sd at T = 1, a fiftieth of the mode's: the density of the
    truth, -8 · 4 / T - 4 log s √(2πT), is highest at T = 16. Points spread as the mode alone see no mass at all there.
    """
    scenes, s = 6, 0.02
    pyramid = Pyramid.build([torch.full((80, 80), 0.5)] * scenes)
    gaze = torch.tensor([1.0, 0.0, 40.0, 40.0]).double().expand(scenes, 4)
    chart = gazes.LocalChart(gaze[:, None])
    sign = torch.tensor([[1, 1, -1, 1], [-1, 1, 1, 1], [1, -1, -1, -1], [-1, -1, 1, -1], [1, 1, 1, 1], [-1, 1, -1, 1]])
    peak = torch.tensor([0.3, -0.4, 0.2, 0.1]).double()
    truth = chart.to_gaze((peak + 4 * s * sign.double())[:, None])[:, 0]

    class OfGazes(torch.nn.Module):
        def log_odds(self, at: Tensor) -> Tensor:
            return -0.5 * ((chart.to_chart(at) - peak) / s).square().sum(-1)

        def log_prob(self, at: Tensor) -> Tensor:
            return torch.zeros(at.shape[:-1])

    # A window is seen as the gaze that it is looked at from.
    monkeypatch.setattr(Pyramid, "extract", lambda self, at: at)
    monkeypatch.setattr(fitting, "density_coordinates", lambda patch: patch)
    model, guide = quick_model(), GazeGuide(4)
    monkeypatch.setattr(AttentionModel, "marginal_densities", lambda self: (OfGazes(), OfGazes()))
    model.edges = OfGazes()
    sd = torch.ones(scenes, 4).double()
    figures = fitting._choose_variant(model, guide, [pyramid], [(gaze, sd)], [truth])
    assert model.temperature == 16.0
    exact = -2.0 - 4 * math.log(s * math.sqrt(2 * math.pi * 16))
    # 0.002 as seen; the gaze's prior is nearly flat on this scale.
    assert figures["validation_log_density_without_guide_prior"] == pytest.approx(exact, abs=0.02)


def test_nothing_is_trained_on_scenes_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    taught: list[GuideData] = []

    def net(crops: Tensor, **options: Any) -> DeepBeliefNet:
        given.update(crops=crops, validation=options["validation"])
        return quick_net(crops)

    def calibrated(name: str, result: Any) -> Any:
        return lambda model, guide, scenes, rows, truth, *refitted: given.update({name: rows}) or result

    monkeypatch.setattr(fitting, "train_dbn", net)
    for half in ("train_glance", "train_looks"):
        monkeypatch.setattr(fitting, half, lambda guide, data, **options: taught.append(data) or 0.0)
    monkeypatch.setattr(fitting, "calibrate", calibrated("calibrated", {"validation_accuracy": 0.0}))
    monkeypatch.setattr(fitting, "calibrated_factor", lambda parts, *given_: given.update(covered=parts[0][1]) or 1.0)
    monkeypatch.setattr(fitting, "fit_clutter", lambda *given: None)
    monkeypatch.setattr(fitting, "without_each_fold", lambda *given: iter(()))
    scenes = soft_scenes(20)
    assert scenes.gazes is not None
    fit(scenes, **STEPS)
    held = given["calibrated"]
    assert 0 < len(held) < 10 and torch.equal(held, given["covered"])
    rest = torch.tensor([i for i in range(20) if i not in held.tolist()])
    exact = torch.stack([extract(p, g).float() for p, g in zip(scenes.pictures(), scenes.gazes, strict=True)])
    torch.testing.assert_close(given["crops"][:, 0], exact[rest])
    torch.testing.assert_close(given["validation"], exact[held])
    assert len(taught) == 2
    for data in taught:
        assert torch.equal(data.gaze, scenes.gazes[rest]) and torch.equal(data.pyramid.size, scenes.sizes[rest])
        torch.testing.assert_close(data.canonical, exact[rest])


def test_what_is_calibrated_is_the_mode_nearest_to_the_truth() -> None:
    gaze = torch.tensor([[[1.0, 0.0, at, 40.0] for at in (90.0, 42.0, 46.0)]]).double()
    sd = torch.arange(12.0).reshape(1, 3, 4).double()
    found = Candidates(gaze, sd, gaze[..., :3], gaze[..., 0], gaze)
    near, its_sd = fitting._nearest(found, torch.tensor([[1.0, 0.0, 40.0, 40.0]]).double())
    assert torch.equal(near, gaze[:, 1]) and torch.equal(its_sd, sd[:, 1])


def test_validation_accuracy_is_that_of_the_heaviest_mode() -> None:
    count = 20
    truth = torch.tensor([[1.0, 0.0, 40.0, 40.0]]).double().expand(count, 4)
    gaze = torch.stack([truth, truth + torch.tensor([0.0, 0.0, 100.0, 0.0]), truth], 1)
    # Recognition is right in every scene, the odds alone in a quarter of them; the third mode is none.
    features = torch.zeros(count, 3, 3).double()
    features[:, 0, 1], features[:, 1, 1], features[:, 2, :2] = 4.0, -4.0, -math.inf
    features[:, 0, 0] = torch.where(torch.arange(count) < 5, 1.0, -1.0)
    weight = torch.tensor([0.0, 0.0, -math.inf]).double().expand(count, 3)
    figures = fitting.weigh_evidence(GazeGuide(4), [Candidates(gaze, gaze, features, weight, gaze)], [truth])
    assert (figures["validation_accuracy"], figures["validation_accuracy_odds_alone"]) == (1.0, 0.25)


def test_crops_are_jittered_by_as_much_as_labellers_differ() -> None:
    ramp = torch.arange(100.0).expand(100, 100) / 100
    middle = torch.tensor([[1.0, 0.0, 50.0, 50.0]]).double().repeat(400, 1)
    scenes = Scenes.from_pictures([ramp] * 400, gazes=middle)
    crops = crops_of(scenes, middle, torch.Generator().manual_seed(0))
    # The mean of a crop of a ramp says where it is, its slope how large. 2000 draws know an sd to 1.6 %: four of them.
    offset = 100 * (crops[:, 1:].mean((-2, -1)) - crops[:, :1].mean((-2, -1)))
    assert float(offset.std()) == pytest.approx(0.4, rel=0.065)
    slope = (crops[:, 1:, :, -1] - crops[:, 1:, :, 0]).mean(-1) * 100 / 23
    assert float(slope.std()) == pytest.approx(0.02, rel=0.065)


@pytest.mark.parametrize("turn", [0.2, 3.0])
def test_the_priors_rotations_are_wider_than_those_seen_and_within_half_a_turn(turn: float) -> None:
    pyramid = Pyramid.build([torch.zeros(100, 200)])[torch.zeros(2, dtype=torch.int64)]
    truth = gazes.from_parts(torch.rand(2, 2).double(), torch.ones(2).double(), torch.tensor([-turn, turn]).double())
    # The sd of two values ±t is t √2.
    expected = min(1.5 * turn * math.sqrt(2), math.pi)
    assert fitting.gaze_prior_options(pyramid, truth)["rotation_sd"] == pytest.approx(expected)


def test_what_is_chosen_by_the_guides_widths_is_chosen_after_they_are_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenes, guide = soft_scenes(4), GazeGuide(4)
    truth = scenes.gazes
    assert truth is not None
    seen: list[Any] = []

    def as_wide_as_the_guide(model: Any, guide: GazeGuide, pyramid: Pyramid, modes: int) -> Candidates:
        gaze = truth[: len(pyramid), None]
        width = guide.log_sd_offset.exp().double().expand(len(pyramid), 1, 4)
        return Candidates(gaze, width, gaze[..., :3], gaze[..., 0], gaze)

    monkeypatch.setattr(fitting, "search", as_wide_as_the_guide)
    monkeypatch.setattr(fitting, "_calibrate_sds", lambda model, guide, *rest: guide.log_sd_offset.add_(1.0))
    monkeypatch.setattr(fitting, "_choose_variant", lambda model, guide, pyramids, near, *rest: seen.append(near) or {})
    monkeypatch.setattr(fitting, "weigh_evidence", lambda guide, found, truth: {})
    fitting.calibrate(quick_model(), guide, scenes, torch.arange(4), truth)
    torch.testing.assert_close(seen[0][0][1], torch.full((4, 4), math.e).double())


def test_a_feature_that_misleads_weighs_nothing_and_the_constant_lies_between_right_and_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    right = (torch.arange(4) == 0).expand(400, 4)
    features = torch.randn(400, 4, 3, generator=generator).double()
    # The odds tell the right mode, recognition says the contrary, presence says nothing.
    # Wrong modes scatter three times as much as right ones.
    features[..., 0] = torch.where(right, 3 + features[..., 0], 3 * features[..., 0] - 3)
    features[..., 1] += torch.where(right, -6.0, 6.0)
    weights = fitting._evidence_weights(features, right, torch.ones(400, 4, dtype=torch.bool))
    assert float(weights[1]) == 0.0 and float(weights[0]) > 0.0
    score = features @ weights[:3].double()
    weakest, strongest = score[right].quantile(0.1), score[~right].quantile(0.9)
    assert -float(weights[3]) == pytest.approx(float(weakest + strongest) / 2, rel=0.02)
