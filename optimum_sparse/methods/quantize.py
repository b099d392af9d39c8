"""Quantisation of a solution: its weights go to a grid, its zeros stay."""

from __future__ import annotations

from dataclasses import replace

from ..config import SparseConfig
from ..patterns import Pattern
from ..quantization import Rounding
from ..statistics import GramStatistics, Statistics
from .solution import Solution
from .update import update


def quantize(solution: Solution, statistics: Statistics | None, pattern: Pattern, config: SparseConfig) -> Solution:
    """Round the kept weights of a solution that its method has not rounded.

    With a Gram matrix, in a sweep like that of `-update` methods, which is GPTQ (Frantar et al., 2023) with a mask;
    else each weight to the nearest value.

    Args:
        solution: What a method or a refinement returned.
        statistics: Of the inputs, if the method needs any.
        pattern: Of the solution.
        config: What the grid is like.
    """
    rounding = Rounding(solution.weight, config)
    if isinstance(statistics, GramStatistics):
        rounded = update(solution.weight, solution.mask, statistics, pattern, config, rounding)
        damping = rounded.damping if solution.damping is None else solution.damping
        return replace(rounded, damping=damping, residual=solution.residual)
    rounding.enter(solution.weight.T, 0, solution.weight.shape[1])
    return replace(solution, weight=rounding.grid.round(solution.weight), grid=rounding.grid)
