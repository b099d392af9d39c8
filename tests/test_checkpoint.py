"""Checkpoints are packed and unpacked file by file, to the bit, and damaged ones are refused by name."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_sparse.checkpoint import Checkpoint, encoding, pack_folder, unpack_folder, weight_files
from optimum_sparse.loading import PACKED
from optimum_sparse.packing import Packed, pack

from .helpers import tiny_model

FIXTURES = Path(__file__).parent / "fixtures"


def half_zero(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < 0.5, 0)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense checkpoint of several files, with others beside them."""
    folder = tmp_path_factory.mktemp("dense")
    half_zero(tiny_model("llama")).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("a tokenizer")
    (folder / "original").mkdir()
    assert len(weight_files(folder)) > 2
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack_folder(dense, folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def assert_same_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_there_and_back(dense, packed, tmp_path):
    unpack_folder(packed, tmp_path)
    assert_same_tensors(tmp_path, tensors_of(dense))
    for folder in (packed, tmp_path):
        assert (folder / "tokenizer.json").read_text() == "a tokenizer"
        assert {p.name for p in folder.iterdir()} == {p.name for p in dense.iterdir()} - {"original"}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((dense / "config.json").read_text())


def test_what_is_packed(dense, packed):
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": PACKED, "version": 1}
    with Checkpoint(weight_files(packed), "packed") as checkpoint:
        names = set(checkpoint.packed)
        parameters = sum(checkpoint.read(name).numel for name in names)
    assert names == {name for name, tensor in tensors_of(dense).items() if (tensor == 0).float().mean() > 0.2}
    assert not any("embed" in name or "norm" in name for name in names)
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(packed).keys()
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in weight_files(packed))
    assert parameters > 10_000


def test_sizes(dense, tmp_path):
    sizes = pack_folder(dense, tmp_path)
    tensors = tensors_of(tmp_path)
    expected = {name: t for name, t in tensors_of(dense).items() if name + "_layout" in tensors}
    assert sizes.packed_tensors == len(expected)
    assert sizes.dense_bytes == sum(t.nbytes for t in expected.values())
    assert sizes.packed_bytes == sum(tensors[name].nbytes + tensors[name + "_positions"].nbytes for name in expected)
    assert 0.55 < sizes.packed_bytes / sizes.dense_bytes < 0.575  # the tiny matrices are not exactly half zero


def test_the_patterns_of_the_record_are_used(tmp_path):
    """2:4 along the inputs, which are the rows of GPT-2's matrices."""
    from optimum_sparse import SparsePruner

    pruner, model = SparsePruner(method="magnitude", pattern="2:4", progress=False), tiny_model("gpt2")
    pruner.prune(model)
    pruner.save(model, tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    with Checkpoint(weight_files(tmp_path / "packed"), "packed") as checkpoint:
        tensors = [checkpoint.read(name) for name in checkpoint.packed]
    assert len(tensors) == 8
    assert {(tensor.form, tensor.transposed) for tensor in tensors} == {("2:4", True)}


def test_it_is_not_done_twice_or_onto_itself(dense, packed, tmp_path):
    with pytest.raises(ValueError, match="is packed already"):
        pack_folder(packed, tmp_path)
    with pytest.raises(ValueError, match="is dense already"):
        unpack_folder(dense, tmp_path)
    for function, folder in ((pack_folder, dense), (unpack_folder, packed)):
        before = sorted(p.name for p in folder.iterdir())
        with pytest.raises(ValueError, match="OUT is DIR"):
            function(folder, folder / "." if folder == dense else folder.parent / folder.name)
        assert sorted(p.name for p in folder.iterdir()) == before
    with pytest.raises(FileNotFoundError, match="not a folder"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")


def test_a_failure_leaves_what_was_there(dense, packed, tmp_path):
    shutil.copytree(dense, tmp_path / "out")
    shutil.copytree(packed, tmp_path / "broken")
    last = weight_files(tmp_path / "broken")[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{last.name} is corrupt"):
        unpack_folder(tmp_path / "broken", tmp_path / "out")
    assert_same_tensors(tmp_path / "out", tensors_of(dense))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in dense.iterdir())


def test_a_checkpoint_without_zeros_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="No matrix gets smaller"):
        pack_folder(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_files_of_any_name(tmp_path):
    weight = torch.randn(64, 64).masked_fill(torch.rand(64, 64) < 0.5, 0)
    (tmp_path / "dense").mkdir()
    save_file({"a.weight": weight}, tmp_path / "dense" / "weights-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a.weight": "weights-1.safetensors"}}
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "dense" / "config.json").write_text("{}")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    assert "a.weight_positions" in tensors_of(tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", {"a.weight": weight})


def test_reserved_names_are_refused(tmp_path):
    save_file({"a_positions": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has the tensor a_positions"):
        pack_folder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq"),
        ({"bits": 4}, "quantised with None"),
        ({"quant_method": PACKED, "version": 2}, "version 2 of the format.*reads version 1"),
        ({"quant_method": PACKED}, "version None of the format"),
        (PACKED, "version None of the format"),
        ("gptq", "quantised with gptq"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
            "quantised with compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {}},
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "without quantisation",
        ),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin-24"}}, "quantised with"),
    ],
)
def test_other_encodings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        encoding({"quantization_config": config})


@pytest.mark.parametrize("names", [None, ["x"], {"a": 1}, {"a": "../x.safetensors"}, {"a": "/x.safetensors"}], ids=str)
def test_an_index_names_files_beside_it(names, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        weight_files(tmp_path)


def change(folder: Path, target: Path, edit) -> tuple[Path, str]:
    """Copy a packed checkpoint with the tensors of one file edited. Returns the file and a packed tensor in it."""
    shutil.copytree(folder, target)
    file = weight_files(target)[1]
    tensors = load_file(file)
    name = next(name.removesuffix("_layout") for name in tensors if name.endswith("_layout"))
    edit(tensors, name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return file, name


def _set(name: str, value) -> None:
    def edit(tensors, base):
        tensors[base + name] = value(tensors[base + name])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("", lambda t: t[1:]), "values for"),
        (_set("", lambda t: t.to(torch.int32)), "the values are torch.int32"),
        (_set("", lambda t: t.reshape(1, -1)), "in one dimension"),
        (_set("_positions", lambda t: t[1:]), "bytes of positions do not fit"),
        (_set("_positions", lambda t: t.float()), "the positions are torch.float32"),
        (_set("_positions", lambda t: t ^ 1), "values for"),
        (_set("_layout", lambda t: t * 2), "do not fit"),
        (_set("_layout", lambda t: t + (1 << 61)), "no form|larger"),
        (_set("_layout", lambda t: t.float()), "int64"),
        (lambda tensors, name: tensors.pop(name), "there is no {name}"),
        (lambda tensors, name: tensors.pop(name + "_positions"), "there is no {name}_positions"),
        (lambda tensors, name: tensors.pop(name + "_layout"), "there is no {name}_layout"),
    ],
)
def test_damage_is_named(packed, tmp_path, edit, message):
    file, name = change(packed, tmp_path / "broken", edit)
    with pytest.raises(ValueError, match=message.format(name=name)) as error:
        unpack_folder(tmp_path / "broken", tmp_path / "out")
    assert str(file.name) in str(error.value) and name in str(error.value)


def test_absurd_claims_allocate_nothing(tmp_path):
    """2^44 weights, as many bytes of positions: the header of the file is checked against its length."""
    header = {
        "w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "w_positions": {"dtype": "U8", "shape": [1 << 41], "data_offsets": [2, 2 + (1 << 41)]},
    }
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(10))
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        Checkpoint([tmp_path / "model.safetensors"], "packed")


def mutate(raw: bytes, generator: random.Random) -> bytes:
    """Change a few bytes of the header or the rest, digits mostly to digits, or cut the file off."""
    mutated = bytearray(raw)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    in_header = generator.random() < 0.5
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(header) if in_header else generator.randrange(header, len(raw))
        digit = chr(mutated[place]).isdigit() and in_header and generator.random() < 0.9
        mutated[place] = generator.choice(b"0123456789") if digit else generator.randrange(256)
    return bytes(mutated[: generator.randrange(len(raw))] if generator.random() < 0.1 else mutated)


def read_everything(file: Path) -> str:
    """Whether a file was refused; what is read is of the shape that it says."""
    try:
        with Checkpoint([file], "packed") as checkpoint:
            for name in checkpoint.names[file]:
                tensor = checkpoint.read(name)
                if isinstance(tensor, Packed):
                    assert tensor.unpack().shape == tensor.shape == tensor.nonzero().shape
    except ValueError as error:
        assert file.name in str(error)
        return "refused"
    return "read"


def fuzz(folder: Path, mutations: int, seed: int = 0) -> dict[str, int]:
    """Read mutated files: each is refused with a ValueError, or read."""
    generator, outcomes = random.Random(seed), {"refused": 0, "read": 0}
    matrix = torch.zeros(8, 16, dtype=torch.bfloat16)
    matrix[:, 1::4] = torch.arange(32.0).reshape(8, 4) + 1
    parts: dict[str, torch.Tensor] = {}
    for name, packed in {"a": (matrix, "bitmask"), "b": (matrix, "2:4"), "c": (matrix.mT, "1:4", True)}.items():
        parts |= {f"{name}.weight{suffix}": part for suffix, part in pack(*packed).to_tensors().items()}
    file = folder / "model.safetensors"
    save_file(parts | {"norm.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    raw = file.read_bytes()
    assert read_everything(file) == "read"
    for _ in range(mutations):
        file.unlink()  # the file that a failed reading may still map stays as it was
        file.write_bytes(mutate(raw, generator))
        outcomes[read_everything(file)] += 1
    return outcomes


def test_thousands_of_mutated_files(tmp_path):
    outcomes = fuzz(tmp_path, 3000)
    assert min(outcomes.values()) > 300


def legacy_weights(kind: str) -> torch.Tensor:
    """What compressed-tensors 0.10.2 packed into the files of tests/fixtures.

    They are what `BaseCompressor.load_from_registry(kind, config=...).compress({NAME: weight, "model.norm.weight":
    torch.ones(4)}, compression_targets={"model.layers.0.mlp.up_proj"})` returned.
    """
    if kind == "sparse-bitmask":
        numbers = torch.arange(1.0, 241).reshape(12, 20)  # rows of 20 bits
        return torch.where((numbers * 7919 % 11) < 5, 0.0, numbers / 64 - 2).to(torch.bfloat16)
    numbers = torch.arange(1.0, 129).reshape(8, 16)
    mask = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]).repeat(8, 2)
    return (mask * (numbers / 32 - 1.99)).to(torch.float16)


@pytest.fixture
def legacy(request, tmp_path) -> Path:
    folder = tmp_path / "legacy"
    folder.mkdir()
    shutil.copyfile(FIXTURES / f"compressed-tensors-{request.param}.safetensors", folder / "model.safetensors")
    sparsity = {"format": request.param, "sparsity_structure": "unused"}
    quantization = {"quant_method": "compressed-tensors", "version": "0.10.2", "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return folder


LEGACY = pytest.mark.parametrize("legacy", ["sparse-bitmask", "sparse-24-bitmask"], indirect=True)
NAME = "model.layers.0.mlp.up_proj.weight"


@LEGACY
def test_legacy_checkpoints_become_dense_or_packed(legacy, tmp_path, request):
    weight = legacy_weights(request.node.callspec.params["legacy"])
    expected = {NAME: weight, "model.norm.weight": torch.ones(4)}
    unpack_folder(legacy, tmp_path / "dense")
    pack_folder(legacy, tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    for folder in ("dense", "again"):
        found = tensors_of(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert json.loads((tmp_path / folder / "config.json").read_text()) == {"model_type": "llama"}
    with Checkpoint(weight_files(tmp_path / "packed"), "packed") as checkpoint:
        assert checkpoint.packed == [NAME]


@LEGACY
@pytest.mark.parametrize(
    ("part", "edit", "message"),
    [
        ("compressed", lambda t: t.flatten()[1:], "values for"),
        ("bitmask", lambda t: t[1:], "the bitmask is torch.uint8"),
        ("bitmask", lambda t: t ^ 1, "values for"),
        ("shape", lambda t: t * 2, "the bitmask is torch.uint8"),
        ("shape", lambda t: t.float(), "the bitmask is torch.uint8"),
        ("bitmask", None, "there is no model.layers.0.mlp.up_proj.bitmask"),
        ("compressed", None, "there is no model.layers.0.mlp.up_proj.compressed"),
    ],
)
def test_damaged_legacy_checkpoints(legacy, tmp_path, part, edit, message):
    tensors = load_file(legacy / "model.safetensors")
    value = tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
    if edit is not None:
        tensors[f"model.layers.0.mlp.up_proj.{part}"] = edit(value).contiguous()
    save_file(tensors, legacy / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        unpack_folder(legacy, tmp_path / "out")
