"""Several pruned models side by side: what they take, how fast they are and how good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tables import text_table
from .record import SparsityReport
from .summary import megabytes

# What makes perplexities comparable.
Protocol = tuple[str, int, int]


@dataclass(frozen=True)
class Candidate:
    """One of the models that are compared; what was not measured is `None`.

    Attributes:
        name: What it is called here.
        how: Method and pattern.
        zeros: Fraction of zeros in its pruned matrices.
        size: Bytes of its weight files.
        perplexity: On the text of the comparison.
        ratio: That over the perplexity of the dense model.
        kl: Divergence from the dense model, nats per token.
        decode: Tokens per second with one sequence, run sparse.
    """

    name: str
    how: str
    zeros: float
    size: int | None
    perplexity: float | None
    ratio: float | None
    kl: float | None
    decode: float | None


@dataclass(frozen=True)
class Comparison:
    """What is compared, and what could not be.

    Attributes:
        candidates: The models, in the order given.
        text: What their perplexities were measured on, in words; empty if on nothing that they share.
        notes: What to know before figures are compared.
    """

    candidates: list[Candidate]
    text: str
    notes: list[str]

    def table(self) -> str:
        """The figures as text."""
        table = text_table(HEAD, list(map(_cells, self.candidates)), left=2)
        return "\n".join([table, *([f"perplexity: {self.text}"] if self.text else []), *self.notes])

    def page(self) -> str:
        """The figures as one HTML page, with plots of what no other model beats."""
        from .html import render

        return render(
            "compare.html",
            title=f"{len(self.candidates)} pruned models compared",
            comparison=self,
            head=HEAD,
            rows=[_cells(candidate) for candidate in self.candidates],
            plots=[plot for plot in (self._size_plot(), self._speed_plot()) if plot],
        )

    def _size_plot(self) -> dict[str, Any] | None:
        return self._plot("Size and quality", "size", "files, MB", lambda size: size / 1e6, smaller=True)

    def _speed_plot(self) -> dict[str, Any] | None:
        return self._plot("Speed and quality", "decode", "tokens/s", lambda speed: speed, smaller=False)

    def _plot(
        self, title: str, attribute: str, axis: str, scale: Callable[[float], float], smaller: bool
    ) -> dict[str, Any] | None:
        points = {
            c.name: (scale(getattr(c, attribute)), c.perplexity)
            for c in self.candidates
            if getattr(c, attribute) is not None and c.perplexity is not None
        }
        if len(points) < 2:
            return None
        from markupsafe import Markup

        from . import plots

        best = pareto(points, smaller)
        svg = Markup(plots.scatter(points, best, title, (axis, "perplexity")))  # escapes what is in it
        return {"title": title, "svg": svg, "best": best}


HEAD = ("model", "how", "zeros", "files", "perplexity", "× dense", "KL", "decode")


def compare_reports(reports: Mapping[str, SparsityReport]) -> Comparison:
    """Put reports side by side.

    Perplexities are compared on the text, window length and number of windows that most of the models were measured
    with; others are left out, and named in the notes.

    Args:
        reports: By the name that each model is to have.
    """
    found = {name: _evaluated(report) for name, report in reports.items()}
    counts: dict[Protocol, int] = {}
    for measured in (protocol for texts in found.values() for protocol in texts):
        counts[measured] = counts.get(measured, 0) + 1
    protocol = max(counts, key=lambda key: counts[key], default=None)
    candidates = [
        _candidate(name, report, found[name].get(protocol) if protocol else None) for name, report in reports.items()
    ]
    notes = []
    left_out = [candidate.name for candidate in candidates if candidate.perplexity is None]
    if left_out:
        notes.append(f"No perplexity like that of the others: {', '.join(left_out)}; `optimum-cli sparse evaluate`.")
    slow = [candidate.name for candidate in candidates if candidate.decode is None]
    if slow:
        notes.append(f"Speed not measured: {', '.join(slow)}; `optimum-cli sparse bench`.")
    bases = {report.model for report in reports.values()}
    if len(bases) > 1:
        notes.append(f"They were made from different models: {', '.join(sorted(map(str, bases)))}.")
    machines = {str(sorted(report.bench["machine"].items())) for report in reports.values() if report.bench}
    if len(machines) > 1:
        notes.append("Speeds were measured on different machines or versions, and cannot be compared.")
    differing = [
        name
        for name in ("dtype", "prefer", "prompt_tokens", "new_tokens")
        if len({report.bench[name] for report in reports.values() if report.bench and name in report.bench}) > 1
    ]
    if differing:
        notes.append(f"Speeds were measured with different {', '.join(differing)}, and cannot be compared.")
    text = f"{protocol[0]}, {protocol[2]} windows of {protocol[1]} tokens" if protocol else ""
    return Comparison(candidates, text, notes)


def pareto(points: Mapping[str, tuple[float, float]], smaller: bool) -> list[str]:
    """Names of the points that no other beats in both directions, by x.

    Args:
        points: Name -> (x, y); the smaller y the better.
        smaller: Whether a smaller x is better, or a larger one.
    """
    order = sorted(points, key=lambda name: (points[name][0] if smaller else -points[name][0], points[name][1]))
    best: list[str] = []
    for name in order:
        if not best or points[name][1] < points[best[-1]][1]:
            best.append(name)
    return best if smaller else best[::-1]


def _evaluated(report: SparsityReport) -> dict[Protocol, Mapping[str, Any]]:
    """What was measured on each text; the latest counts."""
    return {
        (text["dataset"], text["seqlen"], text["num_windows"]): text
        for evaluation in report.evaluations
        for text in evaluation["texts"]
    }


def _candidate(name: str, report: SparsityReport, text: Mapping[str, Any] | None) -> Candidate:
    config = report.config
    pattern = config.get("pattern") or f"{config.get('sparsity') or 0:.0%}"
    refined = f" + {config['refine']}" if config.get("refine") else ""
    allocation = f", {config['allocation']}" if config.get("allocation") else ""
    recovered = ", recovered" if report.recovery else ""
    batches = report.bench["batches"] if report.bench else []
    single = next((batch for batch in batches if batch["batch_size"] == 1), None)
    return Candidate(
        name=name,
        how=f"{config.get('method')}{refined} {pattern}{allocation}{recovered}",
        zeros=report.sparsity,
        size=report.sizes.get("saved"),
        perplexity=text["perplexity"] if text else None,
        ratio=text["ratio"] if text else None,
        kl=text["kl"] if text else None,
        decode=single["sparse"]["decode"] if single else None,
    )


def _cells(candidate: Candidate) -> Sequence[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return (
        candidate.name,
        candidate.how,
        f"{candidate.zeros:.2%}",
        "" if candidate.size is None else megabytes(candidate.size),
        shown(candidate.perplexity, "{:.4g}"),
        shown(candidate.ratio, "{:.3f}"),
        shown(candidate.kl, "{:.4f}"),
        shown(candidate.decode, "{:,.1f} tokens/s"),
    )
