"""Coverage, the factor that mends it, and reliability: held against laws that are known."""

import math

import pytest
import torch

from foveate.inference import calibration
from foveate.inference.calibration import coverage_factor, reach, reliability
from foveate.inference.guide import GazeGuide
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer
from foveate.model.density import EllipticalDensity
from foveate.model.rbm import BernoulliRBM


def _gazes_about(base: torch.Tensor, sd: torch.Tensor, *shape: int) -> torch.Tensor:
    """Gaussian draws in the chart of each base, ``(scene, *shape, 4)``."""
    z = sd * torch.randn(len(base), *shape, 4, dtype=torch.float64)
    return gazes.LocalChart(base.reshape(-1, *[1] * len(shape), 4)).to_gaze(z)


@pytest.fixture
def base() -> torch.Tensor:
    n = 500
    centre = 200 * torch.rand(n, 2, dtype=torch.float64)
    scale, rotation = torch.exp(torch.randn(n).double()), 0.3 * torch.randn(n).double()
    return gazes.from_parts(centre, scale, rotation)


# Chart units: canonical pixels, eighths of log-scale and of a radian.
SD = torch.tensor([0.5, 0.3, 0.2, 0.4], dtype=torch.float64)


def test_the_region_covers_as_many_truths_as_its_level_says_where_truths_follow_the_draws(base: torch.Tensor) -> None:
    draws, truth = _gazes_about(base, SD, 2, 150), _gazes_about(base, SD)
    for level in (0.5, 0.9):
        covered = (reach(draws, truth, level) <= 1).double().mean()
        # 4 binomial standard errors, and the hundredth by which a quantile of 300 draws is too small.
        assert float(covered) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / len(base)) + 0.01)


def test_the_reach_is_the_same_wherever_and_however_large_the_object_stands(base: torch.Tensor) -> None:
    draws, truth = _gazes_about(base[:5], SD, 2, 40), _gazes_about(base[:5], SD)
    moved = gazes.from_parts(
        torch.tensor([300.0, -20.0]).double(), torch.tensor(7.0).double(), torch.tensor(1.0).double()
    )
    again = reach(gazes.compose(moved, draws), gazes.compose(moved, truth))
    # Rounding in float64, enlarged by taking 300 pixels off coordinates that matter to a hundredth.
    torch.testing.assert_close(again, reach(draws, truth), rtol=1e-8, atol=1e-8)


def test_draws_half_as_wide_as_the_truth_need_a_factor_of_two(base: torch.Tensor) -> None:
    draws, truth = _gazes_about(base, 0.5 * SD, 2, 150), _gazes_about(base, SD)
    reached = reach(draws, truth)
    # A 90 % quantile of 500 chi variables of 4 degrees has a standard error of 2 %: 4 of them.
    assert coverage_factor(reached) == pytest.approx(2.0, rel=0.08)
    assert float((reached <= 1).double().mean()) < 0.5


def test_the_factor_is_the_conformal_quantile() -> None:
    reached = torch.arange(1.0, 20.0).flip(0)
    assert coverage_factor(reached) == 18.0  # number ⌈20 · 0.9⌉ of 19
    assert coverage_factor(reached[:5]) == 19.0  # number ⌈6 · 0.9⌉ is beyond five: the largest


def test_without_any_scene_the_factor_is_one() -> None:
    assert coverage_factor(torch.ones(0)) == 1.0


def test_a_scene_out_of_any_reach_is_farther_off_than_all_others_and_the_factor_is_finite() -> None:
    reached = torch.cat([torch.arange(1.0, 19.0), torch.tensor([math.inf])])
    assert coverage_factor(reached) == 18.0  # number ⌈20 · 0.9⌉ of 19, the nineteenth being out of reach
    assert coverage_factor(torch.tensor([2.0, math.inf, math.nan])) == 2.0
    assert coverage_factor(torch.tensor([math.inf])) == 1.0


def test_objects_that_were_missed_do_not_widen_the_region(monkeypatch: pytest.MonkeyPatch, base: torch.Tensor) -> None:
    """Draws half as wide as they should be, and in a tenth of the scenes half a patch off: an overlap of about 0.3."""
    base = base[:400]
    draws, truth = _gazes_about(base, 0.5 * SD, 2, 150), _gazes_about(base, SD)
    draws[::10, ..., 2] += 13 * torch.hypot(base[::10, 0], base[::10, 1])[:, None, None]
    missed = gazes.overlap(draws[::10].mean((1, 2)), truth[::10])
    assert 0.1 < float(missed.min()) and float(missed.max()) < 0.5

    class Found:
        def __init__(self, gaze: torch.Tensor):
            self.gaze, self.mean_gaze = gaze, gaze.mean((1, 2))

    class Pictures:
        def pictures(self, rows: list[int]) -> list[int]:
            return rows

    monkeypatch.setattr(calibration, "attend", lambda model, guide, rows, **_: Found(draws[rows]))
    blank = EllipticalDensity.blank(575)
    model = AttentionModel(DeepBeliefNet(DiagonalLayer(2), BernoulliRBM(2, 2), blank), None)
    parts = [(model, torch.arange(150)), (model, torch.arange(150, 400))]
    factor = calibration.calibrated_factor(parts, GazeGuide(4), Pictures(), truth)
    assert factor == pytest.approx(2.0, rel=0.1)  # 4 standard errors of a quantile of 360 chi variables


def test_found_is_an_iou_above_a_half_in_the_rows_that_were_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Squares of 24 pixels that are 6 and 10 apart share 18 of 30 and 14 of 34 pixels of width: IoUs of 0.6 and 0.41.
    truth = torch.tensor([[1.0, 0.0, x, 20.0] for x in (900.0, 30.0, 80.0, 50.0)]).double()
    off = {1: 6.0, 3: 6.0, 2: 10.0}

    class Found:
        def __init__(self, rows: list[int]):
            self.mean_gaze = truth[rows] + torch.tensor([[0.0, 0.0, off[k], 0.0] for k in rows]).double()
            self.gaze = self.mean_gaze[:, None, None]

    class Pictures:
        def pictures(self, rows: list[int]) -> list[int]:
            return rows

    def attended(model: AttentionModel, guide: GazeGuide, rows: list[int], *, seed: int, **_: int) -> Found:
        assert seed == 11
        return Found(rows)

    monkeypatch.setattr(calibration, "attend", attended)
    monkeypatch.setattr(calibration, "reach", lambda draws, truth: 0.1 * truth[:, 2])
    model = AttentionModel(DeepBeliefNet(DiagonalLayer(2), BernoulliRBM(2, 2), EllipticalDensity.blank(575)), None)
    # Reaches of 5, 3 and, not found, 8: of two the factor is the larger one.
    found = calibration.calibrated_factor([(model, torch.tensor([3, 1, 2]))], GazeGuide(4), Pictures(), truth, seed=11)
    assert found == pytest.approx(5.0)


def test_chains_that_never_moved_cover_nothing_but_themselves() -> None:
    draws = torch.tensor([1.0, 0.0, 20.0, 20.0]).double().expand(2, 2, 30, 4).clone()
    truth = torch.tensor([[1.0, 0.0, 21.0, 20.0], [1.1, 0.0, 20.0, 20.0]]).double()
    assert not bool((reach(draws, truth) <= 1).any())


def test_reliability_bins_by_what_was_stated() -> None:
    stated = torch.tensor([0.05, 0.05, 0.95, 1.0, 0.52])
    happened = torch.tensor([False, True, True, True, False])
    found = reliability(stated, happened)
    assert found.count.tolist() == [2, 1, 2]
    # Sums of a few numbers that float32 has rounded.
    torch.testing.assert_close(found.stated, torch.tensor([0.05, 0.52, 0.975]).double(), rtol=0, atol=1e-6)
    assert found.happened.tolist() == [0.5, 0.0, 1.0]
    assert found.gap == pytest.approx((2 * 0.45 + 0.52 + 2 * 0.025) / 5, abs=1e-6)
    assert found.brier == pytest.approx((0.05**2 + 0.95**2 + 0.05**2 + 0.0 + 0.52**2) / 5, abs=1e-6)


def test_probabilities_that_are_true_have_next_to_no_gap() -> None:
    stated = torch.rand(20_000)
    found = reliability(stated, torch.rand(20_000) < stated)
    assert found.gap < 0.01  # 10 bins of 2000: standard errors of 1 % at most, and a mean of absolute values below
    # E[p (1 - p)] of a uniform p is 1/6; the standard error over 20 000 cases is 0.0011.
    assert found.brier == pytest.approx(1 / 6, abs=0.005)
