"""What is pruned at a stop of the forwards: its inputs are summed up, and its matrices solved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from .config import SparseConfig
from .distributed import Processes
from .estimate import free_memory, held_memory, num_tokens
from .experts import Experts, Routed
from .forwards import Forwards, OnUse
from .lockstep import Call, Lockstep
from .matrices import PrunableMatrix
from .precision import sum_dtype
from .report import SparsityReport
from .solver import Clock, Group, Solved, Solver
from .statistics import PairedStatistics, Statistics
from .trace import Stop
from .uses import Arguments, Use, View

# The statistics that are collected in one pass take at most this share of the memory that is free.
MEMORY_SHARE = 0.5


@dataclass
class Tally:
    """Statistics of the inputs of a group, and the seconds they took."""

    statistics: Statistics
    seconds: float = 0.0
    num_together: int = 0  # tokens that went through a product with all experts


class Stages:
    """Prunes groups of matrices on the inputs that they get.

    Args:
        config: How to prune.
        forwards: Give the inputs.
        solver: Prunes a group, given the statistics of its inputs.
        report: Has the time that is spent.
        processes: Those that have parts of the inputs.
        max_memory: Bytes that may be held on the device that computes.
    """

    def __init__(
        self,
        config: SparseConfig,
        forwards: Forwards,
        solver: Solver,
        report: SparsityReport,
        processes: Processes,
        max_memory: int,
    ) -> None:
        self._config = config
        self._forwards = forwards
        self._solver = solver
        self._report = report
        self._processes = processes
        self._max_memory = max_memory

    def solve_parked(self, lockstep: Lockstep, group: Group, calls: Sequence[Call]) -> None:
        """Prune matrices at whose inputs batches are parked."""
        calls, twins = self._forwards.apart(calls)
        with self._solver.timed("statistics") as clock:
            statistics = self._solver.new_statistics(group[0])
            num_layer = sum(self._add(statistics, call.payload, call.batch) for call in calls)
            statistics.add_up(self._processes)
            together = sum(call.payload.together is not None for call in calls)
            num_layer, together = self._processes.totals(num_layer, together)
            share = self._layer_share(statistics, group[0], num_layer) if together else 0.0
            if share:
                layer = self._solver.new_statistics(group[0])
                for call in calls:
                    for inputs in call.payload.together:
                        self._add(layer, replace(call.payload, inputs=inputs), call.batch)
                layer.add_up(self._processes)
                statistics = statistics.blended(layer, share)
            seconds = clock.elapsed
        solved = self._solver.solve(group, statistics, seconds, share)
        lockstep.go_on(twin.batch for twin in twins.values())
        self._solver.write(solved)

    def paired(self, batch: int, use: Use, dense: torch.Tensor | None) -> Use:
        """A use with its inputs in the dense model, if their tokens are the same: experts may have others there."""
        whole = use.inputs.ndim > 2 or len(use.inputs) >= num_tokens(self._forwards.batches[batch])
        same = dense is not None and dense.shape == use.inputs.shape and use.together is None
        return replace(use, dense=dense) if whole and same else use

    def _add(self, statistics: Statistics, use: Use, batch: int) -> int:
        """Add the inputs of a matrix on one batch to its statistics, without the batch's padding.

        Returns:
            The number of tokens, those among them that are routed to another expert.
        """
        with self._forwards.activations.shown(use.inputs):
            return self._add_shown(statistics, use, batch)

    def _add_shown(self, statistics: Statistics, use: Use, batch: int) -> int:
        flat, keep = use.inputs.reshape(-1, use.inputs.shape[-1]), self._forwards.tokens(batch, use)
        if keep is not None:
            flat = flat[keep]
        # Where one product takes all experts, a token is zero for those that it is not routed to.
        statistics.add(flat if use.together is None else flat[flat.any(dim=1)])
        if use.dense is not None:
            assert isinstance(statistics, PairedStatistics)
            dense = use.dense.reshape(-1, use.dense.shape[-1])
            statistics.add_deviation(flat, dense if keep is None else dense[keep])
        return len(flat)

    def _layer_share(self, own: Statistics, matrix: PrunableMatrix, num_layer: int) -> float:
        """The share of the layer's statistics in those of an expert: the fewer tokens of its own, the higher."""
        if self._config.calibrate_all_experts:
            return 1.0
        enough = self._config.min_expert_tokens or own.enough_tokens(matrix.shape[1])
        return max(0.0, 1 - own.num_tokens / enough) if own.num_tokens < num_layer else 0.0

    def feed_experts(self, lockstep: Lockstep, name: str, calls: Sequence[Call], groups: Mapping[Stop, Group]) -> None:
        """Prune the experts of a module that few or no tokens are routed to, before any token goes there.

        Args:
            lockstep: The forwards; they stop no more for what was pruned.
            name: Name of the module.
            calls: The batches that are parked at its entry.
            groups: What is to be pruned at each stop, those of the experts among it.
        """
        with self._forwards.activations.shown([call.payload for call in calls]):
            self._feed_shown(lockstep, name, calls, groups)

    def _feed_shown(self, lockstep: Lockstep, name: str, calls: Sequence[Call], groups: Mapping[Stop, Group]) -> None:
        experts = self.experts(lockstep, name, {call.batch: call.payload for call in calls})
        by_expert: dict[int, list[tuple[Stop, Group]]] = defaultdict(list)
        for stop, group in groups.items():
            if group and group[0].is_part and experts.hold(group[0].view):
                by_expert[group[0].view.part].append((stop, group))
        routed = [experts.num_routed(expert) for expert in by_expert]
        num_tokens, *routed = self._processes.totals(experts.num_tokens, *routed)
        for (_, mine), num_routed in zip(by_expert.items(), routed, strict=True):
            counted = self._solver.new_statistics(mine[0][1][0])
            counted.num_tokens = num_routed
            shares = [self._layer_share(counted, group[0], num_tokens) for _, group in mine]
            # All matrices of an expert or none, so that each one sees what comes out of those before it.
            for (stop, group), share in zip(mine, shares, strict=True) if any(shares) else ():
                with self._solver.timed("statistics") as clock:
                    own = self._solver.new_statistics(group[0])
                    if share < 1 and counted.num_tokens:
                        own = self._shown(experts, group[0], everyone=False)
                    own.num_tokens = counted.num_tokens
                    layer = self._shown(experts, group[0], everyone=True) if share else own
                    seconds = clock.elapsed
                if layer.num_tokens:  # it has none if the expert does nothing with its tokens
                    blended = own.blended(layer, share) if share else own
                    self._solver.write(self._solver.solve(group, blended, seconds, share))
                    lockstep.drop(stop)

    def experts(self, lockstep: Lockstep, name: str, calls: Mapping[int, Arguments]) -> Experts:
        """The experts of a module, with the tokens that it was called with."""
        module = self._forwards.model.get_submodule(name)
        routed = []
        for batch, (args, kwargs) in calls.items():
            tokens = Routed.of(module, args, kwargs)
            assert tokens is not None  # or the trace would not have named it
            keep = self._forwards.paddings[batch].keep(tokens.arguments[tokens.tokens])
            routed.append((batch, replace(tokens, keep=keep)))
        return Experts(name, module, routed, lockstep.call)

    def _shown(self, experts: Experts, matrix: PrunableMatrix, everyone: bool) -> Statistics:
        """Statistics of an expert that is shown its own tokens, or those of all."""
        statistics = self._solver.new_statistics(matrix)
        for inputs in experts.inputs(matrix.parameter, matrix.view, everyone):
            statistics.add(inputs)
        statistics.add_up(self._processes)
        return statistics

    def solve_together(
        self,
        groups: Sequence[Group],
        forwards: Callable[[OnUse], None],
        experts: Callable[[PrunableMatrix], Experts | None] = lambda matrix: None,
        corrections: Sequence[float] = (0.0,),
    ) -> dict[float, list[Solved]]:
        """Prune matrices on the inputs that all of them have before any of them is written.

        If their statistics do not fit in memory together, the forwards are run several times.

        Args:
            groups: Matrices that share their inputs.
            forwards: Runs all forwards, calling a function with the index of a batch and each of its uses.
            experts: Once the forwards have run, gives the experts that a matrix belongs to, if any.
            corrections: How much of the errors in their inputs to make up for, once each.

        Returns:
            Solutions by what they make up for.
        """
        solved: dict[float, list[Solved]] = {correction: [] for correction in corrections}
        for chunk in self._chunks(groups):
            tallies = self.collect(chunk, forwards)
            while tallies:
                group, tally = chunk[-len(tallies)], tallies.pop(0)
                for correction, found in self._solve_tally(group, tally, forwards, experts, corrections).items():
                    solved[correction] += found
        return solved

    def _solve_tally(
        self,
        group: Group,
        tally: Tally,
        forwards: Callable[[OnUse], None],
        experts: Callable[[PrunableMatrix], Experts | None],
        corrections: Sequence[float],
    ) -> dict[float, list[Solved]]:
        own, matrix, share = tally.statistics, group[0], 0.0
        with self._solver.timed("statistics") as clock:
            layer, module = own, experts(matrix)
            if tally.num_together:
                share = self._layer_share(own, matrix, tally.num_together)
                if share:
                    layer = self._solver.new_statistics(matrix)
                    forwards(partial(self._add_parts, layer, matrix.view.parameter))
                    layer.add_up(self._processes)
            elif module is not None:
                share = self._layer_share(own, matrix, *self._processes.totals(module.num_tokens))
                layer = self._shown(module, matrix, everyone=True) if share else own
            seconds = tally.seconds + clock.elapsed
        if not layer.num_tokens:
            return {}  # it did not run
        statistics = own.blended(layer, share) if share else own
        return {c: self._solver.solve(group, statistics, seconds, share, c) for c in corrections}

    def _add_parts(self, statistics: Statistics, parameter: str, batch: int, use: Use) -> None:
        """Add the inputs of all matrices in a parameter."""
        if use.view.parameter == parameter:
            self._add(statistics, use, batch)

    def _chunks(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups whose statistics fit in memory together."""
        chunk: list[Group] = []
        room = 0.0
        for group in groups:
            assert self._solver.statistics is not None
            size = self._solver.statistics.num_bytes(group[0].shape[1], sum_dtype(group[0].device))
            if chunk and size > room:
                yield chunk
                chunk = []
            if not chunk:
                room = MEMORY_SHARE * self._room(group[0].device)
            chunk.append(group)
            room -= size
        if chunk:
            yield chunk

    def _room(self, device: torch.device) -> int:
        """Bytes that may still be taken on the device that computes."""
        allowed = self._processes.least(self._max_memory - held_memory(device))
        return min(free_memory(device, self._processes), allowed)

    def along(self, forwards: Forwards) -> Stages:
        """The same on other inputs."""
        return Stages(self._config, forwards, self._solver, self._report, self._processes, self._max_memory)

    def collect(
        self, groups: Sequence[Group], forwards: Callable[[OnUse], None], kind: type[Statistics] | None = None
    ) -> list[Tally]:
        """Statistics of the inputs of each group along forwards; of a kind, or that which the solver needs."""
        tallies = [Tally(self._solver.new_statistics(group[0], kind)) for group in groups]
        index_of = {matrix.view: index for index, group in enumerate(groups) for matrix in group}
        counted: dict[tuple[int, int], View] = {}

        def on_use(batch: int, use: Use) -> None:
            index = index_of.get(use.view)
            # Of matrices that share their inputs, the first to be used counts.
            if index is None or counted.setdefault((index, batch), use.view) != use.view:
                return
            with self._solver.timed("statistics") as clock:
                tally = tallies[index]
                num_tokens = self._add(tally.statistics, use, batch)
                tally.num_together += 0 if use.together is None else num_tokens
                tally.seconds += clock.elapsed

        clock, busy = Clock(), self._report.seconds.get("statistics", 0.0)
        forwards(on_use)
        busy = self._report.seconds.get("statistics", 0.0) - busy
        self._solver.spend("forward", clock.elapsed - busy)
        with self._solver.timed("statistics"):
            for tally in tallies:
                tally.statistics.add_up(self._processes)
                (tally.num_together,) = self._processes.totals(tally.num_together)
        return tallies
