"""Statistics against float64 arithmetic."""

import pytest
import torch

from optimum_sparse.statistics import GramStatistics, NormStatistics, PairedStatistics


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [NormStatistics, GramStatistics, PairedStatistics])
def test_equal_tokens_have_the_same_norm(kind, dtype, monkeypatch):
    """A token a thousand times as large as the others counts as they do, and one of zeros not at all."""
    # Where bfloat16 is multiplied as it is, scaled tokens are rounded to it: see test_precision.py.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    statistics, inputs = kind(300, equal_tokens=True), batches(dtype)
    inputs[0][3] *= 1000
    inputs[2][5] = 0
    dense = [part + 1 for part in inputs]
    for part, other in zip(inputs, dense, strict=True):
        statistics.add(part)
        if kind is PairedStatistics:
            statistics.add_deviation(part, other)
    exact, exact_dense = torch.cat(inputs).double(), torch.cat(dense).double()
    sizes = exact.square().mean(dim=1, keepdim=True).sqrt()
    scaled = exact / sizes.where(sizes > 0, 1)
    expected = scaled.T @ scaled
    assert statistics.num_tokens == 121
    torch.testing.assert_close(statistics.squared_norms.double(), expected.diagonal(), rtol=1e-5, atol=0)
    assert statistics.squared_norms.sum() == pytest.approx(120 * 300)
    if kind is not NormStatistics:
        torch.testing.assert_close(statistics.gram.double(), expected, rtol=1e-4, atol=1e-3)
    if kind is PairedStatistics:
        deviation = ((exact_dense - exact) / sizes.where(sizes > 0, 1)).T @ scaled
        torch.testing.assert_close(statistics.deviation.double(), deviation, rtol=1e-3, atol=1e-2)
    assert statistics.blended(statistics, 0.5)._equal_tokens


@pytest.mark.parametrize("equal_tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [NormStatistics, GramStatistics, PairedStatistics])
def test_inputs_stay_as_they_are(kind, dtype, equal_tokens):
    """They belong to the model, whose forward goes on with them."""
    statistics, inputs = kind(300, equal_tokens=equal_tokens), batches(dtype)[0]
    before, dense = inputs.clone(), inputs + 1
    statistics.add(inputs)
    if kind is PairedStatistics:
        statistics.add_deviation(inputs, dense)
    assert torch.equal(inputs, before) and torch.equal(dense, before + 1)


def test_an_overflow_is_seen():
    for kind in (NormStatistics, GramStatistics):
        statistics = kind(2, equal_tokens=True)
        statistics.add(torch.full((1, 2), 1e30))
        assert not statistics.squared_norms.isfinite().any()


def test_norms_of_half_precision_do_not_overflow():
    statistics = NormStatistics(2)
    statistics.add(torch.full((4, 2), 60000.0, dtype=torch.float16))
    assert torch.allclose(statistics.squared_norms, torch.full((2,), 4 * 60000.0**2))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_own", [0, 1, 7])
@pytest.mark.parametrize("kind", [NormStatistics, GramStatistics])
def test_blended_is_the_weighted_sum_of_the_means(kind, num_own, share):
    """Of an expert's tokens and its layer's, as if there were as many of the blend as the expert has, at least one."""
    generator = torch.Generator().manual_seed(0)
    inputs, owns = torch.randn(90, 300, generator=generator), 1 + torch.rand(num_own, 300, generator=generator)
    layer, own = kind(300), kind(300)
    layer.add(inputs)
    own.add(owns)
    before = own.squared_norms.clone(), layer.squared_norms.clone()
    blend = own.blended(layer, share)

    mean_of_layer = inputs.double().T @ inputs.double() / 90
    mean_of_own = owns.double().T @ owns.double() / max(num_own, 1)
    expected = max(num_own, 1) * ((1 - share) * mean_of_own + share * mean_of_layer)
    assert type(blend) is kind and blend.num_tokens == num_own
    torch.testing.assert_close(blend.squared_norms.double(), expected.diagonal(), rtol=1e-5, atol=1e-5)
    if kind is GramStatistics:
        torch.testing.assert_close(blend.gram.double(), expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(blend.gram, blend.gram.T)
    assert torch.equal(own.squared_norms, before[0]) and torch.equal(layer.squared_norms, before[1])


def test_enough_tokens():
    """A Gram matrix of fewer tokens than features is singular; norms are known from few tokens."""
    width = 40
    enough = GramStatistics.enough_tokens(width)
    for num_tokens, rank in ((enough - 1, width - 1), (enough, width)):
        statistics = GramStatistics(width)
        statistics.add(torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(0)))
        assert torch.linalg.matrix_rank(statistics.gram.double(), rtol=1e-6) == rank
    assert NormStatistics.enough_tokens(width) == NormStatistics.enough_tokens(100 * width)


def test_output_energy():
    gram, norms, inputs = GramStatistics(300), NormStatistics(300), torch.cat(batches(torch.float32))
    gram.add(inputs)
    norms.add(inputs)
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    outputs = inputs.double() @ weight.double().T
    assert torch.allclose(gram.output_energy(weight).double(), outputs.square().sum(0), rtol=1e-4)
    diagonal = (weight.double().square() * inputs.double().square().sum(0)).sum(1)
    assert torch.allclose(norms.output_energy(weight).double(), diagonal, rtol=1e-5)


@pytest.mark.parametrize("kind", [NormStatistics, GramStatistics, PairedStatistics])
def test_the_order_of_batches_does_not_matter_to_the_bit(kind):
    """Nor do the parts that several processes have of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(tokens, 300, generator=generator) * 10**scale for tokens, scale in ((50, 0), (1, 3), (70, -2))
    ]

    def collected(parts):
        statistics = kind(300)
        for part in parts:
            statistics.add(part)
            if kind is PairedStatistics:
                statistics.add_deviation(part, part.sin())
        return statistics

    class Two:
        """Another process that has the batches from the second on."""

        others = collected(inputs[1:])

        def sum_(self, tensor):
            tensor += self.others._sums if tensor is whole._sums else self.others._deviation

        def totals(self, count):
            return [count + 71]

    whole = collected(inputs[:1])
    whole.add_up(Two())
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        found = collected([inputs[index] for index in order])
        assert found.num_tokens == whole.num_tokens
        assert torch.equal(found.squared_norms, whole.squared_norms)
        if kind is not NormStatistics:
            assert torch.equal(found.gram, whole.gram)
        if kind is PairedStatistics:
            assert torch.equal(found.deviation, whole.deviation)
