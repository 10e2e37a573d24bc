"""The peripheral sweep: where its cells look, what its loss wants, and that proposals lie where the network says."""

import math

import pytest
import torch
from torch import Tensor, nn

from foveate.inference.glance import (
    CELL,
    SCALES,
    VIEW_STEP,
    Glance,
    _local_contrast_fused,
    cell_centres,
    feature_layers,
    glance_loss,
    local_contrast,
    propose,
)
from foveate.model import gaze as gazes
from foveate.model.patch import Pyramid


def transparent(layers: nn.Sequential) -> nn.Sequential:
    """The same layers with weights of one: what comes through says only where it came from."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.ones_(layer.weight)
    return layers.eval()


# ---- geometry


@pytest.mark.parametrize(("rows", "columns"), [(80, 80), (72, 112)])
def test_a_cell_looks_at_the_pixel_that_its_centre_names(rows: int, columns: int) -> None:
    layers = transparent(feature_layers(1))
    cells = cell_centres(rows // CELL, columns // CELL, torch.float32, torch.device("cpu"))
    # Positions of the view's pixels in canonical pixels of the gaze that made the view.
    pixels = gazes.lattice((rows, columns), columns * VIEW_STEP / gazes.CANONICAL_SIZE)
    for row, column in ((9, 9), (8, 10), (10, 8)):
        view = torch.zeros(1, 2, rows, columns)
        view[0, :, CELL * row, CELL * column] = 1
        response = layers(view)[0, 0]
        assert response.shape == (rows // CELL, columns // CELL)
        torch.testing.assert_close(cells[row, column], pixels[CELL * row, CELL * column])
        # What an impulse leaves behind is centred on the cell that looks at it.
        down, across = torch.meshgrid(*(torch.arange(float(n)) for n in response.shape), indexing="ij")
        centre = [float(((response * place).sum() / response.sum()).detach()) for place in (down, across)]
        assert centre == pytest.approx([row, column], abs=1e-4)  # float32 sums


def test_a_cell_sees_three_patches() -> None:
    view = torch.zeros(1, 2, 96, 96, requires_grad=True)
    response = transparent(feature_layers(1))(view + 1)
    (slope,) = torch.autograd.grad(response[0, 0, 12, 12], view)
    seen = slope[0, 0].nonzero()
    assert seen.amin(0).tolist() == [48 - 24, 48 - 24]
    assert seen.amax(0).tolist() == [48 + 24, 48 + 24]


def test_a_view_moved_by_a_cell_is_answered_a_cell_further() -> None:
    glance = Glance(4).eval()
    nn.init.normal_(glance.head.weight)
    wide = torch.rand(1, 164, 164)
    here, there = glance(wide[:, :160, :160]), glance(wide[:, 4:, 4:])
    # Cells 12 … 27 see neither border, nor does the local mean around what they see.
    torch.testing.assert_close(there[..., 12:27, 12:27], here[..., 13:28, 13:28], rtol=0, atol=1e-4)  # float32 sums


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (24, 40)])
def test_a_view_gives_one_answer_for_each_cell(rows: int, columns: int) -> None:
    output = Glance(3)(torch.rand(2, rows, columns))
    assert output.shape == (2, 5, rows // CELL, columns // CELL)


def test_an_untrained_glance_believes_that_objects_are_rare() -> None:
    presence = torch.sigmoid(Glance(4)(torch.rand(4, 64, 64))[:, 0])
    assert 0.005 < float(presence.mean()) < 0.02


# ---- light


def test_local_contrast_is_blind_to_brightness() -> None:
    views = 0.5 * torch.rand(3, 48, 48)
    torch.testing.assert_close(
        local_contrast(views + 0.4), local_contrast(views), rtol=0, atol=1e-4
    )  # float32 variances
    flat = local_contrast(torch.full((1, 48, 48), 0.7))
    torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=1e-4)


def test_local_contrast_is_nearly_blind_to_gain_where_there_is_contrast() -> None:
    views = torch.rand(3, 48, 48).round()
    dim, bright = local_contrast(0.5 * views), local_contrast(views)
    # The floor of 0.05 beside sds of 0.25 and 0.5 leaves 1.5 %; a block in a corner may have half of the contrast.
    assert float((dim - bright).abs().max()) < 0.06 * float(bright.abs().max())


@pytest.mark.parametrize("shape", [(9, 48, 48), (2, 61, 47), (1, 4, 8), (1, 2, 3)])
def test_the_compiled_local_contrast_equals_the_plain_one(shape: tuple[int, int, int]) -> None:
    views = torch.rand(shape, dtype=torch.float64)
    torch.testing.assert_close(_local_contrast_fused(views), local_contrast(views), rtol=0, atol=1e-13)
    single = _local_contrast_fused(views.float())
    assert single.dtype == torch.float32
    # float32: a variance of squares near 1, divided by at least 0.05.
    torch.testing.assert_close(single.double(), local_contrast(views), rtol=0, atol=1e-4)


def test_features_without_gradients_are_those_with_them() -> None:
    glance = Glance(4)
    # Statistics and slopes that are not those of a fresh net.
    for layer in glance.features:
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert values is not None
                values.data += 0.5 * torch.rand(values.shape)
    glance.eval()
    views = torch.rand(5, 52, 64)
    with_gradients = glance.see(views)
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(glance.see(views), with_gradients, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_of_other_precisions_are_seen_without_gradients_too(dtype: torch.dtype) -> None:
    glance, views = Glance(4).eval().to(dtype), torch.rand(2, 48, 48)
    with torch.no_grad(), torch.device("meta"):  # another default device is not where the views are
        found = glance.see(views.to(dtype))
    assert found.dtype == dtype and found.device == views.device
    # bfloat16 has eight bits, and an untrained net's features are below 1.
    wanted = glance.float().see(views)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


# ---- the loss


def wanted_output(target: Tensor, has_object: Tensor, rows: int, columns: int) -> Tensor:
    """The output that says exactly what is the case, written cell by cell."""
    output = torch.zeros(target.shape[0], 5, rows, columns, dtype=torch.float64)
    for n, (a, b, tx, ty) in enumerate(target.tolist()):
        log_scale = 0.5 * math.log(a * a + b * b)
        for i in range(rows):
            for j in range(columns):
                x, y = (4 * j - (4 * columns - 1) / 2) * 1.5, (4 * i - (4 * rows - 1) / 2) * 1.5
                away = ((tx - x) ** 2 + (ty - y) ** 2) / 9 + (log_scale / 0.25) ** 2
                quality = min(max(float(has_object[n]) * math.exp(-away / 2), 1e-12), 1 - 1e-12)
                presence = math.log(quality / (1 - quality))
                change = [(tx - x) / 12, (ty - y) / 12, log_scale, math.atan2(b, a)]
                output[n, :, i, j] = torch.tensor([presence, *change], dtype=torch.float64)
    return output


def some_targets() -> tuple[Tensor, Tensor]:
    centre = torch.tensor([[3.0, -8.0], [20.0, 11.0], [0.0, 0.0]], dtype=torch.float64)
    scale = torch.tensor([1.1, 0.9, 1.0], dtype=torch.float64)
    rotation = torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)
    return gazes.from_parts(centre, scale, rotation), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)


def test_the_loss_is_nothing_at_the_truth_and_has_no_slope_there() -> None:
    target, present = some_targets()
    output = wanted_output(target, present, 16, 16).requires_grad_()
    loss = glance_loss(output, target, present)
    assert float(loss) == pytest.approx(0, abs=1e-9)
    (slope,) = torch.autograd.grad(loss, output)
    assert float(slope.abs().max()) < 1e-9


def test_whatever_else_is_said_costs_something() -> None:
    target, present = some_targets()
    truth = wanted_output(target, present, 16, 16)
    # The cell nearest to the first object.
    row, column = 6, 8
    for channel in range(5):
        for amount in (-0.5, 0.5):
            said = truth.clone()
            said[0, channel, row, column] += amount
            assert float(glance_loss(said, target, present)) > 1e-5


def test_clutter_teaches_absence_and_no_change() -> None:
    target, _ = some_targets()
    output = torch.randn(3, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    loss = glance_loss(output, target, torch.zeros(3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss, output)
    assert (slope[:, 0] > 0).all()
    assert (slope[:, 1:] == 0).all()


# ---- proposals


class BlobGlance(Glance):
    """Stands in for a trained glance: knows a bright blob by its width in view pixels, and points at its middle."""

    def __init__(self, sd: float):
        super().__init__(1)
        self.sd = sd

    def forward(self, views: Tensor) -> Tensor:
        (view,) = views
        rows, columns = view.shape
        weight = (view / view.sum()).double()
        pixels = gazes.lattice((rows, columns), columns * VIEW_STEP / gazes.CANONICAL_SIZE, torch.float64)
        middle = (weight[..., None] * pixels).sum((0, 1))
        width = ((weight[..., None] * (pixels - middle).square()).sum() / 2).sqrt() / VIEW_STEP
        cells = cell_centres(rows // CELL, columns // CELL, torch.float64, view.device)
        away = middle - cells
        output = torch.zeros(1, 5, *away.shape[:2])
        # Presence falls off with distance, and with how far the blob is from its proper width.
        output[0, 0] = 4 - away.norm(dim=-1) / 12 - 20 * (width / self.sd).log().abs()
        output[0, 1:3] = away.permute(2, 0, 1) / 12
        output[0, 3] = (width / self.sd).log()
        output[0, 4] = 0.1
        return output


def blob(height: int, width: int, x: float, y: float, sd: float) -> Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    return torch.exp(-0.5 * (((columns - x) / sd) ** 2 + ((rows - y) / sd) ** 2))


def test_a_planted_response_is_found_where_it_was_planted() -> None:
    truth = [(120, 160, 41.3, 77.9, 6.0), (90, 231, 170.2, 30.4, 5.0), (201, 117, 60.0, 90.0, 13.0)]
    found = propose(BlobGlance(sd=4.0), Pyramid.build([blob(*t) for t in truth]), count=3)
    assert found.gaze.shape == (3, 3, 4) and found.logit.shape == (3, 3)
    for gaze, (_, _, x, y, sd) in zip(found.gaze[:, 0], truth, strict=True):
        centre, scale, rotation = gazes.parts(gaze)
        # The stand-in measures in float32 on an anti-aliased view; the pyramid's blur widens the blob by some percent.
        assert centre.tolist() == pytest.approx([x, y], abs=0.05)
        assert float(scale) * VIEW_STEP * 4.0 == pytest.approx(sd, rel=0.1)
        assert float(rotation) == pytest.approx(0.1, abs=1e-6)


def test_objects_cut_by_the_border_are_proposed_too() -> None:
    found = propose(BlobGlance(sd=4.0), Pyramid.build([blob(100, 140, 1.0, 50.0, 5.0)]), count=1)
    assert abs(float(found.gaze[0, 0, 2])) < 8
    assert float(found.gaze[0, 0, 3]) == pytest.approx(50, abs=0.5)


class NoisyGlance(Glance):
    """Sees something everywhere."""

    def forward(self, views: Tensor) -> Tensor:
        rows, columns = (side // CELL for side in views.shape[1:])
        return 0.3 * torch.randn(1, 5, rows, columns)


def test_proposals_come_best_first_and_keep_their_distance() -> None:
    found = propose(NoisyGlance(1), Pyramid.build([torch.rand(60, 90), torch.rand(90, 60)]), count=12)
    assert (found.logit.diff(dim=1) <= 0).all()
    centre, scale, _ = gazes.parts(found.gaze)
    for c, s in zip(centre, scale, strict=True):
        smaller = torch.minimum(s[:, None], s[None])
        apart = torch.cdist(c, c) >= 0.5 * 24 * smaller * (1 - 1e-5)  # float32 gazes
        octaves = (s[:, None] / s[None]).log().abs() >= 0.35 * (1 - 1e-5)
        assert (apart | octaves | torch.eye(12, dtype=torch.bool)).all()


def test_where_there_is_less_to_see_the_rest_is_marked_as_missing() -> None:
    found = propose(BlobGlance(sd=4.0), Pyramid.build([blob(60, 60, 30, 30, 4)]), count=40, scales=SCALES[:2])
    missing = found.logit.isneginf()
    assert missing.any() and not missing[0, 0]
    assert (missing[0].int().diff() >= 0).all()  # at the end
    assert found.gaze.isfinite().all()


def test_every_scene_is_proposed_for_by_itself() -> None:
    pictures = [blob(60, 80, 20, 30, 4), blob(64, 64, 40, 22, 5)]
    glance = BlobGlance(sd=4.0)
    both = propose(glance, Pyramid.build(pictures), count=4)
    for i, picture in enumerate(pictures):
        torch.testing.assert_close(propose(glance, Pyramid.build([picture]), count=4).gaze[0], both.gaze[i])
