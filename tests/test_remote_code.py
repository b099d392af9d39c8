"""Models whose code is in their folder: loaded by the user, who trusts it, and pruned like others."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from optimum_sparse import PackedConfig, SparsePruner
from optimum_sparse.loading import load_model, model_without_weights

from .checkpoints import tiny_tokenizer, write_text
from .commands.cli import sparse
from .helpers import tiny_batches, tiny_model

CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a class that transformers does not have."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "own"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("how", ["dense", "packed", "sparse"])
def test_pruned_saved_and_loaded(how: str, folder: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    batch = tiny_batches(1)[0]
    pruner = SparsePruner(progress=False)
    pruner.prune(model, dataset=tiny_batches())
    pruner.save(model, tmp_path / "pruned", compressed=how != "dense")
    assert (tmp_path / "pruned" / "modeling_own.py").read_text() == CODE
    options = {"quantization_config": PackedConfig(runtime="sparse")} if how == "sparse" else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True, **options)
    assert type(again).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_its_code_is_not_run_unless_the_user_says_so(folder: Path):
    (folder / "modeling_own.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(folder)


def test_commands_run_it_when_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    text, trust = write_text(tmp_path / "text.txt"), "--trust-remote-code"
    pruned, recovered = tmp_path / "pruned", tmp_path / "recovered"
    windows = ("--dataset", text, "--seqlen", 32, "--num-windows", 2, "--prompts")
    few = ("--method", "wanda", "--dataset", text, "--num-samples", 4, "--seqlen", 32)
    assert sparse("plan", folder, trust, *few) == 0
    assert sparse("plan", folder / "config.json", trust, *few) == 0
    assert sparse("prune", folder, pruned, trust, "--max-memory", "4GiB", "--device", "cpu", *few) == 0
    assert sparse("evaluate", pruned, trust, "--baseline", folder, *windows) == 0
    assert sparse("bench", pruned, trust, "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1) == 0
    steps = ("--max-steps", 1, "--seqlen", 32, "--eval-samples", 2, "--device", "cpu")
    assert sparse("recover", pruned, recovered, trust, "--dataset", text, "--distill", folder, *steps) == 0
    assert (recovered / "modeling_own.py").read_text() == CODE
    capsys.readouterr()
    for arguments in (("plan", folder), ("prune", folder, tmp_path / "other", *few), ("bench", pruned)):
        assert sparse(*arguments) == 2
        assert "trust_remote_code" in capsys.readouterr().err


def test_code_on_the_hub_is_found_without_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The cache of the Hub has the files of a model in a folder named after their commit."""
    from huggingface_hub import constants

    cache = folder.parent / "hub"
    snapshot = cache / "models--some--own" / "snapshots" / ("c0ffee" + "0" * 34)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded, _ = load_model("some/own", trust_remote_code=True)
    outline = model_without_weights("some/own", trust_remote_code=True)
    assert type(loaded).__name__ == type(outline).__name__ == "OwnForCausalLM"
