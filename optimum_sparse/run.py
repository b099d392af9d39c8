"""One pruning run: what is pruned, in which order, and within which memory."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .allocation import allocate, allocated, describe
from .blocks import Blocks
from .calibration.batches import holds_tokens, num_rows, shortened
from .calibration.interface import is_encoder_decoder
from .config import SparseConfig
from .distributed import Processes
from .estimate import duration, free_memory, held_memory, num_tokens, run_seconds
from .forwards import Forwards
from .matrices import PrunableMatrix, find_blocks, find_matrices, find_weights, unmatched
from .methods import METHODS, fused
from .offload import Residency, execution_device
from .plan import GroupShape, Plan, Workload, make_plan, measure
from .precision import half_penalty
from .progress import Progress
from .quantization import Grid
from .report import SparsityReport
from .resume import Steps, depends_on, digest, fingerprint, kept_allocation
from .sensitivity import excerpt, expected_rises
from .solver import Clock, Group, Solver
from .spill import Activations
from .stages import Stages
from .statistics import GramStatistics, NormStatistics, Statistics
from .trace import Stop, Trace, trace
from .uses import Watched


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
        self._given = batches
        self._blocks = find_blocks(model)
        self._parameters = Watched({w.parameter: w.value for w in find_weights(model) if not w.is_convolution})
        self._residency = Residency(model, self._blocks, self._parameters)
        self._activation_device = activation_device
        self._max_memory = max_memory
        self._solver = Solver(config, report, progress, self._residency, processes)
        self._folder = folder
        self._allocation: list[int] | None = None
        self._forwards = Forwards(model, self._parameters, self._residency, processes, batches)

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
        # Whatever knows the Gram matrix rounds column by column.
        kind = self._solver.statistics
        sweeps = METHODS[self.config.method].sweeps or (rounds and issubclass(kind or Statistics, GramStatistics))
        slow = fused.missing(execution_device(self._model), rounds) if sweeps else None
        self._report.notes += [*([slow] if slow else []), *unmatched(self._model, self.config)]
        seen = self._probe(data_free)
        matrices, self._report.skipped = find_matrices(self._model, self.config, seen, unused_too=data_free)
        head = self._model.get_output_embeddings() if isinstance(self._model, PreTrainedModel) else None
        left_out = "the output embeddings are pruned, too: lm_head is not in ignore"
        self._report.notes += [f"{matrix.name}: {left_out}" for matrix in matrices if matrix.module is head]
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
                "several times, see other tokens in the dense model, or their block puts out no tensor to judge by"
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
            options, data = depends_on(self.config, self._given).values()
            facts = {"model": fingerprint(self._model), "configuration": options}
            digests = {name: digest([json.dumps(fact).encode()]) for name, fact in facts.items()}
            self._processes.check_same({**digests, "calibration data": data})
            if not self._solver.shares_rows:
                self._report.notes.append(f"each process solved all rows: {self.config.method} needs them all")

    def _probe(self, data_free: bool) -> Trace | None:
        """See on short batches which weights are used, in which order, and which share their inputs."""
        batches = map(shortened, self._given)
        try:
            with self._solver.timed("probe"):
                return trace(self._forwards.run, batches, self._model, self._parameters, self._blocks)
        except Exception as error:
            if data_free:
                self._report.notes.append(
                    f"The model does not run on {', '.join(self._given[0])} ({error}): routers were not told "
                    "from other layers and only nn.Linear and Conv1D were found. Pass dataset=[a batch it accepts]."
                )
                return None
            given, taken = ", ".join(self._given[0]), ", ".join(inspect.signature(self._model.forward).parameters)
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
        self._forwards.share_out()
        self._make_plan([*filter(None, groups.values()), *repeated])
        assert self._max_memory is not None
        self._stages = Stages(
            self.config, self._forwards, self._solver, self._report, self._processes, self._max_memory
        )
        if self.config.allocation is not None:
            matrices = self._allocated(matrices, groups, repeated)
            groups, repeated = self._grouped(matrices, seen)
        todo = {stop: [group] if group else [] for stop, group in groups.items()}
        if self.config.true_sequential is False:
            todo = self._by_block(groups, seen)
        steps = self._steps({None: chain(*repeated), **{stop: chain(*members) for stop, members in todo.items()}})
        clock, busy = Clock(), sum(self._report.seconds.values())
        if repeated and None in steps.left:
            # What runs several times per forward is pruned on its inputs in the dense model, from all of its uses.
            self._solver.write(self._stages.solve_together(repeated, self._forwards.whole)[0.0])
            steps.did(None)
        steps.restore(None)
        if self.config.error_correction:  # each batch also runs with the weights before they are pruned
            self._forwards.add_twins()
        with self._forwards.activations:
            self._in_lockstep(groups, todo, steps)
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
            by_loss = self.config.allocation == "loss"
            forwards = self._forwards
            if by_loss:
                forwards = forwards.on(excerpt(forwards.batches, self._processes.count))
            stages = self._stages.along(forwards)
            entered = [stop for stop in groups if stop in self._residency.units]
            known = [*filter(None, groups.values()), *repeated]
            tallies = stages.collect(known, partial(forwards.side_by_side, entered), NormStatistics)
            found = {m.view: tally.statistics for group, tally in zip(known, tallies, strict=True) for m in group}
            inputs = [found.get(matrix.view) for matrix in free]
            with self._solver.timed("allocation"):
                rises = self._expected_rises(forwards, free, inputs) if by_loss else None
                counts = allocate(free, inputs, self.config, rises)
            # Of several processes that of the main one counts, to the bit.
            counts = self._processes.totals(*(count * self._processes.is_main for count in counts))
        self._allocation = counts
        self._report.notes += [describe(free, counts, self.config)] if free else []
        zeros = {matrix.view: count for matrix, count in zip(free, counts, strict=True)}
        return [matrix if matrix.overridden else allocated(matrix, zeros[matrix.view]) for matrix in matrices]

    def _expected_rises(
        self, forwards: Forwards, matrices: Sequence[PrunableMatrix], inputs: Sequence[Statistics | None]
    ) -> list[float]:
        """What the loss is expected to rise by with each matrix, from the batches of all processes."""
        group = self.config.comparison_group or METHODS[self.config.method].group
        # A batch has the seed that it would have in one process.
        first, step = self.config.seed + self._processes.index, self._processes.count
        seeds = range(first, first + step * len(forwards.batches), step)
        decoder = is_encoder_decoder(self._model)
        found = expected_rises(forwards.run, forwards.batches, matrices, inputs, group, seeds, decoder)
        rises = torch.tensor(found, dtype=torch.float64, device=self._processes.device)
        self._processes.sum_(rises)
        if not rises.any() and any(matrix.pattern.sparsity for matrix in matrices):
            raise ValueError(
                "allocation='loss' found nothing that the loss depends on: what the model puts out is a single number "
                "for each sample, or the batches hold nothing but padding. Choose allocation='error'."
            )
        return rises.tolist()

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
        batches = self._forwards.batches
        batch = shortened(batches[0])
        short, tokens = num_tokens(batch), self._processes.most(sum(map(num_tokens, batches)))
        with self._solver.timed("probe") as clock:
            # The probe has paid for warming up.
            footprint = measure(self._forwards.run, batch, short, self._parameters, self._model, self._blocks)
            seconds = clock.elapsed
        # Batches of other processes may be routed otherwise, and all are to come to the same plan.
        footprint = footprint.of_all(self._processes.most)
        self._residency.settle()
        numbers = [GroupShape.of(group, footprint) for group in groups]
        largest = max(batches, key=num_tokens)
        rows = self._processes.most(num_rows(largest))
        held = self._processes.most(held_memory(device))
        files = self._folder if self._folder is not None and self._folder.is_dir() else Path(tempfile.gettempdir())
        work = Workload(
            groups=numbers,
            tokens=tokens,
            batch_rows=rows,
            row_tokens=self._processes.most(-(-num_tokens(largest) // num_rows(largest))),
            footprint=footprint,
            held=held,
            units=self._processes.most(self._residency.most_bytes),
            cpu=None if device.type == "cpu" else free_memory(torch.device("cpu"), self._processes),
            disk=self._processes.least(shutil.disk_usage(files).free // self._processes.num_local),
            in_parts=all(map(holds_tokens, batches)),
        )
        room = held + free_memory(device, self._processes)
        self._max_memory = room if self._max_memory is None else self._max_memory
        self.plan = plan = make_plan(work, self.config, self._max_memory, self._activation_device)
        if not plan.true_sequential:
            self.config = replace(self.config, true_sequential=False)
        self._forwards.activations = Activations(plan.activation_device, self._folder, self._processes.index)
        if plan.batch_rows < rows:
            self._forwards.split(plan.batch_rows)
        time = duration(run_seconds(numbers, tokens, seconds * tokens / short, self.config))
        self._progress.say(f"{sum(map(len, groups))} matrices, {tokens:,} calibration tokens: about {time}\n{plan}")
        dtype = groups[0][0].parameter.dtype
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and (slow := half_penalty(dtype)) > 2:
            self._progress.say(
                f"This CPU takes {slow:.0f} times as long for products in {dtype} as in float32: loaded with "
                "dtype=torch.float32 (--dtype float32), the model is pruned sooner, in twice the memory."
            )

    def _by_block(self, groups: Mapping[Stop, Group], seen: Trace) -> dict[Stop, list[Group]]:
        """As the papers' code: all matrices of a block see the inputs they have before any of them is pruned."""
        todo: dict[Stop, list[Group]] = {}
        for stop, group in groups.items():
            if stop in self._blocks:
                todo.setdefault(stop, [])
            for block in dict.fromkeys(seen.blocks[matrix.view] for matrix in group):
                members = [matrix for matrix in group if seen.blocks[matrix.view] == block]
                todo.setdefault(stop if block is None else block, []).append(members)
        return todo

    def _in_lockstep(self, groups: Mapping[Stop, Group], todo: Mapping[Stop, Sequence[Group]], steps: Steps) -> None:
        """Forwards that stop for each stage.

        Args:
            groups: What receives a new input at each stop; nothing where experts or blocks are entered.
            todo: Where to stop, and what is to be pruned there.
            steps: Which of them are still to be done.
        """
        experts = [stop for stop in groups if isinstance(stop, str) and stop not in self._blocks]
        everywhere = bool(self._forwards.num_twins)
        stops = [stop for stop in todo if everywhere or stop in steps.left or stop in self._residency.units]
        parked: dict[Stop, Group] = {
            stop: group for stop in stops if not isinstance(stop, str) for group in todo[stop]
        }
        blocks = Blocks(
            self._blocks,
            self.config,
            self._forwards,
            self._stages,
            self._solver,
            self._residency,
            self._report,
            self._processes,
        )
        with self._forwards.lockstep(stops, parked) as lockstep:
            lockstep.late.update(steps.late)
            steps.late = lockstep.late
            for stop, calls in lockstep:
                self._residency.settle()
                steps.come_to(stop)
                if stop not in steps.left:
                    lockstep.go_on(twin.batch for twin in self._forwards.apart(calls)[1].values())
                    steps.restore(stop)
                elif stop in parked:
                    self._stages.solve_parked(lockstep, parked[stop], calls)
                elif stop in experts:
                    self._stages.feed_experts(lockstep, str(stop), calls, parked)
                else:
                    trained = blocks.solve(lockstep, str(stop), calls, todo[stop], experts)
                    steps.trained |= dict.fromkeys(trained, stop)
                steps.did(stop)
        for stop, batches in steps.all_late().items():
            late = f"{batches} of {self._forwards.num_batches} batches came to it"
            for matrix in chain(*todo[stop]):
                self._report.notes.append(f"{matrix.name}: {late} only after it was pruned and do not count")
