"""SparseGPT in its authors' order of operations, to check parity with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..patterns import NM, Pattern, keep_all_but, keep_mask, num_pruned
from ..statistics import GramStatistics
from .solution import Solution


def solve(
    weight: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Algorithm 1 as published: explicit inverse in fp32, one column at a time, eager updates of all columns behind.

    Weights of inputs that were always zero are set to zero first. It differs from the authors' code only in that
    ties do not prune more weights than asked.

    See `optimum_sparse.methods` for the arguments.
    """
    parts = [_solve_one(part, statistics, pattern, config) for part in weight.split(list(rows or weight.shape[:1]))]
    return Solution(torch.cat([p.weight for p in parts]), torch.cat([p.mask for p in parts]), config.dampening_frac)


def _solve_one(weight: torch.Tensor, statistics: GramStatistics, pattern: Pattern, config: SparseConfig) -> Solution:
    hessian = statistics.gram * (2 / max(statistics.num_tokens, 1))
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight = weight.masked_fill(dead, 0)
    hessian.diagonal().add_(config.dampening_frac * hessian.diagonal().mean())
    try:
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the Hessian of its inputs ({statistics.num_tokens} tokens) cannot be factored ({error}): raise "
            f"dampening_frac ({config.dampening_frac:g}), calibrate on more data, or choose method='sparsegpt'"
        ) from error

    mask = torch.empty_like(weight, dtype=torch.bool)
    out_features, in_features = weight.shape
    step = -(-config.block_size // pattern.m) * pattern.m if isinstance(pattern, NM) else config.block_size
    for start in range(0, in_features, step):
        stop = min(start + step, in_features)
        columns = weight[:, start:stop].clone()
        errors = torch.empty_like(columns)
        diagonal = inverse.diagonal()[start:stop]
        if not isinstance(pattern, NM):
            count = num_pruned(stop * out_features, pattern.sparsity) - num_pruned(
                start * out_features, pattern.sparsity
            )
            scores = (columns / diagonal).square()
            mask[:, start:stop] = keep_all_but(scores.reshape(1, -1), count).view_as(scores)
        for i in range(stop - start):
            if isinstance(pattern, NM) and (start + i) % pattern.m == 0:
                scores = (columns[:, i : i + pattern.m] / diagonal[i : i + pattern.m]).square()
                mask[:, start + i : start + i + pattern.m] = keep_mask(scores, pattern)
            kept = columns[:, i].masked_fill(~mask[:, start + i], 0)
            errors[:, i] = (columns[:, i] - kept) / diagonal[i]
            columns[:, i:] -= errors[:, i, None] * inverse[start + i, start + i : stop]
            weight[:, start + i] = kept
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return Solution(weight, mask)
