"""Calibration data: from a dataset's name, texts, tokens or nothing at all to batches of model inputs."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from ..config import SparseConfig
from ..offload import execution_device
from .batches import Row, check_vocabulary, given_batches, stack_rows, token_rows
from .decoder import DECODER_TOKENS, NO_LABEL, SHIFTED, add_decoder_inputs
from .generation import TEMPERATURE, TOP_P, check_can_generate, first_tokens, generate_windows
from .interface import check_takes_tokens, is_encoder_decoder, longest_input, main_input, vocabulary_size
from .packing import document_windows, packed_windows, separator_id, tokenize
from .processing import is_processor, process
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
            shape only where the user gave one. Batches of a DataLoader are what the user made them, those of a
            processor what it returned.
        record: Pure JSON: "dataset" (a description), "num_samples" (rows), "seqlen" (tokens of the longest row) and
            "num_tokens" (all of them, without padding), both `None` if there are no `input_ids`, "seed", "sha256" (of
            the main inputs of all batches in order: `input_ids` and the like as int64, images and sound as fp32), for
            "self" also "generation" (how the text was sampled), and "decoder" if its inputs were made here: from what.
    """

    batches: list[dict[str, Any]]
    record: dict[str, Any]


def load_calibration(
    config: SparseConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin | FeatureExtractionMixin | None = None,
    dataset: Any = None,
    progress: bool = False,
) -> Calibration:
    """Get the calibration batches for a model. Same arguments, same bits; no global random state is touched.

    Documents are tokenised, joined with EOS (or [SEP]) and cut into windows of `seqlen` tokens;
    `config.pack_documents=False` cuts one window from each long document instead. What is tokens already is taken as
    it is, in order, up to `num_samples` rows. If there are fewer than `num_samples`, a warning says so and the record
    has the true number.

    The decoder of an encoder-decoder model needs inputs of its own. Where the data have none, it gets the tokens of
    the encoder, shifted right, and the record says so.

    Args:
        config: `dataset`, `num_samples`, `seqlen`, `batch_size`, `pack_documents` and `seed` are used.
        model: Of Transformers or not. Tells the longest window, the vocabulary, its main input and the device as far
            as it knows, and generates the text of "self".
        tokenizer: Needed if the data are text; not for "self" alone. A processor does as well, with the tokenizer in
            it, and is needed if the data are images, sound, or these with text.
        dataset: Used instead of `config.dataset` if given. One of

            - "c4", "wikitext2", or a Hub id `path[:config[:split[:column]]]`; streamed, except WikiText;
            - a `.txt` file (one document), or a `.jsonl` or `.parquet` file, with `:column` at the end if needed;
            - "self": text that a decoder-only model generates from BOS (from random tokens if it has none), or
              "self:FILE": from short pieces of a text;
            - a list of strings, one document each;
            - a dict with `input_ids` and optionally `attention_mask`, of one sequence or of several, or a list of such
              dicts; for encoder-decoder models also with `labels` or `decoder_input_ids`; other keys are ignored;
            - a `datasets.Dataset` (read whole) or `IterableDataset` (read as far as needed) with `input_ids` or text;
            - a dict of arguments for the processor's call, a list of such dicts, or a dataset with such columns: for
              image processors `{"images": image}`, for others also `{"text": ..., "images": ...}` or
              `{"audio": array, "sampling_rate": ..., "text": ...}`, as the processor names them. Each makes one batch,
              with floating-point numbers in the type of the model's;
            - a DataLoader or another iterable of dicts of model inputs, with whatever the forward takes, or a list of
              dicts with tensors of other things than tokens; they are passed on unchanged.
        progress: Show a progress bar while the model generates text, which takes longest.

    Raises:
        ValueError: The data are empty, malformed, too short or not for this model, the tokenizer is missing or is that
            of another model, the processor refuses an item, or `seqlen` is longer than the model supports.
        TypeError: The data are of an unsupported type.
        OSError: A file or Hub dataset cannot be read; for the Hub, the message names what works offline.
    """
    longest = longest_input(model)
    seqlen = _resolve_seqlen(config.seqlen, longest)
    vocabulary = vocabulary_size(model)
    processor = tokenizer if is_processor(tokenizer) else None
    source = open_source(config.dataset if dataset is None else dataset, config.seed, processor)
    batches = _batches(source, config, model, tokenizer, seqlen, vocabulary, progress)
    if not batches:
        raise ValueError(f"The calibration data ({source.description}) hold no rows.")
    for batch in batches:
        # Beside images or sound, some ids may stand for these and have no embedding.
        if batch.get("input_ids") is not None and not any(map(_is_floating, batch.values())):
            check_vocabulary(batch["input_ids"], vocabulary)
        for name in DECODER_TOKENS[:2] if is_encoder_decoder(model) else ():
            ids = batch.get(name)
            if isinstance(ids, torch.Tensor) and ids.ndim == 2 and not _is_floating(ids):
                check_vocabulary(ids[ids != NO_LABEL], vocabulary)
    record = _describe(batches, model) | {"dataset": source.description, "seed": config.seed}
    if source.kind == "self":
        record["generation"] = {"temperature": TEMPERATURE, "top_p": TOP_P}
    if longest is not None and (record["seqlen"] or 0) > longest:
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
    if add_decoder_inputs(model, batches):
        record["decoder"] = SHIFTED
    return Calibration(batches, record)


def _batches(
    source: Source,
    config: SparseConfig,
    model: nn.Module,
    tokenizer: Any,
    seqlen: int,
    vocabulary: int | None,
    progress: bool,
) -> list[dict[str, Any]]:
    if source.kind == "batches":
        return given_batches(source.items, config.num_samples, model)
    if source.kind == "items":
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return given_batches(process(source.items, tokenizer, dtype), config.num_samples, model)
    if source.kind == "self":
        check_can_generate(model)
    check_takes_tokens(model, source.description)
    rows: Iterable[Row]
    if source.kind == "tokens":
        others = DECODER_TOKENS if is_encoder_decoder(model) else ()
        rows = itertools.islice(token_rows(source.items, others), config.num_samples)
    else:
        windows = _windows(source, config, model, tokenizer, seqlen, vocabulary, progress)
        rows = ({"input_ids": window} for window in windows)
    on_cpu = execution_device(model).type == "cpu"
    return stack_rows(rows, config.batch_size, BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS_ACCELERATOR)


def _windows(
    source: Source,
    config: SparseConfig,
    model: Any,
    tokenizer: Any,
    seqlen: int,
    vocabulary: int | None,
    progress: bool,
) -> torch.Tensor:
    """Windows `[n, seqlen]` of the text of `source`, or of the model's own text."""
    generator = torch.Generator().manual_seed(config.seed)
    if source.kind == "self" and not source.items:
        prefixes = first_tokens(model, config.num_samples, generator)
        return generate_windows(model, prefixes, seqlen, config.seed, progress)
    tokenizer = _text_tokenizer(tokenizer, source.description)
    documents = tokenize(source.items, tokenizer)
    separator = separator_id(tokenizer)
    wanted = (config.num_samples, generator, source.streaming)
    if source.kind == "self":
        prefixes = packed_windows(documents, PREFIX_TOKENS, *wanted, separator=separator)
        check_vocabulary(prefixes, vocabulary)
        return generate_windows(model, prefixes, seqlen, config.seed, progress)
    if config.pack_documents:
        return packed_windows(documents, seqlen, *wanted, separator=separator)
    return document_windows(documents, seqlen, *wanted)


def _text_tokenizer(tokenizer: Any, description: str) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor."""
    if tokenizer is None:
        raise ValueError(
            f"The calibration data ({description}) are text, which needs a tokenizer: pass that of the model, "
            "or give token dicts or dataset='self' instead."
        )
    if not is_processor(tokenizer):
        return tokenizer
    if getattr(tokenizer, "tokenizer", None) is None:
        raise ValueError(
            f"The calibration data ({description}) are text, but {type(tokenizer).__name__} has no tokenizer: give "
            "what it takes, as dicts of the arguments of its call, or a tokenizer."
        )
    return tokenizer.tokenizer


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _resolve_seqlen(asked: int | None, longest: int | None) -> int:
    if asked is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if longest is not None and asked > longest:
        raise ValueError(f"seqlen={asked} is longer than the {longest} tokens that the model supports: lower seqlen.")
    return asked


def _describe(batches: list[dict[str, Any]], model: nn.Module) -> dict[str, Any]:
    """The part of the record that is counted from the batches themselves."""
    num_samples, lengths, num_tokens, digest = 0, [], 0, hashlib.sha256()
    for batch in batches:
        main = main_input(model, batch)
        assert main is not None  # or the batch would have been refused
        num_samples += len(main)
        digest.update(main.to("cpu", torch.float32 if main.is_floating_point() else torch.int64).numpy().tobytes())
        ids: Any = batch.get("input_ids")
        mask: Any = batch.get("attention_mask")
        if ids is not None:
            lengths.append(ids.shape[1])
            # A mask of another shape (4-D) says who attends to whom, not what is padding.
            num_tokens += int(mask.sum()) if getattr(mask, "shape", None) == ids.shape else ids.numel()
    return {
        "num_samples": num_samples,
        "seqlen": max(lengths, default=None),
        "num_tokens": num_tokens if lengths else None,
        "sha256": digest.hexdigest(),
    }
