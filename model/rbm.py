"""Restricted Boltzmann machines: energies, conditionals and the gradients that train them (Tang et al. 2014, sec. 2).

Letters of the formulas: v visible units, h hidden units, W weights, b visible bias, c hidden bias, σ the standard
deviations of Gaussian visible units.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.model.errors import InputError

__all__ = [
    "BernoulliRBM",
    "FantasyChains",
    "GaussianRBM",
    "bernoulli",
    "contrastive_divergence",
    "entropy",
    "fantasy_chains",
    "fast_persistent_contrastive_divergence",
    "persistent_contrastive_divergence",
    "set_gradients",
]


def bernoulli(
    probabilities: Float[Tensor, "*batch"], generator: torch.Generator | None = None
) -> Float[Tensor, "*batch"]:
    """Independent draws of 0 or 1, in the dtype and on the device of the probabilities."""
    return (_random(torch.rand, probabilities, generator) < probabilities).to(probabilities.dtype)


def _random(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers for a tensor, wherever it is: a generator fills memory of its own device alone."""
    device = like.device if generator is None else generator.device
    return draw(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def entropy(q: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch"]:
    """Entropy in nats of independent binary units that are on with probabilities `q`."""
    return -(torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)).sum(-1)


class _RBM(nn.Module):
    """What both share: binary hidden units, and a path of machines from independence (β = 0) to this one (β = 1).

    Along the path the hidden activations are scaled to ``β (c + Wᵀ v)`` and the visible bias goes from a base bias to
    b; annealed importance sampling walks it (Salakhutdinov & Murray 2008). At β = 0 the normaliser is known.
    """

    weight: nn.Parameter
    visible_bias: nn.Parameter
    hidden_bias: nn.Parameter

    def __init__(self, visible: int, hidden: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if visible < 1 or hidden < 1:
            raise InputError(f"an RBM of {visible} visible and {hidden} hidden units: give at least one of each")
        self.weight = nn.Parameter(torch.zeros(visible, hidden, dtype=dtype))
        self.visible_bias = nn.Parameter(torch.zeros(visible, dtype=dtype))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden, dtype=dtype))

    @property
    def visible(self) -> int:
        """Number of visible units."""
        return self.weight.shape[0]

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return self.weight.shape[1]

    def randomise(self, scale: float, generator: torch.Generator | None = None) -> None:
        """Draw the weights from N(0, scale²), the usual start of training."""
        with torch.no_grad():
            self.weight.copy_(scale * _random(torch.randn, self.weight, generator))

    def hidden_activation(self, v: Float[Tensor, "*batch visible"]) -> Float[Tensor, "*batch hidden"]:
        """``c + Wᵀ v``: the log-odds of the hidden units given v."""
        return v @ self.weight + self.hidden_bias

    def hidden_probabilities(self, v: Float[Tensor, "*batch visible"]) -> Float[Tensor, "*batch hidden"]:
        """``p(h_j = 1 | v)``."""
        return torch.sigmoid(self.hidden_activation(v))

    def sample_hidden(
        self, v: Float[Tensor, "*batch visible"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch hidden"]:
        """Exact draw of h given v."""
        return bernoulli(self.hidden_probabilities(v), generator)

    def free_energy(self, v: Float[Tensor, "*batch visible"]) -> Float[Tensor, "*batch"]:
        """``F(v) = -log Σ_h exp(-E(v, h))`` in nats; ``log p(v) = -F(v) - log Z``."""
        return self.path_free_energy(v, 1.0, self.visible_bias)

    def sample_visible(
        self, h: Float[Tensor, "*batch hidden"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch visible"]:
        """Exact draw of v given h."""
        return self.path_sample_visible(h, 1.0, self.visible_bias, generator)

    @torch.no_grad()
    def gibbs(
        self, v: Float[Tensor, "*batch visible"], steps: int = 1, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch visible"]:
        """`steps` full sweeps v → h → v of block Gibbs."""
        for _ in range(steps):
            v = self.sample_visible(self.sample_hidden(v, generator), generator)
        return v

    def path_free_energy(
        self, v: Float[Tensor, "*batch visible"], beta: float, base: Float[Tensor, "visible"]
    ) -> Float[Tensor, "*batch"]:
        """Free energy of the machine at `beta` on the path that starts from visible bias `base`."""
        raise NotImplementedError

    def path_sample_visible(
        self,
        h: Float[Tensor, "*batch hidden"],
        beta: float,
        base: Float[Tensor, "visible"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch visible"]:
        """Exact draw of v given h at `beta` on the path."""
        raise NotImplementedError

    def path_log_z(self, base: Float[Tensor, "visible"]) -> Float[Tensor, ""]:
        """The known log-normaliser at β = 0."""
        raise NotImplementedError

    def path_gibbs(
        self,
        v: Float[Tensor, "*batch visible"],
        beta: float,
        base: Float[Tensor, "visible"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch visible"]:
        """One block Gibbs sweep that leaves the machine at `beta` invariant."""
        h = bernoulli(torch.sigmoid(beta * self.hidden_activation(v)), generator)
        return self.path_sample_visible(h, beta, base, generator)

    def statistics(self, v: Float[Tensor, "batch visible"]) -> dict[str, Tensor]:
        """Mean of ``-∂F(v)/∂θ`` over the batch for every parameter θ, in closed form."""
        raise NotImplementedError


class BernoulliRBM(_RBM):
    r"""Binary visible and hidden units: :math:`E(v, h) = -b^T v - c^T h - v^T W h`.

    In the deep belief network it is the top layer, over (h1, h2): there v is h1, h is h2, W is R, b is e and c is d.

    Args:
        visible: number of visible units.
        hidden: number of hidden units.
        dtype: of the parameters, which start at zero (see `randomise`).

    Raises:
        InputError: without a unit of either side.
    """

    def energy(
        self, v: Float[Tensor, "*#batch visible"], h: Float[Tensor, "*#batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        """``E(v, h)`` in nats."""
        return -(v @ self.visible_bias) - (h * self.hidden_activation(v)).sum(-1)

    def visible_probabilities(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch visible"]:
        """``p(v_i = 1 | h)``."""
        return torch.sigmoid(h @ self.weight.T + self.visible_bias)

    def hidden_log_weight(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
        """``log Σ_v exp(-E(v, h))``, the twin of the free energy on the hidden side."""
        return h @ self.hidden_bias + functional.softplus(h @ self.weight.T + self.visible_bias).sum(-1)

    def path_free_energy(
        self, v: Float[Tensor, "*batch visible"], beta: float, base: Float[Tensor, "visible"]
    ) -> Float[Tensor, "*batch"]:
        bias = (1 - beta) * base + beta * self.visible_bias
        return -(v @ bias) - functional.softplus(beta * self.hidden_activation(v)).sum(-1)

    def path_sample_visible(
        self,
        h: Float[Tensor, "*batch hidden"],
        beta: float,
        base: Float[Tensor, "visible"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch visible"]:
        logits = (1 - beta) * base + beta * (h @ self.weight.T + self.visible_bias)
        return bernoulli(torch.sigmoid(logits), generator)

    def path_log_z(self, base: Float[Tensor, "visible"]) -> Float[Tensor, ""]:
        return functional.softplus(base).sum() + self.hidden * math.log(2)

    def statistics(self, v: Float[Tensor, "batch visible"]) -> dict[str, Tensor]:
        h = self.hidden_probabilities(v)
        return {"weight": v.T @ h / len(v), "visible_bias": v.mean(0), "hidden_bias": h.mean(0)}


class GaussianRBM(_RBM):
    r"""Gaussian visible units, the paper's diagonal form.

    .. math:: E(v, h) = \tfrac12 \sum_i (v_i - b_i)^2 / \sigma_i^2 - c^T h - v^T W h

    so that ``p(h_j = 1 | v) = sigmoid(c_j + Σ_i W_ij v_i)`` and ``p(v | h) = N(b + σ² ∘ W h, diag σ²)``.

    Args:
        visible: number of visible units.
        hidden: number of hidden units.
        dtype: of the parameters; they start at zero weights and biases and σ = 1.

    Raises:
        InputError: without a unit of either side.
    """

    log_sigma: nn.Parameter

    def __init__(self, visible: int, hidden: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(visible, hidden, dtype=dtype)
        self.log_sigma = nn.Parameter(torch.zeros(visible, dtype=dtype))

    @property
    def sigma(self) -> Float[Tensor, "visible"]:
        """Standard deviations of the visible units given h."""
        return self.log_sigma.exp()

    def energy(
        self, v: Float[Tensor, "*#batch visible"], h: Float[Tensor, "*#batch hidden"]
    ) -> Float[Tensor, "*batch"]:
        """``E(v, h)`` in nats."""
        quadratic = 0.5 * (((v - self.visible_bias) / self.sigma) ** 2).sum(-1)
        return quadratic - (h * self.hidden_activation(v)).sum(-1)

    def visible_mean(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch visible"]:
        """``E[v | h] = b + σ² ∘ W h``."""
        return self.visible_bias + self.sigma**2 * (h @ self.weight.T)

    def hidden_log_weight(self, h: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
        """``log ∫ exp(-E(v, h)) dv``, the twin of the free energy on the hidden side."""
        drive = h @ self.weight.T
        gaussian = self.log_sigma.sum() + 0.5 * self.visible * math.log(2 * math.pi)
        return gaussian + h @ self.hidden_bias + (drive * (self.visible_bias + 0.5 * self.sigma**2 * drive)).sum(-1)

    def path_free_energy(
        self, v: Float[Tensor, "*batch visible"], beta: float, base: Float[Tensor, "visible"]
    ) -> Float[Tensor, "*batch"]:
        bias = (1 - beta) * base + beta * self.visible_bias
        quadratic = 0.5 * (((v - bias) / self.sigma) ** 2).sum(-1)
        return quadratic - functional.softplus(beta * self.hidden_activation(v)).sum(-1)

    def path_sample_visible(
        self,
        h: Float[Tensor, "*batch hidden"],
        beta: float,
        base: Float[Tensor, "visible"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch visible"]:
        mean = (1 - beta) * base + beta * (self.visible_bias + self.sigma**2 * (h @ self.weight.T))
        noise = _random(torch.randn, mean, generator)
        return mean + self.sigma * noise

    def path_log_z(self, base: Float[Tensor, "visible"]) -> Float[Tensor, ""]:
        return self.log_sigma.sum() + 0.5 * self.visible * math.log(2 * math.pi) + self.hidden * math.log(2)

    def statistics(self, v: Float[Tensor, "batch visible"]) -> dict[str, Tensor]:
        h = self.hidden_probabilities(v)
        scaled = (v - self.visible_bias) / self.sigma**2
        return {
            "weight": v.T @ h / len(v),
            "visible_bias": scaled.mean(0),
            "hidden_bias": h.mean(0),
            "log_sigma": (scaled * (v - self.visible_bias)).mean(0),
        }


class FantasyChains(NamedTuple):
    """State of persistent chains.

    Attributes:
        particles: ``(chain, visible)`` where the chains stand.
        fast: for each parameter the fast weights added to it while the chains move; plain PCD leaves them as they are.
    """

    particles: Tensor
    fast: dict[str, Tensor]


def fantasy_chains(rbm: GaussianRBM | BernoulliRBM, start: Float[Tensor, "chain visible"]) -> FantasyChains:
    """Chains that stand at `start` (a batch of data, say), with fast weights of zero."""
    return FantasyChains(start.clone(), {name: torch.zeros_like(value) for name, value in rbm.named_parameters()})


@torch.no_grad()
def contrastive_divergence(
    rbm: GaussianRBM | BernoulliRBM,
    v: Float[Tensor, "batch visible"],
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """CD-k estimate of the gradient of the mean negative log-likelihood (Hinton 2002).

    Args:
        rbm: the machine.
        v: data.
        steps: k, Gibbs sweeps from the data.
        generator: source of randomness.

    Returns:
        For each parameter name the gradient to *descend*, in the parameter's shape.
    """
    return _difference(rbm.statistics(rbm.gibbs(v, steps, generator)), rbm.statistics(v))


@torch.no_grad()
def persistent_contrastive_divergence(
    rbm: GaussianRBM | BernoulliRBM,
    v: Float[Tensor, "batch visible"],
    chains: FantasyChains,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], FantasyChains]:
    """PCD-k gradient of the mean negative log-likelihood, and the chains moved on (Tieleman 2008)."""
    particles = rbm.gibbs(chains.particles, steps, generator)
    return _difference(rbm.statistics(particles), rbm.statistics(v)), chains._replace(particles=particles)


@torch.no_grad()
def fast_persistent_contrastive_divergence(
    rbm: GaussianRBM | BernoulliRBM,
    v: Float[Tensor, "batch visible"],
    chains: FantasyChains,
    fast_rate: float,
    steps: int = 1,
    generator: torch.Generator | None = None,
    *,
    decay: float = 0.95,
) -> tuple[dict[str, Tensor], FantasyChains]:
    """PCD whose chains move under parameters + fast weights, which push them off where they linger.

    Args:
        rbm: the machine.
        v: data.
        chains: the chains and their fast weights, from `fantasy_chains`.
        fast_rate: learning rate of the fast weights; it should not be below that of the parameters.
        steps: Gibbs sweeps a call.
        generator: source of randomness.
        decay: factor on the fast weights a call (19/20 in Tieleman & Hinton 2009, sec. 3).

    Returns:
        The gradient to descend and the chains moved on.
    """
    moved = copy.deepcopy(rbm)
    for name, value in moved.named_parameters():
        value += chains.fast[name]
    particles = moved.gibbs(chains.particles, steps, generator)
    gradient = _difference(rbm.statistics(particles), rbm.statistics(v))
    fast = {name: decay * chains.fast[name] - fast_rate * gradient[name] for name in gradient}
    return gradient, FantasyChains(particles, fast)


def set_gradients(rbm: nn.Module, gradient: Mapping[str, Tensor]) -> None:
    """Put gradients by name where a torch optimiser finds them."""
    for name, value in rbm.named_parameters():
        value.grad = gradient[name].clone() if name in gradient else None


def _difference(model: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model[name] - data[name] for name in model}
