"""Tasks: lm-eval's own numbers, and differences worked out by hand from its samples."""

import statistics
from functools import partial
from pathlib import Path

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from optimum_sparse.evaluation import TaskResult, load_tasks, run_tasks
from optimum_sparse.evaluation.harness import WANDA
from tests.checkpoints import tiny_tokenizer
from tests.helpers import tiny_model

from .tasks import write_tasks


def zero_shot(model, tokenizer, names: list[str], baseline=None, tasks_dir=None, **options) -> list[TaskResult]:
    return run_tasks(load_tasks(names, tasks_dir), model, tokenizer, baseline, **options)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Only those files: lm-eval's own are thousands, and take seconds to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    return write_tasks(tmp_path / "tasks")


def by_lm_eval(model, tasks: Path, names: list[str], monkeypatch, **options) -> dict:
    monkeypatch.chdir(tasks)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4)
    return simple_evaluate(wrapped, tasks=names, task_manager=manager, **options)


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}], ids=str)
def test_numbers_are_those_of_lm_eval(tasks: Path, monkeypatch: pytest.MonkeyPatch, options: dict):
    model = tiny_model("llama", max_position_embeddings=512)
    found = zero_shot(
        model, tiny_tokenizer(), ["squares", "cubes"], tasks_dir=tasks, batch_size=4, num_samples=20, **options
    )
    expected = by_lm_eval(model, tasks, ["squares", "cubes"], monkeypatch, limit=20, **options)["results"]
    assert [(result.task, result.metric, result.num_samples) for result in found] == [
        ("squares", "acc", 20),
        ("squares", "acc_norm", 20),
        ("cubes", "exact_match", 20),
    ]
    for result in found:
        assert result.value == expected[result.task][f"{result.metric},none"]
        assert result.stderr == expected[result.task][f"{result.metric}_stderr,none"]
        assert result.baseline_value is None and result.difference is None
    assert 0 < found[0].value < 1 and found[0].version == "3.0"


def test_differences_are_paired(tasks: Path, monkeypatch: pytest.MonkeyPatch):
    models = [tiny_model("llama"), tiny_model("llama", seed=1)]
    result, *_ = zero_shot(models[0], tiny_tokenizer(), ["squares"], models[1], tasks_dir=tasks, batch_size=4)
    own, dense = (
        [sample["acc"] for sample in by_lm_eval(model, tasks, ["squares"], monkeypatch)["samples"]["squares"]]
        for model in models
    )
    differences = [a - b for a, b in zip(own, dense, strict=True)]
    assert len(set(differences)) > 1
    assert result.baseline_value == pytest.approx(statistics.fmean(dense))
    assert result.difference == pytest.approx(statistics.fmean(differences))
    reach = 2.069 * statistics.stdev(differences) / 24**0.5  # of Student's t with 23 degrees of freedom
    low, high = result.difference_interval
    assert (low + high) / 2 == pytest.approx(result.difference)
    assert (high - low) / 2 == pytest.approx(reach, rel=2e-3)


def test_a_group_counts_its_members(tasks: Path):
    model = tiny_model("llama")
    found = {(r.task, r.metric): r for r in zero_shot(model, tiny_tokenizer(), ["powers"], model, tasks_dir=tasks)}
    assert found["powers", "acc"].num_samples == 48
    assert found["powers", "acc"].value == pytest.approx(found["squares", "acc"].value)
    assert found["powers", "acc"].difference == 0 and found["powers", "acc"].difference_interval is None
    assert found["more_squares", "acc"].difference_interval == (0, 0)


def test_offloaded_model(tasks: Path, tmp_path: Path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    expected, found = (zero_shot(m, tiny_tokenizer(), ["squares"], tasks_dir=tasks) for m in (model, offloaded))
    assert found == expected


def test_the_papers_tasks_are_known():
    known = TaskManager().all_tasks
    assert len(WANDA) == 7 and set(WANDA) <= set(known) and {"piqa", "lambada_openai"} <= set(known)


def test_wanda_stands_for_the_seven(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("optimum_sparse.evaluation.harness._build", lambda *a: asked.append(a[1]) or [])
    monkeypatch.setattr("optimum_sparse.evaluation.harness._run", lambda *_: {"results": {}})
    assert zero_shot(tiny_model("llama"), tiny_tokenizer(), ["wanda", "piqa"]) == []
    assert asked == [*WANDA, "piqa"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_samples": 0}, "num_samples must be at least 1, got 0"), ({"num_fewshot": -1}, "num_fewshot must be at")],
)
def test_numbers_out_of_range(tasks: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        zero_shot(tiny_model("llama"), tiny_tokenizer(), ["squares"], tasks_dir=tasks, **options)


def test_unknown_task(tasks: Path):
    with pytest.raises(ValueError, match="no task 'squarez'"):
        zero_shot(tiny_model("llama"), tiny_tokenizer(), ["squarez"], tasks_dir=tasks)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(("{{question}}", "{{riddle}}"), "'riddle' is undefined"), (("squares.jsonl", "nowhere.jsonl"), "nowhere.jsonl")],
)
def test_a_task_that_does_not_fit_its_data(tasks: Path, change: tuple[str, str], reason: str):
    file = tasks / "squares.yaml"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(ValueError, match=rf"'squares' cannot be made .*{reason}.*columns"):
        zero_shot(tiny_model("llama"), tiny_tokenizer(), ["squares"], tasks_dir=tasks)


@pytest.mark.slow
def test_smollm2_has_the_numbers_of_lm_eval(tasks: Path, monkeypatch: pytest.MonkeyPatch, smollm2):
    model, tokenizer = smollm2
    found = zero_shot(model, tokenizer, ["squares"], tasks_dir=tasks, batch_size=8)
    monkeypatch.chdir(tasks)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(wrapped, tasks=["squares"], task_manager=manager)["results"]["squares"]
    assert {result.metric: (result.value, result.stderr) for result in found} == {
        metric: (expected[f"{metric},none"], expected[f"{metric}_stderr,none"]) for metric in ("acc", "acc_norm")
    }
