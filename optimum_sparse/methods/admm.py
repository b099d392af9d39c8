"""ADMM: weights and mask of a layer by alternating directions (Boža, TMLR 2024; ALPS, NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..patterns import NM, Pattern, keep_mask, num_pruned
from ..precision import product_dtype
from ..statistics import GramStatistics
from .cg import conjugate_gradients, inverse_norms, unit_gram
from .solution import Solution

# The penalty rho grows by a constant factor from the first to the last level; each level is one factorisation. The
# larger it is, the less the mask changes. It ends where, on independent inputs of norm 1, a kept weight and the dual
# of a pruned one count alike, so that the largest weights are kept.
RHO = (0.2, 1.0)
LEVELS = 4
# Over-relaxation of the step, which saves iterations.
RELAXATION = 1.5
# Distance between the dense and the sparse copy, relative to the weight, at which they are taken for equal.
TOLERANCE = 1e-3
# Entries from which the threshold of a mask on the way is estimated.
SAMPLE = 2**16
# Steps of conjugate gradients at the end.
POLISH = 4


def solve(
    weight: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
    rows: Sequence[int] | None = None,
) -> Solution:
    """Minimise ||(W - V) X||^2 over sparse V, by default with all weights of a matrix competing.

    With G = X^T X for inputs of norm 1, B = W in the same units, Z = the largest entries of V + U, and U the scaled
    dual, which is non-zero only where Z is zero:

        V = (B G + rho (Z - U)) (G + rho I)^-1 = B + (Z - U - B) rho (G + rho I)^-1,    U <- U + V - Z.

    So all there is to carry along is S = V + U. Masks on the way need not be exact, nor products: the last mask is
    exact, and conjugate gradients then give its weights their best values.

    See `optimum_sparse.methods` for the arguments.
    """
    sizes, group, damping = list(rows or weight.shape[:1]), config.comparison_group or "layer", config.dampening_frac
    gram, norms = unit_gram(statistics)
    target = weight * norms
    state, residual = target.clone(), math.inf
    levels = min(LEVELS, config.iterations)
    growth = (RHO[1] / RHO[0]) ** (1 / max(1, levels - 1))
    for level in range(levels):
        inverse = _inverse(gram, damping, RHO[1] * growth ** (level + 1 - levels))
        for iteration in range(-(-(config.iterations - level) // levels)):
            kept = torch.where(_loose_mask(state, pattern, group, sizes), state, 0)
            dual = state.sub_(kept)
            if level and not iteration:
                dual /= growth  # U is the dual divided by rho
            move = torch.sub(kept, dual).sub_(target).to(inverse.dtype) @ inverse
            step = move.float().add_(target).sub_(kept)  # V - Z
            state = dual.add_(kept).add_(step, alpha=RELAXATION)
        residual = (step.norm() / kept.norm().clamp(min=torch.finfo(step.dtype).tiny)).item()
        if residual < TOLERANCE:
            break
    mask = keep_mask(state.abs(), pattern, group, rows)
    deviation = conjugate_gradients(target - state * mask, mask, gram, damping, rounds=1, steps=POLISH)
    return Solution((weight - deviation * inverse_norms(norms)).masked_fill(~mask, 0), mask, damping, residual)


def _inverse(gram: torch.Tensor, damping: float, rho: float) -> torch.Tensor:
    """Rho (G + damping I + rho I)^-1, in the dtype to multiply in; its eigenvalues lie between 0 and 1."""
    damped = gram.clone()
    damped.diagonal().add_(damping + rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).mul_(rho).to(product_dtype(gram.device))


def _loose_mask(state: torch.Tensor, pattern: Pattern, group: str, sizes: Sequence[int]) -> torch.Tensor:
    """As `keep_mask`, but fast: the threshold of a matrix is that of a sample, and all ties are dropped."""
    scores = state.abs()
    if isinstance(pattern, NM):
        return (scores.view(-1, pattern.m) > _nm_threshold(scores, pattern)[:, None]).view_as(scores)
    if group == "output":
        return keep_mask(scores, pattern, group)
    return torch.cat([part > _threshold(part, pattern.sparsity) for part in scores.split(list(sizes))])


def _threshold(scores: torch.Tensor, sparsity: float) -> torch.Tensor | float:
    """About the largest score that is to be dropped."""
    stride = max(1, scores.numel() // SAMPLE)
    while math.gcd(stride, scores.shape[1]) > 1:  # or it would never see some of the columns
        stride += 1
    sample = scores.reshape(-1)[::stride]
    count = num_pruned(sample.numel(), sparsity)
    return sample.kthvalue(count).values if count else -1.0


def _nm_threshold(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """The largest score that is to be dropped of each group, `[groups]`, by bubbling the smallest to the end."""
    columns = list(scores.view(-1, pattern.m).unbind(dim=1))
    for _ in range(pattern.m - pattern.n):
        for i in range(len(columns) - 1):
            low = torch.minimum(columns[i], columns[i + 1])
            columns[i], columns[i + 1] = torch.maximum(columns[i], columns[i + 1]), low
        smallest = columns.pop()
    return smallest
