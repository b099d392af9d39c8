"""Training texts: from a dataset in one of TRL's formats to token ids and labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

# The label of a token that is not to be predicted.
IGNORED = -100
FORMATS = "'text', 'prompt' with 'completion', or 'messages'"
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def read_rows(dataset: str | os.PathLike[str] | Iterable[Mapping[str, Any]], limit: int | None = None) -> list[Any]:
    """Read the rows of a dataset.

    Args:
        dataset: A .jsonl, .json, .parquet or .txt file (one text), a Hub id as path[:config[:split]], or rows.
        limit: Read only the first.

    Raises:
        OSError: There is no such file or Hub dataset.
        ValueError: It has no rows.
    """
    try:
        rows: Iterable[Any] = _named(os.fspath(dataset)) if isinstance(dataset, (str, os.PathLike)) else dataset
        found = list(islice(rows, limit))
    except StopIteration:  # `datasets`, of an empty file
        found = []
    if not found:
        raise ValueError("The dataset has no rows.")
    return found


def _named(name: str) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    path = Path(name)
    if path.suffix.lower() in _KINDS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name!r} (looked in {Path.cwd()}).")
        if path.suffix.lower() == ".txt":
            return [{"text": path.read_text(encoding="utf-8")}]
        return load_dataset(_KINDS[path.suffix.lower()], data_files=str(path), split="train", streaming=True)
    if path.is_file():
        raise ValueError(f"{name!r} is a file of an unknown kind: give {', '.join(_KINDS)}.")
    hub_id, config, split = [*name.split(":"), "", ""][:3]
    try:
        return load_dataset(hub_id, config or None, split=split or "train", streaming=True)
    except OSError as error:
        raise OSError(
            f"Cannot read the dataset {name!r} ({type(error).__name__}: {error}). Check the name and the connection, "
            f"or give a local file: {', '.join(_KINDS)}."
        ) from error


def tokenize_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, seqlen: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of rows in one of TRL's formats.

    Plain texts end with EOS, are joined, and cut into pieces of `seqlen` tokens. Of a prompt with a completion, each
    strings or lists of messages, only the completion is learned. Conversations are written with the chat template of
    the tokenizer and learned whole. What is longer than `seqlen` is cut.

    Args:
        rows: All with the same columns: "text", "prompt" and "completion", or "messages".
        tokenizer: That of the model.
        seqlen: Most tokens of an example.

    Returns:
        Dicts with `input_ids` and `labels`.

    Raises:
        ValueError: The columns are others, or there is too little text.
    """
    columns = set(rows[0])
    if "text" in columns:
        _check_column(rows, "text", {str: "text"})
        examples = _pieces((row["text"] for row in rows), tokenizer, seqlen)
    elif columns >= {"prompt", "completion"}:
        for name in ("prompt", "completion"):
            _check_column(rows, name, {str: "text", list: "a list of messages"})
        examples = [_completion(row["prompt"], row["completion"], tokenizer) for row in rows]
    elif "messages" in columns:
        _check_column(rows, "messages", {list: "a list of messages"})
        examples = [_learned(_conversation(row["messages"], tokenizer)) for row in rows]
    else:
        raise ValueError(
            f"The dataset has the columns {', '.join(sorted(columns))}, but needs {FORMATS}, as in TRL: rename them."
        )
    examples = [{name: ids[:seqlen] for name, ids in example.items()} for example in examples]
    examples = [example for example in examples if any(label != IGNORED for label in example["labels"][1:])]
    if not examples:
        raise ValueError(
            f"The dataset has no text to learn from in pieces of seqlen={seqlen} tokens: give more text, or lower "
            "seqlen if there is too little of it, or raise it if the prompts are longer."
        )
    return examples


def _check_column(rows: Sequence[Mapping[str, Any]], name: str, kinds: Mapping[type, str]) -> None:
    """Raise a `ValueError` if a row has nothing of these kinds in a column that is read."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(name), tuple(kinds)):
            wanted = " or ".join(kinds.values())
            raise ValueError(f"Row {number} of the dataset has {row.get(name)!r:.50} as {name!r}: give {wanted}.")


def _pieces(texts: Iterable[str], tokenizer: Any, seqlen: int) -> list[dict[str, list[int]]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: a text longer than the model's context is no mistake here.
    ids = (tokenizer(text, verbose=False)["input_ids"] for text in texts)
    tokens = list(chain.from_iterable([*row, *([] if row[-1:] == end else end)] for row in ids))
    return [_learned(tokens[start : start + seqlen]) for start in range(0, len(tokens) - seqlen + 1, seqlen)]


def _completion(prompt: Any, completion: Any, tokenizer: Any) -> dict[str, list[int]]:
    if isinstance(prompt, str):
        before = tokenizer(prompt, verbose=False)["input_ids"]
        bare = tokenizer(prompt, verbose=False, add_special_tokens=False)["input_ids"]
        if before[-1:] == [tokenizer.eos_token_id] != bare[-1:]:  # which some tokenizers put behind each text
            before = before[:-1]
        answer = tokenizer(completion, verbose=False, add_special_tokens=False)["input_ids"]
        whole = [*before, *answer, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    else:
        before = _conversation(prompt, tokenizer, add_generation_prompt=True)
        whole = _conversation([*prompt, *completion], tokenizer)
        if whole[: len(before)] != before:
            raise ValueError(
                "The chat template writes a prompt in another way when an answer follows, so it cannot be told what "
                "to learn: give the whole conversation as 'messages', or strings."
            )
    return {"input_ids": whole, "labels": [IGNORED] * len(before) + whole[len(before) :]}


def _conversation(messages: Any, tokenizer: Any, **options: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The dataset holds conversations, but the tokenizer has no chat template: give it one, or text."
        )
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _learned(tokens: list[int]) -> dict[str, list[int]]:
    return {"input_ids": tokens, "labels": list(tokens)}


@dataclass(frozen=True)
class PadRight:
    """Makes a batch of examples, padded at the right end.

    Attributes:
        token: Id to pad with; no label, and masked.
    """

    token: int

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `attention_mask`, each `[examples, tokens]` int64."""
        longest = max(len(example["input_ids"]) for example in examples)
        fills = {"input_ids": self.token, "labels": IGNORED}
        batch = {
            name: torch.tensor([[*example[name], *[fill] * (longest - len(example[name]))] for example in examples])
            for name, fill in fills.items()
        }
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch
