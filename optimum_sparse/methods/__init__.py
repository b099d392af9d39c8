"""The pruning methods, one file each.

A method is a pure function of a weight and the statistics of its inputs:

    solve(weight, statistics, pattern, config, rows) -> Solution

- `weight`: `[rows, in_features]` fp32. Matrices that share their inputs may be stacked row-wise.
- `statistics`: what its `statistics` class accumulated from the inputs, or `None` if the method needs no inputs.
- `pattern`: which weights compete and how many are pruned.
- `config`: the options; a method reads those that concern it.
- `rows`: row counts of the stacked matrices, each of which gets exactly its share of zeros.

To add one: write its file, add a line to `METHODS` here and its name to `config.METHOD_NAMES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config import SparseConfig
from ..statistics import GramStatistics, NormStatistics, Statistics
from . import admm, magnitude, ria, sparsegpt, sparsegpt_reference, update, wanda
from .solution import Solution

__all__ = ["METHODS", "Method", "Solution", "statistics_for"]


@dataclass(frozen=True)
class Method:
    """A pruning method and the statistics it needs.

    Attributes:
        solve: The function described above.
        statistics: Class that accumulates the inputs, or `None` if the method looks at the weights only.
        parallel: Whether several CPU threads speed it up on matrices of any size: large products, no steps per column.
    """

    solve: Callable[..., Solution]
    statistics: type[Statistics] | None
    parallel: bool = False


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude.solve, None),
    "wanda": Method(wanda.solve, NormStatistics),
    "ria": Method(ria.solve, NormStatistics),
    "sparsegpt": Method(sparsegpt.solve, GramStatistics),
    "admm": Method(admm.solve, GramStatistics, parallel=True),
    "sparsegpt-reference": Method(sparsegpt_reference.solve, GramStatistics),
    "magnitude-update": Method(update.solve_magnitude, GramStatistics),
    "wanda-update": Method(update.solve_wanda, GramStatistics),
}


def statistics_for(config: SparseConfig) -> type[Statistics] | None:
    """What has to be known of the inputs: what the method needs, and the Gram matrix for a refinement."""
    return GramStatistics if config.refine else METHODS[config.method].statistics
