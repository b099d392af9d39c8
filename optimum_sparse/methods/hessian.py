"""The damped Hessian of a layer and its factors."""

from __future__ import annotations

import torch

from ..statistics import GramStatistics

# Damping is raised tenfold until the factorisation succeeds, up to this fraction of the mean diagonal.
MAX_DAMPING = 1.0


def damped_hessian(statistics: GramStatistics, dampening_frac: float) -> torch.Tensor:
    """The Gram matrix plus `dampening_frac` times its mean diagonal, `[in, in]` float64.

    Input features that were always zero do not count in the mean.
    """
    hessian = statistics.gram.double()
    diagonal = hessian.diagonal()
    mean = diagonal.sum() / (diagonal > 0).sum()
    # If no input was ever non-zero, any damping gives the same result: the largest weights are kept.
    diagonal += dampening_frac * torch.where(mean > 0, mean, 1.0)
    return hessian


def reversed_cholesky(statistics: GramStatistics, dampening_frac: float) -> tuple[torch.Tensor, float]:
    """Factor the damped Hessian as U U^T with U upper triangular.

    U is the inverse of the factor R of SparseGPT's H^-1 = R^T R, so neither the inverse nor its factor is formed: one
    factorisation of n^3/3 operations instead of 4n^3/3.

    Args:
        statistics: Statistics of the layer's inputs.
        dampening_frac: Damping to try first, as a fraction of the mean diagonal.

    Returns:
        U, `[in, in]` fp32, and the damping that it took.

    Raises:
        ValueError: The Hessian cannot be factored even with full damping.
    """
    while True:
        hessian = damped_hessian(statistics, dampening_frac)
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return factor.flip(0, 1).float(), dampening_frac
        if dampening_frac >= MAX_DAMPING:
            raise ValueError(
                f"the Hessian of its inputs ({statistics.num_tokens} tokens) is not positive definite even with "
                f"dampening_frac={dampening_frac:g}: calibrate on more or other data, or choose method='wanda'"
            )
        dampening_frac = min(10 * dampening_frac, MAX_DAMPING)
