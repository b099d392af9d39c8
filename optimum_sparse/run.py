"""One pruning run: the ways through the model, and the statistics collected along them."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocation import allocate, allocated, describe
from .calibration.batches import split_rows
from .config import SparseConfig
from .distributed import Processes
from .estimate import available_memory, duration, held_memory, num_tokens, run_seconds
from .experts import Experts, Routed
from .lockstep import Call, Lockstep
from .matrices import PrunableMatrix, find_blocks, find_matrices, find_weights, text_models
from .methods import METHODS, fused
from .offload import Residency, execution_device
from .padding import Padding
from .plan import GroupShape, Plan, Workload, make_plan, measure
from .precision import half_penalty
from .progress import Progress
from .quantization import Grid
from .reconstruction import HELD_OUT, hidden_states, reconstruct, relative_error
from .report import SparsityReport
from .resume import Steps, depends_on, digest, fingerprint, kept_allocation
from .solver import Clock, Group, Solved, Solver
from .spill import Activations
from .statistics import NormStatistics, PairedStatistics, Statistics
from .trace import Stop, Trace, trace
from .uses import Use, View, Watched, WeightUses

# The statistics that are collected in one pass take at most this share of the memory that is free.
MEMORY_SHARE = 0.5

# The arguments of a module's call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# Called with the index of a batch and a use in its forward.
OnUse = Callable[[int, Use], None]


class PruningRun:
    """One pruning run.

    Args:
        model: The model.
        config: How to prune it.
        report: Filled along the way.
        progress: What a person sees of it.
        processes: Those that run together, each with the whole model and the same arguments.
        batches: Calibration batches; for a method that needs none, batches that show how the model works.
        activation_device: Where the activations of waiting batches are: `"cpu"`, `"disk"`, or `None` for the device
            that they are computed on.
        folder: Where progress is kept, and taken up if some is there; `None` to keep none.
        max_memory: Bytes that may be held on the device that computes; `None` for what is free.

    Attributes:
        config: The configuration, with what was chosen for it.
        plan: How it runs, once that is known; `None` for a method that needs no data.

    Raises:
        ValueError: `folder` has the progress of another run, or the run does not fit in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparseConfig,
        report: SparsityReport,
        progress: Progress,
        processes: Processes,
        batches: Sequence[Mapping[str, Any]],
        activation_device: str | None = None,
        folder: Path | None = None,
        max_memory: int | None = None,
    ) -> None:
        self._model = model
        self.config = config
        self.plan: Plan | None = None
        self._report = report
        self._progress = progress
        self._processes = processes
        self._given = self._batches = batches
        self._forward = _forward(model)
        self._blocks = find_blocks(model)
        self._parameters = Watched({weight.parameter: weight.value for weight in find_weights(model)})
        self._residency = Residency(model, self._blocks, self._parameters)
        self._activation_device = activation_device
        self._max_memory = max_memory
        self._solver = Solver(config, report, progress, self._residency, processes)
        self._folder = folder
        self._allocation: list[int] | None = None
        self._paddings = [Padding.of(batch) for batch in batches]
        self._text = text_models(model)
        self._num_twins = 0

    @property
    def grids(self) -> dict[str, Grid]:
        """What matrices were rounded to, by name, if they were."""
        return self._solver.grids

    def prune(self) -> list[PrunableMatrix]:
        """Prune the model, and return what was pruned."""
        with self._residency:
            return self._prune()

    def _prune(self) -> list[PrunableMatrix]:
        data_free = self._solver.statistics is None
        self._check_processes()
        rounds = self.config.quantization is not None
        slow = fused.missing(execution_device(self._model), rounds) if METHODS[self.config.method].sweeps else None
        self._report.notes += [slow] if slow else []
        seen = self._probe(data_free)
        matrices, self._report.skipped = find_matrices(self._model, self.config, seen, unused_too=data_free)
        self._progress.start(len(matrices))
        if seen is None or data_free:
            self._data_free(matrices)
        else:
            matrices = self._calibrated(matrices, seen)
        if self.config.error_correction:
            self._report.notes += self._uncorrected()
        done = {entry.name for entry in self._report.matrices}
        for matrix in matrices:
            if matrix.name not in done:
                self._report.skipped[matrix.name] = (
                    "did not run on the calibration data, or only past its first tokens"
                )
        return [matrix for matrix in matrices if matrix.name in done]

    def _uncorrected(self) -> list[str]:
        """What is to be said of matrices that make up for no errors though they were to."""
        rejected = [block for block, found in self._report.correction.items() if not found["correction"]]
        left = [e.name for e in self._report.matrices if not e.correction and e.block not in rejected]
        notes = []
        if rejected:
            notes.append(f"errors are not corrected in {', '.join(rejected)}: held-out windows were better without")
        if left:
            notes.append(
                f"errors are not corrected in {len(left)} matrices, {left[0]} among them: they are in no block, run "
                "several times, or see other tokens in the dense model"
            )
        return notes

    def _check_processes(self) -> None:
        """See that the processes have the same of everything, before they rely on it."""
        if self._processes.count > 1:
            if self.config.reconstruct:
                raise ValueError(
                    f"reconstruct={self.config.reconstruct} runs in one process, and there are "
                    f"{self._processes.count}: launch one, or leave it out."
                )
            self._processes.check_device(execution_device(self._model))
            options, data = depends_on(self.config, self._batches).values()
            facts = {"model": fingerprint(self._model), "configuration": options}
            digests = {name: digest([json.dumps(fact).encode()]) for name, fact in facts.items()}
            self._processes.check_same({**digests, "calibration data": data})
            if not self._solver.shares_rows:
                self._report.notes.append(f"each process solved all rows: {self.config.method} needs them all")

    def _share_out(self) -> None:
        """Of the calibration batches, keep those of this process.

        Raises:
            ValueError: They are fewer than the processes.
        """
        count = self._processes.count
        if len(self._batches) < count:
            size = max(1, sum(map(_num_rows, self._batches)) // count)
            self._batches = [part for batch in self._batches for part in split_rows(batch, size)]
        if len(self._batches) < count:
            raise ValueError(
                f"{len(self._batches)} calibration samples cannot be shared out to {count} processes: give more "
                "samples, or launch fewer processes."
            )
        self._batches = self._batches[self._processes.index :: count]
        self._paddings = [Padding.of(batch) for batch in self._batches]

    def _probe(self, data_free: bool) -> Trace | None:
        """See on short batches which weights are used, in which order, and which share their inputs."""
        batches = map(_shortened, self._batches)
        try:
            with self._solver.timed("probe"):
                return trace(self._forward, batches, self._model, self._parameters, self._blocks)
        except Exception as error:
            if data_free:
                self._report.notes.append(
                    f"The model does not run on {', '.join(self._batches[0])} ({error}): routers were not told "
                    "from other layers and only nn.Linear and Conv1D were found. Pass dataset=[a batch it accepts]."
                )
                return None
            given, taken = ", ".join(self._batches[0]), ", ".join(inspect.signature(self._model.forward).parameters)
            error.add_note(
                f"{type(self._model).__name__}.forward was called with {given}. It takes {taken}: pass batches that "
                "the model runs on by itself, e.g. prune(model, dataset=data_loader)."
            )
            raise

    def _data_free(self, matrices: Sequence[PrunableMatrix]) -> None:
        blocks: dict[str, list[PrunableMatrix]] = defaultdict(list)
        for matrix in matrices:
            blocks[matrix.block].append(matrix)
        steps = self._steps(blocks)
        for block in [block for block in blocks if block in steps.left]:
            with self._residency.holding(matrix.view.parameter for matrix in blocks[block]):
                for matrix in blocks[block]:
                    self._solver.write(self._solver.solve([matrix], None))
                steps.did(block)
            self._residency.settle()

    def _calibrated(self, matrices: list[PrunableMatrix], seen: Trace) -> list[PrunableMatrix]:
        """Prune what can be pruned on the calibration data, and return the matrices as they were asked to be."""
        groups, repeated = self._grouped(matrices, seen)
        self._share_out()
        self._make_plan([*filter(None, groups.values()), *repeated])
        if self.config.allocation is not None:
            matrices = self._allocated(matrices, groups, repeated)
            groups, repeated = self._grouped(matrices, seen)
        stages = {stop: [group] if group else [] for stop, group in groups.items()}
        if self.config.true_sequential is False:
            stages = self._by_block(groups, seen)
        steps = self._steps({None: chain(*repeated), **{stop: chain(*members) for stop, members in stages.items()}})
        clock, busy = Clock(), sum(self._report.seconds.values())
        if repeated and None in steps.left:
            # What runs several times per forward is pruned on its inputs in the dense model, from all of its uses.
            self._solver.write(self._solve_together(repeated, self._whole_forwards)[0.0])
            steps.did(None)
        steps.restore(None)
        if self.config.error_correction:  # each batch also runs with the weights before they are pruned
            self._num_twins = len(self._batches)
            self._batches = [*self._batches, *self._batches]
            self._paddings = [Padding.of(batch) for batch in self._batches]
        with self._activations:
            self._in_lockstep(groups, stages, steps)
        steps.finish()
        busy = sum(self._report.seconds.values()) - busy
        self._solver.spend("forward", clock.elapsed - busy)
        return matrices

    def _grouped(self, matrices: Sequence[PrunableMatrix], seen: Trace) -> tuple[dict[Stop, Group], list[Group]]:
        """Matrices by the stop at which they receive a new input, and those that run several times per forward."""
        by_view = {matrix.view: matrix for matrix in matrices}
        # All batches leave an offloaded block before any of them is far ahead.
        stops = seen.stops(by_view, self._residency.units.intersection(self._blocks))
        groups: dict[Stop, Group] = {
            stop: [] if isinstance(stop, str) else [by_view[view] for view in stop] for stop in stops
        }
        return groups, [[matrix] for matrix in matrices if matrix.view in seen.repeated]

    def _allocated(
        self, matrices: Sequence[PrunableMatrix], groups: Mapping[Stop, Group], repeated: Sequence[Group]
    ) -> list[PrunableMatrix]:
        """The matrices with the sparsity of each, by the norms of their inputs in the dense model."""
        free = [matrix for matrix in matrices if not matrix.overridden]
        counts = kept_allocation(self._folder)
        if counts is None or len(counts) != len(free):
            entered = [stop for stop in groups if stop in self._residency.units]
            known = [*filter(None, groups.values()), *repeated]
            tallies = self._collect(known, partial(self._dense_forwards, entered), NormStatistics)
            inputs = {m.view: tally.statistics for group, tally in zip(known, tallies, strict=True) for m in group}
            with self._solver.timed("allocation"):
                counts = allocate(free, [inputs.get(matrix.view) for matrix in free], self.config)
            # Of several processes that of the main one counts, to the bit.
            counts = self._processes.totals(*(count * self._processes.is_main for count in counts))
        self._allocation = counts
        self._report.notes += [describe(free, counts, self.config)] if free else []
        zeros = {matrix.view: count for matrix, count in zip(free, counts, strict=True)}
        return [matrix if matrix.overridden else allocated(matrix, zeros[matrix.view]) for matrix in matrices]

    def _steps(self, members: Mapping[Any, Iterable[PrunableMatrix]]) -> Steps:
        """The steps that prune matrices, with what was done of them before."""
        rows = None if self.plan is None else self.plan.batch_rows
        how = {"processes": self._processes.count, "windows per forward": rows, "allocation": self._allocation}
        return Steps(
            {step: list(matrices) for step, matrices in members.items()},
            self._model,
            self._residency,
            self._report,
            self._solver.grids,
            self._processes,
            self._folder,
            {**depends_on(self.config, self._given), **how},
            at_once=not self.config.error_correction,
        )

    def _make_plan(self, groups: Sequence[Group]) -> None:
        """Choose how to run within the memory that there is, and say what it will take."""
        device = execution_device(self._model)
        batch = _shortened(self._batches[0])
        short, tokens = num_tokens(batch), self._processes.most(sum(map(num_tokens, self._batches)))
        with self._solver.timed("probe") as clock:
            # The probe has paid for warming up.
            footprint = measure(self._forward, batch, short, self._parameters, self._model, self._blocks)
            seconds = clock.elapsed
        self._residency.settle()
        numbers = [GroupShape.of(group, footprint) for group in groups]
        largest = max(self._batches, key=num_tokens)
        rows = self._processes.most(_num_rows(largest))
        held = self._processes.most(held_memory(device))
        files = self._folder if self._folder is not None and self._folder.is_dir() else Path(tempfile.gettempdir())
        work = Workload(
            groups=numbers,
            tokens=tokens,
            batch_rows=rows,
            row_tokens=self._processes.most(-(-num_tokens(largest) // _num_rows(largest))),
            footprint=footprint,
            held=held,
            units=self._processes.most(self._residency.most_bytes),
            cpu=None if device.type == "cpu" else self._processes.least(self._available(torch.device("cpu"))),
            disk=self._processes.least(shutil.disk_usage(files).free // self._processes.num_local),
        )
        room = held + self._processes.least(self._available(device))
        self._max_memory = room if self._max_memory is None else self._max_memory
        self.plan = plan = make_plan(work, self.config, self._max_memory, self._activation_device)
        if not plan.true_sequential:
            self.config = replace(self.config, true_sequential=False)
        self._activations = Activations(plan.activation_device, self._folder, self._processes.index)
        if plan.batch_rows < rows:
            self._batches = [part for batch in self._batches for part in split_rows(batch, plan.batch_rows)]
            self._paddings = [Padding.of(batch) for batch in self._batches]
        (self._num_batches,) = self._processes.totals(len(self._batches))
        time = duration(run_seconds(numbers, tokens, seconds * tokens / short, self.config))
        self._progress.say(f"{sum(map(len, groups))} matrices, {tokens:,} calibration tokens: about {time}\n{plan}")
        dtype = groups[0][0].parameter.dtype
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and (slow := half_penalty(dtype)) > 2:
            self._progress.say(
                f"This CPU takes {slow:.0f} times as long for products in {dtype} as in float32: loaded with "
                "dtype=torch.float32 (--dtype float32), the model is pruned sooner, in twice the memory."
            )

    # The ways through the model.

    def _by_block(self, groups: Mapping[Stop, Group], seen: Trace) -> dict[Stop, list[Group]]:
        """As the papers' code: all matrices of a block see the inputs they have before any of them is pruned."""
        stages: dict[Stop, list[Group]] = {}
        for stop, group in groups.items():
            if stop in self._blocks:
                stages.setdefault(stop, [])
            for block in dict.fromkeys(seen.blocks[matrix.view] for matrix in group):
                members = [matrix for matrix in group if seen.blocks[matrix.view] == block]
                stages.setdefault(stop if block is None else block, []).append(members)
        return stages

    def _in_lockstep(self, groups: Mapping[Stop, Group], stages: Mapping[Stop, Sequence[Group]], steps: Steps) -> None:
        """Forwards that stop for each stage.

        Args:
            groups: What receives a new input at each stop; nothing where experts or blocks are entered.
            stages: Where to stop, and what is to be pruned there.
            steps: Which of them are still to be done.
        """
        experts = [stop for stop in groups if isinstance(stop, str) and stop not in self._blocks]
        everywhere = bool(self._num_twins)
        stops = [stop for stop in stages if everywhere or stop in steps.left or stop in self._residency.units]
        parked: dict[Stop, Group] = {
            stop: group for stop in stops if not isinstance(stop, str) for group in stages[stop]
        }
        with self._lockstep(stops, parked) as lockstep:
            lockstep.late.update(steps.late)
            steps.late = lockstep.late
            for stop, calls in lockstep:
                self._residency.settle()
                if stop not in steps.left:
                    lockstep.go_on(twin.batch for twin in self._apart(calls)[1].values())
                    steps.restore(stop)
                elif stop in parked:
                    self._solve_parked(lockstep, parked[stop], calls)
                elif stop in experts:
                    self._feed_experts(lockstep, str(stop), calls, parked)
                else:
                    trained = self._solve_block(lockstep, str(stop), calls, stages[stop], experts)
                    steps.trained |= dict.fromkeys(trained, stop)
                steps.did(stop)
        for stop, batches in steps.all_late().items():
            late = f"{batches} of {self._num_batches} batches came to it only after it was pruned and do not count"
            self._report.notes += [f"{matrix.name}: {late}" for matrix in chain(*stages[stop])]

    @contextmanager
    def _lockstep(
        self, stops: Iterable[Stop], groups: Mapping[Stop, Group], on_use: OnUse | None = None
    ) -> Iterator[Lockstep]:
        """Forwards that park where they enter the modules among `stops`, and where they use one of `groups`."""
        stop_of = {matrix.view: stop for stop, group in groups.items() for matrix in group}

        def see(index: int, use: Use) -> None:
            if on_use is not None:
                on_use(index, use)
            if use.view in stop_of:
                lockstep.park(stop_of[use.view], use)

        def forward(index: int) -> None:
            # The innermost context sees what the model does, and nothing of what the others do to see it.
            with self._watching(index, partial(see, index)), self._activations.computing(index):
                self._forward(self._batches[index])

        lockstep = Lockstep(
            forward, len(self._batches), stops, self._activations.away, self._processes.least, self._num_twins
        )
        entered = {name: partial(lockstep.park, name) for name in stops if isinstance(name, str)}
        with self._residency.forwards(len(self._batches)), self._at_entries(entered), lockstep:
            yield lockstep

    @contextmanager
    def _at_entries(self, entered: Mapping[str, Callable[[Arguments], Any]]) -> Iterator[None]:
        """Call a function with the arguments whenever the module of its name is entered."""

        def enter(function: Callable[[Arguments], Any], _: nn.Module, *arguments: Any) -> None:
            function(arguments)  # what a hook returns would become the new arguments

        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(partial(enter, function), with_kwargs=True)
            for name, function in entered.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watching(self, index: int, on_use: Callable[[Use], None]) -> WeightUses:
        """A context that reports uses in the forward of a batch."""
        padding = self._paddings[index]
        if not padding:
            return WeightUses(self._parameters, on_use)

        def note(use: Use) -> None:
            padding.saw_use(use.inputs, use.view.part)
            on_use(use)

        return WeightUses(self._parameters, note, padding.saw_call)

    # Statistics at single stops.

    def _solve_parked(self, lockstep: Lockstep, group: Group, calls: Sequence[Call]) -> None:
        """Prune matrices at whose inputs batches are parked."""
        calls, twins = self._apart(calls)
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

    def _apart(self, calls: Sequence[Call]) -> tuple[list[Call], dict[int, Call]]:
        """The calls of calibration batches, and for each of these that of its run through the dense model, if any."""
        first = len(self._batches) - self._num_twins
        return [c for c in calls if c.batch < first], {c.batch - first: c for c in calls if c.batch >= first}

    def _paired(self, batch: int, use: Use, dense: torch.Tensor | None) -> Use:
        """A use with its inputs in the dense model, if their tokens are the same: experts may have others there."""
        whole = use.inputs.ndim > 2 or len(use.inputs) >= num_tokens(self._batches[batch])
        same = dense is not None and dense.shape == use.inputs.shape and use.together is None
        return replace(use, dense=dense) if whole and same else use

    def _add(self, statistics: Statistics, use: Use, batch: int) -> int:
        """Add the inputs of a matrix on one batch to its statistics, without the batch's padding.

        Returns:
            The number of tokens, those among them that are routed to another expert.
        """
        with self._activations.shown(use.inputs):
            return self._add_shown(statistics, use, batch)

    def _add_shown(self, statistics: Statistics, use: Use, batch: int) -> int:
        flat = use.inputs.reshape(-1, use.inputs.shape[-1])
        # The padding of a text says nothing about the images beside it.
        if not self._text or any(use.view.parameter.startswith(f"{name}.") for name in self._text):
            try:
                keep = self._paddings[batch].keep(use.inputs, use.view.part)
            except ValueError as error:
                raise ValueError(f"{use.view.parameter}: {error}.") from error
        else:
            keep = None
        if keep is not None:
            flat = flat[keep]
        # Where one product takes all experts, a token is zero for those that it is not routed to.
        statistics.add(flat if use.together is None else flat[flat.any(dim=1)])
        if use.dense is not None:
            assert isinstance(statistics, PairedStatistics)
            dense = use.dense.reshape(-1, use.dense.shape[-1])
            statistics.add_deviation(flat, dense if keep is None else dense[keep])
        return len(flat)

    # Experts with few tokens.

    def _layer_share(self, own: Statistics, matrix: PrunableMatrix, num_layer: int) -> float:
        """The share of the layer's statistics in those of an expert: the fewer tokens of its own, the higher."""
        if self.config.calibrate_all_experts:
            return 1.0
        enough = self.config.min_expert_tokens or own.enough_tokens(matrix.shape[1])
        return max(0.0, 1 - own.num_tokens / enough) if own.num_tokens < num_layer else 0.0

    def _feed_experts(
        self, lockstep: Lockstep, name: str, calls: Sequence[Call], groups: Mapping[Stop, Group]
    ) -> None:
        """Prune the experts of a module that few or no tokens are routed to, before any token goes there."""
        with self._activations.shown([call.payload for call in calls]):
            self._feed_shown(lockstep, name, calls, groups)

    def _feed_shown(self, lockstep: Lockstep, name: str, calls: Sequence[Call], groups: Mapping[Stop, Group]) -> None:
        experts = self._experts(lockstep, name, {call.batch: call.payload for call in calls})
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

    def _experts(self, lockstep: Lockstep, name: str, calls: Mapping[int, Arguments]) -> Experts:
        """The experts of a module, with the tokens that it was called with."""
        module = self._model.get_submodule(name)
        routed = []
        for batch, (args, kwargs) in calls.items():
            tokens = Routed.of(module, args, kwargs)
            assert tokens is not None  # or the trace would not have named it
            keep = self._paddings[batch].keep(tokens.arguments[tokens.tokens])
            routed.append((batch, replace(tokens, keep=keep)))
        return Experts(name, module, routed, lockstep.call)

    def _shown(self, experts: Experts, matrix: PrunableMatrix, everyone: bool) -> Statistics:
        """Statistics of an expert that is shown its own tokens, or those of all."""
        statistics = self._solver.new_statistics(matrix)
        for inputs in experts.inputs(matrix.parameter, matrix.view, everyone):
            statistics.add(inputs)
        statistics.add_up(self._processes)
        return statistics

    # Statistics of many matrices at once.

    def _dense_forwards(self, entered: Sequence[Stop], on_use: OnUse) -> None:
        """Whole forwards, side by side where they enter offloaded blocks, so that each of these comes in once."""
        end: Stop = ()  # no batch comes there, so that all of them run to their end
        with self._activations, self._lockstep([*entered, end], {}, on_use) as lockstep:
            for _ in lockstep:
                self._residency.settle()

    def _whole_forwards(self, on_use: OnUse) -> None:
        for index, batch in enumerate(self._batches):
            with self._watching(index, partial(on_use, index)):
                self._forward(batch)

    def _solve_block(
        self, lockstep: Lockstep, block: str, calls: Sequence[Call], groups: Sequence[Group], entries: Sequence[str]
    ) -> list[str]:
        """Prune the matrices of a block at whose entry batches are parked, and return what else was changed."""
        entered: dict[str, dict[int, Arguments]] = {name: {} for name in entries if f"{name}.".startswith(f"{block}.")}
        module, outputs, dense_outputs = self._model.get_submodule(block), {}, {}
        calls, twins = self._apart(calls)
        # To see what the correction is worth; the same ones however many processes there are.
        number = {call.batch: call.batch * self._processes.count + self._processes.index for call in calls}
        held_out = {batch for batch in number if self._num_batches > 1 and number[batch] % HELD_OUT == 0}

        def forwards(on_use: OnUse) -> None:
            for call in calls:
                notes = {name: partial(batches.setdefault, call.batch) for name, batches in entered.items()}
                dense, target = self._dense_run(lockstep, module, twins.get(call.batch))
                if target is not None and call.batch in held_out:
                    dense_outputs[call.batch] = target.clone()  # what the batch owns may go away when it goes on

                def pair(batch: int, use: Use, dense: Mapping[View, torch.Tensor] = dense) -> None:
                    on_use(batch, use if batch in held_out else self._paired(batch, use, dense.get(use.view)))

                with self._at_entries(notes):
                    output = self._run_parked(lockstep, module, call, pair)
                if self.config.reconstruct and isinstance(output, torch.Tensor):
                    part = 0.0 if target is None else self.config.error_correction or 0.0
                    outputs[call.batch] = output if target is None else output.lerp(target, part)

        @cache
        def modules() -> list[Experts]:
            num_entered = self._processes.totals(*map(len, entered.values()))
            return [
                self._experts(lockstep, name, batches)
                for (name, batches), number in zip(entered.items(), num_entered, strict=True)
                if number
            ]

        def experts(matrix: PrunableMatrix) -> Experts | None:
            return next((module for module in modules() if matrix.is_part and module.hold(matrix.view)), None)

        with self._residency.holding(matrix.view.parameter for group in groups for matrix in group):
            corrections = [0.0, self.config.error_correction] if self.config.error_correction else [0.0]
            candidates = self._solve_together(groups, forwards, experts, corrections)
            lockstep.go_on(twin.batch for twin in twins.values())
            judges = [call for call in calls if call.batch in dense_outputs]
            self._solver.write(self._best(lockstep, block, candidates, judges, dense_outputs))
            return self._reconstruct(lockstep, block, calls, groups, outputs) if outputs else []

    def _best(
        self,
        lockstep: Lockstep,
        block: str,
        candidates: Mapping[float, Sequence[Solved]],
        calls: Sequence[Call],
        targets: Mapping[int, torch.Tensor],
    ) -> Sequence[Solved]:
        """Of solutions, by how far they are corrected, those with which a block is closest to the dense model.

        Args:
            lockstep: The forwards.
            block: Name of the block.
            candidates: The solutions.
            calls: Batches to judge by.
            targets: What the block puts out for them in the dense model.
        """
        if len(candidates) == 1:
            return candidates[0.0]
        module, errors = self._model.get_submodule(block), {}
        (count,) = self._processes.totals(len(calls))
        for correction, solved in candidates.items():
            for one in solved:
                one.matrix.write(one.weight)
            error = torch.zeros((), dtype=torch.float64, device=self._processes.device)
            for call in calls:
                output = self._run_parked(lockstep, module, call, lambda batch, use: None)
                error += relative_error(output, targets[call.batch]).to(error)
            self._processes.sum_(error)
            errors[correction] = error.item() / max(count, 1)
        best = min(errors, key=lambda correction: (errors[correction], -correction))
        self._report.correction[block] = {"before": errors[0.0], "after": errors[best], "correction": best}
        return candidates[best]

    def _dense_run(
        self, lockstep: Lockstep, module: nn.Module, call: Call | None
    ) -> tuple[dict[View, torch.Tensor], torch.Tensor | None]:
        """The inputs of all matrices, and the output of a block, in a run through the dense model."""
        inputs: dict[View, torch.Tensor] = {}
        if call is None:
            return inputs, None
        output = self._run_parked(lockstep, module, call, lambda batch, use: inputs.update({use.view: use.inputs}))
        return inputs, output if isinstance(output, torch.Tensor) else None

    def _run_parked(self, lockstep: Lockstep, module: nn.Module, call: Call, on_use: OnUse) -> Any:
        """What a module puts out for a batch that is parked at its entry."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._watching(call.batch, partial(on_use, call.batch)):
                return module(*args, **kwargs)

        with self._activations.shown(call.payload):
            return hidden_states(lockstep.call(call.batch, run, *call.payload))

    def _reconstruct(
        self,
        lockstep: Lockstep,
        block: str,
        calls: Sequence[Call],
        groups: Sequence[Group],
        targets: Mapping[int, torch.Tensor],
    ) -> list[str]:
        """Train a block that has been pruned, and return the names of the parameters that were trained."""
        module, payloads = self._model.get_submodule(block), {call.batch: call.payload for call in calls}
        pruned = {matrix.view.parameter for group in groups for matrix in group}
        uses = Counter(id(p) for name in self._blocks for p in self._model.get_submodule(name).parameters())
        names = [
            name
            for name, parameter in module.named_parameters()
            if parameter.is_floating_point() and uses[id(parameter)] == 1
            if parameter.dim() == 1 or f"{block}.{name}" in pruned
        ]

        def call_block(batch: int, function: Callable[..., Any]) -> Any:
            with self._activations.shown(payloads[batch]):
                return lockstep.call(batch, function, *payloads[batch])

        assert self.config.reconstruct
        with self._solver.timed("reconstruction"):
            found = reconstruct(module, names, targets, call_block, self.config.reconstruct)
        self._report.reconstruction[block] = asdict(found)
        return [f"{block}.{name}" for name in names]

    def _solve_together(
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
            tallies = self._collect(chunk, forwards)
            while tallies:
                group, tally = chunk[-len(tallies)], tallies.pop(0)
                for correction, found in self._solve_tally(group, tally, forwards, experts, corrections).items():
                    solved[correction] += found
        return solved

    def _solve_tally(
        self,
        group: Group,
        tally: _Tally,
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
            size = self._solver.statistics.num_bytes(group[0].shape[1], group[0].device)
            if chunk and size > room:
                yield chunk
                chunk = []
            if not chunk:
                room = MEMORY_SHARE * self._processes.least(self._free_memory(group[0].device))
            chunk.append(group)
            room -= size
        if chunk:
            yield chunk

    def _free_memory(self, device: torch.device) -> int:
        """Bytes that may still be taken on the device that computes."""
        free = self._available(device)
        return free if self._max_memory is None else min(free, self._max_memory - held_memory(device))

    def _available(self, device: torch.device) -> int:
        """Bytes that are free on a device, for each of the processes that use it."""
        return available_memory(device) // (self._processes.num_local if device.type == "cpu" else 1)

    def _collect(
        self, groups: Sequence[Group], forwards: Callable[[OnUse], None], kind: type[Statistics] | None = None
    ) -> list[_Tally]:
        """Statistics of the inputs of each group along forwards; of a kind, or that which the solver needs."""
        tallies = [_Tally(self._solver.new_statistics(group[0], kind)) for group in groups]
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


@dataclass
class _Tally:
    """Statistics of the inputs of a group, and the seconds they took."""

    statistics: Statistics
    seconds: float = 0.0
    num_together: int = 0  # tokens that went through a product with all experts


def _forward(model: nn.Module) -> Callable[[Mapping[str, Any]], None]:
    """A function that runs the model on a batch, on the device of its embeddings and without a cache."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    device = execution_device(model)

    def forward(batch: Mapping[str, Any]) -> None:
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        model(**{**inputs, **options})

    return forward


def _num_rows(batch: Mapping[str, Any]) -> int:
    return max(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _shortened(batch: Mapping[str, Any], length: int = 256) -> dict[str, Any]:
    """The start of a batch of tokens, to probe with; batches of other things as they are."""
    if not set(batch) <= {"input_ids", "attention_mask"}:
        return dict(batch)
    return {name: value[:, :length] for name, value in batch.items()}
