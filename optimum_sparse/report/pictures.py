"""Pieces of pruned matrices, small enough to be kept in a report and looked at."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# A piece has at most so many rows and columns; whole groups of every common N:M pattern.
ROWS, COLUMNS = 64, 128
# So many kinds of matrices have a picture, one each.
MOST_PICTURES = 8
LEVELS = 127


class Matrix(Protocol):
    """A pruned matrix, as its picture needs to see it."""

    @property
    def name(self) -> str:
        """Module name."""

    @property
    def pattern(self) -> object:
        """What was asked for; reads as `"N:M"` if it is N:M."""

    def read(self) -> torch.Tensor:
        """The weights, `[out_features, in_features]`."""


@dataclass(frozen=True)
class Picture:
    """The upper left corner of a matrix.

    Attributes:
        name: Module name of the matrix.
        pattern: `"N:M"`, or the sparsity asked for if unstructured.
        rows: Outputs shown.
        columns: Inputs shown.
        scale: The weight that level 127 stands for.
        levels: The weights in steps of `scale / 127`, as signed bytes row by row, in base64. 0 is a pruned weight and
            nothing else: those that would round to it are 1 or -1, and those beyond the scale 127 or -127.
    """

    name: str
    pattern: str
    rows: int
    columns: int
    scale: float
    levels: str


def take_pictures(matrices: Sequence[Matrix]) -> list[Picture]:
    """A picture of one matrix of each kind, from the middle of the model; kinds have names that differ in numbers."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(re.sub(r"\d+", "*", matrix.name), []).append(matrix)
    return [take_picture(alike[len(alike) // 2]) for alike in list(kinds.values())[:MOST_PICTURES]]


def take_picture(matrix: Matrix) -> Picture:
    """A picture of one matrix, with the weights it has now."""
    corner = matrix.read()[:ROWS, :COLUMNS].float().cpu()
    # Outliers are cut off, or all others would look alike.
    scale = max(corner.abs().flatten().quantile(0.99).item(), corner.abs().max().item() / LEVELS)
    levels = (corner * (LEVELS / scale if scale else 0.0)).round().clamp(-LEVELS, LEVELS)
    levels = levels.where((levels != 0) | (corner == 0), corner.sign())
    packed = base64.b64encode(levels.char().numpy().tobytes()).decode()
    rows, columns = corner.shape
    return Picture(matrix.name, str(matrix.pattern), rows, columns, scale, packed)
