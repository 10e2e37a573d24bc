"""Training of the guide on scenes with known gazes: dense glances, on-policy looks, changes of light and background.

Convention (the whole module): gazes in scene pixels, `foveate.model.gaze`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.inference.augmentation import blended, mirrored, on_other_background, partly_covered, relit, stretched
from foveate.inference.glance import VIEW_STEP, glance_loss, propose
from foveate.inference.guide import WINDOW, WINDOW_EXTENT, GazeChange, GazeGuide, change_chart
from foveate.inference.resume import Checkpoint
from foveate.model import gaze as gazes
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid

__all__ = ["GuideData", "train_glance", "train_looks"]

VIEW = 64
# Scenes, and pictures of clutter, whose proposals teach presence at most, and proposals of each.
WATCHED, PROPOSED = 200, 6
NLL_WEIGHT = 0.1  # of the negative log-likelihood of a change, beside the Huber loss of its mean
# Up to so many scenes every window is changed into what they might have shown. On scenes of the train splits that
# nothing was trained on, that helped where eighty scenes were learned from and harmed where seven hundred were.
FEW = 150

# Called after every step with the step's number, the number of steps and the loss.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class GuideData:
    """What the guide learns from.

    Attributes:
        pyramid: the scenes (coarse levels suffice: the guide reads at scale × 1.5 and above).
        gaze: ``(scene, 4)`` true gazes, scene pixels.
        canonical: ``(scene, 24, 24)`` crops at the true gazes, in [0, 1].
        clutter: scenes without the object, or None to use windows that miss it.
        person: ``(scene,)`` a number for each person, or None; another picture of the same person then serves as v.
    """

    pyramid: Pyramid
    gaze: Tensor
    canonical: Tensor
    clutter: Pyramid | None = None
    person: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.pyramid) == 0 or self.gaze.shape != (len(self.pyramid), 4):
            raise InputError(
                f"{len(self.pyramid)} scenes and gazes of shape {tuple(self.gaze.shape)}: "
                "the guide learns from at least one scene and needs one gaze (a, b, tx, ty) for each"
            )

    def draw(self, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """Indices of `n` scenes, drawn with replacement."""
        return torch.multinomial(torch.ones(len(self.pyramid)), n, replacement=True, generator=generator)

    def instead(self, window: Tensor, unseen: Tensor, generator: torch.Generator) -> Tensor:
        """Windows of the scenes, and in their place what no scene shows: the more often, the fewer scenes there are."""
        share = min(1.0, FEW / len(self.pyramid))
        chosen = torch.rand(len(window), generator=generator) < share
        return torch.where(chosen[:, None, None], unseen, window.to(unseen.dtype))


def train_glance(
    guide: GazeGuide,
    data: GuideData,
    *,
    steps: int,
    batch: int = 48,
    rate: float = 3e-3,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Train ``guide.glance`` on square views of the scenes; returns the mean loss of the last tenth of the steps.

    With a `checkpoint` it goes on from the state that is there, to the same result.

    Convention: views are 64×64 at 1.5 canonical pixels a pixel, so four patches wide, around random gazes near the
    object, far from it, and (a quarter of the batch) on clutter.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(guide.parameters()).device
    extent = VIEW * VIEW_STEP / gazes.CANONICAL_SIZE
    quarter = batch // 4
    optimiser, schedule = _optimiser(guide.glance, rate, steps)
    checkpoint = checkpoint or Checkpoint()
    losses, _ = checkpoint.begin("glance", guide.glance, optimiser, generator)
    guide.glance.train()
    for step in range(len(losses), steps):
        scene = data.draw(batch, generator)
        truth = data.gaze[scene]
        view = _random_views(truth, data.pyramid.size[scene], generator)
        window = data.pyramid.extract(view, VIEW, extent, scene)
        relative = gazes.compose(gazes.inverse(view), truth)
        target = relative.float()
        present = torch.ones(batch)
        other = None
        if data.clutter is not None:
            other = _clutter_windows(data.clutter, batch, VIEW, extent, generator)
            window = on_other_background(window, other, target, extent, 0.3, generator)
        second = data.draw(batch, generator)
        same_place = gazes.compose(data.gaze[second].double(), gazes.inverse(relative))
        unseen = blended(window, data.pyramid.extract(same_place, VIEW, extent, second), target, generator)
        window = data.instead(window, _unseen(unseen, other, target, generator), generator)
        if other is not None:
            window[:quarter], present[:quarter] = other[:quarter].float(), 0.0
        window, target, _ = mirrored(window, target, None, generator)
        output = guide.glance(relit(window.float(), generator).to(device))
        loss = glance_loss(output, target.to(device), present.to(device))
        losses.append(_descend(loss, guide.glance, optimiser, schedule, step))
        checkpoint.keep("glance", guide.glance, optimiser, generator, losses, step == steps - 1)
        if progress:
            progress(step, steps, losses[-1])
    guide.glance.eval()
    return _tail_mean(losses)


def train_looks(
    guide: GazeGuide,
    data: GuideData,
    *,
    steps: int,
    batch: int = 96,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Train the guide's window network; returns the mean loss of the last tenth of the steps.

    With a `checkpoint` it goes on from the state that is there, to the same result.

    A third of each batch starts where the network's own last moves ended (on-policy), the rest at small and wide
    perturbations of the truth; a third more windows teach presence: on clutter and off the object, half of them where
    the glance would look in vain and where the looks lead from there. v is the mean canonical image, the object's own
    crop, or another picture of the same person (of anybody, where persons are unknown).
    Loss: Huber on the mean, plus `NLL_WEIGHT` × negative log-likelihood, plus cross-entropy of presence.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    device = next(guide.parameters()).device
    mean_canonical = data.canonical.mean(0)
    own = batch // 3
    off = batch // 6
    modules = nn.ModuleList([guide.canonical, guide.votes])
    optimiser, schedule = _optimiser(modules, rate, steps)
    guide.eval()
    distractors = _Distractors.found(guide, data)
    checkpoint = checkpoint or Checkpoint()
    losses, further = checkpoint.begin("look", modules, optimiser, generator)
    pool = (further["scene"], further["start"]) if further else None
    distractors.now = further.get("distractors", distractors.now)
    guide.train()
    guide.glance.eval()
    for step in range(len(losses), steps):
        scene = data.draw(batch, generator)
        start = _perturbed(data.gaze[scene], generator)
        if pool is not None:
            scene[:own], start[:own] = pool[0], pool[1]
        truth = data.gaze[scene]
        window = data.pyramid.extract(start, WINDOW, WINDOW_EXTENT, scene)
        target = change_chart(start).to_chart(truth).float()
        relative = gazes.compose(gazes.inverse(start), truth).float()
        canonical = _canonical_images(data, scene, mean_canonical, generator).float()
        if data.clutter is not None:
            missed = _clutter_windows(data.clutter, batch, WINDOW, WINDOW_EXTENT, generator)
            window = on_other_background(window, missed, relative, WINDOW_EXTENT, 0.25, generator)
            unseen = _unseen(window, missed, relative, generator)
        else:
            missed = _missed_windows(data, off, generator)
            unseen = _unseen(window, None, relative, generator)
        window = data.instead(window, unseen, generator)
        window, target, shown = mirrored(window, target, canonical, generator)
        assert shown is not None
        vain, rows = distractors.windows(off, generator)
        window = torch.cat([window, missed[:off], vain]).float()
        shown = torch.cat([shown, shown[: off + len(rows)]])
        change = guide(relit(window, generator).to(device), relit(shown, generator).to(device))
        loss = _look_loss(change, target.to(device), batch)
        losses.append(_descend(loss, modules, optimiser, schedule, step))
        with torch.no_grad():
            # The windows above may have been mirrored or moved to clutter: the next on-policy gazes are read off the
            # scenes themselves.
            guide.eval()
            moved, _ = guide.step(data.pyramid, start[:own], canonical[:own], scene[:own])
            distractors.move(guide, rows, mean_canonical, generator)
            guide.train()
            guide.glance.eval()
            fresh = torch.rand(own, generator=generator) < 0.3
            lost = gazes.overlap(moved, truth[:own]) < 0.02
            # Looks that are over make room for other scenes.
            over = fresh | lost
            following = torch.where(over, data.draw(own, generator), scene[:own])
            again = _perturbed(data.gaze[following], generator)
            pool = following, torch.where(over[:, None], again, moved.to(again.dtype))
        further = {"scene": pool[0], "start": pool[1], "distractors": distractors.now}
        checkpoint.keep("look", modules, optimiser, generator, losses, step == steps - 1, **further)
        if progress:
            progress(step, steps, losses[-1])
    guide.eval()
    return _tail_mean(losses)


def _unseen(window: Tensor, other: Tensor | None, target: Tensor, generator: torch.Generator) -> Tensor:
    """The windows with objects of other shapes, partly hidden where there is clutter to hide them."""
    return stretched(window if other is None else partly_covered(window, other, target, generator), target, generator)


class _Distractors:
    """Gazes without the object that the glance proposes, and where the looks lead from them: what presence must refuse.

    Convention: gazes in scene pixels of `pyramid`, which holds labelled scenes and clutter.
    """

    def __init__(self, pyramid: Pyramid, scene: Tensor, gaze: Tensor, truth: Tensor):
        self.pyramid, self.scene, self.gaze, self.truth = pyramid, scene, gaze, truth
        self.now = gaze.clone()

    @classmethod
    def found(cls, guide: GazeGuide, data: GuideData) -> "_Distractors":
        """Proposals on up to `WATCHED` labelled scenes and pictures of clutter, without those that see the object."""
        labelled = data.pyramid[torch.arange(min(WATCHED, len(data.pyramid)))]
        pyramids, truths = [labelled], [data.gaze[: len(labelled)].double()]
        if data.clutter is not None:
            pyramids.append(data.clutter[torch.arange(min(WATCHED, len(data.clutter)))])
            truths.append(torch.full((len(pyramids[1]), 4), math.nan, dtype=torch.float64))
        gaze = torch.cat([propose(guide.glance, pyramid, PROPOSED).gaze.double() for pyramid in pyramids])
        truth = torch.cat(truths)[:, None].expand_as(gaze)
        # A comparison with the unknown gaze of clutter is never true, so clutter always misses.
        misses = ~(gazes.overlap(gaze, truth) > 0.05)
        scene = torch.arange(len(gaze))[:, None].expand(misses.shape)
        return cls(Pyramid.concatenate(pyramids), scene[misses], gaze[misses], truth[misses])

    def windows(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Up to `n` windows and the rows they come from."""
        rows = torch.randperm(len(self.now), generator=generator)[:n]
        return self.pyramid.extract(self.now[rows], WINDOW, WINDOW_EXTENT, self.scene[rows]), rows

    def move(self, guide: GazeGuide, rows: Tensor, canonical: Tensor, generator: torch.Generator) -> None:
        """Follow the looks from these rows; four in ten, and those that have come upon the object, begin again."""
        if len(rows) == 0:
            return
        v = canonical.float().expand(len(rows), -1, -1)
        moved, _ = guide.step(self.pyramid, self.now[rows], v, self.scene[rows])
        again = torch.rand(len(rows), generator=generator) < 0.4
        again |= gazes.overlap(moved.double(), self.truth[rows]) > 0.05
        self.now[rows] = torch.where(again[:, None], self.gaze[rows], moved.double())


def _look_loss(change: GazeChange, target: Tensor, objects: int) -> Tensor:
    mean, log_sd = change.mean[:objects], change.log_sd[:objects]
    # In reach: the object's centre inside the window and its scale within a factor 2.5. Beyond, there is nothing to
    # be learned.
    reach = ((target[:, :2].abs() < 3).all(-1) & (target[:, 2].abs() < 0.95)).float()
    huber = functional.smooth_l1_loss(mean, target, reduction="none", beta=0.1).sum(-1)
    residual = (target - mean) * torch.exp(-log_sd)
    # A Student-like cap keeps one impossible scene from steering the sds.
    nll = (log_sd + 0.5 * residual.square().clamp(max=25.0)).sum(-1)
    weight = reach.sum().clamp(min=1.0)
    present = torch.cat([reach, reach.new_zeros(change.presence.shape[0] - objects)])
    presence = functional.binary_cross_entropy_with_logits(change.presence, present)
    return ((huber + NLL_WEIGHT * nll) * reach).sum() / weight + 0.3 * presence


def _optimiser(module: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=1e-3)
    warm = max(1, min(100, steps // 10))

    def schedule(step: int) -> float:
        return rate * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)

    return optimiser, schedule


def _descend(
    loss: Tensor, module: nn.Module, optimiser: torch.optim.Optimizer, schedule: Callable[[int], float], step: int
) -> float:
    for group in optimiser.param_groups:
        group["lr"] = schedule(step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 5.0)
    optimiser.step()
    return float(loss.detach())


def _tail_mean(losses: list[float]) -> float:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _uniform(shape: tuple[int, ...] | int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _perturbed(truth: Tensor, generator: torch.Generator) -> Tensor:
    """Gazes near the truth: 35 % within 0.3 patches, ×0.8–1.25 and 12°, the rest within a patch, ×0.5–1.9 and 35°."""
    n = truth.shape[0]
    small = torch.rand(n, generator=generator) < 0.35
    reach = torch.where(small, 0.3, 1.0).double()
    offset = _uniform((n, 2), -24.0, 24.0, generator) * reach[:, None]
    log_scale = torch.where(small, _uniform(n, -0.22, 0.22, generator), _uniform(n, -0.69, 0.64, generator))
    rotation = _uniform(n, -0.6, 0.6, generator) * torch.where(small, 0.35, 1.0)
    # The offset is in the truth's pixels: for a gaze at double scale one patch is half as far in its own pixels.
    return gazes.compose(truth.double(), gazes.from_parts(offset, torch.exp(log_scale), rotation))


def _random_views(truth: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """Views with the object anywhere in them, most at about its scale, some at any scale; and views of anywhere."""
    n = truth.shape[0]
    kind = torch.rand(n, generator=generator)
    log_scale = torch.where(kind < 0.65, _uniform(n, -0.45, 0.45, generator), _uniform(n, -1.6, 1.6, generator))
    rotation = 0.25 * torch.randn(n, generator=generator, dtype=torch.float64)
    local = gazes.from_parts(_uniform((n, 2), -44.0, 44.0, generator), torch.exp(log_scale), rotation)
    view = gazes.compose(truth.double(), gazes.inverse(local))
    view = view.clone()
    anywhere = (torch.rand(n, 2, generator=generator, dtype=torch.float64) * (size.flip(-1) - 1)).double()
    view[:, 2:] = torch.where((kind > 0.85)[:, None], anywhere, view[:, 2:])
    return view


def _clutter_windows(clutter: Pyramid, n: int, size: int, extent: float, generator: torch.Generator) -> Tensor:
    """Windows of clutter; half of them mixed with another, turned by a right angle, or as negatives.

    A few photographs must stand for all that is not the object: textures that nobody photographed are clutter, too.
    """
    scene = torch.randint(len(clutter), (2 * n,), generator=generator)
    both = clutter.extract(random_gazes(clutter.size[scene], generator), size, extent, scene)
    window, other = both[:n], both[n:]

    def chosen(share: float) -> Tensor:
        return (torch.rand(n, generator=generator) < share)[:, None, None]

    weight = torch.rand(n, generator=generator).to(window.dtype)[:, None, None]
    window = torch.where(chosen(0.25), weight * window + (1 - weight) * other, window)
    window = torch.where(chosen(0.25), window.transpose(-2, -1), window)
    return torch.where(chosen(0.25), 1 - window, window)


def _missed_windows(data: GuideData, n: int, generator: torch.Generator) -> Tensor:
    """Windows of the labelled scenes whose middle misses the object: their overlap with it is the least among 4 n."""
    scene = data.draw(4 * n, generator)
    gaze = random_gazes(data.pyramid.size[scene], generator)
    missed = gazes.overlap(gaze, data.gaze[scene].double()) < 0.02
    order = torch.argsort(missed.float(), descending=True, stable=True)[:n]
    return data.pyramid.extract(gaze[order], WINDOW, WINDOW_EXTENT, scene[order])


def random_gazes(size: Int[Tensor, "n 2"], generator: torch.Generator) -> Float[Tensor, "n 4"]:
    """Gazes anywhere in pictures of `size` (height, width): patch width 0.08–0.8 shorter sides, ±20°."""
    n = size.shape[0]
    shorter = size.amin(-1).double()
    scale = torch.exp(_uniform(n, math.log(0.08), math.log(0.8), generator)) * shorter / gazes.CANONICAL_SIZE
    centre = torch.rand(n, 2, generator=generator, dtype=torch.float64) * (size.flip(-1) - 1)
    return gazes.from_parts(centre, scale, _uniform(n, -0.35, 0.35, generator))


def _canonical_images(data: GuideData, scene: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    n = scene.shape[0]
    kind = torch.rand(n, generator=generator)
    other = torch.randint(len(data.pyramid), (n,), generator=generator)
    if data.person is not None:
        same = (data.person[scene][:, None] == data.person[None, :]).float()
        other = torch.multinomial(same, 1, generator=generator)[:, 0]
    images = torch.where((kind < 0.7)[:, None, None], data.canonical[scene], data.canonical[other])
    return torch.where((kind < 0.4)[:, None, None], mean, images)
