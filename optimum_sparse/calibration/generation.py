"""Calibration data without data: text that the dense model itself generates."""

from __future__ import annotations

import logging

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from .interface import is_encoder_decoder

logger = logging.getLogger(__name__)

# The plain distribution of the model without its long tail; the settings that the model's authors chose for chatting
# (low temperature, repetition penalty) would narrow what the activations cover.
TEMPERATURE = 1.0
TOP_P = 0.95
# Bounds the KV cache: 16 windows of 2,048 tokens at a time. Fixed, because the batch size changes the text.
TOKENS_AT_ONCE = 32_768


def check_can_generate(model: nn.Module) -> None:
    """Make sure that a model can write its own calibration text.

    Raises:
        ValueError: It is no decoder-only language model, or is in training mode.
    """
    can_generate = getattr(model, "can_generate", None)
    if is_encoder_decoder(model) or can_generate is None or not can_generate():
        raise ValueError(
            f"dataset='self' needs a decoder-only model that can generate text, got {type(model).__name__}: load it "
            "with AutoModelForCausalLM if it is one, else give texts, token dicts or batches of its inputs."
        )
    if model.training:
        raise ValueError("dataset='self' needs the model without dropout: call model.eval() first.")


def first_tokens(model: PreTrainedModel, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """What to generate from when there is no text: BOS, or random tokens that are not special if there is no BOS.

    Returns:
        `[num_samples, 1]` int64.
    """
    if bos := _special_ids(model, "bos_token_id"):
        return torch.full((num_samples, 1), bos[0], dtype=torch.int64)
    special = {*_special_ids(model, "eos_token_id"), *_special_ids(model, "pad_token_id")}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    return ordinary[torch.randint(len(ordinary), (num_samples, 1), generator=generator)]


def _special_ids(model: PreTrainedModel, name: str) -> list[int]:
    ids: list[int] = []
    for settings in (getattr(model, "generation_config", None), model.config.get_text_config()):
        value = getattr(settings, name, None)
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return ids


class _Counter(BaseStreamer):
    """Shows on a bar which tokens have been generated."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # one token of each window; what they are generated from has two dimensions
            self._bar.update(len(value))

    def end(self) -> None:
        pass


def generate_windows(
    model: PreTrainedModel, prefixes: torch.Tensor, seqlen: int, seed: int, progress: bool = False
) -> torch.Tensor:
    """Let the model continue each prefix up to `seqlen` tokens, by sampling.

    The global random state is left as it was.

    Args:
        model: One that passed `check_can_generate`, on any device.
        prefixes: `[n, p]` int64 with p < seqlen.
        seqlen: Tokens per window, prefix included; a window does not end early at EOS.
        seed: Of the sampling.
        progress: Show a progress bar.

    Returns:
        `[n, seqlen]` int64 on the CPU.

    Raises:
        ValueError: `seqlen` leaves nothing to generate.
    """
    num_new = seqlen - prefixes.shape[1]
    if num_new < 1:
        raise ValueError(f"dataset='self' needs seqlen to be at least {prefixes.shape[1] + 1} here, got {seqlen}.")
    authors = model.generation_config
    settings = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=num_new,
        max_new_tokens=num_new,
        pad_token_id=0,  # never used, as all rows have one length; without it, generate() warns
        use_cache=True,
        eos_token_id=authors.eos_token_id,
    )
    # Parameters on "meta" are offloaded; their hooks take inputs from the CPU to where they are needed.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    accelerator = torch.accelerator.current_accelerator()
    logger.info("Generating %d windows of %d tokens with the model itself.", len(prefixes), seqlen)
    windows = []
    with (
        torch.random.fork_rng(
            devices=range(torch.accelerator.device_count()), device_type=accelerator.type if accelerator else "cuda"
        ),
        tqdm(
            desc="Generating text to calibrate on",
            total=len(prefixes) * num_new,
            unit="token",
            leave=False,
            disable=not progress,
        ) as bar,
    ):
        torch.manual_seed(seed)
        try:
            model.generation_config = settings  # `generate` would fill what is left open with what the authors chose
            for rows in prefixes.to(device).split(max(1, TOKENS_AT_ONCE // seqlen)):
                counter = _Counter(bar) if progress else None  # it takes every token to the CPU
                text = model.generate(rows, attention_mask=torch.ones_like(rows), streamer=counter)
                windows.append(text.cpu())
        finally:
            model.generation_config = authors
    return torch.cat(windows)
