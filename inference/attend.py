"""Attending: from pictures to posteriors over the gaze, by a glance, a few looks, and HMC within the modes found.

Convention (the whole module): gazes ``(..., 4)`` in scene pixels, `foveate.model.gaze`.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro.infer import HMC, MCMC, NUTS
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from foveate.inference.glance import Proposals, propose
from foveate.inference.guide import CHANGE_SCALES, GazeChange, GazeGuide
from foveate.inference.hmc import sample_batch
from foveate.inference.noise import KeyedNoise, Purpose, stream_keys
from foveate.inference.posterior import Posterior, picture_hash
from foveate.inference.potential import CanonicalDensity, GazePotential, OddsScore, PersonRatio
from foveate.inference.proposal import ROUNDS, StudentProposal, adapted_proposal, spread_points
from foveate.model import gaze as gazes
from foveate.model.attention import OUTSIDE, AttentionModel, as_picture, as_tensor
from foveate.model.errors import InputError
from foveate.model.patch import NORMALISING_FLOOR, Pyramid, density_coordinates, from_density_coordinates
from foveate.model.threads import in_parallel

__all__ = [
    "Candidates",
    "ModePoints",
    "adapted_starts",
    "attend",
    "attend_batches",
    "canonical_draws",
    "chain_starts",
    "integrated_odds",
    "mode_points",
    "mode_potential",
    "odds_score",
    "scene_pyramid",
    "search",
]

# Proposals looked at once per scene, those followed further, and the overlap beyond which two end points are one mode.
PROPOSALS, FOLLOWED, MERGE = 12, 6, 0.3
# The overlap beyond which two end points are so nearly one that only one is weighed.
SAME = 0.9
# Points of the quasi-random rule that integrates a mode, and how much wider than the guide's belief it spreads.
POINTS, SPREAD = 32, 1.5
# Points among which chains find their starts.
START_POINTS = 256
# The guide's sds, in chart units, are kept within these when they set the width of a mode.
SD_RANGE = (0.1, 4.0)
# How far from a given start somebody is looked for whose picture is given: in widths of the start or of who is found. A
# start may be as far from its picture, and so many times as wide.
# That many glances are thinned to `FOLLOWED` within reach.
REACH, GLANCES = 4.0, 24
# Modes among which the person is looked for.
PEOPLE = 8
# Share of the smaller of two patches from which on an explained object explains the other, too.
EXPLAINED = 0.3
# The narrowest patch that is looked for, as a share of the shorter side: finer levels are not built.
SMALLEST = 0.07

Kernel = Literal["batched", "hmc", "nuts"]
# How chains of each kernel move, in the chart's units; told with the posterior.
_MOVES = {"step_size": 0.3, "target_accept_prob": 0.8}
TRAJECTORIES: dict[Kernel, dict[str, Any]] = {
    "batched": _MOVES | {"trajectory_length": 1.6, "max_num_steps": 24, "jitter": 0.5},
    "hmc": _MOVES | {"trajectory_length": 1.6},
    "nuts": _MOVES | {"max_tree_depth": 6},
}
# Beside leaps longer steps, as many as are accepted where HMC is at its best, draw more in the same time.
BESIDE_LEAPS: dict[str, Any] = TRAJECTORIES["batched"] | {"target_accept_prob": 0.65}


class Candidates(NamedTuple):
    """Modes of every scene before any sampling, best first.

    Attributes:
        gaze: ``(scene, mode, 4)`` end points, scene pixels.
        sd: ``(scene, mode, 4)`` the guide's sds in the units of `LocalChart` at the end point.
        features: ``(scene, mode, 3)`` integrated log-odds, recognition logit, presence logit.
        log_weight: ``(scene, mode)`` log-weight against "no object"; -inf where there is no further mode.
        paths: ``(scene, mode, step, 4)`` how each came about: start, then one gaze a step.
    """

    gaze: Tensor
    sd: Tensor
    features: Tensor
    log_weight: Tensor
    paths: Tensor

    @property
    def path(self) -> Float[Tensor, "scene step 4"]:
        """How the best one came about."""
        return self.paths[:, 0]


class ModePoints(NamedTuple):
    """Points of a quadrature about modes.

    Attributes:
        z: ``(scene, mode, point, 4)`` chart coordinates.
        gaze: ``(scene, mode, point, 4)`` the same as gazes.
        log_det: ``(scene, mode, point)`` of the chart.
        log_q: ``(scene, mode, point)`` log density over z from which the points are drawn.
    """

    z: Tensor
    gaze: Tensor
    log_det: Tensor
    log_q: Tensor


def search(
    model: AttentionModel,
    guide: GazeGuide,
    pyramid: Pyramid,
    *,
    start: Float[Tensor, "scene 4"] | None = None,
    canonical: Float[Tensor, "scene 24 24"] | None = None,
    steps: int = 4,
    modes: int = 4,
) -> Candidates:
    """Modes of the gaze posterior of every scene: where glances lead the guide, merged and weighed.

    Args:
        model: scores patches.
        guide: proposes and moves gazes.
        pyramid: the scenes.
        start: initial gazes, the paper's protocol; None searches the whole scene.
        canonical: v, whom to look for; the mean canonical image by default. With a start, the first step goes where the
            guide's look leads and to what a glance sees within four patch widths: whom v shows need not be nearest.
        steps: looks of the guide.
        modes: how many modes are kept.

    A mode's weight is the guide's evidence for an object there. Where v is given to a model that can tell people apart,
    it is the probability of an object there times the Bayes factor of "this person", averaged over the mode: how much
    surer one face is a face than another says nothing about whose it is.

    Convention: gazes in scene pixels, `foveate.model.gaze`.
    """
    count = len(pyramid)
    near = None
    # Looks at the first gazes and at those they lead to, where they have been taken already.
    known: list[GazeChange] = []
    if start is None:
        proposals, taken = _promising(model, guide, pyramid, propose(guide.glance, pyramid, PROPOSALS))
        known = taken if canonical is None else []
        first, found = proposals.gaze, torch.isfinite(proposals.logit)
    else:
        first = start.to(pyramid.texels.device).double()[:, None]
        found = torch.ones(count, 1, dtype=torch.bool, device=first.device)
        if canonical is not None and steps > 0:
            near = _within_reach(propose(guide.glance, pyramid, GLANCES), first)
            first = first.expand(-1, 1 + FOLLOWED, -1)
            found = torch.cat([found, torch.isfinite(near.logit)], 1)
    k = first.shape[1]
    scene = torch.arange(count, device=first.device).repeat_interleave(k)
    if canonical is None:
        v = model.dbn.to_canonical(model.dbn.core.mean.float()).expand(count * k, -1, -1)
    else:
        v = canonical.float().repeat_interleave(k, 0)
    with torch.no_grad():
        steps_taken, looks = [first], []
        for step in range(steps):
            at = steps_taken[-1].reshape(-1, 4)
            change = known[step] if step < len(known) else guide.look(pyramid, at, v, scene)
            gaze = guide.follow(at, change).reshape(count, k, 4)
            if step == 0 and near is not None:
                gaze = torch.cat([gaze[:, :1], near.gaze], 1)
            looks.append(change)
            steps_taken.append(gaze)
        last = steps_taken[-1].reshape(-1, 4)
        looks.append(known[steps] if steps < len(known) else guide.look(pyramid, last, v, scene))
        # The first gaze that counts as an end point, and the last.
        begin = 0 if near is None else 1
        looks = [looks[begin], looks[-1]]
    path = torch.stack(steps_taken, 2)
    if start is None or near is not None:
        # What was proposed stays a candidate beside where the looks led from it: a look may lose an object, too.
        proposed = steps_taken[begin]
        stayed = torch.cat([first[:, :, None], proposed[:, :, None].expand(-1, -1, steps, -1)], 2)
        end, path = torch.cat([proposed, path[:, :, -1]], 1), torch.cat([stayed, path], 1)
        found = found.repeat(1, 2)
    else:
        end, looks = path[:, :, -1], looks[1:]
    chart = end.new_tensor(gazes.LocalChart(end).scales)
    log_sd = torch.cat([look.log_sd.double().reshape(count, k, 4) for look in looks], 1)
    sd = (log_sd.exp() * end.new_tensor(CHANGE_SCALES) / chart).clamp(*SD_RANGE)
    presence = torch.cat([look.presence.double().reshape(count, k) for look in looks], 1)
    upright = torch.cat([look.recognition.reshape(count, k) for look in looks], 1)
    knows = _knows_people(model)
    found = _first_of_its_place(end, found)
    where = found.nonzero()[:, 0]
    whom = None if knows or canonical is None else canonical[where]
    features = torch.stack([torch.full_like(presence, -math.inf)] * 2 + [presence], -1)
    weighed, spread = end[found], sd[found]
    features[..., 0][found] = integrated_odds(model, pyramid, weighed[:, None], spread[:, None], whom, where)[:, 0]
    features[..., 1][found] = guide.recognise(pyramid, weighed, where, upright[found]).double()
    weights = guide.evidence.double()
    log_weight = (features * weights[:3]).nan_to_num(neginf=-1e30).sum(-1) + weights[3]
    log_weight = torch.where(found, log_weight, -math.inf)
    if canonical is None or not knows:
        return _merged(end, sd, features, log_weight, path, modes)
    return _of_person(
        model, pyramid, _merged(end, sd, features, log_weight, path, max(modes, PEOPLE)), canonical, modes
    )


def integrated_odds(
    model: AttentionModel,
    pyramid: Pyramid,
    gaze: Float[Tensor, "n mode 4"],
    sd: Float[Tensor, "n mode 4"],
    canonical: Float[Tensor, "n 24 24"] | None = None,
    scene: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "n mode"]:
    """Log of the integral of prior × odds over each mode, in nats, by importance sampling.

    Rows are the scenes in order, or those that `scene` names.

    The rule is a fixed scrambled Sobol set through a Gaussian of 1.5 × `sd` about the mode, so that the number does not
    depend on what shares the batch.

    Convention: `sd` is in the units of `LocalChart` at `gaze`.
    """
    points = mode_points(gaze, sd)
    flat = points.gaze.flatten(1, 2)
    energy = odds_score(model, canonical).energy_of_many(pyramid.extract(flat, scene=scene))
    log_odds = -energy.double().reshape(points.log_q.shape)
    size = (pyramid.size if scene is None else pyramid.size[scene]).double()[:, None, None]
    log_p = gazes.log_prior(model.prior(size), points.gaze) + points.log_det + log_odds
    return torch.logsumexp(log_p - points.log_q, -1) - math.log(POINTS)


def mode_points(
    gaze: Float[Tensor, "scene mode 4"], sd: Float[Tensor, "scene mode 4"], count: int = POINTS
) -> ModePoints:
    """A fixed set of `count` points about every mode with the density they are drawn from: a Gaussian of 1.5 × `sd`.

    Convention: `sd` is in the units of `LocalChart` at `gaze`.
    """
    uniform = SobolEngine(4, scramble=True, seed=0).draw(count, dtype=torch.float64)
    points = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).to(sd)
    spread = SPREAD * sd
    z = points * spread[..., None, :]
    log_q = -0.5 * points.square().sum(-1) - spread.log().sum(-1, keepdim=True) - 2 * math.log(2 * math.pi)
    chart = gazes.LocalChart(gaze[..., None, :])
    return ModePoints(z, chart.to_gaze(z), chart.log_det(z), log_q)


def attend(
    model: AttentionModel,
    guide: GazeGuide,
    pictures: Any,
    *,
    chains: int = 4,
    draws: int = 200,
    warmup: int = 100,
    start: Float[Tensor, "scene 4"] | None = None,
    canonical: Float[Tensor, "scene 24 24"] | None = None,
    kernel: Kernel = "batched",
    modes: int = 4,
    max_objects: int = 1,
    guide_steps: int = 4,
    seed: int = 0,
    batch: int = 16,
    progress: bool = False,
) -> Posterior:
    """Where is the object in each picture, and how sure is that: the posterior over the gaze.

    Args:
        model: the generative model (`latent` does not matter: the gaze is sampled from the collapsed form, canonical
            images afterwards given the gaze).
        guide: proposes gazes.
        pictures: a `Scenes`, or a list of ``(height, width)`` arrays or tensors, float in [0, 1] or uint8.
            On a CPU they are read from several threads.
        chains: per scene, within the heaviest mode.
        draws: kept per chain.
        warmup: draws that adapt the step size, not kept.
        start: ``(scene, 4)`` initial gazes in scene pixels (the paper's protocol), array or tensor; None searches whole
            scenes.
        canonical: ``(scene, 24, 24)`` in [0, 1], or uint8: whom to look for. Any picture of the person serves where the
            model can tell people apart (`AttentionModel.identity`); else the image that is looked for to the pixel.
            With a start it is looked for within four patch widths of it.
        kernel: ``"batched"`` (`BatchedHMC`'s algorithm, all scenes and chains at once, with leaps of an independence
            sampler between the trajectories: `foveate.inference.proposal`), or Pyro's own ``"hmc"`` or
            ``"nuts"``, one chain at a time.
        modes: how many are kept with weights.
        max_objects: attend to so many objects of every picture one after the other, each time with what is explained
            taken out: modes that share a third of their patch with an object attended to before are gone. The posterior
            then has that many rows for every picture, one object after the other
            (``posterior.gaze.unflatten(0, (-1, max_objects))``); modes, weights and presence of a row are those of what
            was left for it. Presence is 0 where nothing was left, and the draws then mean nothing.
        guide_steps: looks of the guide before sampling.
        seed: of every random number; a scene's are keyed by its name and do not depend on what shares its batch. (What
            is computed with them does in float32's last digits, which warm-up and HMC may amplify to other draws of
            the same posterior.)
        batch: scenes that are worked on together, on a CPU up to four batches beside each other; memory grows with it,
            not with the number of pictures.
        progress: show a bar.

    Returns:
        The `Posterior` of all pictures.

    Raises:
        InputError: for shapes that do not match, an unknown kernel, a picture that is none or has values that are
            not finite or not in [0, 1], or a start that is nowhere near its picture.
    """
    parts = list(
        attend_batches(
            model,
            guide,
            pictures,
            chains=chains,
            draws=draws,
            warmup=warmup,
            start=start,
            canonical=canonical,
            kernel=kernel,
            modes=modes,
            max_objects=max_objects,
            guide_steps=guide_steps,
            seed=seed,
            batch=batch,
            progress=progress,
        )
    )
    return Posterior.concatenate(parts)


def attend_batches(
    model: AttentionModel,
    guide: GazeGuide,
    pictures: Any,
    *,
    chains: int = 4,
    draws: int = 200,
    warmup: int = 100,
    start: Float[Tensor, "scene 4"] | None = None,
    canonical: Float[Tensor, "scene 24 24"] | None = None,
    kernel: Kernel = "batched",
    modes: int = 4,
    max_objects: int = 1,
    guide_steps: int = 4,
    seed: int = 0,
    batch: int = 16,
    progress: bool = False,
) -> Iterator[Posterior]:
    """`attend`, one `Posterior` for every `batch` pictures as they are done: memory does not grow with their number.

    Arguments and errors are those of `attend`.
    """
    if isinstance(pictures, str | os.PathLike) or not hasattr(pictures, "__len__"):
        raise InputError(
            f"pictures is a {type(pictures).__name__}: needed is a list of arrays or tensors, or Scenes; files are "
            "read by foveate.data.UnlabelledScenes.from_files"
        )
    if getattr(pictures, "ndim", None) == 2:
        raise InputError("one picture was given where a list of pictures is needed: write [picture]")
    start, canonical = _floats(start, "start"), _floats(canonical, "canonical")
    count = len(pictures)
    numbers = {"chains": chains, "draws": draws, "warmup": warmup, "modes": modes, "guide_steps": guide_steps}
    _check(count, numbers | {"batch": batch, "max_objects": max_objects}, seed, start, canonical, kernel)
    # A tensor's own names, where it has any, are those of its dimensions.
    named = None if isinstance(pictures, Tensor) else getattr(pictures, "names", None)
    names = [f"picture_{i:04d}" for i in range(count)] if named is None else list(named)
    keys = stream_keys(names)
    # NumPy's integers are neither JSON nor any C library's.
    chains, draws, warmup, modes, guide_steps, seed, batch, max_objects = map(
        int, (chains, draws, warmup, modes, guide_steps, seed, batch, max_objects)
    )
    guide.eval()
    believed = model.config
    device = model.dbn.core.mean.device
    settings: dict[str, Any] = {
        "chains": chains,
        "draws": draws,
        "warmup": warmup,
        "kernel": kernel,
        "trajectories": BESIDE_LEAPS if kernel == "batched" else TRAJECTORIES[kernel],
        "proposal": "student_t" if kernel == "batched" else None,
        "guide_steps": guide_steps,
        "seed": seed,
        "guide_prior": float(guide.prior_weight),
        "start": "scene" if start is None else "given",
        "canonical": "free" if canonical is None else "given",
        "modes": modes,
        "max_objects": max_objects,
        "noise": believed["noise"],
        "temperature": believed["temperature"],
        "edges": believed["edges"],
        "aperture": believed["aperture"],
        "gaze_prior": {"kind": believed["gaze_prior"], **believed["prior_options"]},
    }

    # Priors that are not compiled, and Pyro's kernels, need derivatives even where the caller needs none.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def attended(rows: range) -> Posterior:
        pyramid, hashes = _read(pictures, rows, device)
        part = slice(rows.start, rows.stop)
        v = None if canonical is None else canonical[part].detach().clone().to(device)
        begin = None if start is None else start[part].detach().clone()
        if begin is not None:
            _check_reach(begin, pyramid.size.cpu(), names[part])
        found = search(
            model,
            guide,
            pyramid,
            start=begin,
            canonical=v,
            steps=guide_steps,
            # What an object takes out with it must not leave the next ones without any.
            modes=modes if max_objects == 1 else max(modes, 3 * max_objects),
        )
        objects = []
        for number in range(max_objects):
            kept = Candidates(*(values[:, :modes] for values in found))
            objects.append(_sampled(model, guide, pyramid, hashes, names[part], keys[part], kept, v, settings, number))
            found = _without(found, found.gaze[:, 0])
        order = torch.arange(max_objects * len(rows)).reshape(max_objects, -1).T
        return objects[0] if max_objects == 1 else Posterior.concatenate(objects).subset(order.flatten())

    parts = [range(begin, min(begin + batch, count)) for begin in range(0, count, batch)]
    # Pyro's own kernels have one state of random numbers for the whole process.
    beside = in_parallel(attended, parts, device) if kernel == "batched" else map(attended, parts)
    with tqdm(total=count, desc="attending", unit="scene", disable=None if progress else True) as bar:
        for posterior in beside:
            yield posterior
            bar.update(len(posterior.gaze) // max_objects)


def canonical_draws(
    model: AttentionModel,
    pyramid: Pyramid,
    gaze: Float[Tensor, "scene chain kept 4"],
    canonical: Float[Tensor, "scene 24 24"] | None,
    seed: int,
    streams: Int[Tensor, "scene chain"],
    sweeps: int = 3,
) -> Float[Tensor, "scene chain kept 24 24"]:
    """Draws of v given gazes, in [0, 1] and in each patch's own light, by Gibbs (v, then h1).

    Args:
        model: whose prior and noise (σ √T) are meant, as in the Pyro program.
        pyramid: the scenes.
        gaze: one draw of v for each.
        canonical: v where it is given; it is what comes back then.
        seed: of the draws.
        streams: a scene's draws are keyed by the first of its numbers.
        sweeps: of the Gibbs sampler.
    """
    if canonical is not None:
        return canonical.float()[:, None, None].expand(*gaze.shape[:-1], -1, -1)
    patch = pyramid.extract(gaze).to(model.dbn.core.mean)
    observed = density_coordinates(patch)
    noise = float(model.noise) * float(model.temperature) ** 0.5
    drawn = []
    for i in range(len(observed)):
        # A generator for every scene: what is drawn for one does not depend on the others.
        generator = torch.Generator(patch.device).manual_seed((seed * 7919 + int(streams[i, 0])) % 2**62)
        v = observed[i]
        h = model.dbn.gibbs_hidden(v, (model.dbn.infer_hidden(v) > 0.5).to(v), generator, update="recognition")
        for _ in range(sweeps):
            v = model.dbn.gibbs_canonical(observed[i], noise, v, h, generator)
            h = model.dbn.gibbs_hidden(v, h, generator, update="recognition")
        drawn.append(v)
    # The inverse of `normalise`, with the light of each patch.
    mean = patch.mean((-2, -1), keepdim=True)
    sd = torch.sqrt((patch - mean).square().mean((-2, -1), keepdim=True) + NORMALISING_FLOOR**2)
    return (mean + sd * from_density_coordinates(torch.stack(drawn))).clamp(0, 1).float()


def _sampled(
    model: AttentionModel,
    guide: GazeGuide,
    pyramid: Pyramid,
    hashes: list[str],
    names: list[str],
    keys: Int[Tensor, " scene"],
    found: Candidates,
    canonical: Tensor | None,
    settings: dict[str, Any],
    number: int,
) -> Posterior:
    """Chains within the heaviest mode of every scene, canonical images given the gazes, and everything put together.

    `keys` are those of the scenes' random numbers. `number` counts the objects of a scene from 0; each has numbers of
    its own.
    """
    count, chains, draws = len(pyramid), settings["chains"], settings["draws"]
    streams = keys[:, None] * 1009 + number * 104_729 + torch.arange(chains, device=keys.device)
    base, sd = found.gaze[:, 0], found.sd[:, 0]

    def potential_of(rows: slice) -> GazePotential:
        v = None if canonical is None else canonical[rows]
        return mode_potential(model, guide, pyramid[rows], base[rows], sd[rows], v)

    potential = potential_of(slice(0, count))
    z0, proposal = adapted_starts(potential, base, sd, KeyedNoise(settings["seed"], streams))
    if settings["kernel"] == "batched":
        z, statistics = sample_batch(
            potential,
            z0,
            num_samples=draws,
            warmup_steps=settings["warmup"],
            seed=settings["seed"],
            streams=streams,
            proposal=proposal,
            **BESIDE_LEAPS,
        )
        recorded = statistics._asdict()
    else:
        z, recorded = _stock(potential_of, z0, settings, streams)
    draws_gaze = gazes.LocalChart(base[:, None, None, :]).to_gaze(z)
    mean = draws_gaze.mean((1, 2))
    kept = max(1, draws // 10)
    thinned = draws_gaze[:, :, kept - 1 :: kept]
    pictures_v = canonical_draws(model, pyramid, thinned, canonical, settings["seed"], streams)
    weights = torch.softmax(found.log_weight, -1)
    return Posterior(
        gaze=draws_gaze,
        statistics=recorded,
        modes=torch.where(torch.isfinite(found.log_weight)[..., None], found.gaze, math.nan),
        weights=torch.where(torch.isfinite(found.log_weight), weights, 0.0),
        presence=torch.sigmoid(torch.logsumexp(found.log_weight, -1)),
        path=torch.cat([found.path, mean[:, None]], 1),
        canonical=pictures_v.mean((1, 2)),
        canonical_draws=pictures_v,
        patch=pyramid.extract(mean[:, None])[:, 0].float(),
        names=names,
        hashes=hashes,
        sizes=pyramid.size.clone(),
        settings=dict(settings),
    )


def mode_potential(
    model: AttentionModel,
    guide: GazeGuide,
    pyramid: Pyramid,
    base: Float[Tensor, "scene 4"],
    sd: Float[Tensor, "scene 4"],
    canonical: Float[Tensor, "scene 24 24"] | None = None,
) -> GazePotential:
    """What the chains climb: energies in `LocalChart` at `base`, with the guide's belief where it is a prior, too.

    Convention: `sd` is in the units of the chart.
    """
    weight = float(guide.prior_weight)
    belief = weight / sd[:, None].square() if weight > 0 else None
    prior = model.prior(pyramid.size.double())
    return GazePotential(pyramid, gazes.LocalChart(base[:, None]), odds_score(model, canonical), prior, belief)


def chain_starts(
    potential: GazePotential, base: Float[Tensor, "scene 4"], sd: Float[Tensor, "scene 4"], noise: KeyedNoise
) -> Float[Tensor, "scene chain 4"]:
    """Where the chains start, in chart units: draws by sampling-importance-resampling within the mode.

    A start far out in a posterior as rough as a picture's may never come in; these begin where the mass is.
    """
    points = mode_points(base[:, None], sd[:, None], START_POINTS)
    z = points.z[:, 0]
    energy, _ = potential(z)
    return _resampled(z, -energy - points.log_q[:, 0], noise)


def adapted_starts(
    potential: GazePotential, base: Float[Tensor, "scene 4"], sd: Float[Tensor, "scene 4"], noise: KeyedNoise
) -> tuple[Float[Tensor, "scene chain 4"], StudentProposal]:
    """Where the chains start, and what the independence sampler between their trajectories proposes, in chart units.

    A Student-t is adapted to the mode from the points about it that `chain_starts` begins with and from two rounds of
    its own points, all of them weighed against the mixture that they come from (Cornuet et al. 2012), so that what is
    rare to a late round is not forgotten. Starts are drawn from the same points by sampling-importance-resampling.
    Neither starts nor leaps go to what would be another mode.

    Convention: `sd` is in the units of the chart. There is one proposal a scene, ``(scene, 1)``, for all chains.
    """

    def within(z: Tensor) -> Tensor:
        return gazes.overlap(potential.chart.to_gaze(z), potential.chart.base) > MERGE

    def energy_within(z: Tensor) -> Tensor:
        return torch.where(within(z), potential.energy_of_many(z), math.inf)

    points = mode_points(base[:, None], sd[:, None], START_POINTS)
    z, first = points.z[:, 0], Normal(0.0, SPREAD * sd[:, None])
    energy, log_q = energy_within(z), first.log_prob(z).sum(-1)
    proposals: list[StudentProposal] = []
    for round_ in range(ROUNDS):
        proposals.append(adapted_proposal(energy, z, log_q))
        more = spread_points(proposals[-1], seed=round_)
        z, energy = torch.cat([z, more], 1), torch.cat([energy, energy_within(more)], 1)
        drawn_from = [first.log_prob(z).sum(-1), *(proposal.log_prob(z) for proposal in proposals)]
        log_q = torch.stack(drawn_from).logsumexp(0) - math.log(len(drawn_from))
    proposal = adapted_proposal(energy, z, log_q)._replace(within=within)
    return _resampled(z, -energy - log_q, noise), proposal


def odds_score(model: AttentionModel, canonical: Float[Tensor, "scene 24 24"] | None = None) -> OddsScore:
    """Energy of patches: the collapsed odds, or, with a picture of each scene's person, the odds of that person.

    A model that cannot tell people apart takes the given picture for the canonical image itself.

    Raises:
        InputError: neither a clutter model nor a picture.
    """
    with torch.no_grad():
        dense_object, dense_clutter = model.marginal_densities()
    temperature = float(model.temperature)
    if dense_clutter is None and canonical is None:
        raise InputError(
            "attending needs a clutter model, without which the likelihood prefers blank walls: fit the model with one"
        )
    if canonical is None:
        return OddsScore(dense_object, dense_clutter, temperature, edges=model.edges)
    if model.identity is not None and dense_clutter is not None:
        person = PersonRatio(model.identity, model.identity.coordinates(canonical))
        return OddsScore(dense_object, dense_clutter, temperature, person, model.edges)
    # All of the square: the image is known up to its rim.
    with torch.no_grad():
        clutter = model.clutter_density()
    return OddsScore(CanonicalDensity(density_coordinates(canonical), float(model.noise)), clutter, temperature)


def _resampled(
    z: Float[Tensor, "scene point 4"], log_weight: Float[Tensor, "scene point"], noise: KeyedNoise
) -> Float[Tensor, "scene chain 4"]:
    """One of a scene's weighted points for every chain."""
    share = torch.softmax(log_weight, -1).cumsum(-1)
    uniform = torch.from_numpy(noise.uniform(Purpose.SEARCH, 0)[0, ..., 0].copy()).to(share)
    chosen = torch.searchsorted(share, uniform).clamp(max=z.shape[1] - 1)
    return z.gather(1, chosen[..., None].expand(-1, -1, 4))


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The global generators of random numbers are afterwards as they were, those of CUDA among them."""
    before = get_rng_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        set_rng_state(before)


@_generators_kept()
def _stock(
    potential_of: Callable[[slice], GazePotential], z0: Tensor, settings: dict[str, Any], streams: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pyro's own kernels, one scene and one chain at a time (the only way they have)."""
    count, chains = z0.shape[:2]
    draws = z0.new_empty(count, chains, settings["draws"], 4)
    lp = z0.new_empty(count, chains, settings["draws"])
    diverging = torch.zeros(lp.shape, dtype=torch.bool, device=z0.device)
    diverged: list[int] = []

    def watch(kernel: Any, _params: Any, stage: str, _step: int) -> None:
        # `MCMC.diagnostics` tells the same, but asks for an R-hat first, which fewer than four draws do not have.
        if stage.startswith("Sample"):
            diverged[:] = kernel.diagnostics()["divergences"]

    seeds = (2**31 * KeyedNoise(settings["seed"], streams).uniform(Purpose.KERNEL, 0)[0, ..., 0]).astype(np.int64)
    for i in range(count):
        potential = potential_of(slice(i, i + 1))

        def energy(params: dict[str, Tensor], potential: GazePotential = potential) -> Tensor:
            return potential.energy(params["z"][None, None])[0, 0]

        for c in range(chains):
            pyro.set_rng_seed(int(seeds[i, c]))
            kernel: Kernel = settings["kernel"]
            stock = HMC if kernel == "hmc" else NUTS
            mcmc = MCMC(
                stock(potential_fn=energy, adapt_mass_matrix=False, **TRAJECTORIES[kernel]),
                num_samples=settings["draws"],
                warmup_steps=settings["warmup"],
                initial_params={"z": z0[i, c].clone()},
                disable_progbar=True,
                hook_fn=watch,
            )
            mcmc.run()
            draws[i, c] = mcmc.get_samples()["z"]
            for draw in diverged:
                diverging[i, c, draw] = True
            with torch.no_grad():
                lp[i, c] = torch.stack([-energy({"z": z}) for z in draws[i, c]])
    return draws, {"lp": lp, "diverging": diverging}


def _first_of_its_place(
    end: Float[Tensor, "scene mode 4"], found: Bool[Tensor, "scene mode"]
) -> Bool[Tensor, "scene mode"]:
    """Those found that lie elsewhere than those before them; where looks led comes before what was proposed."""
    k = end.shape[1]
    overlap = gazes.overlap(end[:, :, None], end[:, None, :]) > SAME
    first = torch.zeros_like(found)
    for j in [*range(k // 2, k), *range(k // 2)]:
        first[:, j] = found[:, j] & ~(overlap[:, j] & first).any(-1)
    return first


def _merged(end: Tensor, sd: Tensor, features: Tensor, log_weight: Tensor, path: Tensor, modes: int) -> Candidates:
    """End points that overlap become one mode (the heaviest stands for it); best first, padded to `modes`."""
    count = len(log_weight)
    overlap = (gazes.overlap(end[:, :, None], end[:, None, :]) > MERGE).cpu()
    order = log_weight.argsort(-1, descending=True)
    chosen = torch.zeros(count, modes, dtype=torch.int64, device=log_weight.device)
    valid = torch.zeros(count, modes, dtype=torch.bool, device=log_weight.device)
    for i in range(count):
        kept: list[int] = []
        for j in order[i].tolist():
            if len(kept) < modes and math.isfinite(float(log_weight[i, j])) and not bool(overlap[i, j, kept].any()):
                kept.append(j)
        chosen[i, : len(kept)] = torch.tensor(kept)
        valid[i, : len(kept)] = True

    def pick(values: Tensor) -> Tensor:
        return torch.stack([values[i, chosen[i]] for i in range(count)])

    weight = torch.where(valid, pick(log_weight), -math.inf)
    return Candidates(pick(end), pick(sd), pick(features), weight, pick(path))


@torch.no_grad()
def _promising(
    model: AttentionModel, guide: GazeGuide, pyramid: Pyramid, proposals: Proposals
) -> tuple[Proposals, list[GazeChange]]:
    """The `FOLLOWED` proposals in which one look on shows most of an object, best first.

    Also, the looks at these and at where they lead, nobody in particular being meant.
    """
    gaze = proposals.gaze.double()
    count, k = gaze.shape[:2]
    scene = torch.arange(count, device=gaze.device).repeat_interleave(k)
    v = model.dbn.to_canonical(model.dbn.core.mean.float()).expand(count * k, -1, -1)
    moved, first = guide.step(pyramid, gaze.reshape(-1, 4), v, scene)
    second = guide.look(pyramid, moved, v, scene)
    seen = guide.recognise(pyramid, moved, scene, second.recognition).to(proposals.logit).reshape(count, k)
    best = torch.where(torch.isfinite(proposals.logit), seen, -math.inf).topk(min(FOLLOWED, k), 1)
    rows = (torch.arange(count, device=gaze.device)[:, None] * k + best.indices).flatten()
    looks = [GazeChange(*(part[rows] for part in look)) for look in (first, second)]
    return Proposals(gaze.gather(1, best.indices[..., None].expand(-1, -1, 4)), best.values), looks


def _within_reach(proposals: Proposals, start: Float[Tensor, "scene 1 4"]) -> Proposals:
    """The best of those no farther from the start than `REACH` patch widths; -inf is the logit of what is missing."""
    gaze, logit = proposals.gaze.double(), proposals.logit.double()
    centre, scale, _ = gazes.parts(gaze)
    begin = gazes.parts(start)
    width = gazes.CANONICAL_SIZE * torch.maximum(scale, begin.scale)
    far = (centre - begin.centre).norm(dim=-1) > REACH * width
    best = torch.where(far, -math.inf, logit).topk(FOLLOWED, 1)
    return Proposals(gaze.gather(1, best.indices[..., None].expand(-1, -1, 4)), best.values)


def _knows_people(model: AttentionModel) -> bool:
    """Whether a given picture says whom to look for; without, it is the canonical image itself, to the pixel."""
    return model.identity is not None and model.clutter is not None


def _of_person(
    model: AttentionModel, pyramid: Pyramid, found: Candidates, canonical: Float[Tensor, "scene 24 24"], modes: int
) -> Candidates:
    """The modes weighed by whom they show."""
    with_person = integrated_odds(model, pyramid, found.gaze, found.sd, canonical)
    ratio = with_person - integrated_odds(model, pyramid, found.gaze, found.sd)
    weight = functional.logsigmoid(found.log_weight) + ratio
    return _best_first(found._replace(log_weight=weight), modes)


def _without(found: Candidates, explained: Float[Tensor, "scene 4"]) -> Candidates:
    """The modes that an explained object leaves to be explained, best first."""
    iou = gazes.overlap(found.gaze, explained[:, None])
    area, other = (gazes.parts(gaze).scale.square() for gaze in (found.gaze, explained[:, None]))
    # The intersection over the union i gives the intersection over the smaller: i / (1 + i) times the sum over it.
    share = iou / (1 + iou) * (area + other) / torch.minimum(area, other)
    weight = torch.where(share > EXPLAINED, -math.inf, found.log_weight)
    return _best_first(found._replace(log_weight=weight), weight.shape[1])


def _best_first(found: Candidates, modes: int) -> Candidates:
    order = found.log_weight.argsort(-1, descending=True)[:, :modes]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return Candidates(*(values[rows, order] for values in found))


def _floats(value: Any, name: str) -> Tensor | None:
    """What was given beside the pictures, as a floating tensor; 8-bit images in [0, 1]."""
    if value is None:
        return None
    tensor = as_tensor(value)
    if tensor is None:
        raise InputError(f"{name} is a {type(value).__name__}: give an array or tensor of numbers")
    if tensor.dtype == torch.uint8 and name == "canonical":
        return tensor.float() / 255
    return tensor if tensor.is_floating_point() else tensor.double()


def _check_reach(start: Float[Tensor, "scene 4"], size: Int[Tensor, "scene 2"], names: list[str]) -> None:
    """A start from where a picture is out of sight would be searched from in vain."""
    centre, scale, _ = gazes.parts(start.detach().cpu().double())
    width = gazes.CANONICAL_SIZE * scale
    beyond = torch.maximum(-0.5 - centre, centre - (size.flip(-1) - 0.5)).amax(-1)
    for i in ((beyond > REACH * width) | (width > REACH * size.amax(-1))).nonzero().flatten().tolist():
        height, across = size[i].tolist()
        raise InputError(
            f"start of {names[i]}: a square {float(width[i]):.4g} pixels wide about ({float(centre[i, 0]):.4g}, "
            f"{float(centre[i, 1]):.4g}) is nowhere near the picture of {height}×{across} (height × width) pixels"
        )


def _check(count: int, numbers: dict[str, Any], seed: Any, start: Any, canonical: Any, kernel: str) -> None:
    if count == 0:
        raise InputError("no pictures to attend to: give at least one")
    for name, number in numbers.items():
        least = 0 if name in ("warmup", "guide_steps") else 1
        if not isinstance(number, Integral) or number < least:
            raise InputError(f"{name}={number}: a whole number of at least {least} is needed")
    if not isinstance(seed, Integral):
        raise InputError(f"seed={seed!r}: a whole number is needed")
    if kernel not in ("batched", "hmc", "nuts"):
        raise InputError(f"kernel={kernel!r}: one of 'batched', 'hmc', 'nuts'")
    if start is not None and numbers["max_objects"] > 1:
        raise InputError(
            f"max_objects={numbers['max_objects']} from a given start: leave start away to search the scene"
        )
    if start is not None and tuple(start.shape) != (count, 4):
        raise InputError(f"start has shape {tuple(start.shape)}: needed is one gaze a picture, ({count}, 4)")
    if start is not None and not (bool(torch.isfinite(start).all()) and bool((start[:, :2].norm(dim=-1) > 0).all())):
        raise InputError("start holds a gaze that is not finite or of scale 0: give (a, b, tx, ty) with a² + b² > 0")
    if canonical is not None and tuple(canonical.shape) != (count, 24, 24):
        raise InputError(
            f"canonical has shape {tuple(canonical.shape)}: needed is one image a picture, ({count}, 24, 24)"
        )
    if canonical is not None and not bool(((canonical >= -OUTSIDE) & (canonical <= 1 + OUTSIDE)).all()):
        raise InputError("canonical holds values that are not finite or outside [0, 1]: give grey levels in [0, 1]")


def scene_pyramid(model: AttentionModel, pictures: Sequence[Tensor]) -> Pyramid:
    """Pictures as attending reads them, where the model lives."""
    device = model.dbn.core.mean.device
    return Pyramid.build([picture.to(device) for picture in pictures], smallest=SMALLEST)


def _read(pictures: Any, rows: range, device: torch.device) -> tuple[Pyramid, list[str]]:
    """The scenes at `rows`, where the model lives, and what tells their pictures from others.

    One picture after the other: what the pyramid keeps of a large one is a small part of it.
    """
    hashes: list[str] = []

    def read() -> Iterator[Tensor]:
        for i in rows:
            picture = pictures.pictures([i])[0] if hasattr(pictures, "pictures") else as_picture(pictures[i], i)
            hashes.append(picture_hash(picture))
            yield picture.to(device)

    return Pyramid.build(read(), smallest=SMALLEST), hashes
