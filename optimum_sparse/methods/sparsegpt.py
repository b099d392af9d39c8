"""SparseGPT: prune column by column and let the remaining columns make up for it (Frantar & Alistarh, 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..config import SparseConfig
from ..patterns import NM, Pattern, Unstructured, by_matrix, keep_all_but, keep_mask, num_pruned
from ..quantization import Rounding, joint_rounding
from ..statistics import GramStatistics
from . import fused
from .hessian import reversed_cholesky
from .solution import Solution
from .threads import one_thread

# Columns per panel of the sweep: updates stay inside it and reach the rest of the block as one matrix product.
INNER = 16


def solve(
    weight: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Minimise ||(W - V) X||^2 greedily, as Algorithm 1 of the paper, without forming an inverse.

    With H = U U^T (U upper triangular), H^-1 = R^T R for R = U^-1. A block of columns b needs R only through
    R_bb = U_bb^-1, since the updates it has received from the columns before it are E U_:b R_bb, with E = W - V of
    those columns. The loop therefore works on one block at a time and never touches the columns behind it.

    The weight is held transposed, so that a column of the sweep is contiguous.

    See `optimum_sparse.methods` for the arguments.
    """
    factor, damping = reversed_cholesky(statistics, config.dampening_frac)
    dead = statistics.squared_norms == 0
    dead &= ~dead.all()  # with no live input there is nothing to prefer, and the largest weights are kept
    target = weight.T.masked_fill(dead[:, None], 0).contiguous()
    mask = torch.empty_like(target, dtype=torch.bool)
    rounding = joint_rounding(weight, config)

    def select(columns: torch.Tensor, inverse: torch.Tensor, block: slice) -> torch.Tensor | None:
        if isinstance(pattern, NM):
            return None
        return _select(columns / inverse.diagonal()[:, None], pattern, rows, block.start, block.stop)

    pruned = sweep(target, mask, factor, pattern, config.block_size, select, rounding)
    # Weights of inputs that were always zero go first. Those that are kept all the same stay as they were.
    grid = None if rounding is None else rounding.grid
    unmoved = weight if grid is None else grid.round(weight)
    torch.where(mask & dead[:, None], unmoved.T, pruned, out=pruned)
    del target, unmoved  # make room for the copies
    return Solution(pruned.T.contiguous(), mask.T.contiguous(), damping, grid=grid)


def sweep(
    target: torch.Tensor,
    mask: torch.Tensor,
    factor: torch.Tensor,
    pattern: Pattern,
    block_size: int,
    select: Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor | None],
    rounding: Rounding | None = None,
) -> torch.Tensor:
    """Prune all columns from left to right, with a mask that is chosen on the way.

    Args:
        target: `[columns, rows]` fp32 weights, transposed; overwritten.
        mask: `[columns, rows]` bool, true where a weight is kept; filled in.
        factor: `[columns, columns]` U.
        pattern: The pattern.
        block_size: Columns of a block.
        select: Called with a block of columns as they have become, R_bb, and which block it is: gives its part of the
            mask, or `None` for that to be chosen per N:M group when the sweep gets there.
        rounding: Rounds what is kept, so that the columns behind make up for that, too.

    Returns:
        `[columns, rows]`, what has become of the weights.
    """
    # A block of the target is needed only until its errors are known.
    pruned, errors = torch.empty_like(target), target
    for start, stop in _blocks(len(target), block_size, pattern):
        block = slice(start, stop)
        eye = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor[block, block], eye, upper=True)
        received = factor[:start, block].T @ errors[:start]
        columns = torch.addmm(target[block], inverse.T, received, out=pruned[block])
        with one_thread():
            keep = select(columns, inverse, block)
            mask[block] = _sweep_block(columns, inverse, keep, pattern, rounding, start)
        torch.sub(target[block], columns, out=errors[block])
    return pruned


def _blocks(in_features: int, block_size: int, pattern: Pattern) -> list[tuple[int, int]]:
    """Bounds of the blocks; those of N:M hold whole groups."""
    step = block_size if isinstance(pattern, Unstructured) else -(-block_size // pattern.m) * pattern.m
    return [(start, min(start + step, in_features)) for start in range(0, in_features, step)]


def _select(
    saliency: torch.Tensor, pattern: Unstructured, rows: Sequence[int] | None, start: int, stop: int
) -> torch.Tensor:
    """Adaptive mask selection: drop the smallest |w / R_ii| of a block, over all outputs of each matrix.

    The number to drop is the difference of two running totals, so that those of all blocks add up to what was asked.

    Args:
        saliency: `[columns, rows]` w / R_ii of the block.
        pattern: The pattern.
        rows: Row counts of the stacked matrices.
        start: First column of the block.
        stop: One past its last column.
    """

    def keep(scores: torch.Tensor) -> torch.Tensor:
        height = len(scores)
        count = num_pruned(stop * height, pattern.sparsity) - num_pruned(start * height, pattern.sparsity)
        return keep_all_but(scores.reshape(1, -1), count).view(height, -1)

    return by_matrix(saliency.abs().T, rows, keep).T


def _sweep_block(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    keep: torch.Tensor | None,
    pattern: Pattern,
    rounding: Rounding | None = None,
    start: int = 0,
) -> torch.Tensor:
    """Prune the columns of a block one after the other, in place.

    Args:
        columns: `[columns, rows]` weights of the block, transposed.
        inverse: `[columns, columns]` R_bb, upper triangular.
        keep: `[columns, rows]` mask, or `None` to choose it per N:M group when the sweep gets there.
        pattern: The pattern.
        rounding: Rounds what is kept, so that the columns behind make up for that, too.
        start: Which input the first column is.

    Returns:
        The mask, true where a weight was kept.
    """
    width = columns.shape[0]
    group = pattern.m if isinstance(pattern, NM) else 1
    fast = fused.usable(columns) and rounding is None
    panel, inner = (fused.sweep, fused.PANEL) if fast else (_sweep_panel, INNER)
    step = -(-inner // group) * group
    mask = torch.empty_like(columns, dtype=torch.bool) if keep is None else keep.contiguous()
    for begin in range(0, width, step):
        mine = slice(begin, min(begin + step, width))
        rounded = {}
        if rounding is not None:
            ahead = columns[begin:] if keep is None else columns[begin:].masked_fill(~mask[begin:], 0)
            rounding.enter(ahead, start + begin, mine.stop - begin)
            rounded["rounded"] = partial(rounding.column, start=start + begin)
        errors = panel(columns[mine], inverse[mine, mine], mask[mine], pattern, keep is None, **rounded)
        columns[mine.stop :].addmm_(inverse[mine, mine.stop :].T, errors, alpha=-1)
    return mask


def _sweep_panel(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    mask: torch.Tensor,
    pattern: Pattern,
    choose: bool,
    rounded: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `fused.sweep` does, column by column; its oracle. `rounded` gives what a column is rounded to."""
    group = pattern.m if isinstance(pattern, NM) else 1
    diagonal, errors = inverse.diagonal(), torch.empty_like(columns)
    for i, (column, error) in enumerate(zip(columns, errors, strict=True)):
        if choose and i % group == 0:
            saliency = columns[i : i + group] / diagonal[i : i + group, None]
            mask[i : i + group] = keep_mask(saliency.abs().T, pattern).T
        torch.div(column, diagonal[i], out=error)
        error.masked_fill_(mask[i], 0)
        column.masked_fill_(~mask[i], 0)
        if rounded is not None:
            nearest = rounded(column, i)
            error.add_(column.sub_(nearest).div_(diagonal[i]))
            column.copy_(nearest)
        columns[i + 1 :].addr_(inverse[i, i + 1 :], error, alpha=-1)
    return errors
