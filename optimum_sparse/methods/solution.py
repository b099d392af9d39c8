"""What a method returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from ..quantization import Grid


@dataclass(frozen=True)
class Solution:
    """A pruned weight.

    Attributes:
        weight: `[rows, in_features]` fp32, exactly zero where `mask` is false.
        mask: Boolean `[rows, in_features]`, true where a weight was kept. Quantised, it may have become zero.
        damping: Fraction of the mean diagonal that was added to the Hessian, or `None` if the method has none.
        residual: How far an iterative method was from convergence when it stopped, or `None` if it does not iterate.
        grid: What the weight was rounded to, or `None`.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    damping: float | None = None
    residual: float | None = None
    grid: Grid | None = None

    def gathered(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """That of all rows, of which several processes have some each; `gather` is as in `SharedRows`."""
        grid = self.grid
        if grid is not None:
            grid = replace(grid, scale=gather(grid.scale), zero=gather(grid.zero))
        return replace(self, weight=gather(self.weight), mask=gather(self.mask), grid=grid)
