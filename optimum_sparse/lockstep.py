"""Lockstep forwards: all calibration batches run the model's own forward side by side, layer after layer.

Each batch runs in its own greenlet. Whoever watches the forward parks the batch when it comes to a stop: a product
with a weight, or the entry of a module. When no batch can go on, the caller has the inputs of all of them, changes the
weight, and lets them continue with it. One forward per batch prunes the whole model, every layer seeing inputs that
went through the pruned layers before it, and nothing about the architecture is assumed. There is one OS thread, so
exactly one batch runs at a time.
"""

from __future__ import annotations

import contextvars
import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_map

# Position after that of any stop.
END = 2**62


@dataclass(frozen=True)
class Call:
    """A batch that is parked at a stop, and what it was parked with."""

    batch: int
    payload: Any


class Lockstep:
    """Run one forward per batch, parking all of them at each stop in turn.

        with Lockstep(forward, len(batches), stops) as lockstep:
            for stop, calls in lockstep:
                ...  # all batches that reach `stop` are parked there; change its weights here

    `forward` calls `lockstep.park(stop, payload)` wherever it reaches a stop. If batches take different paths, the
    earliest stop comes first: a batch parked behind it has skipped it. A stop comes up once, and the forwards end
    after the last one. Errors raised in the model surface in the loop. Leaving the `with` block, for whatever reason,
    ends all forwards.

    Args:
        forward: Runs the model on one batch, given its index.
        num_batches: How many batches there are.
        stops: Names of the stops, in the order in which they are reached.
        waiting: Gives a context, entered in a forward for as long as its batch is parked.
        earliest: Gives the smallest of the positions, in the order of the stops, to which processes that run other
            batches have come. All of them come to the same stops then, some perhaps with no batch.
        num_twins: How many of the batches, the last ones, are there only to be compared with others.

    Attributes:
        late: For each stop, how many batches reached it only after it had come up, and so were not counted there; but
            for twins.
    """

    def __init__(
        self,
        forward: Callable[[int], Any],
        num_batches: int,
        stops: Iterable[Hashable],
        waiting: Callable[[int], AbstractContextManager[Any]] = lambda index: nullcontext(),
        earliest: Callable[[int], int] = lambda position: position,
        num_twins: int = 0,
    ) -> None:
        self._forward = forward
        self._waiting = waiting
        self._earliest = earliest
        self._num_batches = num_batches
        self._num_twins = num_twins
        self._order = {stop: position for position, stop in enumerate(stops)}
        self._runs: list[_Run] = []
        self.late: Counter[Any] = Counter()

    def __enter__(self) -> Lockstep:
        self._main = getcurrent()
        self._pending = set(self._order)
        self._runs = [_Run(self._forward, index) for index in range(self._num_batches)]
        self._by_greenlet = {run.greenlet: run for run in self._runs}
        return self

    def __exit__(self, *exception: object) -> None:
        for run in self._runs:
            run.close()

    def __iter__(self) -> Iterator[tuple[Any, list[Call]]]:
        waiting = list(range(len(self._runs)))
        while self._pending:
            for index in waiting:
                self._runs[index].resume()
            parked = [self._order[run.stop] for run in self._runs if run.stop is not None]
            position = self._earliest(min(parked, default=END))
            if position == END:
                return
            stop = next(stop for stop in self._order if self._order[stop] == position)
            self._pending -= {s for s in self._pending if self._order[s] <= position}
            there = [index for index, run in enumerate(self._runs) if run.stop == stop]
            yield stop, [Call(index, self._runs[index].payload) for index in there]
            # Under autocast, a cast of the old weight may have been kept.
            torch.clear_autocast_cache()
            waiting = [index for index in there if self._runs[index].stop == stop]

    def park(self, stop: Hashable, payload: Any) -> None:
        """Called in a forward that has come to `stop`: wait there for all others, unless the stop has come up."""
        run = self._by_greenlet.get(getcurrent())
        if run is None or stop not in self._order or stop in run.visited:
            return
        run.visited.add(stop)
        if stop not in self._pending:
            self.late[stop] += run.index < self._num_batches - self._num_twins
            return
        run.stop, run.payload = stop, payload
        with self._waiting(run.index):
            self._main.switch()
        run.stop, run.payload = None, None

    def go_on(self, batches: Iterable[int]) -> None:
        """Let some of the parked batches go on to their next stop, before the weights change for the others."""
        for index in batches:
            self._runs[index].resume()

    def drop(self, stop: Hashable) -> None:
        """Do not stop there."""
        self._pending.discard(stop)
        self._order.pop(stop, None)

    def call(self, batch: int, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a function as the forward of a parked batch would, on copies of its arguments."""
        args, kwargs = tree_map(_copied, (args, kwargs))
        with self._runs[batch].torch_state():
            return function(*args, **kwargs)


class _Run:
    """The forward of one batch in its greenlet, with the thread-local torch state that belongs to it."""

    def __init__(self, forward: Callable[[int], Any], index: int) -> None:
        self.index = index
        self.greenlet = greenlet(lambda: forward(index))
        self.greenlet.gr_context = contextvars.copy_context()
        self.stop: Hashable | None = None
        self.payload: Any = None
        self.visited: set[Hashable] = set()
        self._state = _TorchState()

    def resume(self) -> None:
        """Let the forward go on to its next stop or its end."""
        with self.torch_state() as state:
            self.greenlet.switch()
            state.capture()

    def close(self) -> None:
        """End the forward where it stands, unwinding what it has entered."""
        if self.greenlet:
            with self.torch_state():
                self.greenlet.throw(GreenletExit)

    def torch_state(self) -> _Swapped:
        """A context in which the thread has this batch's torch state."""
        return _Swapped(self._state)


@dataclass
class _TorchState:
    """Grad mode, autocast and active function modes, which torch keeps per thread."""

    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.capture()

    def capture(self) -> None:
        autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _devices()
        ]
        self.inference = torch.is_inference_mode_enabled()
        modes = _get_current_function_mode_stack()
        self.values = [torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast, modes]

    def restore(self) -> None:
        grad, cache, autocast, modes = self.values
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        for _ in _get_current_function_mode_stack():
            _pop_mode()
        for mode in modes:
            _push_mode(mode)


class _Swapped:
    def __init__(self, state: _TorchState) -> None:
        self._state = state

    def __enter__(self) -> _TorchState:
        self._outer = _TorchState()
        self._inference = torch.inference_mode(self._state.inference)
        self._inference.__enter__()
        self._state.restore()
        return self._state

    def __exit__(self, *exception: object) -> None:
        self._inference.__exit__(None, None, None)
        self._outer.restore()


def _copied(value: Any) -> Any:
    """A copy of what a module may write to: tensors, caches of keys and values."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value if isinstance(value, torch.nn.Module) else copy.deepcopy(value)


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
