"""Intervals against the printed table of Student's t distribution."""

import pytest
import torch

from optimum_sparse.evaluation.intervals import interval


@pytest.mark.parametrize(("count", "t"), [(4, 3.182), (5, 2.776), (10, 2.262), (20, 2.093), (31, 2.042)])
def test_interval_is_that_of_students_t(count: int, t: float):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).double() * 3 + 7
    mean = sum(values.tolist()) / count
    error = (sum((value - mean) ** 2 for value in values.tolist()) / (count - 1) / count) ** 0.5
    low, high = interval(values)
    assert (low + high) / 2 == pytest.approx(mean) and (high - low) / 2 == pytest.approx(t * error, rel=2e-3)


def test_few_values_have_none():
    assert interval(torch.tensor([1.0, 2.0, 3.0])) is None


def test_equal_values_are_certain():
    assert interval(torch.full((6,), 2.5)) == (2.5, 2.5)
