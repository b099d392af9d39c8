"""What a method returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Solution:
    """A pruned weight.

    Attributes:
        weight: `[rows, in_features]` fp32, exactly zero where `mask` is false.
        mask: Boolean `[rows, in_features]`, true where a weight was kept.
        damping: Fraction of the mean diagonal that was added to the Hessian, or `None` if the method has none.
        residual: How far an iterative method was from convergence when it stopped, or `None` if it does not iterate.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    damping: float | None = None
    residual: float | None = None
