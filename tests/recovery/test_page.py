"""The code on docs/recovery.md runs, and keeps the zeros."""

import json
import re
from pathlib import Path

from transformers import AutoModelForCausalLM

from optimum_sparse.commands.inspect import inspect
from tests.checkpoints import save_tiny, tiny_tokenizer

from .pruned import assert_zeros_kept, pruned_model, zero_positions

PAGE = Path(__file__).parents[2] / "docs" / "recovery.md"


def test_recovery_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    original = pruned_model()
    original.save_pretrained("pruned")
    tiny_tokenizer().save_pretrained("pruned")
    save_tiny(Path("dense"))
    rows = [json.dumps({"text": f"Line {n}: {n * n} is the square of {n}."}) for n in range(40)]
    Path("my-text.jsonl").write_text("\n".join(rows))
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        if isinstance(names["model"], type(original)):
            assert_zeros_kept(names["merged"], zero_positions(original))
    assert_zeros_kept(names["model"], zero_positions(original))
    assert_zeros_kept(names["restored"].merge_and_unload(), zero_positions(original))
    assert inspect("recovered")["metadata_is_true"]
    assert_zeros_kept(AutoModelForCausalLM.from_pretrained("recovered"), zero_positions(original))
