"""From texts to windows: every row has exactly `seqlen` tokens, none of them padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerBase


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each document, with the tokenizer's own special tokens; blank documents are left out."""
    for text in texts:
        if text.strip():
            # verbose=False: a document longer than the model's context is welcome, no reason to warn.
            yield tokenizer(text, verbose=False)["input_ids"]


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What to put between documents: EOS, or [SEP] for a tokenizer without one, as those of encoders."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def packed_windows(
    documents: Iterable[list[int]],
    seqlen: int,
    num_samples: int,
    generator: torch.Generator,
    streaming: bool = False,
    separator: int | None = None,
) -> torch.Tensor:
    """Join documents and cut them into windows that do not overlap.

    Args:
        documents: Token ids of each document.
        seqlen: Tokens per window.
        num_samples: Number of windows wanted; of more, a random choice is kept, in order.
        generator: Of that choice.
        streaming: The documents come in random order: stop as soon as there are enough tokens.
        separator: Put between two documents unless the first ends with it already.

    Returns:
        `[n, seqlen]` int64 with 1 <= n <= num_samples.

    Raises:
        ValueError: There is not even one window.
    """
    tokens = array("q")
    for document in documents:
        if tokens and separator is not None and tokens[-1] != separator:
            tokens.append(separator)
        tokens.extend(document)
        if streaming and len(tokens) >= num_samples * seqlen:
            del tokens[num_samples * seqlen :]
            break
    if not tokens:
        raise ValueError("The calibration data hold no text: every document is blank.")
    if len(tokens) < seqlen:
        raise ValueError(
            f"The calibration data hold {len(tokens)} tokens, less than one window of {seqlen}: give more text, or "
            f"set seqlen to at most {len(tokens)}."
        )
    count = len(tokens) // seqlen
    windows = torch.frombuffer(tokens, dtype=torch.int64)[: count * seqlen].view(count, seqlen)
    return _choose(windows, num_samples, generator)


def document_windows(
    documents: Iterable[list[int]],
    seqlen: int,
    num_samples: int,
    generator: torch.Generator,
    streaming: bool = False,
) -> torch.Tensor:
    """Cut one window at a random place from each document longer than `seqlen`, as the papers do.

    Args:
        documents: Token ids of each document.
        seqlen: Tokens per window.
        num_samples: Number of windows needed; of more, a random choice is kept, in order.
        generator: Of places and choice.
        streaming: The documents come in random order: stop as soon as there are enough windows.

    Returns:
        `[num_samples, seqlen]` int64.

    Raises:
        ValueError: Too few documents are long enough.
    """
    windows, seen = [], 0
    for document in documents:
        seen += 1
        if len(document) > seqlen:
            start = int(torch.randint(len(document) - seqlen + 1, (), generator=generator))
            windows.append(document[start : start + seqlen])
            if streaming and len(windows) == num_samples:
                break
    if len(windows) < num_samples:
        raise ValueError(
            f"{len(windows)} of {seen} documents are longer than seqlen={seqlen} tokens, but pack_documents=False "
            f"needs num_samples={num_samples} of them: give more or longer documents, lower seqlen or num_samples, or "
            "pack the documents."
        )
    return _choose(torch.tensor(windows, dtype=torch.int64), num_samples, generator)


def _choose(windows: torch.Tensor, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    if len(windows) <= num_samples:
        return windows
    return windows[torch.randperm(len(windows), generator=generator)[:num_samples].sort().values]
