"""The factor and the inverse of a layer's damped Hessian."""

from __future__ import annotations

import torch

from ..statistics import GramStatistics
from .threads import one_thread

# Damping is raised tenfold until the factorisation succeeds, up to this fraction of the mean diagonal.
MAX_DAMPING = 1.0
# Columns that are factored at once: wide enough for products at full speed.
PANEL = 512
# Matrices of up to this width are inverted as a whole.
LEAF = 256


def reversed_cholesky(statistics: GramStatistics, dampening_frac: float) -> tuple[torch.Tensor, float]:
    """Factor the Gram matrix plus `dampening_frac` times its mean diagonal as U U^T with U upper triangular.

    U is the inverse of the factor R of SparseGPT's H^-1 = R^T R, so neither the inverse nor its factor is formed: one
    factorisation of n^3/3 operations instead of 4n^3/3. It is done in float64, on the upper triangle alone.

    Args:
        statistics: Statistics of the layer's inputs. Features that were always zero do not count in the mean.
        dampening_frac: Damping to try first.

    Returns:
        U, `[in, in]` fp32, and the damping that it took.

    Raises:
        ValueError: The Hessian cannot be factored even with full damping.
    """
    diagonal = statistics.squared_norms.double()
    mean = diagonal.sum() / (diagonal > 0).sum()
    # If no input was ever non-zero, any damping gives the same result: the largest weights are kept.
    mean = torch.where(mean > 0, mean, 1.0)
    while True:
        factor, failed = _factor(statistics, dampening_frac * mean)
        if not failed:
            return factor, dampening_frac
        if dampening_frac >= MAX_DAMPING:
            raise ValueError(
                f"the Hessian of its inputs ({statistics.num_tokens} tokens) is not positive definite even with "
                f"dampening_frac={dampening_frac:g}: calibrate on more or other data, or choose method='wanda'"
            )
        dampening_frac = min(10 * dampening_frac, MAX_DAMPING)


def _factor(statistics: GramStatistics, damping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U, and whether there is none.

    The matrix is taken apart into panels of columns that end on the diagonal. From the last panel to the first, the
    block on the diagonal is factored, the rows above it follow, and what they account for is subtracted from the
    panels before. A panel is in float64 only until it is done.
    """
    width = statistics.squared_norms.shape[0]
    starts = range(0, width, PANEL)
    panels = [statistics.upper_columns(start, min(start + PANEL, width)).double() for start in starts]
    factor = torch.zeros(width, width, dtype=torch.float32, device=panels[0].device)
    failed = []
    for start, panel in reversed(list(zip(starts, list(panels), strict=True))):
        panels.pop()
        block = panel[start:]
        block.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(block.flip(0, 1))
        failed.append(info)
        upper = lower.flip(0, 1)
        above = panel[:start]
        above.copy_(torch.linalg.solve_triangular(upper.T, above, upper=False, left=False))
        for other_start, other in zip(starts, panels, strict=False):
            stop = len(other)
            other.addmm_(above[:stop], above[other_start:stop].T, alpha=-1)
        factor[: len(panel), start : start + PANEL] = torch.cat([above, upper])
    return factor, torch.stack(failed).any()


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a positive definite matrix in its own dtype, by that of a half and of its Schur complement.

    Nearly all of it is products, whose bits usually do not depend on the number of CPU threads; those of one
    factorisation of the whole do.
    """
    if len(matrix) <= LEAF:
        with one_thread():
            return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    half = len(matrix) // 2
    between = matrix[:half, half:]
    first = inverse(matrix[:half, :half])
    along = first @ between
    second = inverse(torch.addmm(matrix[half:, half:], between.T, along, alpha=-1))
    across = along @ second
    return torch.cat(
        [
            torch.cat([torch.addmm(first, across, along.T), -across], dim=1),
            torch.cat([-across.T, second], dim=1),
        ]
    )
