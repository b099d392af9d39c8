"""What pruning will cost: time and memory before it starts, peak memory after it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from .config import SparseConfig
from .matrices import PrunableMatrix
from .methods import METHODS, statistics_for
from .statistics import GramStatistics


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a run.

    Attributes:
        matrices: Number of matrices.
        tokens: Number of calibration tokens.
        seconds: Time, from a timed forward and the arithmetic that pruning adds to it.
        memory: Bytes beyond the model itself: parked activations, statistics and the solver's copies.
    """

    matrices: int
    tokens: int
    seconds: float
    memory: int

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[PrunableMatrix]],
        batches: Sequence[Mapping[str, Any]],
        probe: Mapping[str, Any],
        probe_seconds: float,
        config: SparseConfig,
    ) -> Estimate:
        """Extrapolate from one timed forward.

        Args:
            groups: What will be pruned, by shared inputs.
            batches: The calibration batches.
            probe: The batch that was timed.
            probe_seconds: How long its forward took.
            config: The method and how it runs.
        """
        tokens = sum(_tokens(batch) for batch in batches)
        widths = [group[0].shape[1] for group in groups]
        heights = [sum(matrix.shape[0] for matrix in group) for group in groups]
        widest = max(widths, default=0)
        forward_flops = sum(2 * d * rows for d, rows in zip(widths, heights, strict=True)) * tokens
        forward = probe_seconds * tokens / _tokens(probe)
        seconds, memory = forward if config.true_sequential else 2 * forward, 0
        if statistics_for(config) is GramStatistics:
            # Half of the Gram matrix in fp32; error and sweep together take about 6 d^2 operations per output, and
            # methods and refinements made of products about 40.
            solve = 6 + 40 * METHODS[config.method].parallel + 40 * (config.refine is not None)
            extra_flops = sum(d * d * (2 * tokens + solve * r) for d, r in zip(widths, heights, strict=True))
            seconds += forward * extra_flops / max(forward_flops, 1)
            # Gram matrix in fp32, Hessian and its factor in float64; weights, targets, errors and masks in fp32.
            memory = max((24 * d * d + 20 * d * r for d, r in zip(widths, heights, strict=True)), default=0)
        # While parked, a batch holds the residual stream and, in the widest layer, its input; attention keeps more.
        hidden = groups[0][0].shape[1] if groups else 0
        size = groups[0][0].parameter.element_size() if groups else 0
        memory += tokens * size * (max(4 * hidden, hidden + 2 * widest) if config.true_sequential else hidden)
        return cls(sum(map(len, groups)), tokens, seconds, memory)

    def __str__(self) -> str:
        return (
            f"{self.matrices} matrices, {self.tokens:,} calibration tokens: about {_duration(self.seconds)} and "
            f"{self.memory / 2**30:.1f} GiB beyond the model"
        )


def available_memory(device: torch.device) -> int:
    """Memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory() -> int | None:
    """Largest memory held so far, in bytes: by torch's allocator on a GPU, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        # Not getrusage: its figure is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch has; how many rows, if it has none."""
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
