"""Training of the prior over canonical images: a deep belief network that watches itself and stops.

The gated net is trained in three stages. (1) A covariance from few faces: the sample covariance is mixed with that of a
local regression of each pixel on its neighbours, whose moments are drawn towards stationary ones, alike at all places;
how much, held-out people decide. (2) The whitened residuals of *held-out* people (cross-fitting: each fold is whitened
by the others, so that scales and tails are those of new faces) train the local filters, the latent scales and the
units of the layer, by ascent of the bound with independent units. (3) Layer and top RBM rise together on the same
bound, the model's side of the RBM's gradient by fast persistent contrastive divergence. At every check the bound on
validation crops is taken, with its log Z, and the best net seen is the one returned.
"""

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.inference.ais import log_z
from foveate.model.dbn import DeepBeliefNet, DiagonalLayer, GatedLayer, contrast_groups
from foveate.model.density import EllipticalDensity
from foveate.model.errors import InputError
from foveate.model.patch import density_coordinates, from_density_coordinates
from foveate.model.rbm import (
    BernoulliRBM,
    GaussianRBM,
    bernoulli,
    contrastive_divergence,
    entropy,
    fantasy_chains,
    fast_persistent_contrastive_divergence,
    set_gradients,
)

__all__ = [
    "Covariance",
    "Monitor",
    "augmented_coordinates",
    "fit_core",
    "fit_covariance",
    "people_folds",
    "train_dbn",
]

SIDE = 24
PIXELS = SIDE * SIDE
DIMENSION = PIXELS - 1

FOLDS = 5
FEWEST_PICTURES = 10
HELD_OUT = 0.15  # share of the pictures kept for validation when none are given
BATCH = 128
CHECKS = 12  # of the validation bound in each stage
PATIENCE = 4  # checks in a row without a better bound that end a stage
LOG_Z_ERROR = 0.2  # nats, aimed at during training; the returned net's is FINAL_LOG_Z_ERROR
FINAL_LOG_Z_ERROR = 0.05
COARSE_LOG_Z_ERROR = 1.0  # of the diagonal net during training; the returned one's is LOG_Z_ERROR

# What held-out people choose among. Neighbourhood of the regression in pixels, weight of the stationary moments as a
# multiple of the local ones', share of the sample covariance in the mixture, inflation of the covariance, degrees of
# freedom.
RADII = (3, 5)
STATIONARY = (0.03, 0.3, 1.0, 3.0)
SAMPLE_SHARE = (0.2, 0.4, 0.6)
INFLATION = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0)
DEGREES_OF_FREEDOM = (4.0, 6.0, 8.0, 12.0, 20.0)

FILTER_RADIUS = 5.0  # pixels: how far from its pixel a whitening filter is adjusted
BLOCK = 2  # pixels: side of the blocks that share a latent scale
DIRECTIONS = 20  # principal directions that the shape units act in
CHAINS = 256  # persistent chains of the top

# Standard deviations of the normal priors on what the layer learns (its adjustments in units of whitened residuals,
# its gates and scales in nats), weighed against the number of pictures: with few pictures the net stays near its
# regularised Gaussian.
ADJUST_SD = 0.05
MIX_SD = 0.2
SHIFT_SD = 1.0
GATE_SD = 1.0
RECOGNITION_SD = 1.0
SCALE_SD = 1.0
WEIGHT_DECAY = 1e-3  # of the diagonal layer, by contrastive divergence
WEIGHT_SD = 0.3  # of the same, by ascent of the bound
SIGMA_FLOOR = 0.2  # of the paper's diagonal layer; below it the hidden units no longer mix


Form = Literal["gated", "diagonal"]


class Monitor(NamedTuple):
    """What a check of the training saw; nats per crop unless said otherwise.

    Attributes:
        stage: ``"layer"`` or ``"top"``.
        step: steps done in the stage.
        bound: mean bound on the validation crops, log Z included.
        train_bound: the same on up to 256 training crops.
        free_energy_gap: mean free energy of the top on validation minus on training units: growth is overfitting.
        activation: mean of the recognition probabilities on validation.
        effective_filters: ``(Σ s)² / Σ s²`` of the squared lengths of the units' effects: how many units do something.
        log_z_error: standard error of log Z.
    """

    stage: Literal["layer", "top"]
    step: int
    bound: float
    train_bound: float
    free_energy_gap: float
    activation: float
    effective_filters: float
    log_z_error: float


# Called after every check with the share of the work done, in [0, 1], and what the check saw.
Progress = Callable[[float, Monitor], None]


class Covariance(NamedTuple):
    """A regularised mean and covariance of density coordinates and the settings that held-out people chose.

    Attributes:
        mean: ``(575,)``.
        covariance: ``(575, 575)``, float64, as estimated: on new people squared distances are `inflation` times larger.
        radius: neighbourhood of the regression, pixels.
        stationary: weight of the stationary moments.
        share: of the sample covariance.
        inflation: factor on the covariance that suits held-out people.
        nu: degrees of freedom that suit held-out people.
        score: mean held-out log-density of the Student-t, nats.
    """

    mean: Tensor
    covariance: Tensor
    radius: int
    stationary: float
    share: float
    inflation: float
    nu: float
    score: float


def augmented_coordinates(crops: Float[Tensor, "picture version 24 24"]) -> Float[Tensor, "picture twice 575"]:
    """Density coordinates of all versions of each crop and of their mirror images."""
    return density_coordinates(torch.cat([crops, crops.flip(-1)], 1))


@torch.no_grad()
def fit_covariance(y: Float[Tensor, "picture version 575"], fold: Int[Tensor, "picture"]) -> Covariance:
    """The best mixture of sample and neighbourhood covariance for people who are not in the sample.

    Args:
        y: density coordinates; versions of one picture belong together.
        fold: number of the fold of each picture; every fold is scored by what the others give.

    Returns:
        The covariance of all pictures under the settings with the highest held-out Student-t log-density.
    """
    moments = [_moments(y[fold != f]) for f in fold.unique().tolist()]
    held = [y[fold == f].double() for f in fold.unique().tolist()]
    best: tuple[float, int, float, float, float, float] | None = None
    for radius in RADII:
        for stationary in STATIONARY:
            neighbourhood = [_neighbourhood_covariance(covariance, radius, stationary) for _, covariance in moments]
            for share in SAMPLE_SHARE:
                squares, log_dets = [], []
                for (mean, covariance), local, new in zip(moments, neighbourhood, held, strict=True):
                    factor = torch.linalg.cholesky(share * covariance + (1 - share) * local)
                    # One version of each picture is enough to choose by.
                    deviation = torch.linalg.solve_triangular(factor, (new[:, 0] - mean).T, upper=False)
                    squares.append((deviation**2).sum(0))
                    log_dets.append((-factor.diagonal().log().sum()).expand(len(new)))
                score, inflation, nu = _best_student(torch.cat(squares), torch.cat(log_dets))
                if best is None or score > best[0]:
                    best = score, radius, stationary, share, inflation, nu
    assert best is not None
    score, radius, stationary, share, inflation, nu = best
    mean, covariance = _mixed(y, radius, stationary, share)
    return Covariance(mean, covariance, radius, stationary, share, inflation, nu, score)


def train_dbn(
    crops: Float[Tensor, "picture version 24 24"],
    *,
    people: Int[Tensor, "picture"] | None = None,
    validation: Float[Tensor, "held 24 24"] | None = None,
    form: Form = "gated",
    shape_units: int = 32,
    contrast_units: int = 48,
    diagonal_units: int = 1024,
    top_units: int | None = None,
    steps: int = 1200,
    seed: int = 0,
    progress: Progress | None = None,
) -> DeepBeliefNet:
    """Train the prior on crops of the object at known gazes.

    Args:
        crops: grey levels in [0, 1]; versions are jittered crops of the same picture, the exact one first. Mirror
            images are added here.
        people: a number for the person in each picture, so that folds do not share people; by default neighbours in the
            list stay together.
        validation: exact crops of other people by which the training stops; by default 15 % of the pictures (whole
            people) are set aside.
        form: ``"gated"`` (full covariance, `GatedLayer`) or ``"diagonal"`` (the paper's, `DiagonalLayer`).
        shape_units: units of the gated layer that move the mean.
        contrast_units: units of the gated layer that gate scales.
        diagonal_units: units of the diagonal layer.
        top_units: units of h2; by default 64 over the gated layer and 256 over the diagonal one.
        steps: of ascent at most, in the layer's stage; the top's has half as many. 1000 take about half a minute on
            one core. The diagonal net has a quarter as many of contrastive divergence, then so many of ascent, layer
            and top together; 1000 take about two minutes.
        seed: of every random number used.
        progress: called after every check.

    Returns:
        The net with the best validation bound seen, its log Z set. It never is a diverged one: at worst it is the
        state before the first step, an elliptical density with local scales.

    Raises:
        InputError: for fewer than 10 pictures, for crops that are not finite, or for another `form`.
    """
    if form not in get_args(Form):
        raise InputError(f"form {form!r}: there are {' and '.join(get_args(Form))}")
    if len(crops) < FEWEST_PICTURES:
        raise InputError(f"{len(crops)} crops to train the prior on: give at least {FEWEST_PICTURES}")
    if not bool(torch.isfinite(crops).all()):
        raise InputError("crops with pixels that are not finite: leave those pictures out")
    generator = torch.Generator().manual_seed(seed)
    group = _groups(len(crops), people, crops.device)
    if validation is None:
        held = _set_aside(group, generator)
        crops, validation, group = crops[~held], crops[held, 0], group[~held]
    y, new = augmented_coordinates(crops), density_coordinates(validation)
    # A large top takes many temperatures, and a bound of hundreds of nats wants them no closer.
    patient = form == "diagonal"
    watch = _Watch(new, progress, generator, COARSE_LOG_Z_ERROR if patient else LOG_Z_ERROR)
    if form == "diagonal":
        net = _train_diagonal(y, diagonal_units, top_units or 256, steps, watch, generator)
    else:
        net = _train_gated(y, _folds(group), (shape_units, contrast_units, top_units or 64), steps, watch, generator)
    error = LOG_Z_ERROR if patient else FINAL_LOG_Z_ERROR
    result = log_z(net.top, base=_base(net, y), target_error=error, generator=generator)
    net.set_log_z(result.estimate, result.standard_error)
    return net.requires_grad_(False)


class _Watch:
    """Keeps the best net by its validation bound and says when a stage has ended."""

    def __init__(
        self, validation: Tensor, progress: Progress | None, generator: torch.Generator, log_z_error: float
    ) -> None:
        self.validation, self.progress, self.generator = validation, progress, generator
        self.log_z_error = log_z_error
        self.best, self.state, self.since = -math.inf, {}, 0

    def begin(self) -> None:
        """A stage begins: patience is restored, the best so far stays."""
        self.since = 0

    @torch.no_grad()
    def check(self, net: DeepBeliefNet, stage: Literal["layer", "top"], step: int, exact: Tensor, share: float) -> bool:
        """Score the net; True when the stage should end."""
        batch = exact[torch.randperm(len(exact), generator=self.generator)[:256].to(exact.device)]
        q, on_batch = net.infer_hidden(self.validation), net.infer_hidden(batch)
        if not all(bool(torch.isfinite(value).all()) for value in net.parameters()):
            return True
        if float(net.top.weight.abs().max()) == 0:
            net.set_log_z(float(net.top.path_log_z(net.top.visible_bias)), 0.0)
        else:
            base = torch.logit(on_batch.mean(0).clamp(0.01, 0.99))
            result = log_z(net.top, base=base, target_error=self.log_z_error, generator=self.generator)
            net.set_log_z(result.estimate, result.standard_error)
        error = float(net.log_z_se)
        bound = float(net.log_prob_bound(self.validation, q).mean())
        monitor = Monitor(
            stage,
            step,
            bound,
            float(net.log_prob_bound(batch, on_batch).mean()),
            float(net.top.free_energy(q).mean() - net.top.free_energy(on_batch).mean()),
            float(q.mean()),
            _effective_filters(net),
            error,
        )
        if self.progress is not None:
            self.progress(share, monitor)
        # A bound is only better if it is so beyond the error of log Z.
        if math.isfinite(bound) and bound - 2 * error > self.best:
            self.best, self.state, self.since = bound - 2 * error, copy.deepcopy(net.state_dict()), 0
        else:
            self.since += 1
        return not math.isfinite(bound) or self.since >= PATIENCE

    def restore(self, net: DeepBeliefNet) -> None:
        """Put the best state back."""
        net.load_state_dict(self.state)


def people_folds(
    count: int, people: Int[Tensor, "picture"] | None, device: torch.device | str = "cpu"
) -> Int[Tensor, "picture"]:
    """The number of each picture's fold, of `FOLDS` at most: pictures of a person, or neighbours, stay together."""
    return _folds(_groups(count, people, torch.device(device)))


def fit_core(crops: Float[Tensor, "picture version 24 24"], people: Int[Tensor, "picture"] | None) -> EllipticalDensity:
    """The closed form that `train_dbn` begins with, alone: in a few seconds, where the net takes a minute."""
    y = augmented_coordinates(crops)
    found = fit_covariance(y, people_folds(len(y), people, y.device))
    return _core(found, found.mean.to(y.dtype))


def _core(found: Covariance, mean: Tensor) -> EllipticalDensity:
    return EllipticalDensity(mean, found.inflation * found.covariance, found.nu)


def _train_gated(
    y: Tensor, fold: Tensor, units: tuple[int, int, int], steps: int, watch: _Watch, generator: torch.Generator
) -> DeepBeliefNet:
    shape_units, contrast_units, top_units = units
    found = fit_covariance(y, fold)
    mean, root, directions = (part.to(y.dtype) for part in (found.mean, *_local_root(found.covariance)))
    core = _core(found, mean)
    layer = GatedLayer(shape_units, contrast_units, DIRECTIONS, contrast_groups(SIDE, BLOCK))
    net = DeepBeliefNet(layer, BernoulliRBM(layer.hidden, top_units), core).to(device=y.device, dtype=y.dtype)
    layer.set_analysis(mean, root, directions)
    with torch.no_grad():
        for value, scale in ((layer.gate, 0.05), (layer.shift, 0.3), (layer.recognition, 0.05)):
            value.copy_(scale * torch.randn(value.shape, generator=generator, dtype=y.dtype).to(y.device))
        # Sparse units: most are off for most faces, so that each has something of its own to say.
        layer.recognition_bias.fill_(-1.0)
        net.top.visible_bias.fill_(-1.0)
        layer.log_scale.fill_(0.5 * math.log(found.inflation))
    residuals, log_dets = _cross_fitted(y, fold, found)
    _climb_layer(net, y[:, 0], residuals, log_dets, steps, watch, generator)
    # The filters rest from here on, so that the residuals are known once and for all.
    filters = layer.analysis.double() @ torch.linalg.inv(root.double())
    _climb_top(net, y[:, 0], residuals @ filters.to(y.dtype).T, max(1, steps // 2), watch, generator)
    return net


def _climb_layer(
    net: DeepBeliefNet,
    exact: Tensor,
    residuals: Tensor,
    log_dets: Tensor,
    steps: int,
    watch: _Watch,
    generator: torch.Generator,
) -> None:
    """Stage two: filters, scales and units of the layer ascend the bound with independent units."""
    layer, top = net.layer, net.top
    assert isinstance(layer, GatedLayer)
    bias, root, directions = layer.bias.clone(), layer.analysis.clone(), layer.directions.clone()
    near = _near(FILTER_RADIUS).to(root)
    identity = torch.eye(DIMENSION, dtype=root.dtype, device=root.device)
    # Filters change among neighbours (adjust) and among the leading principal directions (mix).
    adjust, mix = nn.Parameter(torch.zeros_like(root)), nn.Parameter(directions.new_zeros(DIRECTIONS, DIRECTIONS))

    def change() -> Tensor:
        return identity + near * adjust + directions @ mix @ directions.T

    groups = [
        {"params": [*layer.parameters(), top.visible_bias], "lr": 5e-3},
        {"params": [adjust], "lr": 1e-3},
        {"params": [mix], "lr": 2e-2},
    ]
    optimiser = torch.optim.Adam(groups)
    schedule = _one_cycle(optimiser, steps)
    watch.begin()
    for step in range(steps + 1):
        if step % max(1, steps // CHECKS) == 0:
            with torch.no_grad():
                layer.set_analysis(bias, change() @ root, directions)
            if watch.check(net, "layer", step, exact, 0.1 + 0.6 * step / steps):
                break
        index = torch.randint(len(residuals), (BATCH,), generator=generator).to(root.device)
        filters = change()
        e = residuals[index] @ filters.T
        q = layer.recognise_residual(e)
        # The units' cost is phased in: at full cost from the start most would be silenced before they had learned to
        # speak.
        cost = min(1.0, 2 * step / steps)
        code = entropy(q) - top.free_energy(q) - top.path_log_z(top.visible_bias)
        log_det = torch.linalg.slogdet(filters)[1] + log_dets[index]
        bound = layer.expected_residual_log_prob(e, q) + log_det + cost * code
        if not bool(torch.isfinite(bound).all()):
            break
        penalty = _penalty(layer) + _half_square(near * adjust, ADJUST_SD) + _half_square(mix, MIX_SD)
        optimiser.zero_grad()
        (penalty / len(exact) - bound.mean()).backward()
        optimiser.step()
        schedule.step()
    watch.restore(net)


def _climb_top(
    net: DeepBeliefNet, exact: Tensor, e: Tensor, steps: int, watch: _Watch, generator: torch.Generator
) -> None:
    """Stage three: the top RBM and the layer's units and scales ascend the bound together.

    A gated layer is given residuals, whose filters rest; a diagonal one the coordinates themselves.
    """
    layer, top = net.layer, net.top
    gated = isinstance(layer, GatedLayer)
    recognise = layer.recognise_residual if gated else layer.recognise
    expected = layer.expected_residual_log_prob if gated else layer.expected_log_prob
    with torch.no_grad():
        noise = torch.randn(top.weight.shape, generator=generator, dtype=e.dtype)
        top.weight.copy_(0.02 * noise.to(e.device))
        start = recognise(e[torch.randint(len(e), (CHAINS,), generator=generator).to(e.device)])
    chains = fantasy_chains(top, bernoulli(start, generator))
    # A thousand units of the diagonal layer, all moved at once, move the top farther than eighty.
    rates = 1e-3, 1e-2 if gated else 2e-3
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip((layer, top), rates, strict=True)]
    optimiser = torch.optim.Adam(groups)
    schedule = _one_cycle(optimiser, steps)
    watch.begin()
    for step in range(steps + 1):
        if step % max(1, steps // CHECKS) == 0 and watch.check(net, "top", step, exact, 0.7 + 0.3 * step / steps):
            break
        batch = e[torch.randint(len(e), (BATCH,), generator=generator).to(e.device)]
        q = recognise(batch)
        bound = expected(batch, q) + entropy(q) - top.free_energy(q)
        if not bool(torch.isfinite(bound).all()):
            break
        optimiser.zero_grad()
        (_penalty(layer) / len(exact) - bound.mean()).backward()
        gradient, chains = fast_persistent_contrastive_divergence(
            top, q.detach(), chains, fast_rate=0.02, generator=generator
        )
        set_gradients(top, gradient)
        optimiser.step()
        schedule.step()
    watch.restore(net)


def _penalty(layer: GatedLayer | DiagonalLayer) -> Tensor:
    """Minus the log-density of the layer's parameters under their normal priors, up to a constant; nats."""
    if isinstance(layer, DiagonalLayer):
        # What a unit moves each coordinate by, in units of its own standard deviation.
        return _half_square(layer.sigma[:, None] * layer.weight, WEIGHT_SD)
    return (
        _half_square(layer.shift, SHIFT_SD)
        + _half_square(layer.gate, GATE_SD)
        + _half_square(layer.recognition, RECOGNITION_SD)
        + _half_square(layer.log_scale - layer.log_scale.mean(), SCALE_SD)
        + _half_square(layer.log_excess - layer.log_excess.mean(), SCALE_SD)
    )


def _half_square(value: Tensor, sd: float) -> Tensor:
    return 0.5 * (value**2).sum() / sd**2


def _one_cycle(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Rates that rise for 15 % of the steps to those given and then fall to almost nothing."""
    rates = [group["lr"] for group in optimiser.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps + 1, pct_start=0.15)


def _train_diagonal(
    y: Tensor, units: int, top_units: int, steps: int, watch: _Watch, generator: torch.Generator
) -> DeepBeliefNet:
    data = y.flatten(0, 1)
    rbm = GaussianRBM(DIMENSION, units, dtype=y.dtype).to(y.device)
    rbm.randomise(0.01, generator)
    with torch.no_grad():
        rbm.visible_bias.copy_(data.mean(0))
        rbm.log_sigma.fill_(math.log(0.6))
        rbm.hidden_bias.fill_(-2.0)
    layer, top = DiagonalLayer(units), BernoulliRBM(units, top_units)
    covariance = torch.cov(data.double().T) + 1e-3 * torch.eye(DIMENSION, dtype=torch.float64, device=y.device)
    net = DeepBeliefNet(layer, top, EllipticalDensity(data.mean(0), covariance, 12.0)).to(
        device=y.device, dtype=y.dtype
    )

    def adopt() -> None:
        layer.load_state_dict(rbm.state_dict())
        with torch.no_grad():
            mean = layer.recognise(data[:: max(1, len(data) // 2000)]).mean(0)
            top.visible_bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))

    optimiser = torch.optim.Adam(rbm.parameters(), 1e-3)
    begun = max(1, steps // 4)
    watch.begin()
    for step in range(begun + 1):
        batch = data[torch.randint(len(data), (BATCH,), generator=generator).to(y.device)]
        if step % max(1, begun // CHECKS) == 0:
            adopt()
            if watch.check(net, "layer", step, y[:, 0], 0.7 * step / begun):
                break
        # CD-1: persistent chains diverge on real-valued units at the rates that learn anything in this time.
        gradient = contrastive_divergence(rbm, batch, 1, generator)
        gradient["weight"] += WEIGHT_DECAY * rbm.weight.detach()
        set_gradients(rbm, gradient)
        optimiser.step()
        with torch.no_grad():
            rbm.log_sigma.clamp_(min=math.log(SIGMA_FLOOR))
    watch.restore(net)
    # Contrastive divergence leaves the layer far from the maximum of the bound; from here on both ascend it.
    _climb_top(net, y[:, 0], data, steps, watch, generator)
    return net


def _groups(count: int, people: Tensor | None, device: torch.device) -> Tensor:
    """A number for each picture such that equal numbers stay together; without two people, runs of neighbours."""
    if people is None or len(people.unique()) < 2:
        return torch.arange(count, device=device) * (4 * FOLDS) // count
    return people.unique(return_inverse=True)[1]


def _folds(group: Tensor) -> Tensor:
    """Folds of whole groups, as even as going from the largest group to the smallest makes them."""
    sizes = torch.bincount(group)
    filled, fold = [0] * min(FOLDS, max(2, len(sizes))), torch.zeros_like(sizes)
    for index in sizes.argsort(descending=True, stable=True).tolist():
        smallest = filled.index(min(filled))
        fold[index] = smallest
        filled[smallest] += int(sizes[index])
    return fold[group]


def _set_aside(group: Tensor, generator: torch.Generator) -> Tensor:
    """Which pictures are kept for validation: whole groups in random order until their share is reached."""
    order = torch.randperm(int(group.max()) + 1, generator=generator).to(group.device)
    held = torch.zeros(len(group), dtype=torch.bool, device=group.device)
    for index in order.tolist():
        if int(held.sum()) >= HELD_OUT * len(group):
            break
        held |= group == index
    return held


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    data = y.flatten(0, 1).double()
    return data.mean(0), torch.cov(data.T)


def _mixed(y: Tensor, radius: int, stationary: float, share: float) -> tuple[Tensor, Tensor]:
    mean, covariance = _moments(y)
    return mean, share * covariance + (1 - share) * _neighbourhood_covariance(covariance, radius, stationary)


def _neighbourhood_covariance(covariance: Tensor, radius: int, stationary: float) -> Tensor:
    """The covariance of the field in which a pixel, given all before it in raster order, depends on near ones only.

    The regressions' moments are ``(local + stationary · pooled) / (1 + stationary)``, pooled being the mean over all
    places whose neighbourhood lies within the patch. Patches sum to zero, and the field is conditioned on that: to
    give one pixel what the others lack to zero would let that pixel vary by thousands.
    """
    basis = _pixel_basis(covariance)
    moments = basis @ covariance @ basis.T
    reach = range(-radius, radius + 1)
    # A disc a little larger than its radius, cut to the half-plane of earlier pixels.
    offsets = [(r, c) for r in reach for c in reach if (r, c) < (0, 0) and r * r + c * c <= radius * radius + 1]
    step = torch.tensor([*offsets, (0, 0)], device=covariance.device)
    pixel = torch.arange(PIXELS, device=covariance.device)
    row, column = pixel[:, None] // SIDE + step[:, 0], pixel[:, None] % SIDE + step[:, 1]
    valid = (row >= 0) & (column >= 0) & (column < SIDE)
    index = torch.where(valid, row * SIDE + column, 0)
    local = moments[index[:, :, None], index[:, None, :]]
    pooled = local[valid.all(1)].mean(0)
    both = valid[:, :, None] & valid[:, None, :]
    mixed = torch.where(both, (local + stationary * pooled) / (1 + stationary), 0.0)
    # Neighbours beyond the border: unit variance, no covariance, hence weight zero.
    mixed += torch.diag_embed(torch.where(valid, 1e-6, 1.0).to(mixed.dtype))
    weights = torch.linalg.solve(mixed[:, :-1, :-1], mixed[:, :-1, -1])
    residual = mixed[:, -1, -1] - (weights * mixed[:, :-1, -1]).sum(1)
    rows = torch.zeros(PIXELS, PIXELS, dtype=covariance.dtype, device=covariance.device)
    rows.scatter_add_(1, index[:, :-1], -weights * valid[:, :-1])
    rows[pixel, pixel] += 1.0
    whitening = (rows / residual.clamp(min=1e-6).sqrt()[:, None]) @ basis
    return torch.linalg.inv(whitening.T @ whitening)


def _best_student(square: Tensor, log_det: Tensor) -> tuple[float, float, float]:
    """Score, inflation and degrees of freedom of the Student-t that suits the squared distances best."""
    best = (-math.inf, 1.0, DEGREES_OF_FREEDOM[0])
    for inflation in INFLATION:
        for nu in DEGREES_OF_FREEDOM:
            normaliser = math.lgamma((nu + DIMENSION) / 2) - math.lgamma(nu / 2)
            constant = normaliser - 0.5 * DIMENSION * math.log(math.pi * (nu - 2) * inflation)
            tail = 0.5 * (nu + DIMENSION) * torch.log1p(square / (inflation * (nu - 2)))
            score = float((constant - tail + log_det).mean())
            best = max(best, (score, inflation, nu))
    return best


def _local_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """A whitening matrix whose row k is a filter about pixel k + 1, and the principal directions of what it returns.

    The symmetric root is the whitening that moves the data least, hence local: density coordinates are the orthonormal
    ones nearest to the last 575 pixels.
    """
    values, axes = torch.linalg.eigh(covariance)
    return (axes / values.sqrt()) @ axes.T, axes.flip(1)[:, :DIRECTIONS]


def _cross_fitted(y: Tensor, fold: Tensor, found: Covariance) -> tuple[Tensor, Tensor]:
    """Residuals of each fold as the other folds whiten them, and the log-determinant of that whitening, by sample."""
    residuals, log_dets = [], []
    for f in fold.unique().tolist():
        mean, covariance = _mixed(y[fold != f], found.radius, found.stationary, found.share)
        root, _ = _local_root(covariance)
        new = y[fold == f].flatten(0, 1)
        residuals.append((new - mean.to(y.dtype)) @ root.to(y.dtype).T)
        log_dets.append(torch.linalg.slogdet(root)[1].to(y.dtype).expand(len(new)))
    return torch.cat(residuals), torch.cat(log_dets)


def _pixel_basis(like: Tensor) -> Tensor:
    """``(576, 575)``: the pixels of each density coordinate's unit vector."""
    return from_density_coordinates(torch.eye(DIMENSION, dtype=like.dtype, device=like.device)).flatten(1).T


def _near(radius: float) -> Tensor:
    """1 where two of the last 575 pixels lie within `radius`, else 0."""
    pixel = torch.arange(1, PIXELS)
    row, column = pixel // SIDE, pixel % SIDE
    square = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    return (square <= radius**2).float()


def _effective_filters(net: DeepBeliefNet) -> float:
    square = (net.layer.filters() ** 2).sum(1)
    return float(square.sum() ** 2 / (square**2).sum().clamp(min=1e-30))


def _base(net: DeepBeliefNet, y: Tensor) -> Tensor:
    """Log-odds of the mean hidden state of the data: the start of the annealing path that is nearest to its end."""
    return torch.logit(net.infer_hidden(y[:, 0]).mean(0).clamp(0.01, 0.99))
