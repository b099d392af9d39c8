"""RIA: prune by relative importance and activation norm, without an update (Zhang et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..patterns import Pattern, keep_mask
from ..statistics import Statistics
from .solution import Solution

# Power of the activation norm, as in the paper.
POWER = 0.5


def solve(
    weight: torch.Tensor,
    statistics: Statistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Keep the largest (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||^0.5, by default of each matrix.

    See `optimum_sparse.methods` for the arguments.
    """
    parts = weight.abs().split(list(rows or weight.shape[:1]))
    scores = torch.cat([_relative(part) for part in parts]) * statistics.squared_norms.sqrt() ** POWER
    mask = keep_mask(scores, pattern, config.comparison_group or "layer", rows)
    return Solution(weight.masked_fill(~mask, 0), mask)


def _relative(magnitude: torch.Tensor) -> torch.Tensor:
    """Share of each weight in its input plus its share in its output; 0 where all of them are zero."""
    least = torch.finfo(magnitude.dtype).tiny
    of_input, of_output = magnitude.sum(dim=0), magnitude.sum(dim=1, keepdim=True)
    return magnitude / of_input.clamp(min=least) + magnitude / of_output.clamp(min=least)
