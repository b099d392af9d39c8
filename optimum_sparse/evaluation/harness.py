"""Tasks of lm-eval, for one model or for a model and its dense original on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..offload import execution_device
from .intervals import interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Those of the Wanda paper, Table 2.
WANDA = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
Key = tuple[str, str]


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task.

    Attributes:
        task: Name of the task.
        version: Its version, as lm-eval counts it.
        metric: Name of the metric, with that of the filter on the answers if there is one.
        num_samples: Samples evaluated.
        value: Of the model.
        stderr: Its standard error, if lm-eval has one.
        baseline_value: Of the dense model, if there is one.
        difference: The first minus the second.
        difference_interval: Its 95 % confidence interval, from the differences in each sample; `None` where the value
            is not the mean over samples.
    """

    task: str
    version: str
    metric: str
    num_samples: int
    value: float
    stderr: float | None
    baseline_value: float | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, and lm-eval's manager of them."""

    manager: Any
    built: list[Any]


def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> Tasks:
    """Make tasks of lm-eval from their files and data.

    Args:
        names: Of lm-eval's tasks, groups and tags, of tasks in `folder`, or `"wanda"` for the seven of the paper.
        folder: With task files of your own. Data files that they name are looked for from there.

    Raises:
        ValueError: There is no such task, or it cannot be made from its data.
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "Tasks are run by lm-eval: install it with `pip install optimum-sparse[evaluation]`."
        ) from error

    folder = None if folder is None else Path(folder).absolute()
    every = [name for given in names for name in (WANDA if given == "wanda" else (given,))]
    with chdir(folder) if folder else nullcontext():
        manager = TaskManager(include_path=None if folder is None else str(folder))
        return Tasks(manager, [part for name in every for part in _build(manager, name)])


def run_tasks(
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    baseline: PreTrainedModel | None = None,
    num_fewshot: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 1,
) -> list[TaskResult]:
    """Run tasks of lm-eval.

    Args:
        tasks: From `load_tasks`.
        model: A causal language model.
        tokenizer: That of both models.
        baseline: The dense model.
        num_fewshot: Examples in the prompt (default: as the task says).
        num_samples: Evaluate only the first so many samples of each task.
        batch_size: Sequences per forward.

    Raises:
        ValueError: A number is out of range.
    """
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("num_samples", num_samples, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    results, *dense = (
        _run(tasks, each, tokenizer, num_fewshot, num_samples, batch_size)
        for each in ([model] if baseline is None else [model, baseline])
    )
    return [_result(key, results, *dense) for key in _metrics(results)]


def _build(manager: Any, name: str) -> list[Any]:
    """The task or the group of that name, or the tasks with that tag."""
    if not manager.match_tasks([name]):
        raise ValueError(
            f"There is no task {name!r}: `lm-eval ls tasks` lists those that there are, and --tasks-dir names a "
            "folder with files of your own."
        )
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever comes from files and templates of others
        raise ValueError(
            f"Task {name!r} cannot be made from its data ({type(error).__name__}: {error}). Check that the data can "
            "be read and have the columns that the task file names."
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _run(
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None,
    num_samples: int | None,
    batch_size: int,
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """A model whose inputs go where it computes, wherever its weights are kept."""

        @property
        def device(self) -> torch.device:
            return execution_device(self.model)

    wrapped = Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # Without a manager it would make a second one, which reads the thousands of task files once more.
    return simple_evaluate(
        wrapped, tasks=tasks.built, task_manager=tasks.manager, num_fewshot=num_fewshot, limit=num_samples
    )


def _metrics(results: Mapping[str, Any]) -> list[Key]:
    """Task, and metric with its filter, of each figure."""
    return [
        (task, key)
        for task, figures in results["results"].items()
        for key, value in figures.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    ]


def _result(key: Key, results: Mapping[str, Any], dense: Mapping[str, Any] | None = None) -> TaskResult:
    task, name = key
    metric, chosen = name.split(",", 1)
    found = results["results"][task]
    stderr = found.get(f"{metric}_stderr,{chosen}")
    members = results.get("group_subtasks", {}).get(task) or [task]
    counts = [results["n-samples"][member]["effective"] for member in members if member in results["n-samples"]]
    result = TaskResult(
        task=task,
        version=str(results["versions"].get(task, "")),
        metric=metric if chosen == "none" else f"{metric} ({chosen})",
        num_samples=sum(counts),
        value=float(found[name]),
        stderr=stderr if isinstance(stderr, float) else None,
    )
    if dense is None:
        return result
    value = float(dense["results"][task][name])
    own, other = (_of_samples(each, task, metric, chosen) for each in (results, dense))
    between = None
    if own is not None and other is not None and abs(own.mean().item() - result.value) < 1e-6:
        between = interval(own - other)
    return replace(result, baseline_value=value, difference=result.value - value, difference_interval=between)


def _of_samples(results: Mapping[str, Any], task: str, metric: str, chosen: str) -> torch.Tensor | None:
    """The metric in each sample, in their order, or `None` if it is no number."""
    samples = [sample for sample in results["samples"].get(task, []) if sample["filter"] == chosen]
    values = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None
    return torch.tensor(values, dtype=torch.float64)
