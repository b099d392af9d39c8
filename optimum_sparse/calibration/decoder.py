"""Inputs for the decoder of an encoder-decoder model, where the calibration data have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .interface import input_names, is_encoder_decoder

# What the record says of them.
SHIFTED = "the windows themselves, shifted right"
# What stands in labels where there is none.
NO_LABEL = -100
# What token dicts may hold for the decoder.
DECODER_TOKENS = ("labels", "decoder_input_ids", "decoder_attention_mask")


def add_decoder_inputs(model: nn.Module, batches: list[dict[str, Any]]) -> bool:
    """Let the decoder read the tokens of the encoder, shifted right, in batches that hold nothing for the decoder.

    Args:
        model: Nothing is done unless it is an encoder-decoder model whose forward takes `decoder_input_ids`.
        batches: Changed in place.

    Returns:
        Whether anything was added.

    Raises:
        ValueError: A batch has neither inputs for the decoder nor tokens, or the model does not tell the first token.
    """
    names = input_names(model)
    if not is_encoder_decoder(model) or "decoder_input_ids" not in names:
        return False
    added = False
    for index, batch in enumerate(batches):
        if any(batch.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels")):
            continue
        if batch.get("input_ids") is None:
            raise ValueError(
                f"Batch {index} of the calibration data holds nothing for the decoder of {type(model).__name__}, only "
                f"[{', '.join(batch)}]: add 'labels' or 'decoder_input_ids'; from a processor, add the 'text' that "
                "belongs to each item."
            )
        batch["decoder_input_ids"] = _shifted(model, batch["input_ids"])
        if batch.get("attention_mask") is not None and "decoder_attention_mask" in names:
            batch["decoder_attention_mask"] = batch["attention_mask"]  # what is padding there is padding here
        added = True
    return added


def _shifted(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Token ids `[rows, tokens]` in the form in which the model's decoder reads what it should predict."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=ids)  # type: ignore[operator]
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(model).__name__} has no config.decoder_start_token_id to begin the decoder's inputs with: set it, "
            "or give batches with 'decoder_input_ids'."
        )
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
