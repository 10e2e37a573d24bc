"""Training of the guide: augmentations that keep pictures and targets consistent, and losses that go down."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from foveate.inference import guide_training as training
from foveate.inference.guide import WINDOW, GazeGuide
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


def test_scenes_are_drawn_with_their_weights() -> None:
    data = problem(3)
    weighted = GuideData(data.pyramid, data.gaze, data.canonical, weight=torch.tensor([0.0, 1.0, 3.0]))
    counts = torch.bincount(weighted.draw(4000, generator()), minlength=3) / 4000
    # A share of 3/4 of 4000 draws has a sd of 0.007.
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.25, 0.75]), rtol=0, atol=0.03)


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
