"""How long a layer takes in each of its forms, measured in turn and with weights that are not in the cache."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

# What is read before each measurement, so that no weight is in the cache because the last one left it there. On a GPU
# it takes longer than the launch of a graph, which is then not measured.
EVICTION_BYTES = {"cpu": 2**26, "cuda": 2**28}
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 7, 50, 0.2


def microseconds(ways: Mapping[str, Sequence[nn.Module]], x: torch.Tensor, cuda_graphs: bool) -> dict[str, float]:
    """Medians of how long one layer takes in each of its forms.

    Args:
        ways: The forms, and layers of each. Its layers are called in turn, and so are the forms, for a fraction of a
            second.
        x: Their inputs.
        cuda_graphs: Whether the layers of a form run as one CUDA graph.
    """
    eviction = torch.zeros(EVICTION_BYTES[x.device.type] // 8, dtype=torch.int64, device=x.device)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    begin = time.perf_counter()
    with torch.inference_mode():
        runs = {way: [_recorded(layers, x)] if cuda_graphs else layers for way, layers in ways.items()}
        for turn in itertools.count():
            if turn >= LEAST_ROUNDS and (turn >= MOST_ROUNDS or time.perf_counter() - begin > SECONDS):
                break
            names = list(ways)
            for way in names[turn % len(names) :] + names[: turn % len(names)]:
                eviction.sum()
                if x.is_cuda and not cuda_graphs:
                    torch.cuda.synchronize(x.device)
                seconds[way].append(_seconds(runs[way], x))
    return {way: 1e6 * statistics.median(taken) / len(ways[way]) for way, taken in seconds.items()}


def _recorded(layers: Sequence[nn.Module], x: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Runs all layers as one CUDA graph."""
    with torch.cuda.device(x.device):
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for layer in layers:  # what is compiled or set up by the first calls cannot be recorded
                layer(x)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            for layer in layers:
                layer(x)
    return lambda _: graph.replay()


def _seconds(layers: Sequence[Callable[[torch.Tensor], object]], x: torch.Tensor) -> float:
    if x.is_cuda:
        with torch.cuda.device(x.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for layer in layers:
                layer(x)
            last.record()
            last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - start
