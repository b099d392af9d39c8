"""`SparsityReport`: one record of a pruning run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..quantization import Grid


@dataclass(frozen=True)
class MatrixReport:
    """What happened to one matrix.

    Attributes:
        name: Module name.
        block: Name of the block it belongs to.
        shape: `(out_features, in_features)`.
        pattern: `"N:M"`, or the sparsity asked for if unstructured.
        zeros: Zeros in the weight as written.
        numel: Number of weights.
        error: Squared norm of the change in its outputs relative to the outputs, on the calibration tokens
            (for methods without a Gram matrix, as if input features were uncorrelated); `None` without calibration.
        num_tokens: Calibration tokens that it saw: for an expert, those routed to it.
        layer_share: The share that the tokens of its whole layer have in the statistics of an expert: 0 if enough were
            routed to it, 1 if none was.
        damping: Fraction of the mean diagonal added to the Hessian, or `None`.
        residual: How far an iterative method was from convergence when it stopped, or `None`.
        seconds: Time of its statistics and its share of the solve.
        notes: Whatever did not go the ordinary way.
    """

    name: str
    block: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    numel: int
    error: float | None
    num_tokens: int
    layer_share: float
    damping: float | None
    residual: float | None
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.numel


@dataclass
class SparsityReport:
    """What happened to a model.

    Attributes:
        config: The `SparseConfig` as a dict.
        calibration: Where the calibration tokens came from; empty for a method that needs none.
        matrices: One entry per pruned matrix, in the order of pruning.
        skipped: Weights that stayed dense, and why.
        seconds: Time by phase.
        peak_memory: Largest memory held, in bytes: of the process on a CPU, of torch's allocator on a GPU.
        notes: Whatever did not go the ordinary way.
        grids: What each matrix was rounded to, if it was; not a part of the JSON.
    """

    config: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    matrices: list[MatrixReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    notes: list[str] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned matrices."""
        numel = sum(matrix.numel for matrix in self.matrices)
        return sum(matrix.zeros for matrix in self.matrices) / numel if numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as pure JSON."""
        record = dataclasses.asdict(dataclasses.replace(self, grids={}))
        del record["grids"]
        return json.loads(json.dumps({**record, "sparsity": self.sparsity}))

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def table(self) -> str:
        """A table with one line per block, the totals, and what was not ordinary."""
        blocks: dict[str, list[MatrixReport]] = {}
        for matrix in self.matrices:
            blocks.setdefault(matrix.block, []).append(matrix)
        rows = [(name, *_summary(members)) for name, members in blocks.items()]
        rows.append(("total", *_summary(self.matrices)))
        header = ("block", "matrices", "zeros", "error", "worst", "seconds")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
        lines = ["  ".join([row[0].strip().ljust(widths[0]), *row[1:]]) for row in cells]
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if self.seconds:
            lines.append("time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items()))
        if self.peak_memory:
            lines.append(f"peak memory: {self.peak_memory / 2**30:.2f} GiB")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left dense: {', '.join(names[:3])}{more} ({reason})")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"note: {matrix.name}: {note}" for matrix in self.matrices for note in matrix.notes]
        return "\n".join(lines)


def _summary(members: list[MatrixReport]) -> tuple[str, str, str, str, str]:
    errors = [matrix.error for matrix in members if matrix.error is not None]
    return (
        str(len(members)),
        f"{100 * sum(m.zeros for m in members) / max(sum(m.numel for m in members), 1):.2f} %",
        f"{100 * sum(errors) / len(errors):.2f} %" if errors else "",
        f"{100 * max(errors):.2f} %" if errors else "",
        f"{sum(m.seconds for m in members):.1f}",
    )
