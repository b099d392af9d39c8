"""Quantisation grids: the few values that the weights of a group may take, 0 among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from .config import SparseConfig
from .saving import write_tensors

# Ranges that are tried for a group, relative to that of its weights: cutting off the largest makes the steps smaller.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a matrix may take: scale * (code - zero), rounded to the dtype of the weight.

    Scales are bfloat16, so that before this last rounding the products are exact in fp32, on any machine.

    Attributes:
        scale: `[rows, groups]` bfloat16, positive.
        zero: `[rows, groups]` uint8, the code of 0.
        bits: Codes are whole numbers from 0 to 2^bits - 1.
        group_size: How many consecutive inputs of an output share a scale, -1 for all. The last group may have fewer.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights of some codes, `[rows, in_features]`, in fp32: not yet rounded to a model's dtype."""
        scale, zero = self._of_inputs(codes.shape[1])
        return scale * (codes - zero)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The value nearest to each weight, `[rows, in_features]` fp32."""
        return _round(weight.float(), *self._of_inputs(weight.shape[1]), self.bits)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The code of each weight, `[rows, in_features]` uint8.

        Args:
            weight: `[rows, in_features]` in the dtype of the model.

        Raises:
            ValueError: Some weights are not on the grid.
        """
        scale, zero = self._of_inputs(weight.shape[1])
        # The nearest code gives the same value back: it is no farther away than the one that the weight was made from.
        # But not always if that is a power of two, below which numbers are twice as dense as above.
        codes = _codes(weight.float(), scale, zero, self.bits)
        off = (scale * (codes - zero)).to(weight.dtype) != weight
        codes = torch.where(off, codes + weight.sign(), codes).clamp_(0, 2**self.bits - 1)
        wrong = int(((scale * (codes - zero)).to(weight.dtype) != weight).sum())
        if wrong:
            raise ValueError(f"{wrong} of {weight.numel()} weights are not on the grid of {self.bits} bits")
        return codes.to(torch.uint8)

    def to(self, device: torch.device | str) -> Self:
        """The same grid on another device."""
        return replace(self, scale=self.scale.to(device), zero=self.zero.to(device))

    def scaled(self, factor: torch.Tensor) -> Self:
        """The grid of weights that are multiplied by a factor, `[rows, 1]`, as nearly as scales can be.

        What is to be on it has the same codes as before.
        """
        return replace(self, scale=(self.scale * factor).to(self.scale.dtype))

    def split(self, rows: Sequence[int]) -> list[Self]:
        """The grids of stacked matrices."""
        parts = zip(self.scale.split(list(rows)), self.zero.split(list(rows)), strict=True)
        return [replace(self, scale=scale, zero=zero) for scale, zero in parts]

    def _of_inputs(self, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of each input, `[rows, in_features]` fp32."""
        size = in_features if self.group_size == -1 else self.group_size
        group = torch.arange(in_features, device=self.scale.device) // size
        return self.scale.float()[:, group], self.zero.float()[:, group]


class Rounding:
    """Rounds the weights of a matrix to grids that are found on the way, column by column or all at once.

    Args:
        weight: `[rows, in_features]` fp32, as it is before anything is rounded.
        config: Bits, groups, and whether grids are symmetric.
    """

    def __init__(self, weight: torch.Tensor, config: SparseConfig) -> None:
        assert config.quantization and config.group_size
        self._weight = weight
        self._bits = int(config.quantization.removeprefix("int"))
        self._group_size = config.group_size
        self._symmetric = config.symmetric
        rows, in_features = weight.shape
        self._size = in_features if config.group_size == -1 else config.group_size
        self._scale = weight.new_ones(-(-in_features // self._size), rows)
        self._zero = torch.zeros_like(self._scale)

    def enter(self, columns: torch.Tensor, start: int, count: int) -> None:
        """Find the grids of the groups that begin among some columns.

        Args:
            columns: `[columns, rows]`, the weights as they are now. What a group has behind them counts as it was.
            start: Which input the first of them is.
            count: How many of the columns may be the first of a group.
        """
        stop = start + len(columns)
        for group in range(-(-start // self._size), -(-(start + count) // self._size)):
            first, last = group * self._size, (group + 1) * self._size
            values = torch.cat([columns[first - start : last - start], self._weight[:, stop:last].T])
            self._scale[group], self._zero[group] = _find(values, self._bits, self._symmetric)

    def column(self, weights: torch.Tensor, index: int, start: int = 0) -> torch.Tensor:
        """The value nearest to each weight of a column, `[rows]`, whose grid has been found.

        Args:
            weights: The column.
            index: Which input it is, counted from `start`.
            start: As of `enter`.
        """
        group = (start + index) // self._size
        return _round(weights, self._scale[group], self._zero[group], self._bits)

    @property
    def grid(self) -> Grid:
        """The grids found."""
        scale, zero = self._scale.T.to(torch.bfloat16), self._zero.T.to(torch.uint8)
        return Grid(scale.contiguous(), zero.contiguous(), self._bits, self._group_size)


def joint_rounding(weight: torch.Tensor, config: SparseConfig) -> Rounding | None:
    """What a sweep that prunes rounds with: nothing, unless its solution is the last word on the weights."""
    return Rounding(weight, config) if config.quantization and not config.refine else None


def write_grids(path: Path, grids: Mapping[str, Grid]) -> None:
    """Write the grids of a model to a safetensors file: `NAME.scale` and `NAME.zero` for each matrix.

    Args:
        path: The file; its folder is made if it is not there.
        grids: By the names of the matrices, all with the same bits and group size.
    """
    tensors = {f"{name}.scale": grid.scale for name, grid in grids.items()}
    tensors |= {f"{name}.zero": grid.zero for name, grid in grids.items()}
    kinds = {(grid.bits, grid.group_size) for grid in grids.values()}
    (bits, group_size), *others = kinds
    assert not others
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, tensors, {"bits": str(bits), "group_size": str(group_size)})


def read_grids(path: Path) -> dict[str, Grid]:
    """The grids in a file of `write_grids`, by the names of the matrices.

    Raises:
        OSError: There is no such file.
        ValueError: It is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            bits, group_size = (int(file.metadata()[key]) for key in ("bits", "group_size"))
            if not (2 <= bits <= 8 and (group_size == -1 or group_size >= 1)):
                raise ValueError(f"{bits} bits and groups of {group_size} are not possible")
            names = [key.removesuffix(".scale") for key in file.keys() if key.endswith(".scale")]  # noqa: SIM118
            return {
                name: Grid(file.get_tensor(f"{name}.scale"), file.get_tensor(f"{name}.zero"), bits, group_size)
                for name in names
            }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the grids of quantised weights ({error}).") from error


def _find(values: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of least squared error for each group, among those whose range is that of the weights or less.

    Args:
        values: `[weights, groups]` fp32.
        bits: Of a code.
        symmetric: Whether the code of 0 is the one in the middle.

    Returns:
        Scale and zero, `[groups]` fp32.
    """
    low, high = values.amin(dim=0).clamp(max=0), values.amax(dim=0).clamp(min=0)
    if symmetric:
        span, steps = torch.maximum(high, -low), 2 ** (bits - 1) - 1
    else:
        span, steps = high - low, 2**bits - 1
    best = torch.ones_like(span), torch.zeros_like(span)
    least = torch.full_like(span, torch.inf)
    for shrink in SHRINK:
        scale = (shrink * span / steps).to(torch.bfloat16).float()
        scale = torch.where(scale > 0, scale, 1)  # a group of zeros
        zero = (
            torch.full_like(scale, 2 ** (bits - 1))
            if symmetric
            else (-shrink * low / scale).round().clamp(max=2**bits - 1)
        )
        error = (_round(values, scale, zero, bits) - values).square_().sum(dim=0)
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.minimum(error, least)
    return best


def _codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def _round(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return _codes(weight, scale, zero, bits).sub_(zero).mul_(scale)
