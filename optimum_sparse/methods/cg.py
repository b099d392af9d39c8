"""Masked conjugate gradients: the best values for the weights that a mask keeps."""

from __future__ import annotations

import torch

from ..precision import product_dtype
from ..statistics import GramStatistics


def unit_gram(statistics: GramStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """The Gram matrix of the inputs when each feature is scaled to norm 1, which no channel can dominate.

    Features that were always zero have norm 0 and zero rows. If all were, all norms are 1: the weights then decide.

    Returns:
        The scaled Gram matrix, `[in, in]` fp32, and the norms, `[in]` fp32.
    """
    norms = statistics.squared_norms.sqrt()
    inverse = inverse_norms(norms)
    gram = (statistics.gram * inverse).mul_(inverse[:, None])
    return gram, norms if norms.any() else torch.ones_like(norms)


def inverse_norms(norms: torch.Tensor) -> torch.Tensor:
    """1 / norm, and 0 for features of norm 0."""
    return torch.where(norms > 0, 1 / norms, 0)


def conjugate_gradients(
    deviation: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, damping: float, rounds: int, steps: int
) -> torch.Tensor:
    """Minimise D (G + damping I) D^T of each row over the entries of D that the mask keeps; the others are fixed.

    Each round takes the residual with the Gram matrix as it is given, and improves on it by conjugate gradients whose
    matrix products may be rounded to bfloat16. A row whose undamped error D G D^T did not fall stays as it was.

    Args:
        deviation: D = target - weight in units of `gram`, `[rows, in]` fp32.
        mask: `[rows, in]`, true where the weight may change, or 1, which a CPU multiplies faster.
        gram: G with unit diagonal, `[in, in]`, in fp32, or in `product_dtype` if the residual may be rounded as well.
        damping: What is added to the diagonal, which keeps the weights near the target.
        rounds: So many rounds.
        steps: Steps of a round, each a product of the size of `deviation @ gram`.
    """
    rounded = gram.to(product_dtype(gram.device))
    product = _times(deviation, gram)
    error = (product * deviation).sum(dim=1, keepdim=True)
    for _ in range(rounds):
        residual = torch.add(product, deviation, alpha=damping).neg_().mul_(mask)
        candidate = deviation + _steps(residual, mask, rounded, damping, steps)
        product_then = _times(candidate, gram)
        error_then = (product_then * candidate).sum(dim=1, keepdim=True)
        better = error_then < error
        deviation = torch.where(better, candidate, deviation)
        product = torch.where(better, product_then, product)
        error = torch.where(better, error_then, error)
    return deviation


def _steps(residual: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, damping: float, steps: int) -> torch.Tensor:
    """Steps of conjugate gradients from zero for all rows at once; `residual` is overwritten.

    Args:
        residual: Right-hand side, `[rows, in]`, zero where the mask is.
        mask: Entries that may change.
        gram: `[in, in]` in the dtype to multiply in.
        damping: Added to its diagonal.
        steps: Number of steps.
    """
    solution = torch.zeros_like(residual)
    direction = residual.clone()
    squared = residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = _times(direction, gram).add_(direction, alpha=damping).mul_(mask)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where(curvature > 0, squared / curvature, 0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        squared, previous = residual.square().sum(dim=1, keepdim=True), squared
        direction.mul_(torch.where(previous > 0, squared / previous, 0)).add_(residual)
    return solution


def _times(rows: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Their product in the dtype of the Gram matrix, as fp32."""
    return (rows.to(gram.dtype) @ gram).float()
