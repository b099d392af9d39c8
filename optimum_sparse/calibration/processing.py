"""Processors in place of a tokenizer: from images, sound and text to batches of model inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import FeatureExtractionMixin, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin


def is_processor(tokenizer: Any) -> bool:
    """Whether this makes model inputs from other things than text, too."""
    # Not BaseImageProcessor, which Transformers replaces by a dummy where Pillow is missing.
    return isinstance(tokenizer, (ProcessorMixin, FeatureExtractionMixin, ImageProcessingMixin))


def process(items: Iterable[Mapping[str, Any]], processor: Any, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Call the processor with each item's entries as keyword arguments.

    Args:
        items: Each makes one batch, commonly of one row.
        processor: A processor, image processor or feature extractor.
        dtype: Of the floating-point tensors returned; the model's own, as many models do not convert their inputs.

    Raises:
        ValueError: The processor refuses an item.
    """
    named = [p.name for p in inspect.signature(processor).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = f" ({', '.join(named)})" if named else ""
    for index, item in enumerate(items):
        try:
            if named and isinstance(processor, ProcessorMixin):
                _check_known(item, named)
            inputs = processor(**item, return_tensors="pt")
        except Exception as error:
            raise ValueError(
                f"{type(processor).__name__} refuses item {index} of the calibration data, with the keys "
                f"[{', '.join(map(str, item))}] ({type(error).__name__}: {error}). The keys must be arguments of its "
                f"call{arguments}: rename or drop others."
            ) from error
        yield {name: _cast(value, dtype) for name, value in inputs.items()}


def _check_known(item: Mapping[str, Any], named: list[str]) -> None:
    """Refuse what a processor would ignore: anything but options that is no named argument of its call."""
    for key, value in item.items():
        is_option = value is None or isinstance(value, (str, int, float, Mapping))
        if key not in named and (f"{key}s" in named or not is_option):
            raise TypeError(f"there is no argument {key!r}")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
