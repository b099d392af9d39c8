"""Sparsity patterns and the exact selection of which weights to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import resolve_sparsity, split_pattern
from .order import kth_smallest


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; `sparsity` is their fraction of the weights that compete with each other."""

    sparsity: float

    def __str__(self) -> str:
        return f"{self.sparsity:.4g}"


@dataclass(frozen=True)
class NM:
    """`n` non-zero weights in every `m` consecutive inputs of an output (NVIDIA's meaning of N:M).

    The reference code of SparseGPT and Wanda counts the pruned ones instead: the same at 2:4, the opposite at 1:4.
    """

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


@dataclass(frozen=True)
class SharedRows(Sequence[int]):
    """Row counts of stacked matrices, of whose rows the caller has one slice, and other processes have the rest.

    Attributes:
        sizes: The row counts of the whole matrices.
        own: The caller's slice of all rows.
        gather: Makes `[rows, columns]` of what each process has for its own rows; all of them call it together.
    """

    sizes: tuple[int, ...]
    own: slice
    gather: Callable[[torch.Tensor], torch.Tensor]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        return self.sizes[index]


# So many scores are looked at together if they come in rows, for what that takes in memory besides them.
CHUNK = 2**22


def parse_pattern(sparsity: float | None, pattern: str | None) -> Pattern:
    """Turn the two options of a configuration into a pattern.

    Raises:
        ValueError: As `optimum_sparse.config.resolve_sparsity`.
    """
    resolved = resolve_sparsity(sparsity, pattern)
    return Unstructured(resolved) if pattern is None else NM(*split_pattern(pattern))


def num_pruned(numel: int, sparsity: float) -> int:
    """Number of zeros asked for among `numel` weights: `sparsity * numel`, rounded to the nearest, halves up."""
    # The product may fall short of a half by an ulp, as in 0.35 * 10 == 3.4999999999999996.
    return int(round(sparsity * numel, 6) + 0.5)


def keep_mask(
    scores: torch.Tensor, pattern: Pattern, group: str = "layer", rows: Sequence[int] | None = None
) -> torch.Tensor:
    """Choose the weights to keep: those with the highest scores in their group, an exact number of them.

    Ties are broken by index: of equal scores, the first ones are pruned.

    Args:
        scores: `[rows, in_features]` importance of each weight.
        pattern: What to keep. For N:M each group is M consecutive inputs of one output.
        group: `"layer"` lets all weights of a matrix compete, `"output"` those of each row. Unused by N:M.
        rows: Row counts of the matrices that are stacked in `scores`; each is a layer of its own.

    Returns:
        Boolean `[rows, in_features]`, true where the weight is kept.
    """
    if isinstance(pattern, NM):
        grouped = scores.reshape(-1, pattern.m)
        return keep_all_but(grouped, pattern.m - pattern.n).reshape(scores.shape)
    if group == "output":
        return keep_all_but(scores, num_pruned(scores.shape[1], pattern.sparsity))

    def keep(layer: torch.Tensor) -> torch.Tensor:
        count = num_pruned(layer.numel(), pattern.sparsity)
        return keep_all_but(layer.reshape(1, -1), count).reshape(layer.shape)

    return by_matrix(scores, rows, keep)


def by_matrix(
    scores: torch.Tensor, rows: Sequence[int] | None, choose: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Choose among all weights of each matrix.

    Args:
        scores: `[rows, columns]` of stacked matrices; of `SharedRows` the caller's own.
        rows: Row counts of the matrices, `None` if there is one.
        choose: From the scores of a matrix to as many rows, of a mask or of thresholds.

    Returns:
        What was chosen, stacked as `scores`.
    """
    whole = rows.gather(scores) if isinstance(rows, SharedRows) else scores
    parts = [choose(matrix) for matrix in whole.split(list(rows or whole.shape[:1]))]
    chosen = parts[0] if len(parts) == 1 else torch.cat(parts)
    return chosen[rows.own] if isinstance(rows, SharedRows) else chosen


def keep_all_but(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask that drops the `count` lowest scores of each row, of equal ones those with the lowest index.

    Args:
        scores: `[rows, columns]`.
        count: How many to drop, 0 <= count <= columns.

    Returns:
        Boolean `[rows, columns]`, true where the score is kept.
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    height = max(1, CHUNK // scores.shape[1])
    if len(scores) > height:
        return torch.cat([keep_all_but(part, count) for part in scores.split(height)])
    threshold = kth_smallest(scores, count)
    below, tied = scores < threshold, scores == threshold
    room = count - below.sum(dim=1, keepdim=True, dtype=torch.int32)  # comparing other types makes a copy
    return ~(below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room)))
