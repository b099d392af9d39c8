"""The corrected target, against least squares in float64."""

import pytest
import torch

from optimum_sparse.methods import correction
from optimum_sparse.methods.correction import corrected_target
from optimum_sparse.statistics import PairedStatistics


def problem(dead: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PairedStatistics]:
    """A weight, the inputs of a pruned and of the dense model, and their statistics."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    dense = torch.randn(200, 12, generator=generator) @ mixing
    inputs = dense + 0.5 * torch.randn(200, 12, generator=generator)
    if dead:
        inputs[:, 3] = 0
    statistics = PairedStatistics(12)
    for part, twin in zip(inputs.split(64), dense.split(64), strict=True):
        statistics.add(part)
        statistics.add_deviation(part, twin)
    return torch.randn(5, 12, generator=generator), inputs, dense, statistics


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_the_target_is_that_of_least_squares(strength: float, dead: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correction, "DAMPING", 1e-6)
    weight, inputs, dense, statistics = problem(dead)
    target = corrected_target(weight, statistics, strength)
    best = torch.linalg.lstsq(inputs.double(), dense.double() @ weight.double().T, driver="gelsd").solution.T
    if dead:
        best[:, 3] = weight[:, 3].double()  # nothing is known of it
    torch.testing.assert_close(target.double(), weight + strength * (best - weight), rtol=1e-3, atol=1e-3)


def test_errors_to_the_dense_outputs_differ_by_a_constant(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correction, "DAMPING", 1e-6)
    weight, inputs, dense, statistics = problem()
    target = corrected_target(weight, statistics, 1.0)
    differences = []
    for seed in range(3):
        other = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        to_dense = (dense @ weight.T - inputs @ other.T).double().square().sum()
        to_target = (inputs @ (target - other).T).double().square().sum()
        differences.append((to_dense - to_target).item())
    assert differences[1:] == pytest.approx(differences[:-1], rel=1e-3)


def test_damping_is_that_of_inputs_of_norm_1():
    weight, inputs, dense, statistics = problem()
    norms = inputs.double().norm(dim=0)
    units = inputs.double() / norms
    gram = units.T @ units + correction.DAMPING * torch.eye(12)
    expected = weight.double() @ (dense.double() - inputs).T @ units @ torch.linalg.inv(gram) / norms
    target = corrected_target(weight, statistics, 1.0)
    torch.testing.assert_close(target.double() - weight, expected, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_those_of_the_dense_model_change_nothing():
    weight, inputs, _, _ = problem()
    statistics = PairedStatistics(12)
    statistics.add(inputs)
    statistics.add_deviation(inputs, inputs)
    assert torch.equal(corrected_target(weight, statistics, 1.0), weight)
