"""The dense model against the pruned one: what the page, the card and the comparison show of a report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .record import MatrixReport, SparsityReport


@dataclass(frozen=True)
class Row:
    """One line of a comparison, ready to be shown; a cell that is not known is empty."""

    what: str
    dense: str
    pruned: str
    change: str = ""


def quality(evaluation: Mapping[str, Any] | None) -> list[Row]:
    """What an evaluation found, one line per figure."""
    rows = []
    for text in (evaluation or {}).get("texts", []):
        where = f"{text['dataset']} ({text['num_windows']} windows of {text['seqlen']})"
        pruned = f"{text['perplexity']:.4g}{_interval(text['interval'], '{:.4g}')}"
        change = "" if text["ratio"] is None else f"× {text['ratio']:.3f}{_interval(text['ratio_interval'], '{:.3f}')}"
        rows.append(Row(f"perplexity, {where}", _number(text["baseline_perplexity"], "{:.4g}"), pruned, change))
        if text["kl"] is not None:
            kl = f"{text['kl']:.4f} nats per token{_interval(text['kl_interval'], '{:.4f}')}"
            rows.append(Row(f"KL divergence from dense, {where}", "0", kl))
        if text["top1_agreement"] is not None:
            agreement = f"{text['top1_agreement']:.1%}{_interval(text['top1_interval'], '{:.1%}')}"
            rows.append(Row(f"same likeliest token as dense, {where}", "100.0%", agreement))
    for task in (evaluation or {}).get("tasks", []):
        change = ""
        if task["difference"] is not None:
            change = f"{task['difference']:+.4f}{_interval(task['difference_interval'], '{:+.4f}')}"
        pruned = f"{task['value']:.4f}" + ("" if task["stderr"] is None else f" ± {task['stderr']:.4f}")
        what = f"{task['task']}, {task['metric']} ({task['num_samples']} samples)"
        rows.append(Row(what, _number(task["baseline_value"], "{:.4f}"), pruned, change))
    return rows


def sizes(report: SparsityReport) -> list[Row]:
    """What the weights take on disk."""
    if not report.sizes.keys() >= {"dense", "saved"}:
        return []
    dense, saved = report.sizes["dense"], report.sizes["saved"]
    return [Row("files of the weights", megabytes(dense), megabytes(saved), f"× {saved / dense:.2f}")]


def speeds(bench: Mapping[str, Any] | None) -> list[Row]:
    """What `bench` measured: the pruned model run dense, and run sparse."""
    if not bench:
        return []
    memory = bench["resident_bytes"]
    rows = [Row("memory of the loaded model", megabytes(memory["dense"]), megabytes(memory["sparse"]), _times(memory))]
    for batch in bench["batches"]:
        for phase in ("prefill", "decode"):
            speed = {form: batch[form][phase] for form in ("dense", "sparse")}
            dense, sparse = (f"{speed[form]:,.1f} tokens/s" for form in ("dense", "sparse"))
            rows.append(Row(f"{phase}, batch {batch['batch_size']}", dense, sparse, _times(speed)))
    return rows


def megabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def kind_of(matrix: MatrixReport) -> str:
    """What a matrix is in its block: its name without the block's, experts counted as one."""
    inside = matrix.name.removeprefix(f"{matrix.block}.") if matrix.name != matrix.block else matrix.name
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", inside)


def by_place(matrices: Iterable[MatrixReport]) -> dict[tuple[str, str], list[MatrixReport]]:
    """The matrices of each block and kind."""
    places: dict[tuple[str, str], list[MatrixReport]] = {}
    for matrix in matrices:
        places.setdefault((matrix.block, kind_of(matrix)), []).append(matrix)
    return places


def sparsity_of(matrices: Sequence[MatrixReport]) -> float:
    """The fraction of zeros in several matrices."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)


def errors_of(matrices: Iterable[MatrixReport]) -> list[float]:
    """Their errors, of those that have one."""
    return [matrix.error for matrix in matrices if matrix.error is not None]


def folded(names: Iterable[str]) -> list[str]:
    """Names with `*` for their numbers, and how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        alike = re.sub(r"\d+", "*", name)
        counts[alike] = counts.get(alike, 0) + 1
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def _interval(bounds: Sequence[float] | None, form: str) -> str:
    return f" [{form.format(bounds[0])}, {form.format(bounds[1])}]" if bounds else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _times(values: Mapping[str, float]) -> str:
    return f"× {values['sparse'] / values['dense']:.2f}"
