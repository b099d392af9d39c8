"""How much of each matrix to prune, so that all of them together have the zeros that were asked for."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from .config import SparseConfig
from .matrices import PrunableMatrix
from .methods import METHODS
from .order import in_order
from .patterns import NM, Unstructured, num_pruned
from .statistics import Statistics

# OWL: how many times the mean of its block an outlier is (M in the paper).
OUTLIER = 5
# OWL and DLP: what blocks keep of their weights differs by twice as much (lambda and alpha in the papers).
SPREAD = {"owl": 0.08, "dlp": 0.15}
# "error" and "loss": by how much the sparsity of a matrix may differ from that of all. What a layer loses says little
# of what becomes of it in those behind, and curvature is that of the dense model: the least sum is not the best model.
REACH = 0.15
# Of matrices with more weights than this, every so many rows are looked at.
SAMPLE = 2**17


def allocate(
    matrices: Sequence[PrunableMatrix],
    statistics: Sequence[Statistics | None],
    config: SparseConfig,
    rises: Sequence[float] | None = None,
) -> list[int]:
    """How many zeros each matrix is to have, so that together they have `config.sparsity` of their weights.

    - `"owl"`: blocks in which more of all |W_ij| * ||X_j|| are outliers keep more weights (Yin et al., ICML 2024).
    - `"dlp"`: blocks in which they are smaller on average keep more weights (Chen et al., ICML 2025).
    - `"error"`: the share of its outputs that a matrix loses, were inputs uncorrelated and no weight to make up for
      another, is least as a mean over all weights. If the pattern is N:M, the sum over all matrices is least, by
      leaving some of them dense.
    - `"loss"`: the same, but counted by what the loss of the model is expected to rise by with each matrix.

    No matrix keeps less than half of what it would if all kept alike. Matrices of a block whose names differ only in
    numbers, as those of experts do, are taken for one.

    Args:
        matrices: Those among which zeros are shared out, with the weights of the dense model.
        statistics: Of the inputs of each in the dense model; `None` for one that did not run. If nothing ran of what
            is taken for one, it is left out.
        config: How to allocate.
        rises: For `"loss"`, what the loss is expected to rise by if a matrix alone is pruned as all are to be.

    Returns:
        Zeros of each matrix. Their sum is what was asked for, to the element. A method that lets the weights of each
        output compete rounds those of a matrix to whole columns; if the pattern is N:M, the sum is as near as whole
        matrices allow.
    """
    counts = [num_pruned(matrix.numel, matrix.pattern.sparsity) for matrix in matrices]
    units = _units(matrices, statistics, by_block=config.allocation in SPREAD)
    if rises is not None:
        for unit in units:
            unit.rise = sum(rises[index] for index in unit.inputs)
    if not units:
        return counts
    assert config.sparsity is not None
    budget = num_pruned(sum(unit.numel for unit in units), config.sparsity)
    if isinstance(pattern := matrices[0].pattern, NM):
        losses = [unit.losses(partial(pattern_loss, pattern=pattern), 1) for unit in units]
        pruned = least_loss(losses, [sum(counts[index] for index in unit.members) for unit in units], budget)
        for unit, is_pruned in zip(units, pruned, strict=True):
            for index in unit.members:
                counts[index] *= is_pruned
        return counts
    columns = (_by_block if config.allocation in SPREAD else _by_loss)(units, budget, config)
    for unit, number in zip(units, columns, strict=True):
        for index, matrix in unit.members.items():
            counts[index] = number * matrix.shape[0]
    return _exact(counts, units, budget)


def allocated(matrix: PrunableMatrix, zeros: int) -> PrunableMatrix:
    """A matrix that is to have so many zeros: in its N:M pattern, if it has one and does not stay dense."""
    if zeros and isinstance(matrix.pattern, NM):
        return matrix
    return replace(matrix, pattern=Unstructured(zeros / matrix.numel))


def describe(matrices: Sequence[PrunableMatrix], counts: Sequence[int], config: SparseConfig) -> str:
    """What an allocation has come to, in a sentence."""
    total = sum(counts) / sum(matrix.numel for matrix in matrices)
    what = f"allocation {config.allocation!r}: {total:.2%} zeros in {len(matrices)} matrices"
    if config.pattern is not None:
        return f"{what}, of which {list(counts).count(0)} stay dense ({config.sparsity:.2%} were asked for)"
    shares = [count / matrix.numel for matrix, count in zip(matrices, counts, strict=True)]
    return f"{what}, {min(shares):.1%} to {max(shares):.1%} in each"


def least_loss(losses: Sequence[torch.Tensor], sizes: Sequence[int], budget: int) -> list[int]:
    """How many steps to take in each of several sequences, so that the sum of the losses is least.

    Taken are the steps that lose least for their size, as many of them as come nearest to the budget. No others that
    are at least as large together lose less.

    Args:
        losses: For each sequence what each of its steps loses, in rising order, `[steps]`.
        sizes: For each sequence the size of a step.
        budget: What the sizes of all steps that are taken are to add up to.
    """
    which = torch.repeat_interleave(torch.arange(len(losses)), torch.tensor([len(steps) for steps in losses]))
    size = torch.tensor(sizes)[which]
    order = (torch.cat(list(losses)) / size).argsort(stable=True)
    reached = torch.cat([torch.zeros(1, dtype=torch.int64), size[order].cumsum(0)])
    taken = order[: int((reached - budget).abs().argmin())]
    return which[taken].bincount(minlength=len(losses)).tolist()


def shifted(values: Sequence[float], sizes: Sequence[int], total: float, ceiling: float) -> list[float]:
    """Numbers that differ as the values do, except those that are 0 or at the ceiling.

    Args:
        values: What the numbers are, but for a number that is added to all.
        sizes: How much each of them counts.
        total: What the numbers times their sizes are to add up to.
        ceiling: The largest number.
    """

    def clipped(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), ceiling) for value in values]

    low, high = -max(values), ceiling - min(values)
    for _ in range(64):
        middle = (low + high) / 2
        reached = sum(size * number for size, number in zip(sizes, clipped(middle), strict=True))
        low, high = (middle, high) if reached < total else (low, middle)
    return clipped(high)


def column_losses(scores: torch.Tensor, group: str) -> torch.Tensor:
    """What outputs lose with each further column of weights, the least first, `[columns]` float64.

    Args:
        scores: `[rows, columns]` what they lose with each weight.
        group: As for `keep_mask`: a column is one weight of each `"output"`, or as many weights of the `"layer"`.
    """
    if group == "output":
        return in_order(scores).sum(dim=0, dtype=torch.float64).cpu()
    ordered = in_order(scores.reshape(1, -1))
    return ordered.view(scores.shape[1], -1).sum(dim=1, dtype=torch.float64).cpu()


def pattern_loss(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """What outputs lose with the weights that an N:M pattern drops, `[1]` float64.

    Args:
        scores: `[rows, columns]` what they lose with each weight.
        pattern: The pattern.
    """
    ordered = in_order(scores.reshape(-1, pattern.m))
    return ordered[:, : pattern.m - pattern.n].sum(dtype=torch.float64).cpu()[None]


@dataclass
class _Unit:
    """Matrices that get the same sparsity, by their number among all, and the statistics of those that ran.

    `rise` is what the loss of the model is expected to rise by when they are pruned as all are, if that is known.
    """

    block: str
    width: int
    members: dict[int, PrunableMatrix] = field(default_factory=dict)
    inputs: dict[int, Statistics] = field(default_factory=dict)
    rise: float | None = None

    @property
    def height(self) -> int:
        """Outputs of all of them."""
        return sum(matrix.shape[0] for matrix in self.members.values())

    @property
    def numel(self) -> int:
        """Weights of all of them."""
        return self.height * self.width

    def scores(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Number of each matrix that ran, and (W_ij ||X_j||)^2 in a sample of its rows."""
        for index, inputs in self.inputs.items():
            matrix = self.members[index]
            step = max(1, len(self.members) * matrix.numel // SAMPLE)
            weight = matrix.read()[::step].to(inputs.squared_norms.device, torch.float32)
            # It is for the solver to say what is wrong with numbers that are not finite.
            yield index, weight.square().mul_(inputs.squared_norms).nan_to_num_(nan=0, posinf=0)

    def relative(self, losses: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What outputs lose, as a share of them.

        Args:
            losses: The same, given what the outputs of a matrix lose with each weight.
        """
        lost, energy = torch.zeros(1, dtype=torch.float64), 0.0
        for _, scores in self.scores():
            lost = lost + losses(scores)
            energy += scores.sum(dtype=torch.float64).item()
        return lost / (energy or 1)

    def losses(self, losses: Callable[[torch.Tensor], torch.Tensor], asked: int) -> torch.Tensor:
        """What is lost with each further step of zeros: of the loss of the model, if its rise is known, or of outputs.

        Args:
            losses: As for `relative`.
            asked: How many steps there would be, did all matrices get the same share of zeros.
        """
        lost = self.relative(losses)
        return lost if self.rise is None else lost * (self.rise / (lost[:asked].sum().item() or 1))

    def total(self, function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Sum over all weights of a function of |W_ij| ||X_j||, per token."""
        return sum(
            self.members[index].numel
            * function((scores / self.inputs[index].num_tokens).sqrt()).double().mean().item()
            for index, scores in self.scores()
        )


def _units(matrices: Sequence[PrunableMatrix], statistics: Sequence[Statistics | None], by_block: bool) -> list[_Unit]:
    """Of each block the matrices of a kind; or of a width, so that those that share their inputs are solved as one."""
    units: dict[tuple[object, ...], _Unit] = {}
    for index, (matrix, inputs) in enumerate(zip(matrices, statistics, strict=True)):
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", matrix.name.removeprefix(f"{matrix.block}."))
        key = matrix.shape[1:] if by_block else (kind, matrix.shape)
        unit = units.setdefault((matrix.block, *key), _Unit(matrix.block, matrix.shape[1]))
        unit.members[index] = matrix
        if inputs is not None and inputs.num_tokens:
            unit.inputs[index] = inputs
    return [unit for unit in units.values() if unit.inputs]


def _ceiling(sparsity: float, reach: float = 1.0) -> float:
    """The largest sparsity of a matrix: it keeps half of what it would if all kept alike, or more."""
    return min(sparsity + reach, (1 + sparsity) / 2)


def _by_loss(units: Sequence[_Unit], budget: int, config: SparseConfig) -> list[int]:
    """Columns to prune in each unit, so that the sum of the losses is least.

    Shares of outputs count by the weights of a unit: were each matrix to count alike, large ones would lose most of
    theirs, and that is worse than uniform, as measured.
    """
    assert config.sparsity is not None
    group = config.comparison_group or METHODS[config.method].group
    losses = []
    for unit in units:
        loss = unit.losses(partial(column_losses, group=group), round(config.sparsity * unit.width))
        losses.append(loss * unit.numel if unit.rise is None else loss)
    floor, ceiling = config.sparsity - REACH, _ceiling(config.sparsity, REACH)
    least = [max(0, math.ceil(floor * unit.width)) for unit in units]
    most = [math.floor(ceiling * unit.width) for unit in units]
    heights = [unit.height for unit in units]
    given = sum(height * number for height, number in zip(heights, least, strict=True))
    free = [loss[start:stop] for loss, start, stop in zip(losses, least, most, strict=True)]
    more = least_loss(free, heights, budget - given)
    return [start + steps for start, steps in zip(least, more, strict=True)]


def _by_block(units: Sequence[_Unit], budget: int, config: SparseConfig) -> list[int]:
    """Columns to prune in each unit, by what the weights of its block are like."""
    assert config.sparsity is not None and config.allocation is not None
    blocks: dict[str, list[_Unit]] = defaultdict(list)
    for unit in units:
        blocks[unit.block].append(unit)
    sizes = [sum(unit.numel for unit in members) for members in blocks.values()]
    traits = [_trait(members, config.allocation) for members in blocks.values()]
    range_ = (max(traits) - min(traits)) or 1
    kept = [2 * SPREAD[config.allocation] * (trait - min(traits)) / range_ for trait in traits]
    sparsities = shifted([-share for share in kept], sizes, budget, _ceiling(config.sparsity))
    of_block = dict(zip(blocks, sparsities, strict=True))
    columns, carried = [], 0.0
    for unit in units:
        wanted = of_block[unit.block] * unit.numel + carried
        columns.append(min(max(round(wanted / unit.height), 0), unit.width))
        carried = wanted - columns[-1] * unit.height
    return columns


def _trait(members: Sequence[_Unit], allocation: str) -> float:
    """A number for a block that is the higher, the more of its weights are to be kept."""
    numel = sum(unit.members[index].numel for unit in members for index in unit.inputs)
    mean = sum(unit.total(lambda scores: scores) for unit in members) / numel
    if allocation == "dlp":
        return -mean
    return sum(unit.total(lambda scores: scores > OUTLIER * mean) for unit in members) / numel


def _exact(counts: Sequence[int], units: Sequence[_Unit], budget: int) -> list[int]:
    """Zeros that add up to the budget: the matrices with most outputs get what is left over, a column each at most."""
    exact, members = list(counts), {index: matrix for unit in units for index, matrix in unit.members.items()}
    left = budget - sum(exact[index] for index in members)
    while left:
        for index in sorted(members, key=lambda index: -members[index].shape[0]):
            rows, numel = members[index].shape[0], members[index].numel
            more = max(-rows, -exact[index], min(rows, numel - exact[index], left))
            exact[index] += more
            left -= more
    return exact
