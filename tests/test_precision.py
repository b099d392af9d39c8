"""Products are full precision where we make them, whatever is allowed for the model, and only there."""

import pytest
import torch

from optimum_sparse.precision import BACKENDS, exact_in_half, full_precision, half_penalty
from optimum_sparse.statistics import GramStatistics


@pytest.fixture(params=["ieee", "tf32"])
def allowed(request: pytest.FixtureRequest):
    before = [backend.fp32_precision for backend in BACKENDS]
    for backend in BACKENDS:
        backend.fp32_precision = request.param
    yield request.param
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


def test_what_was_allowed_is_allowed_again(allowed: str) -> None:
    with pytest.raises(KeyError), full_precision():
        assert {backend.fp32_precision for backend in BACKENDS} == {"ieee"}
        raise KeyError
    assert {backend.fp32_precision for backend in BACKENDS} == {allowed}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gram_matrices_are_in_full_precision_also_with_the_older_setting() -> None:
    inputs = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    exact = GramStatistics(512)
    exact.add(inputs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = GramStatistics(512)
        found.add(inputs)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.gram, exact.gram)


def test_half_precision_is_multiplied_as_it_is_on_gpus_only() -> None:
    assert not exact_in_half(torch.zeros(2, dtype=torch.bfloat16))

    class OnGpu:
        is_cuda = True

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    exact = {dtype for dtype in (torch.float32, torch.float16, torch.bfloat16) if exact_in_half(OnGpu(dtype))}
    assert exact == {torch.float16, torch.bfloat16}


def test_half_precision_takes_some_multiple_of_the_time() -> None:
    assert all(0.01 < half_penalty(dtype) < 1000 for dtype in (torch.bfloat16, torch.float16))
