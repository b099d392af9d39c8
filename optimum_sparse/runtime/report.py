"""`RuntimeReport`: what `sparsify_for_inference` made of each layer, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..metadata import expand_name
from ..tables import text_table

WAYS = ("torch", "dense", "sparse", "int8", "2:4")


@dataclass(frozen=True)
class LayerChoice:
    """Layers that differ in their place only: of one shape, type and, within 5 %, one sparsity.

    Attributes:
        names: Their names, those that differ in an index joined.
        count: How many they are.
        shape: `(out_features, in_features)`.
        dtype: Of the weights.
        sparsity: The part of their weights that is zero.
        choice: `"torch"` (left as it was), `"dense"` (`DenseLinear`), `"sparse"` (`SparseLinear`), `"int8"` (a
            quantised `SparseLinear`) or `"2:4"` (`SemiStructuredLinear`).
        reason: Why, if nothing was measured; why `"int8"` was not, in a quantised model; on GPUs why a form was not.
        microseconds: Of each way that was measured, for one layer and the batch size asked for.
        dense_bytes: What their weights took.
        bytes: What they take now.
    """

    names: list[str]
    count: int
    shape: tuple[int, int]
    dtype: str
    sparsity: float
    choice: str
    reason: str | None
    microseconds: dict[str, float]
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class RuntimeReport:
    """What `sparsify_for_inference` did; `print` shows a table.

    Attributes:
        batch_size: For how many tokens at once the layers were chosen.
        kernel: The instructions that the kernels use, `"triton"` on a GPU, or `"torch"` if there are none.
        missing: Why there are no kernels, if so.
        threads: How many of them the kernels for the CPU use.
        layers: What became of the `nn.Linear` layers.
        untouched: Other layers with weights, and linear ones that must stay as they are, each with the reason.
    """

    batch_size: int
    kernel: str
    missing: str | None
    threads: int
    layers: list[LayerChoice]
    untouched: dict[str, str]

    @property
    def dense_bytes(self) -> int:
        """What the weights of all `layers` took."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """What they take now."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ways = [way for way in WAYS if any(way in layer.microseconds for layer in self.layers)]
        headings = ("layers", "count", "shape", "zeros", "now", *(f"µs {way}" for way in ways), "bytes")
        rows = [_row(name, layer, ways) for layer in self.layers for name in layer.names]
        lines = [text_table(headings, rows)]
        lines += ["", f"kernels: {self.kernel}, {self.threads} threads, batch size {self.batch_size}"]
        if self.missing:
            lines.append(f"no compiled kernels: {self.missing}")
        if self.dense_bytes:
            part = self.bytes / self.dense_bytes
            lines.append(f"weights of these layers: {self.bytes:,} of {self.dense_bytes:,} bytes ({part:.0%})")
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                reasons.setdefault(layer.reason, []).extend(layer.names)
        lines += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        lines += [f"{name}: {reason}" for name, reason in self.untouched.items()]
        return "\n".join(lines)


def _row(name: str, layer: LayerChoice, ways: Sequence[str]) -> tuple[str, ...]:
    times = [f"{layer.microseconds[way]:,.0f}" if way in layer.microseconds else "-" for way in ways]
    rows, columns = layer.shape
    part, count = layer.bytes / layer.dense_bytes, len(expand_name(name))
    return (name, str(count), f"{rows}x{columns}", f"{layer.sparsity:.1%}", layer.choice, *times, f"{part:.0%}")
