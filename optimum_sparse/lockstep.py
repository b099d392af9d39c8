"""Lockstep forwards: all calibration batches run the model's own forward side by side, layer after layer.

Each batch runs in its own greenlet. A pre-hook on the modules named as stops parks the batch there; when no batch can
go on, the caller has the arguments of all of them, changes the module's weight, and lets them continue with it. One
forward per batch prunes the whole model, every layer seeing inputs that went through the pruned layers before it, and
nothing about the architecture is assumed. There is one OS thread, so exactly one batch runs at a time.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_map_only

Owner = TypeVar("Owner", bound=Hashable)


@dataclass(frozen=True)
class Call:
    """A batch that is parked at a stop, and the arguments it is about to call it with."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Lockstep:
    """Run one forward per batch, parking all of them at each stop in turn.

        with Lockstep(forward, batches, stops) as lockstep:
            for stop, calls in lockstep:
                ...  # all batches that reach `stop` are parked there; change its weights here

    If batches take different paths, the earliest stop comes first: a batch parked behind it has skipped it. A stop
    comes up once, and the forwards end after the last one. Errors raised in the model surface in the loop. Leaving
    the `with` block, for whatever reason, ends all forwards and removes all hooks.

    Args:
        forward: Runs the model on one batch.
        batches: The batches.
        stops: Modules to park at, in the order in which they run.
    """

    def __init__(self, forward: Callable[[Any], Any], batches: Sequence[Any], stops: Sequence[nn.Module]) -> None:
        self._forward = forward
        self._batches = batches
        self._order = {stop: position for position, stop in enumerate(stops)}
        self._runs: list[_Run] = []

    def __enter__(self) -> Lockstep:
        self._main = getcurrent()
        self._pending = set(self._order)
        self._runs = [_Run(self._forward, batch) for batch in self._batches]
        self._by_greenlet = {run.greenlet: run for run in self._runs}
        self._handles = [stop.register_forward_pre_hook(self._park, with_kwargs=True) for stop in self._order]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for run in self._runs:
            run.close()

    def __iter__(self) -> Iterator[tuple[nn.Module, list[Call]]]:
        waiting = list(range(len(self._runs)))
        while self._pending:
            for index in waiting:
                self._runs[index].resume()
            parked = [run.stop for run in self._runs if run.stop is not None]
            if not parked:
                return
            stop = min(parked, key=self._order.__getitem__)
            waiting = [index for index, run in enumerate(self._runs) if run.stop is stop]
            yield stop, [Call(index, *self._runs[index].arguments) for index in waiting]
            # Under autocast, a cast of the old weight may have been kept.
            torch.clear_autocast_cache()
            self._pending -= {s for s in self._pending if self._order[s] <= self._order[stop]}

    def run_stop(self, call: Call, stop: nn.Module) -> Any:
        """Call a stop with a parked batch's arguments, leaving those as they are for when the batch goes on."""
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (call.args, call.kwargs))
        with self._runs[call.batch].torch_state():
            return stop(*args, **kwargs)

    def _park(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._by_greenlet.get(getcurrent())
        if run is not None and module in self._pending:
            run.stop, run.arguments = module, (args, kwargs)
            self._main.switch()
            run.stop, run.arguments = None, ((), {})
        # Anything but None would become the module's new arguments.
        return None


class _Run:
    """The forward of one batch in its greenlet, with the thread-local torch state that belongs to it."""

    def __init__(self, forward: Callable[[Any], Any], batch: Any) -> None:
        self.greenlet = greenlet(lambda: forward(batch))
        self.greenlet.gr_context = contextvars.copy_context()
        self.stop: nn.Module | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
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
    """Grad mode and autocast, which torch keeps per thread."""

    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.capture()

    def capture(self) -> None:
        autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _devices()
        ]
        self.inference = torch.is_inference_mode_enabled()
        self.values = [torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast]

    def restore(self) -> None:
        grad, cache, autocast = self.values
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


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


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@dataclass(frozen=True)
class Trace(Generic[Owner]):
    """What one forward shows of the order in which modules run.

    Attributes:
        groups: Owners whose modules ran once, in order; those that received the same tensor are together.
        repeated: Owners whose modules ran more than once.
        unused: Owners whose modules did not run.
        users: The module through which each owner ran, for those with several.
    """

    groups: list[list[Owner]]
    repeated: list[Owner]
    unused: list[Owner]
    users: dict[Owner, nn.Module]


def trace(forward: Callable[[Any], Any], batches: Iterable[Any], owners: Mapping[nn.Module, Owner]) -> Trace[Owner]:
    """Run forwards and see in which order, how often and with which inputs modules run.

    One batch is enough if it reaches all modules; otherwise the next ones are tried as well.

    Args:
        forward: Runs the model on a batch.
        batches: (Short) batches.
        owners: The modules to watch, and whom each of them counts for.
    """
    everyone = dict.fromkeys(owners.values())
    counts: Counter[Owner] = Counter()
    users: dict[Owner, nn.Module] = {}
    groups: list[list[Owner]] = []
    for batch in batches:
        uses = _uses(forward, batch, owners, users)
        counts |= Counter(owner for owner, _ in uses)
        _merge(groups, uses)
        if len(counts) == len(everyone):
            break
    once = ([owner for owner in group if counts[owner] == 1] for group in groups)
    return Trace(
        groups=[group for group in once if group],
        repeated=[owner for owner in everyone if counts[owner] > 1],
        unused=[owner for owner in everyone if counts[owner] == 0],
        users=users,
    )


def _uses(
    forward: Callable[[Any], Any], batch: Any, owners: Mapping[nn.Module, Owner], users: dict[Owner, nn.Module]
) -> list[tuple[Owner, Hashable]]:
    """Whose modules ran, in order, with a key that tells whether they received the same tensor."""
    uses: list[tuple[Owner, Hashable]] = []
    alive: list[torch.Tensor] = []  # so that no later tensor gets the address of an earlier one

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = module_input(args, kwargs)
        alive.append(inputs)
        users[owners[module]] = module
        uses.append((owners[module], _input_key(inputs)))

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in owners]
    try:
        forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return uses


def _merge(groups: list[list[Owner]], uses: Sequence[tuple[Owner, Hashable]]) -> None:
    """Put the groups of another forward in their place among those known: behind the one that ran before them."""
    place = {owner: index for index, group in enumerate(groups) for owner in group}
    fresh: dict[Hashable, list[Owner]] = {}
    behind: dict[Hashable, int] = {}
    last = -1
    for owner, key in uses:
        if owner in place:
            last = place[owner]
        elif not any(owner in group for group in fresh.values()):
            fresh.setdefault(key, []).append(owner)
            behind.setdefault(key, last)
    for key in reversed(fresh):
        groups.insert(behind[key] + 1, fresh[key])


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input tensor of a linear layer, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _input_key(inputs: torch.Tensor) -> Hashable:
    """Equal for two live tensors only if they hold the same rows: the same memory, not written to in between."""
    if inputs.numel() == 0:
        return object()  # empty tensors have no memory of their own
    version = 0 if inputs.is_inference() else inputs._version
    return inputs.data_ptr(), inputs.numel(), inputs.shape[-1], inputs.stride(), version
