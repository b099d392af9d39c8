"""Padding in the middle of a forward, against batches of which the padding is zero, or that have none."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_sparse import SparsePruner
from optimum_sparse.methods import METHODS
from optimum_sparse.padding import Padding
from optimum_sparse.uses import Use, WeightUses
from tests.architectures import VOCABULARY, sweep_model
from tests.beyond_text import bert_model, t5_model

ROWS, LENGTH, DIM = 3, 5, 8
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
Batch = dict[str, torch.Tensor]
SEQUENTIAL = pytest.mark.parametrize("true_sequential", [True, False], ids=["by group", "by block"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidden_states(mask: torch.Tensor = MASK) -> torch.Tensor:
    """`[rows, tokens, DIM]`; padding is zero, and stays so in what is computed from it without a bias."""
    return random(*mask.shape, DIM) * mask[..., None]


def tokens_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.reshape(-1, inputs.shape[-1]).any(dim=1)


def kept(padding: Padding, inputs: torch.Tensor) -> torch.Tensor:
    keep = padding.keep(inputs)
    return torch.ones(inputs.shape[:-1].numel(), dtype=torch.bool) if keep is None else keep


# Known by shape.

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows and tokens": lambda x: x,
    "flat": lambda x: x.flatten(0, 1),
    "tokens first": lambda x: x.transpose(0, 1),
    "a dimension to broadcast": lambda x: x[:, None],
    "one in front": lambda x: x[None],
    "one in between, flat": lambda x: x.flatten(0, 1)[:, None],
    "heads": lambda x: x.unflatten(-1, (2, -1)),
    "heads, flat": lambda x: x.unflatten(-1, (2, -1)).flatten(0, 2)[None].unflatten(1, (ROWS, LENGTH, 2)),
    "a text as a whole": lambda x: x[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_layouts(layout, dtype):
    inputs = layout(hidden_states())
    assert torch.equal(kept(Padding([MASK.to(dtype)]), inputs), tokens_of(inputs))


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (2, 2)])
def test_layouts_of_small_batches(shape):
    mask = torch.ones(shape, dtype=torch.int64)
    mask.view(-1)[-1] = 0
    for layout in (LAYOUTS["rows and tokens"], LAYOUTS["flat"], LAYOUTS["a dimension to broadcast"]):
        inputs = layout(hidden_states(mask))
        assert torch.equal(kept(Padding([mask]), inputs), tokens_of(inputs))


def test_left_padding():
    mask = MASK.flip(1)
    assert torch.equal(kept(Padding([mask]), hidden_states(mask)), tokens_of(hidden_states(mask)))


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"attention_mask": torch.ones(ROWS, LENGTH)},
        {"attention_mask": torch.ones(ROWS, 1, LENGTH, LENGTH).tril()},  # who attends to whom
        {"attention_mask": None},
        {"attention_mask": torch.ones(ROWS, LENGTH), "decoder_attention_mask": torch.ones(ROWS, 7)},
    ],
    ids=["no mask", "all ones", "4-D", "None", "both all ones"],
)
def test_no_padding(batch):
    padding = Padding.of(batch, decoder_too="decoder_attention_mask" in batch)
    assert not padding
    assert padding.keep(random(2, 9, DIM)) is None  # of any shape


@pytest.mark.parametrize("shape", [(ROWS, LENGTH + 1), (7,), (LENGTH, LENGTH), (2, ROWS, LENGTH), (ROWS, 2, LENGTH)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"padding mask of shape \[3, 5\]: pass calibration data without padding"):
        Padding([MASK]).keep(random(*shape, DIM))


def test_heads_that_are_as_many_as_tokens_are_refused():
    """They may stand before or behind the tokens."""
    with pytest.raises(ValueError, match="cannot be matched"):
        Padding([MASK]).keep(random(ROWS, LENGTH, LENGTH, DIM))


def test_no_rows_have_no_padding():
    assert Padding([MASK]).keep(random(0, DIM)) is None


# Two masks.


def test_encoder_and_decoder():
    decoder = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    padding = Padding.of({"attention_mask": MASK, "decoder_attention_mask": decoder}, decoder_too=True)
    assert padding
    for mask in (MASK, decoder):
        for layout in (LAYOUTS["rows and tokens"], LAYOUTS["flat"]):
            inputs = layout(hidden_states(mask))
            assert torch.equal(kept(padding, inputs), tokens_of(inputs))


@pytest.mark.parametrize("name", ["decoder_input_ids", "labels"])
def test_a_decoder_without_a_mask_takes_all_tokens(name):
    padding = Padding.of({"attention_mask": MASK, name: torch.ones(ROWS, 4, dtype=torch.int64)}, decoder_too=True)
    assert padding.keep(random(ROWS, 4, DIM)) is None
    assert torch.equal(padding.keep(random(ROWS, LENGTH, DIM)), MASK.bool().flatten())


def test_a_decoder_takes_nothing_behind_the_last_label():
    labels = torch.tensor([[5, 6, 7], [5, -100, -100], [5, 6, -100]])
    padding = Padding.of({"labels": labels}, decoder_too=True)
    assert torch.equal(padding.keep(random(ROWS, 3, DIM)), (labels != -100).flatten())


def test_labels_of_a_model_without_an_encoder_say_nothing():
    padding = Padding.of({"attention_mask": MASK, "labels": MASK})
    assert torch.equal(padding.keep(random(ROWS, LENGTH, DIM)), MASK.bool().flatten())


def test_masks_of_equal_shape_that_differ_are_refused():
    other = MASK.flip(0)
    padding = Padding.of({"attention_mask": MASK, "decoder_attention_mask": other}, decoder_too=True)
    for layout in ("rows and tokens", "flat", "tokens first"):
        with pytest.raises(ValueError, match=r"shape \[3, 5\], \[3, 5\]"):
            padding.keep(LAYOUTS[layout](hidden_states()))
    with pytest.raises(ValueError, match="cannot be matched"):
        Padding.of({"attention_mask": MASK, "labels": MASK}, decoder_too=True).keep(hidden_states())
    same = Padding.of({"attention_mask": MASK, "decoder_attention_mask": MASK.clone()}, decoder_too=True)
    assert torch.equal(kept(same, hidden_states()), tokens_of(hidden_states()))


def test_masks_of_as_many_tokens_differ_when_flat():
    padding = Padding([MASK, torch.ones(5, 3)])
    with pytest.raises(ValueError, match="cannot be matched"):
        padding.keep(random(15, DIM))


# Rows that are picked by index.

Weights = Sequence[nn.Parameter]


def flat(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, DIM)


def gated(weights: Weights, mine: torch.Tensor) -> torch.Tensor:
    """A gate and up projection in one matrix, and the second matrix of an expert."""
    gate, up = F.linear(mine, weights[0]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights[1])


def by_mask(weights: Weights, hidden: torch.Tensor) -> None:
    chosen = flat(hidden).sum(-1) > 0.1
    gated(weights, flat(hidden)[chosen])
    gated(weights, hidden[chosen.view(hidden.shape[:2])])


def by_slices(weights: Weights, hidden: torch.Tensor) -> None:
    """Sorted by expert, and cut."""
    mine = flat(hidden)[torch.randperm(len(flat(hidden)), generator=torch.Generator().manual_seed(0)).repeat(2)]
    for part in (mine[:4], mine[4:11], mine[11:11], mine[11:]):
        gated(weights, part)
    for part in mine.split([3, 0, 9, 18]):
        gated(weights, part)


def matrix_by_matrix(weights: Weights, hidden: torch.Tensor) -> None:
    """As JetMoe: all experts with the first matrix, joined, and cut again for the second."""
    order = torch.arange(len(flat(hidden))).flip(0)
    parts = [F.linear(part, weights[0]) for part in flat(hidden)[order].split([6, 2, 7])]
    gate, up = torch.cat(parts, dim=0).chunk(2, dim=-1)
    for part in (torch.relu(gate) * up).split([6, 2, 7]):
        F.linear(part, weights[1])


def as_many_as_there_are(weights: Weights, hidden: torch.Tensor) -> None:
    """An expert that takes all tokens, in another order; the layer behind it takes them in theirs."""
    order = torch.arange(len(flat(hidden))).flip(0)
    output = gated(weights, flat(hidden)[order])
    result = torch.zeros_like(flat(hidden)).index_add_(0, order, output)
    F.linear(result, weights[0])
    F.linear(torch.zeros_like(flat(hidden)).index_add(0, order, output), weights[0])


def as_many_as_texts(weights: Weights, hidden: torch.Tensor) -> None:
    gated(weights, flat(hidden)[torch.tensor([4, 0, 9])])


def transposed(weights: Weights, hidden: torch.Tensor) -> None:
    mine = flat(hidden)[torch.tensor([4, 0, 9, 1, 1, 13, 14])]
    weights[0] @ mine.T


def heads(weights: Weights, hidden: torch.Tensor) -> None:
    """Of each token both of its experts, side by side."""
    twice = torch.stack([hidden, 2 * hidden], dim=2).flatten(0, 2)
    gated(weights, torch.stack([hidden, 2 * hidden], dim=2).reshape(-1, DIM)[torch.arange(len(twice)).flip(0)])


def gathered_twice(weights: Weights, hidden: torch.Tensor) -> None:
    mine = flat(hidden)[torch.tensor([4, 0, 9, 1, 1])]
    gated(weights, mine[torch.tensor([3, 0])])
    gated(weights, mine[torch.tensor([True, False, True, True, False])])


def with_scores(weights: Weights, hidden: torch.Tensor) -> None:
    """The weights of the experts are multiplied in before them."""
    token, slot = torch.tensor([4, 0, 9, 1]), torch.tensor([0, 1, 1, 0])
    scores = random(len(flat(hidden)), 2).sigmoid()
    gated(weights, flat(hidden)[token] * scores[token, slot, None])
    gated(weights, scores[token, slot, None] * flat(hidden)[token])


PICKS: dict[str, Callable[[Weights, torch.Tensor], Any]] = {
    "indices": lambda w, x: gated(w, flat(x)[torch.tensor([4, 0, 9, 1])]),
    "indices in a tuple": lambda w, x: gated(w, flat(x)[torch.tensor([4, 0, 9, 1]), :]),
    "index_select": lambda w, x: gated(w, flat(x).index_select(0, torch.tensor([4, 0, 9, 1]))),
    "torch.index_select": lambda w, x: gated(w, torch.index_select(flat(x), 0, torch.tensor([4, 0, 9, 1]))),
    "a mask": by_mask,
    "slices": by_slices,
    "matrix by matrix": matrix_by_matrix,
    "as many as there are": as_many_as_there_are,
    "as many as texts": as_many_as_texts,
    "transposed": transposed,
    "heads": heads,
    "twice": gathered_twice,
    "scores": with_scores,
    "one": lambda w, x: gated(w, flat(x)[torch.tensor([4])]),
    "none": lambda w, x: gated(w, flat(x)[torch.tensor([], dtype=torch.int64)]),
}


@pytest.mark.parametrize("function", PICKS.values(), ids=PICKS)
def test_rows_that_are_picked(function):
    padding = Padding([MASK])
    weights = [nn.Parameter(random(2 * 6, DIM, seed=2)), nn.Parameter(random(DIM, 6, seed=3))]
    uses = 0

    def note(use: Use) -> None:
        nonlocal uses
        uses += 1
        assert torch.equal(kept(padding, use.inputs), tokens_of(use.inputs))

    with torch.no_grad(), WeightUses({"0": weights[0], "1": weights[1]}, note, padding.saw_call):
        function(weights, hidden_states())
    assert uses


def test_rows_of_unknown_origin_are_refused():
    padding = Padding([MASK])

    def keep(use: Use) -> None:
        padding.keep(use.inputs)

    weight = nn.Parameter(random(DIM, DIM))
    with torch.no_grad(), WeightUses({"w": weight}, keep, padding.saw_call):
        with pytest.raises(ValueError, match=r"inputs of shape \[4, 8\]"):
            F.linear(flat(hidden_states())[torch.tensor([4, 0, 9, 1])].flip(0).cumsum(0)[1:].repeat(2, 1)[:4], weight)
        with pytest.raises(ValueError, match=r"inputs of shape \[2, 5, 8\]"):
            F.linear(hidden_states()[torch.tensor([2, 0])], weight)  # whole texts


# Whole models: the same tokens with padding and without.


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def texts(lengths: Sequence[int], seed: int = 3) -> list[Batch]:
    """Each in a batch of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, n), generator=generator)} for n in lengths]


def padded(batches: Sequence[Batch]) -> Batch:
    """All texts in one batch."""
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    ids = torch.zeros(len(batches), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (batch, length) in enumerate(zip(batches, lengths, strict=True)):
        ids[row, :length], mask[row, :length] = batch["input_ids"][0], 1
    rest = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "input_ids"}
    return {"input_ids": ids, "attention_mask": mask, **rest}


def t5_texts() -> list[Batch]:
    decoder = torch.randint(3, 100, (3, 1, 7), generator=torch.Generator().manual_seed(4))
    return [batch | {"decoder_input_ids": ids} for batch, ids in zip(texts((24, 17, 9)), decoder, strict=True)]


Seen = list[tuple[int, torch.Tensor]]


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """What statistics Wanda was given: the number of tokens and the squared norms, in the order of solving."""
    found: Seen = []
    wanda = METHODS["wanda"]

    def solve(weight: torch.Tensor, statistics: Any, *args: Any) -> Any:
        found.append((statistics.num_tokens, statistics.squared_norms.clone()))
        return wanda.solve(weight, statistics, *args)

    monkeypatch.setitem(METHODS, "wanda", dataclasses.replace(wanda, solve=solve))
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Batch]]]] = {
    **{
        model_type: (lambda model_type=model_type: sweep_model(model_type), lambda: texts((24, 17, 9)))
        for model_type in (
            "llama",
            "mixtral",
            "gpt_oss",
            "jetmoe",
            "llama4_text",
            "dbrx",
            "deepseek_v3",
            "longcat_flash",
            "inkling_text",
            "nemotron_h",
            "zaya",
        )
    },
    "t5": (t5_model, t5_texts),
    "bert": (bert_model, lambda: texts((24, 17, 9))),
}


@SEQUENTIAL
@pytest.mark.parametrize("min_expert_tokens", [1, None], ids=["own", "blended"])
@pytest.mark.parametrize(("build", "data"), MODELS.values(), ids=MODELS)
def test_padding_makes_no_difference(build, data, min_expert_tokens, true_sequential, seen):
    alone, together = build(), build()
    pruners = []
    for model, batches in ((alone, data()), (together, [padded(data())])):
        options = dict(min_expert_tokens=min_expert_tokens, true_sequential=true_sequential)
        pruners.append(SparsePruner(method="wanda", sparsity=0.5, progress=False, **options))
        pruners[-1].prune(model, dataset=batches)
    without, with_padding = ([(m.name, m.num_tokens, m.layer_share) for m in p.report.matrices] for p in pruners)
    assert with_padding == without
    assert len(seen) % 2 == 0
    for ours, theirs in zip(seen[len(seen) // 2 :], seen[: len(seen) // 2], strict=True):
        assert ours[0] == theirs[0]
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
    for (name, ours), (_, theirs) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(ours == 0, theirs == 0), name


@pytest.mark.parametrize("build", [t5_model, lambda: sweep_model("llama")], ids=["t5", "llama"])
def test_padded_batches_with_labels(build, seen):
    """As a data collator makes them; and without labels, where a decoder gets the tokens themselves."""
    for with_labels in (True, False):
        alone, together, lengths = build(), build(), (24, 17, 9)
        for model, batches in ((alone, texts(lengths)), (together, [padded(texts(lengths))])):
            if with_labels:
                for batch in batches:
                    mask = batch.get("attention_mask", torch.ones(1))
                    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
            SparsePruner(method="wanda", sparsity=0.5, progress=False).prune(model, dataset=batches)
        half = len(seen) // 2
        for ours, theirs in zip(seen[half:], seen[:half], strict=True):
            assert ours[0] == theirs[0]
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
        seen.clear()


@pytest.mark.parametrize(
    "options", [{"error_correction": 0.5, "method": "sparsegpt"}, {"reconstruct": 1}], ids=["correction", "training"]
)
def test_what_stands_in_padding_makes_no_difference(options):
    """Neither blocks nor corrections are judged by it."""
    models, judged = [], []
    for filler in (0, 77):
        batches = [padded(texts((24, 9, 17), seed)) for seed in range(4)]
        for batch in batches:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)
        model = sweep_model("llama")
        pruner = SparsePruner(sparsity=0.5, progress=False, **options)
        pruner.prune(model, dataset=batches)
        models.append(model.state_dict())
        judged.append([pruner.report.correction, pruner.report.reconstruction])
    assert judged[0] == judged[1] and any(judged[0])
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


# model type -> the router of a layer, its parameter, and a matrix of its experts
ROUTERS = {
    "mixtral": ("mlp.gate", "mlp.gate.weight", "mlp.experts.gate_up_proj"),
    "gpt_oss": ("mlp.router", "mlp.router.weight", "mlp.experts.down_proj"),
    "jetmoe": ("mlp.router", "mlp.router.layer.weight", "mlp.input_linear"),
    "llama4_text": ("feed_forward.router", "feed_forward.router.weight", "feed_forward.experts.gate_up_proj"),
}


def routed(model: nn.Module, batch: Batch, router: str, weight: str) -> list[int]:
    """How many tokens that are no padding are routed to each expert, from the input of the router alone."""
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(router).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    bias = getattr(model.get_submodule(router), "bias", None)
    scores = F.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), model.get_parameter(weight), bias)
    chosen = scores.topk(2, dim=-1).indices[batch["attention_mask"].flatten().bool()]
    return chosen.flatten().bincount(minlength=len(scores[0])).tolist()


@SEQUENTIAL
@pytest.mark.parametrize(("model_type", "names"), ROUTERS.items(), ids=ROUTERS)
def test_tokens_of_each_expert(model_type, names, true_sequential):
    model, dense = sweep_model(model_type), sweep_model(model_type)
    batch = padded(texts((24, 17, 9)))
    pruner = SparsePruner(method="wanda", sparsity=0.5, true_sequential=true_sequential, progress=False)
    pruner.prune(model, dataset=[batch])
    reported = {matrix.name: matrix.num_tokens for matrix in pruner.report.matrices}
    layers = [index for index in range(2) if f"model.layers.{index}.{names[2]}.0" in reported]
    assert layers
    for index in layers:
        asked = copy.deepcopy(model)
        if not true_sequential:  # the inputs of a block before any matrix of it is pruned
            asked.model.layers[index].load_state_dict(dense.model.layers[index].state_dict())
        router, weight, matrix = (f"model.layers.{index}.{name}" for name in names)
        counts = routed(asked, batch, router, weight)
        assert [reported[f"{matrix}.{expert}"] for expert in range(4)] == counts
        assert sum(counts) == 2 * (24 + 17 + 9)
