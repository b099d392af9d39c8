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
from dataclasses import dataclass, field

from ..config import SparseConfig
from ..statistics import GramStatistics, NormStatistics, PairedStatistics, Statistics
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
        apart: Whether processes may each solve some of the rows: what becomes of a row depends on the others only by
            way of what it gathers.
        sweeps: Whether it goes over the columns one by one, for which there is a kernel on GPUs.
        equal_tokens: Whether all tokens count alike if `equal_tokens` does not say.
        rescale: Whether outputs stay as large as they are if `rescale` does not say.
        group: Which weights compete if `comparison_group` does not say: those of one `"output"`, or of the `"layer"`.
        memory: Bytes that it takes for each weight and for each entry of the Gram matrix, besides the latter and the
            weights in the model. Measured: see tests/test_plan.py.
    """

    solve: Callable[..., Solution]
    statistics: type[Statistics] | None
    parallel: bool = False
    apart: bool = False
    sweeps: bool = False
    equal_tokens: bool = False
    rescale: bool = False
    group: str = "layer"
    memory: tuple[float, float] = field(kw_only=True)


# What libraries for linear algebra set aside once, in bytes.
LIBRARY_BUFFERS = 80 * 2**20
# For the refinements, as `Method.memory`.
REFINEMENT_MEMORY = {"cg": (53, 16), "swaps": (53, 16)}
# For rounding to a grid, as `Method.memory`.
QUANTIZATION_MEMORY = (36, 5)
# For the corrected target, as `Method.memory`.
CORRECTION_MEMORY = (16, 12)

METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude.solve, None, apart=True, memory=(19, 0)),
    "wanda": Method(wanda.solve, NormStatistics, apart=True, group="output", memory=(16, 0)),
    "ria": Method(ria.solve, NormStatistics, memory=(23, 0)),
    "sparsegpt": Method(sparsegpt.solve, GramStatistics, apart=True, sweeps=True, memory=(17, 5)),
    "admm": Method(
        admm.solve, GramStatistics, parallel=True, apart=True, equal_tokens=True, rescale=True, memory=(31, 15)
    ),
    "sparsegpt-reference": Method(sparsegpt_reference.solve, GramStatistics, memory=(10, 13)),
    "magnitude-update": Method(update.solve_magnitude, GramStatistics, apart=True, sweeps=True, memory=(19, 5)),
    "wanda-update": Method(
        update.solve_wanda, GramStatistics, apart=True, sweeps=True, group="output", memory=(19, 5)
    ),
}


def workspace(config: SparseConfig, in_features: int, rows: int) -> int:
    """Bytes that solving takes at its peak, besides the statistics and the weights in the model.

    Args:
        config: The method and the refinement.
        in_features: Width of the stacked matrices.
        rows: How many rows they have together.
    """
    needs = [METHODS[config.method].memory] + ([REFINEMENT_MEMORY[config.refine]] if config.refine else [])
    needs += [QUANTIZATION_MEMORY] if config.quantization else []
    needs += [CORRECTION_MEMORY] if config.error_correction else []
    return LIBRARY_BUFFERS + int(max(w * in_features * rows + g * in_features**2 for w, g in needs))


def statistics_for(config: SparseConfig) -> type[Statistics] | None:
    """What has to be known of the inputs: what the method needs, and what a correction or a refinement needs."""
    if config.error_correction:
        return PairedStatistics
    return GramStatistics if config.refine else METHODS[config.method].statistics
