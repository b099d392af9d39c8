"""Perplexity by the protocol of the SparseGPT and Wanda papers, alone or beside that of a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from tqdm import tqdm

from ..calibration.batches import check_vocabulary
from ..calibration.interface import is_encoder_decoder, longest_input, vocabulary_size
from ..offload import execution_device
from .intervals import interval

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
        interval: Its 95 % confidence interval, if the windows are a random sample; `None` for fewer than four.
    """

    value: float
    num_windows: int
    seqlen: int
    num_tokens: int
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.num_windows} windows of {self.seqlen} tokens)"


@dataclass(frozen=True)
class Comparison:
    """A model and the dense one that it was made from, on the same windows.

    Intervals are of 95 % confidence and come from what is found in each window. That of the ratio is much narrower
    than those of the two perplexities: what is hard for one model is hard for the other.

    Attributes:
        model: Perplexity of the model.
        baseline: Perplexity of the dense model.
        ratio: The first over the second.
        ratio_interval: Its interval.
        kl: Kullback-Leibler divergence of the model's predictions from the dense ones, mean over tokens, in nats.
        kl_interval: Its interval.
        top1_agreement: Share of tokens for which both find the same token likeliest.
        top1_interval: Its interval.
    """

    model: Perplexity
    baseline: Perplexity
    ratio: float
    ratio_interval: tuple[float, float] | None
    kl: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float
    top1_interval: tuple[float, float] | None


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
    (losses,) = _measure([model], input_ids, seqlen, num_windows, batch_size, progress)
    return _perplexity(losses, seqlen)


def compare(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    input_ids: torch.Tensor,
    seqlen: int,
    num_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Comparison:
    """A model against the dense one that it was made from, on the windows of `perplexity`.

    Args:
        model: A causal language model in eval mode.
        baseline: The dense model, in eval mode, with the same vocabulary.
        input_ids: As for `perplexity`.
        seqlen: Tokens per window.
        num_windows: How many windows, from the start (default: all).
        batch_size: Windows per forward.
        progress: Show a progress bar.

    Raises:
        ValueError: As for `perplexity`, or the vocabularies are not the same.
    """
    own, dense, kl, agreement = _measure([model, baseline], input_ids, seqlen, num_windows, batch_size, progress)
    return Comparison(
        model=_perplexity(own, seqlen),
        baseline=_perplexity(dense, seqlen),
        ratio=_exp((own - dense).mean().item()),
        ratio_interval=_exp_interval(own - dense),
        kl=kl.mean().item(),
        kl_interval=interval(kl),
        top1_agreement=agreement.mean().item(),
        top1_interval=interval(agreement),
    )


def _measure(
    models: Sequence[PreTrainedModel],
    input_ids: torch.Tensor,
    seqlen: int,
    num_windows: int | None,
    batch_size: int,
    progress: bool,
) -> torch.Tensor:
    """What `_figures` are in each window, as means over the predicted tokens: `[figures, windows]` float64."""
    _check(models, input_ids, seqlen, batch_size)
    available = input_ids.numel() // seqlen
    if num_windows is None:
        num_windows = max(available, 1)
    if not 1 <= num_windows <= available:
        raise ValueError(
            f"{num_windows} windows of {seqlen} tokens were asked for, but a text of {input_ids.numel()} tokens has "
            f"{available}: give a longer text, fewer windows (at least 1) or a smaller seqlen."
        )
    windows = input_ids[: num_windows * seqlen].view(num_windows, seqlen)
    found: list[torch.Tensor] = []
    with torch.no_grad(), tqdm(total=num_windows, desc="perplexity", unit="window", disable=not progress) as bar:
        for batch in windows.split(batch_size):
            logits = [model(input_ids=batch.to(execution_device(model)), use_cache=False).logits for model in models]
            found += map(_figures, batch, *logits)
            bar.update(len(batch))
    return torch.stack(found, dim=1) / (seqlen - 1)


def _figures(window: torch.Tensor, *logits: torch.Tensor) -> torch.Tensor:
    """Sums over the predicted tokens of one window.

    Args:
        window: `[seqlen]`.
        *logits: Of the model, and of the dense one if there is one, `[seqlen, vocabulary]`.

    Returns:
        The negative log-likelihood of each model; with two of them the divergence and the number of tokens for which
        they agree, too: `[figures]` float64, on the CPU.
    """
    own, *dense = logits
    if dense and dense[0].shape != own.shape:
        raise ValueError(
            f"The model has {own.shape[-1]} tokens in its vocabulary and the baseline {dense[0].shape[-1]}: the "
            "baseline must be the dense model that it was made from."
        )
    # In chunks: a whole window in fp32, with its softmax, is the largest tensor of an evaluation by far.
    total = torch.zeros(4 if dense else 1, dtype=torch.float64)
    for targets, *parts in zip(window[1:].split(CHUNK), *(each[:-1].split(CHUNK) for each in logits), strict=True):
        predictions = [functional.log_softmax(part.to(own.device).float(), dim=-1) for part in parts]
        figures = [functional.nll_loss(each, targets.to(own.device), reduction="sum") for each in predictions]
        if dense:
            prediction, truth = predictions
            figures.append(functional.kl_div(prediction, truth, reduction="sum", log_target=True))
            figures.append((prediction.argmax(-1) == truth.argmax(-1)).sum())
        total += torch.stack(figures).double().cpu()
    return total


def _perplexity(losses: torch.Tensor, seqlen: int) -> Perplexity:
    """Of the mean loss in each window, `[windows]`."""
    count = len(losses)
    return Perplexity(_exp(losses.mean().item()), count, seqlen, count * (seqlen - 1), _exp_interval(losses))


def _exp_interval(logarithms: torch.Tensor) -> tuple[float, float] | None:
    bounds = interval(logarithms)
    return None if bounds is None else (_exp(bounds[0]), _exp(bounds[1]))


def _exp(logarithm: float) -> float:
    """Torch's exp: a broken model gives inf or nan, where math.exp would raise."""
    return torch.tensor(logarithm, dtype=torch.float64).exp().item()


def _check(models: Sequence[PreTrainedModel], input_ids: torch.Tensor, seqlen: int, batch_size: int) -> None:
    for model in models:
        if model.training:
            raise ValueError(
                "The model is in training mode, where dropout changes its outputs: call model.eval() first."
            )
        if is_encoder_decoder(model) or not model.can_generate():
            raise ValueError(
                f"A perplexity is that of a model that predicts the next token, got {type(model).__name__}: load it "
                "with AutoModelForCausalLM if it is one."
            )
        longest = longest_input(model)
        if longest is not None and seqlen > longest:
            raise ValueError(
                f"seqlen is {seqlen}, and {type(model).__name__} has {longest} positions: give at most that."
            )
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 1:
        shape = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(
            f"input_ids must be a tensor of shape [tokens], the whole text in one row, got {shape}: "
            "windows are cut here, so flatten it."
        )
    for model in models:
        check_vocabulary(input_ids, vocabulary_size(model))
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, got {seqlen}: the first token of a window is not predicted.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
