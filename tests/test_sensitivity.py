"""Expected rises of the loss against formulas, gradients of a float64 model, and models that are pruned."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_sparse import SparsePruner
from optimum_sparse.matrices import PrunableMatrix
from optimum_sparse.patterns import NM, Pattern, Unstructured
from optimum_sparse.sensitivity import LENGTH, WINDOWS, allocation_forwards, excerpt, expected_rises
from optimum_sparse.statistics import NormStatistics
from optimum_sparse.uses import View
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}


def prunable(name: str, layer: nn.Linear, pattern: Pattern) -> PrunableMatrix:
    return PrunableMatrix(name, View(f"{name}.weight", 0, tuple(layer.weight.shape), False), layer, pattern, "0")


@contextmanager
def norms(model: nn.Module) -> Iterator[dict[str, NormStatistics]]:
    found = {name: NormStatistics(layer.in_features) for name, layer in layers(model).items()}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: found[name].add(inputs[0].detach().float().flatten(0, -2))
        )
        for name, layer in layers(model).items()
    ]
    yield found
    for handle in handles:
        handle.remove()


def rises_of(model: nn.Module, batches: list[dict], pattern: Pattern, group: str = "layer") -> dict[str, float]:
    with norms(model) as inputs, torch.no_grad():
        for batch in batches:
            model(**batch)
    matrices = [prunable(name, layer, pattern) for name, layer in layers(model).items()]
    rises = expected_rises(
        lambda batch: model(**batch), batches, matrices, list(inputs.values()), group, range(3, 3 + len(batches))
    )
    return dict(zip(layers(model), rises, strict=True))


def test_what_it_is_for_a_softmax_of_a_linear_layer():
    """There the Fisher information is known: x_j^2 p_i (1 - p_i)."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    layer.weight.data = torch.randn(5, 6, generator=generator)
    inputs = torch.randn(4, 6, generator=generator)
    statistics = NormStatistics(6)
    statistics.add(inputs)
    matrix = prunable("w", layer, Unstructured(0.5))
    batches = [{}] * 4000
    (rise,) = expected_rises(
        lambda _: SimpleNamespace(logits=layer(inputs)[None]), batches, [matrix], [statistics], "layer", range(4000)
    )
    weight, x = layer.weight.detach().double(), inputs.double()
    p = (x @ weight.T).softmax(-1)
    fisher = torch.einsum("tj,ti->ij", x**2, p * (1 - p))
    scores = weight.abs() * x.norm(dim=0)
    pruned = scores.flatten().argsort()[:15]
    expected = (weight**2 * fisher).flatten()[pruned].sum() / 2
    assert rise / len(batches) == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize(
    ("pattern", "group"), [(Unstructured(0.5), "layer"), (Unstructured(0.25), "output"), (NM(2, 4), "layer")], ids=str
)
def test_gradients_of_a_float64_model(pattern: Pattern, group: str):
    model, batches = tiny_model(), tiny_batches(3, padding=True)
    rises = rises_of(model, batches, pattern, group)
    exact = copy.deepcopy(model).double()
    expected = dict.fromkeys(rises, 0.0)
    with norms(exact) as inputs:
        for number, batch in enumerate(batches):
            logits = exact(**batch).logits
            numbers = torch.rand(logits.shape[:2].numel(), generator=torch.Generator().manual_seed(3 + number))
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            loss = 0.0
            for position, uniform in enumerate(numbers.double()):
                row, token = divmod(position, logits.shape[1])
                p = logits[row, token].softmax(-1)
                drawn = next(k for k in range(len(p)) if p[: k + 1].sum() >= uniform)
                loss = loss - p[drawn].log() * mask[row, token]
            gradients = torch.autograd.grad(loss, [layer.weight for layer in layers(exact).values()])
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] = expected[name] + gradient**2
    for name, layer in layers(exact).items():
        weight = layer.weight.detach()
        scores = weight.abs() * inputs[name].squared_norms.double().sqrt()
        if isinstance(pattern, NM):
            order = scores.view(-1, 4).argsort(1)[:, :2]
            zeroed = torch.zeros_like(scores.view(-1, 4)).scatter(1, order, 1).view_as(scores)
        else:
            flat = scores if group == "output" else scores.view(1, -1)
            order = flat.argsort(1)[:, : int(pattern.sparsity * flat.shape[1])]
            zeroed = torch.zeros_like(flat).scatter(1, order, 1).view_as(scores)
        assert rises[name] == pytest.approx((zeroed * weight**2 * expected[name]).sum().item() / 2, rel=1e-3), name


def test_it_tells_what_pruning_a_matrix_does_to_the_model():
    """Zeroing weights of each matrix in turn moves the outputs of the model in that order, and by about as much."""
    model = tiny_model(num_hidden_layers=2, vocab_size=64)
    batches = tiny_batches(24, rows=2, length=32)
    batches = [{"input_ids": batch["input_ids"] % 64} for batch in batches]
    rises = rises_of(model, batches, Unstructured(0.2))
    moved = {}
    with torch.no_grad(), norms(model) as inputs:
        dense = [model(**batch).logits.double().log_softmax(-1) for batch in batches]
        for name, layer in layers(model).items():
            before = layer.weight.clone()
            scores = before.abs() * inputs[name].squared_norms.sqrt()
            layer.weight[scores <= scores.flatten().kthvalue(int(0.2 * scores.numel())).values] = 0
            now = [model(**batch).logits.double().log_softmax(-1) for batch in batches]
            moved[name] = sum((p.exp() * (p - q)).sum().item() for p, q in zip(dense, now, strict=True))
            layer.weight.copy_(before)
    ours, theirs = torch.tensor(list(rises.values())).log(), torch.tensor(list(moved.values())).log()
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.9
    assert (ours - theirs).mean().abs() < math.log(2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_left_behind(mode):
    model = tiny_model()
    first, second = list(layers(model).values())[:2]
    first.weight.requires_grad_(False)
    second.weight.grad = mine = torch.ones_like(second.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with mode():
        rises_of(model, tiny_batches(2), Unstructured(0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not first.weight.requires_grad and second.weight.grad is mine and mine.eq(1).all()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter is second.weight
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.requires_grad or parameter is first.weight


def test_a_sample_of_large_matrices_is_enough(monkeypatch: pytest.MonkeyPatch):
    whole = rises_of(tiny_model(), tiny_batches(4), Unstructured(0.5))
    monkeypatch.setattr("optimum_sparse.sensitivity.SAMPLE", 512)
    sample = rises_of(tiny_model(), tiny_batches(4), Unstructured(0.5))
    assert sample != whole
    assert all(sample[name] == pytest.approx(whole[name], rel=0.5) for name in whole)


def test_experts_that_no_token_comes_to():
    """They have no statistics or no gradient, and no rise."""
    layer = nn.Linear(6, 5, bias=False)
    statistics = NormStatistics(6)
    statistics.add(torch.ones(1, 6))
    matrices = [prunable("a", layer, Unstructured(0.5)), prunable("b", nn.Linear(6, 5), Unstructured(0.5))]
    run = lambda _: SimpleNamespace(logits=layer(torch.ones(2, 6)))  # noqa: E731
    rises = expected_rises(run, [{}], [*matrices, matrices[1]], [statistics, statistics, None], "layer", [0])
    assert rises[0] > 0 and rises[1:] == [0, 0]
    model = tiny_mixtral()
    SparsePruner(allocation="loss", progress=False).prune(model, dataset=tiny_batches(2))
    assert model.config.sparsity_config["achieved_sparsity"] == 0.5


def test_few_windows_are_taken():
    batches = tiny_batches(5, rows=3, length=LENGTH + 10)
    found = excerpt(batches)
    assert [batch["input_ids"].shape for batch in found] == [(3, LENGTH)] * math.ceil(WINDOWS / 3)
    assert torch.equal(found[1]["input_ids"], batches[1]["input_ids"][:, :LENGTH])
    for processes in (1, 2, 4):  # together, they take the same windows
        batches = tiny_batches(16, rows=1)
        shares = [excerpt(batches[index::processes], processes) for index in range(processes)]
        assert sum(map(len, shares)) == WINDOWS
    assert len(excerpt(tiny_batches(16, rows=1), 100)) == 1
    images = [{"pixel_values": torch.zeros(2, 3, 8, 8)}] * 3
    assert [batch["pixel_values"].shape for batch in excerpt(images)] == [(2, 3, 8, 8)] * math.ceil(WINDOWS / 2)
    assert allocation_forwards("loss", 100 * WINDOWS * LENGTH) == 0.04 and allocation_forwards("loss", 10) == 4
    assert allocation_forwards("dlp", 10) == 1 and allocation_forwards(None, 10) == 0


def test_gradients_that_are_not_finite():
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"finite gradients.*down_proj|finite gradients.*q_proj"):
        SparsePruner(allocation="loss", progress=False).prune(model, dataset=tiny_batches())


def test_what_it_cannot_do(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    bare = AutoModel.from_pretrained(tmp_path / "dense").eval()
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    with pytest.raises(ValueError, match=r"needs a model that puts out logits, got BaseModelOutputWithPast"):
        SparsePruner(allocation="loss", progress=False).prune(bare, dataset=tiny_batches())
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match=r"gradients of the whole model.*allocation='error'"):
        SparsePruner(allocation="loss", progress=False).prune(offloaded, dataset=tiny_batches())


def test_a_loss_that_depends_on_nothing():
    """A reward is a single number, whose softmax is 1 whatever it is."""
    config = copy.deepcopy(tiny_model().config)
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(ValueError, match=r"nothing that the loss depends on.*Choose allocation='error'"):
        SparsePruner(allocation="loss", sparsity=0.5, progress=False).prune(model, dataset=tiny_batches(2))


def test_padding_in_front_of_the_tokens():
    """The start of a batch is where its tokens are."""
    ids = tiny_batches(1, rows=2, length=LENGTH + 20)[0]["input_ids"]
    mask = torch.ones(2, 2 * LENGTH + 20, dtype=torch.int64)
    mask[:, :LENGTH] = 0
    batch = {"input_ids": torch.cat([torch.zeros(2, LENGTH, dtype=torch.int64), ids], dim=1), "attention_mask": mask}
    allocated = []
    for given in (batch, {"input_ids": ids}):
        pruner = SparsePruner(allocation="loss", sparsity=0.5, progress=False)
        pruner.prune(tiny_model(max_position_embeddings=1024), dataset=[given])
        allocated.append([entry.zeros for entry in pruner.report.matrices])
    assert allocated[0] == pytest.approx(allocated[1], rel=0.02)
    assert len(set(allocated[0])) > 3


def test_only_labels_count_behind_an_encoder():
    """The mask is that of the encoder, which happens to have as many tokens as there are labels."""
    weight = nn.Linear(6, 5, bias=False)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    mask, labels = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), torch.tensor([[1, 2, -100, -100], [1, 2, 3, 4]])
    inputs = NormStatistics(6)
    inputs.add(x[labels != -100])
    batch = {"attention_mask": mask, "labels": labels}
    alone = {"attention_mask": (labels != -100).long()}
    matrices = [prunable("weight", weight, Unstructured(0.5))]
    found = [
        expected_rises(lambda _: SimpleNamespace(logits=weight(x)), [given], matrices, [inputs], "row", [3], decoder)
        for given, decoder in ((batch, True), (alone, False))
    ]
    assert found[0] == found[1]
    assert found[0][0] > 0
