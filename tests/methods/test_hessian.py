"""The inverse against float64, and its bits."""

import pytest
import torch

from optimum_sparse.methods import hessian


def damped(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * width, width, generator=generator) + torch.randn(2 * width, 1, generator=generator)
    inputs = inputs / inputs.norm(dim=0)
    return inputs.T @ inputs + 0.2 * torch.eye(width)


@pytest.mark.parametrize("width", [1, 7, 64, 65, 200])
def test_inverse_equals_float64(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "LEAF", 16)
    matrix = damped(width)
    before = matrix.clone()
    expected = torch.linalg.inv(matrix.double())
    torch.testing.assert_close(hessian.inverse(matrix).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("width", [192, 576, 1000])
def test_inverse_has_the_same_bits_on_any_number_of_threads(width: int) -> None:
    matrix, found, products = damped(width), [], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(hessian.inverse(matrix))
            products.append(matrix @ matrix)
    finally:
        torch.set_num_threads(threads)
    if not all(torch.equal(products[0], other) for other in products):
        pytest.skip("on this machine, the bits of a product depend on the number of threads")
    assert all(torch.equal(found[0], other) for other in found)
