"""Models that are no causal language models of Transformers: whole runs, against an oracle that reruns the model.

The oracle sees plain products of two tensors below the functions of torch, and knows nothing of layer classes, stops
or greenlets. All comparisons are to the bit.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.matrices import find_blocks
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import parse_pattern
from tests.beyond_text import (
    HAND_WRITTEN_MODELS,
    HIDDEN,
    MODELS,
    TRANSFORMERS_MODELS,
    Decoder,
    bert_model,
    images,
    llava_model,
    random_model,
    text,
    three,
    vit_model,
)
from tests.test_lockstep import assert_same_bits
from tests.test_uses import Key, Products

Batches = Sequence[Mapping[str, torch.Tensor]]
SEQUENTIAL = pytest.mark.parametrize("true_sequential", [True, False], ids=["by group", "by block"])
METHOD = pytest.mark.parametrize(
    "options", [{"method": "wanda", "sparsity": 0.5}, {"method": "sparsegpt", "pattern": "2:4"}], ids=["wanda", "2:4"]
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prune(model: nn.Module, batches: Any, **options: Any) -> SparsePruner:
    pruner = SparsePruner(progress=False, batch_size=2, block_size=16, **{"method": "wanda", **options})
    pruner.prune(model, dataset=batches)
    return pruner


def run(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        output = model(**batch, **options)
    return output if isinstance(output, torch.Tensor) else output.logits


# The oracle.

Uses = dict[Key, list[torch.Tensor]]


def products_of(model: nn.Module, batch: Mapping[str, torch.Tensor], chosen: Sequence[Key]) -> Uses:
    """The rows that each of the chosen matrices is multiplied with, without padding, in the order of first use."""
    mask = batch.get("attention_mask")
    with Products(model) as products:
        run(model, batch)
    found: Uses = {}
    for key, uses in products.rows.items():
        if key in chosen:
            # No two tensors of these models have as many rows as the mask, but for the text that it is for.
            masked = [
                rows[mask.flatten().bool()] if mask is not None and len(rows) == mask.numel() else rows
                for rows in uses
            ]
            found[key] = [rows.float() for rows in masked]
    return found


class Oracle:
    """Prunes a model by running all of it anew for every group of matrices, or for every block."""

    def __init__(self, model: nn.Module, batches: Batches, config: SparseConfig, chosen: Sequence[Key]) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.chosen = list(chosen)

    def prune(self) -> None:
        dense = self.passes()
        repeated = [key for key in self.chosen if any(len(uses.get(key, ())) > 1 for uses in dense)]
        for key, rows in [(key, self.rows_of(key, dense)) for key in repeated]:
            self.solve([key], rows)
        done = set(repeated)
        blocks = find_blocks(self.model)
        for key in in_order(dense):
            if key in done:
                continue
            passes = self.passes()
            block = next((name for name in blocks if key[0].startswith(f"{name}.")), None)
            left = [other for other in self.chosen if other not in done]
            if self.config.true_sequential or block is None:
                stage = self.alike(key, left, passes)
            else:
                stage = [other for other in left if other[0].startswith(f"{block}.") and self.rows_of(other, passes)]
            rest = list(stage)
            while rest:
                group = self.alike(rest[0], rest, passes)
                self.solve(group, self.rows_of(group[0], passes))
                rest = [other for other in rest if other not in group]
            done.update(stage)

    def passes(self) -> list[Uses]:
        return [products_of(self.model, batch, self.chosen) for batch in self.batches]

    def rows_of(self, key: Key, passes: Sequence[Uses]) -> list[torch.Tensor]:
        return [rows for uses in passes for rows in uses.get(key, [])]

    def alike(self, key: Key, others: Sequence[Key], passes: Sequence[Uses]) -> list[Key]:
        """Those that have the same inputs on each batch, in the order in which they run."""
        order = in_order(passes)
        found = [other for other in others if all(same(uses.get(key), uses.get(other)) for uses in passes)]
        return sorted(found, key=order.index)

    def solve(self, group: Sequence[Key], rows: Sequence[torch.Tensor]) -> None:
        statistics = METHODS[self.config.method].statistics(group[0][2][1])
        for inputs in rows:
            statistics.add(inputs)
        weights = [matrix(self.model, key) for key in group]
        sizes = [len(weight) for weight in weights]
        pattern = parse_pattern(self.config.sparsity, self.config.pattern)
        solution = METHODS[self.config.method].solve(torch.cat(weights), statistics, pattern, self.config, sizes)
        for weight, solved in zip(weights, solution.weight.split(sizes), strict=True):
            weight.copy_(solved)


def same(ours: list[torch.Tensor] | None, theirs: list[torch.Tensor] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def in_order(passes: Sequence[Uses]) -> list[Key]:
    """What only a later batch uses comes right behind what came before it there."""
    order: list[Key] = []
    for uses in passes:
        place = 0
        for key in uses:
            if key not in order:
                order.insert(place, key)
            place = max(place, order.index(key) + 1)
    return order


def matrix(model: nn.Module, key: Key) -> torch.Tensor:
    """`[out, in]`, sharing memory with its parameter."""
    name, part, shape, transposed = key
    assert not transposed
    return model.get_parameter(name).detach().view(-1, *shape)[part]


def keys_of(model: nn.Module, pruner: SparsePruner) -> list[Key]:
    """Where the matrices of a report are in the model."""
    parameters = dict(model.named_parameters())
    keys = []
    for entry in pruner.report.matrices:
        owner, _, last = entry.name.rpartition(".")
        if f"{entry.name}.weight" in parameters:
            keys.append((f"{entry.name}.weight", 0, entry.shape, False))
        elif entry.name in parameters:
            keys.append((entry.name, 0, entry.shape, False))
        else:
            keys.append((owner, int(last), entry.shape, False))
    return keys


def assert_only_these_changed(model: nn.Module, dense: nn.Module, keys: Sequence[Key], pattern: str | None) -> None:
    """Each matrix has exactly half of its weights zero, and all else has the bits that it had."""
    expected = copy.deepcopy(dense)
    for key in keys:
        pruned = matrix(model, key)
        assert int((pruned == 0).sum()) * 2 == pruned.numel(), key
        assert pattern is None or ((pruned.reshape(-1, 4) == 0).sum(dim=1) == 2).all(), key
        matrix(expected, key).copy_(pruned)
    assert_same_bits(model, expected)
    for (name, buffer), (_, before) in zip(model.named_buffers(), dense.named_buffers(), strict=True):
        assert torch.equal(buffer, before), name


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def assert_nothing_left_behind(model: nn.Module, dense: nn.Module) -> None:
    """No hook but those that the model itself installs in its first forward, and no changed mode."""
    assert hooks_of(model) == hooks_of(dense)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for (name, parameter), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert parameter.requires_grad == before.requires_grad, name


def assert_all_accounted_for(model: nn.Module, pruner: SparsePruner, keys: Sequence[Key]) -> None:
    """Each linear layer is pruned or named with the reason why not."""
    pruned = {model.get_parameter(key[0]) for key in keys}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.weight in pruned) != (name in pruner.report.skipped), name


@SEQUENTIAL
@METHOD
@pytest.mark.parametrize("name", MODELS)
def test_models(name, options, true_sequential):
    model, batches = MODELS[name]()
    for batch in batches:
        run(model, batch)
    dense = copy.deepcopy(model)
    pruner = prune(model, batches, true_sequential=true_sequential, **options)
    keys = keys_of(model, pruner)
    assert len(keys) >= 8
    assert_only_these_changed(model, dense, keys, options.get("pattern"))
    assert_all_accounted_for(model, pruner, keys)
    expected = copy.deepcopy(dense)
    Oracle(expected, batches, pruner.config, keys).prune()
    assert_same_bits(model, expected)
    assert_nothing_left_behind(model, dense)


# What is pruned: all matrices in the layers, whatever the model is for.
PRUNED = {
    "t5": (2 * (4 + 3) + 2 * (4 + 4 + 3), {"lm_head"}),
    "bart": (2 * (4 + 2) + 2 * (4 + 4 + 2), {"lm_head"}),
    "bert": (2 * (4 + 2) + 1, {"cls.predictions.decoder"}),
    "whisper": (2 * (4 + 2) + 2 * (4 + 4 + 2), {"proj_out", "model.encoder.conv1", "model.encoder.conv2"}),
    "vit": (2 * (4 + 2) + 1, {"vit.embeddings.patch_embeddings.projection"}),
    "convnext": (5 * 2 + 1, None),
    "llava": (2 * (4 + 3), None),
    "plain": (2 * (2 + 3), {"lm_head"}),
    "interleaved": (3 * (2 + 3) + 3 * 3, {"lm_head"}),
    "looped": (2 * (2 + 3), {"lm_head"}),
    "experts": (2 * (2 + 4 * 3), {"lm_head", "stack.0.feed_forward.router", "stack.1.feed_forward.router"}),
}


@pytest.mark.parametrize(("name", "expected"), PRUNED.items(), ids=PRUNED)
def test_what_is_pruned(name, expected):
    model, batches = MODELS[name]()
    report = prune(model, batches).report
    count, dense = expected
    assert len(report.matrices) == count
    if dense is not None:
        # Tables of positions are no layers; what stays dense otherwise is named.
        tables = {name for name in report.skipped if "embed" in name and "projection" not in name}
        assert {name for name in report.skipped if name not in tables} == dense
    assert all(reason for reason in report.skipped.values())


def test_convolutions_stay_dense():
    model, batches = MODELS["convnext"]()
    report = prune(model, batches).report
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convolutions
    assert {name for name, reason in report.skipped.items() if reason == "is a convolution"} == convolutions


# Saving.


@pytest.mark.parametrize("name", TRANSFORMERS_MODELS)
def test_save_and_load(name, tmp_path):
    model, batches = MODELS[name]()
    pruner = prune(model, batches, pattern="2:4")
    pruner.save(model, tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for parameter, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(parameter)), parameter
        value.data = value.data.clone()  # memory-mapped weights are not aligned, which changes sums by an ulp
    for batch in batches:
        assert torch.equal(run(again, batch), run(model, batch))
    record = again.config.sparsity_config
    assert record == model.config.sparsity_config
    assert record["matrices"]


# Images and text.


def test_the_text_tower_is_pruned_by_default():
    model, batches = MODELS["llava"]()
    report = prune(model, batches).report
    assert {matrix.name.split(".")[1] for matrix in report.matrices} == {"language_model"}
    outside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model" not in n} - {
        "lm_head"
    }
    assert outside
    for name in outside:
        assert "outside the text model" in report.skipped[name] and "targets" in report.skipped[name]


@SEQUENTIAL
@pytest.mark.parametrize("targets", [["vision_tower.*"], ["*", "vision_tower.*"]], ids=["alone", "with the text"])
@pytest.mark.parametrize("name", ["llava", "llava_padded", "llava_mixed"])
def test_the_vision_tower_on_request(name, targets, true_sequential):
    """The padding of the text says nothing about the patches."""
    model, batches = MODELS[name]()
    dense = copy.deepcopy(model)
    pruner = prune(model, batches, sparsity=0.5, targets=targets, true_sequential=true_sequential)
    keys = keys_of(model, pruner)
    towers = {key[0].split(".")[1] for key in keys}
    assert towers == ({"vision_tower"} if len(targets) == 1 else {"vision_tower", "language_model"})
    assert len([key for key in keys if "vision_tower" in key[0]]) == 2 * (4 + 2)
    patches = sum(len(batch["pixel_values"]) * 5 for batch in batches if "pixel_values" in batch)
    seen = {m.num_tokens for m in pruner.report.matrices if "vision_tower" in m.name}
    assert seen == {patches}
    assert_only_these_changed(model, dense, keys, None)
    expected = copy.deepcopy(dense)
    Oracle(expected, batches, pruner.config, keys).prune()
    assert_same_bits(model, expected)


@pytest.mark.parametrize("target", ["vision_tower.*", "model.vision_tower.*", "multi_modal_projector.*"])
def test_the_reason_says_what_to_pass(target):
    """What `skipped` suggests does prune the module."""
    model, batches = MODELS["llava"]()
    report = prune(model, batches, targets=[target]).report
    assert report.matrices
    assert all(target.split(".")[-2] in matrix.name for matrix in report.matrices)


def test_the_suggested_target_works():
    model, batches = MODELS["llava"]()
    reasons = {r for r in prune(model, batches).report.skipped.values() if "outside the text model" in r}
    assert reasons
    for reason in reasons:
        target = reason.split("e.g. ")[1].strip("'")
        report = prune(llava_model(), batches, targets=["*", target]).report
        assert [m for m in report.matrices if "language_model" not in m.name], target


# Data.


def test_data_loader_of_model_inputs():
    """A loader that stacks samples; a batch is as it comes."""
    batches = three(images)
    rows = [{"pixel_values": row} for batch in batches for row in batch["pixel_values"]]
    model, expected = vit_model(), vit_model()
    pruner = prune(model, DataLoader(rows, batch_size=2))
    prune(expected, batches)
    assert_same_bits(model, expected)
    assert {matrix.num_tokens for matrix in pruner.report.matrices} == {6 * 17, 6}  # patches and a class; the classes


@SEQUENTIAL
@pytest.mark.parametrize("name", HAND_WRITTEN_MODELS)
def test_hidden_models_run_as_before(name, true_sequential):
    """The public call is all it takes, and what it leaves is a plain model."""
    model, batches = MODELS[name]()
    before = run(model, batches[0])
    pruner = SparsePruner(method="wanda", sparsity=0.5, true_sequential=true_sequential, progress=False)
    assert pruner.prune(model, dataset=[{"input_ids": batch["input_ids"]} for batch in batches]) is model
    after = run(model, batches[0])
    assert after.isfinite().all() and not torch.equal(before, after)
    assert not hasattr(model, "config")


@pytest.mark.parametrize("name", ["plain", "interleaved", "looped", "experts"])
def test_targets_choose_in_hidden_models(name):
    model, batches = MODELS[name]()
    report = prune(model, batches, targets=["attention.*"]).report
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".attention." in n]
    assert {matrix.name for matrix in report.matrices} == set(attentions)


# Errors.


def test_batches_that_the_forward_refuses():
    """The error is the model's own; a note says what was passed and what the forward takes."""
    model = bert_model()
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids") as caught:
        prune(model, three(images))
    note = "\n".join(caught.value.__notes__)
    assert "BertForMaskedLM.forward was called with pixel_values" in note
    assert "It takes input_ids, attention_mask" in note and "dataset=" in note
    assert_same_bits(model, dense)
    assert_nothing_left_behind(model, dense)


def test_a_model_without_a_matrix():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=r"Nothing to prune in Sequential .*is a convolution"):
        prune(model, [{"input": torch.randn(2, 3, 8, 8)}])


def test_a_model_without_any_weight():
    with pytest.raises(ValueError, match="it has no weight matrix"):
        prune(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)).eval(), [{"input": torch.randn(2, 4)}])


class GatheredExperts(nn.Module):
    """Each token brings a copy of its expert's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4)
        self.bank = nn.Parameter(0.1 * torch.randn(4, HIDDEN, HIDDEN))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen = self.router(hidden).argmax(dim=-1)
        return torch.matmul(self.bank[chosen], hidden[..., None])[..., 0]


@SEQUENTIAL
def test_experts_of_unknown_layout(true_sequential):
    model = random_model(lambda: Decoder(GatheredExperts))
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"stack\.0\.feed_forward\.bank of shape \[4, 32, 32\].*ignore=\['bank'\]"):
        prune(model, three(text), true_sequential=true_sequential)
    assert_same_bits(model, dense)
    # What the message says works.
    pruner = prune(model, three(text), ignore=["lm_head", "bank"], true_sequential=true_sequential)
    assert {m.name.rpartition(".")[2] for m in pruner.report.matrices} == {"query_key_value", "output"}
    assert pruner.report.skipped["stack.1.feed_forward.bank"] == "matches ignore"
    assert "router" in pruner.report.skipped["stack.1.feed_forward.router"]


MISTAKES: dict[str, Callable[[nn.Module], Any]] = {
    "targets that match nothing": lambda model: prune(model, three(text), targets=["no_such_layer"]),
    "everything ignored": lambda model: prune(model, three(text), ignore=["*"]),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("build", [bert_model, lambda: random_model(Decoder)], ids=["bert", "plain"])
def test_nothing_is_chosen(build, mistake):
    model = build()
    with pytest.raises(ValueError, match=f"Nothing to prune in {type(model).__name__}"):
        mistake(model)
    assert isinstance(model, PreTrainedModel) or not hasattr(model, "config")
