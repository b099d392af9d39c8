"""Which precision matrix products have."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

# Both GPUs and CPUs may be told to take fewer bits of fp32 factors.
BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def full_precision() -> AbstractContextManager[None]:
    """In the body, products of fp32 are products of fp32, also if TF32 or bfloat16 is allowed for the model's sake."""
    return _fp32_products(dict.fromkeys(BACKENDS, "ieee"))


@contextmanager
def _fp32_products(precisions: Mapping[Any, str]) -> Iterator[None]:
    before = {backend: backend.fp32_precision for backend in precisions}
    try:
        for backend, precision in precisions.items():
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in before.items():
            backend.fp32_precision = precision


def exact_in_half(inputs: torch.Tensor) -> bool:
    """Whether a device multiplies inputs in half precision and adds up in fp32, which holds the products exactly.

    GPUs do, and CPUs with AMX, which multiplies bfloat16.
    """
    if inputs.is_cuda:
        return inputs.dtype in (torch.bfloat16, torch.float16)
    return inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def half_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in fp32 of inputs that `exact_in_half` holds for; on a CPU, they have been converted to fp32.

    A CPU has no product of bfloat16 whose result is fp32, but it may round factors of fp32 to bfloat16, which changes
    none that were bfloat16 before; tokens that were scaled since are rounded, as they are for a GPU.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    with _fp32_products({BACKENDS[1]: "bf16"}):
        return left @ right


def product_dtype(device: torch.device) -> torch.dtype:
    """What to multiply matrices in where rounding does not matter: bfloat16 if the hardware does, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """What to add up in where the order of the terms is not to matter: float64 on a CPU, where that costs little.

    Sums of fp32 numbers are exact in it unless they differ by more than 2^28, so they are the same bits whatever the
    order and however many processes have parts of it. On a GPU, the terms themselves depend on the shapes of products.
    """
    return torch.float64 if device.type == "cpu" else torch.float32


@cache
def half_penalty(dtype: torch.dtype) -> float:
    """How many times as long this CPU takes for a linear layer in a half precision as for one in float32."""

    def seconds(dtype: torch.dtype) -> float:
        factor = torch.ones(512, 512, dtype=dtype)
        torch.nn.functional.linear(factor, factor)
        started = time.perf_counter()
        torch.nn.functional.linear(factor, factor)
        return time.perf_counter() - started

    return seconds(dtype) / seconds(torch.float32)
