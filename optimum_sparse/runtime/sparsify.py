"""`sparsify_for_inference`: each linear layer in the form that is fastest, or smallest, on this machine."""

from __future__ import annotations

import ctypes
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..metadata import fold_names
from ..quantization import Grid
from . import gpu, kernels, quantized, semi_structured, tiles
from .grids import find_grids
from .linear import DenseLinear, SparseLinear
from .report import LayerChoice, RuntimeReport
from .semi_structured import SemiStructuredLinear
from .timing import microseconds

PREFERENCES = ("speed", "memory")

# Another form must be faster than what is there by more than the noise of the measurement.
MARGIN = 0.98
# Layers of one kind are measured in turn, up to so many bytes: more than the cache holds, as in the whole model.
SAMPLE_BYTES = 2**28
TOO_FEW_ZEROS = "it has too few zeros to become smaller"


def sparsify_for_inference(
    model: nn.Module,
    batch_size: int = 1,
    prefer: str = "speed",
    grids: Mapping[str, Grid] | str | os.PathLike | None = None,
    cuda_graphs: bool = False,
) -> RuntimeReport:
    """Replace the linear layers of a pruned model, in place, by faster or smaller ones.

    With `prefer="speed"`, layers of each shape, type and sparsity are timed in the forms that they can have, in turn,
    with `batch_size` tokens, and keep the fastest: as they are; `DenseLinear`, which is faster for a single token; or
    `SparseLinear`, which stores and reads the non-zero weights only, and in a quantised model a byte for each of them
    (in the report: `int8`). On a GPU there are no `DenseLinear` and no bytes, and matrices that are 2:4 may become
    `SemiStructuredLinear`, if the units of the GPU take them. Ties stay as they are. With `prefer="memory"`, all
    layers that become smaller are packed as `SparseLinear`, untimed, and the others are as with `"speed"`.

    The model computes the same, to the rounding of its type. It generates, compiles and saves as before (a saved
    model is dense), but the weights of sparse layers cannot be trained. The kernels are used where no gradient is
    asked for, as in `generate`.

    Args:
        model: Any module with `nn.Linear` layers, on the CPU or NVIDIA GPUs. Layers of other classes stay as they are.
        batch_size: How many tokens the model will process at once: the batch size of `generate`. If prompts are what
            matters, their tokens in all.
        prefer: `"speed"` or `"memory"`.
        grids: What the weights of a quantised model were rounded to: `SparsePruner.grids`, or the folder or file that
            `SparsePruner.save` wrote. By default those of the checkpoint that the model was loaded from.
        cuda_graphs: Whether the model will run as CUDA graphs (`torch.compile(mode="reduce-overhead")`, or a static
            cache in `generate`), and layers on GPUs are timed so. Else the times have what it takes the host to call
            them, which for few tokens is longer than what the GPU takes.

    Returns:
        What became of each layer, and the measurements.

    Raises:
        FileNotFoundError: `grids` names a folder or file without grids.
        ValueError: An argument is out of range, or the file of the grids is damaged.
        TypeError: `model` is no module, or is itself an `nn.Linear`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if type(model) in (nn.Linear, DenseLinear):
        raise TypeError(
            "model is a single nn.Linear, which cannot be replaced in place: SparseLinear.from_linear(it)."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer must be one of {', '.join(PREFERENCES)}, got {prefer!r}.")

    found, missing = find_grids(model, grids)
    _undo(model)
    candidates, untouched = _candidates(model, found, missing)
    if grids is not None and not any(candidate.name in found for candidate in candidates):
        first = next(iter(found), "none")
        raise ValueError(
            f"grids are of {len(found)} matrices ({first} and so on), and no layer has one of these names: give the "
            "model that was pruned, and not a part of it."
        )
    kinds: dict[tuple, list[_Candidate]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.kind, []).append(candidate)
    layers = []
    for members in kinds.values():
        choose = _smallest if prefer == "memory" else _fastest
        choice, reason, times = choose(model, members, batch_size, cuda_graphs)
        layers.append(_replace(model, members, choice, reason, times))
    if any(layer.choice in ("sparse", "int8") for layer in layers):
        copy_what_stays(model)
    release_memory()
    on_gpu = any(candidate.gpu for candidate in candidates)
    kernel, missing = ("triton", gpu.MISSING) if on_gpu else (kernels.LEVEL, kernels.MISSING)
    return RuntimeReport(batch_size, kernel, missing, kernels.threads(), layers, untouched)


def _undo(model: nn.Module) -> None:
    """Make ordinary layers of those that were made faster before, and are as large as they were."""
    for name, module in list(model.named_modules()):
        if name and isinstance(module, DenseLinear) and not _hooked(module):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.to_linear())


def copy_what_stays(model: nn.Module) -> None:
    """Let go of the checkpoint: one tensor that is mapped from a file keeps all of it in memory."""
    tensors: dict[torch.Tensor, None] = dict.fromkeys(model.parameters())
    for module in model.modules():
        if not isinstance(module, SparseLinear):  # whose buffers are its own
            tensors |= {buffer: None for buffer in module._buffers.values() if buffer is not None}
    for tensor in tensors:
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
    device: torch.device
    gpu: bool
    two_of_four: bool
    contiguous: bool  # how the weight lies in memory
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
        return (
            *(self.shape, self.dtype, self.bias, self.tied, sparsity),
            *(self.device, self.two_of_four, self.contiguous, self.grid is None, self.no_grid),
        )

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be packed, or would not become smaller by it."""
        if self.dtype not in kernels.TYPES:
            return f"there is no packed form for {self.dtype}"
        if self.tied:
            return "another layer uses the same weight"
        if tiles.packed_bytes(self.shape, self.nonzero, self.dtype.itemsize) >= self.numel * self.dtype.itemsize:
            return TOO_FEW_ZEROS
        return None


def _candidates(
    model: nn.Module, grids: Mapping[str, Grid], missing: str | None
) -> tuple[list[_Candidate], dict[str, str]]:
    """The layers to look at, and why all others with a matrix are left alone; embeddings are no products."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: list[_Candidate] = []
    untouched: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | SparseLinear | SemiStructuredLinear):
            continue
        matrices = {key: p for key, p in module._parameters.items() if p is not None and p.ndim >= 2}
        reason = _reason_to_stay(module)
        if reason is not None:
            untouched |= {f"{name}.{key}".strip(".").removesuffix(".weight"): reason for key in matrices}
            continue
        weight = matrices["weight"]
        shape = (weight.shape[0], weight.shape[1])
        bias, tied = module._parameters["bias"] is not None, uses[id(weight)] > 1
        nonzero, on_gpu = int(torch.count_nonzero(weight)), _on_gpu(weight)
        two_of_four = on_gpu and 2 * nonzero <= weight.numel() and semi_structured.is_two_of_four(weight)
        where = (weight.device, on_gpu, two_of_four, weight.is_contiguous())
        grid = None if tied else grids.get(name)
        reason = why_not_codes(weight.detach(), grid) if grid is not None else missing
        if grids and name not in grids:
            reason = "there is no grid for it"
        grid = grid if reason is None else None
        found.append(_Candidate(name, shape, weight.dtype, bias, tied, nonzero, *where, grid, reason))
    return found, fold_reasons(untouched)


def _on_gpu(weight: torch.Tensor) -> bool:
    return weight.is_cuda


def why_not_codes(weight: torch.Tensor, grid: Grid) -> str | None:
    """Why the values of a weight cannot be packed as codes, or `None`."""
    if _on_gpu(weight):
        return "there are no kernels for codes on a GPU"
    if weight.dtype not in kernels.MULTIPLIED:
        return f"there are no kernels for codes in {weight.dtype}"
    reason = quantized.obstacle(weight.shape, grid)
    if reason is not None:
        return reason
    try:
        grid.codes(weight)
    except ValueError as error:
        return str(error)
    too_large = quantized.packed_bytes(weight.shape, int(torch.count_nonzero(weight))) >= weight.nbytes
    return TOO_FEW_ZEROS if too_large else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _reason_to_stay(module: nn.Module) -> str | None:
    if not isinstance(module, DenseLinear) and type(module) is not nn.Linear:
        return f"stays as it is: only nn.Linear is replaced, and it is a {type(module).__name__}"
    if _hooked(module):
        return "stays as it is: it has forward hooks"
    if module.weight.device.type not in ("cpu", "cuda"):
        return f"stays as it is: there are no kernels for {module.weight.device.type}"
    if 0 in module.weight.shape:
        return "stays as it is: it has no weights"
    return None


def fold_reasons(reasons: dict[str, str]) -> dict[str, str]:
    """Names that differ in an index joined."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return {name: reason for reason, names in groups.items() for name in fold_names(names)}


def _smallest(
    model: nn.Module, members: Sequence[_Candidate], batch_size: int, cuda_graphs: bool
) -> tuple[str, str | None, dict[str, float]]:
    if members[0].grid is not None:
        return "int8", None, {}
    obstacle = _obstacle(members)
    if obstacle is None:
        return "sparse", _no_codes(members[0]), {}
    choice, _, times = _fastest(model, members, batch_size, cuda_graphs)  # of forms that take the same
    return choice, f"not packed: {obstacle}", times


def _no_codes(first: _Candidate) -> str | None:
    return None if first.no_grid is None else f"not as int8: {first.no_grid}"


def _obstacle(members: Sequence[_Candidate]) -> str | None:
    return next((member.obstacle for member in members if member.obstacle), None)


def _ways(members: Sequence[_Candidate], batch_size: int) -> tuple[list[str], str | None]:
    """The forms to time, and what keeps layers from having others, if that is for the report."""
    first, obstacle = members[0], _obstacle(members)
    ways = ["torch"]
    if first.gpu:
        obstacles = {"sparse": obstacle or gpu.MISSING}
        if first.two_of_four and not first.tied:
            obstacles["2:4"] = semi_structured.obstacle(first.shape, first.dtype, first.device)
        reasons = [f"{way} not timed: {why}" for way, why in obstacles.items() if why is not None]
        reasons += [reason] if (reason := _no_codes(first)) else []
        return ways + [way for way, why in obstacles.items() if why is None], "; ".join(reasons) or None
    if not kernels.compiled():
        return ways, "not timed: there are no compiled kernels"
    if first.dtype not in kernels.MULTIPLIED:
        return ways, f"not timed: there are no kernels for {first.dtype}"
    ways += ["dense"] if batch_size == 1 and first.contiguous else []
    ways += ["sparse"] if obstacle is None else []
    ways += ["int8"] if first.grid is not None else []
    return ways, f"not timed: {obstacle}" if ways == ["torch"] else _no_codes(first)


def _fastest(
    model: nn.Module, members: Sequence[_Candidate], batch_size: int, cuda_graphs: bool
) -> tuple[str, str | None, dict[str, float]]:
    first = members[0]
    rows, columns = first.shape
    ways, reason = _ways(members, batch_size)
    if ways == ["torch"]:
        return "torch", reason, {}
    num_layers = max(1, SAMPLE_BYTES // (rows * columns * first.dtype.itemsize))
    sample = members[:num_layers]
    forms = {way: [_form(way, _linear(model, member.name), member.grid) for member in sample] for way in ways}
    x = torch.randn(batch_size, columns).to(first.device, first.dtype)
    times = microseconds(forms, x, cuda_graphs and first.gpu)
    choice = "torch"
    for way in ways:
        if times[way] < MARGIN * times[choice]:
            choice = way
    return choice, reason, times


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _form(way: str, layer: nn.Linear, grid: Grid | None) -> nn.Module:
    """A layer in one of its forms."""
    if way == "torch":
        return layer
    if way == "dense":
        return DenseLinear.from_linear(layer)
    if way == "2:4":
        return SemiStructuredLinear.from_linear(layer)
    return SparseLinear.from_linear(layer, grid if way == "int8" else None)


def _bytes(layer: nn.Module) -> int:
    """What a weight takes."""
    if isinstance(layer, SparseLinear):
        return layer.tiles.nbytes
    assert isinstance(layer, nn.Linear)
    return layer.nbytes if isinstance(layer, SemiStructuredLinear) else layer.weight.nbytes


def _replace(
    model: nn.Module, members: Sequence[_Candidate], choice: str, reason: str | None, times: dict[str, float]
) -> LayerChoice:
    """Give all layers of a kind the form chosen for them."""
    first, numel = members[0], sum(member.numel for member in members)
    now = 0
    for member in members:
        layer = _form(choice, _linear(model, member.name), member.grid)
        now += _bytes(layer)
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
