"""The plan of a run: what will be in memory at once, and how to run so that it fits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import sensitivity
from .config import SparseConfig
from .matrices import PrunableMatrix
from .methods import METHODS, statistics_for, workspace
from .precision import sum_dtype
from .spill import Activations
from .uses import Arguments, Use, Watched, WeightUses, at_entries

# What a forward, an allocator and a file system take besides what is counted.
MARGIN = 1.1

WHERE = {None: "where they are computed", "cpu": "on the CPU", "disk": "in files"}


@dataclass(frozen=True)
class Footprint:
    """What activations take in memory, in bytes per token of a batch.

    Attributes:
        waiting: What a batch holds while it waits at a matrix product, at most.
        entering: What it holds while it waits at the entry of a block, at most.
        running: What it holds on the way, at most.
        shares: For each parameter, the part of the tokens that a matrix in it receives: less than 1 for experts.
        logits: How many logits the model puts out for a token.
    """

    waiting: float
    entering: float
    running: float
    shares: Mapping[str, float] = field(default_factory=dict)
    logits: float = 0.0

    def of_all(self, most: Callable[[int], int]) -> Footprint:
        """The largest of those of several processes; `most` gives the largest of a number."""
        return replace(
            self,
            waiting=most(math.ceil(self.waiting)),
            entering=most(math.ceil(self.entering)),
            running=most(math.ceil(self.running)),
            logits=most(math.ceil(self.logits)),
        )


@dataclass(frozen=True)
class GroupShape:
    """Matrices that share their inputs, as numbers.

    Attributes:
        block: The block that they are in.
        in_features: Width of the inputs.
        rows: How many outputs they have together.
        matrices: How many they are.
        share: How many of the tokens they receive.
    """

    block: str
    in_features: int
    rows: int
    matrices: int = 1
    share: float = 1.0

    @classmethod
    def of(cls, matrices: Sequence[PrunableMatrix], footprint: Footprint) -> GroupShape:
        """The numbers of matrices that share their inputs."""
        first = matrices[0]
        rows = sum(matrix.shape[0] for matrix in matrices)
        return cls(first.block, first.shape[1], rows, len(matrices), footprint.shares.get(first.view.parameter, 1.0))


@dataclass(frozen=True)
class Workload:
    """What is to be done, as numbers; memory in bytes.

    Attributes:
        groups: What is pruned.
        tokens: Calibration tokens.
        batch_rows: Windows in the largest batch.
        row_tokens: Tokens in a window.
        footprint: What activations take.
        held: What is held before, on the device that computes: there a model that is not offloaded, everything in the
            process on a CPU.
        units: What offloaded blocks and modules take that are there at once.
        cpu: What is free on the CPU, if another device computes, else `None`.
        disk: What is free on disk.
        in_parts: Whether batches can be split, which those of other things than tokens cannot.
    """

    groups: Sequence[GroupShape]
    tokens: int
    batch_rows: int
    row_tokens: int
    footprint: Footprint
    held: int
    units: int
    cpu: int | None
    disk: int
    in_parts: bool = True


@dataclass(frozen=True)
class Plan:
    """How to run, and what that takes.

    Attributes:
        true_sequential: As in `SparseConfig`.
        activation_device: Where activations wait: `"cpu"`, `"disk"`, or `None` for the device that computes.
        batch_rows: Windows per forward, at most.
        memory: What is in memory when it is fullest, in bytes, by what it is; on the device that computes.
        budget: How much that may be.
        elsewhere: What activations take on the CPU or on disk.
    """

    true_sequential: bool
    activation_device: str | None
    batch_rows: int
    memory: Mapping[str, int]
    budget: int
    elsewhere: int = 0

    @property
    def peak(self) -> int:
        """Bytes in memory when it is fullest."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        lines = [f"{what:<32}{size / 2**30:8.2f} GiB" for what, size in self.memory.items() if size]
        lines.append(f"{'together, of ' + gib(self.budget):<32}{self.peak / 2**30:8.2f} GiB")
        order = "every layer sees pruned inputs" if self.true_sequential else "all layers of a block see dense inputs"
        where = WHERE[self.activation_device] + (f" ({gib(self.elsewhere)})" if self.elsewhere else "")
        lines.append(f"{order}; windows per forward: {self.batch_rows}; activations wait {where}")
        return "\n".join(lines)


def make_plan(work: Workload, config: SparseConfig, budget: int, activation_device: str | None = None) -> Plan:
    """Choose how to run within a budget.

    Of what fits, the first is taken: activations where they are computed, on the CPU, on disk; smaller batches; and,
    as the only one that changes more than the rounding of the result, `true_sequential=False`. What the user has
    chosen is left alone.

    Args:
        work: What is to be done.
        config: How. A `true_sequential` or `batch_size` of `None` is to be chosen.
        budget: Bytes that may be held on the device that computes, with what is held already.
        activation_device: Where activations wait, if the user has chosen that.

    Raises:
        ValueError: Nothing fits; the message has the numbers, and what to do. Or gradients are to be taken of a model
            that is offloaded.
    """
    if config.allocation == "loss" and work.units:
        raise ValueError(
            "allocation='loss' takes gradients of the whole model, and this one is, or would be, offloaded: load it "
            "into memory, allow more of it, or choose allocation='error', which takes none."
        )
    candidates = list(_candidates(work, config, budget, activation_device))
    for plan in candidates:
        if plan.peak <= budget:
            return plan
    least = min(candidates, key=lambda plan: plan.peak)
    advice = ["shorter windows (seqlen)"]
    if config.batch_size is not None and config.batch_size > 1:
        advice.append("a smaller batch_size")
    if activation_device is None and least.activation_device is None:
        advice.append("fewer windows (num_samples)")
    if config.method not in ("wanda", "magnitude"):
        own = METHODS[config.method].memory
        advice += [f"method='{lighter}'" for lighter in ("sparsegpt", "wanda") if METHODS[lighter].memory < own]
    if config.allocation == "loss":
        advice.append("allocation='error'")
    if not work.units:
        advice.append("weights that are offloaded (device_map={'': 'disk'}; on the command line, --max-memory)")
    parts = ", ".join(f"{what} {gib(size)}" for what, size in least.memory.items() if size)
    raise ValueError(
        f"This run takes at least {gib(least.peak)} of memory, and it may take {gib(budget)} "
        f"({math.ceil((least.peak - budget) / 2**20)} MiB less): {parts}. Allow it "
        f"{gib(least.peak + 2**26)}, or try {', '.join(advice)}."
    )


def _candidates(work: Workload, config: SparseConfig, budget: int, activation_device: str | None) -> Iterator[Plan]:
    orders = [True, False] if config.true_sequential is None else [config.true_sequential]
    rows = [work.batch_rows]
    while work.in_parts and config.batch_size is None and rows[-1] > 1:
        rows.append(-(-rows[-1] // 2))
    places = [activation_device] if activation_device else [None, *(["cpu"] if work.cpu is not None else []), "disk"]
    for true_sequential in orders:
        for batch_rows in rows:
            for place in places:
                plan = _plan(work, config, budget, true_sequential, batch_rows, place)
                room = {None: plan.elsewhere, "cpu": work.cpu, "disk": work.disk}[place]
                if activation_device or room is None or plan.elsewhere <= room:
                    yield plan


def _plan(
    work: Workload, config: SparseConfig, budget: int, true_sequential: bool, batch_rows: int, place: str | None
) -> Plan:
    footprint = work.footprint
    each = footprint.waiting if true_sequential else footprint.entering
    streams = 2 if config.error_correction else 1
    waiting = int(MARGIN * each * work.tokens * streams)
    statistics, solving = 0, 0
    kind = statistics_for(config)
    if kind is not None:
        width = max((group.in_features for group in work.groups), default=0)
        statistics = kind.num_bytes(width)
        # Before they are solved with, they are fp32 beside what they were summed up in.
        solving = kind.num_bytes(width, sum_dtype(torch.device("cpu" if work.cpu is None else "cuda")))
    for group in work.groups:
        solving = max(solving, workspace(config, group.in_features, group.rows))
    batch_tokens = batch_rows * work.row_tokens
    running = int(MARGIN * footprint.running * batch_tokens)
    if config.allocation == "loss":
        running = max(running, _with_gradients(work, batch_rows))
    # The inputs of all matrices of a block in the dense model, to be paired with those in the pruned one.
    pairs = max(_block_sums(work.groups, lambda group: group.in_features).values(), default=0) if streams == 2 else 0
    # Weights in fp32 with gradients, two moments and a mask, twice in their own type; a graph holds what it has run.
    sizes = _block_sums(work.groups, lambda group: group.in_features * group.rows)
    largest = max(sizes.values(), default=0) if config.reconstruct else 0
    training = 22 * largest + (2 * running if largest else 0)
    memory = {
        "held before": work.held,
        "offloaded blocks": work.units,
        "activations of waiting batches": 0 if place else waiting,
        "statistics": statistics,
        # Not at the same time, but an allocator does not always give back what a batch has freed.
        "running batch": running,
        "solving": max(solving, training),
        "inputs in the dense model": 4 * pairs * batch_tokens,
        "outputs of the dense block": int(MARGIN * footprint.entering * work.tokens) if largest else 0,
    }
    return Plan(true_sequential, place, batch_rows, memory, budget, waiting if place else 0)


def _with_gradients(work: Workload, batch_rows: int) -> int:
    """What a batch takes that gradients are taken on, and the gradient of the largest matrix."""
    footprint, groups = work.footprint, work.groups
    # All blocks keep what they have computed, about twice what is there of one at a time; of the logits there are the
    # probabilities, their sums and gradients besides.
    per_token = 2 * footprint.running * len({group.block for group in groups}) + 20 * footprint.logits
    largest = max((group.in_features * group.rows for group in groups), default=0)
    return int(MARGIN * per_token * batch_rows * min(sensitivity.LENGTH, work.row_tokens)) + 8 * largest


def _block_sums(groups: Sequence[GroupShape], size: Callable[[GroupShape], int]) -> dict[str, int]:
    """For each block the sum of something over its groups."""
    sums: dict[str, int] = {}
    for group in groups:
        sums[group.block] = sums.get(group.block, 0) + size(group)
    return sums


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB"


def measure(
    forward: Callable[[Any], Any], batch: Any, tokens: int, watched: Watched, model: nn.Module, blocks: Collection[str]
) -> Footprint:
    """Run a forward and see what it holds in memory, also one without data.

    Args:
        forward: Runs the model on a batch.
        batch: A (short) batch.
        tokens: How many tokens it has.
        watched: The weights at whose products a batch may wait.
        model: The model.
        blocks: Names of its blocks, at whose entry a batch may wait.
    """
    activations = Activations("cpu")
    waiting = entering = running = so_far = 0
    received: dict[str, Counter[int]] = defaultdict(Counter)

    def entered(_: Arguments) -> None:
        nonlocal entering
        entering = max(entering, activations.held(0))

    def called(*_: Any) -> None:
        nonlocal so_far
        so_far = max(so_far, activations.held(0))

    def used(use: Use) -> None:
        nonlocal waiting, running
        waiting = max(waiting, activations.held(0))
        running = so_far  # what comes after the last product, such as a loss, is not part of a run
        received[use.view.parameter][use.view.part] += use.inputs.shape[:-1].numel()

    with (
        at_entries(model, dict.fromkeys(blocks, entered)),
        WeightUses(watched, used, called),
        activations.computing(0),
    ):
        output = forward(batch)
    logits = getattr(output, "logits", None)
    num_logits = logits.numel() if isinstance(logits, torch.Tensor) else 0
    shares = {name: parts.total() / len(parts) / tokens for name, parts in received.items()}
    return Footprint(waiting / tokens, entering / tokens, running / tokens, shares, num_logits / tokens)
