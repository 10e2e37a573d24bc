"""The guide: its changes of gaze mean what they say, follow the scene, and depend on whom they are looking for."""

import math

import pytest
import torch
from torch import Tensor, nn

from foveate.inference.glance import cell_centres
from foveate.inference.guide import CHANGE_SCALES, WINDOW, WINDOW_EXTENT, GazeGuide, change_chart
from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid


def outspoken_guide(width: int = 6) -> GazeGuide:
    """An untrained guide whose last layers are not small: every input matters to every output."""
    guide = GazeGuide(width).eval()
    for module in (guide.votes[-1], guide.canonical[-1]):
        nn.init.normal_(module.weight, std=0.3)  # pyright: ignore[reportArgumentType]
    return guide


def gaze_at(x: float, y: float, scale: float = 1.0, rotation: float = 0.0) -> Tensor:
    return gazes.from_parts(torch.tensor([x, y]).double(), torch.tensor(scale).double(), torch.tensor(rotation))


class Says(nn.Module):
    """Stands in for the last layers: gives the votes it was given."""

    def __init__(self, votes: Tensor):
        super().__init__()
        self.given = votes

    def forward(self, features: Tensor) -> Tensor:
        return self.given.expand(features.shape[0], -1, -1, -1)


# ---- what a change means


def test_a_unit_of_change_is_half_a_patch_a_factor_e_and_a_radian() -> None:
    chart = change_chart(gaze_at(50, 60, 2.0, 0.3))
    right, down, larger, turned = chart.to_gaze(torch.eye(4).double())
    along = 12 * 2 * torch.tensor([math.cos(0.3), math.sin(0.3)]).double()
    torch.testing.assert_close(right[2:] - torch.tensor([50.0, 60.0]).double(), along, rtol=0, atol=1e-6)
    torch.testing.assert_close(down[2:] - torch.tensor([50.0, 60.0]).double(), along.flip(0) * torch.tensor([-1, 1]))
    assert float(gazes.parts(larger).scale) == pytest.approx(2 * math.e, rel=1e-6)
    assert float(gazes.parts(turned).rotation) == pytest.approx(1.3, abs=1e-6)


def test_the_answer_has_a_mean_sds_and_a_presence_for_every_window() -> None:
    change = GazeGuide(4).eval()(torch.rand(5, WINDOW, WINDOW), torch.rand(5, 24, 24))
    assert (change.mean.shape, change.log_sd.shape, change.presence.shape) == ((5, 4), (5, 4), (5,))
    distribution = change.distribution()
    assert distribution.event_shape == (4,) and distribution.batch_shape == (5,)
    torch.testing.assert_close(distribution.mean, change.mean)
    torch.testing.assert_close(distribution.stddev, change.log_sd.exp())


def test_a_vote_is_counted_from_the_cell_that_casts_it() -> None:
    guide = GazeGuide(4).eval()
    cells = cell_centres(12, 12, torch.float32, torch.device("cpu"))
    for row, column in ((5, 6), (0, 11), (9, 2)):
        votes = torch.zeros(1, 10, 12, 12)
        votes[0, 4, row, column] = 50  # only this one counts
        votes[0, :4, row, column] = torch.tensor([0.5, -0.25, 0.1, -0.2])
        guide.votes = Says(votes)  # pyright: ignore[reportAttributeAccessIssue]
        mean = guide(torch.rand(1, WINDOW, WINDOW), torch.rand(1, 24, 24)).mean[0]
        wanted = [*(cells[row, column] / 12 + torch.tensor([0.5, -0.25])).tolist(), 0.1, -0.2]
        assert mean.tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_guide_pointing_at_a_cell_steps_to_what_that_cell_sees() -> None:
    guide = GazeGuide(4).eval()
    votes = torch.zeros(1, 10, 12, 12)
    votes[0, 4, 3, 8] = 50
    guide.votes = Says(votes)  # pyright: ignore[reportAttributeAccessIssue]
    pyramid = Pyramid.build([torch.rand(80, 90)])
    start = gaze_at(40, 45, 0.7, 0.5)[None]
    moved, _ = guide.step(pyramid, start, torch.rand(1, 24, 24), torch.tensor([0]))
    # Cell (3, 8) looks at pixel (12, 32) of the window.
    seen = gazes.apply(start[0], gazes.lattice(WINDOW, WINDOW_EXTENT, torch.float64)[12, 32])
    torch.testing.assert_close(moved[0, 2:], seen, rtol=0, atol=1e-4)  # float32 votes of 20 px
    torch.testing.assert_close(gazes.parts(moved).scale, gazes.parts(start).scale)
    assert moved.dtype == torch.float64


def test_a_step_is_two_patches_and_a_factor_e_at_most() -> None:
    guide = GazeGuide(4).eval()
    guide.votes = Says(torch.full((1, 10, 12, 12), 100.0))  # pyright: ignore[reportAttributeAccessIssue]
    pyramid = Pyramid.build([torch.rand(80, 90)])
    start = gaze_at(40, 45, 0.5)[None]
    moved, change = guide.step(pyramid, start, torch.rand(1, 24, 24), torch.tensor([0]))
    local = gazes.parts(gazes.compose(gazes.inverse(start), moved))
    assert local.centre[0].tolist() == pytest.approx([48, 48])
    assert float(local.scale) == pytest.approx(math.e)
    assert float(local.rotation) == pytest.approx(1.0)
    assert (change.log_sd == 2).all()  # whatever is said, the sds stay within e^-6 … e^2


def test_recalibration_shifts_the_sds_and_travels_with_the_state() -> None:
    guide = outspoken_guide()
    windows, canonical = torch.rand(2, WINDOW, WINDOW), torch.rand(2, 24, 24)
    before = guide(windows, canonical).log_sd
    guide.log_sd_offset += torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(guide(windows, canonical).log_sd - before, guide.log_sd_offset.expand(2, 4))
    again = GazeGuide(**guide.config).eval()
    again.load_state_dict(guide.state_dict())
    torch.testing.assert_close(again(windows, canonical).log_sd, guide(windows, canonical).log_sd)


# ---- what it depends on


def test_looks_turn_with_the_scene() -> None:
    """A picture turned by a quarter under gazes turned by a quarter gives the same windows and the same changes."""
    guide = outspoken_guide()
    picture = torch.rand(70, 90, dtype=torch.float64)
    at = torch.stack([gaze_at(40, 30, 0.8, 0.4), gaze_at(70, 60, 1.7, -1.0), gaze_at(2, 3, 1.0, 2.0)])
    # The picture's top right corner becomes the top left: (x, y) goes to (y, 89 - x).
    quarter = torch.tensor([0.0, -1.0, 0.0, 89.0], dtype=torch.float64)
    canonical, scene = torch.rand(3, 24, 24), torch.zeros(3, dtype=torch.long)
    here = guide.look(Pyramid.build([picture]), at, canonical, scene)
    there = guide.look(Pyramid.build([picture.rot90()]), gazes.compose(quarter, at), canonical, scene)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # float32 network


def test_looks_are_the_same_at_any_size_of_the_scene() -> None:
    guide = outspoken_guide()
    x, y = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")
    small = 0.5 + 0.4 * torch.sin(0.11 * x) * torch.cos(0.07 * y)
    large = 0.5 + 0.4 * torch.sin(0.11 * (x / 2)) * torch.cos(0.07 * (y / 2))
    canonical, scene = torch.rand(1, 24, 24), torch.tensor([0])
    here = guide.look(Pyramid.build([small]), gaze_at(14, 15, 0.3, 0.2)[None], canonical, scene)
    there = guide.look(Pyramid.build([large]), gaze_at(28, 30, 0.6, 0.2)[None], canonical, scene)
    # Waves of 57 px and more, read between pixels: linear interpolation errs by (0.11)²/8 of 0.4, 6e-4.
    torch.testing.assert_close(here.mean, there.mean, rtol=0, atol=0.02)


def test_brightness_of_scene_and_canonical_image_changes_nothing() -> None:
    guide = outspoken_guide()
    windows, canonical = 0.6 * torch.rand(3, WINDOW, WINDOW), 0.6 * torch.rand(3, 24, 24)
    for a, b in zip(guide(windows, canonical), guide(windows + 0.3, canonical + 0.2), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # float32 variances in the local contrast


def test_whom_it_is_looking_for_matters() -> None:
    guide = outspoken_guide()
    windows = torch.rand(1, WINDOW, WINDOW).expand(2, -1, -1)
    change = guide(windows, torch.rand(2, 24, 24))
    assert float((change.mean[0] - change.mean[1]).abs().max()) > 1e-3
    change.mean.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in guide.canonical.parameters())


def test_a_window_is_judged_by_itself() -> None:
    guide = outspoken_guide()
    windows, canonical = torch.rand(4, WINDOW, WINDOW), torch.rand(4, 24, 24)
    together = guide(windows, canonical)
    alone = guide(windows[2:3], canonical[2:3])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[2:3], b, rtol=0, atol=1e-5)  # float32, other order of sums


def test_a_row_looks_at_the_scene_that_it_names() -> None:
    guide = outspoken_guide()
    pyramid = Pyramid.build([torch.rand(50, 60), torch.rand(70, 40)])
    at, canonical = torch.stack([gaze_at(20, 20), gaze_at(25, 22)]), torch.rand(2, 24, 24)
    crossed = guide.look(pyramid, at, canonical, torch.tensor([1, 0]))
    alone = guide.look(pyramid[1], at[:1], canonical[:1], torch.tensor([0]))
    torch.testing.assert_close(crossed.mean[:1], alone.mean, rtol=0, atol=1e-5)


def test_the_window_is_three_patches_at_two_thirds_of_the_resolution() -> None:
    points = gazes.lattice(WINDOW, WINDOW_EXTENT)
    torch.testing.assert_close(points[0, 1] - points[0, 0], torch.tensor([1.5, 0.0]))
    assert CHANGE_SCALES[0] == gazes.CANONICAL_SIZE / 2


def test_an_object_is_recognised_by_the_glances_best_cell_on_the_patch_and_in_the_mirror() -> None:
    guide = GazeGuide(4).eval()
    torch.nn.init.normal_(guide.glance.head.weight)
    pyramid = Pyramid.build([torch.rand(60, 80, dtype=torch.float64)])
    gaze = gazes.from_parts(torch.tensor([[40.0, 30.0]]), torch.tensor([0.7]), torch.tensor([0.2])).double()
    window = pyramid.extract(gaze[None], WINDOW, WINDOW_EXTENT)[0].float()
    cells = cell_centres(12, 12, torch.float64, torch.device("cpu"))
    on_patch = cells.abs().amax(-1) < 13
    assert int(on_patch.sum()) == 25
    with torch.no_grad():
        best = [guide.glance(seen)[0, 0][on_patch].max() for seen in (window, window.flip(-1))]
    found = guide.recognise(pyramid, gaze, torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(found[0], (best[0] + best[1]) / 2, rtol=0, atol=1e-6)  # one sum of float32
    # A look has seen half of that already.
    look = guide.look(pyramid, gaze, torch.rand(1, 24, 24), torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(look.recognition[0], best[0], rtol=0, atol=1e-6)
    spared = guide.recognise(pyramid, gaze, torch.zeros(1, dtype=torch.long), look.recognition)
    torch.testing.assert_close(spared, found, rtol=0, atol=1e-6)


def test_an_object_and_its_mirror_image_are_recognised_alike() -> None:
    guide = GazeGuide(4).eval()
    torch.nn.init.normal_(guide.glance.head.weight)
    picture = torch.rand(60, 80, dtype=torch.float64)
    gaze = gazes.from_parts(
        torch.tensor([[40.0, 30.0], [20.0, 25.0]]), torch.tensor([0.7, 1.0]), torch.tensor([0.2, 0.0])
    )
    mirror = gaze * torch.tensor([1.0, -1.0, -1.0, 1.0]) + torch.tensor([0.0, 0.0, 79.0, 0.0])
    scene = torch.zeros(2, dtype=torch.long)
    here = guide.recognise(Pyramid.build([picture]), gaze.double(), scene)
    there = guide.recognise(Pyramid.build([picture.flip(1)]), mirror.double(), scene)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)  # float32 sums over mirrored windows
    assert not torch.equal(here[0], here[1])
