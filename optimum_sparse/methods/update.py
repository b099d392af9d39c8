"""Wanda and magnitude with weight update: ablations of the Wanda paper (Sun et al., ICLR 2024, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..patterns import Pattern
from ..quantization import Rounding, joint_rounding
from ..statistics import GramStatistics
from . import magnitude, wanda
from .hessian import reversed_cholesky
from .solution import Solution
from .sparsegpt import sweep


def solve_wanda(
    weight: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Choose the mask of a matrix as Wanda does, then make up for it with SparseGPT's update.

    See `optimum_sparse.methods` for the arguments.
    """
    mask = wanda.solve(weight, statistics, pattern, config, rows).mask
    return update(weight, mask, statistics, pattern, config, joint_rounding(weight, config))


def solve_magnitude(
    weight: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Choose the mask of a matrix by magnitude, then make up for it with SparseGPT's update.

    See `optimum_sparse.methods` for the arguments.
    """
    mask = magnitude.solve(weight, None, pattern, config, rows).mask
    return update(weight, mask, statistics, pattern, config, joint_rounding(weight, config))


def update(
    weight: torch.Tensor,
    mask: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
    rounding: Rounding | None = None,
) -> Solution:
    """The paper's sequential update: SparseGPT's sweep from left to right, with a mask that is already chosen.

    Args:
        weight: What to come close to, `[rows, in_features]` fp32.
        mask: True where a weight is kept.
        statistics: Of the inputs.
        pattern: Of the mask.
        config: Size of the blocks, and damping.
        rounding: Rounds what is kept, so that the columns behind make up for that, too.
    """
    factor, damping = reversed_cholesky(statistics, config.dampening_frac)
    target, keep = weight.T.contiguous(), mask.T.contiguous()
    pruned = sweep(
        target, keep, factor, pattern, config.block_size, lambda columns, inverse, block: keep[block], rounding
    )
    del target  # make room for the copy
    grid = None if rounding is None else rounding.grid
    return Solution(pruned.T.contiguous(), mask, damping, grid=grid)
