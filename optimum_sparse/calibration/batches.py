"""From rows of tokens to batches of model inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

# Token ids of one sequence, [tokens] int64, and its mask of the same shape if the user gave one.
Row = tuple[torch.Tensor, torch.Tensor | None]


def token_rows(items: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Split dicts with `input_ids` of one sequence (1-D) or several (2-D, lists or tensors) into rows.

    Raises:
        ValueError: A dict has no `input_ids`, they are no token ids, or the mask does not fit them.
    """
    for index, item in enumerate(items):
        where = f"in item {index} of the calibration data"
        if "input_ids" not in item:
            raise ValueError(f"There is no 'input_ids' {where}, only [{', '.join(map(str, item))}].")
        ids = _as_rows(item["input_ids"], f"'input_ids' {where}")
        if item.get("attention_mask") is None:
            yield from ((row, None) for row in ids)
            continue
        mask = _as_rows(item["attention_mask"], f"'attention_mask' {where}")
        if mask.shape != ids.shape:
            raise ValueError(f"'attention_mask' {where} is {list(mask.shape)}, but 'input_ids' is {list(ids.shape)}.")
        if not torch.isin(mask, torch.tensor([0, 1])).all() or not mask.any(dim=1).all():
            raise ValueError(
                f"'attention_mask' {where} must be 0 for padding and 1 for at least one token of each row."
            )
        yield from zip(ids, mask, strict=True)


def _as_rows(values: Any, what: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a list or tensor with rows of one length ({error}).") from error
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or tensor.is_floating_point():
        raise ValueError(f"{what} must be integers [tokens] or [rows, tokens], got {_form(tensor)}.")
    return tensor.to(torch.int64).reshape(-1, tensor.shape[-1])


def stack_rows(rows: Iterable[Row], batch_size: int | None, batch_tokens: int) -> list[dict[str, Any]]:
    """Stack neighbours of equal length, in order.

    Args:
        rows: Of any lengths.
        batch_size: Rows per batch; `None` for as many as fit in `batch_tokens`, at least one.
        batch_tokens: Tokens per batch without a `batch_size`.
    """
    batches = []
    for (length, masked), group in itertools.groupby(rows, key=lambda row: (len(row[0]), row[1] is not None)):
        same = list(group)
        size = batch_size or max(1, batch_tokens // length)
        for first in range(0, len(same), size):
            ids, masks = zip(*same[first : first + size], strict=True)
            batch = {"input_ids": torch.stack(ids)}
            if masked:
                batch["attention_mask"] = torch.stack(masks)
            batches.append(batch)
    return batches


def given_batches(items: Iterable[Any], num_samples: int) -> list[dict[str, Any]]:
    """Take the user's own batches, unchanged, up to `num_samples` rows; the last one is cut to fit.

    Raises:
        TypeError: A batch is no dict of model inputs.
        ValueError: A batch has no `input_ids` `[rows, tokens]`, or the last one cannot be cut.
    """
    batches: list[dict[str, Any]] = []
    room = num_samples
    for index, batch in enumerate(items):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Batch {index} of the calibration data must be a dict of model inputs, got {type(batch).__name__}: "
                "give the DataLoader a collate_fn that makes dicts, or give a list of strings or of token dicts."
            )
        ids = batch.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise ValueError(
                f"'input_ids' in batch {index} of the calibration data must be an integer tensor [rows, tokens], "
                f"got {_form(ids)}."
            )
        batches.append(dict(batch) if len(ids) <= room else _cut(batch, len(ids), room))
        room -= len(ids)
        if room <= 0:
            break
    return batches


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


def check_vocabulary(ids: torch.Tensor, vocabulary: int) -> None:
    """Make sure that every id has an embedding.

    Raises:
        ValueError: An id is negative, or `vocabulary` or more.
    """
    for extreme in (int(ids.min()), int(ids.max())):
        if not 0 <= extreme < vocabulary:
            raise ValueError(
                f"Token id {extreme} is outside of the model's vocabulary of {vocabulary} ids: use the tokenizer that "
                "belongs to the model."
            )
