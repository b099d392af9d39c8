"""`PrunableMatrix`, the choice of matrices by name, and the blocks of every architecture in the zoo."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from optimum_sparse import SparseConfig
from optimum_sparse.matrices import PrunableMatrix, find_blocks, find_matrices, find_weights, unmatched
from optimum_sparse.patterns import NM, Unstructured
from optimum_sparse.trace import Trace, trace
from optimum_sparse.uses import View
from tests.helpers import ARCHITECTURES, tiny_batches, tiny_mixtral, tiny_model

# The name of the list that holds the decoder's layers, where it is not `model.layers`.
LAYERS = {
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "mpt": "transformer.blocks",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


def matrix_of(module: nn.Module) -> PrunableMatrix:
    view = View("name.weight", 0, (4, 6), transposed=isinstance(module, Conv1D))
    return PrunableMatrix("name", view, module, Unstructured(0.5), "block")


def seen_in(model: nn.Module) -> Trace:
    """What a forward on a batch of tokens shows."""
    weights = {weight.parameter: weight.value for weight in find_weights(model)}
    with torch.no_grad():
        return trace(lambda batch: model(**batch), tiny_batches(1), model, weights, find_blocks(model))


def names(model: nn.Module, **options) -> list[str]:
    matrices, _ = find_matrices(model, SparseConfig(**options))
    return [matrix.name for matrix in matrices]


def layer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


@pytest.mark.parametrize("module", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_and_write(module, dtype):
    module = module.to(dtype)
    parameter, address = module.weight, module.weight.data_ptr()
    matrix = matrix_of(module)
    assert matrix.shape == tuple(matrix.read().shape) == (4, 6)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    matrix.write(weight)
    assert torch.equal(matrix.read(), weight.to(dtype))
    assert matrix.read().dtype == dtype and not matrix.read().requires_grad
    # In place: optimizers, tied weights and memory maps keep their hold of the parameter.
    assert module.weight is parameter and parameter.data_ptr() == address
    assert parameter.is_contiguous() and parameter.requires_grad
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(module(inputs), F.linear(inputs, weight.to(dtype), module.bias))


def test_falcon_has_a_linear_of_its_own():
    model = tiny_model("falcon")
    matrices, _ = find_matrices(model, SparseConfig())
    assert {type(matrix.module).__name__ for matrix in matrices} == {"FalconLinear"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zoo_all_layers_but_the_head_are_found(architecture):
    model = tiny_model(architecture)
    matrices, skipped = find_matrices(model, SparseConfig())
    head = model.get_output_embeddings()
    by_weight: dict[nn.Parameter, list[nn.Module]] = {}
    for name in layer_names(model):
        module = model.get_submodule(name)
        if module is head:
            assert name in skipped
        else:
            by_weight.setdefault(module.weight, []).append(module)
    assert {matrix.parameter: matrix.module for matrix in matrices} == {w: users[0] for w, users in by_weight.items()}
    owners = {weight.value: list(weight.modules) for weight in find_weights(model)}
    assert {matrix.parameter: owners[matrix.parameter] for matrix in matrices} == by_weight
    undecided = ("is a convolution", "only a forward shows how it is used")
    assert [name for name, reason in skipped.items() if reason not in undecided] == ["lm_head"]
    for matrix in matrices:
        assert model.get_submodule(matrix.name) is matrix.module
        assert matrix.view.parameter == f"{matrix.name}.weight" and not matrix.is_part
        module = matrix.module
        expected = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        assert matrix.shape == tuple(matrix.read().shape) == expected
        assert matrix.name.startswith(matrix.block + ".")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zoo_forwards_show_the_same_matrices_as_the_classes(architecture):
    """Without a look at any class, down to the layout, for the model's own forward multiplies with them."""
    model = tiny_model(architecture)
    by_class, _ = find_matrices(model, SparseConfig())
    by_use, skipped = find_matrices(model, SparseConfig(), seen_in(model))
    assert by_use == by_class
    assert not [name for name in skipped if name in layer_names(model) and name != "lm_head"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zoo_blocks(architecture):
    model = tiny_model(architecture)
    count = 4 if architecture == "zamba2" else 2
    layers = LAYERS.get(architecture, "model.layers")
    assert find_blocks(model) == [f"{layers}.{index}" for index in range(count)]


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi", "llama"])
def test_lm_head_stands_for_the_output_embeddings(architecture):
    model = tiny_model(architecture, tie_word_embeddings=False)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    _, skipped = find_matrices(model, SparseConfig())
    assert skipped == {head: "matches ignore"}
    assert head in names(model, ignore=())


def test_a_head_that_is_an_embedding_is_skipped():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    matrices, skipped = find_matrices(model, SparseConfig(ignore=()))
    assert "lm_head" not in [matrix.name for matrix in matrices]
    assert "model.embed_tokens" in skipped["lm_head"]


def test_tied_layers_are_one_matrix():
    model = tiny_model()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    matrices, _ = find_matrices(model, SparseConfig())
    matrix = next(matrix for matrix in matrices if matrix.parameter is first.weight)
    assert matrix.module is first
    weight = next(weight for weight in find_weights(model) if weight.value is first.weight)
    assert weight.modules == (first, second)
    assert weight.names == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert sum(matrix.parameter is first.weight for matrix in matrices) == 1
    matrix.write(torch.zeros(matrix.shape))
    assert not second.weight.any()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], lambda name: name.endswith(".q_proj")),
        (["mlp.*"], lambda name: ".mlp." in name),
        (["model.layers.0.*"], lambda name: ".layers.0." in name),
        (["*.layers.1.self_attn.?_proj"], lambda name: ".layers.1.self_attn." in name),
        (["[qk]_proj", "down_proj"], lambda name: name.endswith((".q_proj", ".k_proj", ".down_proj"))),
        (["layers.0.mlp.up_proj"], lambda name: name == "model.layers.0.mlp.up_proj"),
        (["*"], lambda name: name != "lm_head"),
    ],
)
def test_targets(targets, expected):
    model = tiny_model()
    wanted = [name for name in layer_names(model) if expected(name)]
    assert wanted and names(model, targets=targets) == wanted


@pytest.mark.parametrize("target", ["proj", "_proj", "self_attn", "lp.up_proj", "Q_PROJ", "q_proj.weight"])
def test_a_target_is_a_whole_suffix(target):
    with pytest.raises(ValueError, match="Nothing to prune") as error:
        names(tiny_model(), targets=[target])
    assert target in str(error.value)


def test_ignore_wins_over_targets():
    found = names(tiny_model(), targets=["mlp.*", "q_proj"], ignore=["layers.0.*", "gate_proj"])
    assert found == [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


def test_block_range():
    model = tiny_model(num_hidden_layers=4)
    matrices, skipped = find_matrices(model, SparseConfig(block_range=(1, 3), ignore=()))
    assert {matrix.block for matrix in matrices} == {"model.layers.1", "model.layers.2"}
    assert skipped["lm_head"] == skipped["model.layers.0.mlp.up_proj"] == "outside block_range"
    with pytest.raises(ValueError, match=r"Nothing to prune.*\(4, 9\)"):
        find_matrices(model, SparseConfig(block_range=(4, 9)))


def test_overrides_the_last_match_wins():
    overrides = [
        {"match": "mlp.*", "sparsity": 0.75},
        {"match": "layers.0.mlp.up_proj", "pattern": "2:4"},
        {"match": "k_proj", "sparsity": 0},
        {"match": "layers.1.self_attn.k_proj", "sparsity": 0.25},
    ]
    matrices, skipped = find_matrices(tiny_model(), SparseConfig(sparsity=0.5, overrides=overrides))
    pattern = {matrix.name: matrix.pattern for matrix in matrices}
    assert pattern["model.layers.0.mlp.up_proj"] == NM(2, 4)
    assert pattern["model.layers.1.mlp.up_proj"] == pattern["model.layers.0.mlp.down_proj"] == Unstructured(0.75)
    assert pattern["model.layers.1.self_attn.k_proj"] == Unstructured(0.25)
    assert pattern["model.layers.0.self_attn.q_proj"] == Unstructured(0.5)
    assert "model.layers.0.self_attn.k_proj" not in pattern
    assert "overrides" in skipped["model.layers.0.self_attn.k_proj"]


def test_a_pattern_must_divide_the_inputs():
    model = tiny_model(intermediate_size=50)
    with pytest.raises(ValueError, match=r"2:4.*50 inputs of model\.layers\.0\.mlp\.down_proj") as error:
        find_matrices(model, SparseConfig(pattern="2:4"))
    assert "ignore" in str(error.value)
    assert "model.layers.0.mlp.up_proj" in names(model, pattern="2:4", ignore=["lm_head", "down_proj"])
    assert len(names(model, pattern="1:2")) == 14


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match=r"Nothing to prune in Sequential.* 1 \(0, \.\.\.\) is a convolution"):
        find_matrices(nn.Sequential(nn.Conv2d(1, 1, 3)), SparseConfig())
    with pytest.raises(ValueError, match=r"Nothing to prune in Sequential.* it has no weight matrix"):
        find_matrices(nn.Sequential(nn.LayerNorm(3)), SparseConfig())


class Block(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_blocks_are_the_outermost_lists_of_layers():
    model = nn.Module()
    model.many = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
    model.layers = nn.ModuleList([Block(), Block()])
    assert find_blocks(model) == ["layers.0", "layers.1"]


def test_blocks_without_the_class_of_transformers():
    """The longest list of modules of one class that hold matrices, in the order in which they stand."""
    model = nn.Module()
    model.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(9)])
    model.mixed = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()])
    model.stack = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    model.pair = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert find_blocks(model) == ["stack.0", "stack.1", "stack.2"]


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(model) == []
    matrices, _ = find_matrices(model, SparseConfig())
    assert [(matrix.name, matrix.block) for matrix in matrices] == [("0", "0"), ("2", "2")]


def test_weights_that_are_not_contiguous_stay_dense():
    model = tiny_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.t().contiguous().t())
    for seen in (None, seen_in(model)):
        matrices, skipped = find_matrices(model, SparseConfig(method="magnitude"), seen)
        assert "not contiguous" in skipped["model.layers.0.self_attn.q_proj"]
        assert len(matrices) == 13


def test_the_advice_keeps_what_is_ignored():
    with pytest.raises(ValueError, match=r"ignore=\['lm_head', 'q_proj'\]"):
        find_matrices(tiny_model(), SparseConfig(pattern="5:7"))
    model = tiny_mixtral(intermediate_size=36)
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"the 36 inputs of .*down_proj.*ignore=\['lm_head', 'down_proj'\]"):
        find_matrices(model, SparseConfig(pattern="4:8"), seen_in(model))


@pytest.mark.parametrize("model", [tiny_model(), tiny_mixtral()], ids=["llama", "mixtral"])
def test_patterns_that_match_nothing_are_named(model):
    names = [name for name, _ in model.named_parameters() if "layers.0" in name and "proj" in name]
    fine = SparseConfig(
        targets=["*proj*", "experts.*"] if "experts" in names[-1] else ["*proj"],
        ignore=["lm_head", "embed_tokens", "k_proj", names[0].removesuffix(".weight")],
        overrides=[{"match": "self_attn.*", "sparsity": 0.1}],
    )
    assert unmatched(model, fine) == []
    override = {"match": "kproj", "sparsity": 0}
    slips = SparseConfig(targets=["o_proj", "qproj"], ignore=["self_attn"], overrides=[override])
    assert unmatched(model, slips) == [
        "targets: 'qproj' matches no weight of the model",
        "ignore: 'self_attn' matches no weight of the model",
        "overrides: 'kproj' matches no weight of the model",
    ]


def test_an_expert_can_be_named():
    assert unmatched(tiny_mixtral(), SparseConfig(ignore=["experts.gate_up_proj.3"])) == []
    assert unmatched(tiny_mixtral(), SparseConfig(ignore=["experts.gate_up_proj.4"])) != []
