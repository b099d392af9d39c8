"""Where calibration data come from: the Hub, local files, and the objects that users hold."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

# The papers' data, as path:config:split:column.
SHORT_NAMES = {"c4": "allenai/c4:en:train:text", "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:train:text"}
# The papers read this one of the 1,024 files of C4; naming it saves listing them all.
C4_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz"}
# Its rows are the lines of one text, to be read whole. Other Hub datasets have a document per row and are streamed.
WIKITEXT = "Salesforce/wikitext"
SHUFFLE_BUFFER = 10_000
# How the names of columns begin that are for a processor.
OTHER_THAN_TEXT = ("image", "audio", "video", "speech", "raw_speech")


@dataclass(frozen=True)
class Source:
    """Calibration data, opened but not read yet.

    Attributes:
        kind: "texts" (the items are documents), "self" (documents for the model to continue, or no items to start from
            nothing), "tokens" (dicts with `input_ids` of one or more sequences), "items" (dicts for a processor) or
            "batches" (dicts of model inputs).
        items: To be read once.
        description: What the record says about the origin.
        streaming: The items are in random order and may be endless: read only as many as needed.
    """

    kind: Literal["texts", "self", "tokens", "items", "batches"]
    items: Iterable[Any]
    description: str
    streaming: bool = False


def open_source(dataset: Any, seed: int, processor: Any = None) -> Source:
    """Recognise what `dataset` is.

    Args:
        dataset: Whatever the user gave.
        seed: Of the order in which streamed documents are read.
        processor: Makes model inputs from dicts with more than text, if there is one.

    Raises:
        ValueError: The data are empty or malformed, or it is unclear which column to read.
        TypeError: `dataset` is of an unsupported type.
        OSError: There is no such file, or the Hub cannot be read.
    """
    if isinstance(dataset, (str, os.PathLike)):
        return _named(os.fspath(dataset), seed, processor)
    if isinstance(dataset, Mapping):
        dataset = [dataset]
    if isinstance(dataset, (list, tuple)):
        return _listed(dataset, processor)

    from datasets import Dataset, IterableDataset

    name = type(dataset).__name__
    if isinstance(dataset, Dataset):
        return _from_rows(dataset, None, f"{name} of {len(dataset)} rows", processor)
    if isinstance(dataset, IterableDataset):
        if "input_ids" not in (dataset.column_names or next(iter(dataset), {})):
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return _from_rows(dataset, None, name, processor, streaming=True)
    if isinstance(dataset, Iterable):
        return Source("batches", dataset, name)
    raise TypeError(
        f"Calibration data cannot be of type {name}: give a Hub name, a file, a list of strings or of dicts with "
        "input_ids, a datasets.Dataset, or an iterable of dicts of model inputs such as a DataLoader."
    )


def _listed(items: list[Any] | tuple[Any, ...], processor: Any) -> Source:
    if not items:
        raise ValueError("The calibration data are an empty list: give at least one text or token dict.")
    if all(isinstance(item, str) for item in items):
        return Source("texts", items, f"{len(items)} texts")
    if all(isinstance(item, Mapping) for item in items):
        if processor is not None and not any(name in items[0] for name in ("input_ids", *processor.model_input_names)):
            return Source("items", items, f"{len(items)} items")
        if any(map(_is_batch, items)):
            return Source("batches", items, f"{len(items)} batches")
        return Source("tokens", items, f"{len(items)} token dicts")
    found = ", ".join(sorted({type(item).__name__ for item in items}))
    raise TypeError(
        f"A list of calibration data must hold only strings, or only dicts with input_ids, got: {found}. "
        "Write token ids as {'input_ids': ids}, and what is for a processor as {'images': image}."
    )


def _is_batch(item: Mapping[str, Any]) -> bool:
    """Whether a dict holds tensors that are no tokens, as of images or sound."""
    return any(
        isinstance(value, torch.Tensor) and (value.is_floating_point() or "input_ids" not in item)
        for value in item.values()
    )


def _named(name: str, seed: int, processor: Any = None) -> Source:
    if name == "self":
        return Source("self", (), name)
    if name.startswith("self:"):
        start = _named(name.removeprefix("self:"), seed)
        if start.kind != "texts":
            raise ValueError(f"dataset={name!r} must name texts for the model to continue, got {start.kind}.")
        return Source("self", start.items, f"self:{start.description}", start.streaming)
    file = re.fullmatch(r"(.+\.(txt|jsonl|parquet))(?::(.+))?", name, re.IGNORECASE)
    if file:
        return _file(Path(file[1]), file[2].lower(), file[3], processor)
    if Path(name).is_file():
        raise ValueError(f"Calibration file {name!r} is of an unknown kind: use .txt, .jsonl or .parquet.")
    return _hub(name, seed, processor)


def _file(path: Path, kind: str, column: str | None, processor: Any) -> Source:
    if not path.is_file():
        raise FileNotFoundError(f"There is no calibration file {str(path)!r} (looked in {Path.cwd()}).")
    # The record is published with the model: it names the file, not the folders of this machine.
    if kind == "jsonl":
        return _from_rows(_json_lines(path), column, path.name, processor)
    if kind == "parquet":
        return _from_rows(_parquet_rows(path), column, path.name, processor)
    if column:
        raise ValueError(f"{path.name!r} is plain text and has no column {column!r}: give the path alone.")
    return Source("texts", [_read_text(path)], path.name)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Calibration file {str(path)!r} is not UTF-8 text ({error}).") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}, line {number} must be a JSON object, got {type(row).__name__}.")
        yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"Calibration file {str(path)!r} is not a parquet file ({error}).") from error
    with file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _hub(name: str, seed: int, processor: Any) -> Source:
    parts = SHORT_NAMES.get(name, name).split(":")
    if len(parts) > 4 or not parts[0].strip():
        raise ValueError(f"A Hub dataset is written path[:config[:split[:column]]], got {name!r}.")
    path, config, split, column = [*parts, "", "", ""][:4]
    rows = _hub_rows(path, config or None, split or "train", seed)
    if Path(path).is_dir():  # `datasets` reads folders, too; where this one is concerns nobody
        name = ":".join([Path(path).resolve().name, *parts[1:]])
    if path == WIKITEXT:
        return Source("texts", _joined(_texts(rows, column or "text", name)), name)
    return _from_rows(rows, column or None, name, processor, streaming=True)


def _hub_rows(path: str, config: str | None, split: str, seed: int) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset
    from huggingface_hub.utils import httpx

    of_papers = (path, config, split) == ("allenai/c4", "en", "train")
    subset: dict[str, Any] = {"data_files": C4_SHARD} if of_papers else {"name": config}
    try:
        if path == WIKITEXT:
            yield from load_dataset(path, split=split, **subset)
        else:
            stream = load_dataset(path, split=split, streaming=True, **subset)
            yield from stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except (OSError, httpx.RequestError) as error:
        raise OSError(
            f"Cannot read the calibration dataset {path!r} from the Hub ({type(error).__name__}: {error}). Check the "
            f"name ({', '.join(SHORT_NAMES)} are short names) and the connection, or calibrate without the Hub: on a "
            "local .txt, .jsonl or .parquet file, a list of strings, or dataset='self', text that the model generates."
        ) from error
    except ValueError as error:  # of `datasets` or PyArrow, and long
        raise ValueError(
            f"{path!r} has no rows that can be read ({' '.join(str(error).split())[:300] or type(error).__name__}): "
            "give a dataset, or a .txt, .jsonl or .parquet file."
        ) from error


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """The lines of WikiText as one document, in the papers' way."""
    yield "\n\n".join(lines)


def _from_rows(
    rows: Iterable[Mapping[str, Any]], column: str | None, name: str, processor: Any, streaming: bool = False
) -> Source:
    """Read token dicts if the rows have `input_ids`, items if they have images or the like, else the text column."""
    if column is None:
        rows = iter(rows)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"The calibration data ({name}) hold no rows.")
        rows = itertools.chain([first], rows)
        if "input_ids" in first:
            return Source("tokens", rows, name, streaming)
        if processor is not None and any(key.startswith(OTHER_THAN_TEXT) for key in first):
            return Source("items", rows, name, streaming)
        column = _text_column(first, name)
    return Source("texts", _texts(rows, column, name), name, streaming)


def _text_column(row: Mapping[str, Any], name: str) -> str:
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise ValueError(
        f"It is unclear which column of the calibration data ({name}) to read: none is called 'text', and "
        f"{len(strings)} of [{', '.join(row)}] hold strings. Name one at the end (FILE.jsonl:COLUMN, or "
        "path:config:split:column on the Hub), or keep only that column. Columns with images or sound need the "
        "model's processor instead of a tokenizer; ready model inputs need a DataLoader."
    )


def _texts(rows: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[str]:
    for index, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            found = f"is {type(row[column]).__name__}" if column in row else f"is not among [{', '.join(row)}]"
            raise ValueError(
                f"Column {column!r} {found} in row {index} of the calibration data ({name}), but must be text: "
                "choose another column, or drop such rows."
            )
        yield row[column]
