"""Plain `from_pretrained` makes an ordinary model of a packed checkpoint, the same to the bit as of a dense one."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import optimum_sparse  # noqa: F401 (registers the format)
from optimum_sparse.checkpoint import Checkpoint, pack_folder, weight_files
from optimum_sparse.packing import pack

from ..architectures import sweep_model

# One for each way in which files and models differ: names, leaves, experts that are joined, transposed or renamed.
TYPES = [
    "llama",
    "gpt2",  # Conv1D
    "gemma3_text",  # tied head
    "mixtral",  # a tensor for each expert in the files
    "gpt_oss",  # experts are one transposed tensor
    "granitemoe",  # the files call experts a linear layer
    "deepseek_v4",  # many renamings, some of them of the last part of a name
    "ernie4_5_moe",
    "jamba",
]


def with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """Half of each matrix zero, but for some that stay dense, and the first expert of each fused parameter, too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim >= 2 and index % 5:
                first = parameter[0].clone()
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < 0.5, 0)
                if parameter.ndim == 3:
                    parameter[0] = first
    return model


def packed_and_dense(model_type: str, folder: Path) -> tuple[Path, Path]:
    with_zeros(sweep_model(model_type)).save_pretrained(folder / "dense", max_shard_size="100KB")
    pack_folder(folder / "dense", folder / "packed")
    with Checkpoint(weight_files(folder / "packed"), "packed") as checkpoint:
        assert checkpoint.packed
    return folder / "packed", folder / "dense"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    return packed_and_dense("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> tuple[Path, Path]:
    return packed_and_dense("mixtral", tmp_path_factory.mktemp("mixtral"))


def assert_equal(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_model_is_that_of_the_dense_checkpoint(model_type, tmp_path):
    packed, dense = packed_and_dense(model_type, tmp_path)
    model_class = type(sweep_model(model_type))
    model, info = model_class.from_pretrained(packed, output_loading_info=True)
    expected, expected_info = model_class.from_pretrained(dense, output_loading_info=True)
    assert info == expected_info
    assert_equal(model, expected)
    # Saving it writes what the dense model writes.
    model.save_pretrained(tmp_path / "again")
    expected.save_pretrained(tmp_path / "expected")
    again, wanted = files_of(tmp_path / "again"), files_of(tmp_path / "expected")
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_operations_of_a_model_do_not_see_the_parts():
    """Some look at all patterns that they are given."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    from optimum_sparse.integrations.unpacking import conversions_for_parts, originals

    class Join(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            return {target_patterns[0]: torch.cat([tensor for key in source_patterns for tensor in input_dict[key]])}

    weights = {"a": torch.eye(4), "b": 2 * torch.eye(4)}
    rule = WeightConverter(["a.weight", "b.weight"], "c.weight", [Join()])
    converter, rest = conversions_for_parts([rule], ["x.a.weight", "x.b.weight", "x.d.weight"])
    for name, weight in weights.items():
        for part, tensor in pack(weight).to_tensors().items():
            key, pattern = converter.rename_source_key(f"x.{name}.weight{part}")
            assert (key, pattern) == ("x.c.weight", f"{name}.weight{part}")
            converter.add_tensor(key, f"x.{name}.weight{part}", pattern, lambda tensor=tensor: tensor)
    result = converter.convert("x.c.weight")
    assert torch.equal(result["x.c.weight"], torch.cat(list(weights.values())))
    assert rest.rename_source_key("x.d.weight_layout") == ("x.d.weight", "_layout")
    assert rest.rename_source_key("x.e.weight") == ("x.e.weight", None)
    assert originals([converter, rest]) == [rule]


def test_nothing_of_a_quantizer_is_left(llama):
    model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in llama)
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    assert vars(model).keys() ^ vars(dense).keys() <= {"is_quantized"}
    assert {**model.config.to_dict(), "_name_or_path": None} == {**dense.config.to_dict(), "_name_or_path": None}
    assert not hasattr(model.config, "_is_quantized")
    model.to("cpu").half()


def test_the_rules_for_saving_are_those_of_a_dense_checkpoint(mixtral):
    rules = [
        [(type(rule), rule.source_patterns, rule.target_patterns) for rule in model._weight_conversions]
        for model in (AutoModelForCausalLM.from_pretrained(folder) for folder in mixtral)
    ]
    assert rules[0] == rules[1] != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_dtypes(model, dtype, request):
    packed, dense = request.getfixturevalue(model)
    assert_equal(*(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in (packed, dense)))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(device_map, mixtral):
    packed, dense = mixtral
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(dense))


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_disk_offload(model, request, tmp_path):
    packed, dense = request.getfixturevalue(model)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, offload_folder=tmp_path)
    tokens = {"input_ids": torch.arange(3, 20)[None]}
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(dense)(**tokens).logits
        assert torch.equal(offloaded(**tokens).logits, logits)


def test_a_part_of_the_model(llama):
    """Without its head, the names of the model's parameters lack the prefix of those in the files."""
    assert_equal(*(AutoModel.from_pretrained(folder) for folder in llama))


def test_it_trains_and_takes_adapters(llama):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(llama[0])
    tokens = torch.arange(3, 20)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted(input_ids=tokens, labels=tokens).loss.backward()


def test_it_is_pruned_further(llama):
    """`load_model`, and with it every command, takes packed checkpoints."""
    from optimum_sparse import SparsePruner
    from optimum_sparse.loading import load_model

    model, _ = load_model(llama[0])
    SparsePruner(method="magnitude", sparsity=0.8, progress=False).prune(model)
    assert model.config.sparsity_config["achieved_sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_damage_stops_it_before_anything_is_loaded(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path / "broken")
    file = weight_files(tmp_path / "broken")[0]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("_positions"))
    save_file({**tensors, name: tensors[name] ^ 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{file.name} is corrupt: in the tensor {name.removesuffix('_positions')}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken")


def test_a_later_version_of_the_format_is_refused(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path / "later")
    config = tmp_path / "later" / "config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="version 9 of the format"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "later")


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("order", ["before", "after"])
def test_import_of_the_package_is_enough(order, llama):
    code = {
        "before": "import optimum_sparse\nfrom transformers import AutoModelForCausalLM",
        "after": "from transformers import AutoModelForCausalLM, quantizers\nquantizers\nimport optimum_sparse",
    }[order]
    result = run(code + "\nimport sys\nprint(AutoModelForCausalLM.from_pretrained(sys.argv[1]).dtype)", llama[0])
    assert result.stdout.strip() == "torch.float32", result.stderr


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused:", error)
print(*(name for name in sys.modules if name.startswith("optimum_sparse")))
"""


def test_without_the_package_there_is_an_error_and_no_model(llama, mixtral):
    result = run(WITHOUT, llama[0], mixtral[0])
    *refused, imported = result.stdout.splitlines()
    assert [line.split(":")[0] for line in refused] == ["refused", "refused"], result.stderr
    assert result.stderr.count("Unknown quantization type, got optimum_sparse_packed") == 2
    assert imported == ""


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    from optimum_sparse import SparsePruner

    for options in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        model = copy.deepcopy(smollm2[0])
        pruner = SparsePruner(method="magnitude", progress=False, **options)
        pruner.prune(model)
        pruner.save(model, tmp_path, compressed=True)
        assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        with Checkpoint(weight_files(tmp_path), "packed") as checkpoint:
            packed = [checkpoint.read(name) for name in checkpoint.packed]
        assert len(packed) == 210
        dense_bytes = sum(tensor.numel * tensor.values.itemsize for tensor in packed)
        assert sum(tensor.nbytes for tensor in packed) <= 0.57 * dense_bytes
