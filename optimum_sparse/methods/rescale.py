"""Outputs that are as large as before: rows of a pruned weight, scaled."""

from __future__ import annotations

import torch

from ..statistics import Statistics
from .solution import Solution

# The most that the square of an output may grow by: a row that has lost more than half of it is mostly noise.
LARGEST = 2.0


def rescale(solution: Solution, energy: torch.Tensor, statistics: Statistics) -> None:
    """Scale the rows of a pruned weight V, in place, until ||V X|| is what ||W X|| was, for each row.

    What is closest to the outputs of W is smaller than these, as any regression is, and through many layers that adds
    up (cf. signal collapse, arXiv 2502.15790). The squared error grows by about a quarter of its square.

    Args:
        solution: With V.
        energy: ||W X||^2 of each row, as `Statistics.output_energy`, `[rows]`.
        statistics: Of the inputs X.
    """
    growth = energy / torch.maximum(statistics.output_energy(solution.weight), energy / LARGEST)
    # A row without outputs has 0 / 0.
    solution.weight.mul_(torch.where(energy > 0, growth, torch.ones_like(growth)).sqrt_()[:, None])
