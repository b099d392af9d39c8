"""Models whose code is in their folder: loaded by the user, who trusts it, and pruned like others."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from optimum_sparse import PackedConfig, SparsePruner
from optimum_sparse.loading import load_model

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
