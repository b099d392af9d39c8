"""`runtime="sparse"`: a packed checkpoint becomes a model that is packed in memory and computes the same."""

import copy
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from optimum_sparse import PackedConfig, SparsePruner
from optimum_sparse.checkpoint import Checkpoint, pack_folder, weight_files
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.integrations.sparse_layers import SparseLayers
from optimum_sparse.packing import Packed
from optimum_sparse.runtime import SparseLinear, linear, sparsify, sparsify_for_inference

from ..architectures import sweep_model
from ..helpers import tiny_batches, tiny_model
from ..runtime.levels import use_level
from .test_packed import TYPES, assert_equal, files_of, packed_and_dense, with_zeros

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
# Of the largest logit; in float32, sums in another order, as in the tests of `sparsify_for_inference`.
BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def load_sparse(folder: Path, model_class: type = AutoModelForCausalLM, **options) -> PreTrainedModel:
    return model_class.from_pretrained(folder, quantization_config=PackedConfig(runtime="sparse"), **options)


def sparse_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def packed_names(folder: Path) -> set[str]:
    with Checkpoint(weight_files(folder), "packed") as checkpoint:
        return {name.removesuffix(".weight") for name in checkpoint.packed}


def assert_same_logits(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    (batch,) = tiny_batches(num=1)
    with torch.no_grad():
        for inputs in (batch, {"input_ids": batch["input_ids"][:1, :1]}):
            wanted = expected(**inputs).logits
            assert (model(**inputs).logits - wanted).abs().max() <= BOUNDS[wanted.dtype] * wanted.abs().max()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    return packed_and_dense("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A packed Llama that `SparsePruner` has pruned."""
    folder = tmp_path_factory.mktemp("pruned")
    pruner, model = SparsePruner(method="magnitude", sparsity=0.5, progress=False), tiny_model("llama")
    pruner.prune(model)
    pruner.save(model, folder, compressed=True)
    return folder


@pytest.mark.parametrize("model_type", [*TYPES, "zamba2"])  # zamba2: layers in two places
def test_the_model_is_that_of_the_dense_checkpoint(model_type, tmp_path):
    packed, dense = packed_and_dense(model_type, tmp_path)
    model_class = type(sweep_model(model_type))
    model, info = load_sparse(packed, model_class, output_loading_info=True)
    expected, expected_info = model_class.from_pretrained(dense, output_loading_info=True)
    assert info == expected_info
    assert sparse_names(model) or model_type == "gpt2"  # which has no nn.Linear but the head
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert_equal(model, expected)
    assert_same_logits(model, expected)
    model.save_pretrained(tmp_path / "again")
    expected.save_pretrained(tmp_path / "expected")
    again, wanted = files_of(tmp_path / "again"), files_of(tmp_path / "expected")
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_what_is_packed_in_the_files_is_packed_in_memory(llama, caplog):
    model = load_sparse(llama[0])
    assert sparse_names(model) == packed_names(llama[0])
    assert caplog.text == ""
    sparse = [layer for layer in model.runtime_report.layers if layer.choice == "sparse"]
    assert sum(layer.count for layer in sparse) == len(sparse_names(model))
    held = sum(t.nbytes for m in model.modules() if isinstance(m, SparseLinear) for t in m.buffers())
    assert sum(layer.bytes for layer in sparse) == held
    numels = [m.out_features * m.in_features for m in model.modules() if isinstance(m, SparseLinear)]
    assert sum(layer.dense_bytes for layer in sparse) == 4 * sum(numels)
    assert all(layer.sparsity == pytest.approx(0.5, abs=0.05) for layer in sparse)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_timed(tied, tmp_path, monkeypatch):
    use_level(monkeypatch, "portable")
    monkeypatch.setattr(sparsify, "microseconds", lambda ways, x, cuda_graphs: {"torch": 2.0, "dense": 1.0})
    model = tiny_model("llama", tie_word_embeddings=tied)
    pruner = SparsePruner(method="magnitude", sparsity=0.5, progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path, compressed=True)
    loaded = load_sparse(tmp_path)
    assert isinstance(loaded.lm_head, linear.DenseLinear)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same_logits(loaded, model)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_dtypes(dtype, llama):
    model, expected = load_sparse(llama[0], dtype=dtype), AutoModelForCausalLM.from_pretrained(llama[1], dtype=dtype)
    assert sparse_names(model)
    assert_equal(model, expected)
    assert_same_logits(model, expected)


def test_generates_the_same(llama):
    model, expected = load_sparse(llama[0]), AutoModelForCausalLM.from_pretrained(llama[1])
    (batch,) = tiny_batches(num=1)
    settings = dict(max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(**batch, **settings), expected.generate(**batch, **settings))


def test_a_part_of_the_model(llama):
    model = load_sparse(llama[0], AutoModel)
    assert sparse_names(model)
    assert_equal(model, AutoModel.from_pretrained(llama[1]))


def test_biases(tmp_path):
    """They come before or after the weights, and are no part of what is packed."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    with_zeros(model).save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    loaded = load_sparse(tmp_path / "packed")
    assert any(isinstance(m, SparseLinear) and m.bias is not None for m in loaded.modules())
    assert_equal(loaded, model)


def test_code_from_elsewhere_initialises_no_packed_layer(tmp_path, monkeypatch):
    """It would set the bias of a layer to zero if a parameter of the layer seemed not to be loaded."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[::2] = 0
    model.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    initialised = []
    monkeypatch.setattr(LlamaForCausalLM, "is_custom_code", lambda _: True)
    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", lambda _, module: initialised.append(module))
    assert sparse_names(load_sparse(tmp_path / "packed")) == {"lm_head"}
    assert not any(isinstance(module, nn.Linear) for module in initialised)


def test_only_one_matrix_is_dense_at_a_time(llama, monkeypatch):
    unpack, seen = Packed.unpack, []

    def watched(packed: Packed) -> torch.Tensor:
        assert not any(reference() is not None for reference in seen)
        weight = unpack(packed)
        seen.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Packed, "unpack", watched)
    load_sparse(llama[0])
    assert len(seen) == len(packed_names(llama[0]))


@pytest.mark.parametrize(
    ("model_type", "name", "kind"),
    [
        ("gpt2", "transformer.h.{0-1}.attn.c_attn", "Conv1D"),
        ("mixtral", "model.layers.{0-1}.mlp.experts.down_proj", "MixtralExperts"),
    ],
)
def test_other_layers_are_restored_dense_and_reported(model_type, name, kind, tmp_path, caplog):
    packed, _ = packed_and_dense(model_type, tmp_path)
    report = load_sparse(packed).runtime_report
    reason = f"only nn.Linear can have packed weights, and this is one of {kind}"
    assert report.untouched[name] == f"restored dense: {reason}"
    assert any(f"dense in memory, {reason}: " in message and name in message for message in caplog.messages)


def test_tied_weights_are_restored_dense_and_reported(tmp_path, caplog):
    model = tiny_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight[::2] = 0
    model.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    loaded = load_sparse(tmp_path / "packed")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_equal(loaded, model)
    assert "restored dense" in loaded.runtime_report.untouched["model.embed_tokens"]
    assert "model.embed_tokens" in caplog.text


def test_what_cannot_be_packed_in_the_type_asked_for_is_reported(llama, tmp_path, caplog):
    model = load_sparse(llama[0], dtype=torch.float64)
    assert not sparse_names(model)
    assert "dense in memory, there is no packed form for torch.float64: " in caplog.text
    few_zeros = tiny_model("llama")
    with torch.no_grad():
        for parameter in few_zeros.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.view(-1)[::20] = 0  # which pays in float32, and not in bfloat16
    few_zeros.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    model = load_sparse(tmp_path / "packed", dtype=torch.bfloat16)
    assert not sparse_names(model)
    assert "dense in memory, it has too few zeros to become smaller: " in caplog.text


def test_slow_products_are_reported(llama, monkeypatch, caplog):
    load_sparse(llama[0], dtype=torch.float16)
    assert "no compiled kernels here for packed weights in float16" in caplog.text
    use_level(monkeypatch, "torch")
    model = load_sparse(llama[0])
    assert "no compiled kernels here for packed weights in float32" in caplog.text
    assert_same_logits(model, AutoModelForCausalLM.from_pretrained(llama[1]))


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_maps_of_the_cpu(device_map, llama):
    assert sparse_names(load_sparse(llama[0], device_map=device_map)) == packed_names(llama[0])


@pytest.mark.parametrize(
    "device_map",
    ["auto", "meta", "cuda", {"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}],
    ids=str,
)
def test_other_device_maps_are_refused(device_map, llama):
    with pytest.raises(ValueError, match=r"as a whole, and device_map is .*: leave it out or give 'cpu'"):
        load_sparse(llama[0], device_map=device_map)


def test_wrong_shapes_are_what_they_are_for_a_dense_model(llama):
    config = LlamaConfig.from_pretrained(llama[0], intermediate_size=65)
    with pytest.raises(RuntimeError, match="mismatch"):
        load_sparse(llama[0], LlamaForCausalLM, config=config)
    mismatched = [
        load(folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True)[1]["mismatched_keys"]
        for load, folder in ((LlamaForCausalLM.from_pretrained, llama[1]), (load_sparse, llama[0]))
    ]
    assert mismatched[0] == mismatched[1] and len(mismatched[0]) == 6


def test_the_pruner_packs_it_again(pruned, tmp_path):
    SparsePruner().save(load_sparse(pruned), tmp_path, compressed=True)
    again, wanted = load_file(tmp_path / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, pruned)]
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """A packed Llama in bfloat16 on grids of 8 bits."""
    folder, model = tmp_path_factory.mktemp("quantised"), tiny_model("llama").bfloat16()
    pruner = SparsePruner(method="magnitude", quantization="int8", group_size=-1, progress=False)
    pruner.prune(model)
    pruner.save(model, folder, compressed=True)
    return folder


def test_quantised_layers_are_packed_as_codes(quantised):
    model = load_sparse(quantised)
    dense = AutoModelForCausalLM.from_pretrained(quantised)
    other = copy.deepcopy(dense)
    assert [(n, m.quantized) for n, m in model.named_modules() if isinstance(m, SparseLinear)] == [
        (name, True) for name in sorted(packed_names(quantised), key=[n for n, _ in model.named_modules()].index)
    ]
    report = sparsify_for_inference(other, prefer="memory")
    assert {layer.choice for layer in report.layers} == {"int8", "torch"}
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in dense.state_dict().items())
    (batch,) = tiny_batches(num=1)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("load", [load_sparse, AutoModelForCausalLM.from_pretrained], ids=["sparse", "dense"])
def test_saving_a_quantised_model_again_keeps_its_grids(load, quantised, tmp_path, caplog):
    SparsePruner().save(load(quantised), tmp_path, compressed=True)
    assert not caplog.messages
    for name in ("model.safetensors", "quantization/grids.safetensors"):
        again, wanted = load_file(tmp_path / name), load_file(quantised / name)
        assert again.keys() == wanted.keys() and all(torch.equal(again[key], wanted[key]) for key in wanted)
    assert inspect(str(tmp_path))["metadata_is_true"]


def test_quantised_layers_without_grids_say_why(quantised, tmp_path):
    shutil.copytree(quantised, tmp_path / "copy")
    (tmp_path / "copy" / "quantization" / "grids.safetensors").unlink()
    layers = SparseLayers(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))
    name = "model.layers.0.mlp.up_proj"
    assert layers.take(f"{name}.weight", AutoModelForCausalLM.from_pretrained(quantised).get_submodule(name).weight)
    choice = next(layer for layer in layers.put().layers if layer.choice == "sparse" and layer.names == [name])
    assert choice.reason.startswith("not as int8: the model is quantised, but there is no")


def test_it_is_not_pruned_further(pruned):
    with pytest.raises(ValueError, match=r"14 layers are for inference, among them model\.layers\.0\.self_attn"):
        SparsePruner(method="magnitude", progress=False).prune(load_sparse(pruned))


def test_training_reaches_what_is_not_packed_and_says_so(pruned, caplog):
    linear._say_that_packed_weights_stay.cache_clear()
    model, tokens = load_sparse(pruned), torch.arange(3, 20)[None]
    assert caplog.text == ""
    before = {name: model.get_submodule(name).weight for name in sparse_names(model)}
    model.train()
    assert caplog.messages == [message for message in caplog.messages if "their weights are not trained" in message]
    assert len(caplog.messages) == 1
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())


def test_adapters(pruned):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"Target module SparseLinear\(.*\) is not supported"):
        get_peft_model(load_sparse(pruned), LoraConfig(target_modules=["q_proj"]))
    adapted, tokens = get_peft_model(load_sparse(pruned), LoraConfig(target_modules=["embed_tokens"])), torch.arange(9)
    adapted(input_ids=tokens[None], labels=tokens[None]).loss.backward()
    gradients = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_embedding_A" in name]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_dense_runtime_is_the_default(llama):
    assert not sparse_names(AutoModelForCausalLM.from_pretrained(llama[0]))
    model = AutoModelForCausalLM.from_pretrained(llama[0], quantization_config=PackedConfig())
    assert not sparse_names(model) and not hasattr(model, "runtime_report")


def test_nothing_of_a_quantizer_is_left(llama):
    model = load_sparse(llama[0])
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")


@pytest.mark.parametrize("runtime", ["fast", "", None, True])
def test_unknown_runtimes_are_refused(runtime):
    with pytest.raises(ValueError, match=f"runtime must be one of dense, sparse, got {runtime!r}"):
        PackedConfig(runtime=runtime)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="runtme"):
        PackedConfig(runtme="sparse")


def test_checkpoints_that_are_not_packed_are_refused(llama):
    with pytest.raises(ValueError, match=r"not packed.*optimum-cli sparse pack DIR OUT.*sparsify_for_inference"):
        load_sparse(llama[1])


MEMORY = """
import sys
import torch
from optimum_sparse import PackedConfig
from optimum_sparse.runtime.bench import resident_bytes
from transformers import AutoModelForCausalLM

def load(folder):
    options = {"quantization_config": PackedConfig(runtime="sparse")} if sys.argv[3] == "sparse" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None])
    return model

load(sys.argv[1])  # what is imported and started once counts for neither
before = resident_bytes()
model = load(sys.argv[2])
print(resident_bytes() - before)
"""


def save_llama(folder: Path, **options: int) -> int:
    """Write a bfloat16 Llama, half of whose matrices' weights are zero, dense and packed; return their bytes."""
    config = LlamaConfig(vocab_size=256, num_attention_heads=8, num_key_value_heads=8, **options)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    with torch.no_grad():
        for matrix in matrices:
            matrix[torch.rand(matrix.shape) < 0.5] = 0
    model.save_pretrained(folder / "dense")
    pack_folder(folder / "dense", folder / "packed")
    return sum(matrix.nbytes for matrix in matrices)


@pytest.mark.slow
def test_resident_memory(tmp_path):
    """At 50 %, at most 0.62 of what the matrices take dense, by what the processes hold; the format takes 0.5625."""
    save_llama(tmp_path / "tiny", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    prunable = save_llama(tmp_path / "model", hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
    assert prunable > 200e6
    held = {}
    for runtime, form in (("dense", "dense"), ("sparse", "packed")):
        folders = [str(tmp_path / name / form) for name in ("tiny", "model")]
        command = [sys.executable, "-c", MEMORY, *folders, runtime]
        held[runtime] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert held["dense"] >= prunable
    assert prunable - (held["dense"] - held["sparse"]) <= 0.62 * prunable
    assert held["sparse"] <= 0.62 * held["dense"]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="this system does not show what is mapped")
def test_the_files_do_not_stay_in_memory(tmp_path):
    packed, _ = packed_and_dense("qwen2", tmp_path)
    model = load_sparse(packed)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, SparseLinear) and layer.bias is not None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
