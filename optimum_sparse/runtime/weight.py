"""What a packed weight is to code that expects a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from .quantized import QuantizedTiles
from .tiles import Tiles

if TYPE_CHECKING:
    import numpy


class PackedWeight(torch.Tensor):
    """The dense weight `[out_features, in_features]` of a packed layer, to read.

    Its shape, dtype and device cost nothing. Whatever computes with it unpacks it, and gives plain tensors. What would
    change it raises a `RuntimeError`: a change could not reach the layer.

    Args:
        tiles: The packed weight.
    """

    # What is made from it is of no special class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _tiles: Tiles | QuantizedTiles

    @staticmethod
    def __new__(cls, tiles: Tiles | QuantizedTiles) -> PackedWeight:
        """A tensor without memory of its own."""
        like = tiles.like if isinstance(tiles, QuantizedTiles) else tiles.values
        weight: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls, tiles.shape, dtype=like.dtype, device=like.device
        )
        weight._tiles = tiles
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An operator on the unpacked weight."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._tiles)
        if func._schema.is_mutable:
            _refuse()
        args, kwargs = tree_map_only(cls, lambda weight: weight._tiles.unpack(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def data(self) -> PackedWeight:
        """The same."""
        return self

    @data.setter
    def data(self, value: object) -> None:
        _refuse()

    def __setitem__(self, index: object, value: object) -> None:
        """Refused."""
        _refuse()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """That of the unpacked weight."""
        return repr(self._tiles.unpack())

    def numpy(self, *, force: bool = False) -> numpy.ndarray:
        """That of the unpacked weight."""
        return self._tiles.unpack().numpy(force=force)

    def tolist(self) -> list[list[float]]:
        """That of the unpacked weight."""
        return self._tiles.unpack().tolist()


def _refuse() -> NoReturn:
    raise RuntimeError(  # torch takes a TypeError of `weight += 1` for a wish to try `weight = weight + 1`
        "The weight of a packed layer cannot be changed: merge adapters, and do whatever else changes weights, before "
        "sparsify_for_inference, in a model that was loaded without runtime='sparse'."
    )
