"""`Tiles`: a sparse matrix in the order in which the kernels read it, without loss."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch.nn import functional as F

from . import kernels

ROWS, COLUMNS = 8, 32  # of a tile
PADDING = 32  # values after the last one that a kernel may read: 64 bytes, or more

# How many bits are set in each byte, and the bits of each byte, lowest first.
_BITS = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1


@dataclass(frozen=True, eq=False)
class Tiles:
    """The non-zero weights of a matrix `[rows, columns]`, in tiles of 8 rows and 32 columns.

    The last tiles are padded with zeros. Tiles follow each other along a block of 8 rows, and in a tile the rows. A
    weight is stored unless all of its bits are zero, so that -0.0 and NaN survive. Half of the weights of a bfloat16
    matrix and a bit for each take 0.56 of its bytes.

    Attributes:
        shape: `(rows, columns)`.
        masks: `[blocks, tiles, 8, 4]` uint8; bit j % 8 of byte j // 8 is set if column j of the row is stored.
        values: `[stored + 32]`; the last 32 are zeros.
        offsets: `[blocks + 1]` int64; the stored values before each block, and in all.

    Args:
        checked: Whether it is known that the bits of the masks are as many as offsets and values say; to see it takes
            as long as a product.

    Raises:
        ValueError: The parts do not belong together.
        TypeError: The values are not bfloat16, float16 or float32.
    """

    shape: tuple[int, int]
    masks: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        check_parts(self.shape, self.masks, self.values, self.offsets)
        if not (checked or self._consistent()):
            raise ValueError(
                "masks, values and offsets do not belong together: bits stand outside of the matrix, or the numbers "
                "of set bits are not those of the values. The data is corrupt: pack the weight again."
            )

    def _consistent(self) -> bool:
        stored = self.values.numel() - PADDING
        if compiled(self.masks):
            return kernels.EXTENSION.tiles_check(*self.arguments(), stored, kernels.threads())
        return parts_fit(self.shape, self.masks, self.offsets, stored)

    def arguments(self) -> tuple[int, ...]:
        """What the functions of the extension take first."""
        return arguments(self.shape, self.masks, self.values, self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.masks.nbytes + self.values.nbytes + self.offsets.nbytes

    @property
    def sparsity(self) -> float:
        """The part of the weights that is not stored."""
        return 1 - (self.values.numel() - PADDING) / (self.shape[0] * self.shape[1])

    @classmethod
    def pack(cls, weight: torch.Tensor) -> Tiles:
        """Pack a dense weight.

        Args:
            weight: `[rows, columns]` bfloat16, float16 or float32, of any strides, on any device.
        """
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"a weight has two dimensions, none of them zero; got the shape {tuple(weight.shape)}.")
        _check_dtype(weight.dtype)
        weight = weight.detach().contiguous()
        rows, columns = weight.shape
        blocks, tiles = -(-rows // ROWS), -(-columns // COLUMNS)
        if not compiled(weight):
            return cls((rows, columns), *_pack_in_torch(weight, blocks, tiles))
        masks = weight.new_empty(blocks, tiles, ROWS, 4, dtype=torch.uint8)
        offsets = weight.new_empty(blocks + 1, dtype=torch.int64)
        empty = weight.new_empty(0)
        threads = kernels.threads()
        matrix = arguments((rows, columns), masks, empty, offsets)
        kernels.EXTENSION.tiles_mask(*matrix, weight.data_ptr(), threads)
        values = weight.new_zeros(int(offsets[-1]) + PADDING)
        matrix = arguments((rows, columns), masks, values, offsets)
        kernels.EXTENSION.tiles_fill(*matrix, weight.data_ptr(), threads)
        return cls((rows, columns), masks, values, offsets)

    def unpack(self) -> torch.Tensor:
        """The dense weight `[rows, columns]`, equal to the one packed in every bit."""
        return unpack(self.shape, self.masks, self.values, self.offsets, self.values.new_empty(self.shape))


def unpack(
    shape: tuple[int, int],
    masks: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    first: int = 0,
) -> torch.Tensor:
    """Write rows of the dense weight whose `Tiles` these are.

    Args:
        shape: Of the whole weight; it and the other parts are as in `Tiles`.
        masks: Its masks.
        values: Its values.
        offsets: Its offsets.
        out: `[rows, columns]`, contiguous: takes the rows from `first` on. Ends with a tile or with the weight.
        first: A multiple of the rows of a tile.

    Returns:
        `out`.
    """
    last = first + out.shape[0]
    if compiled(values):
        matrix = arguments(shape, masks, values, offsets)
        kernels.EXTENSION.tiles_unpack(*matrix, kernels.number(), first, last, out.data_ptr(), kernels.threads())
        return out
    bits = unpack_bits(masks[first // ROWS : -(-last // ROWS)])
    dense = values.new_zeros(bits.shape).masked_scatter_(bits.bool(), values[int(offsets[first // ROWS]) :])
    dense = dense.transpose(1, 2).reshape(bits.shape[0] * ROWS, -1)
    return out.copy_(dense[: last - first, : shape[1]])


def arguments(
    shape: tuple[int, int], masks: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor
) -> tuple[int, ...]:
    """What the functions of the extension take first; the tensors must outlive the call."""
    return (*shape, masks.data_ptr(), values.data_ptr(), offsets.data_ptr(), kernels.TYPES[values.dtype], 0)


def packed_bytes(shape: tuple[int, int], stored: int, itemsize: int) -> int:
    """What the `Tiles` of a matrix take that has so many weights to store."""
    blocks, tiles = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    return blocks * tiles * ROWS * COLUMNS // 8 + (stored + PADDING) * itemsize + 8 * (blocks + 1)


def check_parts(shape: tuple[int, int], masks: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> None:
    """Check the sizes and types of the parts of a `Tiles`, in a time that does not depend on them.

    Raises:
        ValueError: One has the wrong shape, type or device.
        TypeError: The values are of a type that cannot be packed.
    """
    rows, columns = shape
    blocks = -(-rows // ROWS)
    _check_dtype(values.dtype)
    if not (
        masks.shape == (blocks, -(-columns // COLUMNS), ROWS, 4)
        and masks.dtype == torch.uint8
        and offsets.shape == (blocks + 1,)
        and offsets.dtype == torch.int64
        and values.ndim == 1
        and PADDING <= values.shape[0] <= rows * columns + PADDING
        and masks.device == values.device == offsets.device
        and masks.is_contiguous()
        and values.is_contiguous()
        and offsets.is_contiguous()
    ):
        raise ValueError(
            f"these are no tiles of a matrix {rows} x {columns}: masks {tuple(masks.shape)} {masks.dtype}, "
            f"values {tuple(values.shape)}, offsets {tuple(offsets.shape)} {offsets.dtype}. Make them with Tiles.pack."
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in kernels.TYPES:
        raise TypeError(f"weights of {dtype} cannot be packed: they must be {', '.join(map(str, kernels.TYPES))}.")


def compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernels work on it."""
    return tensor.device.type == "cpu" and kernels.compiled()


def unpack_bits(masks: torch.Tensor) -> torch.Tensor:
    """The bits of some masks `[blocks, tiles, 8, bytes]`: `[blocks, tiles, 8, 8 * bytes]` uint8."""
    return _BITS.to(masks.device)[masks.int()].flatten(-2)


def pack_bits(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and offsets of what is stored, `[blocks, tiles, 8, columns]`."""
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=stored.device)
    masks = (stored.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)
    return masks, F.pad(stored.sum(dim=(1, 2, 3), dtype=torch.int64).cumsum(0), (1, 0))


def parts_fit(shape: tuple[int, int], masks: torch.Tensor, offsets: torch.Tensor, stored: int) -> bool:
    """Whether masks and offsets belong together, no bit stands outside of the matrix, and so many are stored."""
    bits = unpack_bits(masks)
    rows, columns = shape
    counts = bits.sum(dim=(1, 2, 3), dtype=torch.int64)
    expected = F.pad(counts.cumsum(0), (1, 0))
    inside = bits.transpose(1, 2).flatten(0, 1).flatten(1)
    outside = inside[rows:].any() | inside[:, columns:].any()
    return bool(torch.equal(expected, offsets) and expected[-1] == stored and not outside)


def _pack_in_torch(weight: torch.Tensor, blocks: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks, values and offsets of a dense weight."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, tiles * COLUMNS - columns, 0, blocks * ROWS - rows))
    tiled = padded.view(blocks, ROWS, tiles, COLUMNS).transpose(1, 2).contiguous()
    stored = tiled.view(torch.int32 if weight.dtype == torch.float32 else torch.int16) != 0
    masks, offsets = pack_bits(stored)
    return masks, F.pad(tiled[stored], (0, PADDING)), offsets
