"""Composed scenes: the object stands where the gaze says, splits share nothing, and a seed repeats."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.data import Scenes, compose_scenes, orl_clutter, orl_faces, orl_scenes, photographs, two_face_scenes
from foveate.data import compose as compose_module
from foveate.data.pictures import PictureInMemory
from foveate.model import gaze
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, extract

# The face without hair and background, which the mask may take away.
POINTS = gaze.lattice()
FACE = (POINTS[..., 0] / 7) ** 2 + ((POINTS[..., 1] + 0.8) / 9.5) ** 2 < 1


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation over the face of patches ``(n, 24, 24)``, a linear ramp of light taken out of both."""
    plane = torch.stack([torch.ones(24, 24), POINTS[..., 0], POINTS[..., 1]], -1)[FACE]
    basis = torch.linalg.qr(plane)[0]
    first, second = (p[:, FACE] - (p[:, FACE] @ basis) @ basis.T for p in (first, second))
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def portraits_shown(scenes: Scenes) -> Tensor:
    """The canonical crop of the portrait behind every composed scene."""
    pastes = [scenes.source(i).pastes[0] for i in range(len(scenes))]  # type: ignore[attr-defined]
    own = torch.tensor([paste.own_gaze for paste in pastes])
    return Pyramid.build([paste.portrait for paste in pastes]).extract(own)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_crop_at_the_true_gaze_is_the_canonical_face(split: str) -> None:
    scenes = orl_scenes(split, 24, seed=5)
    assert scenes.gazes is not None
    canonical, pyramid = portraits_shown(scenes), Pyramid.build(scenes.pictures())
    here = correlation(pyramid.extract(scenes.gazes.float()), canonical)
    # Lighting, blur and noise leave more than 0.9 of all but the darkest: of 400 scenes the 1 % quantile was 0.92.
    assert float((here > 0.9).float().mean()) >= 0.95 and float(here.median()) > 0.97
    beside = scenes.gazes.clone()
    beside[:, 2] += 3 * gaze.parts(beside).scale
    assert float(correlation(pyramid.extract(beside.float()), canonical).median()) < 0.7


def test_without_light_blur_and_noise_the_crop_is_the_canonical_face_itself() -> None:
    faces = orl_faces("test")
    assert faces.gazes is not None
    own = faces.gazes[3]
    at = gaze.from_parts(torch.tensor([[150.0, 120.0]]), torch.tensor([3.1]), torch.tensor([0.3]))
    scene = np.full((240, 300), 0.5, np.float32)
    portrait = faces.pictures([3])[0]
    compose_module._paint(
        np.random.default_rng(0), scene, portrait.numpy(), own.tolist(), at[0].double().tolist(), neck=False
    )
    got = extract([torch.from_numpy(scene)], at)[0]
    want = extract([portrait], own[None].float())[0]
    # The scene is sampled once more than the portrait, a blur of about half a scene pixel: 1 % of the range.
    assert float((got - want)[FACE].abs().mean()) < 0.01


@pytest.mark.parametrize("split", ["train", "test"])
def test_gazes_keep_to_their_ranges_and_inside_the_picture(split: str) -> None:
    scenes = orl_scenes(split, 400)
    assert scenes.gazes is not None and scenes.splits == (split,) * 400
    parts = gaze.parts(scenes.gazes)
    share = 24 * parts.scale / scenes.sizes.amin(-1)
    # Exact up to float64; the extremes of 400 draws come near the ends.
    assert 0.12 <= float(share.min()) < 0.125 and 0.43 < float(share.max()) <= 0.45
    assert math.radians(24) < float(parts.rotation.abs().max()) <= math.radians(25)
    corners = gaze.corners(scenes.gazes)
    assert float(corners.min()) >= -0.5 and bool((corners.amax(1) <= scenes.sizes.flip(-1) - 0.5).all())
    assert {tuple(size) for size in scenes.sizes.tolist()} == set(compose_module.SIZES)
    for i in (0, 1, 2):
        picture = scenes[i].picture
        assert picture.shape == tuple(scenes.sizes[i].tolist()) and 0 <= picture.min() and picture.max() <= 1


def test_train_and_test_share_no_person_and_no_photograph() -> None:
    train, test = orl_scenes("train", 300), orl_scenes("test", 300)
    assert set(train.people or ()) <= {f"orl_{k:02d}" for k in range(1, 31)}
    assert set(test.people or ()) <= {f"orl_{k:02d}" for k in range(31, 41)}
    assert not set(photographs("train")) & set(photographs("test"))
    assert len(photographs("train")) + len(photographs("test")) >= 12
    shown = {id(p) for k in range(300) for p in train.source(k).backgrounds}  # type: ignore[attr-defined]
    assert not shown & {id(p) for p in photographs("test").values()}


@pytest.mark.parametrize("split", ["train", "test"])
def test_whatever_is_composed_of_a_split_stands_before_the_photographs_of_that_split_alone(split: str) -> None:
    own = {id(photograph) for photograph in photographs(split).values()}
    for scenes in (orl_scenes(split, 2), orl_clutter(split, 2), two_face_scenes(2, split).scenes):
        for i in range(2):
            shown = {id(photograph) for photograph in scenes.source(i).backgrounds}  # type: ignore[attr-defined]
            assert shown == own


def test_widths_of_faces_are_log_uniform_and_turns_go_both_ways() -> None:
    scenes = orl_scenes("train", 400)
    parts = gaze.parts(scenes.gazes)
    octaves = (24 * parts.scale / scenes.sizes.amin(-1)).log2()
    low, high = math.log2(0.12), math.log2(0.45)
    # 4 standard errors of the mean of 400 uniform variables, whose sd is the width of their range / √12.
    assert abs(float(octaves.mean()) - (low + high) / 2) < 4 * (high - low) / (12 * 400) ** 0.5
    assert abs(float(parts.rotation.mean())) < 4 * math.radians(50) / (12 * 400) ** 0.5


def test_two_people_have_the_widths_and_turns_that_are_stated() -> None:
    both = two_face_scenes(60, "test", seed=0)
    parts = gaze.parts(both.gazes)
    share = 24 * parts.scale / both.scenes.sizes[:, None, 0]
    # 0.24 to 0.42 of the height, and a tenth more or less by person.
    assert 0.24 * 0.9 <= float(share.min()) and float(share.max()) <= 0.42 * 1.1
    assert float((share[:, 0] / share[:, 1]).log().abs().max()) <= math.log(1.1 / 0.9)
    # Of 120 uniform draws one comes within 10 % of the end: the chance that none does is below 1e-5.
    assert math.radians(13.5) < float(parts.rotation.abs().max()) <= math.radians(15)


def test_a_scene_is_the_same_however_many_are_asked_for() -> None:
    few, many, other = orl_scenes("train", 3, seed=1), orl_scenes("train", 9, seed=1), orl_scenes("train", 3, seed=2)
    assert few.gazes is not None and many.gazes is not None and other.gazes is not None
    for i in range(3):
        assert torch.equal(few[i].picture, many[i].picture) and torch.equal(few.gazes[i], many.gazes[i])
    assert not torch.equal(few.gazes, other.gazes)
    assert not torch.equal(orl_scenes("test", 1)[0].picture, orl_clutter("test", 1)[0].picture)
    assert torch.equal(orl_clutter("test", 1)[0].picture, orl_clutter("test", 2)[0].picture)
    # Clutter of a stream that composes scenes, too, would stand before the very backgrounds of those.
    assert len(set(compose_module.STREAMS.values())) == len(compose_module.STREAMS)


def test_clutter_has_no_gaze_and_nobody_in_it() -> None:
    clutter = orl_clutter("train", 5)
    assert clutter.gazes is None and clutter.people is None and clutter.splits == ("train",) * 5
    assert all(clutter.source(i).pastes == () for i in range(5))  # type: ignore[attr-defined]


def test_any_labelled_object_can_be_composed() -> None:
    disc = torch.zeros(40, 40)
    disc[10:30, 10:30] = 1
    objects = Scenes.from_pictures([disc], gazes=torch.tensor([[1.0, 0, 19.5, 19.5]]))
    scenes = compose_scenes(objects, list(photographs("train").values()), 4, sizes=((100, 120),), width=(0.3, 0.5))
    assert scenes.gazes is not None and scenes[3].picture.shape == (100, 120) and scenes.people is None
    with pytest.raises(InputError, match="does not fit"):
        compose_scenes(objects, list(photographs("train").values()), 4, width=(0.3, 0.9))
    with pytest.raises(InputError, match="needs a gaze"):
        compose_scenes(Scenes.from_pictures([disc]), list(photographs("train").values()), 4)
    with pytest.raises(InputError, match="at least one photograph"):
        compose_scenes(objects, [], 4)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(InputError, match="unknown split 'dev'"):
        orl_scenes("dev", 3)
    with pytest.raises(InputError, match="ask for at least one"):
        orl_scenes("train", 0)
    with pytest.raises(InputError, match="seed -1"):
        orl_scenes("train", 3, seed=-1)
    for make in (orl_scenes, orl_clutter):
        with pytest.raises(InputError, match=r"size \(100, 23\): .*at least 24"):
            make("train", 3, sizes=[(100, 23)])
        with pytest.raises(InputError, match="at least one size"):
            make("train", 3, sizes=[])
    objects, photograph = orl_faces("train")[:3], np.full((60, 60), 90, np.uint8)
    with pytest.raises(InputError, match=r"photograph 1 is of float64"):
        compose_scenes(objects, [photograph, photograph / 255], 2)
    with pytest.raises(InputError, match=r"shape \(60, 60, 3\)"):
        compose_scenes(objects, [np.stack([photograph] * 3, -1)], 2)
    with pytest.raises(InputError, match=r"width=\(0.0, 0.2\)"):
        compose_scenes(objects, [photograph], 2, width=(0.0, 0.2))


def test_two_orl_faces_stand_side_by_side() -> None:
    both = two_face_scenes(4, "test", seed=2)
    assert len(both) == 4 and both.gazes.shape == (4, 2, 4) and both.other_crops.shape == (4, 2, 24, 24)
    assert float(gaze.overlap(both.gazes[:, 0], both.gazes[:, 1]).max()) == 0
    assert bool((both.gazes[:, 0, 2] < both.gazes[:, 1, 2]).all())
    unseen = {f"orl_{k:02d}" for k in range(31, 41)}
    assert all(left != right and {left, right} <= unseen for left, right in both.people)
    for i in range(4):
        pastes = both.scenes.source(i).pastes  # type: ignore[attr-defined]
        shown = Pyramid.build([p.portrait for p in pastes]).extract(torch.tensor([p.own_gaze for p in pastes]))
        # The person's other picture is not the one that is shown, and the crop in the scene is the one that is.
        assert float((shown - both.other_crops[i]).abs().amax((1, 2)).min()) > 0.05
        assert float(correlation(both.own_crops[i], shown).min()) > 0.8
    again = two_face_scenes(3, "test", seed=2)
    assert torch.equal(again.gazes, both.gazes[:3]) and torch.equal(again.scenes[2].picture, both.scenes[2].picture)


def labelled(shapes: list[tuple[int, int]], people: list[str]) -> Scenes:
    """Noise pictures, each with the gaze of a patch near the middle of its lower half."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(shape, generator=generator) for shape in shapes]
    gazes = torch.tensor([[1.1, 0.1, w / 2, 0.6 * h] for h, w in shapes])
    return Scenes.from_pictures(pictures, gazes=gazes, people=people)


def test_joined_scenes_keep_their_gazes_whatever_their_sizes() -> None:
    source = labelled([(90, 100), (120, 80), (64, 70), (100, 100)], ["a", "b", "a", "b"])
    assert source.gazes is not None
    joined = two_face_scenes(10, seed=1, source=source)
    crops = Pyramid.build(source.pictures()).extract(source.gazes.float())
    for own, other, people in zip(joined.own_crops, joined.other_crops, joined.people, strict=True):
        for k in range(2):
            of_person = [i for i, person in enumerate(source.people or ()) if person == people[k]]
            # 1e-5: the same pixels under a gaze moved by whole pixels, in float32.
            shown = [i for i in of_person if torch.allclose(crops[i], own[k], atol=1e-5)]
            given = [i for i in of_person if torch.allclose(crops[i], other[k], atol=1e-5)]
            assert len(shown) == len(given) == 1 and shown != given
    mixed = compose_module.JoinedPicture(
        (PictureInMemory(np.full((30, 30), 255, np.uint8)), PictureInMemory(np.ones((30, 40), np.float32))), (0, 0), 30
    )
    assert mixed.size == (30, 70) and np.all(mixed.read() == 1)


def test_joining_needs_two_people_with_two_scenes_each() -> None:
    with pytest.raises(InputError, match="there are 1"):
        two_face_scenes(2, source=labelled([(50, 50)] * 3, ["a", "a", "b"]))
    bare = Scenes.from_pictures([torch.rand(50, 50)] * 4)
    with pytest.raises(InputError, match="the gaze and the person of every scene"):
        two_face_scenes(2, source=bare)
