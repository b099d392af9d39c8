"""`SemiStructuredLinear` and what the GPU's units for 2:4 take, without a GPU: the dense weight stands in."""

import copy

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from optimum_sparse.runtime import SemiStructuredLinear, semi_structured


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight, scores = torch.randn(2, rows, columns // 4, 4, generator=generator)
    return (weight * (scores.argsort(-1).argsort(-1) < 2)).view(rows, columns).to(dtype)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> SemiStructuredLinear:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    return SemiStructuredLinear.from_linear(dense_layer())


def dense_layer() -> nn.Linear:
    dense = nn.Linear(64, 32, dtype=torch.bfloat16)
    dense.weight.data.copy_(two_of_four(32, 64))
    dense.bias.data.copy_(torch.arange(32.0))
    return dense


def test_limits_are_those_of_torch():
    limits = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    for dtype in semi_structured.DTYPES:
        assert limits[dtype].sparse_min_rows == limits[dtype].sparse_min_cols == semi_structured.MULTIPLE
    assert torch.float32 not in limits


@pytest.mark.parametrize("columns", [64, 128])
def test_matrices_that_torch_packs_without_loss_are_2_4(columns: int):
    weight = two_of_four(32, columns)
    packed = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert semi_structured.is_two_of_four(weight) and torch.equal(packed, weight)
    row, group = 5, slice(8, 12)
    weight[row, group] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    packed = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert not semi_structured.is_two_of_four(weight) and not torch.equal(packed, weight)


def test_other_matrices_are_not_2_4():
    weight = two_of_four(16, 32)
    assert semi_structured.is_two_of_four(torch.zeros(16, 32))
    assert semi_structured.is_two_of_four(weight.T.contiguous().T)
    assert not semi_structured.is_two_of_four(weight[:, :30])
    assert not semi_structured.is_two_of_four(weight.roll(2, dims=1)[:, :28].repeat(1, 1) + weight[:, 4:])
    for value in (float("inf"), float("nan")):
        broken = weight.clone()
        broken[broken != 0] = value
        assert not semi_structured.is_two_of_four(broken)


@pytest.mark.parametrize(
    ("shape", "dtype", "available", "capability", "message"),
    [
        ((32, 64), torch.bfloat16, True, (9, 0), None),
        ((32, 64), torch.float16, True, (8, 0), None),
        ((32, 64), torch.float32, True, (8, 0), "weights must be bfloat16 or float16"),
        ((24, 64), torch.bfloat16, True, (8, 0), "must be multiples of 16"),
        ((32, 72), torch.bfloat16, True, (8, 0), "must be multiples of 16"),
        ((32, 64), torch.bfloat16, False, (8, 0), "no cuSPARSELt"),
        ((32, 64), torch.bfloat16, True, (7, 5), "no units"),
    ],
    ids=str,
)
def test_what_the_units_do_not_take(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    dtype: torch.dtype,
    available: bool,
    capability: tuple[int, int],
    message: str | None,
):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = semi_structured.obstacle(shape, dtype, torch.device("cuda"))
    assert found is None if message is None else message in found


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 0, 64)], ids=str)
def test_output(layer: SemiStructuredLinear, shape: tuple[int, ...]):
    dense, x = dense_layer(), torch.randn(shape).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))
        strided = x.expand(2, *shape).movedim(0, -2)
        torch.testing.assert_close(layer(strided), dense(strided), atol=0.1, rtol=0.02)


def test_gradients_flow_to_the_inputs(layer: SemiStructuredLinear):
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(dense_layer()(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert not layer.weight.requires_grad


def test_saves_the_dense_weight_and_loads_none(layer: SemiStructuredLinear):
    expected = dense_layer().state_dict()
    state = layer.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    before = copy.deepcopy(layer.weight)
    with pytest.raises(RuntimeError, match=r"0\.weight is packed for the 2:4 units"):
        nn.Sequential(layer).load_state_dict(nn.Sequential(dense_layer()).state_dict())
    assert torch.equal(layer.weight, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_packed_as_torch_does_it(monkeypatch: pytest.MonkeyPatch):
    """Its class of tensor, which holds the parts that CUTLASS takes, and which the CPU can pack and unpack."""

    def pack(weight: torch.Tensor) -> torch.Tensor:
        parts = sparse_semi_structured_from_dense_cutlass(weight)
        return SparseSemiStructuredTensorCUTLASS(weight.shape, *parts, None, None, None)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pack)
    dense = dense_layer()
    layer = SemiStructuredLinear.from_linear(dense)
    assert isinstance(layer.weight, SparseSemiStructuredTensorCUTLASS) and not layer.weight.requires_grad
    assert layer.nbytes == 0.5625 * dense.weight.nbytes
    assert torch.equal(layer.state_dict()["weight"], dense.weight)


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="two zero"):
        SemiStructuredLinear.from_linear(nn.Linear(64, 32, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight + 1)
    with pytest.raises(ValueError, match="not equal to the dense one"):
        SemiStructuredLinear.from_linear(dense_layer())
