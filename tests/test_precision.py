"""Products are full precision where we make them, whatever is allowed for the model, and only there."""

import pytest
import torch

from optimum_sparse.precision import BACKENDS, exact_in_half, full_precision, half_penalty, half_products
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


@pytest.mark.parametrize("amx", [True, False])
def test_where_half_precision_is_multiplied_as_it_is(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    assert [exact_in_half(torch.zeros(2, dtype=dtype)) for dtype in dtypes] == [False, False, amx]
    assert not exact_in_half(torch.zeros(2, dtype=torch.bfloat16, device="meta"))

    class OnGpu:
        is_cuda = True

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    assert [exact_in_half(OnGpu(dtype)) for dtype in dtypes] == [False, True, True]


def test_products_of_bfloat16_are_as_exact_as_those_of_fp32(allowed: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).bfloat16().float() for _ in range(2))
    found, exact = half_products(left, right), left.double() @ right.double()
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()  # a result in bfloat16 would have 1e-3
    assert {backend.fp32_precision for backend in BACKENDS} == {allowed}


@pytest.mark.parametrize("equal_tokens", [False, True])
def test_gram_matrix_of_bfloat16_with_and_without_amx(equal_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(300, 520, generator=torch.Generator().manual_seed(0)).bfloat16()
    grams = []
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        found = GramStatistics(520, equal_tokens=equal_tokens)
        found.add(inputs)
        grams.append(found.gram)
    exact = inputs.double()
    if equal_tokens:
        exact = exact / exact.square().mean(dim=1, keepdim=True).sqrt()
    exact = exact.T @ exact
    scale = exact.diagonal().mean()
    # Tokens that are scaled are rounded to bfloat16 again if that is what is multiplied.
    assert (grams[0] - exact).abs().max() < (2e-3 if equal_tokens else 3e-6) * scale
    assert (grams[1] - exact).abs().max() < 3e-6 * scale


def test_half_precision_takes_some_multiple_of_the_time() -> None:
    assert all(0.01 < half_penalty(dtype) < 1000 for dtype in (torch.bfloat16, torch.float16))
