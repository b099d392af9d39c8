"""Muon, against the singular value decomposition in float64."""

import math

import pytest
import torch

from optimum_sparse import muon
from optimum_sparse.muon import COEFFICIENTS, MOMENTUM, ROUNDS, Muon, orthogonalized


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """What the rounds make of a matrix, by what they make of each of its singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(ROUNDS):
        values = sum(c * values**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    return left * values @ right


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "product_dtype", lambda device: torch.float32)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (1, 5)], ids=str)
def test_rounds_act_on_singular_values(shape):
    for scale in (1e-12, 1.0, 1e12):
        matrix = scale * random(*shape)
        torch.testing.assert_close(orthogonalized(matrix).double(), by_singular_values(matrix), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_singular_values_come_close_to_one(monkeypatch: pytest.MonkeyPatch, dtype):
    monkeypatch.setattr(muon, "product_dtype", lambda device: dtype)
    matrix = random(40, 64)
    found = torch.linalg.svdvals(orthogonalized(matrix))
    assert torch.linalg.svdvals(matrix).min() < 0.2 * torch.linalg.svdvals(matrix).max()
    assert found.min() > 0.6 and found.max() < 1.3


def test_each_matrix_of_a_stack_is_on_its_own():
    stack = torch.stack([random(6, 9, seed=0), 1e3 * random(6, 9, seed=1), torch.zeros(6, 9)])
    found = orthogonalized(stack)
    assert not found[2].any()
    for matrix, one in zip(stack, found, strict=True):
        torch.testing.assert_close(one, orthogonalized(matrix), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("exact")
def test_steps_written_out():
    parameter = torch.nn.Parameter(random(6, 10))
    kept, expected, momentum = random(6, 10, seed=1) > 0, parameter.detach().double(), torch.zeros(6, 10).double()
    optimizer = Muon([{"params": [parameter], "lr": 0.01, "kept": kept}])
    for step in range(3):
        gradient = random(6, 10, seed=2 + step) * kept
        parameter.grad = gradient
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        expected -= 0.01 * math.sqrt(10) * by_singular_values(ahead) * kept
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(parameter[~kept], random(6, 10)[~kept])


def test_without_a_gradient_nothing_changes():
    parameter = torch.nn.Parameter(random(3, 4))
    optimizer = Muon([{"params": [parameter], "lr": 1.0, "kept": torch.ones(3, 4, dtype=torch.bool)}])
    optimizer.step()
    parameter.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(parameter, random(3, 4))
