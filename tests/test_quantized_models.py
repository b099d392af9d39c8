"""Quantised models: on their grids when they are saved, told apart when they are not, the same by every way."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.checkpoint import pack_folder
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.quantization import read_grids
from optimum_sparse.run import PruningRun
from optimum_sparse.saving import GRIDS_FILE

from .helpers import tiny_batches, tiny_mixtral, tiny_model

OPTIONS = {"quantization": "int4", "group_size": 16}


def quantized(model, dtype=torch.bfloat16, **options) -> SparsePruner:
    pruner = SparsePruner(progress=False, **{**OPTIONS, **options})
    pruner.prune(model.to(dtype), dataset=tiny_batches(4))
    return pruner


def number_of_values(folder: Path) -> list[int]:
    """How many values the weights of each group have, in the files."""
    model, grids = AutoModelForCausalLM.from_pretrained(folder), read_grids(folder / GRIDS_FILE)
    counts = []
    for name, grid in grids.items():
        weight = model.get_submodule(name).weight
        for group in weight.float().split(grid.group_size, dim=1):
            counts += [len(row.unique()) for row in group]
    return counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": "2:4"},
        {"method": "magnitude"},
        {"refine": "cg"},
        {"method": "sparsegpt", "rescale": True},
        {"method": "wanda", "rescale": True},
    ],
    ids=str,
)
def test_saved_on_its_grid(tmp_path: Path, dtype: torch.dtype, options: dict):
    model = tiny_model("llama")
    quantized(model, dtype, **options).save(model, tmp_path)
    found = inspect(str(tmp_path))
    assert found["metadata_is_true"], found
    record = json.loads((tmp_path / "config.json").read_text())["sparsity_config"]
    assert {name: record[name] for name in ("quantization", "group_size")} == OPTIONS
    assert record["achieved_sparsity"] >= 0.5
    counts = number_of_values(tmp_path)
    assert len(counts) > 100 and max(counts) <= 16 < 2 * max(counts)


@pytest.mark.parametrize("model", [tiny_mixtral(), tiny_model("gpt2")], ids=["experts", "transposed weights"])
def test_other_layouts(tmp_path: Path, model):
    quantized(model).save(model, tmp_path)
    assert inspect(str(tmp_path))["metadata_is_true"]


def test_packing_keeps_the_grids(tmp_path: Path):
    model = tiny_model("llama")
    pruner = quantized(model)
    pruner.save(model, tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    pruner.save(model, tmp_path / "at once", compressed=True)
    for name in ("packed", "at once"):
        assert inspect(str(tmp_path / name))["metadata_is_true"]


def test_weights_that_left_their_grids_are_not_called_quantised(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = tiny_model("llama")
    pruner = quantized(model)
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight[weight != 0] *= 1.03
    with caplog.at_level(logging.WARNING):
        pruner.save(model, tmp_path)
    assert "no longer called quantised: model.layers.0.self_attn.q_proj" in caplog.text
    record = json.loads((tmp_path / "config.json").read_text())["sparsity_config"]
    assert "quantization" not in record and record["achieved_sparsity"] >= 0.5
    assert not (tmp_path / GRIDS_FILE).exists() and inspect(str(tmp_path))["metadata_is_true"]


@pytest.mark.parametrize("lie", ["weights", "no grids", "damaged grids"])
def test_inspect_finds_a_lie(tmp_path: Path, lie: str):
    model = tiny_model("llama")
    quantized(model).save(model, tmp_path)
    if lie == "weights":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, :8] = torch.arange(1, 9) * 0.0173
        model.save_pretrained(tmp_path)
    elif lie == "no grids":
        (tmp_path / GRIDS_FILE).unlink()
    else:
        (tmp_path / GRIDS_FILE).write_bytes(b"nothing")
    found = inspect(str(tmp_path))
    assert not found["metadata_is_true"]


def test_a_second_save_without_quantisation_leaves_no_grids(tmp_path: Path):
    model = tiny_model("llama")
    quantized(model).save(model, tmp_path)
    dense = tiny_model("llama")
    pruner = SparsePruner(progress=False)
    pruner.prune(dense, dataset=tiny_batches(4))
    pruner.save(dense, tmp_path)
    assert not (tmp_path / GRIDS_FILE).exists() and inspect(str(tmp_path))["metadata_is_true"]


def assert_same(*folders: Path) -> None:
    """The same weights and grids in two folders."""
    for file in ("model.safetensors", GRIDS_FILE):
        first, second = (load_file(folder / file) for folder in folders)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("options", [{}, {"true_sequential": False}], ids=str)
def test_resumed_run_has_the_same_weights_and_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict):
    model = tiny_model("llama").bfloat16()
    quantized(model, **options).save(model, tmp_path / "expected")

    class Stopped(Exception):
        pass

    def stop_after_a_block(self, *arguments):
        steps = PruningRun._steps_before(self, *arguments)
        did = steps.did

        def stop(step):
            did(step)
            if list((tmp_path / "progress").glob("[0-9]*.safetensors")):
                raise Stopped

        steps.did = stop
        return steps

    resumed = tiny_model("llama").bfloat16()
    pruner = SparsePruner(progress=False, **{**OPTIONS, **options})
    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_steps_before", PruningRun._steps, raising=False)
        patch.setattr(PruningRun, "_steps", stop_after_a_block)
        with pytest.raises(Stopped):
            pruner.prune(resumed, dataset=tiny_batches(4), resume_from=tmp_path / "progress")
    resumed = tiny_model("llama").bfloat16()
    pruner = SparsePruner(progress=False, **{**OPTIONS, **options})
    pruner.prune(resumed, dataset=tiny_batches(4), resume_from=tmp_path / "progress")
    pruner.save(resumed, tmp_path / "resumed")
    assert_same(tmp_path / "resumed", tmp_path / "expected")


def test_offloaded_model_has_the_same_weights_and_grids(tmp_path: Path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "dense")
    for name, options in {
        "resident": {},
        "offloaded": {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
        pruner = SparsePruner(progress=False, **OPTIONS)
        pruner.prune(model, dataset=tiny_batches(4))
        pruner.save(model, tmp_path / name)
    assert_same(tmp_path / "resident", tmp_path / "offloaded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int9"}, "Unknown quantization 'int9'"),
        ({"quantization": "int4", "group_size": 0}, "group_size must be at least 1, got 0"),
        ({"quantization": "int4", "group_size": -2}, "group_size must be at least 1, got -2"),
        ({"group_size": 64}, "group_size=64"),
        ({"symmetric": True}, "symmetric=True"),
    ],
)
def test_what_is_no_quantisation(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)


def test_a_group_has_128_inputs_if_nothing_is_said():
    assert SparseConfig(quantization="int8").group_size == 128
    assert SparseConfig.from_dict(SparseConfig(quantization="int8").to_dict()) == SparseConfig(quantization="int8")


@pytest.mark.parametrize("first", [None, "int8", "int4"], ids=str)
@pytest.mark.parametrize("second", [None, "int8"], ids=str)
def test_matrices_that_are_pruned_in_turn(tmp_path: Path, first: str | None, second: str | None, caplog) -> None:
    model = tiny_model("llama").bfloat16()
    settings = {"method": "wanda", "num_samples": 8, "progress": False}
    for targets, quantization in ((["*.self_attn.*"], first), (["*.mlp.*"], second)):
        options = {"quantization": quantization, "group_size": 16} if quantization else {}
        pruner = SparsePruner(targets=targets, **settings, **options)
        pruner.prune(model, dataset=tiny_batches(4))
        pruner.save(model, tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)  # where the grids are that the next one does not know
    assert inspect(str(tmp_path))["metadata_is_true"]
    one_file_one_kind = first is not None and second is not None and first != second
    assert ("is no longer called quantised" in caplog.text) == one_file_one_kind
    first = None if one_file_one_kind else first
    kept = {name for name, how in (("self_attn", first), ("mlp", second)) if how}
    found = read_grids(tmp_path / GRIDS_FILE) if kept else {}
    assert {name.split(".")[-2] for name in found} == kept
    bits = {name.split(".")[-2]: grid.bits for name, grid in found.items()}
    assert bits == {name: int(how[3:]) for name, how in (("self_attn", first), ("mlp", second)) if how}
    assert ("quantization" in model.config.sparsity_config) == bool(kept)


def test_pruned_again_without_quantisation(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantized(model).save(model, tmp_path)
    pruner = SparsePruner(method="wanda", num_samples=8, progress=False)
    pruner.prune(model, dataset=tiny_batches(4))
    pruner.save(model, tmp_path)
    assert not {"quantization", "group_size"} & model.config.sparsity_config.keys()
    assert not (tmp_path / GRIDS_FILE).parent.exists()
    assert inspect(str(tmp_path))["metadata_is_true"]
