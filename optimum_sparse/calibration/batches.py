"""From rows of tokens to batches of model inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .interface import main_input

# The tokens of one sequence by the name of the model input, each [tokens] int64: "input_ids", "attention_mask" if the
# user gave one, and what the decoder of an encoder-decoder model is given.
Row = dict[str, torch.Tensor]
# Model inputs that have something for each token, of the encoder or of the decoder.
TOKEN_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    *("labels", "decoder_input_ids", "decoder_attention_mask"),
)


def token_rows(items: Iterable[Mapping[str, Any]], others: Sequence[str] = ()) -> Iterator[Row]:
    """Split dicts with `input_ids` of one sequence (1-D) or several (2-D, lists or tensors) into rows.

    Args:
        items: The dicts; only `input_ids`, `attention_mask` and `others` are read.
        others: Further names of tokens, which may have lengths of their own.

    Raises:
        ValueError: A dict has no `input_ids`, they are no token ids, or mask or others do not fit them.
    """
    for index, item in enumerate(items):
        where = f"in item {index} of the calibration data"
        if "input_ids" not in item:
            raise ValueError(
                f"There is no 'input_ids' {where}, only [{', '.join(map(str, item))}]: give token ids by that name, "
                "or pass the model's processor instead of a tokenizer if it takes such dicts."
            )
        names = ["input_ids", *(name for name in ("attention_mask", *others) if item.get(name) is not None)]
        columns = {name: _as_rows(item[name], f"{name!r} {where}") for name in names}
        ids, mask = columns["input_ids"], columns.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"'attention_mask' {where} is {list(mask.shape)}, but 'input_ids' is {list(ids.shape)}.")
        if mask is not None and (not torch.isin(mask, torch.tensor([0, 1])).all() or not mask.any(dim=1).all()):
            raise ValueError(
                f"'attention_mask' {where} must be 0 for padding and 1 for at least one token of each row."
            )
        for name, column in columns.items():
            if len(column) != len(ids):
                raise ValueError(f"{name!r} {where} has {len(column)} rows, but 'input_ids' has {len(ids)}.")
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _as_rows(values: Any, what: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be a list or tensor with rows of one length ({error}).") from error
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or tensor.is_floating_point():
        raise ValueError(f"{what} must be integers [tokens] or [rows, tokens], got {_form(tensor)}.")
    return tensor.to(torch.int64).reshape(-1, tensor.shape[-1])


def num_rows(batch: Mapping[str, Any]) -> int:
    """How many rows a batch of model inputs has; images beside text may have a row for each part of theirs."""
    if isinstance(ids := batch.get("input_ids"), torch.Tensor) and ids.ndim:
        return len(ids)
    return max(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def usable(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with copies of what was made in inference mode, which can neither be changed nor be trained with."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value
        for name, value in batch.items()
    }


def holds_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has nothing but tokens, and what there is for each of them, so that it can be taken apart."""
    ids = batch.get("input_ids")
    there = {name: value for name, value in batch.items() if value is not None}
    return isinstance(ids, torch.Tensor) and all(
        name in TOKEN_INPUTS and isinstance(value, torch.Tensor) and value.ndim in (1, 2, 4) and len(value) == len(ids)
        for name, value in there.items()
    )


def split_rows(batch: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """A batch of tokens in parts of `size` rows; one of other things as it is."""
    if not holds_tokens(batch):
        return [dict(batch)]
    return [
        {name: value if value is None else value[first : first + size] for name, value in batch.items()}
        for first in range(0, len(batch["input_ids"]), size)
    ]


def shortened(batch: Mapping[str, Any], length: int = 256) -> dict[str, Any]:
    """The start of a batch of tokens, from the first that is no padding on; one of other things as it is."""
    if not holds_tokens(batch):
        return dict(batch)
    tokens, mask = batch["input_ids"].shape[1], batch.get("attention_mask")
    first = 0
    if mask is not None and mask.ndim == 2:
        first = min(int(mask.any(dim=0).int().argmax()), max(0, tokens - length))

    def cut(value: torch.Tensor) -> torch.Tensor:
        part = slice(first, first + length) if value.shape[-1] == tokens else slice(length)
        return value[..., part, part] if value.ndim == 4 else value[:, part] if value.ndim == 2 else value

    return {name: value if value is None else cut(value) for name, value in batch.items()}


def stack_rows(rows: Iterable[Row], batch_size: int | None, batch_tokens: int) -> list[dict[str, Any]]:
    """Stack neighbours of equal length, in order.

    Args:
        rows: Of any lengths.
        batch_size: Rows per batch; `None` for as many as fit in `batch_tokens`, at least one.
        batch_tokens: Tokens per batch without a `batch_size`.
    """
    batches: list[dict[str, Any]] = []
    for lengths, group in itertools.groupby(rows, key=lambda row: {name: len(row[name]) for name in row}):
        same = list(group)
        size = batch_size or max(1, batch_tokens // lengths["input_ids"])
        for first in range(0, len(same), size):
            batches.append({name: torch.stack([row[name] for row in same[first : first + size]]) for name in lengths})
    return batches


def given_batches(items: Iterable[Any], num_samples: int, model: nn.Module) -> list[dict[str, Any]]:
    """Take batches that are ready for the model, unchanged, up to `num_samples` rows; the last one is cut to fit.

    Args:
        items: Dicts of model inputs: tensors, and whatever else its forward takes.
        num_samples: Rows wanted, counted along the first dimension of each batch's main input.
        model: Tells which input that is.

    Raises:
        TypeError: A batch is no dict of model inputs.
        ValueError: A batch has no rows, its `input_ids` are no `[rows, tokens]`, or the last one cannot be cut.
    """
    batches: list[dict[str, Any]] = []
    room = num_samples
    for index, batch in enumerate(items):
        rows = _count_rows(batch, index, model)
        batches.append(dict(batch) if rows <= room else _cut(batch, rows, room))
        room -= rows
        if room <= 0:
            break
    return batches


def _count_rows(batch: Any, index: int, model: nn.Module) -> int:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Batch {index} of the calibration data must be a dict of model inputs, got {type(batch).__name__}: "
            "give the DataLoader a collate_fn that makes dicts, or give a list of strings or of token dicts."
        )
    ids = batch.get("input_ids")
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.ndim < 2 or ids.is_floating_point()):
        raise ValueError(
            f"'input_ids' in batch {index} of the calibration data must be an integer tensor [rows, tokens], "
            f"got {_form(ids)}."
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.any():
        raise ValueError(
            f"'attention_mask' in batch {index} of the calibration data is 0 for all tokens: it must be 1 for those "
            "that are no padding."
        )
    main = main_input(model, batch)
    if main is None or main.numel() == 0:
        held = ", ".join(f"{name}: {_form(value)}" for name, value in batch.items())
        raise ValueError(
            f"Batch {index} of the calibration data has no tensor with a row for each sample, only [{held}]: give "
            "model inputs as tensors, as with return_tensors='pt'."
        )
    return len(main)


def _cut(batch: Mapping[str, Any], rows: int, keep: int) -> dict[str, Any]:
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != rows:
            raise ValueError(
                f"The last calibration batch cannot be cut from {rows} rows to {keep}, as {name!r} does not have one "
                "entry per row: make num_samples a multiple of the batch size."
            )
    return {name: value[:keep] for name, value in batch.items()}


def _form(value: Any) -> str:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def check_vocabulary(ids: torch.Tensor, vocabulary: int | None) -> None:
    """Make sure that every id has an embedding, if it is known how many there are.

    Raises:
        ValueError: An id is negative, or `vocabulary` or more.
    """
    for extreme in (int(ids.min()), int(ids.max())) if ids.numel() else ():
        if vocabulary is not None and not 0 <= extreme < vocabulary:
            raise ValueError(
                f"Token id {extreme} is outside of the model's vocabulary of {vocabulary} ids: use the tokenizer that "
                "belongs to the model."
            )
