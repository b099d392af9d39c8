"""Calibration data: from a dataset's name, texts, tokens or nothing at all to batches of model inputs."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SparseConfig
from .batches import Row, check_vocabulary, given_batches, stack_rows, token_rows
from .generation import TEMPERATURE, TOP_P, first_tokens, generate_windows
from .packing import document_windows, packed_windows, tokenize
from .sources import Source, open_source

logger = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048
PREFIX_TOKENS = 8
BATCH_TOKENS_CPU = 2048
BATCH_TOKENS_ACCELERATOR = 16384


@dataclass(frozen=True)
class Calibration:
    """Batches to run through the model, and where they came from.

    Attributes:
        batches: Dicts of model inputs on the CPU: `input_ids` `[rows, tokens]` int64, and `attention_mask` of the same
            shape only where the user gave one. Batches of a DataLoader are what the user made them.
        record: Pure JSON: "dataset" (a description), "num_samples" (rows), "seqlen" (tokens of the longest row),
            "num_tokens" (all of them, without padding), "seed", "sha256" (of all `input_ids` in order), and for "self"
            also "generation" (how the text was sampled).
    """

    batches: list[dict[str, Any]]
    record: dict[str, Any]


def load_calibration(
    config: SparseConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: Any = None,
) -> Calibration:
    """Get the calibration batches for a model. Same arguments, same bits; no global random state is touched.

    Documents are tokenised, joined with EOS and cut into windows of `seqlen` tokens; `config.pack_documents=False`
    cuts one window from each long document instead. What is tokens already is taken as it is, in order, up to
    `num_samples` rows. If there are fewer than `num_samples`, a warning says so and the record has the true number.

    Args:
        config: `dataset`, `num_samples`, `seqlen`, `batch_size`, `pack_documents` and `seed` are used.
        model: Tells the longest window, the vocabulary and the device, and generates the text of "self".
        tokenizer: Needed if the data are text; not for "self" alone.
        dataset: Used instead of `config.dataset` if given. One of

            - "c4", "wikitext2", or a Hub id `path[:config[:split[:column]]]`; streamed, except WikiText;
            - a `.txt` file (one document), or a `.jsonl` or `.parquet` file, with `:column` at the end if needed;
            - "self": text that the model generates from BOS (from random tokens if it has none), or "self:FILE": from
              short pieces of a text;
            - a list of strings, one document each;
            - a dict with `input_ids` and optionally `attention_mask`, of one sequence or of several, or a list of such
              dicts (other keys are ignored);
            - a `datasets.Dataset` (read whole) or `IterableDataset` (read as far as needed) with `input_ids` or text;
            - a DataLoader or another iterable of dicts of model inputs, which are passed on unchanged.

    Raises:
        ValueError: The data are empty, malformed or too short, the tokenizer is missing or is that of another model,
            or `seqlen` is longer than the model supports.
        TypeError: The data are of an unsupported type.
        OSError: A file or Hub dataset cannot be read; for the Hub, the message names what works offline.
    """
    longest = _longest_input(model)
    seqlen = _resolve_seqlen(config.seqlen, longest)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    source = open_source(config.dataset if dataset is None else dataset, config.seed)
    if source.kind == "batches":
        batches = given_batches(source.items, config.num_samples)
    else:
        rows: Iterable[Row]
        if source.kind == "tokens":
            rows = itertools.islice(token_rows(source.items), config.num_samples)
        else:
            windows = _windows(source, config, model, tokenizer, seqlen, vocabulary)
            rows = zip(windows, itertools.repeat(None))
        on_cpu = model.device.type in ("cpu", "meta")  # "meta": offloaded
        batches = stack_rows(rows, config.batch_size, BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS_ACCELERATOR)
    if not batches:
        raise ValueError(f"The calibration data ({source.description}) hold no rows.")
    for batch in batches:
        check_vocabulary(batch["input_ids"], vocabulary)
    record = _describe(batches) | {"dataset": source.description, "seed": config.seed}
    if source.kind == "self":
        record["generation"] = {"temperature": TEMPERATURE, "top_p": TOP_P}
    if longest is not None and record["seqlen"] > longest:
        raise ValueError(
            f"A row of the calibration data has {record['seqlen']} tokens, but the model supports {longest}: give "
            "shorter rows."
        )
    if record["num_samples"] < config.num_samples:
        logger.warning(
            "Calibrating on %d samples instead of num_samples=%d: %s holds no more.",
            record["num_samples"],
            config.num_samples,
            source.description,
        )
    return Calibration(batches, record)


def _windows(
    source: Source,
    config: SparseConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    vocabulary: int,
) -> torch.Tensor:
    """Windows `[n, seqlen]` of the text of `source`, or of the model's own text."""
    generator = torch.Generator().manual_seed(config.seed)
    if source.kind == "self" and not source.items:
        prefixes = first_tokens(model, config.num_samples, generator)
        return generate_windows(model, prefixes, seqlen, config.seed)
    if tokenizer is None:
        raise ValueError(
            f"The calibration data ({source.description}) are text, which needs a tokenizer: pass that of the model, "
            "or give token dicts or dataset='self' instead."
        )
    documents = tokenize(source.items, tokenizer)
    wanted = (config.num_samples, generator, source.streaming)
    if source.kind == "self":
        prefixes = packed_windows(documents, PREFIX_TOKENS, *wanted, separator=tokenizer.eos_token_id)
        check_vocabulary(prefixes, vocabulary)
        return generate_windows(model, prefixes, seqlen, config.seed)
    if config.pack_documents:
        return packed_windows(documents, seqlen, *wanted, separator=tokenizer.eos_token_id)
    return document_windows(documents, seqlen, *wanted)


def _longest_input(model: PreTrainedModel) -> int | None:
    """The number of tokens that the model's configuration allows, or `None` if it does not say."""
    text_config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _resolve_seqlen(asked: int | None, longest: int | None) -> int:
    if asked is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if longest is not None and asked > longest:
        raise ValueError(f"seqlen={asked} is longer than the {longest} tokens that the model supports: lower seqlen.")
    return asked


def _describe(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of the record that is counted from the batches themselves."""
    num_tokens, digest = 0, hashlib.sha256()
    for batch in batches:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        # A mask of another shape (4-D) says who attends to whom, not what is padding.
        num_tokens += int(mask.sum()) if mask is not None and mask.shape == ids.shape else ids.numel()
        digest.update(ids.to("cpu", torch.int64).numpy().tobytes())
    return {
        "num_samples": sum(len(batch["input_ids"]) for batch in batches),
        "seqlen": max(batch["input_ids"].shape[1] for batch in batches),
        "num_tokens": num_tokens,
        "sha256": digest.hexdigest(),
    }
