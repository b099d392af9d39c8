"""Confidence intervals of means, from the figures of the parts: windows of a text, or samples of a task."""

from __future__ import annotations

from statistics import NormalDist

import torch

CONFIDENCE = 0.95
# Fewer parts say next to nothing about how much parts differ.
LEAST = 4


def interval(values: torch.Tensor) -> tuple[float, float] | None:
    """The interval of Student's t distribution around the mean of independent values; `None` for fewer than four.

    Args:
        values: `[parts]`.
    """
    count = len(values)
    if count < LEAST:
        return None
    values = values.double()
    mean, error = values.mean().item(), values.std().item() / count**0.5
    reach = error * _quantile((1 + CONFIDENCE) / 2, count - 1)
    return mean - reach, mean + reach


def _quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, to 0.2 % from three degrees of freedom on.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    x = NormalDist().inv_cdf(probability)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, start=1))
