"""A model before and after `sparsify_for_inference`, side by side: memory, prefill and decode."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ..loading import load_model, local_path
from ..tables import text_table
from . import kernels
from .report import RuntimeReport
from .sparsify import release_memory, sparsify_for_inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bench(
    source: str | os.PathLike,
    batch_sizes: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    dtype: str = "auto",
    prefer: str = "speed",
    trust_remote_code: bool | None = None,
) -> tuple[dict[str, Any], list[RuntimeReport]]:
    """Measure a pruned model as it is and after `sparsify_for_inference`, in turn, in this process.

    Both are loaded anew, the second one once for each batch size; two models are in memory at a time.

    Args:
        source: A folder or Hub id of a model that generates text.
        batch_sizes: How many sequences are generated at once.
        prompt_tokens: Length of the prompts, which are random.
        new_tokens: How many tokens are generated; at least 2.
        repeats: How often each measurement is made, dense and sparse in turn; medians are reported.
        dtype: As for `load_model`.
        prefer: As for `sparsify_for_inference`.
        trust_remote_code: As for `load_model`.

    Returns:
        Pure JSON: the machine, the size of the checkpoint, and for both models the seconds to load, the resident bytes
        and, for each batch size, tokens per second of prefill (to the first token) and decode (the others). And, for
        each batch size, what became of the layers.

    Raises:
        OSError: There is no such model.
        ValueError: It does not generate text, or an argument is out of range.
    """
    if not batch_sizes or min(batch_sizes) < 1 or prompt_tokens < 1 or new_tokens < 2 or repeats < 1:
        raise ValueError(
            "batch_sizes, prompt_tokens and repeats must be at least 1, and new_tokens at least 2; got "
            f"{list(batch_sizes)}, {prompt_tokens}, {repeats} and {new_tokens}."
        )
    load = partial(_load, source, prompt_tokens + new_tokens, dtype, trust_remote_code)
    _warm_up(load())  # imports what would count for the dense model only
    start, before = time.perf_counter(), resident_bytes()
    dense = load()
    loading = {"dense": time.perf_counter() - start}
    _warm_up(dense)
    memory = {"dense": resident_bytes() - before}
    batches, reports = [], []
    for batch_size in batch_sizes:
        start, before = time.perf_counter(), resident_bytes()
        sparse = load()
        report = sparsify_for_inference(sparse, batch_size, prefer)
        if "sparse" not in loading:  # of the first batch size
            loading["sparse"] = time.perf_counter() - start
            _warm_up(sparse)
            memory["sparse"] = resident_bytes() - before
        speeds = generation_speeds({"dense": dense, "sparse": sparse}, batch_size, prompt_tokens, new_tokens, repeats)
        batches.append({"batch_size": batch_size, **speeds, "runtime": report.to_dict()})
        reports.append(report)
        del sparse
        gc.collect()
    folder = local_path(source)
    findings = {
        "model": str(source),
        "machine": machine(),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "prefer": prefer,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "checkpoint_bytes": None if folder is None else _size(folder),
        "load_seconds": loading,
        "resident_bytes": memory,
        "batches": batches,
    }
    return findings, reports


def generation_speeds(
    models: Mapping[str, PreTrainedModel], batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of prefill and decode of several models, in turn; medians.

    Prefill is the time to the first token, and decode that of the others.
    """
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
    firsts: dict[str, list[float]] = {name: [] for name in models}
    others: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(repeats + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            first, *_, last = _generation_times(models[name], prompt, new_tokens)
            if turn:  # the first turn warms up
                firsts[name].append(first)
                others[name].append(last - first)
    return {
        name: {
            "prefill": batch_size * prompt_tokens / statistics.median(firsts[name]),
            "decode": batch_size * (new_tokens - 1) / statistics.median(others[name]),
        }
        for name in models
    }


def machine() -> dict[str, Any]:
    """What the figures depend on besides the model."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "kernel": kernels.LEVEL,
        "threads": kernels.threads(),
        "torch": torch.__version__,
    }


def resident_bytes() -> int:
    """Memory that this process holds, after what is free was given back."""
    gc.collect()
    release_memory()
    return psutil.Process().memory_info().rss


def table(findings: Mapping[str, Any]) -> str:
    """The result of `bench` as text."""
    rows: list[tuple[str, ...]] = []
    for label, key, unit in (("load, s", "load_seconds", 1), ("resident memory, MB", "resident_bytes", 1e6)):
        dense, sparse = (findings[key][form] / unit for form in ("dense", "sparse"))
        rows.append((label, f"{dense:,.1f}", f"{sparse:,.1f}", f"{sparse / dense:.2f}" if dense else "-"))
    for batch in findings["batches"]:
        for what in ("prefill", "decode"):
            dense, sparse = batch["dense"][what], batch["sparse"][what]
            label = f"{what}, batch {batch['batch_size']}, tokens/s"
            rows.append((label, f"{dense:,.1f}", f"{sparse:,.1f}", f"{sparse / dense:.2f}"))
    lines = [text_table(("", "dense", "sparse", "ratio"), rows)]
    where = findings["machine"]
    lines += ["", f"{where['processor']}, kernels: {where['kernel']}, {where['threads']} threads"]
    if findings["checkpoint_bytes"] is not None:
        lines.append(f"checkpoint: {findings['checkpoint_bytes'] / 1e6:,.1f} MB")
    return "\n".join(lines)


def plot(findings: Mapping[str, Any], file: Path) -> None:
    """Draw the result of `bench`, as PNG or SVG by the name of the file.

    Raises:
        ValueError: The name ends with something else.
    """
    check_plot(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    labels = [f"batch {batch['batch_size']}" for batch in findings["batches"]]
    for axes, what in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        for shift, form in ((-0.2, "dense"), (0.2, "sparse")):
            heights = [batch[form][what] for batch in findings["batches"]]
            bars = axes.bar([i + shift for i in range(len(labels))], heights, 0.38, label=form)
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_title(f"{what}, tokens/s")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(file)


def check_plot(file: Path) -> None:
    """Raise what `plot` would, before anything is measured."""
    if file.suffix not in (".png", ".svg"):
        raise ValueError(f"the plot must be a .png or .svg file, got {file}.")


def _load(source: str | os.PathLike, length: int, dtype: str, trust_remote_code: bool | None) -> PreTrainedModel:
    model, _ = load_model(source, dtype, trust_remote_code=trust_remote_code)
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise ValueError(f"{source} is a {type(model).__name__}, which does not continue text: nothing to measure.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"prompt and new tokens are {length} together, and the model takes {longest}.")
    return model


def _warm_up(model: PreTrainedModel) -> None:
    """Touch every weight: those that are mapped from a file take memory only then."""
    _generation_times(model, torch.zeros(1, 1, dtype=torch.int64), 2)


def _generation_times(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds after which each new token was there."""
    times = []

    def look_at_the_clock(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens[:, -1].tolist()  # until a GPU has them
        times.append(time.perf_counter() - start)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)  # no sequence stops here

    prompt = prompt.to(model.device)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[look_at_the_clock],
    )
    return times


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _size(folder: Path) -> int:
    files = [folder] if folder.is_file() else folder.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
