"""`optimum-cli sparse bench`: what it measures is measured, and mistakes are one line."""

import json
from pathlib import Path

import pytest
import torch

from optimum_sparse.report import read_report, write_report
from optimum_sparse.runtime import bench, kernels

from ..beyond_text import whisper_model
from ..checkpoints import save_tiny
from ..helpers import tiny_model
from ..report.reports import full_report
from .cli import sparse

FEW = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1)


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    model = save_tiny(tmp_path / "pruned")
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.view(-1)[::2] = 0
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_table_and_json(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "bench.json"
    assert sparse("bench", pruned, "--batch-sizes", 1, 3, "--prefer", "memory", "--json", file, "--layers", *FEW) == 0
    printed = capsys.readouterr().out
    for line in ("load, s", "resident memory, MB", "prefill, batch 1, tokens/s", "decode, batch 3, tokens/s"):
        assert line in printed
    assert printed.count("model.layers.{0-1}.self_attn.q_proj") == 2  # the layers, for each batch size
    findings = json.loads(file.read_text())
    assert [batch["batch_size"] for batch in findings["batches"]] == [1, 3]
    for batch in findings["batches"]:
        assert {layer["choice"] for layer in batch["runtime"]["layers"]} == {"sparse", "torch"}
        assert all(batch[form][what] > 0 for form in ("dense", "sparse") for what in ("prefill", "decode"))
    assert findings["checkpoint_bytes"] == (pruned / "model.safetensors").stat().st_size
    assert findings["machine"]["kernel"] == kernels.LEVEL


def test_the_report_beside_the_model_has_the_figures(pruned: Path, capsys: pytest.CaptureFixture):
    write_report(full_report(), pruned, page=True)
    assert sparse("bench", pruned, "--batch-sizes", 2, *FEW) == 0
    assert f"Added to {pruned / 'sparsity_report.json'}" in capsys.readouterr().out
    report = read_report(pruned)
    assert report.bench["model"] == "pruned" and [batch["batch_size"] for batch in report.bench["batches"]] == [2]
    assert report.evaluations == full_report().evaluations
    assert (pruned / "sparsity_report.html").read_text() == report.to_html()


def test_a_report_of_a_newer_version_is_said_before_anything_is_measured(
    pruned: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (pruned / "sparsity_report.json").write_text('{"schema": 99}')
    monkeypatch.setattr(bench, "bench", None)
    assert sparse("bench", pruned) == 2
    assert "of version 99" in capsys.readouterr().err


def test_speeds_are_tokens_per_second(monkeypatch: pytest.MonkeyPatch):
    """With a clock of ten seconds and one for each token of the dense model, and half of that for the other."""
    models = {"dense": tiny_model(), "sparse": tiny_model(seed=1)}
    seconds = {id(models["dense"]): 1.0, id(models["sparse"]): 0.5}
    calls = []

    def fake(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> list[float]:
        assert prompt.shape == (4, 22)
        calls.append(id(model))
        return [seconds[id(model)] * (11 + token) for token in range(new_tokens)]

    monkeypatch.setattr(bench, "_generation_times", fake)
    speeds = bench.generation_speeds(models, batch_size=4, prompt_tokens=22, new_tokens=6, repeats=2)
    assert speeds == {
        "dense": {"prefill": pytest.approx(4 * 22 / 11), "decode": pytest.approx(4 * 5 / 5)},
        "sparse": {"prefill": pytest.approx(4 * 22 / 5.5), "decode": pytest.approx(4 * 5 / 2.5)},
    }
    assert calls[2] == calls[5] != calls[3] == calls[4]  # after warming up, each is the first as often as the other


def test_times_are_those_of_each_new_token():
    times = bench._generation_times(tiny_model(), torch.ones(2, 5, dtype=torch.int64), new_tokens=7)
    assert len(times) == 7 and times == sorted(times) and times[0] > 0


def test_resident_memory_counts_what_is_held():
    before = bench.resident_bytes()
    held = torch.ones(2**24)
    assert 0.9 * held.nbytes < bench.resident_bytes() - before < 1.1 * held.nbytes + 2**22
    del held
    assert bench.resident_bytes() - before < 2**23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-sizes", 0], "must be at least 1"),
        (["--new-tokens", 1], "new_tokens at least 2"),
        (["--threads", 0], "--threads must be at least 1"),
        (["--prompt-tokens", 1000], "the model takes 128"),
        (["--plot", "figure.pdf"], "must be a .png or .svg file"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(pruned: Path, capsys: pytest.CaptureFixture, options: list, message: str):
    assert sparse("bench", pruned, *options) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1]


def test_models_that_do_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    assert sparse("bench", tmp_path, *FEW) == 2
    assert "nothing to measure" in capsys.readouterr().err
    whisper_model().save_pretrained(tmp_path)  # it generates text, from sound
    assert sparse("bench", tmp_path, *FEW) == 2
    assert "which does not continue text" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(pruned: Path, tmp_path: Path, suffix: str):
    file = tmp_path / f"figure.{suffix}"
    assert sparse("bench", pruned, "--batch-sizes", 1, "--plot", file, *FEW) == 0
    assert file.stat().st_size > 1000


def test_files_are_checked_before_and_folders_made(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert sparse("bench", pruned, "--json", tmp_path) == 2
    assert "must name a file" in capsys.readouterr().err
    assert sparse("bench", pruned, "--batch-sizes", 1, "--json", tmp_path / "new" / "bench.json", *FEW) == 0
    assert (tmp_path / "new" / "bench.json").is_file()


def test_folders_of_files_are_made(pruned: Path, tmp_path: Path):
    plot, file = tmp_path / "plots" / "a.svg", tmp_path / "figures" / "a.json"
    assert sparse("bench", pruned, "--batch-sizes", 1, "--plot", plot, "--json", file, *FEW) == 0
    assert plot.is_file() and file.is_file()
