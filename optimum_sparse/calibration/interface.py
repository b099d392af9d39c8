"""What the forward of a model takes; any `nn.Module` will do, and one of Transformers tells more about itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def input_names(model: nn.Module) -> list[str]:
    """The named arguments of the model's forward."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind not in several]


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument with which the model's forward keeps nothing of its tokens for those to come, if it may do so."""
    parameters = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    takes_others = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    of_transformers = hasattr(config, "get_text_config") and hasattr(config.get_text_config(), "use_cache")
    may = "use_cache" in parameters or (takes_others and of_transformers)
    return {"use_cache": False} if may else {}


def check_takes_tokens(model: nn.Module, description: str) -> None:
    """Make sure that the model can be run on text or tokens, here those of `description`.

    Raises:
        ValueError: Its forward takes other things only.
    """
    names = input_names(model)
    if names and "input_ids" not in names:
        raise ValueError(
            f"{type(model).__name__} takes {names[0]} and no input_ids, so it cannot be calibrated on text or tokens "
            f"({description}): give batches of its own inputs, as a DataLoader or a list of dicts, or a list of dicts "
            "for its processor ({'images': ...} or {'audio': ..., 'sampling_rate': ..., 'text': ...}) and that "
            "processor in place of a tokenizer."
        )


def main_input(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The tensor whose first dimension counts the rows of a batch, or `None` if there is none.

    It is what the model calls its main input or the embeddings of that, else the first tensor that is not a mask.
    """
    for name in (getattr(model, "main_input_name", "input_ids"), "inputs_embeds", *batch):
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.ndim > 0 and not name.endswith("mask"):
            return value
    return None


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model has embeddings for, or `None` if that is not known."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    # Models of images or sound call their first convolution so, too.
    return embeddings.weight.shape[0] if isinstance(embeddings, nn.Embedding) else None


def longest_input(model: nn.Module) -> int | None:
    """The number of tokens that the model has positions for, or `None` if it does not say."""
    for name, module in model.named_modules():
        is_table = name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            # RoBERTa and its kin: positions are counted from behind that of padding.
            return module.num_embeddings - module.padding_idx - 1
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
