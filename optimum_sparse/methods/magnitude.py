"""Magnitude pruning: drop the weights with the smallest absolute value (Han et al., 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..patterns import Pattern, keep_mask
from .solution import Solution


def solve(
    weight: torch.Tensor,
    statistics: None,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Keep the largest |W| of each comparison group, by default of the whole matrix.

    See `optimum_sparse.methods` for the arguments.
    """
    mask = keep_mask(weight.abs(), pattern, config.comparison_group or "layer", rows)
    return Solution(weight.masked_fill(~mask, 0), mask)
