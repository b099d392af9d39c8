"""`PackedWeight`: the weight of a packed layer as a tensor that can be read and not changed."""

import copy

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from optimum_sparse.quantization import Grid
from optimum_sparse.runtime import SparseLinear, sparsify_for_inference
from optimum_sparse.runtime.tiles import Tiles

from ..helpers import VOCABULARY, tiny_model


@pytest.fixture(params=[torch.float32, torch.bfloat16, "codes"], ids=str)
def layers(request):
    """A dense layer and the same packed."""
    dense, grid = nn.Linear(128, 24), None
    with torch.no_grad():
        dense.weight.mul_(torch.rand_like(dense.weight) < 0.5)
        if request.param == "codes":
            scale, zero = torch.full((24, 1), 1 / 512).bfloat16(), torch.full((24, 1), 99, dtype=torch.uint8)
            grid = Grid(scale, zero, 8, -1)
            dense.weight.copy_(grid.round(dense.weight))
        else:
            dense.to(request.param)
    return dense, SparseLinear.from_linear(dense, grid)


def test_it_reads_as_the_dense_weight(layers):
    expected, weight = layers[0].weight.detach(), layers[1].weight
    assert isinstance(weight, torch.Tensor) and not weight.requires_grad and weight.data is weight
    for what in ("shape", "dtype", "device", "ndim", "nbytes", "layout"):
        assert getattr(weight, what) == getattr(expected, what)
    assert weight.stride() == expected.stride() and weight.numel() == expected.numel() and len(weight) == 24
    for found in (
        weight,
        weight.detach(),
        weight.data,
        weight.cpu(),
        weight.contiguous(),
        nn.Parameter(weight, False),
    ):
        assert torch.equal(found, expected)
    assert type(weight + 0) is type(weight.T) is type(weight.clone()) is type(weight[3]) is torch.Tensor
    assert torch.equal(weight.T, expected.T) and torch.equal(weight[3], expected[3])
    assert weight.tolist() == expected.tolist() and repr(weight) == repr(expected)
    if expected.dtype == torch.float32:
        assert (weight.detach().cpu().numpy() == expected.numpy()).all()
        assert (numpy.asarray(weight) == expected.numpy()).all()
    assert torch.equal(copy.deepcopy(layers[1]).weight, expected)


def test_what_it_is_costs_no_unpacking(layers, monkeypatch):
    kind = type(layers[1].tiles)
    monkeypatch.setattr(kind, "unpack", lambda tiles: pytest.fail("the weight was unpacked"))
    weight = layers[1].weight
    assert weight.shape == (24, 128) and weight.dtype == layers[0].weight.dtype and weight.device.type == "cpu"


def iadd(weight):
    weight += 1


def set_data(weight):
    weight.data = torch.zeros(24, 128)


def add_to_data(weight):
    weight.data += 1


def set_item(weight):
    weight[0] = 0


@pytest.mark.parametrize(
    "change",
    [iadd, set_data, add_to_data, set_item, nn.init.zeros_, lambda weight: torch.add(weight, 1, out=weight)],
)
def test_it_cannot_be_changed(layers, change):
    before = layers[1].weight.clone()
    with pytest.raises(RuntimeError, match=r"packed layer cannot be changed: merge adapters, .* before sparsify"):
        change(layers[1].weight)
    assert torch.equal(layers[1].weight, before)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_an_adapter_is_refused(merge):
    """It would be lost: what PEFT adds to is not the packed weight."""
    model, tokens = tiny_model(), torch.arange(20)[None] % VOCABULARY
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:, ::2] = 0
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = tuned(tokens).logits
        sparsify_for_inference(tuned, prefer="memory")
        assert sum(isinstance(module, SparseLinear) for module in tuned.modules()) == 15
        torch.testing.assert_close(tuned(tokens).logits, expected)
        with pytest.raises(RuntimeError, match="merge adapters"):
            getattr(tuned, merge)()


def test_tiles_unpack_to_plain_tensors():
    assert type(Tiles.pack(torch.ones(8, 8)).unpack()) is torch.Tensor
