"""Layers that take the place of `nn.Linear` where they are faster or smaller."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from . import ops
from .tiles import Tiles

logger = logging.getLogger(__name__)


class SparseLinear(nn.Module):
    """A linear layer that stores only the non-zero weights, and multiplies them without unpacking.

    More than a few tokens at once are multiplied densely, with rows that are unpacked into a small buffer which all
    layers share. The weight cannot be trained, but gradients flow through the layer, to a LoRA adapter for example.

    A state dict has the dense `weight` and `bias` of the `nn.Linear` that this one stands for, so that saving writes
    an ordinary checkpoint; loading one packs the weight.
    """

    masks: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, tiles: Tiles, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._set(tiles)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear:
        """Pack a dense layer, which stays as it is.

        Raises:
            TypeError: Its weight is of a type that cannot be packed.
        """
        layer = cls(Tiles.pack(linear.weight), linear.bias)
        layer.training = linear.training
        return layer

    def _set(self, tiles: Tiles) -> None:
        self.out_features, self.in_features = tiles.shape
        for name in ("masks", "values", "offsets"):
            self.register_buffer(name, getattr(tiles, name), persistent=False)

    @property
    def tiles(self) -> Tiles:
        """The packed weight."""
        return Tiles((self.out_features, self.in_features), self.masks, self.values, self.offsets)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight `[out_features, in_features]`, unpacked anew each time; changing it changes nothing."""
        return self.tiles.unpack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` times the weight, plus the bias: `[..., out_features]`."""
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        parts = self._buffers  # at once: the look-up of an attribute that is a buffer takes long
        return ops.tiles_linear(
            x, parts["masks"], parts["values"], parts["offsets"], self.bias, self.out_features, self.in_features
        )

    def train(self, mode: bool = True) -> Self:
        """As that of `nn.Module`; says once that training does not reach the weight."""
        if mode:
            _say_that_packed_weights_stay()
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `print` shows."""
        zeros = 1 - (self.values.numel() - 32) / (self.out_features * self.in_features)
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, zeros={zeros:.2%}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing_keys, unexpected_keys, error_msgs = args
        key = prefix + "weight"
        if key in state_dict:
            shape = (self.out_features, self.in_features)
            if state_dict[key].shape != shape:
                error_msgs.append(f"{key} has the shape {tuple(state_dict[key].shape)}, and the layer {shape}.")
            else:
                self._set(Tiles.pack(state_dict[key].to(self.values)))
        elif strict:
            missing_keys.append(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if key in unexpected_keys:
            unexpected_keys.remove(key)


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
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `nn.Linear`."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        return ops.dense_linear(x, self.weight, self.bias)
