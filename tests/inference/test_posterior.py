"""Posteriors as tensors, through ArviZ and through netCDF."""

import hashlib
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from foveate.inference import posterior as posterior_module
from foveate.inference.posterior import Posterior, picture_hash
from foveate.model import gaze as gazes
from foveate.model.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz


def make(
    scenes: int = 3, chains: int = 4, draws: int = 100, mode_count: int = 2, seed: int = 0, **changes: Any
) -> Posterior:
    """Independent draws about known gazes: centres with sd 2 pixels, log-scales 0.1, rotations 0.2 rad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    of_draw = (scenes, chains, draws)
    centre = torch.tensor([60.0, 40.0], dtype=torch.float64) + 2 * normal(*of_draw, 2)
    gaze = gazes.from_parts(centre, 1.5 * torch.exp(0.1 * normal(*of_draw)), 0.3 + 0.2 * normal(*of_draw))
    fields: dict[str, Any] = {
        "gaze": gaze,
        "statistics": {
            "lp": normal(*of_draw),
            "acceptance_rate": torch.rand(of_draw, generator=generator),
            "n_steps": torch.randint(1, 9, of_draw, generator=generator),
            "diverging": torch.rand(of_draw, generator=generator) < 0.1,
        },
        "modes": normal(scenes, mode_count, 4),
        "weights": torch.softmax(normal(scenes, mode_count), -1),
        "presence": torch.rand(scenes, generator=generator),
        "path": normal(scenes, 6, 4),
        "canonical": torch.rand(scenes, 24, 24, generator=generator),
        "canonical_draws": torch.rand(scenes, chains, 5, 24, 24, generator=generator),
        "patch": torch.rand(scenes, 24, 24, generator=generator),
        "names": [f"street/{seed}-{i}.jpg" for i in range(scenes)],
        "hashes": [f"{i:016x}" for i in range(scenes)],
        "sizes": torch.tensor([[90, 120]] * scenes),
        "settings": {"chains": chains, "kernel": "batched", "temperature": 1.5},
    }
    return Posterior(**{**fields, **changes})


def assert_equal(first: Posterior, second: Posterior) -> None:
    for name in posterior_module.DIMENSIONS:
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert first.statistics.keys() == second.statistics.keys()
    for name, one in first.statistics.items():
        assert one.dtype == second.statistics[name].dtype, name
        assert torch.equal(one, second.statistics[name])
    assert (first.names, first.hashes, first.settings) == (second.names, second.hashes, second.settings)


def test_the_reported_gaze_is_the_mean_over_chains_and_draws() -> None:
    posterior = make()
    expected = posterior.gaze.flatten(1, 2).numpy().mean(1)
    np.testing.assert_allclose(posterior.mean_gaze.numpy(), expected, rtol=1e-12)  # float64


def test_the_standard_deviations_are_in_pixels_log_scale_and_radians() -> None:
    # An sd from 4 × 2000 independent draws is known to 0.8 % (1 / sqrt(2 n)); 4 % is five of those.
    sd = make(draws=2000).sd
    expected = torch.tensor([2.0, 2.0, 0.1, 0.2], dtype=torch.float64).expand(3, 4)
    torch.testing.assert_close(sd, expected, rtol=0.04, atol=0)


def test_a_rotation_that_crosses_the_half_turn_has_the_same_spread_as_any_other() -> None:
    posterior = make()
    turn = gazes.from_parts(torch.zeros(2).double(), torch.ones(()).double(), torch.tensor(math.pi - 0.3).double())
    turned = make(gaze=gazes.compose(posterior.gaze, turn))
    # float64 rounding of the composition
    torch.testing.assert_close(turned.sd[:, 2:], posterior.sd[:, 2:], rtol=1e-9, atol=0)
    rotation = turned.to_datatree()["posterior"]["rotation"]
    assert float(rotation.max() - rotation.min()) < math.pi


def test_draws_and_statistics_stand_under_arvizs_names_and_dimensions() -> None:
    posterior = make()
    tree = posterior.to_datatree()
    draws = tree["posterior"]
    assert draws["gaze"].dims == ("chain", "draw", "scene", "gaze_coordinate")
    assert list(draws["gaze_coordinate"].values) == ["a", "b", "tx", "ty"]
    for name in ("centre_x", "centre_y", "scale", "rotation"):
        assert draws[name].dims == ("chain", "draw", "scene")
    for name in ("lp", "acceptance_rate", "n_steps", "diverging"):
        assert tree["sample_stats"][name].dims == ("chain", "draw", "scene")
    one = draws["gaze"].sel(scene=posterior.names[1], chain=2, draw=7).values
    np.testing.assert_array_equal(one, posterior.gaze[1, 2, 7].numpy())
    statistic = tree["sample_stats"]["lp"].sel(scene=posterior.names[1], chain=2, draw=7).item()
    assert statistic == posterior.statistics["lp"][1, 2, 7].item()
    assert list(tree["observed_data"]["name"].values) == posterior.names
    for group in tree.children.values():
        assert set(group.dims) <= set(group.coords), f"a dimension of {group.name} has no coordinate"
    assert {"inference_library", "created_at", "settings"} <= set(tree["posterior"].attrs)


def test_the_parts_of_the_draws_put_together_are_the_draws() -> None:
    draws = make().to_datatree()["posterior"]
    centre = torch.from_numpy(np.stack([draws["centre_x"].values, draws["centre_y"].values], -1))
    back = gazes.from_parts(centre, *(torch.from_numpy(draws[name].values) for name in ("scale", "rotation")))
    np.testing.assert_allclose(back.numpy(), draws["gaze"].values, rtol=1e-12, atol=1e-12)  # float64


def test_what_is_saved_is_loaded_unchanged(tmp_path: Path) -> None:
    posterior = make(mode_count=3)
    posterior.modes[1, 2] = math.nan
    posterior.weights[1, 2] = 0.0
    path = tmp_path / "made" / "posterior.nc"
    posterior.save(path)
    assert_equal(Posterior.load(path), posterior)
    assert [p.name for p in path.parent.iterdir()] == ["posterior.nc"]


def test_names_in_any_script_and_names_that_repeat_survive_the_file(tmp_path: Path) -> None:
    posterior = make(names=["Zoë.jpg", "a.jpg", "a.jpg"])
    posterior.save(tmp_path / "posterior.nc")
    assert Posterior.load(tmp_path / "posterior.nc").names == ["Zoë.jpg", "a.jpg", "a.jpg"]
    assert list(posterior.to_datatree()["posterior"]["scene"].values) == ["Zoë.jpg", "a.jpg", "a.jpg (2)"]


def test_arviz_reads_the_file_as_its_own(tmp_path: Path) -> None:
    posterior = make()
    posterior.save(tmp_path / "posterior.nc")
    data = arviz.from_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    np.testing.assert_array_equal(data["posterior"]["gaze"].values, posterior.gaze.permute(1, 2, 0, 3).numpy())
    assert data["sample_stats"]["diverging"].dtype == bool


@pytest.mark.skipif(not hasattr(arviz, "InferenceData"), reason="ArviZ 1 and later has no InferenceData")
def test_arviz_below_1_gets_an_inference_data_of_the_same_groups() -> None:
    data = make().to_inference_data()
    assert isinstance(data, arviz.InferenceData)
    assert {"posterior", "sample_stats", "observed_data", "modes"} <= set(data.groups())


def test_later_arviz_is_pointed_to_the_datatree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(arviz, "InferenceData", raising=False)
    with pytest.raises(InputError, match=r"to_datatree\(\)"):
        make().to_inference_data()


def test_the_summary_has_a_row_for_every_scene_and_part_with_ess_and_r_hat() -> None:
    posterior = make()
    table = posterior.summary()
    expected = {f"{part}[{name}]" for part in posterior_module.PARTS for name in posterior.names}
    assert set(table.index) == expected
    assert {"mean", "sd", "ess_bulk", "ess_tail", "r_hat"} <= set(table.columns)
    first = f"centre_x[{posterior.names[0]}]"
    # Not rounded: the float64 mean over the same draws.
    assert table.loc[first, "mean"] == pytest.approx(posterior.mean_gaze[0, 2].item(), rel=1e-9)
    assert table.loc[first, "sd"] == pytest.approx(posterior.sd[0, 0].item(), rel=1e-3)


def test_r_hat_and_ess_are_arvizs_worst_over_the_coordinates_of_each_scene() -> None:
    posterior = make()
    for scene in range(3):
        draws = [posterior.gaze[scene, :, :, k].numpy() for k in range(4)]
        # The same numbers from the same draws, in another memory layout: float64 rounding.
        assert posterior.rhat()[scene] == pytest.approx(max(arviz.rhat(d) for d in draws), rel=1e-9)
        assert posterior.ess()[scene] == pytest.approx(min(arviz.ess(d) for d in draws), rel=1e-9)


def test_independent_draws_mix_and_a_chain_that_stays_away_shows_in_its_own_scene_only() -> None:
    posterior = make(draws=200)
    posterior.gaze[1, 0, :, 2] += 20.0
    rhat, ess = posterior.rhat(), posterior.ess()
    # 800 independent draws: R-hat of each coordinate is within 0.01 or so of 1 (its own limit for use is 1.01).
    assert rhat[0] < 1.02
    assert rhat[2] < 1.02
    assert rhat[1] > 1.3
    # A chain ten sds away leaves little more than one effective draw a chain.
    assert ess[1] < 20
    assert ess[0] > 300


def test_one_chain_has_an_ess_and_no_r_hat() -> None:
    posterior = make(chains=1)
    assert bool(posterior.rhat().isnan().all())
    assert bool((posterior.ess() > 20).all())


def test_a_summary_of_one_chain_says_nan_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    table = make(chains=1).summary()
    assert bool(table["r_hat"].isna().all())
    assert bool((table["ess_bulk"] > 20).all())
    assert capfd.readouterr().err == ""


def test_what_else_arviz_has_to_say_comes_through(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.Logger("arviz")
    log.addHandler(caplog.handler)
    monkeypatch.setattr(arviz, "_log", log, raising=False)
    of_shape, other = "Shape validation failed: input_shape: (1, 9)", "9 of 100 draws are not finite"

    def summary(*_: object, **__: object) -> None:
        log.warning(of_shape)
        log.warning(other)

    monkeypatch.setattr(arviz, "summary", summary)
    make(chains=1).summary()
    assert caplog.messages == [other]
    # Whoever asks ArviZ himself is told all there is.
    log.warning(of_shape)
    assert caplog.messages == [other, of_shape]


def test_parts_are_put_together_in_order_and_modes_filled_up() -> None:
    first, second = make(2, seed=1), make(3, mode_count=4, seed=2)
    whole = Posterior.concatenate([first, second])
    assert len(whole) == 5
    assert whole.names == first.names + second.names
    torch.testing.assert_close(whole.gaze[2:], second.gaze, rtol=0, atol=0)
    torch.testing.assert_close(whole.statistics["lp"][:2], first.statistics["lp"], rtol=0, atol=0)
    assert bool(whole.modes[:2, 2:].isnan().all())
    assert bool((whole.weights[:2, 2:] == 0).all())
    torch.testing.assert_close(whole.weights[2:], second.weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "indices", [[2, 0], torch.tensor([2, 0]), torch.tensor([2, 0]).numpy().tolist()], ids=["list", "tensor", "numbers"]
)
def test_a_subset_has_its_scenes_in_the_order_asked_for(indices: Any) -> None:
    posterior = make()
    part = posterior.subset(indices)
    assert part.names == [posterior.names[2], posterior.names[0]]
    torch.testing.assert_close(part.statistics["lp"], posterior.statistics["lp"][[2, 0]], rtol=0, atol=0)
    torch.testing.assert_close(part.canonical_draws, posterior.canonical_draws[[2, 0]], rtol=0, atol=0)


def test_a_subset_may_be_one_scene_a_slice_or_a_mask() -> None:
    posterior = make()
    assert posterior.subset(-1).names == posterior.names[-1:]
    assert posterior.subset(slice(1, None)).names == posterior.names[1:]
    assert posterior.subset(posterior.presence >= 0).names == posterior.names


def test_subsets_put_together_again_are_the_posterior() -> None:
    posterior = make()
    assert_equal(Posterior.concatenate([posterior.subset(0), posterior.subset([1, 2])]), posterior)


def test_float32_gazes_are_kept_in_float64() -> None:
    posterior = make()
    assert make(gaze=posterior.gaze.float()).gaze.dtype == torch.float64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gaze", torch.zeros(3, 4, 10, 3)),
        ("modes", torch.zeros(2, 2, 4)),
        ("weights", torch.zeros(3, 5)),
        ("canonical_draws", torch.zeros(3, 1, 5, 24, 24)),
        ("sizes", torch.zeros(3, 3, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_agree_are_refused_by_name(field: str, value: torch.Tensor) -> None:
    with pytest.raises(InputError, match=rf"Posterior\.{field} has shape"):
        make(**{field: value})


def test_statistics_and_names_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="statistics\\['lp'\\] has shape"):
        make(statistics={"lp": torch.zeros(3, 4)})
    with pytest.raises(InputError, match="names has 2 entries for 3 scenes"):
        make(names=["a", "b"])


def test_posteriors_of_different_draws_or_kernels_are_not_put_together() -> None:
    with pytest.raises(InputError, match="posterior 1 has gaze"):
        Posterior.concatenate([make(), make(draws=50, seed=1)])
    with pytest.raises(InputError, match="posterior 1 has statistics"):
        Posterior.concatenate([make(), make(seed=1, statistics={"lp": torch.zeros(3, 4, 100)})])
    with pytest.raises(InputError, match="at least one"):
        Posterior.concatenate([])


def test_loading_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Posterior.load(tmp_path / "absent.nc")
    (tmp_path / "text.nc").write_text("not a posterior", encoding="utf-8")
    with pytest.raises(InputError, match="no netCDF file or is damaged"):
        Posterior.load(tmp_path / "text.nc")
    xarray.Dataset({"x": 1}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="not a posterior that foveate wrote"):
        Posterior.load(tmp_path / "other.nc")


def test_a_truncated_file_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    make().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="damaged"):
        Posterior.load(path)


def test_a_file_without_one_of_its_groups_is_called_incomplete(tmp_path: Path) -> None:
    tree = make().to_datatree()
    del tree["modes"]
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="modes"):
        Posterior.load(tmp_path / "posterior.nc")


def test_a_file_of_one_chosen_scene_is_left_to_arviz(tmp_path: Path) -> None:
    make().to_datatree().isel(scene=0).to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="read it with ArviZ"):
        Posterior.load(tmp_path / "posterior.nc")


@pytest.mark.filterwarnings("error")
def test_one_draw_has_no_standard_deviation_and_no_warning() -> None:
    assert bool(make(chains=1, draws=1).sd.isnan().all())


def test_a_file_of_another_format_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(posterior_module, "FORMAT", 99)
        make().save(tmp_path / "posterior.nc")
    with pytest.raises(InputError, match=r"format 99 .* reads format 1; attend again"):
        Posterior.load(tmp_path / "posterior.nc")


def test_writing_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "posterior.nc"
    old = make(seed=1)
    old.save(path)

    def fail(self: xarray.DataTree, filepath: Path, **options: Any) -> None:
        Path(filepath).write_bytes(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr(xarray.DataTree, "to_netcdf", fail)
    with pytest.raises(OSError, match="no space"):
        make(seed=2).save(path)
    assert_equal(Posterior.load(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.nc"]


def test_the_hash_of_a_picture_is_that_of_its_float32_bytes_row_by_row() -> None:
    picture = torch.rand(5, 7)
    expected = hashlib.sha256(picture.numpy().astype("<f4").tobytes()).hexdigest()[:16]
    assert picture_hash(picture) == expected
    assert picture_hash(picture.T.contiguous().T) == expected
    assert picture_hash(picture.double()) == expected
    assert picture_hash(picture.flip(0)) != expected


def test_a_posterior_prints_as_a_line() -> None:
    assert repr(make()) == "Posterior(3 scenes, 4 chains, 100 draws, 2 modes)"
