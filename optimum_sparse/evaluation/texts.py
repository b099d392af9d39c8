"""The texts that the papers evaluate on, and any other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..calibration.sources import open_source

# Of C4 the papers read so many documents, and evaluate so many windows of them.
DOCUMENTS, WINDOWS = 1_100, 256


@dataclass(frozen=True)
class Text:
    """A text to evaluate on.

    Attributes:
        name: What records call it; no path.
        input_ids: `[tokens]` int64, tokenised in one piece.
        num_windows: How many windows the papers take of it; `None` for all.
    """

    name: str
    input_ids: torch.Tensor
    num_windows: int | None = None


def load_text(source: str, tokenizer: Any) -> Text:
    """Read and tokenise a text.

    Args:
        source: `"wikitext2"`, `"c4"` or `"ptb"`, which are read from the Hub as the papers do; a `.raw` file of
            WikiText; or a `.txt`, `.jsonl` or `.parquet` file or Hub dataset as for calibration, whose documents are
            joined with spaces, as those of C4 are.
        tokenizer: Its special tokens are added once, at the start or end of the whole text.

    Raises:
        ValueError: There is no text in the source.
        OSError: There is no such file, or the Hub cannot be read.
    """
    if source == "wikitext2":
        rows = _hub("Salesforce/wikitext", "text", name="wikitext-2-raw-v1", split="test")
        return Text(source, wikitext_tokens(rows, tokenizer))
    if source == "c4":
        file = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        documents = islice(_hub("allenai/c4", "text", data_files=file, split="validation", streaming=True), DOCUMENTS)
        return Text(source, _tokens(" ".join(documents), tokenizer), WINDOWS)
    if source == "ptb":
        # The dataset itself is code, which `datasets` does not run: this is what the Hub has converted it to.
        converted = {"revision": "refs/convert/parquet", "data_files": {"test": "penn_treebank/test/0000.parquet"}}
        sentences = _hub("ptb-text-only/ptb_text_only", "sentence", split="test", **converted)
        return Text(source, _tokens(" ".join(sentences), tokenizer))
    if Path(source).suffix == ".raw":
        return Text(Path(source).name, wikitext_tokens(source, tokenizer))
    found = open_source(source, seed=0)
    if found.kind != "texts":
        raise ValueError(f"{source} holds {found.kind}, but a text to evaluate on is needed.")
    documents = islice(found.items, DOCUMENTS if found.streaming else None)
    return Text(found.description, _tokens(" ".join(documents), tokenizer))


def wikitext_tokens(source: str | os.PathLike[str] | Iterable[str], tokenizer: Any) -> torch.Tensor:
    r"""Tokenise WikiText as the papers do: rows joined with two newlines, in one piece.

    A row of the dataset is a line of the file with its newline, and a blank line is the empty row.

    Args:
        source: Path of a raw WikiText file, or the rows (the `"text"` column of the dataset).
        tokenizer: Its special tokens are added once, at the start or end of the whole text.

    Returns:
        `[tokens]` int64.

    Raises:
        ValueError: There is no text in the source.
    """
    if isinstance(source, (str, os.PathLike)):
        # newline="\n": the text may contain other characters at which str.splitlines would split.
        with open(source, encoding="utf-8", newline="\n") as file:
            rows = list(file)
    else:
        rows = list(source)
    text = "\n\n".join(row if row.strip() else "" for row in rows)
    if not text.strip():
        raise ValueError(f"The source has {len(rows)} rows and no text: give a raw WikiText file or its rows.")
    return _tokens(text, tokenizer)


def _tokens(text: str, tokenizer: Any) -> torch.Tensor:
    # verbose=False: a text longer than the model's context is no mistake here.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _hub(path: str, column: str, **options: Any) -> Iterator[str]:
    """The rows of a column of a Hub dataset."""
    from datasets import load_dataset
    from huggingface_hub.utils import httpx

    try:
        for row in load_dataset(path, **options):
            yield row[column]
    except (OSError, httpx.RequestError) as error:
        raise OSError(
            f"Cannot read {path} from the Hub ({type(error).__name__}: {error}). Check the connection, or evaluate on "
            "a local file: the .raw file of WikiText-2, or any .txt, .jsonl or .parquet file."
        ) from error
