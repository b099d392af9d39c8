"""The report as one HTML page: no other file, no network, nothing in it that a model's name could smuggle in."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..config import SparseConfig
from . import plots
from .pictures import Picture
from .record import MatrixReport, SparsityReport
from .summary import (
    by_place,
    errors_of,
    folded,
    megabytes,
    quality,
    sizes,
    sparsity_of,
    speeds,
)

# The page of a model with very many notes is still one to read; all of them are in the JSON.
MOST_NOTES = 50


def report_page(report: SparsityReport) -> str:
    """The page of a report."""
    heatmaps, cells = _layers(report.matrices)
    return render(
        "report.html",
        script="report.js",
        report=report,
        title=f"{report.model or 'A model'}, pruned",
        lead=_lead(report),
        figures=_figures(report),
        rows=[
            (row.what, row.dense, row.pruned, row.change)
            for row in [*quality(_last(report.evaluations)), *sizes(report), *speeds(report.bench)]
        ],
        missing=_missing(report),
        heatmaps=heatmaps,
        cells=cells,
        experts=len(cells) < len(report.matrices),
        depth=_depth(report),
        pictures=report.pictures,
        facts=[_facts(picture) for picture in report.pictures],
        levels=[_levels(picture) for picture in report.pictures],
        costs=_costs(report),
        recovery=_pairs(report.recovery or {}),
        skipped=_skipped(report.skipped),
        notes=_notes(report),
        settings=_settings(report),
        versions=_pairs(report.versions),
    )


def render(template: str, script: str | None = None, **values: Any) -> str:
    """A page from a template; every value is escaped but for plots, which escape what is in them.

    Args:
        template: Name of the template.
        script: Name of the file with its script, the only one that a browser will run on it.
        **values: For the template.
    """
    environment = _environment()
    code = environment.loader.get_source(environment, script)[0] if script and environment.loader else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template(template).render(
        script=Markup(code),  # a file of this package
        script_hash=f"sha256-{digest}",
        **values,
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("optimum_sparse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _lead(report: SparsityReport) -> str:
    method, pattern = report.config.get("method", "an unknown method"), report.config.get("pattern")
    how = f"in the pattern {pattern} (N non-zero of every M inputs)" if pattern else "with zeros anywhere"
    text = f"{len(report.matrices)} matrices pruned in one shot with {method}, {how}."
    return f"{text} Then trained further." if report.recovery else text


def _figures(report: SparsityReport) -> list[tuple[str, str]]:
    """The few figures to see first: value and name."""
    figures = [(f"{report.sparsity:.2%}", f"zeros in {len(report.matrices)} pruned matrices")]
    errors = errors_of(report.matrices)
    if errors:
        figures.append((f"{math.fsum(errors) / len(errors):.2%}", "mean error of a matrix's outputs"))
    last = _last(report.evaluations)
    if last and last["texts"]:
        text = last["texts"][0]
        dense = "" if text["baseline_perplexity"] is None else f" (dense: {text['baseline_perplexity']:.4g})"
        figures.append((f"{text['perplexity']:.4g}", f"perplexity on {text['dataset']}{dense}"))
    if report.bench:
        batch = report.bench["batches"][0]
        figures.append(
            (
                f"× {batch['sparse']['decode'] / batch['dense']['decode']:.2f}",
                f"decoding speed, batch {batch['batch_size']}, over the same model run dense",
            )
        )
    if "total" in report.seconds:
        figures.append((_duration(report.seconds["total"]), "to prune it"))
    return figures


def _missing(report: SparsityReport) -> list[str]:
    """What is not known, and the command that finds it out."""
    lines = []
    if not report.evaluations:
        lines.append("Quality was not measured: optimum-cli sparse evaluate DIR --baseline DENSE does it.")
    if report.bench is None:
        lines.append("Speed was not measured: optimum-cli sparse bench DIR does it, on the machine at hand.")
    if report.sizes.keys() >= {"dense", "saved"} and report.sizes["saved"] > 0.95 * report.sizes["dense"]:
        lines.append("The files are dense, with zeros in them, hence no smaller: optimum-cli sparse pack packs them.")
    return lines


def _layers(matrices: Sequence[MatrixReport]) -> tuple[list[dict[str, Any]], list[tuple[str, ...]]]:
    """Heatmaps over depth and kind of matrix, and the table behind them."""
    places = by_place(matrices)
    zeros = {place: sparsity_of(members) for place, members in places.items()}
    found = {place: errors_of(members) for place, members in places.items()}
    errors = {place: math.fsum(known) / len(known) for place, known in found.items() if known}
    if not places:
        return [], []
    maps: list[dict[str, Any]] = [
        {
            "title": "Sparsity",
            "text": f"The fraction of zeros: {_range(min(zeros.values()), max(zeros.values()))}.",
            "svg": _heatmap(zeros, "Fraction of zeros of each matrix over the blocks", 0.0, 1.0),
            "low": "0 %",
            "high": "100 %",
        }
    ]
    if errors:
        worst = max(errors, key=lambda place: errors[place])
        maps.append(
            {
                "title": "Error",
                "text": "Squared norm of the change in a matrix's outputs relative to the outputs, on the calibration "
                f"data. The largest is {errors[worst]:.2%}: {worst[1]} of {worst[0]}.",
                "svg": _heatmap(errors, "Error of each matrix over the blocks", 0.0, max(errors.values())),
                "low": "0 %",
                "high": f"{max(errors.values()):.2%}",
            }
        )
    cells: list[tuple[str, ...]] = [
        (
            block,
            kind,
            str(len(members)),
            f"{sum(m.numel for m in members):,}",
            f"{zeros[block, kind]:.2%}",
            f"{errors[block, kind]:.2%}" if (block, kind) in errors else "",
            f"{max(found[block, kind]):.2%}" if (block, kind) in errors else "",
            f"{sum(m.num_tokens for m in members):,}",
        )
        for (block, kind), members in places.items()
    ]
    return maps, cells


def _range(low: float, high: float) -> str:
    return f"{low:.2%} to {high:.2%}" if f"{low:.2%}" != f"{high:.2%}" else f"{low:.2%} everywhere"


def _heatmap(values: Mapping[tuple[str, str], float], label: str, low: float, high: float) -> Markup:
    tips = {place: f"{place[0]}, {place[1]}: {value:.2%}" for place, value in values.items()}
    return Markup(plots.heatmap(values, tips, label, low, high))  # escapes what is in it


def _depth(report: SparsityReport) -> list[dict[str, Any]]:
    """Plots of how errors come about and what becomes of them from block to block."""
    parts = []
    if report.depth_error:
        text = (
            "How far they are from those of the dense model (squared norm of the difference relative to the dense "
            "ones, mean over the first tokens of the calibration data): what the errors of all blocks before add up "
            "to."
        )
        parts.append(_over_blocks("Hidden states behind each block", text, {"hidden states": report.depth_error}))
    for title, text, found in (
        (
            "Reconstruction of each block",
            "Error of the block's outputs on calibration windows that were held out, before and after its kept "
            "weights were trained.",
            report.reconstruction,
        ),
        (
            "Error correction of each block",
            "Error of the block's outputs relative to those of the dense model, on calibration windows that were held "
            "out, without correction and with what was taken of it: none where it did not help.",
            report.correction,
        ),
    ):
        if found:
            series = {which: {block: each[which] for block, each in found.items()} for which in ("before", "after")}
            taken = {block: f"{each['correction']:g}" for block, each in found.items() if "correction" in each}
            parts.append(_over_blocks(title, text, series, {"correction": taken} if taken else {}))
    blocks: dict[str, list[float]] = {}
    for matrix in report.matrices:
        if matrix.error is not None:
            blocks.setdefault(matrix.block, []).append(matrix.error)
    if blocks:
        series = {
            "mean": {block: math.fsum(errors) / len(errors) for block, errors in blocks.items()},
            "worst matrix": {block: max(errors) for block, errors in blocks.items()},
        }
        text = "Of the outputs of its matrices, given the inputs that they get in the pruned model."
        parts.append(_over_blocks("Errors that each block adds", text, series))
    return parts


def _over_blocks(
    title: str, text: str, series: Mapping[str, Mapping[str, float]], more: Mapping[str, Mapping[str, str]] = {}
) -> dict[str, Any]:
    """A plot of errors over the blocks, and the table behind it, which may have more columns."""
    shown = [{block: f"{error:.3%}" for block, error in errors.items()} for errors in series.values()]
    columns = [*shown, *more.values()]
    curves = {name: list(errors.items()) for name, errors in series.items()}
    return {
        "title": title,
        "text": text,
        "svg": Markup(plots.curves(curves, title, "error, %")),  # escapes what is in it
        "head": ("block", *series, *more),
        "rows": [(block, *(column[block] for column in columns)) for block in columns[0]],
    }


def _facts(picture: Picture) -> tuple[str, ...]:
    """What a picture shows, in words."""
    levels = base64.b64decode(picture.levels)
    zeros = levels.count(0) / len(levels)
    kept, size = _pattern(picture)
    groups = ""
    if size:
        rows = [levels[start : start + picture.columns] for start in range(0, len(levels), picture.columns)]
        counts = [size - row[at : at + size].count(0) for row in rows for at in range(0, len(row) - size + 1, size)]
        groups = f"{sum(count <= kept for count in counts):,} of {len(counts):,}"
    pattern = picture.pattern if size else f"{float(picture.pattern):.0%} anywhere"
    return picture.name, pattern, f"{picture.rows} × {picture.columns}", f"{zeros:.2%}", groups


def _levels(picture: Picture) -> dict[str, Any]:
    """What the script needs to draw a picture."""
    return {
        "name": picture.name,
        "rows": picture.rows,
        "columns": picture.columns,
        "group": _pattern(picture)[1],
        "scale": picture.scale,
        "levels": picture.levels,
    }


def _pattern(picture: Picture) -> tuple[int, int]:
    """N and M of an N:M pattern, else zeros."""
    n, colon, m = picture.pattern.partition(":")
    return (int(n), int(m)) if colon else (0, 0)


def _costs(report: SparsityReport) -> list[dict[str, Any]]:
    parts = []
    phases = {name: seconds for name, seconds in report.seconds.items() if name != "total"}
    if phases:
        total = report.seconds.get("total")
        if total is not None:
            phases["everything else"] = max(total - sum(phases.values()), 0.0)
        shown = {name: _duration(seconds) for name, seconds in phases.items()}
        parts.append(_cost("Time", "" if total is None else f"{_duration(total)} in all.", phases, shown))
    if report.memory:
        shown = {name: megabytes(size) for name, size in report.memory.items()}
        peak = f" The most that was held was {megabytes(report.peak_memory)}." if report.peak_memory else ""
        text = f"What the run was planned to hold when it is fullest.{peak}"
        parts.append(_cost("Memory", text, report.memory, shown))
    return parts


def _cost(title: str, text: str, values: Mapping[str, float], shown: Mapping[str, str]) -> dict[str, Any]:
    svg = Markup(plots.bars(values, shown, title))  # escapes what is in it
    return {"title": title, "text": text, "svg": svg, "head": ("", title.lower()), "rows": list(shown.items())}


def _skipped(skipped: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return [(reason, folded(names)) for reason, names in reasons.items()]


def _notes(report: SparsityReport) -> list[str]:
    by_text: dict[str, list[str]] = {}
    for matrix in report.matrices:
        for note in matrix.notes:
            by_text.setdefault(note, []).append(matrix.name)
    notes = [*report.notes, *(f"{', '.join(folded(names))}: {note}" for note, names in by_text.items())]
    more = len(notes) - MOST_NOTES
    return [*notes[:MOST_NOTES], f"{more} more are in the JSON."] if more > 0 else notes


def _settings(report: SparsityReport) -> list[tuple[str, str]]:
    """What differs from the defaults, and where the data came from."""
    default = SparseConfig().to_dict()
    given = {name: value for name, value in report.config.items() if value != default.get(name)}
    data = {f"calibration: {name}": value for name, value in report.calibration.items()}
    return _pairs({"method": report.config.get("method"), "sparsity": report.config.get("sparsity"), **given, **data})


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text; nested ones with a dot."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += [(f"{name}.{inner}", text) for inner, text in _pairs(value)]
        elif value is not None:
            pairs.append((name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)))
    return pairs


def _last(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return evaluations[-1] if evaluations else None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
