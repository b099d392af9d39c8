"""The products with `Tiles` on a GPU, in Triton.

Decoding waits for memory, so each mask and each value is read once, and nothing else but the input. A program takes a
block of 8 rows, whose masks and values are one stretch of memory each, and walks along it in chunks of some tiles; the
next masks are on their way meanwhile. The bits set before a weight say where its value is. They are counted once for
a run of columns, and a warp takes runs that follow each other, row after row: so it reads values that are next to each
other, and each part of the input once for all rows. Blocks are small because a matrix has few of them for each
multiprocessor, and chunks large because what is under way must cover the latency of the memory.

One token is multiplied as the values come in. Two to `MOST_TOKENS` are padded to as many for the tensor cores, where
each warp takes its part of the columns. Beyond that the weight is unpacked for a dense product, into memory that the
allocator takes back at once, for the next layer. Nothing waits for the host, and no shape depends on the data, so that
CUDA graphs can record it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .tiles import COLUMNS, ROWS

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with the builds of torch for GPUs; `MISSING` tells
    triton = None

MISSING = None if triton is not None else "Triton is not installed (pip install triton)"

# Up to here, the packed weight is multiplied.
MOST_TOKENS = 16


@dataclass(frozen=True)
class Cut:
    """How the work is cut: columns of a run, tiles of a chunk (of 2-byte values; half as many of 4 bytes), warps."""

    run: int
    tiles: int
    warps: int

    def options(self, values: torch.Tensor) -> dict[str, int]:
        """What the kernels are compiled for."""
        return {"RUN": self.run, "TILES": self.tiles * 2 // values.itemsize, "num_warps": self.warps}


# For one token, for several, and to unpack. Chosen by the instructions that the kernels compile to, and not yet by
# their times: tests/benchmarks/gpu_runtime.py --tune measures others.
SINGLE, SEVERAL, UNPACK = Cut(2, 16, 4), Cut(1, 16, 4), Cut(1, 8, 4)


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels take a tensor: on a GPU, if there is Triton."""
    return x.is_cuda and triton is not None


def tiles_linear(
    x: torch.Tensor,
    masks: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor:
    """`F.linear` with the weight whose `Tiles` these are, which the caller has checked.

    Args:
        x: `[..., columns]`, of the type of the values.
        masks: As the others, the part of `Tiles` of this name.
        values: bfloat16, float16 or float32.
        offsets: See there.
        bias: `[rows]` or none.
        shape: `(rows, columns)`.

    Returns:
        `[..., rows]`.
    """
    rows, columns = shape
    tokens = x.numel() // columns
    if tokens > MOST_TOKENS:
        return F.linear(x, unpack(masks, values, offsets, shape), bias)
    out = x.new_empty(*x.shape[:-1], rows)
    if tokens:
        blocks, tiles = masks.shape[:2]
        cut = SINGLE if tokens == 1 else SEVERAL
        with torch.cuda.device_of(x):  # a model may be on several
            _multiply[(blocks,)](
                x.contiguous(),
                masks.view(torch.int32),
                values,
                offsets,
                out if bias is None else bias.contiguous(),
                out,
                tokens,
                rows,
                columns,
                tiles,
                BIAS=bias is not None,
                TOKENS=1 if tokens == 1 else MOST_TOKENS,
                WARPS=cut.warps,
                **cut.options(values),
            )
    return out


def unpack(masks: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight `[rows, columns]` whose `Tiles` these are."""
    rows, columns = shape
    out = values.new_empty(shape)
    blocks, tiles = masks.shape[:2]
    matrix = (masks.view(torch.int32), values, offsets)
    with torch.cuda.device_of(values):
        _unpack[(blocks,)](*matrix, out, rows, columns, tiles, **UNPACK.options(values))
    return out


if triton is not None:
    _ROWS: tl.constexpr = tl.constexpr(ROWS)
    _COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)

    @triton.jit
    def _popcount(words):  # type: ignore[no-untyped-def] # Triton would read the types
        """How many bits of unsigned 32-bit words are set; LLVM knows the pattern, and makes one instruction of it."""
        words = words - ((words >> 1) & 0x55555555)
        words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
        words = (words + (words >> 4)) & 0x0F0F0F0F
        return ((words * 0x01010101) >> 24).to(tl.int32)

    @triton.jit
    def _load_masks(masks, first, tiles, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Those of the tiles from `first` on, `[rows, TILES]`; beyond the last tile, no bit is set."""
        tile = first + tl.arange(0, TILES)[None, :]
        words = tl.load(masks + tile * _ROWS + tl.arange(0, _ROWS)[:, None], mask=tile < tiles, other=0)
        return words.to(tl.uint32, bitcast=True)

    @triton.jit
    def _locate(words, before, run):  # type: ignore[no-untyped-def]
        """The bits of each run, where its values begin (both `[rows, TILES, runs]`), and where the next chunk does."""
        counts = _popcount(words)
        totals = tl.sum(counts, 0)
        ends = before + (tl.cumsum(totals, 0) - totals)[None, :] + tl.cumsum(counts, 0)
        bits = words[:, :, None] >> run[None, None, :]
        return bits, ends[:, :, None] - _popcount(bits), before + tl.sum(totals, 0)

    @triton.jit
    def _next(values, bits, position):  # type: ignore[no-untyped-def]
        """The weights of the lowest bits, and where those of the next ones are."""
        stored = (bits & 1).to(tl.int32)
        return tl.load(values + position, mask=stored != 0, other=0.0), position + stored

    @triton.jit
    def _multiply(  # type: ignore[no-untyped-def]
        x,
        masks,
        values,
        offsets,
        bias,
        out,
        tokens,
        rows,
        columns,
        tiles,
        BIAS: tl.constexpr,
        TOKENS: tl.constexpr,
        WARPS: tl.constexpr,
        RUN: tl.constexpr,
        TILES: tl.constexpr,
    ):
        """The products of one block of rows with all tokens."""
        RUNS: tl.constexpr = _COLUMNS // RUN
        # Of the columns of a chunk with the same place in their runs, those that one warp multiplies.
        PART: tl.constexpr = TILES * RUNS // WARPS
        block = tl.program_id(0).to(tl.int64)
        masks += block * tiles * _ROWS
        values += tl.load(offsets + block)
        run = tl.arange(0, RUNS) * RUN
        if TOKENS == 1:
            column = (tl.arange(0, TILES)[:, None] * _COLUMNS + run[None, :])[None, :, :]
            sums = tl.zeros([_ROWS, TILES, RUNS], tl.float32)
        else:
            column = tl.reshape(tl.arange(0, TILES * RUNS) * RUN, [WARPS, 1, PART])
            token = tl.arange(0, TOKENS)[None, :, None]
            sums = tl.zeros([WARPS, TOKENS, _ROWS], tl.float32)
        before = 0
        words = _load_masks(masks, 0, tiles, TILES)
        for tile in range(0, tiles, TILES):
            following = _load_masks(masks, tile + TILES, tiles, TILES)
            bits, position, before = _locate(words, before, run)
            for i in tl.static_range(RUN):
                weight, position = _next(values, bits >> i, position)
                at = tile * _COLUMNS + column + i
                if TOKENS == 1:
                    inputs = tl.load(x + at, mask=at < columns, other=0.0)
                    sums += weight.to(tl.float32) * inputs.to(tl.float32)
                else:
                    inputs = tl.load(x + token * columns + at, mask=(token < tokens) & (at < columns), other=0.0)
                    weight = tl.permute(tl.reshape(weight, [_ROWS, WARPS, PART]), [1, 2, 0])
                    sums = tl.dot(inputs, weight, sums, input_precision="tf32x3")
            words = following
        row = block * _ROWS + tl.arange(0, _ROWS)
        result = tl.sum(tl.sum(sums, 2), 1)[None, :] if TOKENS == 1 else tl.sum(sums, 0)
        if BIAS:
            result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        tl.store(out + token * rows + row[None, :], result, mask=(token < tokens) & (row < rows)[None, :])

    @triton.jit
    def _unpack(  # type: ignore[no-untyped-def]
        masks, values, offsets, out, rows, columns, tiles, RUN: tl.constexpr, TILES: tl.constexpr
    ):
        """One block of rows, dense."""
        block = tl.program_id(0).to(tl.int64)
        masks += block * tiles * _ROWS
        values += tl.load(offsets + block)
        run = tl.arange(0, _COLUMNS // RUN) * RUN
        row = block * _ROWS + tl.arange(0, _ROWS)[:, None, None]
        column = (tl.arange(0, TILES)[:, None] * _COLUMNS + run[None, :])[None, :, :]
        before = 0
        words = _load_masks(masks, 0, tiles, TILES)
        for tile in range(0, tiles, TILES):
            following = _load_masks(masks, tile + TILES, tiles, TILES)
            bits, position, before = _locate(words, before, run)
            for i in tl.static_range(RUN):
                weight, position = _next(values, bits >> i, position)
                at = tile * _COLUMNS + column + i
                tl.store(out + row * columns + at, weight, mask=(row < rows) & (at < columns))
            words = following
