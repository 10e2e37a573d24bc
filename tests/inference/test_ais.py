"""Log-normalisers against enumeration."""

import inspect
import math

import pytest
import torch

from foveate.inference.ais import _summary, ais_log_z, exact_log_z, log_z, reverse_ais_log_z
from foveate.model.errors import InputError
from foveate.model.rbm import BernoulliRBM, GaussianRBM


def machine(kind: str, visible: int, hidden: int, scale: float = 1.0) -> GaussianRBM | BernoulliRBM:
    generator = torch.Generator().manual_seed(visible + 100 * hidden)
    rbm = (BernoulliRBM if kind == "binary" else GaussianRBM)(visible, hidden, dtype=torch.float64)
    rbm.randomise(scale, generator)
    with torch.no_grad():
        for bias in (rbm.visible_bias, rbm.hidden_bias):
            bias.copy_(torch.randn(bias.shape, generator=generator, dtype=torch.float64))
    return rbm


def exact_samples(rbm: BernoulliRBM, count: int, generator: torch.Generator) -> torch.Tensor:
    index = torch.arange(1 << rbm.visible)
    v = ((index[:, None] >> torch.arange(rbm.visible)) & 1).double()
    law = torch.softmax(-rbm.free_energy(v), 0).detach()
    return v[torch.multinomial(law, count, replacement=True, generator=generator)]


def test_enumeration_from_either_side_is_the_same() -> None:
    rbm = machine("binary", 5, 9)
    mirrored = BernoulliRBM(9, 5, dtype=torch.float64)
    with torch.no_grad():
        mirrored.weight.copy_(rbm.weight.T)
        mirrored.visible_bias.copy_(rbm.hidden_bias)
        mirrored.hidden_bias.copy_(rbm.visible_bias)
    # float64 sums of a few hundred terms
    assert exact_log_z(rbm).estimate == pytest.approx(exact_log_z(mirrored).estimate, abs=1e-10)


def test_enumeration_of_independent_units_is_the_known_normaliser() -> None:
    rbm = machine("gaussian", 3, 12, scale=0.0)
    known = 1.5 * math.log(2 * math.pi) + torch.nn.functional.softplus(rbm.hidden_bias).sum().item()
    assert exact_log_z(rbm).estimate == pytest.approx(known, abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "visible", "hidden", "scale"),
    [("binary", 6, 6, 1.0), ("binary", 8, 4, 2.0), ("gaussian", 4, 8, 0.6)],
)
def test_forward_ais_is_within_three_standard_errors_of_enumeration(kind, visible, hidden, scale) -> None:
    rbm = machine(kind, visible, hidden, scale)
    truth = exact_log_z(rbm).estimate
    generator = torch.Generator().manual_seed(3)
    found = ais_log_z(rbm, chains=400, target_error=0.02, generator=generator)
    assert found.standard_error <= 0.02
    assert abs(found.estimate - truth) < 3 * found.standard_error
    # An estimator off by 10 % of Z is seen: its error would be five standard errors.
    assert abs(found.estimate - truth) < 0.5 * abs(math.log(0.9))


def test_the_standard_error_is_the_spread_of_repeated_runs() -> None:
    rbm = machine("binary", 8, 4, 2.0)
    generator = torch.Generator().manual_seed(5)
    runs = [ais_log_z(rbm, chains=50, temperatures=60, generator=generator) for _ in range(60)]
    spread = torch.tensor([run.estimate for run in runs]).std().item()
    claimed = sum(run.standard_error for run in runs) / len(runs)
    # The standard deviation of 60 runs is known to 9 %, the delta method to some per cent.
    assert 0.7 < claimed / spread < 1.4


def test_forward_and_reverse_hold_the_truth_between_them() -> None:
    rbm = machine("binary", 8, 4, 2.0)
    truth = exact_log_z(rbm).estimate
    generator = torch.Generator().manual_seed(7)
    # So few temperatures that both are visibly biased: over 40 runs the means lie on their own sides of log Z.
    forward = [ais_log_z(rbm, chains=20, temperatures=5, generator=generator).estimate for _ in range(40)]
    reverse = [
        reverse_ais_log_z(
            rbm, exact_samples(rbm, 20, generator), exact=True, temperatures=5, generator=generator
        ).estimate
        for _ in range(40)
    ]
    assert sum(forward) / 40 < truth < sum(reverse) / 40


def test_reverse_ais_from_exact_samples_is_within_three_standard_errors_and_says_what_it_is() -> None:
    rbm = machine("binary", 7, 6, 1.0)
    generator = torch.Generator().manual_seed(9)
    samples = exact_samples(rbm, 400, generator)
    found = reverse_ais_log_z(rbm, samples, exact=True, temperatures=400, generator=generator)
    assert found.kind == "reverse"
    assert found.standard_error < 0.03
    assert abs(found.estimate - exact_log_z(rbm).estimate) < 3 * found.standard_error
    heuristic = reverse_ais_log_z(rbm, samples, exact=False, temperatures=10, generator=generator)
    assert heuristic.kind == "reverse-heuristic"


def test_a_base_from_the_data_gives_the_same_log_z() -> None:
    rbm = machine("binary", 6, 6, 1.0)
    generator = torch.Generator().manual_seed(11)
    base = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = ais_log_z(rbm, chains=400, target_error=0.02, base=base, generator=generator)
    assert abs(found.estimate - exact_log_z(rbm).estimate) < 3 * found.standard_error


def test_small_machines_are_enumerated_and_large_ones_annealed() -> None:
    assert log_z(machine("binary", 30, 8, 0.1)).kind == "exact"
    large = log_z(machine("binary", 24, 22, 0.1), target_error=0.2, generator=torch.Generator().manual_seed(1))
    assert large.kind == "forward"
    assert 0 < large.standard_error <= 0.2
    with pytest.raises(InputError, match="at most 20"):
        exact_log_z(machine("binary", 24, 22))


def test_one_chain_is_refused_because_it_has_no_error() -> None:
    with pytest.raises(InputError, match="standard error"):
        ais_log_z(machine("binary", 4, 4), chains=1)
    with pytest.raises(InputError, match="standard error"):
        reverse_ais_log_z(machine("binary", 4, 4), torch.zeros(1, 4, dtype=torch.float64), exact=True)


@pytest.mark.parametrize("base", [torch.tensor(0.0).double(), torch.zeros(1).double(), torch.zeros(4, 1).double()])
def test_a_base_machine_with_other_units_and_no_temperatures_are_refused(base: torch.Tensor) -> None:
    rbm, samples = machine("binary", 4, 4), torch.zeros(2, 4, dtype=torch.float64)
    forward, reverse = inspect.unwrap(ais_log_z), inspect.unwrap(reverse_ais_log_z)
    with pytest.raises(InputError, match=r"each visible unit, 4"):
        forward(rbm, base=base)
    with pytest.raises(InputError, match=r"each visible unit, 4"):
        reverse(rbm, samples, exact=True, base=base)
    with pytest.raises(InputError, match="0 temperatures"):
        forward(rbm, temperatures=0)
    with pytest.raises(InputError, match="0 temperatures"):
        reverse(rbm, samples, exact=True, temperatures=0)


def test_weights_are_summed_up_by_their_definitions() -> None:
    found = _summary(torch.tensor([1.0, 1.0, 2.0]).double().log() + 700.0, 10, "forward")
    # Mean 4/3; sd of (1, 1, 2) is 1/√3, over mean and √3 chains: 1/4; (Σ w)² / Σ w² = 16/6.
    assert found.estimate == pytest.approx(700.0 + math.log(4 / 3))
    assert found.standard_error == pytest.approx(0.25)
    assert found.effective_sample_size == pytest.approx(16 / 6)
