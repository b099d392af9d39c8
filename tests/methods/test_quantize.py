"""Pruning and rounding in one sweep, against the sweep written out in float64, one column at a time."""

from typing import Any

import pytest
import torch

from optimum_sparse.config import METHOD_NAMES, SparseConfig
from optimum_sparse.methods import METHODS, Solution, statistics_for
from optimum_sparse.methods.quantize import quantize
from optimum_sparse.methods.refine import refine
from optimum_sparse.patterns import NM, Pattern, Unstructured
from optimum_sparse.statistics import Statistics
from tests.methods import oracles

ROWS, COLUMNS = 10, 160
PATTERNS = [Unstructured(0.5), NM(2, 4)]
OPTIONS = [
    {"quantization": "int4", "group_size": 32},
    {"quantization": "int8", "group_size": 48},  # groups that cross blocks, and a shorter one
    {"quantization": "int4", "group_size": -1, "symmetric": True},
]


def weight_of() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def inputs_of() -> torch.Tensor:
    """Correlated whole numbers, so that both sides see the same Hessian; two inputs are always zero."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = (8 * torch.randn(400, COLUMNS, generator=generator) @ mix).round()
    inputs[:, [3, 130]] = 0
    return inputs


def solve(pattern: Pattern, method: str = "sparsegpt", **options: Any) -> tuple[Solution, SparseConfig]:
    """As the solver does: the method, the refinement, and what rounds if neither has."""
    config = SparseConfig(method=method, block_size=64, **options)
    kind = statistics_for(config)
    statistics: Statistics | None = None if kind is None else kind(COLUMNS)
    if statistics is not None:
        statistics.add(inputs_of())
    weight = weight_of()
    solution = METHODS[method].solve(weight, statistics, pattern, config)
    if config.refine:
        solution = refine(config.refine, solution, weight, statistics, pattern, config)
    if config.quantization and solution.grid is None:
        solution = quantize(solution, statistics, pattern, config)
    return solution, config


def swept(solution: Solution) -> torch.Tensor:
    """Frantar and Alistarh, 2023, algorithm 1 with rounding: with this mask and these grids, in float64."""
    weight, inputs = weight_of().double(), inputs_of().double()
    hessian = inputs.T @ inputs
    live = hessian.diagonal() > 0
    hessian += 0.01 * hessian.diagonal()[live].mean() * torch.eye(COLUMNS, dtype=torch.float64)
    grid = solution.grid
    for j in range(COLUMNS):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for i in range(ROWS):
            group = 0 if grid.group_size == -1 else j // grid.group_size
            scale, zero = grid.scale[i, group].item(), int(grid.zero[i, group])
            allowed = [scale * (code - zero) for code in range(2**grid.bits)]
            target = min(allowed, key=lambda value: abs(value - float(weight[i, j]))) if solution.mask[i, j] else 0.0
            error = float(weight[i, j]) - target
            weight[i, j:] -= error / inverse[0, 0] * inverse[0]
            weight[i, j] = target
    return weight


@pytest.mark.parametrize("method", ["sparsegpt", "wanda-update", "magnitude-update"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_joint_sweep_is_that_of_the_paper(method: str, options: dict, pattern: Pattern):
    solution, _ = solve(pattern, method, **options)
    expected = swept(solution)
    found = solution.weight.double()
    step = solution.grid.scale.double().max(dim=1, keepdim=True).values
    # Where a weight is between two values, fp32 may go to the other one, and those behind it follow.
    same = ((found - expected).abs() < 1e-3 * step).double().mean()
    assert same > (0.97 if options["quantization"] == "int4" else 0.9)
    lost, least = (oracles.error(weight_of(), each, inputs_of()).sum() for each in (found, expected))
    assert lost == pytest.approx(float(least), rel=0.02)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("options", [*OPTIONS, {"quantization": "int4", "refine": "cg"}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_method_ends_on_its_grid(method: str, options: dict, pattern: Pattern):
    solution, config = solve(pattern, method, **options)
    assert torch.equal(solution.weight, solution.weight * solution.mask)
    if isinstance(pattern, NM):
        assert (solution.mask.view(ROWS, -1, pattern.m).sum(-1) == pattern.n).all()
    else:
        assert solution.mask.sum() == ROWS * COLUMNS // 2
    codes = solution.grid.codes(solution.weight)
    assert torch.equal(solution.grid.values(codes), solution.weight)
    assert solution.grid.bits == int(config.quantization[3:]) and solution.grid.group_size == config.group_size
    again, _ = solve(pattern, method, **options)
    assert torch.equal(solution.weight, again.weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_sweep_is_better_than_rounding_afterwards(pattern: Pattern):
    joint, config = solve(pattern, quantization="int4", group_size=32)
    pruned, _ = solve(pattern)
    nearest = quantize(pruned, None, pattern, config)
    joint_error, nearest_error = (oracles.error(weight_of(), x.weight, inputs_of()).sum() for x in (joint, nearest))
    assert joint_error < nearest_error


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_sweep_afterwards_is_better_than_the_nearest_values(pattern: Pattern):
    swept, config = solve(pattern, refine="cg", quantization="int4", group_size=32)
    refined, _ = solve(pattern, refine="cg")
    nearest = quantize(refined, None, pattern, config)
    swept_error, nearest_error = (oracles.error(weight_of(), x.weight, inputs_of()).sum() for x in (swept, nearest))
    assert swept_error < nearest_error


def test_eight_bits_cost_next_to_nothing():
    joint, _ = solve(Unstructured(0.5), quantization="int8", group_size=32)
    pruned, _ = solve(Unstructured(0.5))
    joint_error, pruned_error = (oracles.error(weight_of(), x.weight, inputs_of()).sum() for x in (joint, pruned))
    assert joint_error < 1.05 * pruned_error
