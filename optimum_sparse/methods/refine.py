"""Refinement: from the solution of any method to a better one, on the same statistics."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import SparseConfig
from ..patterns import Pattern
from ..statistics import GramStatistics
from .cg import conjugate_gradients, inverse_norms, unit_gram
from .solution import Solution
from .swaps import swap

# After a method that solved for its weights only in part, two rounds come within 1 % of the least error of its mask.
ROUNDS, STEPS = 2, 8


def refine(
    kind: str,
    solution: Solution,
    weight: torch.Tensor,
    statistics: GramStatistics,
    pattern: Pattern,
    config: SparseConfig,
) -> Solution:
    """Lower the error of a solution on the calibration inputs; that of no output rises.

    - `"cg"`: the weights that are kept take their best values, by masked conjugate gradients.
    - `"swaps"`: a kept weight and a pruned one of the same output, and of the same group if the pattern is N:M, change
      places as long as that lowers the error. Each output, and each group, keeps its number of zeros.

    Args:
        kind: `"cg"` or `"swaps"`.
        solution: What a method returned.
        weight: Its target, `[rows, in_features]` fp32.
        statistics: Of the inputs.
        pattern: Of the solution.
        config: With its `dampening_frac`, `"cg"` keeps the weights near the target.
    """
    gram, norms = unit_gram(statistics)
    before, mask = (weight - solution.weight) * norms, solution.mask
    if kind == "cg":
        after = conjugate_gradients(before, mask, gram, config.dampening_frac, ROUNDS, STEPS)
    else:
        after, mask = swap(before, mask, weight * norms, gram, pattern)
    same = (after == before) & (mask == solution.mask)
    refined = torch.where(same, solution.weight, weight - after * inverse_norms(norms))
    return replace(solution, weight=refined.masked_fill(~mask, 0), mask=mask)
