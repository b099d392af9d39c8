"""`sparsify_for_inference`: each linear layer in the form that is fastest, or smallest, on this machine."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..metadata import fold_names
from ..quantization import Grid
from . import kernels, quantized
from .grids import find_grids
from .linear import DenseLinear, SparseLinear
from .report import LayerChoice, RuntimeReport

PREFERENCES = ("speed", "memory")

# Another form must be faster than what is there by more than the noise of the measurement.
MARGIN = 0.98
# Layers of one kind are measured in turn, up to so many bytes: more than the cache holds, as in the whole model.
SAMPLE_BYTES = 2**28
# What is read before each measurement, so that no weight is in the cache because the last one left it there.
EVICTION_BYTES = 2**26
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 7, 50, 0.2


def sparsify_for_inference(
    model: nn.Module,
    batch_size: int = 1,
    prefer: str = "speed",
    grids: Mapping[str, Grid] | str | os.PathLike | None = None,
) -> RuntimeReport:
    """Replace the linear layers of a pruned model, in place, by faster or smaller ones.

    With `prefer="speed"`, layers of each shape, type and sparsity are timed in the forms that they can have, in turn,
    with `batch_size` tokens, and keep the fastest: as they are; `DenseLinear`, which is faster for a single token; or
    `SparseLinear`, which stores and reads the non-zero weights only, and in a quantised model a byte for each of them
    (in the report: `int8`). Ties stay as they are. With `prefer="memory"`, all layers that become smaller are packed,
    and nothing is timed.

    The model computes the same, to the rounding of its type. It generates, compiles and saves as before (a saved
    model is dense), but the weights of sparse layers cannot be trained. The kernels are used where no gradient is
    asked for, as in `generate`.

    Args:
        model: Any module with `nn.Linear` layers, on the CPU. Layers of other classes stay as they are.
        batch_size: How many tokens the model will process at once: the batch size of `generate`.
        prefer: `"speed"` or `"memory"`.
        grids: What the weights of a quantised model were rounded to: `SparsePruner.grids`, or the folder or file that
            `SparsePruner.save` wrote. By default those of the checkpoint that the model was loaded from.

    Returns:
        What became of each layer, and the measurements.

    Raises:
        FileNotFoundError: `grids` names a folder or file without grids.
        ValueError: An argument is out of range, or the file of the grids is damaged.
        TypeError: `model` is no module, or is itself an `nn.Linear`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if type(model) is nn.Linear:
        raise TypeError(
            "model is a single nn.Linear, which cannot be replaced in place: SparseLinear.from_linear(it)."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer must be one of {', '.join(PREFERENCES)}, got {prefer!r}.")

    candidates, untouched = _candidates(model, *find_grids(model, grids))
    kinds: dict[tuple, list[_Candidate]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.kind, []).append(candidate)
    layers = []
    for members in kinds.values():
        if prefer == "memory":
            choice, reason, times = _smallest(members)
        else:
            choice, reason, times = _fastest(model, members, batch_size)
        layers.append(_replace(model, members, choice, reason, times))
    if any(layer.choice in ("sparse", "int8") for layer in layers):
        _copy_what_stays(model)
    release_memory()
    return RuntimeReport(batch_size, kernels.LEVEL, kernels.MISSING, kernels.threads(), layers, untouched)


def _copy_what_stays(model: nn.Module) -> None:
    """Let go of the checkpoint: one tensor that is mapped from a file keeps all of it in memory."""
    dense = [module for module in model.modules() if not isinstance(module, SparseLinear)]
    tensors = {id(t): t for m in dense for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    for tensor in tensors.values():
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps that of weights, which would take as much as before."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class _Candidate:
    """A layer that may be replaced; it does not hold the layer, whose weight is to go."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    bias: bool
    tied: bool
    nonzero: int
    grid: Grid | None  # with which its values are packed as codes
    no_grid: str | None  # why not, although the model is quantised

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        return 1 - self.nonzero / self.numel

    @property
    def kind(self) -> tuple:
        """What its time depends on."""
        sparsity = round(20 * self.sparsity)
        return (self.shape, self.dtype, self.bias, self.tied, sparsity, self.grid is None, self.no_grid)

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be packed, or would not become smaller by it."""
        if self.dtype not in kernels.TYPES:
            return f"there is no packed form for {self.dtype}"
        if self.tied:
            return "another layer uses the same weight"
        # A bit for each weight, and the weights that are left.
        if self.nonzero + self.numel / 8 / self.dtype.itemsize >= self.numel:
            return "it has too few zeros to become smaller"
        return None


def _candidates(
    model: nn.Module, grids: Mapping[str, Grid], missing: str | None
) -> tuple[list[_Candidate], dict[str, str]]:
    """The layers to look at, and why all others with a matrix are left alone; embeddings are no products."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: list[_Candidate] = []
    untouched: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | DenseLinear | SparseLinear):
            continue
        matrices = {key: p for key, p in module._parameters.items() if p is not None and p.ndim >= 2}
        reason = _reason_to_stay(module)
        if reason is not None:
            untouched |= {f"{name}.{key}".strip(".").removesuffix(".weight"): reason for key in matrices}
            continue
        weight = matrices["weight"]
        shape = (weight.shape[0], weight.shape[1])
        bias, tied = module._parameters["bias"] is not None, uses[id(weight)] > 1
        grid = None if tied else grids.get(name)
        reason = missing if grid is None else _why_not_codes(weight.detach(), grid)
        grid = grid if reason is None else None
        nonzero = int(torch.count_nonzero(weight))
        found.append(_Candidate(name, shape, weight.dtype, bias, tied, nonzero, grid, reason))
    return found, _fold(untouched)


def _why_not_codes(weight: torch.Tensor, grid: Grid) -> str | None:
    """Why the values of a weight cannot be packed as codes."""
    if weight.dtype not in kernels.MULTIPLIED:
        return f"there are no kernels for codes in {weight.dtype}"
    reason = quantized.obstacle(weight.shape, grid)
    if reason is not None:
        return reason
    try:
        grid.codes(weight)
    except ValueError as error:
        return str(error)
    return None


def _reason_to_stay(module: nn.Module) -> str | None:
    if type(module) is not nn.Linear:
        return f"stays as it is: only nn.Linear is replaced, and it is a {type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return "stays as it is: it has forward hooks"
    if module.weight.device.type != "cpu":
        return f"stays as it is: there are no kernels for {module.weight.device.type}"
    if 0 in module.weight.shape:
        return "stays as it is: it has no weights"
    return None


def _fold(reasons: dict[str, str]) -> dict[str, str]:
    """Names that differ in an index joined."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return {name: reason for reason, names in groups.items() for name in fold_names(names)}


def _smallest(members: Sequence[_Candidate]) -> tuple[str, str | None, dict[str, float]]:
    if members[0].grid is not None:
        return "int8", None, {}
    obstacle = _obstacle(members)
    return ("sparse", _no_codes(members[0]), {}) if obstacle is None else ("torch", f"not packed: {obstacle}", {})


def _no_codes(first: _Candidate) -> str | None:
    return None if first.no_grid is None else f"not as int8: {first.no_grid}"


def _obstacle(members: Sequence[_Candidate]) -> str | None:
    return next((member.obstacle for member in members if member.obstacle), None)


def _fastest(
    model: nn.Module, members: Sequence[_Candidate], batch_size: int
) -> tuple[str, str | None, dict[str, float]]:
    (rows, columns), dtype, obstacle = members[0].shape, members[0].dtype, _obstacle(members)
    if not kernels.compiled():
        return "torch", "not timed: there are no compiled kernels", {}
    if dtype not in kernels.MULTIPLIED:
        return "torch", f"not timed: there are no kernels for {dtype}", {}
    names = ["torch"]
    names += ["dense"] if batch_size == 1 else []
    names += ["sparse"] if obstacle is None else []
    names += ["int8"] if members[0].grid is not None else []
    if names == ["torch"]:
        return "torch", f"not timed: {obstacle}", {}

    num_layers = max(1, SAMPLE_BYTES // (rows * columns * dtype.itemsize))
    sample = members[:num_layers]
    ways = {name: [_form(name, _linear(model, member.name), member.grid) for member in sample] for name in names}
    times = _times(ways, torch.randn(batch_size, columns).to(dtype))
    choice = "torch"
    for way in ways:
        if times[way] < MARGIN * times[choice]:
            choice = way
    return choice, _no_codes(members[0]), times


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _times(ways: Mapping[str, Sequence[nn.Module]], x: torch.Tensor) -> dict[str, float]:
    """Microseconds of one layer in each of its forms, measured in turn; medians."""
    eviction = torch.zeros(EVICTION_BYTES // 8, dtype=torch.int64)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    begin = time.perf_counter()
    with torch.inference_mode():
        for turn in itertools.count():
            if turn >= LEAST_ROUNDS and (turn >= MOST_ROUNDS or time.perf_counter() - begin > SECONDS):
                break
            names = list(ways)
            for way in names[turn % len(names) :] + names[: turn % len(names)]:
                eviction.sum()
                seconds[way].append(_seconds(ways[way], x))
    return {way: 1e6 * statistics.median(taken) / len(ways[way]) for way, taken in seconds.items()}


def _seconds(layers: Sequence[nn.Module], x: torch.Tensor) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - start


def _form(way: str, layer: nn.Linear, grid: Grid | None) -> nn.Module:
    """A layer in one of its forms."""
    if way == "torch":
        return layer
    if way == "dense":
        return DenseLinear.from_linear(layer)
    return SparseLinear.from_linear(layer, grid if way == "int8" else None)


def _replace(
    model: nn.Module, members: Sequence[_Candidate], choice: str, reason: str | None, times: dict[str, float]
) -> LayerChoice:
    """Give all layers of a kind the form chosen for them."""
    first, numel = members[0], sum(member.numel for member in members)
    now = 0
    for member in members:
        layer = _form(choice, _linear(model, member.name), member.grid)
        now += layer.tiles.nbytes if isinstance(layer, SparseLinear) else member.numel * first.dtype.itemsize
        parent, _, name = member.name.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return LayerChoice(
        names=fold_names(member.name for member in members),
        count=len(members),
        shape=first.shape,
        dtype=str(first.dtype).removeprefix("torch."),
        sparsity=1 - sum(member.nonzero for member in members) / numel,
        choice=choice,
        reason=reason,
        microseconds=times,
        dense_bytes=numel * first.dtype.itemsize,
        bytes=now,
    )
