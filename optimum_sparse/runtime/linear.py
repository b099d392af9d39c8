"""Layers that take the place of `nn.Linear` where they are faster or smaller."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Self, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from ..quantization import Grid
from . import ops
from .quantized import QuantizedTiles
from .tiles import Tiles
from .weight import PackedWeight

logger = logging.getLogger(__name__)

Layer = TypeVar("Layer", bound=nn.Linear)

# Buffers of a layer are the parts of its weight.
_PARTS = {
    Tiles: ("masks", "values", "offsets"),
    QuantizedTiles: ("masks", "codes", "offsets", "grids", "like"),
}


class SparseLinear(nn.Module):
    """A linear layer that stores only the non-zero weights, and multiplies them without unpacking.

    A quantised one stores a byte for each of them. It multiplies the values of its grid as they are; its dense weight
    has them rounded to its type.

    More than a few tokens at once are multiplied densely, with rows that are unpacked into a small buffer which all
    layers share. The weight cannot be trained, but gradients flow through the layer, to a LoRA adapter for example.

    A state dict has the dense `weight` and `bias` of the `nn.Linear` that this one stands for, so that saving writes
    an ordinary checkpoint; loading one packs the weight, without a grid.
    """

    def __init__(self, tiles: Tiles | QuantizedTiles, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._set(tiles)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, grid: Grid | None = None) -> SparseLinear:
        """Pack a dense layer, which stays as it is.

        Args:
            linear: The layer.
            grid: What its weight was rounded to: makes a quantised layer.

        Raises:
            TypeError: Its weight is of a type that cannot be packed.
            ValueError: The weight is not on the grid, or `QuantizedTiles` are not for it.
        """
        tiles = Tiles.pack(linear.weight) if grid is None else QuantizedTiles.pack(linear.weight, grid)
        layer = cls(tiles, linear.bias)
        layer.training = linear.training
        return layer

    def _set(self, tiles: Tiles | QuantizedTiles) -> None:
        self._buffers.clear()
        self.out_features, self.in_features = tiles.shape
        for name in _PARTS[type(tiles)]:
            self.register_buffer(name, getattr(tiles, name), persistent=False)

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes."""
        return "codes" in self._buffers

    @property
    def tiles(self) -> Tiles | QuantizedTiles:
        """The packed weight."""
        kind: Any = QuantizedTiles if self.quantized else Tiles
        parts = {name: getattr(self, name) for name in _PARTS[kind]}
        return kind((self.out_features, self.in_features), **parts, checked=True)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight `[out_features, in_features]`, unpacked anew by whatever reads it; it cannot be changed."""
        return PackedWeight(self.tiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` times the weight, plus the bias: `[..., out_features]`."""
        if torch.is_autocast_enabled(x.device.type):
            return self._autocast(x)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _product(x, self.bias, self.tiles)
        parts = self._buffers  # at once: the look-up of an attribute that is a buffer takes long
        if "codes" in parts:
            return ops.quantized_linear(
                x,
                parts["masks"],
                parts["codes"],
                parts["offsets"],
                parts["grids"],
                self.bias,
                self.out_features,
                self.in_features,
            )
        return ops.tiles_linear(
            x, parts["masks"], parts["values"], parts["offsets"], self.bias, self.out_features, self.in_features
        )

    def _autocast(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, where torch chooses the type of the product."""
        device, dtype = x.device.type, x.dtype
        if dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x = x.to(dtype)
            if dtype == self.weight.dtype and (self.bias is None or self.bias.dtype == dtype):
                return self(x)
            return _product(x, None if self.bias is None else self.bias.to(dtype), self.tiles)

    def train(self, mode: bool = True) -> Self:
        """As that of `nn.Module`; says once that training does not reach the weight."""
        if mode:
            _say_that_packed_weights_stay()
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `print` shows."""
        zeros = f"{self.tiles.sparsity:.2%}"
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, zeros={zeros}"
        return text + (", quantized=True" if self.quantized else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.tiles.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing_keys, unexpected_keys, error_msgs = args
        key = prefix + "weight"
        if key in state_dict:
            now, value = self.weight, state_dict[key]
            if value.shape != now.shape:
                error_msgs.append(f"{key} has the shape {tuple(value.shape)}, and the layer {tuple(now.shape)}.")
            else:
                self._set(Tiles.pack(value.to(now.device, now.dtype)))
        elif strict:
            missing_keys.append(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if key in unexpected_keys:
            unexpected_keys.remove(key)


def _product(x: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles | QuantizedTiles) -> torch.Tensor:
    """`F.linear` with a packed weight, which stays packed until gradients come back through it."""
    # Of rows, what comes out is no view, and can be changed in place.
    return _Product.apply(x.reshape(-1, x.shape[-1]), bias, tiles).view(*x.shape[:-1], tiles.shape[0])


class _Product(torch.autograd.Function):
    """`x` is `[tokens, in_features]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles | QuantizedTiles) -> torch.Tensor:
        ctx.tiles = tiles
        return F.linear(x, tiles.unpack().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        along = gradient @ ctx.tiles.unpack().to(gradient.dtype) if needs_x else None
        return along, gradient.sum(dim=0) if needs_bias else None, None


@lru_cache
def _say_that_packed_weights_stay() -> None:
    logger.warning(
        "Packed layers (SparseLinear) are put in training mode, and their weights are not trained: to train them, "
        "load the model without runtime='sparse', and train it before sparsify_for_inference."
    )


class DenseLinear(nn.Linear):
    """An `nn.Linear` whose product with a single token reads the weight as fast as memory is."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> DenseLinear:
        """A layer with the same parameters as `linear`, not copies of them."""
        return _of_class(cls, linear)

    def to_linear(self) -> nn.Linear:
        """An ordinary layer with the same parameters."""
        return _of_class(nn.Linear, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `nn.Linear`."""
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if learns or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return ops.dense_linear(x, self.weight, self.bias)


def _of_class(kind: type[Layer], linear: nn.Linear) -> Layer:
    with torch.device("meta"):
        layer = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)
