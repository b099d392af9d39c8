"""`SparseLinear`, quantised or not, and `DenseLinear` behave as the `nn.Linear` that they stand for."""

import copy
import threading

import pytest
import torch
from torch import nn

from optimum_sparse.quantization import Grid
from optimum_sparse.runtime import DenseLinear, SparseLinear, Tiles, ops

FORMS = [SparseLinear, DenseLinear]


def linear(out_features: int = 40, in_features: int = 70, bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(in_features, out_features, bias=bias)
        with torch.no_grad():
            layer.weight[torch.rand_like(layer.weight) < 0.5] = 0
    return layer


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized_linear(seed: int = 0) -> tuple[nn.Linear, Grid]:
    """A layer in float32 on a grid with scales of all rows."""
    dense = linear(seed=seed)
    grid = Grid(torch.linspace(0.001, 0.01, 40).bfloat16()[:, None], torch.full((40, 1), 99, dtype=torch.uint8), 8, -1)
    with torch.no_grad():
        dense.weight.copy_(grid.round(dense.weight))
    return dense, grid


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(70,), (1, 1, 70), (2, 3, 70), (2, 200, 70), (0, 70)], ids=str)
def test_output(form: type, bias: bool, shape: tuple[int, ...]):
    dense, x = linear(bias=bias), inputs(*shape)
    with torch.no_grad():
        torch.testing.assert_close(form.from_linear(dense)(x), dense(x))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_to_the_inputs(form: type):
    dense, x = linear(), inputs(2, 70).requires_grad_()
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(form.from_linear(dense)(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(70,), (2, 70), (2, 3, 70)], ids=str)
def test_outputs_can_be_changed_in_place(form: type, shape: tuple[int, ...]):
    dense, x = linear(), inputs(*shape).requires_grad_()
    gradients = [torch.autograd.grad(layer(x).mul_(2).sum(), x)[0] for layer in (dense, form.from_linear(dense))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(70,), (1, 1, 70), (1, 2, 70), (1, 200, 70)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_can_be_trained(form: type, shape: tuple[int, ...]):
    dense, x = linear(), inputs(*shape)
    dense.weight.requires_grad_(False)
    layer = form.from_linear(dense)
    assert layer.bias is not dense.bias or form is DenseLinear
    layer.bias.requires_grad_()
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad(dense(x).square().sum(), dense.bias)
    torch.testing.assert_close(layer.bias.grad, expected)


def test_weights_stay_packed_until_gradients_come_back():
    """Were they kept dense in between, these would be ten matrices of 4 MB."""
    layers = nn.Sequential(*(SparseLinear.from_linear(linear(1024, 1024, seed=seed)) for seed in range(10)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        output = layers(inputs(2, 1024).requires_grad_())
    assert output.requires_grad and sum(kept) < 2**20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 70), (200, 70)], ids=str)
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("learns", [False, True])
def test_autocast(form: type, shape: tuple[int, ...], kinds: tuple[torch.dtype, torch.dtype], learns: bool):
    weights, given = kinds
    dense, x = linear().to(weights), inputs(*shape).to(given)
    layer = form.from_linear(dense)
    xs = [x.clone().requires_grad_(learns) for _ in range(2)]
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(xs[0]), dense(xs[1])
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    if learns:
        gradients = [
            torch.autograd.grad(y.float().square().sum(), x)[0] for y, x in zip((found, expected), xs, strict=True)
        ]
        assert gradients[0].dtype == given
        torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("form", FORMS)
def test_parts_that_are_not_contiguous(form: type):
    dense = linear()
    dense.weight = nn.Parameter(dense.weight.detach().T.contiguous().T)
    dense.bias = nn.Parameter(inputs(40, 2)[:, 0])
    with torch.no_grad():
        for x in (inputs(1, 70), inputs(200, 70)):
            torch.testing.assert_close(form.from_linear(dense)(x), dense(x))


def test_inference_mode_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(ops, "_buffers", threading.local())
    layer, x = SparseLinear.from_linear(linear()), inputs(200, 70)
    with torch.inference_mode():
        first = layer(x)
    assert not any(buffer.is_inference() for buffer in ops._buffers.__dict__.values())
    with torch.no_grad():
        assert torch.equal(layer(x), first)


def test_dense_layer_can_still_be_trained():
    dense = linear()
    layer = DenseLinear.from_linear(dense)
    assert layer.weight is dense.weight and layer.bias is dense.bias
    layer(inputs(1, 70)).sum().backward()
    assert dense.weight.grad is not None


def test_sparse_layer_keeps_no_dense_weight():
    dense = linear(512, 512).to(torch.bfloat16)
    layer = SparseLinear.from_linear(dense)
    held = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    assert held <= 0.57 * dense.weight.nbytes + dense.bias.nbytes
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_is_that_of_the_dense_layer(form: type):
    dense, other = linear(), linear(seed=1)
    layer = form.from_linear(copy.deepcopy(dense))
    state = layer.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


def test_state_dicts_that_do_not_fit():
    model = nn.Sequential(SparseLinear.from_linear(linear()))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict({"0.bias": torch.zeros(40)})
    with pytest.raises(RuntimeError, match=r"0\.weight has the shape \(3, 70\), and the layer \(40, 70\)"):
        model.load_state_dict({"0.weight": torch.zeros(3, 70), "0.bias": torch.zeros(40)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.scale"):
        model.load_state_dict(linear_state() | {"0.scale": torch.zeros(1)})
    model.load_state_dict(linear_state())


def linear_state() -> dict[str, torch.Tensor]:
    return nn.Sequential(linear()).state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_type_can_be_changed(dtype: torch.dtype):
    dense, x = linear(), inputs(3, 70).to(dtype)
    layer = SparseLinear.from_linear(dense).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense.to(dtype)(x))


def test_copies_are_independent():
    layer = SparseLinear.from_linear(linear())
    duplicate = copy.deepcopy(layer)
    before = layer.weight
    duplicate.load_state_dict(linear(seed=1).state_dict())
    assert torch.equal(layer.weight, before) and not torch.equal(duplicate.weight, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_compiles_without_a_graph_break(form: type, tokens: int):
    dense, x = linear(), inputs(tokens, 70)
    compiled = torch.compile(nn.Sequential(form.from_linear(dense), nn.ReLU()), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(x).relu())


def test_threads_do_not_share_the_buffer():
    """Two threads that unpack different weights at once, often."""
    layers, x, wrong = [linear(seed=seed) for seed in range(2)], inputs(ops.MOST_TOKENS + 1, 70), []

    def multiply(dense: nn.Linear) -> None:
        sparse = SparseLinear.from_linear(dense)
        with torch.no_grad():
            expected = dense(x)
            wrong.extend(i for i in range(200) if not torch.allclose(sparse(x), expected, atol=1e-5))

    threads = [threading.Thread(target=multiply, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_repr_says_how_sparse_it_is():
    dense = linear(8, 32, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.arange(256).view(8, 32) % 4 == 0)
    assert repr(SparseLinear.from_linear(dense)) == "SparseLinear(32, 8, bias=False, zeros=75.00%)"


@pytest.mark.parametrize("shape", [(70,), (2, 3, 70), (2, 200, 70), (0, 70)], ids=str)
def test_quantized_output_and_gradient(shape: tuple[int, ...]):
    dense, grid = quantized_linear()
    layer, x = SparseLinear.from_linear(dense, grid), inputs(*shape).requires_grad_()
    assert layer.quantized and not SparseLinear.from_linear(dense).quantized
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_quantized_state_dict_is_that_of_the_dense_layer():
    dense, grid = quantized_linear()
    layer, other = SparseLinear.from_linear(dense, grid), linear(seed=1)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    copied = copy.deepcopy(layer)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight) and not layer.quantized and isinstance(layer.tiles, Tiles)
    assert torch.equal(copied.weight, dense.weight) and copied.quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_type_of_a_quantized_layer_can_be_changed(dtype: torch.dtype):
    dense, grid = quantized_linear()
    layer = SparseLinear.from_linear(dense, grid).to(dtype)
    assert torch.equal(layer.weight, dense.weight.to(dtype))
    x = inputs(3, 70).to(dtype)
    close = {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}  # the weights themselves are not rounded
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense.to(dtype)(x), **close)


def test_quantized_layer_compiles_without_a_graph_break():
    (dense, grid), x = quantized_linear(), inputs(2, 70)
    model = nn.Sequential(SparseLinear.from_linear(dense, grid), nn.ReLU())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), dense(x).relu())
    assert "quantized=True" in repr(model)
