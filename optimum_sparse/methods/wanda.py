"""Wanda: prune by weight times activation norm, without an update (Sun et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..patterns import Pattern, keep_mask
from ..statistics import Statistics
from .solution import Solution


def solve(
    weight: torch.Tensor,
    statistics: Statistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Keep the largest |W_ij| * ||X_j||_2 of each comparison group, by default of each output (Eq. 1).

    See `optimum_sparse.methods` for the arguments.
    """
    scores = weight.abs().mul_(statistics.squared_norms.sqrt())
    mask = keep_mask(scores, pattern, config.comparison_group or "output", rows)
    return Solution(weight.masked_fill(~mask, 0), mask)
