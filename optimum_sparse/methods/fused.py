"""SparseGPT's sweep over the columns of a panel as one GPU kernel; a loop would launch several for each column."""

from __future__ import annotations

import torch

from ..patterns import NM, Pattern

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with the builds of torch for GPUs; `missing` tells
    triton = None

# Columns of a panel, which are held in registers for so many rows at once.
PANEL = 128
ROWS = 16


def usable(columns: torch.Tensor) -> bool:
    """Whether the kernel takes a panel: on a GPU that Triton knows."""
    return columns.is_cuda and triton is not None


def missing(device: torch.device, rounds: bool) -> str | None:
    """What to tell a user on whose device the kernel could be used, but is not; `rounds` if weights are quantised."""
    if device.type == "cuda" and rounds:
        return "the kernel does not quantise: the sweep goes column by column, several times slower"
    if device.type == "cuda" and triton is None:
        return "Triton is not installed (pip install triton): the sweep goes column by column, several times slower"
    return None


def sweep(
    columns: torch.Tensor, inverse: torch.Tensor, mask: torch.Tensor, pattern: Pattern, choose: bool
) -> torch.Tensor:
    """Prune the columns of a panel one after the other, in place.

    Args:
        columns: `[columns, rows]` fp32 weights of the panel, transposed, rows contiguous.
        inverse: `[columns, columns]` fp32, upper triangular: that of the factor of the Hessian.
        mask: `[columns, rows]` bool, true where a weight is kept; filled in if it is to be chosen.
        pattern: The pattern.
        choose: Whether to choose the mask of each N:M group when the sweep gets there.

    Returns:
        `[columns, rows]` fp32: the error of each pruned weight in units of its diagonal entry.
    """
    width, rows = columns.shape
    inverse = inverse.contiguous()  # triangular solves give it transposed
    errors = torch.empty_like(columns, memory_format=torch.contiguous_format)
    n, m = (pattern.n, pattern.m) if choose and isinstance(pattern, NM) else (1, 1)
    with torch.cuda.device_of(columns):  # a model may be on several
        _sweep[(triton.cdiv(rows, ROWS),)](
            columns,
            inverse,
            mask.view(torch.uint8),
            errors,
            rows,
            width,
            columns.stride(0),
            inverse.stride(0),
            mask.stride(0),
            errors.stride(0),
            NUM_PRUNED=m - n,
            GROUP=m,
            CHOOSE=choose,
            WIDTH=triton.next_power_of_2(width),
            ROWS=ROWS,
        )
    return errors


if triton is not None:

    @triton.jit
    def _sweep(  # type: ignore[no-untyped-def] # Triton would read the types
        columns,
        inverse,
        mask,
        errors,
        num_rows,
        width,
        columns_stride,
        inverse_stride,
        mask_stride,
        errors_stride,
        NUM_PRUNED: tl.constexpr,
        GROUP: tl.constexpr,
        CHOOSE: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """All columns of a panel for `ROWS` rows, which are independent of the others."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        index = tl.arange(0, WIDTH)
        there = (row < num_rows)[:, None] & (index < width)[None, :]
        # A tile [ROWS, WIDTH]; in memory, the weights of a column are next to each other.
        tile = tl.load(columns + index[None, :] * columns_stride + row[:, None], mask=there, other=0.0)
        kept = tl.load(mask + index[None, :] * mask_stride + row[:, None], mask=there, other=0)
        diagonal = tl.load(inverse + index * inverse_stride + index, mask=index < width, other=1.0)
        scores = tile
        for i in range(width):
            mine = (index == i)[None, :]
            column = tl.sum(tl.where(mine, tile, 0.0), axis=1)
            if CHOOSE:
                # What a group looks like when the sweep comes to it decides which of its weights go.
                if i % GROUP == 0:
                    scores = tl.abs(tl.div_rn(tile, diagonal[None, :]))
                score = tl.sum(tl.where(mine, scores, 0.0), axis=1)[:, None]
                in_group = ((index >= i - i % GROUP) & (index < i - i % GROUP + GROUP))[None, :]
                before = (scores < score) | ((scores == score) & (index < i)[None, :])
                keep = tl.sum(tl.where(in_group & before, 1, 0), axis=1) >= NUM_PRUNED
                kept = tl.where(mine, keep[:, None].to(kept.dtype), kept)
            else:
                keep = tl.sum(tl.where(mine, kept.to(tl.int32), 0), axis=1) > 0
            scale = tl.sum(tl.where(index == i, diagonal, 0.0), axis=0)
            error = tl.where(keep, 0.0, tl.div_rn(column, scale))
            onward = tl.load(inverse + i * inverse_stride + index, mask=(index > i) & (index < width), other=0.0)
            tile -= error[:, None] * onward[None, :]
            tile = tl.where(mine & (keep == 0)[:, None], 0.0, tile)
            tl.store(errors + i * errors_stride + row, error, mask=row < num_rows)
        tl.store(columns + index[None, :] * columns_stride + row[:, None], tile, mask=there)
        if CHOOSE:
            tl.store(mask + index[None, :] * mask_stride + row[:, None], kept, mask=there)
