"""`optimum-cli sparse inspect`: what it counts, whether it tells true from false, and its exit codes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_sparse.loading import load_model
from optimum_sparse.pruner import SparsePruner

from ..architectures import sweep_model
from ..checkpoints import save_tiny
from ..helpers import ARCHITECTURES, tiny_model
from .cli import sparse


def save_pruned(folder: Path, architecture: str = "llama", shard_size: str = "5GB", **options) -> Path:
    model = tiny_model(architecture)
    pruner = SparsePruner(method="magnitude", progress=False, **options)
    pruner.prune(model)
    pruner.save(model, folder, max_shard_size=shard_size)
    return folder


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: value.to(tensors[name].dtype)}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def findings(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, dict]:
    code = sparse("inspect", *arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "falcon", "gpt_neox"])
@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "1:4"}], ids=str)
def test_true_metadata(architecture: str, options: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    code, found = findings(capsys, save_pruned(tmp_path, architecture, **options))
    assert (code, found["metadata_is_true"], found["problems"]) == (0, True, [])
    claimed = [row for row in found["rows"] if row["claimed_zeros"] is not None]
    tensors = load_file(tmp_path / "model.safetensors")
    zeros = {name: int((tensor == 0).sum()) for name, tensor in tensors.items() if tensor.ndim == 2}
    assert sum(row["zeros"] for row in found["rows"]) == sum(zeros.values())
    assert {row["pattern"] for row in claimed} == {options.get("pattern")}
    assert {row["zeros"] for row in claimed} == {row["claimed_zeros"] for row in claimed}
    assert found["pruned_zeros"] / found["pruned_weights"] == pytest.approx(
        {"2:4": 0.5, "1:4": 0.75, None: 0.6}[options.get("pattern")], abs=1e-3
    )


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path, pattern="2:4", overrides=[{"match": "k_proj", "sparsity": 0.25}], targets=["*_proj"])
    assert sparse("inspect", tmp_path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.{0-1}.mlp.up_proj", "2", "4,096", "50.00", "%", "50.00", "%", "2:4"] in lines
    assert ["model.layers.{0-1}.self_attn.k_proj", "2", "1,024", "25.00", "%", "25.00", "%", "-"] in lines
    assert ["lm_head", "1", "4,096", "0.00", "%", "-", "-"] in lines
    assert lines[-1][:5] == ["The", "metadata", "tells", "the", "truth:"]
    assert {"14", "magnitude."} <= set(lines[-1])


def test_every_matrix(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    _, found = findings(capsys, tmp_path, "--all")
    names = [row["name"] for row in found["rows"]]
    tensors = load_file(tmp_path / "model.safetensors")
    assert sorted(names) == sorted(
        name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim == 2
    )
    assert {row["matrices"] for row in found["rows"]} == {1}


def test_sharded_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path / "sharded", shard_size="30KB")
    save_pruned(tmp_path / "single")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    code, found = findings(capsys, tmp_path / "sharded")
    assert code == 0
    _, single = findings(capsys, tmp_path / "single")
    assert sorted(found["rows"], key=str) == sorted(single["rows"], key=str)


def test_a_weight_that_came_back(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = load_file(tmp_path / "model.safetensors")[name]
    weight.view(-1)[weight.view(-1).argmin(dim=0)] = 0.5
    weight[(weight == 0).nonzero()[0].unbind()] = 1e-6
    change(tmp_path, name, weight)
    code, found = findings(capsys, tmp_path)
    assert code == 1
    (problem,) = found["problems"]
    assert problem == "model.layers.{0-1}.self_attn.q_proj: claims 1024 zeros of 2048, there are 1023 of 2048."
    assert sparse("inspect", tmp_path) == 1
    assert f"- {problem}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_zeros_in_other_places_than_the_pattern(architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The number of zeros stays what it was; along the other axis even the pattern holds."""
    save_pruned(tmp_path, architecture, pattern="2:4")
    name = {"llama": "model.layers.1.self_attn.q_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}[architecture]
    weight = load_file(tmp_path / "model.safetensors")[name]
    inputs = {"llama": 1, "gpt2": 0}[architecture]
    outputs = torch.arange(weight.shape[1 - inputs]).unsqueeze(inputs)
    change(tmp_path, name, (outputs % 4 < 2).expand_as(weight).contiguous())
    code, found = findings(capsys, tmp_path)
    assert code == 1
    assert [problem.split(": ", 1)[1] for problem in found["problems"]] == ["claims 2:4, but 1 of 2 are not."]


RENAMED = {
    "nemotron_h": (dict(layers_block_type=["attention", "mlp"]), "backbone.layers.1.mixer.up_proj.weight"),
    "hrm_text": ({}, "model.H_module.layers.0.attn.gqkv_proj.weight"),  # gate, q, k and v are one matrix in the file
}


@pytest.mark.parametrize("architecture", RENAMED)
def test_weights_that_transformers_saves_otherwise(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    options, name = RENAMED[architecture]
    monkeypatch.setitem(ARCHITECTURES, architecture, {**ARCHITECTURES["qwen2"], **options})
    save_tiny(tmp_path / "dense", architecture)
    model, _ = load_model(tmp_path / "dense")
    pruner = SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path / "pruned")

    code, found = findings(capsys, tmp_path / "pruned")
    assert (code, found["problems"]) == (0, [])
    assert found["pruned_zeros"] == found["pruned_weights"] / 2
    change(tmp_path / "pruned", name, torch.ones_like(load_file(tmp_path / "pruned" / "model.safetensors")[name]))
    assert findings(capsys, tmp_path / "pruned")[0] == 1


def test_experts_that_transformers_saves_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture):
    """In memory gate and up of all experts are one parameter, in the file each is a matrix; the truth is the same."""
    model = sweep_model("mixtral")
    pruner = SparsePruner(method="magnitude", pattern="2:4", progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert not any("gate_up_proj" in name for name in files)
    code, found = findings(capsys, tmp_path)
    assert (code, found["problems"]) == (0, [])
    (row,) = (row for row in found["rows"] if row["name"].endswith("experts.gate_up_proj.{0-3}"))
    assert (row["matrices"], row["pattern"], row["zeros"], row["claimed_zeros"]) == (
        8,
        "2:4",
        *[row["numel"] // 2] * 2,
    )
    assert row["numel"] == 2 * model.model.layers[0].mlp.experts.gate_up_proj.numel()

    change(tmp_path, "model.layers.1.block_sparse_moe.experts.2.w3.weight", torch.ones(64, 32))
    code, found = findings(capsys, tmp_path)
    assert code == 1
    folded = "model.layers.{0-1}.mlp.experts.gate_up_proj.{0-3}"
    claimed, numel = row["claimed_zeros"], row["numel"]
    assert found["problems"] == [
        f"{folded}: claims {claimed} zeros of {numel}, there are {claimed - 64 * 32 // 2} of {numel}.",
        f"{folded}: claims 2:4, but 1 of 8 are not.",
    ]
    files = load_file(tmp_path / "model.safetensors")
    del files["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(files, tmp_path / "model.safetensors", {"format": "pt"})
    assert findings(capsys, tmp_path)[0] == 1


def test_the_metadata_says_what_is_stored_transposed(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Whatever the model is called: a file of GPT-2 is counted along its inputs because the metadata says so."""
    save_pruned(tmp_path, "gpt2", pattern="1:4")
    change_config(tmp_path, model_type="my-own")
    assert findings(capsys, tmp_path)[0] == 0
    metadata = json.loads((tmp_path / "config.json").read_text())["sparsity_config"]
    for entry in metadata["matrices"].values():
        assert entry["transposed"] is True
        entry["transposed"] = False
    change_config(tmp_path, sparsity_config=metadata)
    code, found = findings(capsys, tmp_path)
    assert code == 1
    assert [problem.split(": ", 1)[1] for problem in found["problems"]] == ["claims 1:4, but 2 of 2 are not."] * 4


def test_a_matrix_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    code, found = findings(capsys, tmp_path)
    assert code == 1
    assert "no model.layers.1.mlp.up_proj.weight (1 of 2" in found["problems"][0]


def test_no_metadata(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_tiny(tmp_path)
    code, found = findings(capsys, tmp_path)
    assert (code, found["metadata_is_true"]) == (1, False)
    assert "config.json has no sparsity_config" in found["problems"][0]
    assert "model.layers.{0-1}.mlp.up_proj" in [row["name"] for row in found["rows"]]


def test_no_config(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    (tmp_path / "config.json").unlink()
    assert findings(capsys, tmp_path)[0] == 1


@pytest.mark.parametrize("metadata", [{"format": "dense", "ignore": []}, "50 %", None], ids=str)
def test_metadata_of_another_form(metadata, tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    change_config(tmp_path, sparsity_config=metadata)
    code, found = findings(capsys, tmp_path)
    assert code == 1
    assert "not of the form" in found["problems"][0]


def test_only_one_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each tensor is released before the next one is read."""
    import weakref

    import optimum_sparse.commands.inspect as command

    save_pruned(tmp_path)
    alive: list[weakref.ref] = []
    count = command.count

    def counting(weight, patterns):
        assert [ref() for ref in alive if ref() is not None] == []
        alive.append(weakref.ref(weight))
        return count(weight, patterns)

    monkeypatch.setattr(command, "count", counting)
    assert sparse("inspect", tmp_path) == 0
    assert len(alive) == 16


def corrupt(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def lose_a_shard(folder: Path) -> None:
    save_pruned(folder, shard_size="30KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


BAD_FOLDERS = {
    "no safetensors files": lambda folder: (folder / "model.safetensors").unlink(),
    "model.safetensors is corrupt": corrupt,
    "config.json is not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "lacks model-00002-of-": lose_a_shard,
    "has no weight_map": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_bad_folders(message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    BAD_FOLDERS[message](tmp_path)
    capsys.readouterr()
    assert sparse("inspect", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "There is no file or folder './nowhere'"),
        ("some/model", "There is no folder 'some/model', no model of this name in the local cache"),
        ("a b c", "There is no file or folder 'a b c'"),
        (__file__, "is a file: give the folder"),
    ],
)
def test_bad_sources(source: str, message: str, capsys: pytest.CaptureFixture):
    assert sparse("inspect", source) == 2
    assert message in capsys.readouterr().err


def test_what_is_wrong_is_not_called_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_pruned(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sparsity_config"]["achieved_sparsity"] = 0.9
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sparse("inspect", tmp_path) == 1
    assert "The metadata is not true:" in capsys.readouterr().out
    del config["sparsity_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sparse("inspect", tmp_path) == 1
    assert "There is nothing to check:" in capsys.readouterr().out
