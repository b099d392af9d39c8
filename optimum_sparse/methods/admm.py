"""ADMM: weights and mask of a layer by alternating directions (Boža, TMLR 2024; ALPS, NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..config import SparseConfig
from ..order import kth_smallest
from ..patterns import NM, Pattern, SharedRows, by_matrix, keep_mask, num_pruned
from ..precision import product_dtype
from ..statistics import GramStatistics
from .cg import conjugate_gradients, inverse_norms, unit_gram
from .hessian import inverse
from .solution import Solution

# The penalty rho grows by a constant factor from the first to the last level. The larger it is, the less the mask
# changes. It ends where, on independent inputs of norm 1, a kept weight and the dual of a pruned one count alike, so
# that the largest weights are kept.
RHO = (0.2, 1.0)
LEVELS = 7
# By how much it grows with each product of `_raised`, at most.
STEP = 1.31
# Over-relaxation of the step, which saves iterations.
RELAXATION = 1.5
# Distance between the dense and the sparse copy, relative to the weight, at which they are taken for equal.
TOLERANCE = 1e-3
# Entries of a matrix from which the threshold of a mask on the way is estimated.
SAMPLE = 2**14
# Steps of conjugate gradients at the end.
POLISH = 4
# Rows that are worked on at once, which saves memory; a GPU needs more of them to be busy.
ROWS = {"cpu": 256, "cuda": 8192}


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
    group, damping = config.comparison_group or "layer", config.dampening_frac
    gram, norms = unit_gram(statistics)
    target = weight * norms
    state, residual = target.clone(), math.inf
    levels, count = min(LEVELS, max(1, config.iterations - 1)), ROWS.get(weight.device.type, len(weight))
    growth = (RHO[1] / RHO[0]) ** (1 / max(1, levels - 1))
    rho = RHO[1] / growth ** (levels - 1)
    resolvent = _resolvent(gram, damping, rho)
    for level in range(levels):
        if level:
            resolvent, rho = _raised(resolvent, rho, growth, damping), rho * growth
        for iteration in range((config.iterations + level) // levels):  # the last has two, for its mask to settle
            shrink = growth if level and not iteration else 1.0  # U is the dual divided by rho
            limits = _limits(state, pattern, group, rows)
            parts = zip(state.split(count), target.split(count), limits.split(count), strict=True)
            squares = torch.cat([_iterate(*part, pattern, resolvent, shrink) for part in parts])
        apart, kept = (rows.gather(squares) if isinstance(rows, SharedRows) else squares).sum(dim=0)
        residual = (apart / kept.clamp(min=torch.finfo(kept.dtype).tiny)).sqrt().item()
        if residual < TOLERANCE:
            break
    del resolvent  # make room
    mask = keep_mask(state.abs(), pattern, group, rows)
    units, rounded = inverse_norms(norms), gram.to(product_dtype(gram.device))
    for part, goal, old, keep in zip(*(x.split(count) for x in (state, target, weight, mask)), strict=True):
        kept = keep.to(part.dtype)
        deviation = conjugate_gradients(goal - part * kept, kept, rounded, damping, rounds=1, steps=POLISH)
        part.zero_().addcmul_(old - deviation * units, kept)  # a product alone could be -0
    return Solution(state, mask, damping, residual)


def _iterate(
    state: torch.Tensor,
    target: torch.Tensor,
    limits: torch.Tensor,
    pattern: Pattern,
    resolvent: torch.Tensor,
    shrink: float,
) -> torch.Tensor:
    """Change S of some rows in place, and return the squared norms of V - Z and of Z, `[rows, 2]`."""
    kept = _loose_mask(state, pattern, limits).mul_(state)
    if shrink != 1:
        state.lerp_(kept, 1 - 1 / shrink)  # pruned entries alone
    # Z - U - B with its sign changed, in few passes: these take a third of the time, the product the rest.
    move = torch.sub(target, kept, alpha=2).add_(state)
    step = torch.sub(target, kept).sub_(move.to(resolvent.dtype) @ resolvent)
    state.add_(step, alpha=RELAXATION)
    return torch.stack([torch.linalg.vector_norm(part, dim=1).square() for part in (step, kept)], dim=1)


def _resolvent(gram: torch.Tensor, damping: float, rho: float) -> torch.Tensor:
    """Rho (G + damping I + rho I)^-1, in the dtype to multiply in; its eigenvalues lie between 0 and 1."""
    damped = gram.clone()
    damped.diagonal().add_(damping + rho)
    return inverse(damped).mul_(rho).to(product_dtype(gram.device))


def _raised(resolvent: torch.Tensor, rho: float, growth: float, damping: float) -> torch.Tensor:
    """That for rho * growth, by products alone, which are many times as fast as an inverse.

    For (1 + t) rho, R becomes R + t (R - R^2) / (1 + t R). With a number for the R in the denominator, that is exact
    for the eigenvalues 1 and this number, and for others to 3 % with the largest t. The number taken belongs to an
    eigenvalue of G of 1, which all are if inputs are independent, and which is their mean in any case.
    """
    steps = math.ceil(math.log(growth, STEP))
    more = growth ** (1 / steps) - 1
    for _ in range(steps):
        share = more / (1 + more * rho / (1 + damping + rho))
        resolvent = torch.addmm(resolvent, resolvent, resolvent, beta=1 + share, alpha=-share)
        rho *= 1 + more
    return resolvent


def _limits(state: torch.Tensor, pattern: Pattern, group: str, rows: Sequence[int] | None) -> torch.Tensor:
    """About the largest score that is to be dropped of what a row competes in, `[rows, 1]`; of N:M not used."""
    if isinstance(pattern, NM):
        return state[:, :1]
    if group == "output":
        count = num_pruned(state.shape[1], pattern.sparsity)
        return kth_smallest(state.abs(), count) if count else -torch.ones_like(state[:, :1])

    def limit(sample: torch.Tensor) -> torch.Tensor:
        count = num_pruned(sample.numel(), pattern.sparsity)
        found = kth_smallest(sample.reshape(1, -1), count) if count else -torch.ones_like(sample[:1, :1])
        return found.expand(len(sample), 1)

    return by_matrix(_sample(state, rows), rows, limit)


def _sample(state: torch.Tensor, rows: Sequence[int] | None) -> torch.Tensor:
    """Some scores of each row, `[rows, count]`, from all columns in turn."""
    columns, first = state.shape[1], rows.own.start if isinstance(rows, SharedRows) else 0
    count = min(columns, -(-SAMPLE // min(rows or state.shape[:1])))
    row = torch.arange(first, first + len(state), device=state.device)[:, None]
    return state.gather(1, (row + torch.arange(count, device=state.device) * (columns // count)) % columns).abs()


def _loose_mask(state: torch.Tensor, pattern: Pattern, limits: torch.Tensor) -> torch.Tensor:
    """As `keep_mask`, but fast: the threshold of a matrix is that of a sample, and all ties are dropped.

    It is 1 and 0 in the type of `state`: a CPU takes ten times as long for a choice by booleans as for a product.
    """
    scores = state.abs()
    if isinstance(pattern, NM):
        return scores.view(-1, pattern.m).gt_(_nm_threshold(scores, pattern)[:, None]).view_as(scores)
    return scores.gt_(limits)


def _nm_threshold(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """The largest score that is to be dropped of each group, `[groups]`, by bubbling the smallest to the end."""
    columns = list(scores.view(-1, pattern.m).unbind(dim=1))
    for _ in range(pattern.m - pattern.n):
        for i in range(len(columns) - 1):
            low = torch.minimum(columns[i], columns[i + 1])
            columns[i], columns[i + 1] = torch.maximum(columns[i], columns[i + 1]), low
        smallest = columns.pop()
    return smallest
