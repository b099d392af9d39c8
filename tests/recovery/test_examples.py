"""The examples run, on tiny models, and what they save is as sparse as what they were given."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import save_tiny, tiny_tokenizer, write_text

from .pruned import assert_zeros_kept, pruned_model, zero_positions

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"


def run(name: str, *arguments) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["recover_lora", "recover_sft", "recover_distill"])
def test_example(name, tmp_path):
    if name == "recover_sft":
        pytest.importorskip("trl")
    original = pruned_model()
    original.save_pretrained(tmp_path / "pruned")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "pruned")
    save_tiny(tmp_path / "dense")
    data = write_text(tmp_path / "text.txt")
    options = []
    if name == "recover_sft":
        talk = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}]
        data = tmp_path / "talks.jsonl"
        data.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(8)))
    elif name == "recover_distill":
        options = ["--teacher", tmp_path / "dense", "--cache", tmp_path / "cache"]
    run(name, tmp_path / "pruned", tmp_path / "out", "--dataset", data, "--steps", 2, "--seqlen", 32, *options)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_zeros_kept(trained, zero_positions(original))
    assert trained.config.sparsity_config["matrices"] == original.config.sparsity_config["matrices"]
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
