"""Where the object is and how sure: draws of gazes with per-draw statistics, as tensors, for ArviZ, and as a file.

Convention (the whole module): gazes are ``(a, b, tx, ty)``, canonical to scene (`foveate.model.gaze`); scene pixels,
radians, nats. Tensors lead with the scene.
"""

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray
from jaxtyping import Float, Float64, Int
from torch import Tensor

from foveate.inference.checkpoint import atomic_file
from foveate.model import gaze as gazes
from foveate.model.errors import InputError

if TYPE_CHECKING:
    import pandas

__all__ = ["Posterior", "picture_hash"]

# Counts the layouts of a posterior's file.
FORMAT = 1

# Dimensions of every tensor field; a number is a size.
DIMENSIONS = {
    "gaze": "scene chain draw 4",
    "modes": "scene mode 4",
    "weights": "scene mode",
    "presence": "scene",
    "path": "scene step 4",
    "canonical": "scene 24 24",
    "canonical_draws": "scene chain kept 24 24",
    "patch": "scene 24 24",
    "sizes": "scene 2",
}
PARTS = ("centre_x", "centre_y", "scale", "rotation")


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Draws of each scene's gaze within its heaviest mode, the modes beside it, and what was understood there.

    Attributes:
        gaze: ``(scene, chain, draw, 4)`` draws of the heaviest mode.
        statistics: what happened in each draw, ``(scene, chain, draw)`` each, under ArviZ' names (``lp,
            acceptance_rate, step_size, n_steps, diverging, energy, energy_error``); Pyro's own kernels give ``lp`` and
            ``diverging`` alone.
        modes: ``(scene, mode, 4)``, heaviest first; NaN where a scene has fewer.
        weights: ``(scene, mode)`` posterior weights of the modes; 0 where a scene has fewer.
        presence: ``(scene,)`` probability that the scene shows the object at all; where a person's picture was given
            to a model that tells people apart, a score of "this person is here", not a calibrated probability.
        path: ``(scene, step, 4)`` the gaze by step: start, steps of the guide, and last the posterior mean. Where the
            best of what was proposed is no end of looks it is the same gaze at every step but the last.
        canonical: ``(scene, 24, 24)`` posterior mean of the canonical image, in [0, 1].
        canonical_draws: ``(scene, chain, kept, 24, 24)`` some of its draws.
        patch: ``(scene, 24, 24)`` the scene read at the reported gaze.
        names: of the scenes.
        hashes: of the pictures (`picture_hash`).
        sizes: ``(scene, 2)`` height and width of the pictures.
        settings: of the sampler and the model; JSON-able.

    Tensors are brought to the CPU and gazes to float64.

    Raises:
        InputError: naming the field, when shapes do not agree.
    """

    # Shapes are those of DIMENSIONS and are checked below, whether or not a shape checker is at work.
    gaze: Float[Tensor, "..."]
    statistics: dict[str, Tensor]
    modes: Float[Tensor, "..."]
    weights: Float[Tensor, "..."]
    presence: Float[Tensor, "..."]
    path: Float[Tensor, "..."]
    canonical: Float[Tensor, "..."]
    canonical_draws: Float[Tensor, "..."]
    patch: Float[Tensor, "..."]
    names: list[str]
    hashes: list[str]
    sizes: Int[Tensor, "..."]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bound: dict[str, int] = {}
        for name, dimensions in DIMENSIONS.items():
            value = getattr(self, name).detach().cpu()
            object.__setattr__(self, name, value.double() if name in ("gaze", "modes", "path") else value)
            _bind(f"Posterior.{name}", value, dimensions, bound)
        statistics = {name: value.detach().cpu() for name, value in self.statistics.items()}
        for name, value in statistics.items():
            _bind(f"Posterior.statistics[{name!r}]", value, "scene chain draw", bound)
        object.__setattr__(self, "statistics", statistics)
        for name in ("names", "hashes"):
            if len(getattr(self, name)) != bound["scene"]:
                raise InputError(f"Posterior.{name} has {len(getattr(self, name))} entries for {bound['scene']} scenes")

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        scenes, chains, draws, _ = self.gaze.shape
        return f"Posterior({scenes} scenes, {chains} chains, {draws} draws, {self.modes.shape[1]} modes)"

    @property
    def mean_gaze(self) -> Float64[Tensor, "scene 4"]:
        """The reported gaze: mean of (a, b, tx, ty) over the chains and draws of the heaviest mode."""
        return self.gaze.mean((1, 2))

    @property
    def sd(self) -> Float64[Tensor, "scene 4"]:
        """Posterior standard deviations of centre x and y (scene pixels), log-scale and rotation (radians)."""
        centre, log_scale, rotation = self._parts()
        draws = torch.cat([centre, log_scale[..., None], rotation[..., None]], -1).flatten(1, 2)
        # PyTorch gives NaN for one draw, too, but warns.
        return draws.std(1) if draws.shape[1] > 1 else torch.full_like(draws[:, 0], math.nan)

    def to_datatree(self) -> xarray.DataTree:
        """The posterior in ArviZ' schema, as ArviZ ≥ 1 takes it.

        Groups: ``posterior`` (``gaze`` and, derived from it, ``centre_x, centre_y`` in scene pixels, ``scale``,
        ``rotation`` in radians: within a half turn of the mean's), ``sample_stats``, ``observed_data`` (name, hash,
        height and width of each picture), ``modes``, ``understanding`` (canonical images, the patch, the path of the
        gaze).
        """
        centre, log_scale, rotation = self._parts()
        of_draw = ("chain", "draw", "scene")
        posterior: dict[str, Any] = {"gaze": ((*of_draw, "gaze_coordinate"), self.gaze.permute(1, 2, 0, 3).numpy())}
        for name, value in zip(PARTS, (*centre.unbind(-1), log_scale.exp(), rotation), strict=True):
            posterior[name] = (of_draw, value.permute(1, 2, 0).numpy())
        statistics = {name: (of_draw, value.permute(1, 2, 0).numpy()) for name, value in self.statistics.items()}
        pixels = ("row", "column")
        groups = {
            "posterior": posterior,
            "sample_stats": statistics,
            "observed_data": {
                "name": ("scene", np.array(self.names, dtype=object)),
                "hash": ("scene", np.array(self.hashes, dtype=object)),
                "height": ("scene", self.sizes[:, 0].numpy()),
                "width": ("scene", self.sizes[:, 1].numpy()),
            },
            "modes": {
                "gaze": (("scene", "mode", "gaze_coordinate"), self.modes.numpy()),
                "weight": (("scene", "mode"), self.weights.numpy()),
                "presence": ("scene", self.presence.numpy()),
            },
            "understanding": {
                "path": (("scene", "step", "gaze_coordinate"), self.path.numpy()),
                "canonical": (("scene", *pixels), self.canonical.numpy()),
                "canonical_draws": (("scene", "chain", "kept", *pixels), self.canonical_draws.numpy()),
                "patch": (("scene", *pixels), self.patch.numpy()),
            },
        }
        attributes = {
            "inference_library": "foveate",
            "inference_library_version": version("foveate"),
            "created_at": datetime.now(UTC).isoformat(),
            "foveate_format": FORMAT,
            "settings": json.dumps(self.settings, sort_keys=True),
        }
        datasets = {name: _with_coordinates(variables, _labels(self.names)) for name, variables in groups.items()}
        for name in ("posterior", "sample_stats"):
            datasets[name].attrs.update(attributes)
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attributes), **datasets})

    def to_inference_data(self) -> Any:
        """The posterior as an ``arviz.InferenceData``, for ArviZ below 1.

        Raises:
            InputError: with ArviZ 1 and later, which has none and takes `to_datatree`.
        """
        arviz = _arviz()
        if not hasattr(arviz, "InferenceData"):
            raise InputError(f"ArviZ {arviz.__version__} has no InferenceData: pass it to_datatree()")
        return arviz.InferenceData.from_datatree(self.to_datatree())

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_datatree` to a netCDF file, whole or not at all; ``arviz.from_netcdf`` reads it, and `load`.

        Raises:
            InputError: `path` is a folder.
        """
        tree = self.to_datatree()
        with atomic_file(path) as partial:
            tree.to_netcdf(partial, engine="h5netcdf")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Posterior":
        """Read what `save` wrote.

        Raises:
            InputError: for no such file, a file of another kind, or one of another format.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such file; `foveate attend` writes a posterior.nc")
        try:
            with xarray.open_datatree(path, engine="h5netcdf") as tree:
                return cls._from_datatree(tree.load(), str(path))
        except OSError as error:
            raise InputError(f"{path} is no netCDF file or is damaged ({error}); write it again") from error
        except InputError:
            raise
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path} is not a whole posterior of scenes: {error.args[0]}; write it again, or read it with ArviZ"
            ) from error

    @classmethod
    def concatenate(cls, parts: Sequence["Posterior"]) -> "Posterior":
        """The scenes of several posteriors one after the other; shorter lists of modes are filled up.

        Settings are the first's: parts of one run have the same.

        Raises:
            InputError: for no parts, or parts that differ in chains, draws, path or statistics.
        """
        if not parts:
            raise InputError("no posteriors to concatenate: give at least one")
        first = parts[0]
        for i, part in enumerate(parts[1:], 1):
            for name in ("gaze", "path", "canonical_draws"):
                shape, wanted = tuple(getattr(part, name).shape[1:]), tuple(getattr(first, name).shape[1:])
                if shape != wanted:
                    raise InputError(
                        f"posterior {i} has {name} (scene, {', '.join(map(str, shape))}) and the first has (scene, "
                        f"{', '.join(map(str, wanted))}): concatenate runs of the same chains, draws and steps"
                    )
            if part.statistics.keys() != first.statistics.keys():
                raise InputError(
                    f"posterior {i} has statistics {sorted(part.statistics)} and the first has "
                    f"{sorted(first.statistics)}: concatenate runs of one kernel"
                )
        most = max(part.modes.shape[1] for part in parts)
        tensors = {}
        for name in DIMENSIONS:
            fill = {"modes": float("nan"), "weights": 0.0}.get(name)
            values = [getattr(part, name) for part in parts]
            tensors[name] = torch.cat(values if fill is None else [_filled_up(value, most, fill) for value in values])
        return cls(
            **tensors,
            statistics={name: torch.cat([part.statistics[name] for part in parts]) for name in first.statistics},
            names=[name for part in parts for name in part.names],
            hashes=[digest for part in parts for digest in part.hashes],
            settings=first.settings,
        )

    def subset(self, indices: int | slice | Sequence[int] | Tensor) -> "Posterior":
        """The scenes of `indices`, in that order; a boolean tensor chooses those that are true."""
        chosen = torch.arange(len(self))[indices].reshape(-1)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: values[name][chosen] for name in DIMENSIONS}
        values |= {name: [values[name][i] for i in chosen.tolist()] for name in ("names", "hashes")}
        values["statistics"] = {name: value[chosen] for name, value in self.statistics.items()}
        return Posterior(**values)

    def summary(self) -> "pandas.DataFrame":
        """ArviZ' table: a row for every scene and part of its gaze, with mean, sd, interval, MCSE, ESS and R-hat.

        What fewer than 2 chains or 4 draws cannot tell (R-hat, say) is NaN.
        """
        arviz = _arviz()
        data = self.to_inference_data() if hasattr(arviz, "InferenceData") else self.to_datatree()
        # Its logger is one of its own, not the one that logging knows by name.
        log = getattr(arviz, "_log", logging.getLogger("arviz"))
        log.addFilter(_not_of_shape)
        try:
            return arviz.summary(data, var_names=list(PARTS), round_to="none")
        finally:
            log.removeFilter(_not_of_shape)

    def rhat(self) -> Float64[Tensor, "scene"]:
        """Rank-normalised split R-hat of the gaze, the worst of its coordinates.

        NaN for fewer than 2 chains or 4 draws.
        """
        return self._diagnosed("rhat").amax(-1)

    def ess(self) -> Float64[Tensor, "scene"]:
        """Bulk effective sample size of the gaze, the worst of its coordinates; NaN for fewer than 4 draws."""
        return self._diagnosed("ess").amin(-1)

    def _diagnosed(self, statistic: str) -> Float64[Tensor, "scene 4"]:
        # ArviZ gives NaN, too, but prints a line of its own.
        if self.gaze.shape[2] < 4 or (statistic == "rhat" and self.gaze.shape[1] < 2):
            return torch.full((len(self.gaze), 4), math.nan, dtype=torch.float64)
        draws = self.to_datatree()["posterior"].to_dataset()[["gaze"]]
        found = getattr(_arviz(), statistic)(draws)["gaze"]
        return torch.from_numpy(np.array(found.transpose("scene", "gaze_coordinate").values, dtype=np.float64))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centres ``(..., 2)``, log-scales and rotations of the draws, rotations within a half turn of their mean's."""
        mean = self.mean_gaze[:, None, None]
        relative = gazes.parts(gazes.compose(gazes.inverse(mean), self.gaze)).rotation
        centre, scale, _ = gazes.parts(self.gaze)
        return centre, scale.log(), gazes.parts(mean).rotation + relative

    @classmethod
    def _from_datatree(cls, tree: xarray.DataTree, where: str) -> "Posterior":
        found = tree.attrs.get("foveate_format")
        if found is None:
            raise InputError(
                f"{where} is not a posterior that foveate wrote: it names no foveate_format; read it with ArviZ"
            )
        if int(found) != FORMAT:
            raise InputError(
                f"{where}: the posterior has format {found} and this foveate reads format {FORMAT}; attend again, "
                "read it with ArviZ, or install the foveate that wrote it"
            )

        def read(group: str, name: str, *dimensions: str) -> Tensor:
            return torch.from_numpy(np.array(tree[group][name].transpose("scene", *dimensions, ...).values))

        of_draw = ("chain", "draw")
        observed = tree["observed_data"].to_dataset()
        return cls(
            gaze=read("posterior", "gaze", *of_draw),
            statistics={
                str(name): read("sample_stats", str(name), *of_draw) for name in tree["sample_stats"].data_vars
            },
            modes=read("modes", "gaze", "mode"),
            weights=read("modes", "weight", "mode"),
            presence=read("modes", "presence"),
            path=read("understanding", "path", "step"),
            canonical=read("understanding", "canonical"),
            canonical_draws=read("understanding", "canonical_draws", "chain", "kept"),
            patch=read("understanding", "patch"),
            names=[str(name) for name in observed["name"].values],
            hashes=[str(digest) for digest in observed["hash"].values],
            sizes=torch.stack([read("observed_data", "height"), read("observed_data", "width")], -1),
            settings=json.loads(tree.attrs["settings"]),
        )


def picture_hash(picture: Float[Tensor, "height width"]) -> str:
    """What tells a picture from others: 16 hexadecimal digits of the SHA-256 of its float32 bytes, row by row."""
    return hashlib.sha256(picture.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def _bind(what: str, value: Tensor, dimensions: str, bound: dict[str, int]) -> None:
    """Hold a shape against its dimensions, giving sizes to those not met before."""
    names = dimensions.split()
    wanted = [int(name) if name.isdigit() else bound.get(name) for name in names]
    shape = tuple(value.shape)
    if len(shape) != len(names) or any(w is not None and w != s for w, s in zip(wanted, shape, strict=True)):
        known = {name: bound[name] for name in names if name in bound}
        raise InputError(f"{what} has shape {shape}: needed is ({', '.join(names)}) with {known}")
    bound.update({name: size for name, size in zip(names, shape, strict=True) if not name.isdigit()})


def _with_coordinates(variables: dict[str, Any], labels: list[str]) -> xarray.Dataset:
    """A dataset with a coordinate on every dimension."""
    dataset = xarray.Dataset(variables)
    named = {"scene": labels, "gaze_coordinate": ["a", "b", "tx", "ty"]}
    return dataset.assign_coords({name: named.get(str(name), np.arange(size)) for name, size in dataset.sizes.items()})


def _labels(names: list[str]) -> list[str]:
    """The names, told apart by a number where several scenes have the same: ArviZ chooses scenes by label."""
    labels: list[str] = []
    taken = set()
    for name in names:
        label, count = name, 1
        while label in taken:
            count += 1
            label = f"{name} ({count})"
        taken.add(label)
        labels.append(label)
    return labels


def _filled_up(value: Tensor, modes: int, fill: float) -> Tensor:
    missing = value.new_full((value.shape[0], modes - value.shape[1], *value.shape[2:]), fill)
    return torch.cat([value, missing], 1)


def _not_of_shape(record: logging.LogRecord) -> bool:
    """Whether a line of ArviZ' log says more than the NaN beside it: it has one for every row of a single chain."""
    return not record.getMessage().startswith("Shape validation failed")


def _arviz() -> ModuleType:
    """ArviZ, imported when it is first needed: it takes seconds, and 0.23 announces its successor each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
