"""Statistics against float64 arithmetic."""

import pytest
import torch

from optimum_sparse.statistics import GramStatistics, NormStatistics


def batches(dtype, width=300):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, width, generator=generator).to(dtype) for tokens in (50, 1, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_equals_float64(dtype):
    statistics, inputs = GramStatistics(300), batches(dtype)
    for part in inputs:
        statistics.add(part)
    exact = torch.cat(inputs).double()
    expected = exact.T @ exact
    assert statistics.num_tokens == 121
    assert torch.allclose(statistics.gram.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert torch.allclose(statistics.squared_norms.double(), expected.diagonal(), rtol=1e-5)


def test_gram_grows_after_it_was_read():
    statistics, inputs = GramStatistics(300), batches(torch.float32)
    statistics.add(inputs[0])
    before = statistics.gram.clone()
    statistics.add(inputs[2])
    assert torch.allclose(statistics.gram, before + inputs[2].T @ inputs[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_equal_float64(dtype):
    statistics, inputs = NormStatistics(300), batches(dtype)
    for part in inputs:
        statistics.add(part)
    assert statistics.num_tokens == 121
    assert torch.allclose(statistics.squared_norms.double(), torch.cat(inputs).double().square().sum(0), rtol=1e-5)


def test_norms_of_half_precision_do_not_overflow():
    statistics = NormStatistics(2)
    statistics.add(torch.full((4, 2), 60000.0, dtype=torch.float16))
    assert torch.allclose(statistics.squared_norms, torch.full((2,), 4 * 60000.0**2))


def test_output_energy():
    gram, norms, inputs = GramStatistics(300), NormStatistics(300), torch.cat(batches(torch.float32))
    gram.add(inputs)
    norms.add(inputs)
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    outputs = inputs.double() @ weight.double().T
    assert torch.allclose(gram.output_energy(weight).double(), outputs.square().sum(0), rtol=1e-4)
    diagonal = (weight.double().square() * inputs.double().square().sum(0)).sum(1)
    assert torch.allclose(norms.output_energy(weight).double(), diagonal, rtol=1e-5)
