"""Which weights of a pruned model may change: one bit each, taken from the weights once."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..metadata import expand_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASK_FILE = "sparsity_masks.safetensors"


@dataclass(frozen=True)
class Mask:
    """Which weights of one parameter are kept.

    Attributes:
        bits: uint8; bit `i` of byte `j` is 1 if weight `8 j + i`, in the order of storage, is kept.
        shape: Shape of the parameter.
    """

    bits: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, kept: torch.Tensor) -> Mask:
        """From a bool tensor of the shape of the parameter, true where the weight is kept."""
        flat = nn.functional.pad(kept.flatten(), (0, -kept.numel() % 8)).view(-1, 8)
        powers = 2 ** torch.arange(8, dtype=torch.uint8, device=kept.device)
        return cls((flat * powers).sum(dim=1, dtype=torch.uint8), tuple(kept.shape))

    def expand(self, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """The mask in the shape of the parameter: 1 where the weight is kept, else 0."""
        # Eight values at once from a table, as one int64, are many times faster than shifting bits.
        octets = torch.index_select(_octets(self.bits.device), 0, self.bits.int()).view(torch.uint8)
        values = octets[: math.prod(self.shape)].view(self.shape)
        return values.view(dtype) if dtype == torch.bool else values.to(dtype)

    def to(self, device: torch.device) -> Mask:
        """The same mask on another device."""
        return self if self.bits.device == device else Mask(self.bits.to(device), self.shape)

    @property
    def num_pruned(self) -> int:
        """Number of weights that must stay zero."""
        return int((~self.expand()).sum())

    @property
    def digest(self) -> str:
        """64 bits of SHA-256 over shape and mask, in hexadecimal."""
        return hashlib.sha256(repr(self.shape).encode() + self.bits.cpu().numpy().tobytes()).hexdigest()[:16]


@functools.cache
def _octets(device: torch.device) -> torch.Tensor:
    """`[256]` int64: for each byte, its bits as eight bytes that are 0 or 1, the least significant first."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()


def find_masks(model: PreTrainedModel) -> dict[str, Mask]:
    """The masks of all pruned parameters of a model, by parameter name.

    Pruned are those that `config.sparsity_config` names; a weight of them may change unless it is zero now. Take the
    masks before training: a kept weight may become zero later, in bfloat16 above all.

    Args:
        model: A pruned model, with or without adapters in it.

    Raises:
        ValueError: The model is dense, or was changed after pruning.
    """
    record = getattr(model.config, "sparsity_config", None)
    if record is None:
        raise ValueError(
            f"This {type(model).__name__} has no config.sparsity_config, so it is not known to be pruned: prune it "
            "with SparsePruner, or pass masks=masks_of(model, names) for one that was pruned by other means."
        )
    masks = masks_of(model, (name for folded in record["matrices"] for name in expand_name(folded)))
    claimed = sum(entry["zeros"] for entry in record["matrices"].values())
    found = sum(mask.num_pruned for mask in masks.values())
    if found == 0 or found < claimed:
        raise ValueError(
            f"config.sparsity_config says that {claimed} weights were pruned, but only {found} are zero: the model "
            "was changed after pruning, for instance by merging ordinary LoRA. Start from the pruned checkpoint."
        )
    return masks


def masks_of(model: PreTrainedModel, matrices: Iterable[str]) -> dict[str, Mask]:
    """The masks of the parameters that hold these matrices, by parameter name: what is zero now stays zero.

    Args:
        model: The model, with or without adapters in it.
        matrices: Names of modules with a `weight`, or of parameters; with the number of an expert behind it if there
            are several.

    Raises:
        ValueError: There is no such matrix, or it is not in memory.
    """
    keys = dict.fromkeys(_parameter_name(model, name) for name in matrices)
    masks = {}
    for key in keys:
        weight = parameter(model, key)
        if weight.is_meta:
            raise ValueError(
                f"{key} is not in memory: load the model without offloading, e.g. without device_map='auto'."
            )
        masks[key] = Mask.of(weight.detach() != 0)
    return masks


def parameter(model: nn.Module, key: str) -> torch.Tensor:
    """The parameter of that name in the model without adapters, also if it has some."""
    module, _, name = key.rpartition(".")
    return getattr(bare(model.get_submodule(module)), name)


def bare(module: Any) -> nn.Module:
    """The module itself, without the layers that PEFT put around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def check_masks(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Make sure that masks belong to a model.

    Raises:
        ValueError: A parameter does not exist, has another shape, or is not zero where it must be.
    """
    for key, mask in masks.items():
        try:
            weight = parameter(model, key)
        except AttributeError as error:
            raise ValueError(
                f"The masks are of another model: it has a {key!r}, {type(model).__name__} not."
            ) from error
        if tuple(weight.shape) != mask.shape:
            raise ValueError(
                f"The masks are of another model: {key!r} is {list(mask.shape)} there, {list(weight.shape)} here."
            )
        outside = count_outside(weight, mask)
        if outside:
            raise ValueError(
                f"{outside} weights of {key!r} are not zero, but the mask says that they were pruned: take the masks "
                "of this model, or the model to which they belong."
            )


def count_outside(weight: torch.Tensor, mask: Mask) -> int:
    """Number of weights that are not zero although they were pruned."""
    return int((weight.detach() != 0).logical_and_(~mask.to(weight.device).expand()).sum())


def save_masks(masks: Mapping[str, Mask], path: str | os.PathLike[str]) -> None:
    """Write masks to a safetensors file."""
    from safetensors.torch import save_file

    shapes = {key: mask.shape for key, mask in masks.items()}
    save_file({key: mask.bits for key, mask in masks.items()}, path, metadata={"shapes": json.dumps(shapes)})


def load_masks(path: str | os.PathLike[str]) -> dict[str, Mask]:
    """Read masks from a file that `save_masks` wrote.

    Raises:
        ValueError: It is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes: dict[str, Any] = json.loads((file.metadata() or {})["shapes"])
            return {key: _checked(key, file.get_tensor(key), tuple(shape)) for key, shape in shapes.items()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a file of masks ({error!r}).") from error


def _checked(key: str, bits: torch.Tensor, shape: tuple[int, ...]) -> Mask:
    if bits.dtype != torch.uint8 or bits.shape != (math.ceil(math.prod(shape) / 8),):
        raise ValueError(f"The mask of {key!r} is corrupt: {list(bits.shape)} {bits.dtype} for a shape {list(shape)}.")
    return Mask(bits, shape)


def _parameter_name(model: nn.Module, matrix: str) -> str:
    """Name of the parameter that holds a matrix: its own, or that of the fused experts of which it is a slice."""
    owner, _, expert = matrix.rpartition(".")
    for name in (matrix, *([owner] if expert.isdigit() else [])):
        for key in (f"{name}.weight", name):
            try:
                weight = parameter(model, key)
            except AttributeError:
                continue
            if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
                return key
    raise ValueError(f"{type(model).__name__} has no matrix {matrix!r}: is this the model that was pruned?")
