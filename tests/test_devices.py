"""Every public path keeps to the device of its inputs: held by a second device that computes but does not mix."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from foveate.data import Scenes
from foveate.inference import prior_training
from foveate.inference.attend import Candidates, attend
from foveate.inference.checkpoint import Run
from foveate.inference.fit import fit_clutter
from foveate.inference.glance import Glance, glance_loss, propose
from foveate.inference.guide import WINDOW, GazeGuide
from foveate.inference.guide_training import GuideData, train_glance, train_looks
from foveate.inference.potential import GazePotential, OddsScore
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, GatedLayer, contrast_groups
from foveate.model.density import EllipticalDensity
from foveate.model.identity import IdentityModel
from foveate.model.patch import Pyramid, density_coordinates, extract, from_density_coordinates, normalise
from foveate.model.rbm import BernoulliRBM

# The package's functions `fit` and `learn` hide the modules of the same names.
fitting = importlib.import_module("foveate.inference.fit")
learning = importlib.import_module("foveate.inference.learn")
ELSEWHERE = torch.device("meta")


class MixedDevices(RuntimeError):
    """An operation saw tensors of both devices."""


class Elsewhere(Tensor):
    """A tensor that says it lives elsewhere, by the name of PyTorch's "meta" device, and yet has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        wrapper = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of a machine with two devices."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    # Numbers without a dimension may cross, as on every real device.
    here = any(not isinstance(t, Elsewhere) and t.ndim > 0 for t in tensors)
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    # A list of positions, likewise, picks from a tensor of any device.
    picks = func is torch.ops.aten.index.Tensor and isinstance(args[0], Elsewhere)
    if there and here and not moves and not picks:
        shapes = [(tuple(t.shape), "elsewhere" if isinstance(t, Elsewhere) else "here") for t in tensors]
        raise MixedDevices(f"{func} saw {shapes}")
    device = kwargs.get("device")
    ends_there = there if device is None else torch.device(device).type == ELSEWHERE.type
    if ends_there and kwargs.get("generator") is not None:
        raise MixedDevices(f"{func} with a generator of the CPU")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]
    return _wrapped(result, ends_there)


def _wrapped(result: Any, ends_there: bool) -> Any:
    return tree_map(lambda t: Elsewhere(t) if ends_there and isinstance(t, Tensor) else t, result)


class _Dispatch(TorchDispatchMode):
    """Makes what is made on the other device, and moves what is moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What PyTorch does for the name "meta" before, or without, telling the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        # Literals would come without their numbers.
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == ELSEWHERE:
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to(ELSEWHERE)
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(ELSEWHERE)
        # Lists are read back from every real device.
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        # A vector times a matrix is squeezed in place, which a wrapper cannot follow.
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and isinstance(args[0], Elsewhere):
            if args[0].ndim == 1 and args[1].ndim == 2:
                return func(args[0][None], args[1])[0]
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _two_devices() -> Iterator[None]:
    with _Python(), _Dispatch():
        yield


def away(value: Any) -> Any:
    """The same tensors on the other device."""
    return tree_map(lambda t: t.detach().to(ELSEWHERE).requires_grad_(t.requires_grad) if _is_tensor(t) else t, value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def assert_same_elsewhere(function: Callable[..., Any], *args: Any) -> None:
    """The function gives on the other device, and only there, what it gives here."""
    wanted = [t for t in tree_leaves(function(*args)) if _is_tensor(t)]
    found = [t for t in tree_leaves(function(*away(args))) if _is_tensor(t)]
    assert len(found) == len(wanted) > 0
    for there, here in zip(found, wanted, strict=True):
        assert there.device == ELSEWHERE
        torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=0, atol=0)


# ---- the second device itself


def test_the_second_device_computes_and_differentiates() -> None:
    x = away(torch.tensor([1.0, 2.0])).requires_grad_()
    (x * torch.tensor(3.0) + torch.ones(2, device=x.device)).square().sum().backward()
    assert x.grad is not None and x.grad.device == ELSEWHERE
    assert x.grad.cpu().tolist() == [24.0, 42.0]


def test_the_second_device_refuses_to_be_mixed() -> None:
    x = away(torch.ones(2))
    for mixed in (
        lambda: x + torch.ones(2),
        lambda: torch.ones(2)[x.long()],
        lambda: torch.stack([x, torch.ones(2)]),
    ):
        with pytest.raises(MixedDevices):
            mixed()
    with pytest.raises(MixedDevices):
        torch.rand(2, device=x.device, generator=torch.Generator())
    with pytest.raises(RuntimeError):
        x.numpy()


# ---- the model


def some_gazes(*shape: int) -> Tensor:
    g = torch.rand(*shape, 4)
    return torch.cat([1 + 2 * g[..., :2], 10 + 30 * g[..., 2:]], -1)


def test_gazes_stay_where_they_are() -> None:
    g, h, points = some_gazes(3), some_gazes(3), torch.rand(3, 2)
    for function, args in (
        (gazes.compose, (g, h)),
        (gazes.inverse, (g,)),
        (gazes.apply, (g, points)),
        (gazes.parts, (g,)),
        (gazes.from_parts, (points, torch.rand(3), torch.rand(3))),
        (gazes.from_landmarks, (points, torch.rand(3, 2), torch.rand(3, 2))),
        (gazes.corners, (g,)),
        (gazes.overlap, (g, h)),
        (lambda x: gazes.inside(x, 30, 40), (g,)),
        (lambda x, z: gazes.LocalChart(x).to_gaze(z), (g, h)),
        (lambda x, y: gazes.LocalChart(x).to_chart(y), (g, h)),
        (lambda x, z: gazes.LocalChart(x).log_det(z), (g, h)),
    ):
        assert_same_elsewhere(function, *args)
    assert gazes.identity(device=ELSEWHERE).device == gazes.lattice(device=ELSEWHERE).device == ELSEWHERE


@pytest.mark.parametrize("kind", [gazes.GazePrior, gazes.FlatGazePrior])
def test_priors_sample_and_score_where_their_sizes_are(kind: Any) -> None:
    size = torch.tensor([[40.0, 50.0], [30.0, 60.0]])
    assert_same_elsewhere(lambda s, g: kind(s).log_prob(g), size, some_gazes(2))
    draws = kind(away(size)).sample(torch.Size([5]))
    assert draws.device == ELSEWHERE and draws.shape == (5, 2, 4)
    assert_same_elsewhere(lambda s, g: kind(s).expand([3, 2]).log_prob(g), size, some_gazes(3, 2))


def test_pyramids_are_built_and_read_where_the_pictures_are() -> None:
    pictures = [torch.rand(40, 50), torch.rand(30, 60)]
    at = some_gazes(2, 3)

    def read(these: list[Tensor], g: Tensor) -> Tensor:
        # The slope of each patch comes along, by the path that every device has.
        g = g.clone().requires_grad_()
        patches = Pyramid.build(these).extract(g, 8, 3.0)
        (slope,) = torch.autograd.grad(patches.sum(), g)
        return torch.cat([patches.flatten(), slope.flatten()])

    assert_same_elsewhere(read, pictures, at)
    assert_same_elsewhere(lambda these, g: extract(these, g.requires_grad_()), pictures, at)
    pyramid = Pyramid.build(away(pictures))
    for part in (pyramid[1], pyramid[[1, 0]], pyramid[0:1]):
        assert part.extract(away(at[: len(part)])).device == ELSEWHERE
    which = away(torch.tensor([1, 1, 0]))
    assert pyramid.extract(away(some_gazes(3)), scene=which).device == ELSEWHERE


def test_the_compiled_path_is_left_to_the_processor_and_agrees() -> None:
    pictures, at = [torch.rand(40, 50), torch.rand(30, 60)], some_gazes(2, 3)
    there = extract(away(pictures), away(at))
    assert there.device == ELSEWHERE
    torch.testing.assert_close(there.cpu(), extract(pictures, at), rtol=0, atol=1e-5)  # float32 scene coordinates


def test_a_pyramid_moves_as_a_whole() -> None:
    pyramid = Pyramid.build([torch.rand(40, 50), torch.rand(30, 60)]).to(ELSEWHERE)
    assert pyramid.extract(away(some_gazes(2))).device == ELSEWHERE
    assert pyramid.to("cpu").extract(some_gazes(2)).device.type == "cpu"


def test_density_coordinates_stay_where_they_are() -> None:
    patches = torch.rand(2, 24, 24)
    for function in (normalise, density_coordinates, lambda p: from_density_coordinates(density_coordinates(p))):
        assert_same_elsewhere(function, patches)


def toy_model() -> AttentionModel:
    core, clutter = EllipticalDensity.blank(575), EllipticalDensity.blank(575)
    core.nu.fill_(8.0)
    clutter.variances.mul_(2.0)
    dbn = DeepBeliefNet(GatedLayer(3, 3, 4, contrast_groups()), BernoulliRBM(6, 4), core)
    dbn.set_log_z(7.0, 0.0)
    return AttentionModel(dbn, ClutterModel(clutter))


@pytest.mark.parametrize("pictures", ["packed there", "a list here"])
@pytest.mark.parametrize("latent", ["full", "given_hidden", "collapsed"])
def test_the_program_runs_where_the_model_is(latent: Any, pictures: str) -> None:
    model = toy_model().with_latent(latent).to(ELSEWHERE)
    here = [torch.rand(40, 50), torch.rand(30, 60)]
    trace = poutine.trace(model).get_trace(here if pictures == "a list here" else Pyramid.build(away(here)))
    trace.compute_log_prob()
    names = [name for name in trace.stochastic_nodes + trace.observation_nodes if name != "scene"]
    assert "gaze" in names and "patch" in names
    for name in names:
        assert trace.nodes[name]["value"].device == trace.nodes[name]["log_prob"].device == ELSEWHERE, name


def test_energies_and_slopes_are_computed_where_the_scenes_are() -> None:
    model, pyramid, base = toy_model(), Pyramid.build([torch.rand(40, 50), torch.rand(30, 60)]), some_gazes(2, 1)
    z = 0.3 * torch.randn(2, 3, 4)

    def potential(pyramid: Pyramid, base: Tensor) -> GazePotential:
        prior = model.prior(pyramid.size.to(base.dtype))
        return GazePotential(pyramid, gazes.LocalChart(base), OddsScore(*model.marginal_densities()), prior)

    wanted = potential(pyramid, base)(z)
    model.to(ELSEWHERE)
    found = potential(pyramid.to(ELSEWHERE), away(base))(away(z))
    for there, here in zip(found, wanted, strict=True):
        assert there.device == ELSEWHERE
        # float32 by two ways: sums of 576 terms of a few hundred nats, slopes of ten times that.
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-2)


# ---- the guide


def test_the_guide_looks_where_its_parameters_and_pictures_are() -> None:
    guide = GazeGuide(4).eval()
    pyramid = Pyramid.build([torch.rand(40, 50), torch.rand(30, 60)])
    gaze, canonical, scene = some_gazes(3), torch.rand(3, 24, 24), torch.tensor([1, 0, 1])
    wanted = guide.step(pyramid, gaze, canonical, scene)[0].detach()
    guide.to(ELSEWHERE)
    change = guide(away(torch.rand(2, WINDOW, WINDOW)), away(torch.rand(2, 24, 24)))
    assert {t.device for t in change} == {ELSEWHERE}
    assert change.distribution().log_prob(change.mean).device == ELSEWHERE
    there = guide.step(pyramid.to(ELSEWHERE), *away((gaze, canonical, scene)))[0].detach()
    assert there.device == ELSEWHERE
    torch.testing.assert_close(there.cpu(), wanted, rtol=0, atol=1e-4)  # windows read in float32, not float64
    # Scenes may stay here while the network is there: the gaze comes back to where it came from.
    mixed = guide.step(pyramid, gaze, canonical, scene)[0].detach()
    assert mixed.device.type == "cpu"
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scenes_too", [True, False], ids=["scenes there", "scenes here"])
def test_proposals_are_where_the_scenes_are(scenes_too: bool) -> None:
    glance = Glance(4)
    pyramid = Pyramid.build([torch.rand(40, 50), torch.rand(30, 60)])
    wanted = propose(glance, pyramid, 5)
    glance.to(ELSEWHERE)
    found = propose(glance, pyramid.to(ELSEWHERE) if scenes_too else pyramid, 5)
    assert found.gaze.device.type == found.logit.device.type == ("meta" if scenes_too else "cpu")
    if not scenes_too:
        torch.testing.assert_close(found.gaze, wanted.gaze, rtol=0, atol=1e-4)  # one network, one batch


def test_the_glance_is_scored_where_its_output_is() -> None:
    assert_same_elsewhere(glance_loss, torch.randn(2, 5, 3, 3), some_gazes(2), torch.tensor([1.0, 0.0]))


def test_a_guide_elsewhere_learns_from_scenes_here() -> None:
    guide = GazeGuide(4).to(ELSEWHERE)
    pictures = [torch.rand(40, 50) for _ in range(4)]
    truth = some_gazes(4)
    data = GuideData(Pyramid.build(pictures), truth, torch.rand(4, 24, 24), Pyramid.build(pictures[:1]))
    before = [p.detach().cpu() for p in guide.parameters()]
    assert train_glance(guide, data, steps=2, batch=4) > 0
    assert train_looks(guide, data, steps=2, batch=6) > 0
    after = [p.detach().cpu() for p in guide.parameters()]
    assert {p.device for p in guide.parameters()} == {ELSEWHERE}
    assert any(not torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_an_m_step_keeps_to_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide = toy_model(), GazeGuide(4).eval()

    # What other tests here hold to the device, and what would take long: attending, the guide's training, the prior's.
    def found(run: Run, pictures: list[Tensor], *others: Any) -> dict[str, Tensor]:
        gaze, draws = some_gazes(len(pictures)), some_gazes(len(pictures), 2, 3)
        crops = torch.rand(len(pictures), 2, 24, 24)
        return {"presence": torch.ones(len(pictures)).double(), "gaze": gaze, "draws": draws, "crops": crops}

    def trained(guide: GazeGuide, data: GuideData, **options: Any) -> None:
        guide.evidence.add_(torch.ones(4, device=guide.evidence.device))

    def modes(model: AttentionModel, guide: GazeGuide, pyramid: Pyramid, modes: int) -> Candidates:
        everywhere = [*model.state_dict().values(), *guide.state_dict().values(), pyramid.texels]
        (device,) = {value.device for value in everywhere}
        searched.append(device)
        gaze = some_gazes(len(pyramid), 2).double().to(device)
        one = torch.ones(len(pyramid), 2, device=device).double()
        return Candidates(gaze, one[..., None].expand(-1, -1, 4), one[..., None].expand(-1, -1, 3), one, gaze)

    searched: list[torch.device] = []
    monkeypatch.setattr(learning, "_attended", found)
    monkeypatch.setattr(learning, "train_glance", trained)
    monkeypatch.setattr(learning, "train_looks", trained)
    monkeypatch.setattr(learning, "train_dbn", lambda crops, **options: toy_model().dbn)
    monkeypatch.setattr(learning, "choose_elliptical", lambda *crops, student: (EllipticalDensity.blank(575), 0.0))
    monkeypatch.setattr(learning, "search", modes)
    monkeypatch.setattr(learning, "fit_clutter", partial(fit_clutter, count=200))
    monkeypatch.setattr(fitting, "MINED", 1)
    monkeypatch.setattr(learning, "RETAINED", 0.0)
    scenes = Scenes.from_pictures([torch.rand(40, 50) for _ in range(24)]).without_gazes()
    learned: list[Run] = []
    learning.learn(
        Run(model.to(ELSEWHERE), guide.to(ELSEWHERE), {}),
        scenes,
        rounds=1,
        glance_steps=1,
        look_steps=1,
        dbn_steps=1,
        each_round=lambda monitor, run: learned.append(run),
    )
    assert len(learned) == 2 and len(searched) == 1
    for part in (learned[1].model, learned[1].guide):
        assert {value.device for value in part.state_dict().values()} == {ELSEWHERE}


def test_held_out_scenes_are_compared_with_gazes_where_the_model_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide = toy_model().to(ELSEWHERE), GazeGuide(4).eval().to(ELSEWHERE)
    truth = some_gazes(2)
    scenes = Scenes.from_pictures([torch.rand(40, 50) for _ in range(2)])

    def modes(model: AttentionModel, guide: GazeGuide, pyramid: Pyramid, modes: int) -> Candidates:
        gaze = truth[:, None].double().to(ELSEWHERE)
        return Candidates(gaze, gaze.abs(), gaze[..., :3], gaze[..., 0], gaze)

    given: list[torch.device] = []
    monkeypatch.setattr(fitting, "search", modes)
    monkeypatch.setattr(
        fitting, "_calibrate_sds", lambda model, guide, scenes, near, true: given.append(true[0].device)
    )
    monkeypatch.setattr(fitting, "_choose_variant", lambda *given: {})
    figures = fitting.calibrate(model, guide, scenes, torch.arange(2), truth)
    assert given == [ELSEWHERE] and figures["validation_accuracy"] == 1.0


def test_attending_happens_where_model_and_guide_live() -> None:
    model, guide = toy_model(), GazeGuide(4).eval()
    pictures = [torch.rand(40, 50), torch.rand(30, 60)]
    # With an image given: draws of v would need a generator of the other device, which this one has not.
    how: dict[str, Any] = {"canonical": torch.rand(2, 24, 24), "chains": 2, "draws": 4, "warmup": 3, "guide_steps": 1}
    here = attend(model, guide, pictures, **how)
    model.to(ELSEWHERE)
    guide.to(ELSEWHERE)
    there = attend(model, guide, pictures, **how)
    assert there.gaze.shape == here.gaze.shape and bool(there.gaze.isfinite().all())
    # Windows read in float32 there, in float64 here: a hundredth of a pixel.
    torch.testing.assert_close(there.modes, here.modes, rtol=0, atol=1e-2, equal_nan=True)


def test_pyros_own_kernels_are_given_starts_and_asked_for_energies_where_the_model_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pyro's MCMC itself makes random numbers of a device, which this one has not: it stays at its start here."""

    class Staying:
        def __init__(self, kernel: Any, num_samples: int, initial_params: dict[str, Tensor], **_: Any) -> None:
            self.at, self.count = initial_params["z"], num_samples

        def run(self) -> None:
            pass

        def get_samples(self) -> dict[str, Tensor]:
            return {"z": self.at.expand(self.count, -1)}

    monkeypatch.setattr(importlib.import_module("foveate.inference.attend"), "MCMC", Staying)
    model, guide = toy_model().to(ELSEWHERE), GazeGuide(4).eval().to(ELSEWHERE)
    how: dict[str, Any] = {"canonical": torch.rand(1, 24, 24), "chains": 1, "draws": 2, "warmup": 1, "guide_steps": 1}
    posterior = attend(model, guide, [torch.rand(40, 50)], kernel="hmc", **how)
    assert posterior.gaze.shape == (1, 1, 2, 4) and bool(posterior.statistics["lp"].isfinite().all())


# ---- the prior


@pytest.mark.parametrize("form", ["gated", "diagonal"])
def test_the_prior_is_trained_where_the_crops_are(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # One setting is enough to see where it is; and `double()` is to make new parameters, as a wrapper's cannot change.
    for name, only in (("RADII", (3,)), ("STATIONARY", (1.0,)), ("SAMPLE_SHARE", (0.4,)), ("FOLDS", 2)):
        monkeypatch.setattr(prior_training, name, only)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:

        def trained(crops: Tensor, people: Tensor) -> list[Tensor]:
            units: dict[str, Any] = {"shape_units": 4, "contrast_units": 4, "diagonal_units": 8, "top_units": 4}
            net = prior_training.train_dbn(crops, people=people, form=form, steps=2, **units)
            return list(net.state_dict().values())

        assert_same_elsewhere(trained, torch.rand(24, 2, 24, 24), torch.arange(24) // 3)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_what_tells_people_apart_is_fitted_where_the_crops_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("foveate.model.identity"), "TRIPLES", 50)

    def fitted(crops: Tensor, person: Tensor) -> list[Tensor]:
        model = IdentityModel.fit(crops, person)
        assert model is not None
        return list(model.state_dict().values())

    assert_same_elsewhere(fitted, torch.rand(18, 2, 24, 24), torch.arange(18) // 3)
