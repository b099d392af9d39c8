"""Which rows of a tensor in the middle of a forward are padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .calibration.decoder import NO_LABEL

# Functions that pick rows by a tensor of indices.
_GATHERS = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select)
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_RESHAPES = (torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.flatten, torch.reshape, torch.flatten)


def tokens_out(batch: Mapping[str, Any], decoder: bool) -> torch.Tensor | None:
    """Which tokens of a batch are no padding, `[rows, tokens]`, as far as the batch says so.

    Args:
        batch: The inputs of a model.
        decoder: Whether those are meant that a decoder with an encoder before it takes. It has a mask of its own, or
            takes all tokens, but for those behind the last label.
    """
    mask = batch.get("attention_mask")
    if decoder:
        mask, ids, labels = (batch.get(f) for f in ("decoder_attention_mask", "decoder_input_ids", "labels"))
        if mask is None and ids is not None:
            mask = torch.ones_like(ids)
        mask = labels != NO_LABEL if mask is None and labels is not None else mask
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


class Padding:
    """Tells padding from tokens in one forward of one batch.

    Positions are known by shape, `[rows, tokens]` or flattened. Experts take only the tokens routed to them: those are
    known because the forward had to pick them, which it lets this class see, with all that is computed from them row
    by row.

    Args:
        masks: Those that the batch has: 1 for tokens, 0 for padding, `[rows, tokens]`.
    """

    def __init__(self, masks: Sequence[torch.Tensor]) -> None:
        self._masks = [mask.bool() for mask in masks] if any(not mask.all() for mask in masks) else []
        self._picked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> which of its rows are tokens
        self._of_part: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, batch: Mapping[str, Any], decoder_too: bool = False) -> Padding:
        """From the masks in a batch; a mask with other dimensions says who attends to whom, not what is padding.

        Args:
            batch: The inputs of a model.
            decoder_too: Whether it has an encoder and a decoder.
        """
        masks = [tokens_out(batch, decoder) for decoder in ((False, True) if decoder_too else (False,))]
        return cls([mask for mask in masks if mask is not None])

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._masks)

    def saw_call(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """Take note of a function that the forward has called."""
        source = args[0] if args else None
        if func in _GATHERS:
            tokens = self._pick(source, args[-1])
        elif func in _JOINS and isinstance(source, (list, tuple)):
            parts = [part for part in map(self._rows, source) if part is not None]
            tokens = torch.cat(parts) if parts else None
        elif func in _RESHAPES and isinstance(source, torch.Tensor) and source.shape[-1:] == result.shape[1:]:
            tokens = self._tokens(source.shape[:-1]) if self._rows(source) is None else self._rows(source)
        else:
            tokens = self._rows(source)  # what is computed from them has as many rows
        for output in result if isinstance(result, (list, tuple)) else [result]:
            if tokens is not None and isinstance(output, torch.Tensor) and output.shape[:1] == tokens.shape:
                self._picked[output] = tokens

    def saw_use(self, inputs: torch.Tensor, part: int) -> None:
        """Take note of what a weight is about to be multiplied with."""
        tokens = self._rows(inputs)
        if tokens is not None:
            self._of_part[part] = tokens

    def keep(self, inputs: torch.Tensor, part: int = 0) -> torch.Tensor | None:
        """Which rows of `inputs` flattened to `[tokens, features]` are tokens; `None` for all of them.

        Args:
            inputs: `[..., features]`.
            part: Number of the expert that takes them. A later matrix of an expert has the same rows as the first.

        Raises:
            ValueError: That cannot be told.
        """
        if not self._masks or not inputs.numel():
            return None
        tokens = self._rows(inputs)
        if tokens is None or len(tokens) != inputs.shape[:-1].numel():
            tokens = self._tokens(inputs.shape[:-1])
        if tokens is None and inputs.ndim == 2 and len(self._of_part.get(part, ())) == len(inputs):
            tokens = self._of_part[part]
        if tokens is None:
            shapes = ", ".join(str(list(mask.shape)) for mask in self._masks)
            raise ValueError(
                f"inputs of shape {list(inputs.shape)} cannot be matched with the padding mask of shape {shapes}: "
                "pass calibration data without padding"
            )
        return None if tokens.all() else tokens.to(inputs.device)

    def _tokens(self, shape: torch.Size) -> torch.Tensor | None:
        """The mask of positions of this shape, flattened."""
        sizes = _sizes(shape)
        found = []
        for mask in self._masks:
            own = _sizes(mask.shape)
            heads = sizes[len(own) :]
            if sizes == [mask.numel()] or (sizes[: len(own)] == own and own[-1:] != heads[:1]):
                found.append(mask.reshape(-1).repeat_interleave(math.prod(shape) // mask.numel()))
            elif sizes == own[::-1]:
                found.append(mask.T.reshape(-1))
            elif sizes == _sizes(mask.shape[:1]):  # one vector for each text
                found.append(mask.any(dim=1))
        return found[0] if found and all(torch.equal(other, found[0]) for other in found) else None

    def _pick(self, source: Any, index: Any) -> torch.Tensor | None:
        """The mask of rows that are picked by index from `[..., features]`."""
        index = index[0] if isinstance(index, tuple) and index else index
        if not isinstance(source, torch.Tensor) or not isinstance(index, torch.Tensor) or index.is_floating_point():
            return self._rows(source)  # slices of columns or of rows
        tokens = self._rows(source) if source.ndim == 2 else None
        tokens = self._tokens(source.shape[:-1]) if tokens is None else tokens
        by_mask = index.dtype == torch.bool and index.shape == source.shape[:-1]
        if tokens is None or not (by_mask or (index.ndim == 1 and source.ndim == 2)):
            return None
        return tokens.to(index.device)[index.reshape(-1)]

    def _rows(self, tensor: Any) -> torch.Tensor | None:
        """The mask of rows that were picked by index, or of consecutive ones of them."""
        if not isinstance(tensor, torch.Tensor) or not tensor.ndim:
            return None
        if tensor in self._picked:
            return self._picked[tensor]
        base = tensor._base
        if base is None or base not in self._picked or tensor.stride(0) != base.stride(0) != 0:
            return None
        first = (tensor.storage_offset() - base.storage_offset()) // base.stride(0)
        return self._picked[base][first : first + len(tensor)]


def _sizes(shape: Sequence[int]) -> list[int]:
    """A shape without what is only there to broadcast."""
    return [size for size in shape if size != 1]
