"""HMC within Gibbs: some sites drawn from their conditionals, the others moved by HMC given them, as one Pyro kernel.

Each of the two leaves the joint posterior invariant, so their alternation does (Tang et al. 2014, sec. 3.1, alternate
Gibbs on v and h with HMC on the gaze). Pyro itself refuses discrete sites beside HMC.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from foveate.inference.hmc import BatchedHMC, HMCStatistics, Streams, ValueAndGrad
from foveate.inference.noise import KeyedNoise, Purpose, batch_streams
from foveate.model.attention import AttentionModel, as_pyramid
from foveate.model.errors import InputError
from foveate.model.patch import density_coordinates

__all__ = ["ElementNoise", "GibbsUpdate", "HMCWithinGibbs", "attention_kernel"]


class ElementNoise:
    """Random numbers for one update of one draw, keyed by each element's stream: they do not depend on the batch.

    Attributes:
        generator: for functions that take a ``torch.Generator``; seeded by the kernel's seed and the draw, it is shared
            by the batch, so what is drawn from it does depend on what shares the batch.
    """

    def __init__(self, noise: KeyedNoise, seed: int, draw: int, update: int, like: Tensor) -> None:
        self._noise, self._draw, self._like = noise, (draw << 8) + update, like
        self.generator = torch.Generator(like.device).manual_seed((seed * 1_000_003 + self._draw) % 2**63)

    def uniform(self, *event: int) -> Float[Tensor, "..."]:
        """Uniform numbers in (0, 1): (*batch, *event)."""
        return self._shaped(self._noise.uniform, event)

    def normal(self, *event: int) -> Float[Tensor, "..."]:
        """Standard normal numbers: (*batch, *event)."""
        return self._shaped(self._noise.normal, event)

    def _shaped(self, source: Callable[..., np.ndarray], event: tuple[int, ...]) -> Tensor:
        numbers = torch.from_numpy(source(Purpose.GIBBS, self._draw, 1, int(np.prod(event, dtype=int)))[0]).to(
            self._like
        )
        # Numbers of one update that are drawn one after the other are different ones.
        self._draw += 1 << 40
        return numbers.reshape(*numbers.shape[:-1], *event)


# From the values of all sites (constrained) to the new value of one.
GibbsUpdate = Callable[[dict[str, Tensor], ElementNoise], Tensor]


class HMCWithinGibbs(MCMCKernel):
    """Draw some sites by Gibbs updates, then move the others by :class:`BatchedHMC` given them: one round is one draw.

    Args:
        model: a Pyro model as :class:`BatchedHMC` takes it, except that the sites with an update may be discrete.
        updates: ``{site: update}``; ``update(values, noise)`` returns the site's new value, drawn from a transition
            that leaves its conditional invariant. ``values`` holds the current values of all latent sites (those of
            HMC, too, in their own support).
        potential: instead of a model, a function from the values of the updated sites to the ``value_and_grad_fn`` of
            the others.
        batch_dims, seed, streams: as of :class:`BatchedHMC`.
        hmc_steps: HMC transitions in each round.
        hmc_options: the other options of :class:`BatchedHMC`.

    Raises:
        InputError: no update, an update for a site that the model lacks, an update that changes its site's shape, and
            as :class:`BatchedHMC` for the sites left to HMC.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        updates: Mapping[str, GibbsUpdate],
        potential: Callable[[dict[str, Tensor]], ValueAndGrad] | None = None,
        batch_dims: int = 1,
        hmc_steps: int = 1,
        seed: int | None = None,
        streams: Streams = None,
        **hmc_options: Any,
    ) -> None:
        if (model is None) == (potential is None):
            raise InputError("give exactly one of model and potential")
        if not updates:
            raise InputError("there is no Gibbs update: name at least one site, or use BatchedHMC")
        if hmc_steps < 1:
            raise InputError(f"hmc_steps is {hmc_steps}: it must be at least 1")
        self.model, self.potential, self.updates, self.hmc_steps = model, potential, dict(updates), hmc_steps
        self.seed, self.streams = seed, streams
        self._values: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] | None = None
        if model is not None:
            source: dict[str, Any] = {"model": self._conditioned}
        else:
            source = {"value_and_grad_fn": _Current(self)}
        self.hmc = BatchedHMC(batch_dims=batch_dims, seed=seed, streams=streams, **source, **hmc_options)
        self.transforms: dict[str, Any] | None = None if model is not None else {}

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Find a start for all sites and set up HMC given the updated ones."""
        self._seed = int(torch.randint(2**31, (1,))) if self.seed is None else self.seed
        self.hmc.seed = self._seed
        given = self._initial or {}
        if self.model is not None:
            with torch.no_grad(), poutine.block():
                trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            for name in self.updates:
                if name not in trace.nodes or trace.nodes[name]["is_observed"]:
                    raise InputError(
                        f"there is an update for '{name}', which is no latent site of the model: "
                        f"{trace.stochastic_nodes}"
                    )
            drawn = {name: cast(Tensor, trace.nodes[name]["value"]).detach() for name in self.updates}
            self._values = {name: given.get(name, value) for name, value in drawn.items()}
        else:
            missing = [name for name in self.updates if name not in given]
            if missing:
                raise InputError(
                    f"no initial value for site '{missing[0]}': with a potential, initial_params must hold every site"
                )
            self._values = {name: given[name] for name in self.updates}
        rest = {name: value for name, value in given.items() if name not in self.updates}
        self.hmc.initial_params = rest or None
        self.hmc.setup(warmup_steps * self.hmc_steps, *args, **kwargs)
        self.transforms = self.hmc.transforms
        start = self.hmc.initial_params
        assert start is not None
        first = next(iter(start.values()))
        self._like, self._round = first, 0
        batch = tuple(first.shape[: self.hmc.batch_dims])
        self._noise = KeyedNoise(self._seed, batch_streams(self.streams, batch))
        self._initial = {**start, **self._values}

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """The start: updated sites in their own support, the others unconstrained."""
        return self._initial

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor] | None) -> None:
        self._initial = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One round: every update in turn, then HMC.

        Args:
            params: what the last call returned, or other positions to go on from.
        """
        moving = {name: value for name, value in params.items() if name not in self.updates}
        transforms = self.transforms or {}
        values = {name: transforms[name].inv(value) if name in transforms else value for name, value in moving.items()}
        values |= {name: params[name] for name in self.updates}
        for number, (name, update) in enumerate(self.updates.items()):
            new = update(dict(values), ElementNoise(self._noise, self._seed, self._round, number, self._like))
            if new.shape != values[name].shape:
                raise InputError(
                    f"the update of site '{name}' returned shape {tuple(new.shape)}, expected "
                    f"{tuple(values[name].shape)}"
                )
            values[name] = new
        self._values = {name: values[name] for name in self.updates}
        self.hmc.clear_cache()
        for _ in range(self.hmc_steps):
            moving = self.hmc.sample(moving)
        self._round += 1
        return {**moving, **self._values}

    @property
    def statistics(self) -> HMCStatistics:
        """Statistics of the HMC transitions after warm-up, ``(*batch, hmc_steps · draw)``; lp is given the others."""
        return self.hmc.statistics

    def state_dict(self) -> dict[str, Tensor]:
        """The adaptation of the HMC part."""
        return self.hmc.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Begin the next ``setup`` from this adaptation."""
        self.hmc.load_state_dict(state)

    def logging(self) -> OrderedDict[str, str]:
        """As of the HMC part."""
        return self.hmc.logging()

    def diagnostics(self) -> dict[str, Any]:
        """As of the HMC part."""
        return self.hmc.diagnostics()

    def cleanup(self) -> None:
        """Let go of the start, so that another run finds its own."""
        self._initial = None
        self.hmc.cleanup()

    def _conditioned(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        return poutine.condition(self.model, data=self._values)(*args, **kwargs)


class _Current:
    """The energy and gradient given the present values of the updated sites."""

    def __init__(self, kernel: HMCWithinGibbs) -> None:
        self.kernel = kernel
        self._of: dict[str, Tensor] | None = None

    @property
    def function(self) -> ValueAndGrad:
        assert self.kernel.potential is not None
        if self._of is not self.kernel._values:
            self._of, self._function = self.kernel._values, self.kernel.potential(self.kernel._values)
        return self._function

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(z)

    @property
    def trajectory(self) -> Any:
        return getattr(self.function, "trajectory", None)


def attention_kernel(
    model: AttentionModel, pictures: Any, *, hidden_update: Literal["exact", "recognition"] = "exact", **options: Any
) -> HMCWithinGibbs:
    """Block Gibbs of ``hidden`` and ``canonical`` around HMC on ``gaze``, for ``MCMC(kernel, ...).run(pictures)``.

    Args:
        model: the full model (``latent="full"``).
        pictures: what the model will be run on; `run` refuses others.
        hidden_update: ``"exact"`` leaves the posterior invariant; ``"recognition"`` is the paper's update from the
            factorial recognition posterior (sec. 3.1), fast and biased by as much as that posterior is wrong.
        options: of :class:`HMCWithinGibbs` and :class:`BatchedHMC`.

    Raises:
        InputError: a model that is not the full one, or an unknown `hidden_update`.
    """
    if hidden_update not in ("exact", "recognition"):
        raise InputError(f"hidden_update={hidden_update!r}: 'exact' or 'recognition'")
    if model.latent != "full":
        raise InputError(
            f"a model with latent='{model.latent}' has no site 'hidden' to draw: use model.with_latent('full')"
        )
    mean = model.dbn.core.mean
    pyramid = as_pyramid(pictures, mean)
    # A temperature on the odds is a temperature on the likelihood, which widens its normal density.
    noise = model.noise * model.temperature**0.5

    def hidden(values: dict[str, Tensor], random: ElementNoise) -> Tensor:
        return model.dbn.gibbs_hidden(values["canonical"], values["hidden"], random.generator, update=hidden_update)

    def canonical(values: dict[str, Tensor], random: ElementNoise) -> Tensor:
        with torch.no_grad():
            seen = density_coordinates(pyramid.extract(values["gaze"]))
        return model.dbn.gibbs_canonical(seen, noise, values["canonical"], values["hidden"], random.generator)

    same: list[Any] = [pyramid, pictures]

    def program(given: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(given is known for known in same):
            seen = as_pyramid(given, mean).texels
            if not (seen.shape == pyramid.texels.shape and seen.equal(pyramid.texels)):
                raise InputError("the kernel was made for other pictures than it is run on: make one for each set")
            same.append(given)
        return model(pyramid, *args, **kwargs)

    return HMCWithinGibbs(program, updates={"hidden": hidden, "canonical": canonical}, **options)
