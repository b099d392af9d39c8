"""A block as a whole: pruned on the inputs that its matrices have before, corrected, and trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from .config import SparseConfig
from .distributed import Processes
from .experts import Experts
from .forwards import Forwards, OnUse
from .lockstep import Call, Lockstep
from .matrices import PrunableMatrix
from .offload import Residency
from .reconstruction import HELD_OUT, reconstruct, relative_error
from .report import SparsityReport
from .solver import Group, Solved, Solver
from .stages import Stages
from .uses import Arguments, Use, View, at_entries


class Blocks:
    """Prunes the blocks at whose entry batches are parked.

    Args:
        names: Those of all blocks.
        config: How to prune.
        forwards: Run the blocks.
        stages: Prunes the groups of a block together.
        solver: Writes what was chosen.
        residency: Keeps a block in memory meanwhile.
        report: Has what correction and training gave.
        processes: Those that have parts of the batches.
    """

    def __init__(
        self,
        names: Collection[str],
        config: SparseConfig,
        forwards: Forwards,
        stages: Stages,
        solver: Solver,
        residency: Residency,
        report: SparsityReport,
        processes: Processes,
    ) -> None:
        self._names = names
        self._config = config
        self._forwards = forwards
        self._stages = stages
        self._solver = solver
        self._residency = residency
        self._report = report
        self._processes = processes

    def solve(
        self, lockstep: Lockstep, block: str, calls: Sequence[Call], groups: Sequence[Group], entries: Sequence[str]
    ) -> list[str]:
        """Prune the matrices of a block, all on the inputs that they have before.

        Args:
            lockstep: The forwards.
            block: Name of the block.
            calls: The batches that are parked at its entry.
            groups: Its matrices that share their inputs.
            entries: Names of modules of experts, in this block or others.

        Returns:
            Names of the parameters that were trained besides.
        """
        entered: dict[str, dict[int, Arguments]] = {name: {} for name in entries if f"{name}.".startswith(f"{block}.")}
        module, outputs, dense_outputs = self._forwards.model.get_submodule(block), {}, {}
        calls, twins = self._forwards.apart(calls)
        # To see what the correction is worth; the same ones however many processes there are.
        number = {call.batch: call.batch * self._processes.count + self._processes.index for call in calls}
        held_out = {batch for batch in number if self._forwards.num_batches > 1 and number[batch] % HELD_OUT == 0}
        judging = held_out if self._forwards.num_batches > 1 else set(number)  # a single batch, better than none

        first = {matrix.view: group[0].view for group in groups for matrix in group}

        def forwards(on_use: OnUse) -> None:
            for call in calls:
                notes = {name: partial(batches.setdefault, call.batch) for name, batches in entered.items()}
                dense, target = self._dense_run(lockstep, module, twins.get(call.batch), first)
                if target is not None and call.batch in judging:
                    dense_outputs[call.batch] = target.clone()  # what the batch owns may go away when it goes on

                def pair(batch: int, use: Use, dense: Mapping[View, torch.Tensor] = dense) -> None:
                    twin = dense.get(first[use.view]) if use.view in first else None
                    on_use(batch, use if batch in held_out else self._stages.paired(batch, use, twin))

                with at_entries(self._forwards.model, notes):
                    output = self._forwards.run_parked(lockstep, module, call, pair)
                if self._config.reconstruct and isinstance(output, torch.Tensor):
                    part = 0.0 if target is None else self._config.error_correction or 0.0
                    outputs[call.batch] = output if target is None else output.lerp(target, part)

        @cache
        def modules() -> list[Experts]:
            num_entered = self._processes.totals(*map(len, entered.values()))
            return [
                self._stages.experts(lockstep, name, batches)
                for (name, batches), number in zip(entered.items(), num_entered, strict=True)
                if number
            ]

        def experts(matrix: PrunableMatrix) -> Experts | None:
            return next((module for module in modules() if matrix.is_part and module.hold(matrix.view)), None)

        with self._residency.holding(matrix.view.parameter for group in groups for matrix in group):
            corrections = [0.0, self._config.error_correction] if self._config.error_correction else [0.0]
            candidates = self._stages.solve_together(groups, forwards, experts, corrections)
            lockstep.go_on(twin.batch for twin in twins.values())
            judges = [call for call in calls if call.batch in dense_outputs]
            self._solver.write(self._best(lockstep, block, candidates, judges, dense_outputs))
            if self._config.reconstruct and groups and calls and not outputs:
                self._report.notes.append(f"{block} was not trained: it puts out no tensor")
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
        module, errors = self._forwards.model.get_submodule(block), {}
        (count,) = self._processes.totals(len(calls))
        if not count:
            return candidates[0.0]
        for correction, solved in candidates.items():
            for one in solved:
                one.matrix.write(one.weight)
            error = torch.zeros((), dtype=torch.float64, device=self._processes.device)
            for call in calls:
                output = self._forwards.run_parked(lockstep, module, call)
                target = targets[call.batch]
                keep = self._forwards.tokens_behind(block, call.batch, target)
                error += relative_error(output, target, keep).to(error)
            self._processes.sum_(error)
            errors[correction] = error.item() / max(count, 1)
        best = min(errors, key=lambda correction: (errors[correction], -correction))
        self._report.correction[block] = {"before": errors[0.0], "after": errors[best], "correction": best}
        return candidates[best]

    def _dense_run(
        self, lockstep: Lockstep, module: nn.Module, call: Call | None, wanted: Mapping[View, View]
    ) -> tuple[dict[View, torch.Tensor], torch.Tensor | None]:
        """What a block has in the dense model: inputs, by the first of the matrices that share them, and output."""
        inputs: dict[View, torch.Tensor] = {}
        if call is None:
            return inputs, None

        def keep(batch: int, use: Use) -> None:
            if use.view in wanted and wanted[use.view] not in inputs:
                inputs[wanted[use.view]] = use.inputs.clone()  # the block may write to them when they have been used

        output = self._forwards.run_parked(lockstep, module, call, keep)
        return inputs, output if isinstance(output, torch.Tensor) else None

    def _reconstruct(
        self,
        lockstep: Lockstep,
        block: str,
        calls: Sequence[Call],
        groups: Sequence[Group],
        targets: Mapping[int, torch.Tensor],
    ) -> list[str]:
        """Train a block that has been pruned, and return the names of the parameters that were trained."""
        module, payloads = self._forwards.model.get_submodule(block), {call.batch: call.payload for call in calls}
        pruned = {matrix.view.parameter for group in groups for matrix in group}
        uses = Counter(id(p) for name in self._names for p in self._forwards.model.get_submodule(name).parameters())
        names = [
            name
            for name, parameter in module.named_parameters()
            if parameter.is_floating_point() and uses[id(parameter)] == 1
            if parameter.dim() == 1 or f"{block}.{name}" in pruned
        ]

        def call_block(batch: int, function: Callable[..., Any]) -> Any:
            with self._forwards.activations.shown(payloads[batch]):
                return lockstep.call(batch, function, *payloads[batch])

        assert self._config.reconstruct
        with self._solver.timed("reconstruction"):
            tokens = partial(self._forwards.tokens_behind, block)
            found = reconstruct(module, names, targets, call_block, self._config.reconstruct, tokens)
        self._report.reconstruction[block] = asdict(found)
        return [f"{block}.{name}" for name in names]
