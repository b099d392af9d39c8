"""`optimum-cli sparse pack` and `unpack`: what they write, say and refuse, and what `inspect` says of packed files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_sparse.checkpoint import pack_folder
from optimum_sparse.pruner import SparsePruner
from optimum_sparse.report import read_report, weight_bytes

from ..architectures import sweep_model
from ..checkpoints import save_tiny, tiny_tokenizer
from ..helpers import tiny_model
from .cli import sparse


def save_pruned(folder: Path, model: torch.nn.Module, **options) -> Path:
    pruner = SparsePruner(method="magnitude", progress=False, **options)
    pruner.prune(model)
    pruner.save(model, folder, tiny_tokenizer())
    return folder


def test_there_and_back(tmp_path, capsys):
    dense = save_pruned(tmp_path / "dense", tiny_model())
    assert sparse("pack", dense, tmp_path / "packed") == 0
    said = capsys.readouterr().out
    assert said.startswith("Packed 14 tensors to 0.0 MB, 53.1 % of dense; all weight files take 0.1 MB.")
    assert "`import optimum_sparse`" in said
    sizes = [read_report(tmp_path / name).sizes for name in ("dense", "packed")]
    assert [size["saved"] for size in sizes] == [weight_bytes(dense), weight_bytes(tmp_path / "packed")]
    assert sizes[1]["saved"] < sizes[0]["saved"] and sizes[1]["dense"] == sizes[0]["dense"]
    assert sparse("unpack", tmp_path / "packed", tmp_path / "again") == 0
    assert capsys.readouterr().out.startswith("Unpacked 14 tensors; all weight files take 0.1 MB.")
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {p.name for p in dense.iterdir()} == {p.name for p in (tmp_path / "again").iterdir()}


def test_mistakes_are_one_line(tmp_path, capsys):
    dense, original = save_pruned(tmp_path / "dense", tiny_model()), tmp_path / "original"
    save_tiny(original)
    before = (original / "model.safetensors").read_bytes()
    capsys.readouterr()
    for arguments, message in (
        (("pack", dense, dense), "OUT is DIR"),
        (("unpack", dense, tmp_path / "out"), "is dense already"),
        (("pack", tmp_path / "nowhere", tmp_path / "out"), "is not a folder"),
        (("pack", dense, original), "holds a dense model, which would be lost"),
        (("unpack", dense, original), "holds a dense model, which would be lost"),
    ):
        assert sparse(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert (original / "model.safetensors").read_bytes() == before


def test_what_was_packed_without_a_record_is_packed_again(tmp_path):
    dense = save_pruned(tmp_path / "dense", tiny_model())
    config = json.loads((dense / "config.json").read_text())
    del config["sparsity_config"]
    (dense / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        assert sparse("pack", tmp_path / "dense", tmp_path / "packed") == 0


def findings(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict]:
    capsys.readouterr()
    code = sparse("inspect", folder, "--json")
    return code, {**json.loads(capsys.readouterr().out), "model": None}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"sparsity": 0.6}),
        ("llama", {"pattern": "2:4"}),
        ("gpt2", {"pattern": "2:4"}),
        ("mixtral", {}),
        ("gpt_oss", {"pattern": "2:4"}),
    ],
    ids=str,
)
def test_inspect_finds_in_packed_files_what_it_finds_in_dense_ones(model_type, options, tmp_path, capsys):
    dense = save_pruned(tmp_path / "dense", sweep_model(model_type), **options)
    assert pack_folder(dense, tmp_path / "packed").packed_tensors
    code, found = findings(tmp_path / "packed", capsys)
    assert code == 0
    assert (code, found) == findings(dense, capsys)


def test_inspect_sees_that_packed_files_do_not_match_the_record(tmp_path, capsys):
    dense = save_pruned(tmp_path / "dense", tiny_model())
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] = 0
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(
        -1.0
    )  # turns each 0.0 into -0.0, which is a value and still zero
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    pack_folder(dense, tmp_path / "packed")
    code, found = findings(tmp_path / "packed", capsys)
    assert code == 1 and len(found["problems"]) == 1
    assert (code, found) == findings(dense, capsys)
