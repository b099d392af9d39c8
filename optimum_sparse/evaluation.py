"""Perplexity by the protocol of the SparseGPT and Wanda papers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions whose logits are in fp32 at the same time: 50 MB for a vocabulary of 49,152, and large enough to be fast.
CHUNK = 256


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with what it depends on; figures from other windows or another seqlen cannot be compared.

    Attributes:
        value: exp of the mean negative log-likelihood per predicted token.
        num_windows: Windows evaluated.
        seqlen: Tokens in each window.
        num_tokens: Tokens predicted: all but the first of each window.
    """

    value: float
    num_windows: int
    seqlen: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.num_windows} windows of {self.seqlen} tokens)"


def perplexity(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    seqlen: int,
    num_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a causal language model on one long text.

    The text is cut into windows of `seqlen` tokens without overlap and a shorter rest is dropped. In each window the
    first token is context only and the other `seqlen - 1` are predicted. The papers average the means of the windows;
    all windows being equally long, that is the mean over all predicted tokens. Log-likelihoods are computed in fp32
    from the logits in the dtype of the model, and summed in double precision.

    Args:
        model: A causal language model in eval mode.
        input_ids: `[tokens]` int64, the whole text tokenised once.
        seqlen: Tokens per window.
        num_windows: How many windows, from the start (default: all).
        batch_size: Windows per forward; changes the memory needed, and the value by rounding only.
        progress: Show a progress bar.

    Raises:
        ValueError: The text is too short, an argument is out of range, or the model is in training mode.
    """
    _check(model, input_ids, seqlen, batch_size)
    available = input_ids.numel() // seqlen
    if num_windows is None:
        num_windows = max(available, 1)
    if not 1 <= num_windows <= available:
        raise ValueError(
            f"{num_windows} windows of {seqlen} tokens were asked for, but a text of {input_ids.numel()} tokens has "
            f"{available}: give a longer text, fewer windows (at least 1) or a smaller seqlen."
        )
    windows = input_ids[: num_windows * seqlen].view(num_windows, seqlen)
    total = 0.0
    with torch.no_grad(), tqdm(total=num_windows, desc="perplexity", unit="window", disable=not progress) as bar:
        for batch in windows.split(batch_size):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            total += sum(map(_negative_log_likelihood, logits, batch))
            bar.update(len(batch))
    num_tokens = num_windows * (seqlen - 1)
    # torch's exp: a broken model gives inf or nan, where math.exp would raise.
    value = torch.tensor(total / num_tokens, dtype=torch.float64).exp().item()
    return Perplexity(value=value, num_windows=num_windows, seqlen=seqlen, num_tokens=num_tokens)


def _negative_log_likelihood(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Sum over the predicted tokens of one window; logits `[seqlen, vocabulary]`, window `[seqlen]`."""
    # In chunks: a whole window in fp32, with its softmax, is the largest tensor of an evaluation by far.
    total = 0.0
    for part, targets in zip(logits[:-1].split(CHUNK), window[1:].split(CHUNK), strict=True):
        total += functional.cross_entropy(part.float(), targets.to(part.device), reduction="sum").item()
    return total


def _check(model: PreTrainedModel, input_ids: torch.Tensor, seqlen: int, batch_size: int) -> None:
    if model.training:
        raise ValueError("The model is in training mode, where dropout changes its outputs: call model.eval() first.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 1:
        shape = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(
            f"input_ids must be a tensor of shape [tokens], the whole text in one row, got {shape}: "
            "windows are cut here, so flatten it."
        )
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, got {seqlen}: the first token of a window is not predicted.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


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
    # verbose=False: a text longer than the model's context is no mistake here.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
