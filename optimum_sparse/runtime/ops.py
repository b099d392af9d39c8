"""The operators `tiles_linear`, `quantized_linear` and `dense_linear` of `optimum_sparse`.

They are registered with `torch.library.Library`, whose calls cost half of those of `custom_op`: a small model makes
hundreds per token. All have shape functions, so that `torch.compile` takes them for granted, and no derivative: the
layers use them only where none is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..precision import exact_in_half
from . import gpu, kernels, quantized, tiles

# Up to here, the kernel is faster than unpacking and the dense product; and up to there, if that is one of AMX.
MOST_TOKENS, MOST_TOKENS_AMX = 96, 12
# Of a weight, so many bytes or rows are unpacked at once, whichever is more, which stay in the cache until they are
# multiplied. All parts have about as many rows, in such units: some products with fewer take twice as long on AMX.
BUFFER_BYTES, BUFFER_ROWS, BUFFER_UNIT = 2**24, 1024, 128

_LIBRARY = torch.library.Library("optimum_sparse", "DEF")
_LIBRARY.define(
    "tiles_linear(Tensor x, Tensor masks, Tensor values, Tensor offsets, Tensor? bias, int rows, int columns)"
    " -> Tensor"
)
_LIBRARY.define(
    "quantized_linear(Tensor x, Tensor masks, Tensor codes, Tensor offsets, Tensor grids, Tensor? bias, int rows,"
    " int columns) -> Tensor"
)
_LIBRARY.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

_buffers = threading.local()


def _tiles_linear(
    x: torch.Tensor,
    masks: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """`F.linear` with the weight whose `Tiles` these are; `x` is `[..., columns]`."""
    shape = (rows, columns)
    tiles.check_parts(shape, masks, values, offsets)
    _check_inputs(x, values, bias, shape)
    if gpu.usable(x):
        return gpu.tiles_linear(x, masks, values, offsets, bias, shape)
    if not _takes_kernel(x, x.numel() // columns):
        return _unpack_and_multiply(
            x, lambda out, first: tiles.unpack(shape, masks, values, offsets, out, first), bias, shape
        )
    return _multiply(x, tiles.arguments(shape, masks, values, offsets), bias, rows)


def _quantized_linear(
    x: torch.Tensor,
    masks: torch.Tensor,
    codes: torch.Tensor,
    offsets: torch.Tensor,
    grids: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """`F.linear` with the weight whose `QuantizedTiles` these are; `x` is `[..., columns]` of any type that they have.

    For a few tokens, weights are scale * (code - zero), not rounded to the type of `x`, and inputs are rounded to
    2^-22 of the largest of 128, or less.
    """
    shape = (rows, columns)
    quantized.check_parts(shape, masks, codes, offsets, grids)
    if x.dtype not in kernels.TYPES or x.device != codes.device:
        raise ValueError(
            f"the input is {x.dtype} on {x.device}: it must be {', '.join(map(str, kernels.TYPES))} on {codes.device}."
        )
    _check_inputs(x, x, bias, shape)
    if not _takes_kernel(x, x.numel() // columns):
        return _unpack_and_multiply(
            x, lambda out, first: quantized.unpack(shape, masks, codes, offsets, grids, out, first), bias, shape
        )
    return _multiply(x, quantized.arguments(shape, masks, codes, offsets, grids, x.dtype), bias, rows)


def _multiply(x: torch.Tensor, matrix: tuple[int, ...], bias: torch.Tensor | None, rows: int) -> torch.Tensor:
    """The product with packed weights, which are the first arguments of the extension."""
    out = x.new_empty(*x.shape[:-1], rows)
    tokens = out.numel() // rows
    if tokens:
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        address = 0 if bias is None else bias.data_ptr()
        kernels.EXTENSION.tiles_linear(
            *matrix, kernels.number(), x.data_ptr(), tokens, address, out.data_ptr(), kernels.threads()
        )
    return out


def _dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear`; faster for a single token, if the weight is contiguous."""
    if weight.ndim != 2:
        raise ValueError(f"the weight must be [rows, columns], got {tuple(weight.shape)}.")
    rows, columns = weight.shape
    _check_inputs(x, weight, bias, (rows, columns))
    if x.numel() != columns or not weight.is_contiguous() or not _has_kernel(x):
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], rows)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    address = 0 if bias is None else bias.data_ptr()
    kernels.EXTENSION.dense_linear(
        rows,
        columns,
        weight.data_ptr(),
        kernels.TYPES[x.dtype],
        kernels.number(),
        x.data_ptr(),
        address,
        out.data_ptr(),
        kernels.threads(),
    )
    return out


def _has_kernel(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype in kernels.MULTIPLIED and kernels.compiled()


def _takes_kernel(x: torch.Tensor, tokens: int) -> bool:
    few = tokens <= MOST_TOKENS_AMX or (tokens <= MOST_TOKENS and not exact_in_half(x))
    return few and _has_kernel(x)


def _check_inputs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if x.shape[-1:] != (columns,):
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a weight with {columns} columns.")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"the input is {x.dtype} on {x.device}, and the weight {weight.dtype} on {weight.device}: "
            "both must be the same."
        )
    if bias is not None and not (bias.shape == (rows,) and bias.dtype == x.dtype and bias.device == x.device):
        raise ValueError(
            f"the bias must be [{rows}] {x.dtype} on {x.device}, "
            f"got {tuple(bias.shape)} {bias.dtype} on {bias.device}."
        )


def _unpack_and_multiply(
    x: torch.Tensor,
    unpack: Callable[[torch.Tensor, int], object],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor:
    """For many tokens: dense products with some rows of the weight after others, unpacked into one buffer.

    `unpack` writes rows, from a first one on.
    """
    rows, columns = shape
    parts = -(-rows // max(BUFFER_ROWS, BUFFER_BYTES // (columns * x.itemsize)))
    step = -(-rows // (parts * BUFFER_UNIT)) * BUFFER_UNIT
    buffer = _buffer(min(step, rows) * columns, x)
    inputs, out = x.reshape(-1, columns), x.new_empty(*x.shape[:-1], rows)
    outputs = out.view(-1, rows)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight = buffer[: (last - first) * columns].view(-1, columns)
        unpack(weight, first)
        # To where they belong: `F.linear` would need a copy, which takes as long as unpacking.
        if bias is None:
            torch.mm(inputs, weight.T, out=outputs[:, first:last])
        else:
            torch.addmm(bias[first:last], inputs, weight.T, out=outputs[:, first:last])
    return out


def _buffer(numel: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for unpacked weights: one for each thread, device and type, as large as the largest needed so far."""
    kept = _buffers.__dict__
    key = str((like.device, like.dtype))
    if key not in kept or kept[key].numel() < numel:
        kept.pop(key, None)  # before the larger one is made
        with torch.inference_mode(False):  # else it could be written to in no other mode
            kept[key] = like.new_empty(numel)
    return kept[key]


def _tiles_shape(
    x: torch.Tensor,
    masks: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _quantized_shape(
    x: torch.Tensor,
    masks: torch.Tensor,
    codes: torch.Tensor,
    offsets: torch.Tensor,
    grids: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _dense_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("tiles_linear", _tiles_linear, _device)
    _LIBRARY.impl("quantized_linear", _quantized_linear, _device)
    _LIBRARY.impl("dense_linear", _dense_linear, _device)
torch.library.register_fake("optimum_sparse::tiles_linear", _tiles_shape, lib=_LIBRARY)
torch.library.register_fake("optimum_sparse::quantized_linear", _quantized_shape, lib=_LIBRARY)
torch.library.register_fake("optimum_sparse::dense_linear", _dense_shape, lib=_LIBRARY)

tiles_linear = torch.ops.optimum_sparse.tiles_linear.default
quantized_linear = torch.ops.optimum_sparse.quantized_linear.default
dense_linear = torch.ops.optimum_sparse.dense_linear.default
