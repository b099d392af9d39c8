"""The compiled kernels, and which instructions they use here."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch  # before the extension, which then shares the threads of torch's OpenMP library

# What the kernels multiply, and what else they pack and unpack; the numbers are those of kernels.h.
MULTIPLIED = {torch.bfloat16: 0, torch.float32: 1}
TYPES = {**MULTIPLIED, torch.float16: 2}

# Name of a level, or "torch" for the same in plain torch; read once, when this module is imported.
VARIABLE = "OPTIMUM_SPARSE_KERNEL"


def _load() -> tuple[Any, str | None]:
    """The extension, or why there is none."""
    try:
        return importlib.import_module("._kernels", __package__), None
    except ImportError as error:
        return None, f"the extension was not built ({error}): install a C compiler and optimum-sparse again"


def _choose(wanted: str | None) -> str:
    """The level to use: the fastest unless another is wanted.

    Raises:
        ValueError: The processor or this build lacks it, or there is none of this name.
    """
    available = [*filter(None, LEVELS), "torch"]
    if wanted is None:
        return available[-2] if EXTENSION is not None else "torch"
    if wanted not in available:
        raise ValueError(f"{VARIABLE}={wanted!r}: this machine has {', '.join(available)}.")
    return wanted


EXTENSION, MISSING = _load()
# From the slowest to the fastest; None stands for those that this processor lacks.
LEVELS: list[str | None] = EXTENSION.levels() if EXTENSION is not None else []
LEVEL = _choose(os.environ.get(VARIABLE))


def compiled() -> bool:
    """Whether the compiled kernels are used, and not plain torch."""
    return LEVEL != "torch"


def number() -> int:
    """The level in use, as the extension counts them."""
    return LEVELS.index(LEVEL)


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
