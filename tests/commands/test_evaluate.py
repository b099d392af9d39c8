"""`optimum-cli sparse evaluate` on tiny models."""

import json
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sparse import SparsePruner, evaluation
from optimum_sparse.checkpoint import pack_folder
from optimum_sparse.commands.evaluate import PROMPTS
from optimum_sparse.evaluation import perplexity
from optimum_sparse.report import read_report
from optimum_sparse.runtime import SparseLinear
from tests.beyond_text import bert_model, t5_model
from tests.checkpoints import save_tiny, tiny_tokenizer, write_text
from tests.commands.cli import sparse
from tests.evaluation.tasks import write_tasks

run = partial(sparse, "evaluate")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A dense model, a pruned one with its report, and a text."""
    model = save_tiny(tmp_path / "dense", max_position_embeddings=128)
    pruner = SparsePruner(method="magnitude", sparsity=0.7, progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path / "pruned", tiny_tokenizer())
    write_text(tmp_path / "text.txt")
    return tmp_path


FAST = ("--seqlen", 64, "--device", "cpu")


def test_figures_and_samples_go_to_the_report(folders: Path, capsys: pytest.CaptureFixture):
    figures = folders / "figures.json"
    options = ("--baseline", folders / "dense", "--dataset", folders / "text.txt", *FAST, "--num-windows", 6)
    assert run(folders / "pruned", *options, "--json", figures) == 0
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text())
    (text,) = found["texts"]
    models = [AutoModelForCausalLM.from_pretrained(folders / name) for name in ("pruned", "dense")]
    tokenizer = AutoTokenizer.from_pretrained(folders / "pruned")
    ids = torch.tensor(tokenizer((folders / "text.txt").read_text())["input_ids"])
    pruned, dense = (perplexity(model, ids, 64, 6, progress=False) for model in models)
    assert (text["perplexity"], text["baseline_perplexity"]) == pytest.approx((pruned.value, dense.value))
    assert text["ratio"] == pytest.approx(pruned.value / dense.value, rel=1e-6) and text["kl"] > 0
    assert (text["dataset"], text["num_windows"], text["seqlen"]) == ("text.txt", 6, 64)
    assert (found["model"], found["baseline"], found["tasks"]) == ("pruned", "dense", [])
    assert f"{pruned.value:.4g}" in printed and f"dense {dense.value:.4g}" in printed

    report = read_report(folders / "pruned")
    assert report.evaluations == [{name: value for name, value in found.items() if name != "generations"}]
    assert report.generations == found["generations"]
    assert [sample["prompt"] for sample in report.generations] == list(PROMPTS)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = models[0].generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert report.generations[0]["pruned"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert str(folders) not in report.to_json()
    assert "text.txt" in report.to_html()

    assert run(folders / "pruned", "--dataset", folders / "text.txt", *FAST) == 0
    later = read_report(folders / "pruned")
    assert len(later.evaluations) == 2 and later.generations == report.generations
    assert later.evaluations[1]["texts"][0]["kl"] is None


def test_tasks(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folders / "cache")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    tasks = write_tasks(folders / "tasks")
    options = ("--tasks", "squares", "--tasks-dir", tasks, "--num-samples", 8, "--batch-size", 8, "--prompts")
    assert run(folders / "pruned", "--baseline", folders / "dense", *options, *FAST) == 0
    (evaluation,) = read_report(folders / "pruned").evaluations
    assert evaluation["texts"] == []
    assert [(task["task"], task["metric"], task["num_samples"]) for task in evaluation["tasks"]] == [
        ("squares", "acc", 8),
        ("squares", "acc_norm", 8),
    ]
    assert evaluation["versions"]["lm_eval"] and "squares, acc (8 samples)" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--offload",), ("--dtype", "bfloat16", "--device", "cpu")], ids=" ".join)
def test_packed_and_offloaded_models(folders: Path, options: tuple[str, ...]):
    pack_folder(folders / "pruned", folders / "packed")
    data = ("--dataset", folders / "text.txt", "--seqlen", 64, "--json")
    assert run(folders / "pruned", *data, folders / "a.json", *options) == 0
    assert run(folders / "packed", *data, folders / "b.json", *options) == 0
    a, b = (json.loads((folders / name).read_text())["texts"] for name in ("a.json", "b.json"))
    assert a == b


def test_packed_in_memory(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    pack_folder(folders / "pruned", folders / "packed")
    layers = []
    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: layers.append(sparse_layers(*args)) or evaluate(*args))
    data = ("--dataset", folders / "text.txt", "--seqlen", 64, "--baseline", folders / "dense", "--json")
    for runtime in ("dense", "sparse"):
        assert run(folders / "packed", *data, folders / f"{runtime}.json", "--runtime", runtime) == 0
    dense, sparse = (json.loads((folders / f"{name}.json").read_text())["texts"][0] for name in ("dense", "sparse"))
    assert layers == [(0, 0), (14, 0)]
    for name in ("perplexity", "baseline_perplexity"):
        assert sparse[name] == pytest.approx(dense[name], rel=1e-5)
    capsys.readouterr()
    for options, message in (
        (("--offload",), "leave out --offload"),
        (("--device", "cuda"), "leave out --offload, and --device or give --device cpu"),
    ):
        assert run(folders / "packed", *data, folders / "x.json", "--runtime", "sparse", *options) == 2
        assert message in capsys.readouterr().err
    assert run(folders / "pruned", *data, folders / "x.json", "--runtime", "sparse") == 2
    assert "The checkpoint is not packed" in capsys.readouterr().err


def sparse_layers(model: nn.Module, _tokenizer: object, baseline: nn.Module, *_: object) -> tuple[int, int]:
    """How many packed layers a model has, and its baseline."""
    return tuple(sum(isinstance(m, SparseLinear) for m in each.modules()) for each in (model, baseline))


def test_what_does_not_go_together(folders: Path, capsys: pytest.CaptureFixture):
    def error(*arguments: object) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err

    text = ("--dataset", folders / "text.txt", *FAST)
    other = tiny_tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(folders / "dense")
    said = error(folders / "pruned", "--baseline", folders / "dense", *text)
    assert "other tokenizers: 99 and 100 tokens, 1 of them not shared" in said
    assert "no folder" in error(folders / "pruned", *text, "--tasks", "x", "--tasks-dir", folders / "nowhere")
    assert "leave out --device cpu" in error(folders / "pruned", *text, "--offload")
    assert "LlamaForCausalLM has 128 positions" in error(folders / "pruned", *text, "--seqlen", 129)
    assert "a smaller seqlen" in error(folders / "pruned", *text, "--num-windows", 1000)
    assert "nowhere.txt" in error(folders / "pruned", "--dataset", "nowhere.txt")
    assert "--prompts has an empty one" in error(folders / "pruned", *text, "--prompts", "")
    assert "is a file" in error(folders / "pruned", *text, "--json", folders / "text.txt" / "figures.json")
    assert read_report(folders / "pruned").evaluations == []
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "pruned" / file).unlink()
    assert "has no tokenizer" in error(folders / "pruned", *text)


def test_nothing_is_measured_before_a_mistake_is_found(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("optimum_sparse.evaluation.protocol.perplexity", lambda *_: pytest.fail("it was measured"))
    assert run(folders / "pruned", "--dataset", folders / "text.txt", *FAST, "--tasks", "nonsense") == 2
    assert "no task 'nonsense'" in capsys.readouterr().err


def test_windows_are_as_long_as_the_model_takes(folders: Path):
    options = ("--dataset", folders / "text.txt", "--device", "cpu", "--json", folders / "new" / "figures.json")
    assert run(folders / "pruned", *options) == 0
    assert json.loads((folders / "new" / "figures.json").read_text())["texts"][0]["seqlen"] == 128


def test_models_that_do_not_predict_the_next_token(folders: Path, capsys: pytest.CaptureFixture):
    for name, model in (("bert", bert_model()), ("t5", t5_model())):
        model.save_pretrained(folders / name)
        tiny_tokenizer().save_pretrained(folders / name)
        assert run(folders / name, "--dataset", folders / "text.txt", "--seqlen", 16, "--device", "cpu") == 2
        assert f"predicts the next token, got {type(model).__name__}" in capsys.readouterr().err


def test_broken_weights_are_not_called_a_perplexity(folders: Path, capsys: pytest.CaptureFixture):
    model = AutoModelForCausalLM.from_pretrained(folders / "pruned")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    model.save_pretrained(folders / "pruned")
    assert run(folders / "pruned", "--dataset", folders / "text.txt", *FAST) == 2
    assert "perplexity of the model is nan" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model(folders: Path, capsys: pytest.CaptureFixture):
    save_tiny(folders / "few", vocab_size=30)
    assert run(folders / "few", "--dataset", folders / "text.txt", *FAST) == 2
    assert "outside of the model's vocabulary of 30 ids" in capsys.readouterr().err


def test_a_baseline_that_was_pruned_is_named(folders: Path, caplog: pytest.LogCaptureFixture):
    options = ("--baseline", folders / "pruned", "--dataset", folders / "text.txt", "--num-windows", 2, *FAST)
    assert run(folders / "pruned", *options) == 0
    assert "has been pruned, too: it is not dense" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"), [(("--json", "."), "must name a file"), (("--prompts", ""), "has an empty one")]
)
def test_what_would_fail_at_the_end_is_said_at_the_start(options, message, capsys: pytest.CaptureFixture):
    assert run("nowhere", *options) == 2
    assert message in capsys.readouterr().err


def test_one_text_need_not_be_in_a_list(folders: Path):
    model = AutoModelForCausalLM.from_pretrained(folders / "dense").eval()
    text = str(folders / "text.txt")
    found = evaluation.evaluate(model, tiny_tokenizer(), datasets=text, seqlen=64, num_windows=2, progress=False)
    assert len(found["texts"]) == 1
