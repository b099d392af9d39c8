"""`SparsityReport`: one record of what was done to a model, and of what was measured of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..tables import text_table
from .pictures import Picture

# Version of the JSON form. It rises when a reader of the older form would misread the new one.
SCHEMA = 1
Record = TypeVar("Record")


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
            routed to it, 1 if none was, or all experts are pruned on all tokens.
        damping: Fraction of the mean diagonal added to the Hessian, or `None`.
        residual: How far an iterative method was from convergence when it stopped, or `None`.
        seconds: Time of its statistics and its share of the solve.
        notes: Whatever did not go the ordinary way.
        correction: How much of the errors in its inputs it makes up for.
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
    correction: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.numel


@dataclass
class SparsityReport:
    """What happened to a model, and what was measured of it; `prune`, `evaluate`, `recover` and `bench` fill it.

    Attributes:
        config: The `SparseConfig` as a dict.
        calibration: Where the calibration tokens came from; empty for a method that needs none.
        matrices: One entry per pruned matrix, in the order of pruning.
        skipped: Weights that stayed dense, and why.
        seconds: Time by phase.
        peak_memory: Largest memory held, in bytes: of the process on a CPU, of torch's allocator on a GPU.
        notes: Whatever did not go the ordinary way.
        model: Name of the model before pruning.
        memory: What the run was to hold when it is fullest, in bytes, by what it is, as planned before it started.
        depth_error: For each block in order, how far the hidden states behind it are from those of the dense model:
            squared norm of the difference relative to that of the dense ones, mean over the first tokens of one
            calibration batch. Empty without calibration, and for an offloaded model.
        reconstruction: For each block that was trained after pruning, the error of its outputs on held-out calibration
            windows `"before"` and `"after"`, and after how many `"epochs"`.
        correction: For each block, with error correction, the error of its outputs on held-out calibration windows
            relative to those of the dense model, `"before"` without and `"after"` with what was taken of the
            `"correction"`, which is 0 if without it was better.
        sizes: Bytes of the weights: `"dense"`, all of them in memory, and `"saved"`, in the files written last.
        pictures: Pieces of a few matrices to look at.
        evaluations: What `evaluate` measured, the latest last.
        recovery: What `recover` wrote: how the model was trained after pruning.
        bench: What `bench` measured: memory and speed, dense and sparse.
        generations: `"prompt"` and what `"dense"` and `"pruned"` made of it.
        command: The command, or the code, that does the same again.
        versions: Of the software that pruned it.
    """

    config: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    matrices: list[MatrixReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    notes: list[str] = field(default_factory=list)
    model: str | None = None
    memory: dict[str, int] = field(default_factory=dict)
    depth_error: dict[str, float] = field(default_factory=dict)
    reconstruction: dict[str, dict[str, float]] = field(default_factory=dict)
    correction: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    recovery: dict[str, Any] | None = None
    bench: dict[str, Any] | None = None
    generations: list[dict[str, str]] = field(default_factory=list)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned matrices."""
        numel = sum(matrix.numel for matrix in self.matrices)
        return sum(matrix.zeros for matrix in self.matrices) / numel if numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as pure JSON; `docs/report.schema.json` describes it."""
        return json.loads(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self), "sparsity": self.sparsity}))

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SparsityReport:
        """The report that `to_dict` gave.

        Raises:
            ValueError: It is no report, or one of a newer version.
        """
        schema = content.get("schema") if isinstance(content, Mapping) else None
        if not isinstance(schema, int):
            raise ValueError(
                'This is no report of optimum_sparse: it has no number "schema". Reports are what '
                "SparsityReport.to_json writes; prune again to make one."
            )
        if schema > SCHEMA:
            raise ValueError(
                f"The report is of version {schema}, and this optimum_sparse reads up to {SCHEMA}: upgrade it."
            )
        values = {name: value for name, value in content.items() if name not in ("schema", "sparsity")}
        try:
            values["matrices"] = [
                _made(MatrixReport, {**entry, "shape": tuple(entry["shape"]), "notes": tuple(entry["notes"])})
                for entry in values.get("matrices", [])
            ]
            values["pictures"] = [_made(Picture, picture) for picture in values.get("pictures", [])]
            return _made(cls, values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"The report is damaged, or was written by something else: {error}.") from error

    @classmethod
    def from_json(cls, path: str | Path) -> SparsityReport:
        """The report in a file that `to_json` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no report, or one of a newer version.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one HTML page that needs no other file, also written to `path` if one is given."""
        from .html import report_page

        text = report_page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def table(self) -> str:
        """A table with one line per block, the totals, and what was not ordinary."""
        blocks: dict[str, list[MatrixReport]] = {}
        for matrix in self.matrices:
            blocks.setdefault(matrix.block, []).append(matrix)
        rows = [(name, *_summary(members)) for name, members in blocks.items()]
        header = ("block", "matrices", "zeros", "error", "worst", "seconds")
        lines = [text_table(header, rows, total=("total", *_summary(self.matrices)))]
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


def _made(kind: Callable[..., Record], values: Mapping[str, Any]) -> Record:
    """A dataclass of values from a file.

    Raises:
        TypeError: A value is missing, is not known, or is of another type.
    """
    types = _types(kind)
    for name, value in values.items():
        if name in types and not isinstance(value, types[name]):
            raise TypeError(f"{name} is {value!r}")
    return kind(**values)


@cache
def _types(kind: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """What the value of each field may be an instance of."""
    types: dict[str, tuple[type, ...]] = {}
    for name, hint in get_type_hints(kind).items():
        hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        members = tuple(get_origin(member) or member for member in hints)
        types[name] = (*members, int) if float in members else members
    return types


def _summary(members: list[MatrixReport]) -> tuple[str, str, str, str, str]:
    errors = [matrix.error for matrix in members if matrix.error is not None]
    return (
        str(len(members)),
        f"{100 * sum(m.zeros for m in members) / max(sum(m.numel for m in members), 1):.2f} %",
        f"{100 * sum(errors) / len(errors):.2f} %" if errors else "",
        f"{100 * max(errors):.2f} %" if errors else "",
        f"{sum(m.seconds for m in members):.1f}",
    )
