"""Training of the guide: augmentations that keep pictures and targets consistent, and losses that go down."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.inference import guide_training as training
from foveate.inference.guide import WINDOW, GazeChange, GazeGuide
from foveate.inference.guide_training import GuideData, train_glance, train_looks
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, extract


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawing(size: tuple[int, int], gaze: Tensor, background: Tensor) -> Tensor:
    """A dark face with bright eyes and mouth, drawn where the gaze says, sharper than any patch can see."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    p = gazes.apply(gazes.inverse(gaze), torch.stack([columns, rows], -1))
    face = torch.sigmoid(3 * (11 - torch.sqrt(p[..., 0].square() + (p[..., 1] / 1.2).square())))
    picture = (1 - face) * background + 0.25 * face
    for x, y in ((-5.0, -3.0), (5.0, -3.0), (0.0, 7.0)):
        spot = torch.exp(-((p[..., 0] - x).square() + (p[..., 1] - y).square()) / 5)
        picture = picture + spot * (0.9 - picture)
    return picture.float()


def soft_noise(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    coarse = torch.rand(1, 1, size[0] // 6, size[1] // 6, generator=rng, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0, 0].clamp(0, 1)


def problem(n: int, seed: int = 0, clutter: bool = True) -> GuideData:
    """Scenes of one drawn face each, on soft noise, with its true gaze."""
    rng = generator(seed)
    size = (66, 84)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng, dtype=torch.float64)

    centre = torch.stack([uniform(20, 64), uniform(20, 46)], -1)
    truth = gazes.from_parts(centre, torch.exp(uniform(-0.5, 0.2)), uniform(-0.3, 0.3))
    pictures = [drawing(size, g, soft_noise(size, rng)) for g in truth]
    canonical = torch.stack([extract(p, g) for p, g in zip(pictures, truth.float(), strict=True)])
    others = Pyramid.build([soft_noise(size, rng).float() for _ in range(4)]) if clutter else None
    return GuideData(Pyramid.build(pictures), truth.float(), canonical, others)


# ---- what is learned from


def test_scenes_without_one_gaze_each_are_refused() -> None:
    data = problem(3)
    with pytest.raises(InputError, match=r"3 scenes and gazes of shape \(2, 4\)"):
        GuideData(data.pyramid, data.gaze[:2], data.canonical)


# ---- where the windows are


def test_perturbed_gazes_lie_where_they_are_said_to_lie() -> None:
    truth = training.random_gazes(torch.tensor([300, 400]).expand(4000, 2), generator(1))
    local = gazes.parts(gazes.compose(gazes.inverse(truth), training._perturbed(truth, generator(2))))
    offset, ratio, angle = local.centre.abs().amax(-1) / 24, local.scale, local.rotation.abs()
    assert float(offset.max()) <= 1 and float(angle.max()) <= math.radians(35)
    assert 0.5 <= float(ratio.min()) and float(ratio.max()) <= 1.9
    near = (offset <= 0.3) & (ratio.log().abs() <= 0.22) & (angle <= math.radians(12.1))
    # 35 % and, of the rest, the hundredth that falls there by chance; 4000 draws have a sd of 0.008.
    assert float(near.double().mean()) == pytest.approx(0.36, abs=0.03)


def test_random_gazes_are_on_their_pictures_at_the_sizes_they_promise() -> None:
    size = torch.tensor([[40, 90], [200, 120]]).repeat(500, 1)
    found = training.random_gazes(size, generator())
    centre, scale, rotation = gazes.parts(found)
    assert (centre >= 0).all() and (centre <= size.flip(-1) - 1).all()
    share = 24 * scale / size.amin(-1)
    assert 0.08 <= float(share.min()) < 0.1 and 0.7 < float(share.max()) <= 0.8
    assert float(rotation.abs().max()) <= math.radians(20.1)


def test_the_canonical_image_is_the_mean_or_one_of_the_same_person() -> None:
    data = problem(6)
    # Canonical images that say whose they are.
    person = torch.tensor([0, 0, 1, 1, 2, 2])
    labels = torch.arange(6.0)[:, None, None].expand(6, 24, 24)
    labelled = GuideData(data.pyramid, data.gaze, labels, person=person)
    scene = torch.arange(6).repeat(200)
    images = training._canonical_images(labelled, scene, torch.full((24, 24), -1.0), generator())[:, 0, 0]
    mean = images == -1
    own = images == scene
    assert float(mean.float().mean()) == pytest.approx(0.4, abs=0.06)  # sd 0.014
    assert float(own.float().mean()) == pytest.approx(0.3 + 0.3 / 2, abs=0.06)  # one of two pictures each
    assert (person[images[~mean].long()] == person[scene[~mean]]).all()
    anybody = GuideData(data.pyramid, data.gaze, labels)
    images = training._canonical_images(anybody, scene, torch.full((24, 24), -1.0), generator())[:, 0, 0]
    assert len(set(images.tolist())) == 7


def test_missed_windows_miss() -> None:
    data = problem(4, clutter=False)
    marked = GuideData(
        Pyramid.build([drawing((66, 84), g.double(), torch.ones(66, 84).double()) for g in data.gaze]),
        data.gaze,
        data.canonical,
    )
    missed = training._missed_windows(marked, 10, generator())
    assert missed.shape == (10, WINDOW, WINDOW)
    # In the middle third of a window that misses there is no more of the dark face than the least overlap allows.
    dark = (missed[:, 16:32, 16:32] < 0.6).float().mean((1, 2))
    assert float(dark.median()) < 0.1


# ---- learning


def trace_of(train, guide: GazeGuide, data: GuideData, **options) -> list[float]:
    losses: list[float] = []
    steps = options["steps"]

    def progress(step: int, of: int, loss: float) -> None:
        assert step == len(losses) and of == steps
        losses.append(loss)

    last = train(guide, data, progress=progress, **options)
    assert len(losses) == steps
    tail = losses[-max(1, steps // 10) :]
    assert last == pytest.approx(sum(tail) / len(tail))
    return losses


def test_the_glance_and_then_the_looks_learn_a_drawn_face() -> None:
    torch.manual_seed(0)
    guide = GazeGuide(8)
    data = problem(40)
    glances = trace_of(train_glance, guide, data, steps=60, batch=16)
    assert sum(glances[-10:]) < 0.6 * sum(glances[:10])
    assert not guide.training or not guide.glance.training
    looks = trace_of(train_looks, guide, data, steps=90, batch=24)
    assert sum(looks[-10:]) < 0.7 * sum(looks[:10])
    assert not guide.training
    # Scenes that it has never seen: gazes off by 0.6 patches find back.
    fresh = problem(16, seed=9)
    start = gazes.compose(fresh.gaze, torch.tensor([1.1, 0.1, 9.0, -11.0]))
    scene, canonical = torch.arange(16), data.canonical.mean(0).expand(16, -1, -1)
    at = start
    with torch.no_grad():
        for _ in range(3):
            at, _ = guide.step(fresh.pyramid, at, canonical, scene)
    before, after = gazes.overlap(start, fresh.gaze), gazes.overlap(at, fresh.gaze)
    assert float(after.mean()) > float(before.mean()) + 0.1


@pytest.mark.parametrize("clutter", [True, False])
def test_a_seed_says_everything(clutter: bool) -> None:
    data = problem(5, clutter=clutter)
    torch.manual_seed(0)
    first = GazeGuide(4)
    second = GazeGuide(4)
    second.load_state_dict(first.state_dict())
    for guide, elsewhere in ((first, 1), (second, 2)):
        torch.manual_seed(elsewhere)
        train_glance(guide, data, steps=2, batch=6, seed=3)
        train_looks(guide, data, steps=3, batch=9, seed=3)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_on_policy_looks_move_on_to_other_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(30)
    seen: list[Tensor] = []
    step = GazeGuide.step

    def watched(self, pyramid, gaze, canonical, scene):
        if pyramid is data.pyramid:
            seen.append(scene.clone())
        return step(self, pyramid, gaze, canonical, scene)

    monkeypatch.setattr(GazeGuide, "step", watched)
    train_looks(GazeGuide(4), data, steps=12, batch=12)
    assert all(len(scenes) == 4 for scenes in seen)
    # Each step 30 % and more of the looks end; after 12 of them none of four is likely to be on its first scene.
    assert len(set(torch.cat(seen).tolist())) > 8
    assert any(torch.equal(a[k], b[k]) for a, b in pairwise(seen) for k in range(4))


@pytest.mark.parametrize("clutter", [True, False])
def test_distractors_do_not_see_the_object_wherever_the_looks_lead(clutter: bool) -> None:
    data = problem(6, clutter=clutter)
    guide = GazeGuide(4).eval()
    distractors = training._Distractors.found(guide, data)
    labelled = distractors.scene < 6
    assert clutter == bool((~labelled).any()) and labelled.any()
    for _ in range(3):
        windows, rows = distractors.windows(10, generator())
        assert windows.shape == (len(rows), WINDOW, WINDOW) and len(set(rows.tolist())) == len(rows)
        distractors.move(guide, rows, data.canonical.mean(0), generator())
        sees = gazes.overlap(distractors.now[labelled], data.gaze[distractors.scene[labelled]].double())
        assert float(sees.max()) <= 0.05


def test_looks_leave_the_glance_as_they_found_it() -> None:
    guide = GazeGuide(4)
    before = {name: tensor.clone() for name, tensor in guide.glance.state_dict().items()}
    train_looks(guide, problem(4), steps=2, batch=6)
    for name, tensor in guide.glance.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)


def test_training_keeps_its_precision_whatever_the_default() -> None:
    data = problem(5)
    guide = GazeGuide(4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert math.isfinite(train_glance(guide, data, steps=2, batch=6))
        assert math.isfinite(train_looks(guide, data, steps=2, batch=9))
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in guide.parameters()} == {torch.float32}


def test_presence_is_taught_where_the_object_is() -> None:
    """The last two of six windows show nothing."""

    def loss(logit: Tensor) -> float:
        change = GazeChange(torch.zeros(6, 4), torch.zeros(6, 4), logit, logit)
        return float(training._look_loss(change, torch.zeros(4, 4), 4))

    right = torch.tensor([9.0] * 4 + [-9.0] * 2)
    assert loss(right) < 0.01 < loss(-right)


def test_sds_are_taught_as_those_of_a_normal_law() -> None:
    """Where every residual is one sd the negative log-likelihood has no slope in it."""
    log_sd = torch.full((8, 4), 0.3, requires_grad=True)
    target = torch.full((8, 4), 0.5)
    change = GazeChange(target - math.exp(0.3), log_sd, torch.zeros(8), torch.zeros(8))
    training._look_loss(change, target, 8).backward()
    assert log_sd.grad is not None
    torch.testing.assert_close(log_sd.grad, torch.zeros(8, 4), rtol=0, atol=1e-6)  # float32


@pytest.mark.parametrize("clutter", [True, False])
def test_a_quarter_of_the_views_is_clutter_and_taught_as_such(monkeypatch: pytest.MonkeyPatch, clutter: bool) -> None:
    seen: list[Tensor] = []
    proper = training.glance_loss

    def watched(output: Tensor, target: Tensor, present: Tensor) -> Tensor:
        seen.append(present.clone())
        return proper(output, target, present)

    monkeypatch.setattr(training, "glance_loss", watched)
    train_glance(GazeGuide(4), problem(4, clutter=clutter), steps=1, batch=8)
    assert seen[0].tolist() == ([0.0] * 2 + [1.0] * 6 if clutter else [1.0] * 8)


def test_windows_without_the_object_are_clutter(monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(clutter: Pyramid, n: int, size: int, extent: float, rng: torch.Generator) -> Tensor:
        return torch.full((n, size, size), 7.0)

    def unchanged(window: Tensor, *rest: Any) -> Tensor:
        return window

    seen: list[Tensor] = []
    proper = GazeGuide.forward

    def watched(self: GazeGuide, window: Tensor, canonical: Tensor) -> GazeChange:
        seen.append(window)
        return proper(self, window, canonical)

    monkeypatch.setattr(training, "_clutter_windows", marked)
    for change in ("on_other_background", "_unseen", "relit"):
        monkeypatch.setattr(training, change, unchanged)
    monkeypatch.setattr(GazeGuide, "forward", watched)
    train_looks(GazeGuide(4), problem(4), steps=1, batch=12)
    batch = next(window for window in seen if len(window) > 12)
    # Twelve windows of the scenes, a sixth as many of clutter, then those where the glance looks in vain.
    assert (batch == 7.0).all(-1).all(-1).tolist() == [False] * 12 + [True] * 2 + [False] * (len(batch) - 14)


@pytest.mark.parametrize(("scenes", "share"), [(150, 1.0), (600, 0.25)])
def test_the_fewer_scenes_there_are_the_more_of_their_windows_are_changed(scenes: int, share: float) -> None:
    pyramid = Pyramid.build([torch.zeros(2, 2)])[torch.zeros(scenes, dtype=torch.int64)]
    data = GuideData(pyramid, torch.ones(scenes, 4), torch.zeros(scenes, 24, 24))
    found = data.instead(torch.zeros(4000, 1, 1), torch.ones(4000, 1, 1), generator())
    assert float(found.mean()) == pytest.approx(share, abs=0.028)  # four standard errors of a share of 4000
