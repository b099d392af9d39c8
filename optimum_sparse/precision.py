"""Which precision matrix products have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Both GPUs and CPUs may be told to take fewer bits of fp32 factors.
BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def full_precision() -> Iterator[None]:
    """In the body, products of fp32 are products of fp32, also if TF32 or bfloat16 is allowed for the model's sake."""
    allowed = [backend.fp32_precision for backend in BACKENDS]
    try:
        for backend in BACKENDS:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(BACKENDS, allowed, strict=True):
            backend.fp32_precision = precision


def exact_in_half(inputs: torch.Tensor) -> bool:
    """Whether a device multiplies inputs in half precision and adds up in fp32, which holds the products exactly."""
    return inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16)
