"""`QuantizedTiles`: a sparse matrix that is on a grid, one byte for each weight left, as the kernels read it."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch.nn import functional as F

from ..quantization import Grid
from . import kernels
from .tiles import ROWS, compiled, pack_bits, parts_fit, unpack_bits

COLUMNS = 128  # of a tile
PADDING = 64  # codes after the last one that a kernel may read


@dataclass(frozen=True, eq=False)
class QuantizedTiles:
    """The non-zero weights of a matrix `[rows, columns]` on a grid, in tiles of 8 rows and 128 columns.

    As `Tiles`, with codes for values, and a grid for each row of a tile: a weight is scale * (code - zero). Half of
    the weights of a bfloat16 matrix take 0.33 of its bytes.

    Attributes:
        shape: `(rows, columns)`.
        masks: `[blocks, tiles, 8, 16]` uint8; bit j % 8 of byte j // 8 is set if column j of the row is stored.
        codes: `[stored + 64]` uint8; the last 64 are zeros.
        offsets: `[blocks + 1]` int64; the stored codes before each block, and in all.
        grids: `[blocks, tiles, 8]` int32; the bits of the bfloat16 scale in the upper half, zero in the lowest byte.
        like: Empty; its type is that of the dense weight, to which scale * (code - zero) is rounded.

    Args:
        checked: As of `Tiles`.

    Raises:
        ValueError: The parts do not belong together.
        TypeError: The dense weight would not be bfloat16, float16 or float32.
    """

    shape: tuple[int, int]
    masks: torch.Tensor
    codes: torch.Tensor
    offsets: torch.Tensor
    grids: torch.Tensor
    like: torch.Tensor
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        check_parts(self.shape, self.masks, self.codes, self.offsets, self.grids)
        if self.like.dtype not in kernels.TYPES:
            raise TypeError(f"weights are {', '.join(map(str, kernels.TYPES))}, got {self.like.dtype}.")
        stored = self.codes.numel() - PADDING
        if checked:
            return
        if compiled(self.codes):
            # Contents do not depend on the type.
            matrix = arguments(self.shape, self.masks, self.codes, self.offsets, self.grids, torch.float32)
            consistent = kernels.EXTENSION.tiles_check(*matrix, stored, kernels.threads())
        else:
            consistent = parts_fit(self.shape, self.masks, self.offsets, stored)
        if not consistent:
            raise ValueError(
                "masks, codes and offsets do not belong together: bits stand outside of the matrix, or the numbers of "
                "set bits are not those of the codes. The data is corrupt: pack the weight again."
            )

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.masks.nbytes + self.codes.nbytes + self.offsets.nbytes + self.grids.nbytes

    @property
    def sparsity(self) -> float:
        """The part of the weights that is not stored."""
        return 1 - int(self.offsets[-1]) / (self.shape[0] * self.shape[1])

    @classmethod
    def pack(cls, weight: torch.Tensor, grid: Grid) -> QuantizedTiles:
        """Pack a dense weight.

        Args:
            weight: `[rows, columns]` bfloat16, float16 or float32.
            grid: What it was rounded to. There is an `obstacle` if a group has not 128 inputs or a multiple of them.

        Raises:
            ValueError: The grid cannot be packed, or some weights are not on it.
        """
        reason = obstacle(weight.shape, grid)
        if reason is not None:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot be packed as codes: {reason}.")
        rows, columns = weight.shape
        blocks, tiles = -(-rows // ROWS), -(-columns // COLUMNS)
        grid = grid.to(weight.device)
        size = columns if grid.group_size == -1 else grid.group_size
        group = torch.arange(tiles, device=weight.device) * COLUMNS // size
        words = grid.scale.view(torch.int16).int() << 16 | grid.zero.int()
        words = F.pad(words[:, group], (0, 0, 0, blocks * ROWS - rows)).view(blocks, ROWS, tiles).transpose(1, 2)
        codes = F.pad(grid.codes(weight.detach()), (0, tiles * COLUMNS - columns, 0, blocks * ROWS - rows))
        codes = codes.view(blocks, ROWS, tiles, COLUMNS).transpose(1, 2)
        stored = codes != (words & 0xFF)[..., None]
        # The padding has no grid of its own, and is not stored whatever the zero of its row is.
        stored[-1, :, rows - (blocks - 1) * ROWS :] = False
        stored[:, -1, :, columns - (tiles - 1) * COLUMNS :] = False
        masks, offsets = pack_bits(stored)
        packed = F.pad(codes[stored], (0, PADDING))
        return cls((rows, columns), masks, packed, offsets, words.contiguous(), weight.new_empty(0))

    def unpack(self) -> torch.Tensor:
        """The dense weight `[rows, columns]`, equal to the one packed."""
        return unpack(self.shape, self.masks, self.codes, self.offsets, self.grids, self.like.new_empty(self.shape))


def obstacle(shape: torch.Size | tuple[int, ...], grid: Grid) -> str | None:
    """Why a weight of this shape cannot be packed with a grid, whatever it holds."""
    if len(shape) != 2 or 0 in shape:
        return f"it must have two dimensions, none of them zero, and has the shape {tuple(shape)}"
    rows, columns = shape
    size = columns if grid.group_size == -1 else grid.group_size
    if size < columns and size % COLUMNS:
        return f"a group of its grid has {size} inputs, which is no multiple of {COLUMNS}"
    expected = (rows, -(-columns // size))
    if not (
        grid.scale.shape == grid.zero.shape == expected
        and grid.scale.dtype == torch.bfloat16
        and grid.zero.dtype == torch.uint8
    ):
        return f"its grid has {tuple(grid.scale.shape)} groups, and not {expected}"
    return None


def packed_bytes(shape: tuple[int, ...], stored: int) -> int:
    """What the `QuantizedTiles` of a matrix take that has so many weights to store."""
    blocks, tiles = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    return blocks * tiles * ROWS * (COLUMNS // 8 + 4) + stored + PADDING + 8 * (blocks + 1)


def unpack(
    shape: tuple[int, int],
    masks: torch.Tensor,
    codes: torch.Tensor,
    offsets: torch.Tensor,
    grids: torch.Tensor,
    out: torch.Tensor,
    first: int = 0,
) -> torch.Tensor:
    """Write rows of the dense weight whose `QuantizedTiles` these are.

    Args:
        shape: Of the whole weight; it and the other parts are as in `QuantizedTiles`.
        masks: Its masks.
        codes: Its codes.
        offsets: Its offsets.
        grids: Its grids.
        out: `[rows, columns]`, contiguous: takes the rows from `first` on, rounded to its type. Ends with a tile or
            with the weight.
        first: A multiple of the rows of a tile.

    Returns:
        `out`.
    """
    last = first + out.shape[0]
    if compiled(codes) and out.dtype in kernels.MULTIPLIED:
        matrix = arguments(shape, masks, codes, offsets, grids, out.dtype)
        kernels.EXTENSION.tiles_unpack(*matrix, kernels.number(), first, last, out.data_ptr(), kernels.threads())
        return out
    blocks = slice(first // ROWS, -(-last // ROWS))
    bits, grids = unpack_bits(masks[blocks]), grids[blocks, ..., None]
    zero, scale = grids & 0xFF, (grids & -(2**16)).view(torch.float32)
    dense = zero.to(torch.uint8).expand(bits.shape).masked_scatter(bits.bool(), codes[int(offsets[blocks.start]) :])
    weights = (scale * (dense - zero)).transpose(1, 2).reshape(bits.shape[0] * ROWS, -1)
    return out.copy_(weights[: last - first, : shape[1]])


def arguments(
    shape: tuple[int, int],
    masks: torch.Tensor,
    codes: torch.Tensor,
    offsets: torch.Tensor,
    grids: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """What the functions of the extension take first; `dtype` is that of inputs, outputs and unpacked weights."""
    parts = (masks.data_ptr(), codes.data_ptr(), offsets.data_ptr())
    return (*shape, *parts, kernels.TYPES[dtype], grids.data_ptr())


def check_parts(
    shape: tuple[int, int],
    masks: torch.Tensor,
    codes: torch.Tensor,
    offsets: torch.Tensor,
    grids: torch.Tensor,
) -> None:
    """Check the sizes and types of the parts of a `QuantizedTiles`, in a time that does not depend on them.

    Raises:
        ValueError: One has the wrong shape, type or device.
    """
    rows, columns = shape
    blocks, tiles = -(-rows // ROWS), -(-columns // COLUMNS)
    if not (
        masks.shape == (blocks, tiles, ROWS, COLUMNS // 8)
        and masks.dtype == torch.uint8
        and codes.ndim == 1
        and PADDING <= codes.shape[0] <= rows * columns + PADDING
        and codes.dtype == torch.uint8
        and offsets.shape == (blocks + 1,)
        and offsets.dtype == torch.int64
        and grids.shape == (blocks, tiles, ROWS)
        and grids.dtype == torch.int32
        and masks.device == codes.device == offsets.device == grids.device
        and masks.is_contiguous()
        and codes.is_contiguous()
        and offsets.is_contiguous()
        and grids.is_contiguous()
    ):
        raise ValueError(
            f"these are no quantised tiles of a matrix {rows} x {columns}: masks {tuple(masks.shape)} {masks.dtype}, "
            f"codes {tuple(codes.shape)} {codes.dtype}, offsets {tuple(offsets.shape)} {offsets.dtype}, grids "
            f"{tuple(grids.shape)} {grids.dtype}. Make them with QuantizedTiles.pack."
        )
