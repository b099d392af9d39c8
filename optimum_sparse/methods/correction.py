"""Error correction: the target that makes up for what the layers before have changed in the inputs."""

from __future__ import annotations

import torch

from ..statistics import PairedStatistics
from .cg import inverse_norms, unit_gram

# Added to the diagonal of the Gram matrix of inputs of norm 1.
DAMPING = 0.05


def corrected_target(weight: torch.Tensor, statistics: PairedStatistics, strength: float) -> torch.Tensor:
    """W + strength (W C) (G + damping)^-1, with C = (X_dense - X)^T X and G = X^T X.

    Without damping and with strength 1 that is the weight whose outputs on X are closest to those of W on X_dense:
    ||W X_dense - V X||^2 is ||(target - V) X||^2 and a constant, so that any method can take it for the weight it
    approximates (QEP, arXiv 2504.09629). On noisy inputs it is also smaller than W, hence the strength.

    Args:
        weight: W, `[rows, in_features]` fp32.
        statistics: With G and C.
        strength: How much of the correction to take, in [0, 1].
    """
    gram, norms = unit_gram(statistics)
    inverse = inverse_norms(norms)
    gram.diagonal().add_(DAMPING)
    product = (weight @ statistics.deviation).mul_(inverse)
    return weight + torch.cholesky_solve(product.T, torch.linalg.cholesky(gram)).T.mul_(strength * inverse)
