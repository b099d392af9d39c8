"""One pruning run: collects statistics along the forwards, solves, writes the weights and reports."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .calibration import Calibration
from .config import SparseConfig
from .estimate import Estimate
from .lockstep import Lockstep, Trace, module_input, trace
from .matrices import PrunableMatrix
from .methods import METHODS, Solution
from .progress import Progress
from .report import MatrixReport, SparsityReport
from .statistics import Statistics

logger = logging.getLogger(__name__)

# Stacks of up to this many weights are solved on one CPU thread. Sharing out operations of a few microseconds gains
# little, and costs milliseconds each as soon as another process holds one of the cores.
ONE_THREAD = 2**22


class PruningRun:
    """One pruning run: how statistics are collected, and what is done with them."""

    def __init__(self, config: SparseConfig, report: SparsityReport, progress: Progress) -> None:
        self.config = config
        self.report = report
        self.progress = progress
        self.method = METHODS[config.method]

    def prune_calibrated(
        self, model: PreTrainedModel, matrices: list[PrunableMatrix], calibration: Calibration
    ) -> None:
        """Prune with calibration data."""
        self.batches = calibration.batches
        self.forward = _forward(model)
        owners = {module: matrix for matrix in matrices for module in matrix.modules}
        plan, estimate = self._probe(owners)
        self.progress.say(str(estimate))
        self._repeated(plan.repeated)

        started, busy = time.perf_counter(), sum(self.report.seconds.values())
        if self.config.true_sequential:
            self._by_group(plan)
        else:
            self._by_block(model, plan)
        elapsed, busy = time.perf_counter() - started, sum(self.report.seconds.values()) - busy
        self.spend("forward", elapsed - busy)
        done = {entry.name for entry in self.report.matrices}
        for matrix in matrices:
            if matrix.name not in done:
                self.report.skipped[matrix.name] = "did not run on the calibration data, or only past its first tokens"

    def solve(self, group: Sequence[PrunableMatrix], statistics: Statistics | None, seconds: float = 0.0) -> None:
        """Prune matrices that share their inputs, write them, and report."""
        started = time.perf_counter()
        for pattern in dict.fromkeys(matrix.pattern for matrix in group):
            stack = [matrix for matrix in group if matrix.pattern == pattern]
            # The caller may have autocast on for the model's sake; the solver works in fp32.
            with torch.autocast(stack[0].parameter.device.type, enabled=False), _threads_for(stack):
                solutions, errors = self._solve_stack(stack, statistics)
            for matrix, solution, error in zip(stack, solutions, errors, strict=True):
                matrix.write(solution.weight)
                spent = (time.perf_counter() - started + seconds) / len(group)
                self._report(matrix, solution, error, statistics, spent)
        self.spend("solve", time.perf_counter() - started)

    def _solve_stack(
        self, stack: Sequence[PrunableMatrix], statistics: Statistics | None
    ) -> tuple[list[Solution], list[float | None]]:
        names = ", ".join(matrix.name for matrix in stack)
        weight = torch.cat([matrix.read().float() for matrix in stack])
        if not weight.isfinite().all():
            raise ValueError(f"The weights of {names} contain NaN or infinity: the checkpoint is damaged.")
        if statistics is not None and not statistics.squared_norms.isfinite().all():
            raise ValueError(
                f"The inputs of {names} contain NaN or infinity: load the model in bfloat16 or float32 instead of "
                "float16, and check that its weights and the calibration data are sound."
            )
        rows = [matrix.shape[0] for matrix in stack]
        try:
            solution = self.method.solve(weight, statistics, stack[0].pattern, self.config, rows)
        except ValueError as error:
            raise ValueError(f"{names}: {error}.") from error
        errors: list[float | None] = [None] * len(stack)
        if statistics is not None:
            written = solution.weight.to(stack[0].parameter.dtype).float()
            lost, energy = statistics.output_energy(weight - written), statistics.output_energy(weight)
            errors = [
                (part.sum() / whole.sum().clamp(min=torch.finfo(torch.float32).tiny)).item()
                for part, whole in zip(lost.split(rows), energy.split(rows), strict=True)
            ]
        parts = zip(solution.weight.split(rows), solution.mask.split(rows), strict=True)
        return [Solution(part, mask, solution.damping) for part, mask in parts], errors

    def _report(
        self,
        matrix: PrunableMatrix,
        solution: Solution,
        error: float | None,
        statistics: Statistics | None,
        seconds: float,
    ) -> None:
        notes = []
        if solution.damping is not None and solution.damping > self.config.dampening_frac:
            notes.append(f"damping was raised from {self.config.dampening_frac:g} to {solution.damping:g} to factor")
        if statistics is not None and not statistics.squared_norms.any():
            notes.append(f"its inputs were zero on all {statistics.num_tokens} calibration tokens")
        for note in notes:
            logger.warning("%s: %s.", matrix.name, note)
        entry = MatrixReport(
            name=matrix.name,
            block=matrix.block,
            shape=matrix.shape,
            pattern=str(matrix.pattern),
            zeros=int((matrix.read() == 0).sum()),
            numel=matrix.parameter.numel(),
            error=error,
            num_tokens=0 if statistics is None else statistics.num_tokens,
            damping=solution.damping,
            seconds=seconds,
            notes=tuple(notes),
        )
        self.report.matrices.append(entry)
        self.progress.step(entry)

    def _probe(self, owners: dict[nn.Module, PrunableMatrix]) -> tuple[Trace[PrunableMatrix], Estimate]:
        """See on short batches in which order layers run and which share their inputs, and how long that takes."""
        started = time.perf_counter()
        plan = trace(self.forward, map(_shortened, self.batches), owners)
        batch = _shortened(self.batches[0])
        second = time.perf_counter()
        self.forward(batch)  # the first forward paid for warming up
        estimate = Estimate.of(plan, self.batches, batch, time.perf_counter() - second, self.config)
        self.spend("probe", time.perf_counter() - started)
        return plan, estimate

    def _repeated(self, matrices: Sequence[PrunableMatrix]) -> None:
        """Prune what runs several times per forward, on its inputs in the dense model from all its uses."""
        if not matrices:
            return
        collector = _Collector([[matrix] for matrix in matrices], self)
        for index, batch in enumerate(self.batches):
            with collector.watching(index):
                self.forward(batch)
        self.spend("forward", collector.forward_seconds)
        for members, statistics, seconds in collector.results():
            self.solve(members, statistics, seconds)

    def _by_group(self, plan: Trace[PrunableMatrix]) -> None:
        """Fully sequential: stop wherever matrices receive a new input."""
        groups = {plan.users[group[0]]: group for group in plan.groups}
        with Lockstep(self.forward, self.batches, list(groups)) as lockstep:
            for stop, calls in lockstep:
                group = groups[stop]
                started = time.perf_counter()
                statistics = self.new_statistics(group[0])
                for call in calls:
                    self.add(group[0], statistics, module_input(call.args, call.kwargs), call.batch)
                self.spend("statistics", seconds := time.perf_counter() - started)
                self.solve(group, statistics, seconds)

    def _by_block(self, model: nn.Module, plan: Trace[PrunableMatrix]) -> None:
        """As the papers' code: all matrices of a block see the inputs they have before any of them is pruned."""
        names = dict.fromkeys(matrix.block for group in plan.groups for matrix in group)
        within = {module: name for name in names for module in model.get_submodule(name).modules()}
        blocks: dict[str, list[Sequence[PrunableMatrix]]] = {}
        for group in plan.groups:
            for block in dict.fromkeys(within[plan.users[matrix]] for matrix in group):
                members = [matrix for matrix in group if within[plan.users[matrix]] == block]
                blocks.setdefault(block, []).append(members)
        stops = {model.get_submodule(name): groups for name, groups in blocks.items()}
        with Lockstep(self.forward, self.batches, list(stops)) as lockstep:
            for stop, calls in lockstep:
                collector = _Collector(stops[stop], self)
                for call in calls:
                    with collector.watching(call.batch):
                        lockstep.run_stop(call, stop)
                for alike, statistics, seconds in collector.results():
                    if statistics.num_tokens:
                        self.solve(alike, statistics, seconds)

    def new_statistics(self, matrix: PrunableMatrix) -> Statistics:
        """Empty statistics for the inputs of a matrix."""
        assert self.method.statistics is not None
        return self.method.statistics(matrix.shape[1], matrix.parameter.device)

    def add(self, matrix: PrunableMatrix, statistics: Statistics, inputs: torch.Tensor, batch: int) -> None:
        """Add the inputs of a matrix on one batch to its statistics, without the batch's padding."""
        mask = self.batches[batch].get("attention_mask")
        flat = inputs.reshape(-1, inputs.shape[-1])
        # A mask with more dimensions says who attends to whom, not what is padding.
        if mask is not None and mask.ndim == 2 and not mask.all():
            if inputs.shape[:-1] not in (mask.shape, (mask.numel(),)):
                raise ValueError(
                    f"The inputs of {matrix.name}, of shape {tuple(inputs.shape)}, cannot be matched with the padding "
                    f"mask of shape {tuple(mask.shape)}: pass calibration data without padding."
                )
            flat = flat[mask.reshape(-1).bool().to(flat.device)]
        # Between the devices of a device_map, inputs are moved only once the layer's own forward begins.
        statistics.add(flat.to(matrix.parameter.device))

    def spend(self, phase: str, seconds: float) -> None:
        """Add to the time of a phase."""
        self.report.seconds[phase] = self.report.seconds.get(phase, 0.0) + seconds


class _Collector:
    """Collects the statistics of groups of matrices while something that contains them runs."""

    def __init__(self, groups: Sequence[Sequence[PrunableMatrix]], run: PruningRun) -> None:
        self._run = run
        self._groups = list(groups)
        self._statistics = [run.new_statistics(group[0]) for group in groups]
        self._seconds = [0.0] * len(groups)
        self.forward_seconds = 0.0

    @contextmanager
    def watching(self, batch: int) -> Iterator[None]:
        """While the body runs batch `batch`, add the inputs of each group's first matrix to its statistics."""

        def hook(index: int) -> Callable[..., None]:
            def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                began = time.perf_counter()
                self._run.add(self._groups[index][0], self._statistics[index], module_input(args, kwargs), batch)
                self._seconds[index] += time.perf_counter() - began

            return add

        handles = [
            module.register_forward_pre_hook(hook(index), with_kwargs=True)
            for index, group in enumerate(self._groups)
            for module in group[0].modules
        ]
        started, spent = time.perf_counter(), sum(self._seconds)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        spent = sum(self._seconds) - spent
        self._run.spend("statistics", spent)
        self.forward_seconds += time.perf_counter() - started - spent

    def results(self) -> Iterator[tuple[Sequence[PrunableMatrix], Statistics, float]]:
        """Each group, its statistics and the seconds they took; the collector lets go of them."""
        for group, seconds in zip(self._groups, self._seconds, strict=True):
            yield group, self._statistics.pop(0), seconds


@contextmanager
def _threads_for(stack: Sequence[PrunableMatrix]) -> Iterator[None]:
    """As many CPU threads as solving the stacked matrices can use."""
    threads = torch.get_num_threads()
    if sum(matrix.parameter.numel() for matrix in stack) <= ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _forward(model: PreTrainedModel) -> Callable[[Mapping[str, Any]], None]:
    """A function that runs the model on a batch, on the device of its embeddings and without a cache."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    device = next(model.parameters()).device

    def forward(batch: Mapping[str, Any]) -> None:
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        model(**{**inputs, **options})

    return forward


def _shortened(batch: Mapping[str, Any], length: int = 256) -> dict[str, Any]:
    """The start of a batch of tokens, to probe with; batches of other things as they are."""
    if not set(batch) <= {"input_ids", "attention_mask"}:
        return dict(batch)
    return {name: value[:, :length] for name, value in batch.items()}
