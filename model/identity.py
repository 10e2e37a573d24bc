r"""Who it is: how much likelier a patch is if it shows the person of a given picture than if it shows anybody.

The features of a person's pictures are ``f = m + z + e``: z ~ N(0, B) is the person's own, e ~ N(0, W) comes with every
picture (light, expression, the labeller's hand). In coordinates t of f in which W = 1 and B = diag b,

.. math:: \log \frac{p(t \mid t_v)}{p(t)} = \sum_k \log N\Big(t_k;\; \frac{b_k\, t_{vk}}{b_k + 1},\;
          \frac{2 b_k + 1}{b_k + 1}\Big) - \log N(t_k;\; 0,\; b_k + 1)

is the Bayes factor of "the same person as on v" against "anybody": probabilistic linear discriminant analysis (Ioffe
2006; Prince & Elder 2007). The object's density once v is given is the object's density with the law of t replaced,
``p_o(y) p(t | t_v) / p(t)``, by the projection that also puts the object's patch into clutter (`model.attention`).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.model.patch import normalise

__all__ = ["IdentityModel", "edges"]

# Directions of edges, and the width and stride of the cells in which they are pooled, canonical pixels.
DIRECTIONS, CELL, STRIDE = 8, 4, 2
# Energy of edges below which a neighbourhood counts as flat, and what keeps the root's slope finite.
FLAT, ROOT = 0.02, 1e-3
# Variance of the features over all pictures is about this; floors are shares of it.
FLOORS = (0.1, 0.3, 1.0)
# Weights of the Bayes factor that validation chooses among: features go together more than a normal law believes.
WEIGHTS = tuple(2.0 ** (-k / 2) for k in range(11))
# Parts into which people are divided to choose floor and weight, and triples judged in each.
FOLDS, TRIPLES = 3, 4000
FEWEST_PEOPLE = 6
MOST_DIRECTIONS = 64
# Directions in which people vary less than this (pictures of one person vary by 1) are left out.
LEAST_BETWEEN = 0.05


class IdentityModel(nn.Module):
    """The Bayes factor of "the same person", in coordinates in which pictures of one person have unit covariance.

    Args:
        mean: ``(feature,)`` m, of `edges`.
        axes: ``(feature, direction)``: ``t = (f - m) @ axes``.
        between: ``(direction,)`` variances b of people about m.
        weight: of the log Bayes factor; below 1 where features that go together make it overconfident.
    """

    mean: Tensor
    axes: Tensor
    between: Tensor
    weight: Tensor

    def __init__(
        self,
        mean: Float[Tensor, "feature"],
        axes: Float[Tensor, "feature direction"],
        between: Float[Tensor, "direction"],
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("axes", axes), ("between", between)):
            self.register_buffer(name, value)
        self.register_buffer("weight", mean.new_tensor(weight))

    @classmethod
    def blank(cls, directions: int) -> "IdentityModel":
        """A place to load a state into."""
        features = edges(torch.zeros(24, 24)).shape[-1]
        return cls(torch.zeros(features), torch.zeros(features, directions), torch.ones(directions))

    @classmethod
    def fit(
        cls, crops: Float[Tensor, "picture version 24 24"], person: Int[Tensor, " picture"], seed: int = 0
    ) -> "IdentityModel | None":
        """From pictures of several people; floor and weight by how they tell people apart who were left out.

        Args:
            crops: intensities in [0, 1]; versions are the same picture a little moved.
            person: a number for each person.
            seed: of the division of people into folds.

        Returns:
            The model, or None for fewer than 6 people with two pictures: too few to learn what tells people apart.
        """
        several = [p for p in person.unique().tolist() if int((person == p).sum()) > 1]
        if len(several) < FEWEST_PEOPLE:
            return None
        pictures = torch.isin(person, person.new_tensor(several))
        f, person = edges(crops[pictures]), person[pictures]
        generator = torch.Generator().manual_seed(seed)
        losses = torch.zeros(len(FLOORS), len(WEIGHTS), dtype=torch.float64)
        for held in torch.tensor(several)[torch.randperm(len(several), generator=generator)].tensor_split(FOLDS):
            out = torch.isin(person, held.to(person))
            spread = _Spread(f[~out], person[~out])
            triples = _triples(person[out], generator)
            for i, floor in enumerate(FLOORS):
                margin = _margins(spread.model(floor), f[out], triples).double()
                losses[i] += torch.stack([functional.softplus(-w * margin).mean() for w in WEIGHTS]).cpu()
        best = int(losses.argmin())
        return _Spread(f, person).model(FLOORS[best // len(WEIGHTS)], WEIGHTS[best % len(WEIGHTS)])

    def coordinates(self, patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch direction"]:
        """The coordinates t of patches in [0, 1] (lighting does not matter); differentiable."""
        return self._coordinates(edges(patch.to(self.mean)))

    def log_ratio(
        self, t: Float[Tensor, "*#batch direction"], of_v: Float[Tensor, "*#batch direction"]
    ) -> Float[Tensor, "*batch"]:
        """Weighted log Bayes factor of "the same person" for two pictures by their coordinates, nats; symmetric."""
        b = self.between
        spread = (2 * b + 1) / (b + 1)
        away = (t - b / (b + 1) * of_v).square() / spread - t.square() / (b + 1)
        return -0.5 * self.weight * (away + (spread / (b + 1)).log()).sum(-1)

    def _coordinates(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.axes


def edges(patch: Float[Tensor, "*batch 24 24"]) -> Float[Tensor, "*batch feature"]:
    """How much edge a patch has in every cell and direction, relative to its neighbourhood.

    Histograms of oriented gradients (Dalal & Triggs 2005), smooth in the patch: what light and a pixel of misalignment
    leave as it is. 8 directions in cells of 4×4 canonical pixels, 2 apart.
    """
    n = functional.pad(normalise(patch).reshape(-1, 1, *patch.shape[-2:]), (1, 1, 1, 1), mode="replicate")
    x, y = 0.5 * (n[..., 1:-1, 2:] - n[..., 1:-1, :-2]), 0.5 * (n[..., 2:, 1:-1] - n[..., :-2, 1:-1])
    angle = (2 * math.pi / DIRECTIONS * torch.arange(DIRECTIONS, device=n.device).to(n.dtype))[:, None, None]
    pooled = functional.avg_pool2d(torch.relu(x * angle.cos() + y * angle.sin()), CELL, STRIDE)
    energy = functional.pad(pooled.square().sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    relative = pooled / torch.sqrt(functional.avg_pool2d(energy, 3, 1) + FLAT)
    features = torch.sqrt(relative + ROOT).flatten(1)
    return features.reshape(*patch.shape[:-2], features.shape[1])


class _Spread:
    """How features of one person's pictures ``(picture, version, feature)`` scatter, and how people do."""

    def __init__(self, f: Tensor, person: Tensor) -> None:
        f = f.double()
        members = [f[person == p] for p in person.unique()]
        centres = torch.stack([of.mean((0, 1)) for of in members])
        away = torch.cat([(of - centre).flatten(0, 1) for of, centre in zip(members, centres, strict=True)])
        # Versions of a picture smooth its scatter; it is still one picture, of which each person's mean takes one.
        within = away.T @ away / len(away) * (len(f) / (len(f) - len(members)))
        self.variances, self.axes = torch.linalg.eigh(within)
        self.mean = centres.mean(0)
        apart = centres - self.mean
        # A mean of n pictures scatters by W / n more than the person does.
        chance = torch.tensor([1 / len(of) for of in members]).double().mean()
        self.between = apart.T @ apart / (len(members) - 1) - chance * within
        self.scale = f.flatten(0, 1).var(0).mean()

    def model(self, floor: float, weight: float = 1.0) -> IdentityModel:
        """Simultaneous diagonalisation of W, `floor` shares of the features' variance added, and B."""
        white = self.axes / (self.variances.clamp(min=0) + floor * self.scale).sqrt()
        between, turn = torch.linalg.eigh(white.T @ self.between @ white)
        kept = between.argsort(descending=True)[:MOST_DIRECTIONS]
        kept = kept[between[kept] > LEAST_BETWEEN]
        return IdentityModel(self.mean.float(), (white @ turn[:, kept]).float(), between[kept].float(), weight)


def _triples(person: Int[Tensor, " picture"], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of pictures v, another of the same person, and one of another person: `TRIPLES` of them."""
    person = person.cpu()  # where the generator is
    same = (person[:, None] == person).double()
    others = 1 - same
    same.fill_diagonal_(0)
    v = torch.randint(len(person), (TRIPLES,), generator=generator)
    another, other = (torch.multinomial(rows[v], 1, generator=generator)[:, 0] for rows in (same, others))
    return v, another, other


def _margins(
    model: IdentityModel, f: Float[Tensor, "picture version feature"], triples: tuple[Tensor, Tensor, Tensor]
) -> Float[Tensor, " triple"]:
    """Log Bayes factor of the same person's picture less that of the other's, both a little moved."""
    of_v, same, other = (
        model._coordinates(f[rows, version]) for rows, version in zip(triples, (0, -1, -1), strict=True)
    )
    return model.log_ratio(same, of_v) - model.log_ratio(other, of_v)
