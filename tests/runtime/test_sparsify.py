"""`sparsify_for_inference`: what it chooses, and that the model computes the same afterwards."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from optimum_sparse import SparsePruner, sparsify_for_inference
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.report import read_report
from optimum_sparse.runtime import DenseLinear, SparseLinear, gpu, kernels, semi_structured, sparsify
from optimum_sparse.saving import GRIDS_FILE

from ..helpers import ARCHITECTURES, tiny_batches, tiny_model
from .levels import use_level
from .test_quantized import random_grid, random_values


def prune(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    """Set the smallest weights of each linear layer to zero, those of the head excepted."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name:
            weight = module.weight.data
            threshold = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
            weight[weight.abs() <= threshold] = 0
    return model


def forms(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}


def three_layers() -> nn.Module:
    """One layer without zeros and two with, of which one is of another shape."""
    model = nn.ModuleDict({"full": nn.Linear(64, 64), "pruned": nn.Linear(64, 64), "wide": nn.Linear(128, 64)})
    for name in ("pruned", "wide"):
        model[name].weight.data.view(-1)[::2] = 0
    return model


def quantized(dtype: torch.dtype = torch.bfloat16, **options) -> tuple[nn.Module, SparsePruner]:
    """A tiny model at 50 %, on grids of 8 bits."""
    model = tiny_model("llama").to(dtype)
    settings = {"method": "magnitude", "quantization": "int8", "group_size": -1, **options}
    pruner = SparsePruner(progress=False, **settings)
    pruner.prune(model)
    return model, pruner


def choices(report) -> set[str]:
    """Of the layers that were pruned."""
    return {layer.choice for layer in report.layers if layer.names != ["lm_head"]}


def give_times(monkeypatch: pytest.MonkeyPatch, **times: float) -> list[dict[str, list[str]]]:
    """Let the measurement find these microseconds; returns what was measured, and with how many tokens."""
    use_level(monkeypatch, "portable")
    measured = []

    def fake(ways: dict, x: torch.Tensor, cuda_graphs: bool) -> dict[str, float]:
        measured.append(({way: [type(layer).__name__ for layer in layers] for way, layers in ways.items()}, len(x)))
        return {way: times[way] for way in ways}

    monkeypatch.setattr(sparsify, "microseconds", fake)
    return measured


@pytest.mark.parametrize(
    ("times", "pruned", "full"),
    [
        (dict(torch=100, dense=60, sparse=40), "SparseLinear", "DenseLinear"),
        (dict(torch=100, dense=40, sparse=60), "DenseLinear", "DenseLinear"),
        (dict(torch=40, dense=60, sparse=60), "Linear", "Linear"),
        (dict(torch=100, dense=99, sparse=99), "Linear", "Linear"),  # ties
        (dict(torch=100, dense=50, sparse=49.5), "DenseLinear", "DenseLinear"),
    ],
)
def test_each_layer_keeps_its_fastest_form(monkeypatch: pytest.MonkeyPatch, times: dict, pruned: str, full: str):
    measured = give_times(monkeypatch, **times)
    model = three_layers()
    report = sparsify_for_inference(model)
    assert forms(model) == {"full": full, "pruned": pruned, "wide": pruned}
    assert measured == [
        ({"torch": ["Linear"], "dense": ["DenseLinear"]}, 1),
        ({"torch": ["Linear"], "dense": ["DenseLinear"], "sparse": ["SparseLinear"]}, 1),
        ({"torch": ["Linear"], "dense": ["DenseLinear"], "sparse": ["SparseLinear"]}, 1),
    ]
    assert [layer.names for layer in report.layers] == [["full"], ["pruned"], ["wide"]]
    assert report.layers[1].microseconds == times and report.layers[1].sparsity == 0.5


def test_larger_batches_are_measured_with_as_many_tokens(monkeypatch: pytest.MonkeyPatch):
    measured = give_times(monkeypatch, torch=100, sparse=50)
    model = three_layers()
    report = sparsify_for_inference(model, batch_size=4)
    assert forms(model) == {"full": "Linear", "pruned": "SparseLinear", "wide": "SparseLinear"}
    assert measured == [({"torch": ["Linear"], "sparse": ["SparseLinear"]}, 4)] * 2
    assert report.layers[0].reason == "not timed: it has too few zeros to become smaller"


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers count as those on a GPU with units for 2:4, which hold the dense weight here."""
    monkeypatch.setattr(sparsify, "_on_gpu", lambda weight: True)
    monkeypatch.setattr(gpu, "MISSING", None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    monkeypatch.setattr(semi_structured.SemiStructuredLinear, "nbytes", 1000)


def layers_for_a_gpu() -> nn.Module:
    """One without zeros, one with half of them in no pattern, and two that are 2:4, one of them with 24 rows."""
    model = three_layers().bfloat16()
    model["pruned"].weight.data.copy_(torch.arange(64 * 64).view(64, 64) % 64 // 32)
    model["odd"] = nn.Linear(64, 24, dtype=torch.bfloat16)
    model["odd"].weight.data.view(-1)[::2] = 0
    return model


@pytest.mark.parametrize(
    ("times", "pruned", "wide"),
    [
        ({"torch": 100, "sparse": 50, "2:4": 40}, "SparseLinear", "SemiStructuredLinear"),
        ({"torch": 100, "sparse": 50, "2:4": 60}, "SparseLinear", "SparseLinear"),
        ({"torch": 100, "sparse": 99, "2:4": 99}, "Linear", "Linear"),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 4096])
def test_layers_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, as_if_on_a_gpu: None, times: dict, pruned: str, wide: str, batch_size: int
):
    measured = give_times(monkeypatch, **times)
    monkeypatch.setattr(kernels, "LEVEL", "torch")  # those for the CPU do not matter
    model = layers_for_a_gpu()
    report = sparsify_for_inference(model, batch_size)
    assert forms(model) == {"full": "Linear", "pruned": pruned, "wide": wide, "odd": pruned}
    without, both = {"torch": ["Linear"], "sparse": ["SparseLinear"]}, {"2:4": ["SemiStructuredLinear"]}
    assert measured == [(without, batch_size), (without | both, batch_size), (without, batch_size)]
    assert [layer.reason for layer in report.layers] == [
        "sparse not timed: it has too few zeros to become smaller",
        None,
        None,
        "2:4 not timed: rows and columns must be multiples of 16",
    ]
    assert (report.kernel, report.missing) == ("triton", None)
    if wide == "SemiStructuredLinear":
        assert report.layers[2].bytes == 1000 and "µs 2:4" in str(report)


def test_on_a_gpu_without_triton_only_2_4_is_timed(monkeypatch: pytest.MonkeyPatch, as_if_on_a_gpu: None):
    give_times(monkeypatch, **{"torch": 100, "2:4": 50})
    monkeypatch.setattr(gpu, "MISSING", "no Triton")
    model = layers_for_a_gpu()
    report = sparsify_for_inference(model)
    assert forms(model) == {"full": "Linear", "pruned": "Linear", "wide": "SemiStructuredLinear", "odd": "Linear"}
    assert "sparse not timed: no Triton" in str(report) and report.missing == "no Triton"


def test_only_layers_on_a_gpu_are_recorded(monkeypatch: pytest.MonkeyPatch):
    measured = []
    monkeypatch.setattr(kernels, "compiled", lambda: True)
    monkeypatch.setattr(
        sparsify, "microseconds", lambda ways, x, cuda_graphs: measured.append(cuda_graphs) or {"torch": 1.0}
    )
    monkeypatch.setattr(sparsify, "_ways", lambda members, batch_size: (["torch", "torch"], None))
    sparsify_for_inference(three_layers(), cuda_graphs=True)
    monkeypatch.setattr(sparsify, "_on_gpu", lambda weight: True)
    sparsify_for_inference(three_layers(), cuda_graphs=True)
    assert measured == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("dense", "full"), [(60, "DenseLinear"), (99, "Linear")])
def test_memory_packs_all_that_become_smaller_and_times_the_others(
    monkeypatch: pytest.MonkeyPatch, dense: int, full: str
):
    measured = give_times(monkeypatch, torch=100, dense=dense)
    model = three_layers()
    report = sparsify_for_inference(model, prefer="memory")
    assert forms(model) == {"full": full, "pruned": "SparseLinear", "wide": "SparseLinear"}
    assert measured == [({"torch": ["Linear"], "dense": ["DenseLinear"]}, 1)]
    assert report.layers[0].reason == "not packed: it has too few zeros to become smaller"
    assert report.layers[0].microseconds == {"torch": 100, "dense": dense}
    assert report.bytes == 64 * 64 * 4 + sum(model[name].tiles.nbytes for name in ("pruned", "wide"))
    assert report.dense_bytes == 64 * (64 + 64 + 128) * 4


@pytest.mark.parametrize("way", ["grids", "folder", "file"])
def test_quantised_models_keep_a_byte_for_each_weight(way: str, tmp_path: Path):
    model, pruner = quantized()
    dense = copy.deepcopy(model)
    pruner.save(model, tmp_path)
    given = {"grids": pruner.grids, "folder": tmp_path, "file": str(tmp_path / GRIDS_FILE)}[way]
    report = sparsify_for_inference(model, prefer="memory", grids=given)
    assert choices(report) == {"int8"}
    assert all(layer.reason is None for layer in report.layers if layer.choice == "int8")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert layers and all(layer.quantized for layer in layers)


@pytest.mark.parametrize("compressed", [True, False])
def test_grids_beside_the_checkpoint_are_found(compressed: bool, tmp_path: Path):
    model, pruner = quantized()
    pruner.save(model, tmp_path, compressed=compressed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert choices(sparsify_for_inference(loaded, prefer="memory")) == {"int8"}
    (tmp_path / GRIDS_FILE).write_bytes(b"nothing")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    report = sparsify_for_inference(loaded, prefer="memory")
    assert choices(report) == {"sparse"} and "not as int8: the grids of" in str(report)


def test_why_a_quantised_model_keeps_its_type():
    model, _ = quantized()
    report = sparsify_for_inference(model, prefer="memory")
    assert choices(report) == {"sparse"}
    assert "not as int8: the model is quantised, but there is no quantization/grids.safetensors where" in str(report)
    assert "give grids=pruner.grids" in str(report)

    model, pruner = quantized(group_size=16)
    report = sparsify_for_inference(model, prefer="memory", grids=pruner.grids)
    assert choices(report) == {"sparse"} and "its grid has 16 inputs, which is no multiple of 128" in str(report)

    model, pruner = quantized()
    model.model.layers[0].self_attn.q_proj.weight.data[0, :2] = torch.tensor([0.0173, 0.0371])
    report = sparsify_for_inference(model, prefer="memory", grids=pruner.grids)
    assert choices(report) == {"int8", "sparse"}
    (left,) = (layer for layer in report.layers if layer.choice == "sparse")
    assert left.names == ["model.layers.0.self_attn.q_proj"] and "weights are not on the grid" in left.reason

    model, pruner = quantized(torch.float16)
    report = sparsify_for_inference(model, prefer="memory", grids=pruner.grids)
    assert choices(report) == {"sparse"} and "no kernels for codes in torch.float16" in str(report)


def test_grids_of_other_names():
    model, pruner = quantized()
    with pytest.raises(
        ValueError, match=r"grids are of 14 matrices \(model\.layers.* no layer has one of these names"
    ):
        sparsify_for_inference(model.model, prefer="memory", grids=pruner.grids)
    some = {name: grid for name, grid in pruner.grids.items() if "q_proj" not in name}
    report = sparsify_for_inference(model, prefer="memory", grids=some)
    (left,) = (layer for layer in report.layers if layer.choice == "sparse")
    assert (
        left.names == ["model.layers.{0-1}.self_attn.q_proj"] and left.reason == "not as int8: there is no grid for it"
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_weights_of_any_strides(batch_size: int):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    model[0].weight = nn.Parameter(model[0].weight.detach().T)
    model[1].weight.data[torch.rand(64, 64) < 0.9] = 0
    model[1].bias = nn.Parameter(torch.randn(64, 2)[:, 0])
    x = torch.randn(batch_size, 64)
    with torch.no_grad():
        expected = model(x)
        for prefer in ("speed", "memory"):
            report = sparsify_for_inference(model, batch_size, prefer)
            assert not any("dense" in layer.microseconds for layer in report.layers if "0" in layer.names)
            torch.testing.assert_close(model(x), expected)
    assert isinstance(model[1], SparseLinear | DenseLinear)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_no_layer_of_the_runtime_is_pruned(method: str):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = DenseLinear.from_linear(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"1 layers are for inference, among them model\.layers\.1\.mlp\.up_proj"):
        SparsePruner(method=method, progress=False).prune(model, dataset=tiny_batches())


def test_a_packed_model_is_saved_as_large_as_it_would_be(tmp_path: Path):
    model, pruner = tiny_model("llama"), SparsePruner(method="magnitude", sparsity=0.5, progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path / "before")
    sparsify_for_inference(model, prefer="memory")
    pruner.save(model, tmp_path / "after")
    sizes = [read_report(tmp_path / name).sizes for name in ("before", "after")]
    assert sizes[0] == sizes[1] and sizes[0]["dense"] > 0


def test_models_that_are_not_quantised_need_no_grids(tmp_path: Path):
    model, pruner = tiny_model("llama"), SparsePruner(method="magnitude", sparsity=0.5, progress=False)
    pruner.prune(model)
    report = sparsify_for_inference(model, prefer="memory")
    assert choices(report) == {"sparse"} and all(layer.reason is None for layer in report.layers[:-1])
    with pytest.raises(FileNotFoundError, match=r"give the folder that SparsePruner\.save wrote"):
        sparsify_for_inference(model, grids=tmp_path)


@pytest.mark.parametrize(("int8", "choice"), [(30, "int8"), (50, "sparse"), (39.5, "sparse")])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_quantised_layers_are_timed_in_all_forms(
    monkeypatch: pytest.MonkeyPatch, int8: float, choice: str, batch_size: int
):
    measured = give_times(monkeypatch, torch=100, dense=60, sparse=40, int8=int8)
    model, pruner = quantized()
    report = sparsify_for_inference(model, batch_size, grids=pruner.grids)
    assert choices(report) == {choice}
    ways = ["torch", *(["dense"] if batch_size == 1 else []), "sparse", "int8"]
    assert all(list(forms) in (ways, ["torch", "dense"]) for forms, _ in measured)
    assert "µs int8" in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_of_a_quantised_model(dtype: torch.dtype):
    """In float32 those of the dense model; in bfloat16 weights are not rounded, and nearer to those in float32."""
    model, pruner = quantized(dtype)
    dense = copy.deepcopy(model)
    sparsify_for_inference(model, prefer="memory", grids=pruner.grids)
    (batch,) = tiny_batches(num=1)
    with torch.no_grad():
        for inputs in (batch, {"input_ids": batch["input_ids"][:1, :1]}):
            expected = dense(**inputs).logits
            error = (model(**inputs).logits - expected).abs().max()
            assert error <= (1e-4 if dtype == torch.float32 else 0.05) * expected.abs().max()


def test_without_kernels_nothing_is_slower_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch):
    use_level(monkeypatch, "torch")
    monkeypatch.setattr(kernels, "MISSING", "no compiler")
    model = three_layers()
    report = sparsify_for_inference(model)
    assert set(forms(model).values()) == {"Linear"}
    assert "no compiled kernels: no compiler" in str(report)
    assert all("there are no compiled kernels" in layer.reason for layer in report.layers)
    sparsify_for_inference(model, prefer="memory")
    assert "SparseLinear" in forms(model).values()


def test_what_cannot_be_replaced_is_named(monkeypatch: pytest.MonkeyPatch):
    class Other(nn.Linear):
        pass

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.scale = nn.Parameter(torch.ones(2, 4, 4)), nn.Parameter(torch.ones(4))

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(128, 64),
            "head": nn.Linear(64, 128, bias=False),
            "hooked": nn.Linear(64, 64),
            "other": Other(64, 64),
            "conv": Conv1D(64, 64),
            "experts": Experts(),
            "meta": nn.Linear(64, 64, device="meta"),
            "float64": nn.Linear(64, 64, dtype=torch.float64),
            "blocks": nn.ModuleList(Other(64, 64) for _ in range(3)),
        }
    )
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data.view(-1)[::2] = 0
    model["head"].weight = model["embedding"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    give_times(monkeypatch, torch=100, dense=100)
    before = forms(model)
    report = sparsify_for_inference(model, prefer="memory")
    assert forms(model) == before
    assert {layer.names[0]: layer.reason for layer in report.layers} == {
        "head": "not packed: another layer uses the same weight",
        "float64": "not packed: there is no packed form for torch.float64",
    }
    assert report.untouched == {
        "hooked": "stays as it is: it has forward hooks",
        "other": "stays as it is: only nn.Linear is replaced, and it is a Other",
        "conv": "stays as it is: only nn.Linear is replaced, and it is a Conv1D",
        "experts.up_proj": "stays as it is: only nn.Linear is replaced, and it is a Experts",
        "meta": "stays as it is: there are no kernels for meta",
        "blocks.{0-2}": "stays as it is: only nn.Linear is replaced, and it is a Other",
    }


def test_a_second_call_leaves_the_layers_alone():
    model = three_layers()
    sparsify_for_inference(model, prefer="memory")
    packed = model["pruned"]
    sparsify_for_inference(model, prefer="memory")
    assert model["pruned"] is packed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(model="llama"), TypeError, "must be a torch.nn.Module, got str"),
        (dict(model=nn.Linear(4, 4)), TypeError, "cannot be replaced in place: SparseLinear.from_linear"),
        (dict(model=DenseLinear(4, 4)), TypeError, "cannot be replaced in place: SparseLinear.from_linear"),
        (dict(batch_size=0), ValueError, "at least 1, got 0"),
        (dict(batch_size=True), ValueError, "at least 1, got True"),
        (dict(batch_size=1.5), ValueError, "at least 1, got 1.5"),
        (dict(prefer="size"), ValueError, "one of speed, memory, got 'size'"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sparsify_for_inference(**(dict(model=nn.Sequential()) | arguments))


def test_report_is_json_and_a_table():
    report = sparsify_for_inference(three_layers())
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["names"] == ["pruned"]
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["layers", "count", "shape", "zeros"]
    assert lines[3].split()[:4] == ["pruned", "1", "64x64", "50.0%"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_dense_model(architecture: str):
    """In float32 to 1e-4 of the largest logit: sums in another order, through all layers."""
    dense = prune(tiny_model(architecture))
    model = copy.deepcopy(dense)
    report = sparsify_for_inference(model, prefer="memory")
    packed = sum(layer.count for layer in report.layers if layer.choice == "sparse")
    assert packed > 0 or architecture in ("gpt2", "falcon")  # these have no nn.Linear but the head
    (batch,) = tiny_batches(num=1)
    with torch.no_grad():
        for inputs in (batch, {"input_ids": batch["input_ids"][:1, :1]}):
            expected = dense(**inputs).logits
            error = (model(**inputs).logits - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max()


def test_generates_the_same_and_compiles():
    dense = prune(tiny_model("llama"))
    model = copy.deepcopy(dense)
    sparsify_for_inference(model, prefer="memory")
    (batch,) = tiny_batches(num=1)
    settings = dict(max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(**batch, **settings), dense.generate(**batch, **settings))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**batch, use_cache=False).logits, dense(**batch).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("tied", [True, False])
def test_saves_an_ordinary_checkpoint(tied: bool, tmp_path):
    dense = prune(tiny_model("llama", tie_word_embeddings=tied))
    model = copy.deepcopy(dense)
    sparsify_for_inference(model, prefer="memory")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "SparseLinear" in forms(model).values() and "SparseLinear" not in forms(loaded).values()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())


def test_pruner_saves_it_with_true_metadata(tmp_path):
    model, pruner = tiny_model("llama"), SparsePruner(method="magnitude", sparsity=0.5)
    pruner.prune(model)
    sparsify_for_inference(model, prefer="memory")
    pruner.save(model, tmp_path)
    found = inspect(str(tmp_path))
    assert found["metadata_is_true"] and found["pruned_zeros"] == found["pruned_weights"] // 2 > 0


def test_memory_of_dense_weights_is_given_back():
    model = three_layers()
    storage = model["pruned"].weight.untyped_storage()._weak_ref()
    report = sparsify_for_inference(model, prefer="memory")
    del report
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="this system does not show what is mapped")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"], ids=["", "biases"])
def test_the_checkpoint_does_not_stay_in_memory(architecture: str, tied: bool, tmp_path):
    prune(tiny_model(architecture, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=8, do_sample=False)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    sparsify_for_inference(model, prefer="memory")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(
        model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=8, do_sample=False), expected
    )


@pytest.mark.slow
def test_smollm2_generates_the_same_64_tokens(smollm2):
    """Float32, half of the weights zero: greedy generation with a cache, and its logits."""
    dense, tokenizer = copy.deepcopy(smollm2[0]).float(), smollm2[1]
    prune(dense)
    model = copy.deepcopy(dense)
    report = sparsify_for_inference(model, prefer="memory")
    assert report.bytes < 0.7 * report.dense_bytes
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    settings = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert torch.equal(model.generate(**tokens, **settings), dense.generate(**tokens, **settings))
    with torch.no_grad():
        expected = dense(**tokens).logits
        assert (model(**tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("quantized", [False, True])
def test_with_prefer_memory_nothing_becomes_larger(quantized: bool):
    """Tiles are padded to 8 rows, which a matrix with one of them has to make up for."""
    for rows, sparsity in ((1, 0.3), (1, 0.95), (2, 0.2), (9, 0.1), (64, 0.5)):
        layer, grids = nn.Linear(2048, rows, bias=False).bfloat16(), None
        if quantized:
            grids = {"0": random_grid(rows, 2048)}
            layer.weight.data = random_values(rows, 2048, grids["0"], sparsity).bfloat16()
        else:
            layer.weight.data.masked_fill_(torch.rand(rows, 2048) < sparsity, 0)
        model = nn.Sequential(layer)
        (choice,) = sparsify_for_inference(model, prefer="memory", grids=grids).layers
        assert choice.bytes <= choice.dense_bytes
        assert choice.choice in ("sparse", "int8") or rows < 64


def test_layers_that_were_made_faster_may_become_smaller(monkeypatch: pytest.MonkeyPatch):
    give_times(monkeypatch, torch=100, dense=60, sparse=80)
    model = three_layers()
    sparsify_for_inference(model)
    assert forms(model)["pruned"] == "DenseLinear"
    before = model.get_submodule("pruned").weight
    sparsify_for_inference(model, prefer="memory")
    assert forms(model)["pruned"] == "SparseLinear" and forms(model)["full"] == "DenseLinear"
    assert torch.equal(model.get_submodule("pruned").weight + 0, before)


def test_layers_with_hooks_keep_them(monkeypatch: pytest.MonkeyPatch):
    give_times(monkeypatch, torch=100, dense=60, sparse=80)
    model, calls = three_layers(), []
    sparsify_for_inference(model)
    model["pruned"].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(FileNotFoundError):
        sparsify_for_inference(model, grids="nowhere")
    assert forms(model)["full"] == "DenseLinear"  # nothing is undone for nothing
    report = sparsify_for_inference(model, prefer="memory")
    assert forms(model)["pruned"] == "DenseLinear" and "it has forward hooks" in report.untouched["pruned"]
    with torch.no_grad():
        model["pruned"](torch.ones(1, 64))
    assert calls == [1]
