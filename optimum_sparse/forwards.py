"""The calibration batches, and the ways that they take through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .calibration.batches import num_rows, split_rows, usable
from .calibration.interface import is_encoder_decoder, without_cache
from .distributed import Processes
from .lockstep import Call, Lockstep
from .matrices import PrunableMatrix, text_models
from .offload import Residency, execution_device
from .padding import Padding
from .reconstruction import hidden_states
from .spill import Activations
from .trace import Stop
from .uses import Use, Watched, WeightUses, at_entries

# Called with the index of a batch and a use in its forward.
OnUse = Callable[[int, Use], None]


class Forwards:
    """Runs the model on calibration batches: to their end, to stops on the way, or one module of it.

    Args:
        model: The model.
        parameters: The weights whose uses are told of.
        residency: Brings in what is offloaded.
        processes: Those among which batches are shared out.
        batches: Those of all processes.

    Attributes:
        model: The model.
        batches: The batches, of this process once they are shared out.
        paddings: Tells what in each of them is padding.
        activations: Where those of waiting batches are.
        num_batches: How many all processes have.
        num_twins: So many of the batches, the last ones, are the others once more, to run with dense weights.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Watched,
        residency: Residency,
        processes: Processes,
        batches: Sequence[Mapping[str, Any]],
    ) -> None:
        self.model = model
        self._parameters = parameters
        self._residency = residency
        self._processes = processes
        self._text = text_models(model)
        self._device = execution_device(model)
        self._options = without_cache(model)
        self.activations = Activations(None)
        self.num_twins = 0
        self._set(batches)

    def _set(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self.batches = batches
        self.paddings = [Padding.of(batch, is_encoder_decoder(self.model)) for batch in batches]

    def _count(self) -> None:
        (self.num_batches,) = self._processes.totals(len(self.batches))

    def share_out(self) -> None:
        """Of the batches, keep those of this process.

        Raises:
            ValueError: They are fewer than the processes.
        """
        count = self._processes.count
        if len(self.batches) < count:
            self.split(max(1, sum(map(num_rows, self.batches)) // count))
        if len(self.batches) < count:
            raise ValueError(
                f"{len(self.batches)} calibration batches cannot be shared out to {count} processes: give more "
                "samples, or in smaller batches, or launch fewer processes."
            )
        self._set(self.batches[self._processes.index :: count])
        self._count()

    def split(self, size: int) -> None:
        """Split batches into such of at most so many rows."""
        self._set([part for batch in self.batches for part in split_rows(batch, size)])
        self._count()

    def add_twins(self) -> None:
        """Let each batch also run with the weights before they are pruned."""
        self.num_twins = len(self.batches)
        self._set([*self.batches, *self.batches])

    def apart(self, calls: Sequence[Call]) -> tuple[list[Call], dict[int, Call]]:
        """The calls of calibration batches, and for each of these that of its twin, if any."""
        first = len(self.batches) - self.num_twins
        return [c for c in calls if c.batch < first], {c.batch - first: c for c in calls if c.batch >= first}

    def on(self, batches: Sequence[Mapping[str, Any]]) -> Forwards:
        """The same for other batches of this process."""
        other = Forwards(self.model, self._parameters, self._residency, self._processes, batches)
        other._count()
        return other

    def run(self, batch: Mapping[str, Any]) -> Any:
        """What the model puts out for a batch, on the device of its embeddings and without a cache."""
        inputs = {k: v.to(self._device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return self.model(**{**usable(inputs), **self._options})

    def whole(self, on_use: OnUse) -> None:
        """Run the model on one batch after the other."""
        for index, batch in enumerate(self.batches):
            with self._watching(index, partial(on_use, index)):
                self.run(batch)

    def side_by_side(self, entered: Sequence[Stop], on_use: OnUse) -> None:
        """Run the model on all batches, together where they enter some blocks, so that each comes in once."""
        end: Stop = ()  # no batch comes there, so that all of them run to their end
        with self.activations, self.lockstep([*entered, end], {}, on_use) as lockstep:
            for _ in lockstep:
                self._residency.settle()

    @contextmanager
    def lockstep(
        self, stops: Iterable[Stop], groups: Mapping[Stop, Sequence[PrunableMatrix]], on_use: OnUse | None = None
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
            with self._watching(index, partial(see, index)), self.activations.computing(index):
                self.run(self.batches[index])

        lockstep = Lockstep(
            forward, len(self.batches), stops, self.activations.away, self._processes.least, self.num_twins
        )
        entered = {name: partial(lockstep.park, name) for name in stops if isinstance(name, str)}
        with self._residency.forwards(len(self.batches)), at_entries(self.model, entered), lockstep:
            yield lockstep

    def run_parked(self, lockstep: Lockstep, module: nn.Module, call: Call, on_use: OnUse | None = None) -> Any:
        """What a module puts out for a batch that is parked at its entry."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._watching(call.batch, partial(on_use or _nothing, call.batch)):
                return module(*args, **kwargs)

        with self.activations.shown(call.payload):
            return hidden_states(lockstep.call(call.batch, run, *call.payload))

    def tokens(self, batch: int, use: Use) -> torch.Tensor | None:
        """Which of the inputs of a use are no padding, `[tokens]` bool; `None` if all are.

        Raises:
            ValueError: It cannot be told.
        """
        return self._tokens(batch, use.view.parameter, use.inputs, use.view.part)

    def tokens_behind(self, block: str, batch: int, output: torch.Tensor) -> torch.Tensor | None:
        """Which of the hidden states that a block puts out are no padding, as `tokens`."""
        return self._tokens(batch, block, output)

    def _tokens(self, batch: int, name: str, states: torch.Tensor, part: int = 0) -> torch.Tensor | None:
        # The padding of a text says nothing about the images beside it.
        if self._text and not any(name.startswith(f"{text}.") for text in self._text):
            return None
        try:
            return self.paddings[batch].keep(states, part)
        except ValueError as error:
            raise ValueError(f"{name}: {error}.") from error

    def _watching(self, index: int, on_use: Callable[[Use], None]) -> WeightUses:
        """A context that reports uses in the forward of a batch."""
        padding = self.paddings[index]
        if not padding:
            return WeightUses(self._parameters, on_use)

        def note(use: Use) -> None:
            padding.saw_use(use.inputs, use.view.part)
            on_use(use)

        return WeightUses(self._parameters, note, padding.saw_call)


def _nothing(batch: int, use: Use) -> None:
    """What is done with a use that nobody wants to see."""
