"""Lossless packed forms of a sparse tensor: its values, and in few bits where they are.

A value is whatever is not +0.0 bit by bit: a weight that is -0.0 or NaN comes back as it was. There are two forms.

- `"bitmask"`: the values in row-major order, and one bit for each weight.
- `"N:M"`: N values for every M consecutive inputs, and for each such group the number of its mask among the masks with
  N of M bits set. That takes `ceil(log2(C(M, N)))` bits a group: 3 for 2:4, where two positions of 2 bits each would
  take 4, no less than a bitmask; and 7 for 4:8, where they would take 12, more than a bitmask. All rows have the same
  number of values, so that any of them can be found without counting.

docs/packing.md specifies both to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .config import split_pattern

# What stands beside the values of a tensor NAME, as NAME + suffix; the values are called NAME themselves.
POSITIONS, LAYOUT = "_positions", "_layout"

# Weights of one step of packing or unpacking: what it needs besides its result stays in the cache. A multiple of 8.
_CHUNK = 1 << 16
# What there is to know of a group of M is looked up in a table of 2^M, and the codes of 8 groups fit in 64 bits.
_LARGEST_GROUP = 8
# No tensor has as many dimensions or weights: whoever claims more would make torch overflow.
_MOST_DIMENSIONS, _MOST_WEIGHTS = 8, 1 << 48
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in packed form, checked when it is made: what unpacks it need not check again.

    Attributes:
        values: `[num_values]`, of the type of the tensor, on the CPU.
        positions: `[num_bytes]` uint8: bit i (from the lowest bit of the first byte on) says whether weight i is among
            the values, or the numbers of the masks of all groups, one behind the other.
        shape: Shape of the tensor.
        form: `"bitmask"` or `"N:M"` with M up to 8.
        transposed: For N:M: the tensor is `[..., in_features, out_features]`, and groups and values run along its last
            dimension but one.

    Raises:
        ValueError: The parts do not fit together. Nothing as large as the tensor has been allocated.
    """

    values: torch.Tensor
    positions: torch.Tensor
    shape: tuple[int, ...]
    form: str = "bitmask"
    transposed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= _MOST_DIMENSIONS or min(self.shape) < 0:
            raise ValueError(f"the shape {list(self.shape)[:9]} is none of 1 to {_MOST_DIMENSIONS} dimensions.")
        if math.prod(max(size, 1) for size in self.shape) > _MOST_WEIGHTS:
            raise ValueError(f"the shape {list(self.shape)} is larger than any tensor.")
        if self.values.ndim != 1 or not self.values.is_floating_point():
            raise ValueError(
                f"the values are {_described(self.values)}: floating-point numbers in one dimension are needed."
            )
        if self.positions.ndim != 1 or self.positions.dtype != torch.uint8:
            raise ValueError(f"the positions are {_described(self.positions)}: uint8 in one dimension is needed.")
        num_values, num_bits = self._expected()
        if len(self.positions) != -(-num_bits // 8):
            raise ValueError(
                f"{len(self.positions)} bytes of positions do not fit the shape {list(self.shape)} in the form "
                f"{self.form}: that takes {-(-num_bits // 8)}."
            )
        if num_bits % 8 and int(self.positions[-1]) >> num_bits % 8:
            raise ValueError("the positions have bits set behind the last weight.")
        if num_values is None:
            num_values = sum(int(np.count_nonzero(bits)) for bits in _bits(self.positions.numpy(), num_bits))
        elif any(codes.max(initial=0) >= _num_masks(self.form) for codes in self._codes()):
            raise ValueError(f"a position is out of range: {self.form} has {_num_masks(self.form)} masks.")
        if len(self.values) != num_values:
            raise ValueError(f"there are {len(self.values)} values for {num_values} positions.")

    @classmethod
    def from_tensors(cls, values: torch.Tensor, positions: torch.Tensor, layout: torch.Tensor) -> Packed:
        """What `to_tensors` made tensors of.

        Raises:
            ValueError: They do not fit together.
        """
        if layout.dtype != torch.int64 or layout.ndim != 1 or not 4 <= len(layout) <= 3 + _MOST_DIMENSIONS:
            raise ValueError(
                f"the layout is {_described(layout)}: int64 [4] to [{3 + _MOST_DIMENSIONS}] is needed: N, M, whether "
                "it is transposed, and the shape."
            )
        n, m, transposed, *shape = layout.tolist()
        if transposed not in (0, 1) or ((n, m, transposed) != (0, 0, 0) and not 1 <= n < m <= _LARGEST_GROUP):
            raise ValueError(f"the layout begins with {n}, {m}, {transposed}: that is no form.")
        return cls(values, positions, tuple(shape), f"{n}:{m}" if m else "bitmask", bool(transposed))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to write to a file, by what is appended to the name of the tensor."""
        n, m = (0, 0) if self.form == "bitmask" else _split(self.form)
        layout = torch.tensor([n, m, self.transposed, *self.shape], dtype=torch.int64)
        return {"": self.values, POSITIONS: self.positions, LAYOUT: layout}

    @property
    def numel(self) -> int:
        """How many weights the tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.positions.nbytes

    def unpack(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self._scatter(self.values)

    def nonzero(self) -> torch.Tensor:
        """Which weights are not zero as numbers, bool, of the shape of the tensor; -0.0 and filled places are zero."""
        return self._scatter(self.values != 0)

    def _expected(self) -> tuple[int | None, int]:
        """How many values there have to be, if the form says so, and how many bits of positions."""
        if self.form == "bitmask":
            if self.transposed:
                raise ValueError("a bitmask is never transposed: its values are in the order of the tensor.")
            return None, self.numel
        n, m = _split(self.form)
        if len(self.shape) < 2 or self.shape[-2 if self.transposed else -1] % m:
            raise ValueError(f"the shape {list(self.shape)} cannot be divided into groups of {m} inputs.")
        groups = self.numel // m
        return groups * n, groups * _width(self.form)

    def _scatter(self, values: torch.Tensor) -> torch.Tensor:
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        result = torch.empty(shape, dtype=values.dtype)
        target, source = _integers(result), _integers(values)
        first = start = 0
        for bits in self._bits():
            places = np.flatnonzero(bits)
            chunk = target[first : first + bits.size]
            chunk.fill(0)
            chunk[places] = source[start : start + places.size]
            first, start = first + bits.size, start + places.size
        return result.mT.contiguous() if self.transposed else result

    def _bits(self) -> Iterator[np.ndarray]:
        """For each weight in the order of the values whether it is one of them, bool, a chunk at a time."""
        if self.form == "bitmask":
            return _bits(self.positions.numpy(), self.numel)
        return (_masks(self.form).take(codes).view(bool) for codes in self._codes())

    def _codes(self) -> Iterator[np.ndarray]:
        """The numbers of the masks, uint8, a chunk of groups at a time."""
        width, groups = _width(self.form), self.numel // _split(self.form)[1]
        content = self.positions.numpy()
        for start in range(0, groups, _CHUNK // 8):
            count = min(_CHUNK // 8, groups - start)
            stream = content[start // 8 * width : -(-(start + count) * width // 8)]
            yield _from_stream(stream, width, count)


def pack(weight: torch.Tensor, form: str = "bitmask", transposed: bool = False) -> Packed:
    """Pack a tensor without loss.

    Args:
        weight: Any floating-point tensor of at least one dimension; two for N:M.
        form: `"bitmask"`, or `"N:M"` with M up to 8.
        transposed: For N:M: `weight` is `[..., in_features, out_features]`, so groups run along its last dimension but
            one.

    Raises:
        ValueError: `weight` is no such tensor, or not N:M.
    """
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.ndim == 0:
        raise ValueError(f"Only floating-point tensors with dimensions can be packed, got {_described(weight)}.")
    weight = weight.detach().cpu()
    shape = tuple(weight.shape)
    if form == "bitmask":
        return Packed(*_pack_bitmask(weight.contiguous()), shape)
    _, m = _split(form)
    if weight.ndim < 2 or shape[-2 if transposed else -1] % m:
        raise ValueError(f"A tensor of shape {list(shape)} cannot be divided into groups of {m} inputs.")
    rows = weight.mT.contiguous() if transposed else weight.contiguous()
    return Packed(*_pack_groups(rows, form), shape, form, transposed)


def smallest(weight: torch.Tensor, patterns: Iterable[tuple[str, bool]] = ()) -> Packed | None:
    """Pack a tensor in the form that takes the fewest bytes, or `None` if that is no less than as it is.

    Args:
        weight: A floating-point tensor.
        patterns: The N:M patterns that it may satisfy, each with whether it is `transposed`.
    """
    forms: list[tuple[str, bool]] = [("bitmask", False)]
    num_values = int(np.count_nonzero(_integers(weight.detach().cpu().contiguous())))
    bits = [num_values * 8 * weight.element_size() + weight.numel()]
    for pattern, transposed in dict.fromkeys(patterns):
        if satisfies(weight, pattern, transposed):
            n, m = split_pattern(pattern)
            forms.append((pattern, transposed))
            bits.append(weight.numel() // m * (n * 8 * weight.element_size() + _width(pattern)))
    least, (form, transposed) = min(zip(bits, forms, strict=True))
    return pack(weight, form, transposed) if least < 8 * weight.nbytes else None


def satisfies(weight: torch.Tensor, pattern: str, transposed: bool = False) -> bool:
    """Whether `weight` can be packed in the form `pattern` ("N:M")."""
    _, m = split_pattern(pattern)
    if m > _LARGEST_GROUP or weight.ndim < 2 or weight.shape[-2 if transposed else -1] % m:
        return False
    weight, step = weight.detach().cpu(), _step(pattern)
    flat = _integers((weight.mT if transposed else weight).contiguous())
    chunks = (flat[start : start + step] for start in range(0, flat.size, step))
    return all((_codes_of(chunk, pattern) != _NO_CODE).all() for chunk in chunks)


def _pack_bitmask(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = _integers(weight)
    values = torch.empty(int(np.count_nonzero(flat)), dtype=weight.dtype)
    positions = torch.empty(-(-flat.size // 8), dtype=torch.uint8)
    target, start = _integers(values), 0
    for first in range(0, flat.size, _CHUNK):
        chunk = flat[first : first + _CHUNK]
        bits = chunk != 0
        packed = np.packbits(bits, bitorder="little")
        positions.numpy()[first // 8 : first // 8 + packed.size] = packed
        places = np.flatnonzero(bits)
        target[start : start + places.size] = chunk[places]
        start += places.size
    return values, positions


def _pack_groups(rows: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    flat, (n, m), width = _integers(rows), _split(form), _width(form)
    values = torch.empty(flat.size // m * n, dtype=rows.dtype)
    positions = torch.empty(-(-(flat.size // m * width) // 8), dtype=torch.uint8)
    target, content = _integers(values), positions.numpy()
    start = byte = 0
    for first in range(0, flat.size, _step(form)):
        chunk = flat[first : first + _step(form)]
        codes = _codes_of(chunk, form)
        if (codes == _NO_CODE).any():
            raise ValueError(f"The tensor is not {form}: a group of {m} inputs has more than {n} values.")
        stream = _to_stream(codes, width)
        places = np.flatnonzero(_masks(form).take(codes).view(bool))
        content[byte : byte + stream.size] = stream
        target[start : start + places.size] = chunk[places]
        byte, start = byte + stream.size, start + places.size
    return values, positions


def _bits(content: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The first `count` bits as bool, a chunk at a time."""
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        yield np.unpackbits(content[start // 8 : -(-(start + size) // 8)], count=size, bitorder="little").view(bool)


def _to_stream(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes of `width` bits one behind the other, as bytes: each 8 of them are `width` bytes of a 64-bit word."""
    columns = np.pad(codes, (0, -codes.size % 8)).reshape(-1, 8).astype("<u8")
    words = columns[:, 0].copy()
    for place in range(1, 8):
        words |= columns[:, place] << np.uint64(place * width)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)[: -(-codes.size * width // 8)]


def _from_stream(stream: np.ndarray, width: int, count: int) -> np.ndarray:
    """The first `count` codes of what `_to_stream` gave."""
    words = np.zeros((-(-count // 8), 8), np.uint8)
    words[:, :width] = np.pad(stream, (0, -stream.size % width)).reshape(-1, width)
    columns = words.view("<u8") >> np.arange(0, 8 * width, width, dtype=np.uint64) & np.uint64((1 << width) - 1)
    return columns.astype(np.uint8).reshape(-1)[:count]


_NO_CODE = 255


def _codes_of(chunk: np.ndarray, form: str) -> np.ndarray:
    """The codes of whole groups of weights, uint8; `_NO_CODE` for a group with too many values."""
    bits = (chunk != 0).view(np.uint8).reshape(-1, _split(form)[1])
    masks = bits[:, 0].copy()
    for place in range(1, bits.shape[1]):
        masks |= bits[:, place] << np.uint8(place)
    return _code_table(form).take(masks)


@lru_cache
def _masks(form: str) -> np.ndarray:
    """The masks with N of M bits set `[C(M, N)]`, each as M bytes, in the order of the numbers that they are."""
    n, m = _split(form)
    bits = _all_masks(m)
    return bits[bits.sum(axis=1) == n].view(f"V{m}").reshape(-1)


@lru_cache
def _code_table(form: str) -> np.ndarray:
    """The code of each mask of M bits `[2^M]`; one with less than N is filled up with its lowest free places."""
    n, m = _split(form)
    bits = _all_masks(m)
    lacking = n - bits.sum(axis=1)
    filled = bits | ~bits & (np.cumsum(~bits, axis=1) <= lacking[:, None])
    numbers = filled @ (1 << np.arange(m))
    codes = np.searchsorted(np.flatnonzero(lacking == 0), numbers)
    return np.where(lacking < 0, _NO_CODE, codes).astype(np.uint8)


def _all_masks(m: int) -> np.ndarray:
    return (np.arange(1 << m)[:, None] >> np.arange(m) & 1).astype(bool)


def _split(form: str) -> tuple[int, int]:
    n, m = split_pattern(form)
    if m > _LARGEST_GROUP:
        raise ValueError(f"{form} cannot be packed: groups have up to {_LARGEST_GROUP} weights. Use a bitmask.")
    return n, m


def _num_masks(form: str) -> int:
    n, m = _split(form)
    return math.comb(m, n)


def _width(form: str) -> int:
    """Bits of a code."""
    return (_num_masks(form) - 1).bit_length()


def _step(form: str) -> int:
    """Weights of a chunk of whole groups, whose codes fill whole bytes."""
    return _CHUNK // 8 * _split(form)[1]


def _integers(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a contiguous tensor as integers, in one dimension and the same memory."""
    flat = tensor.reshape(-1)
    return (flat if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])).numpy()


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
