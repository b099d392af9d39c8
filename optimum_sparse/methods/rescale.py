"""Outputs that are as large as before: rows of a pruned weight, scaled."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..statistics import Statistics
from .solution import Solution

# The most that the square of an output may grow by: a row that has lost more than half of it is mostly noise.
LARGEST = 2.0


def rescale(solution: Solution, energy: torch.Tensor, statistics: Statistics) -> Solution:
    """Scale the rows of a pruned weight V until ||V X|| is what ||W X|| was, for each row.

    What is closest to the outputs of W is smaller than these, as any regression is, and through many layers that adds
    up (cf. signal collapse, arXiv 2502.15790). The squared error grows by about a quarter of its square.

    Rows on a grid stay on one: its steps are scaled, as nearly as bfloat16 can hold them.

    Args:
        solution: With V, which may be overwritten.
        energy: ||W X||^2 of each row, as `Statistics.output_energy`, `[rows]`.
        statistics: Of the inputs X.
    """
    growth = energy / torch.maximum(statistics.output_energy(solution.weight), energy / LARGEST)
    # A row without outputs has 0 / 0.
    factor = torch.where(energy > 0, growth, torch.ones_like(growth)).sqrt_()[:, None]
    if solution.grid is None:
        return replace(solution, weight=solution.weight.mul_(factor))
    codes, grid = solution.grid.codes(solution.weight), solution.grid.scaled(factor)
    return replace(solution, weight=grid.values(codes), grid=grid)
