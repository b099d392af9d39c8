"""From matrices and the statistics of their inputs to new weights in the model and entries in the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from .config import SparseConfig
from .distributed import Processes
from .matrices import PrunableMatrix
from .methods import METHODS, Solution, statistics_for
from .methods.correction import corrected_target
from .methods.quantize import quantize
from .methods.refine import refine
from .methods.rescale import rescale
from .methods.threads import one_thread
from .offload import Residency
from .patterns import Pattern, SharedRows
from .precision import full_precision
from .progress import Progress
from .quantization import Grid
from .report import MatrixReport, SparsityReport
from .statistics import GramStatistics, PairedStatistics, Statistics

logger = logging.getLogger(__name__)

# Stacks of up to this many weights are solved on one CPU thread.
ONE_THREAD = 2**22

# Matrices that share their inputs.
Group = Sequence[PrunableMatrix]


@dataclass(frozen=True)
class Solved:
    """A matrix, its new weight in the model's dtype, what the report says of it, and the grid it was rounded to."""

    matrix: PrunableMatrix
    weight: torch.Tensor
    entry: MatrixReport
    grid: Grid | None


class Solver:
    """Solves and writes matrices, and keeps the record of it."""

    def __init__(
        self,
        config: SparseConfig,
        report: SparsityReport,
        progress: Progress,
        residency: Residency,
        processes: Processes,
    ) -> None:
        self.statistics = statistics_for(config)
        self._method = METHODS[config.method]
        self._config = config
        self._report = report
        self._progress = progress
        self._residency = residency
        self._processes = processes
        self.grids: dict[str, Grid] = {}

    @property
    def shares_rows(self) -> bool:
        """Whether processes can each solve some of the rows."""
        return self._method.apart

    def new_statistics(self, matrix: PrunableMatrix, kind: type[Statistics] | None = None) -> Statistics:
        """Empty statistics for the inputs of a matrix, of a kind or that which the method needs."""
        kind = kind or self.statistics
        assert kind is not None
        equal_tokens = self._method.equal_tokens if self._config.equal_tokens is None else self._config.equal_tokens
        return kind(matrix.shape[1], matrix.device, equal_tokens)

    def solve(
        self,
        group: Group,
        statistics: Statistics | None,
        seconds: float = 0.0,
        layer_share: float = 0.0,
        correction: float = 0.0,
    ) -> list[Solved]:
        """Prune matrices that share their inputs, without writing them yet.

        Args:
            group: The matrices.
            statistics: Of their inputs, or `None` for a method that needs none.
            seconds: What the statistics took.
            layer_share: The share in the statistics of an expert that those of its layer have.
            correction: How much of the errors in the inputs to make up for; needs `PairedStatistics`.
        """
        solved = []
        with self.timed("solve") as clock, self._residency.holding(matrix.view.parameter for matrix in group):
            alike: dict[tuple[Pattern, torch.dtype], list[PrunableMatrix]] = {}
            for matrix in group:
                alike.setdefault((matrix.pattern, matrix.parameter.dtype), []).append(matrix)
            for stack in alike.values():
                begun = clock.elapsed
                # The caller may have autocast on for the model's sake; the solver works in fp32.
                with torch.autocast(stack[0].device.type, enabled=False), full_precision(), self._threads_for(stack):
                    solutions, errors = self._solve_stack(stack, statistics, correction)
                own = (clock.elapsed - begun) / len(stack)
                for matrix, solution, error in zip(stack, solutions, errors, strict=True):
                    weight = solution.weight
                    spent = own + seconds / len(group)
                    entry = self._entry(matrix, weight, solution, error, statistics, spent, layer_share, correction)
                    solved.append(Solved(matrix, weight, entry, solution.grid))
        return solved

    def write(self, solved: Sequence[Solved]) -> None:
        """Write new weights to the model and their entries to the report."""
        for one in solved:
            with self._residency.holding([one.matrix.view.parameter]):
                one.matrix.write(one.weight)
            self._report.matrices.append(one.entry)
            if one.grid is not None:
                self.grids[one.matrix.name] = one.grid.to("cpu")
            self._progress.step(one.entry)
            for note in one.entry.notes if self._processes.is_main else ():
                logger.warning("%s: %s.", one.matrix.name, note)

    @contextmanager
    def timed(self, phase: str) -> Iterator[Clock]:
        """Add the time that the body takes to a phase."""
        clock = Clock()
        try:
            yield clock
        finally:
            self.spend(phase, clock.elapsed)

    def spend(self, phase: str, seconds: float) -> None:
        """Add to the time of a phase."""
        self._report.seconds[phase] = self._report.seconds.get(phase, 0.0) + seconds

    def _threads_for(self, stack: Sequence[PrunableMatrix]) -> AbstractContextManager[None]:
        """As many CPU threads as solving the stacked matrices can use."""
        small = sum(matrix.numel for matrix in stack) <= ONE_THREAD
        return one_thread() if small and not self._method.parallel and not self._config.refine else nullcontext()

    def _solve_stack(
        self, stack: Sequence[PrunableMatrix], statistics: Statistics | None, correction: float
    ) -> tuple[list[Solution], list[float | None]]:
        """Solve stacked matrices: solutions in the model's dtype, and the relative errors of their outputs."""
        names = ", ".join(matrix.name for matrix in stack)
        weight = torch.cat([matrix.read().float() for matrix in stack])
        if not weight.isfinite().all():
            raise ValueError(f"The weights of {names} contain NaN or infinity: the checkpoint is damaged.")
        if statistics is not None and not statistics.squared_norms.isfinite().all():
            raise ValueError(
                f"The inputs of {names} contain NaN or infinity: load the model in bfloat16 or float32 instead of "
                "float16, and check that its weights and the calibration data are sound."
            )
        sizes = tuple(matrix.shape[0] for matrix in stack)
        rows: Sequence[int] = sizes
        gather = partial(self._processes.gather, rows=len(weight)) if self._is_shared(len(weight)) else None
        if gather is not None:
            rows = SharedRows(sizes, self._processes.share(len(weight)), gather)
            weight = weight[rows.own]
        energy = None if statistics is None else statistics.output_energy(weight)
        try:
            target = weight
            if correction:
                assert isinstance(statistics, PairedStatistics)
                if not statistics.deviation.isfinite().all():
                    raise ValueError(
                        "the inputs in the dense model contain NaN or infinity: load it in bfloat16 or float32, or "
                        "leave out error_correction"
                    )
                target = corrected_target(weight, statistics, correction)
            solution = self._method.solve(target, statistics, stack[0].pattern, self._config, rows)
            if self._config.refine:
                assert isinstance(statistics, GramStatistics)
                solution = refine(self._config.refine, solution, target, statistics, stack[0].pattern, self._config)
            if self._config.quantization and solution.grid is None:
                solution = quantize(solution, statistics, stack[0].pattern, self._config)
            # After rounding, which makes outputs smaller as well.
            if self._method.rescale if self._config.rescale is None else self._config.rescale:
                assert statistics is not None and energy is not None
                solution = rescale(solution, energy, statistics)
        except ValueError as error:
            raise ValueError(f"{names}: {error}.") from error
        errors: list[float | None] = [None] * len(stack)
        solution = replace(solution, weight=solution.weight.to(stack[0].parameter.dtype))
        if statistics is not None and energy is not None:
            lost = statistics.output_energy(weight.sub_(solution.weight))
            if gather is not None:
                energy, lost = gather(energy), gather(lost)
            errors = [
                (part.sum() / whole.sum().clamp(min=torch.finfo(torch.float32).tiny)).item()
                for part, whole in zip(lost.split(sizes), energy.split(sizes), strict=True)
            ]
        if gather is not None:
            solution = solution.gathered(gather)
        parts = zip(solution.weight.split(sizes), solution.mask.split(sizes), strict=True)
        grids = [None] * len(stack) if solution.grid is None else solution.grid.split(sizes)
        solutions = [replace(solution, weight=p, mask=m, grid=g) for (p, m), g in zip(parts, grids, strict=True)]
        return solutions, errors

    def _is_shared(self, num_rows: int) -> bool:
        """Whether so many rows are shared out: if there are some for each process."""
        last = self._processes.share(num_rows, self._processes.count - 1)
        return self._processes.count > 1 and self.shares_rows and last.start < last.stop

    def _entry(
        self,
        matrix: PrunableMatrix,
        weight: torch.Tensor,
        solution: Solution,
        error: float | None,
        statistics: Statistics | None,
        seconds: float,
        layer_share: float,
        correction: float,
    ) -> MatrixReport:
        notes = []
        if solution.damping is not None and solution.damping > self._config.dampening_frac:
            notes.append(f"damping was raised from {self._config.dampening_frac:g} to {solution.damping:g} to factor")
        if statistics is not None and not statistics.squared_norms.any():
            notes.append(f"its inputs were zero on all {statistics.num_tokens} calibration tokens")
        return MatrixReport(
            name=matrix.name,
            block=matrix.block,
            shape=matrix.shape,
            pattern=str(matrix.pattern),
            zeros=int((weight == 0).sum()),
            numel=matrix.numel,
            error=error,
            num_tokens=0 if statistics is None else statistics.num_tokens,
            layer_share=layer_share,
            damping=solution.damping,
            residual=solution.residual,
            seconds=seconds,
            notes=tuple(notes),
            correction=correction if isinstance(statistics, PairedStatistics) and statistics.num_paired else 0.0,
        )


class Clock:
    """Time since it was made."""

    def __init__(self) -> None:
        self._started = _now()

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return _now() - self._started


def _now() -> float:
    """The time once a GPU has done what it was given, which else would count for whoever waits for it next."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
