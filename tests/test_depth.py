"""How far hidden states move away from the dense ones, against Transformers' own hidden states."""

import copy

import pytest
import torch

from optimum_sparse import SparsePruner
from optimum_sparse.depth import TOKENS, DepthError
from optimum_sparse.matrices import find_blocks

from .helpers import tiny_batches, tiny_model


def hidden_states(model, batch):
    """Of the first row behind each block but the last, `[tokens, hidden]`: Transformers norms the last ones."""
    states = model(**batch, output_hidden_states=True).hidden_states[1:-1]
    return [state[0, :TOKENS].double() for state in states]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_error_is_that_of_the_hidden_states(architecture):
    options = {"n_layer": 4} if architecture == "gpt2" else {"num_hidden_layers": 4}
    model, batches = tiny_model(architecture, **options), tiny_batches(num=1, rows=3, length=80)
    dense = copy.deepcopy(model)
    pruner = SparsePruner(method="wanda", progress=False)
    pruner.prune(model, dataset=batches)
    errors = pruner.report.depth_error
    assert list(errors) == find_blocks(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    pairs = zip(hidden_states(dense, batches[0]), hidden_states(model, batches[0]), strict=True)
    expected = [((a - b).square().sum(1) / a.square().sum(1)).mean().item() for a, b in pairs]
    assert list(errors.values())[:-1] == pytest.approx(expected, rel=1e-4)


def test_nothing_without_data_and_nothing_left_behind():
    model = tiny_model()
    pruner = SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    assert pruner.report.depth_error == {}
    depth = DepthError(model, find_blocks(model))
    with pytest.raises(KeyboardInterrupt), depth.watching():
        raise KeyboardInterrupt
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert depth.measure() == {}


def test_an_unchanged_model_has_no_error():
    model, (batch, *_) = tiny_model(), tiny_batches()
    depth = DepthError(model, find_blocks(model))
    with depth.watching():
        model(**batch)
        model(input_ids=batch["input_ids"].flip(1))  # only the first forward counts
    assert set(depth.measure().values()) == {0.0}
