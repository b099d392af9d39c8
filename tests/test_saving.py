"""Folders are replaced whole or not at all."""

import subprocess
import sys

import pytest

from optimum_sparse.saving import TEMPORARY, replace_folder


def test_files_are_replaced_and_others_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter_model.safetensors").write_text("mine")
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old shard")
    with replace_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new weights")
        assert (tmp_path / "config.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert (tmp_path / "config.json").read_text() == "new"


def test_a_failure_changes_nothing(tmp_path):
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), replace_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        raise RuntimeError("half-way")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_what_a_killed_process_has_left_behind_goes(tmp_path):
    half = tmp_path / f"{TEMPORARY}killed"
    half.mkdir()
    (half / "model.safetensors").write_text("half of it")
    with replace_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_new_folder_goes_if_nothing_comes_into_it(tmp_path):
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file"), replace_folder(tmp_path / "out"):
        pass


FULL_DISK = """
import resource, signal, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from optimum_sparse import SparsePruner

config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
pruner = SparsePruner(method="magnitude", progress=False)
pruner.prune(model)
pruner.save(model, sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
torch.nn.init.ones_(model.model.norm.weight.data)
pruner.save(model, sys.argv[1])
"""


def test_disk_full_while_saving_leaves_the_old_checkpoint(tmp_path):
    """A limit on file size makes writes fail as a full disk does, with a real error from the system."""
    target = tmp_path / "model"
    run = subprocess.run([sys.executable, "-c", FULL_DISK, target], capture_output=True, text=True)
    assert run.returncode != 0 and "File too large" in run.stderr, run.stderr
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(target)
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    assert not [p.name for p in target.iterdir() if p.name.startswith(".saving")]
