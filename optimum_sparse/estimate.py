"""What pruning will cost: time and memory before it starts, peak memory after it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from .config import SparseConfig
from .distributed import Processes
from .methods import admm, statistics_for
from .plan import GroupShape
from .sensitivity import allocation_forwards
from .statistics import GramStatistics


def run_seconds(groups: Sequence[GroupShape], tokens: int, forward: float, config: SparseConfig) -> float:
    """How long a run takes: the forwards, and the arithmetic that pruning adds to them, at their speed.

    Args:
        groups: What is pruned.
        tokens: Calibration tokens.
        forward: Seconds that one forward of all of them takes.
        config: The method and how it runs.
    """
    forwards = num_forwards(config, tokens) + training_forwards(config)
    if collects_grams(config):
        # Sums are in fp32, at about half the speed of a forward.
        products = 2 * gram_flops(groups, tokens, config) + solve_flops(groups, config)
        forwards += products / max(linear_flops(groups, tokens), 1)
    return forward * forwards


def num_forwards(config: SparseConfig, tokens: int) -> float:
    """How many forwards of all tokens a run takes, but for training."""
    runs = (2 if config.true_sequential is False else 1) * (2 if config.error_correction else 1)
    return runs + allocation_forwards(config.allocation, tokens)


def training_forwards(config: SparseConfig) -> int:
    """How many forwards training takes as long as; a step is three."""
    return 3 * (config.reconstruct or 0)


def collects_grams(config: SparseConfig) -> bool:
    """Whether Gram matrices are summed up, and solved with."""
    kind = statistics_for(config)
    return kind is not None and issubclass(kind, GramStatistics)


def linear_flops(groups: Sequence[GroupShape], tokens: int) -> float:
    """Operations of the matrices that are pruned, in a forward."""
    return sum(2 * g.in_features * g.rows * g.share for g in groups) * tokens


def gram_flops(groups: Sequence[GroupShape], tokens: int, config: SparseConfig) -> float:
    """Operations of the sums: half of a Gram matrix, and all of the deviation from the dense model."""
    return (3 if config.error_correction else 1) * sum(g.in_features**2 * g.share for g in groups) * tokens


def solve_flops(groups: Sequence[GroupShape], config: SparseConfig) -> float:
    """Operations of updates, besides those on the Gram matrix alone.

    For an output of width d, the update and two sums of errors take about 3 d^2, an iteration 2, a refinement 40.
    """
    iterations = config.iterations + admm.POLISH if config.method == "admm" else 0
    rounds = 3 + 2 * iterations + 40 * (config.refine is not None)
    return rounds * sum(g.in_features**2 * g.rows for g in groups)


def parse_size(size: int | str) -> int:
    """Bytes from a number, or from a text such as "4GiB" or "500MB".

    Raises:
        ValueError: It is neither.
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        found = int(size) if str(size).isdecimal() else convert_file_size_to_int(size)
    except (ValueError, TypeError, AttributeError, OverflowError):
        found = -1
    if isinstance(size, bool) or found <= 0:
        raise ValueError(f"max_memory must be a number of bytes or like '4GiB' or '500MB', got {size!r}.")
    return found


def held_memory(device: torch.device) -> int:
    """Memory that is held on a device now, in bytes: by torch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def available_memory(device: torch.device) -> int:
    """Memory that is free on a device, in bytes; on a GPU with what torch has freed and keeps for itself."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def free_memory(device: torch.device, processes: Processes) -> int:
    """What each of the processes may take of the memory that is free on a device, in bytes; the least of it counts."""
    sharing = processes.num_local if device.type == "cpu" else 1
    return processes.least(available_memory(device) // sharing)


def peak_memory() -> int | None:
    """Largest memory held so far, in bytes: by torch on a GPU that was used, else resident memory of the process."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    if sys.platform == "linux":
        # Not getrusage: its figure is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def num_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch has; how many rows, if it has none."""
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
