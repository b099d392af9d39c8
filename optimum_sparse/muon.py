"""Muon: steps along an orthogonalised momentum (Jordan et al., 2024), here of the weights that a mask keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .precision import product_dtype

MOMENTUM = 0.8
# Of the iteration s -> a s + b s^3 + c s^5, which brings any singular value in (0, 1] close to 1 in a few rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all made about 1, so that no direction of a matrix waits for the others.

    Unlike `torch.optim.Muon` it changes kept weights only, takes stacks of matrices, and multiplies in the dtype that
    the hardware is fast in: in bfloat16 a step takes 15 times as long on a CPU without instructions for it.

    Args:
        groups: One for each parameter, `[..., rows, columns]` fp32, with `"lr"`, the root mean square of a step, and
            `"kept"`, a mask of the parameter's shape.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "kept": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all parameters that have a gradient; those of pruned weights must be zero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                    step = orthogonalized(parameter.grad.lerp(momentum, MOMENTUM))
                    # Of an orthogonal matrix, the root mean square is one over the square root of the longer side.
                    size = group["lr"] * math.sqrt(max(parameter.shape[-2:]))
                    parameter.addcmul_(step, group["kept"], value=-size)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T, for matrices with the singular value decomposition U S V^T.

    Args:
        matrix: `[..., rows, columns]` fp32; one that is zero stays so.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    norm = torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    wide = (wide / norm).to(product_dtype(matrix.device))
    for _ in range(ROUNDS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return (wide.mT if tall else wide).to(matrix.dtype)
