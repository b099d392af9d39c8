"""Rows of a pruned weight, scaled to outputs as large as before, against the outputs themselves in float64."""

import pytest
import torch

from optimum_sparse.config import SparseConfig
from optimum_sparse.methods.quantize import quantize
from optimum_sparse.methods.rescale import LARGEST, rescale
from optimum_sparse.methods.solution import Solution
from optimum_sparse.patterns import Unstructured
from optimum_sparse.statistics import GramStatistics, NormStatistics

KINDS = (GramStatistics, NormStatistics)


def problem(kind: type, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, Solution, GramStatistics]:
    """Inputs with correlated features, a weight, and the same one with a share of zeros."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    inputs[:, 7] = 0
    weight = torch.randn(6, 24, generator=generator)
    mask = torch.rand(6, 24, generator=generator) >= share
    statistics = kind(24)
    statistics.add(inputs)
    return inputs, weight, Solution(weight * mask, mask), statistics


def norms(kind: type, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Of the outputs; to someone who knows of norms only, features are not correlated."""
    if kind is NormStatistics:
        return (weight.double() * inputs.double().norm(dim=0)).norm(dim=1)
    return (inputs.double() @ weight.double().T).norm(dim=0)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_as_large_as_before(kind: type):
    inputs, weight, solution, statistics = problem(kind, share=0.2)
    pruned = solution.weight.clone()
    assert not torch.allclose(norms(kind, pruned, inputs), norms(kind, weight, inputs), rtol=1e-2)
    scaled = rescale(solution, statistics.output_energy(weight), statistics).weight
    torch.testing.assert_close(norms(kind, scaled, inputs), norms(kind, weight, inputs), rtol=1e-5, atol=0)
    growth = scaled.norm(dim=1) / pruned.norm(dim=1)  # one for each row
    torch.testing.assert_close(scaled, growth[:, None] * pruned)
    assert torch.equal(scaled != 0, pruned != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_grid_outputs_are_nearly_as_large_as_before(kind: type):
    inputs, weight, solution, statistics = problem(kind, share=0.2)
    coarse = quantize(solution, None, Unstructured(0.2), SparseConfig(quantization="int3"))
    before, after = norms(kind, coarse.weight, inputs), norms(kind, weight, inputs)
    scaled = rescale(coarse, statistics.output_energy(weight), statistics)
    assert scaled.grid is not None and torch.equal(scaled.grid.round(scaled.weight), scaled.weight)
    assert torch.equal(scaled.grid.codes(scaled.weight), coarse.grid.codes(coarse.weight))
    assert (before / after - 1).abs().max() > 0.02
    torch.testing.assert_close(norms(kind, scaled.weight, inputs), after, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_lost_most_of_its_outputs_grows_by_so_much_at_most(kind: type):
    _, weight, solution, statistics = problem(kind, share=0.0)
    solution.weight[0] *= 0.1
    solution.weight[1] *= 0.9
    scaled = rescale(solution, statistics.output_energy(weight), statistics).weight
    torch.testing.assert_close(scaled[0], 0.1 * LARGEST**0.5 * weight[0])
    torch.testing.assert_close(scaled[1:], weight[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_outputs_stay(kind: type):
    _, weight, solution, statistics = problem(kind)
    weight[0] = 0
    weight[0, 7] = solution.weight[0, 7] = 3.0  # its input is zero
    solution.weight[0, :7] = solution.weight[0, 8:] = 0
    solution.weight[1] = 0
    scaled = rescale(solution, statistics.output_energy(weight), statistics).weight
    assert scaled[0, 7] == 3 and not scaled[1].any()
    assert scaled.isfinite().all()
