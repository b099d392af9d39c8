"""The probe: what a few short forwards show of a model before anything is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .experts import Routed
from .uses import PRODUCTS, Use, View, WeightUses

# A stop of the forwards: matrices that receive the same tensor, or the name of a module at whose entry to stop.
Stop = tuple[View, ...] | str

# What picks entries of a tensor by their size or by a chosen index, the mark of a router: the position of the argument
# `dim`, and its default.
_RANKING: dict[Any, tuple[int, int | None]] = {
    getattr(namespace, name): place
    for namespace in (torch, torch.Tensor)
    for name, place in {
        "topk": (2, -1),
        "kthvalue": (2, -1),
        "sort": (1, -1),
        "argsort": (1, -1),
        "max": (1, None),
        "argmax": (1, None),
        "gather": (1, None),
    }.items()
}
# Gathering is also done by position: then only as many outputs as there are experts are a router's.
_GATHER = (torch.gather, torch.Tensor.gather)


@dataclass(frozen=True)
class Trace:
    """What forwards show of a model.

    Attributes:
        order: Uses of weights, and entries of modules of experts, in the order in which they come; each once.
        inputs: For each weight, a number that is the same for those that receive the same tensor.
        repeated: Weights and modules that a forward uses more than once.
        blocks: The block that was running when each weight was used, if any.
        routers: Weights whose outputs are ranked against each other.
        copied: Parameters that were copied (cast, gathered) before a product, so that their inputs cannot be seen.
    """

    order: list[View | str] = field(default_factory=list)
    inputs: dict[View, int] = field(default_factory=dict)
    repeated: frozenset[View | str] = frozenset()
    blocks: dict[View, str | None] = field(default_factory=dict)
    routers: frozenset[View] = frozenset()
    copied: frozenset[str] = frozenset()

    def stops(self, chosen: Collection[View], entries: Collection[str] = ()) -> list[Stop]:
        """Where to stop for the chosen weights, in order; those that a forward uses more than once have no stop.

        Args:
            chosen: The weights.
            entries: Names of blocks to stop at the entry of as well.
        """
        groups: dict[int | str, list[View]] = {}
        shared = {view.parameter for view in self.inputs if view.part}
        for member in self.order:
            name = member if isinstance(member, str) else member.parameter
            for block in [block for block in entries if name.startswith(f"{block}.")]:
                groups.setdefault(block, [])
            if isinstance(member, str) and member not in self.repeated:
                # Arguments alone do not make a module one of experts: those of rotary embeddings look alike.
                if any(parameter.startswith(f"{member}.") for parameter in shared):
                    groups[member] = []
            elif isinstance(member, View) and member in chosen and member not in self.repeated:
                groups.setdefault(self.inputs[member], []).append(member)
        return [key if isinstance(key, str) else tuple(members) for key, members in groups.items()]


def trace(
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    blocks: Collection[str],
) -> Trace:
    """Run forwards and see in which order, how often and on which inputs weights are used.

    Batches are taken until every weight that can be seen has been. Parameters of two dimensions that are not called
    `weight` are not waited for: those of state spaces, for example, are never in a product. Experts that share a
    parameter with one that was seen count as seen, and stand where they would run if a token were routed to them.

    Args:
        forward: Runs the model on a batch.
        batches: (Short) batches.
        model: The model.
        parameters: Its weights to watch, by name.
        blocks: Names of its blocks.
    """
    order: list[View | str] = []
    inputs: dict[View, int] = {}
    counts: Counter[View | str] = Counter()
    running: dict[View, str | None] = {}
    routers: set[View] = set()
    copied: set[str] = set()
    due = {name for name, parameter in parameters.items() if parameter.ndim > 2 or name.endswith(".weight")}
    for batch in batches:
        probe = _Probe(parameters)
        with probe.inside(model, blocks), probe:
            forward(batch)
        counts |= Counter(member for member, _ in probe.events)
        running = {**probe.blocks, **running}
        routers |= probe.routers
        copied |= probe.copied
        _merge(order, inputs, probe.events)
        if {view.parameter for view in running} >= due and not _missing_parts(order, parameters):
            break
    _complete(order, inputs, parameters)
    for view in inputs:
        alike = next(other for other in running if other.parameter == view.parameter)
        running.setdefault(view, running[alike])
    repeated = frozenset(member for member, count in counts.items() if count > 1)
    routers |= _layers_of_routers(order, routers, blocks)
    return Trace(order, inputs, repeated, running, frozenset(routers), frozenset(copied))


def _layers_of_routers(order: Sequence[View | str], routers: Collection[View], blocks: Collection[str]) -> set[View]:
    """What comes before a ranked layer in its router: the largest module in which a ranked layer is the last."""
    views = [view for view in order if isinstance(view, View)]
    found: set[View] = set()
    for router in routers:
        scope = router.parameter.rpartition(".")[0]
        inside = [view for view in views if view.parameter.startswith(f"{scope}.")]
        while scope and scope not in blocks and inside[-1] in routers:
            found.update(inside)
            scope = scope.rpartition(".")[0]
            inside = [view for view in views if view.parameter.startswith(f"{scope}.")]
    return found


class _Probe(WeightUses):
    """One forward: its uses in order, and what becomes of the outputs and of copies of weights."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters, self._note)
        self._num_experts = {len(parameter) for parameter in parameters.values() if parameter.ndim == 3}
        # Each use or entry, with a key that tells whether two uses are of the same tensor.
        self.events: list[tuple[View | str, Hashable]] = []
        self.blocks: dict[View, str | None] = {}
        self.routers: set[View] = set()
        self.copied: set[str] = set()
        self._running: list[str] = []
        # Memory by number: an address may come up again, and to keep all of it would take as much as there are blocks.
        self._numbers: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self._empty: list[torch.Tensor] = []  # has no memory of its own, so that the id must not come up again
        self._used: list[View] = []  # in the function that is being called
        self._scores: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> weights whose outputs it holds
        self._copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> parameters it was computed from

    @contextmanager
    def inside(self, model: nn.Module, blocks: Collection[str]) -> Iterator[None]:
        """Note which block is running, and entries of modules whose arguments say which expert takes which token."""
        handles = []
        for name, module in model.named_modules():
            if name in blocks:
                handles.append(module.register_forward_pre_hook(partial(self._enter_block, name)))
                handles.append(module.register_forward_hook(self._leave_block, always_call=True))
            handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_block(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave_block(self, *_: Any) -> None:
        self._running.pop()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if Routed.of(module, args, kwargs) is not None:
            self.events.append((name, object()))

    def _note(self, use: Use) -> None:
        self._used.append(use.view)
        self.events.append((use.view, self._key(use.inputs)))
        self.blocks.setdefault(use.view, self._running[-1] if self._running else None)

    def _key(self, inputs: torch.Tensor) -> Hashable:
        """Equal for two tensors only if they hold the same rows: the same memory, not written to in between."""
        if inputs.numel() == 0:
            self._empty.append(inputs)
            return id(inputs)
        number = self._numbers.setdefault(inputs.untyped_storage(), len(self.events))
        # Nobody counts how often a tensor was written to that was made in inference mode.
        version = len(self.events) if inputs.is_inference() else inputs._version
        return number, inputs.storage_offset(), inputs.numel(), inputs.shape[-1], inputs.stride(), version

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._used = []
        result = super().__torch_function__(func, types, args, kwargs)
        tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
        results = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if _is_float(r)]
        if func in PRODUCTS:
            if not self._used:
                self.copied.update(*(self._copies.get(tensor, ()) for tensor in tensors))
            # Outputs fewer than inputs: a wide layer that is thinned out by size is no router.
            narrow = {view for view in self._used if view.shape[0] < view.shape[1]}
            for output in results:
                self._mark(output, {view for view in narrow if output.shape[-1:] == (view.shape[0],)})
            return result
        scores = [self._scores.get(tensor, set()) for tensor in tensors]
        if func in _RANKING and scores[0] and _last_dim(func, args, kwargs or {}, tensors[0].ndim):
            self.routers |= {view for view in scores[0] if func not in _GATHER or view.shape[0] in self._num_experts}
        # Scores that are added to other activations, as to a residual stream, are no scores any more.
        mixed = any(
            _is_float(t) and not s and t.shape == tensors[0].shape for t, s in zip(tensors, scores, strict=True)
        )
        for output in [] if mixed else results:
            self._mark(output, set().union(*(s for t, s in zip(tensors, scores, strict=True) if _along(output, t))))
        self._follow_copies(tensors, results)
        return result

    def _mark(self, scores: torch.Tensor, views: set[View]) -> None:
        if views:
            self._scores[scores] = views

    def _follow_copies(self, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """What is computed from parameters and indices alone is a copy of the parameters."""
        sources: set[str] = set()
        for tensor in tensors:
            found = self._watched.find(tensor)
            origin = {found} if found is not None else self._copies.get(tensor, set())
            if not origin and tensor.is_floating_point():
                return
            sources |= origin
        for tensor in results:
            if sources and self._watched.find(tensor) is None:
                self._copies[tensor] = sources


def _last_dim(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int) -> bool:
    """Whether a ranking function works along the last dimension."""
    position, default = _RANKING[func]
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    return isinstance(dim, int) and dim % ndim == ndim - 1


def _along(result: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the last dimension of a result runs along that of what it was computed from, or along a part of it."""
    if not result.ndim or not source.ndim:
        return False
    if result.untyped_storage()._cdata == source.untyped_storage()._cdata:
        return result.stride(-1) == source.stride(-1)
    return result.shape[-1] == source.shape[-1]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _merge(order: list[View | str], inputs: dict[View, int], events: Sequence[tuple[View | str, Hashable]]) -> None:
    """Put what another forward shows in its place: behind what came before it there and is known already."""
    place = {member: index for index, member in enumerate(order)}
    behind: dict[int, dict[View | str, None]] = defaultdict(dict)
    numbers: dict[Hashable, int] = {}
    last = -1
    for member, key in events:
        if member in place:
            last = max(last, place[member])
        elif not any(member in fresh for fresh in behind.values()):
            behind[last][member] = None
            if isinstance(member, View):
                inputs[member] = numbers.setdefault(key, len(inputs))
    known = [*behind[-1]]
    for index, member in enumerate(order):
        known += [member, *behind.get(index, ())]
    order[:] = known


def _num_parts(view: View, parameters: Mapping[str, nn.Parameter]) -> int:
    return parameters[view.parameter].numel() // (view.shape[0] * view.shape[1])


def _missing_parts(order: Sequence[View | str], parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Parameters of which some parts were used and others not."""
    seen: dict[str, list[View]] = {}
    for view in order:
        if isinstance(view, View):
            seen.setdefault(view.parameter, []).append(view)
    return {name for name, views in seen.items() if len(views) < _num_parts(views[0], parameters)}


def _complete(order: list[View | str], inputs: dict[View, int], parameters: Mapping[str, nn.Parameter]) -> None:
    """Put in the experts that no token was routed to, where they would run.

    A module either takes its experts one after the other, or takes all of them through the first matrix, then all
    through the second; which of the two it does, those that were used have shown.
    """
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in sorted(_missing_parts(order, parameters))):
        mine = [v for v in order if isinstance(v, View) and v.parameter.rpartition(".")[0] == owner]
        mine = [view for view in mine if _num_parts(view, parameters) > 1]
        chains: dict[int, list[View]] = {}
        for view in mine:
            chains.setdefault(view.part, []).append(view)
        chain = max(chains.values(), key=len)
        one_by_one = mine == [view for views in chains.values() for view in views]
        experts = range(max(_num_parts(view, parameters) for view in chain))
        full = [view._replace(part=e) for e in experts for view in chain]
        if not one_by_one:
            full.sort(key=lambda view: [v.parameter for v in chain].index(view.parameter))
        place = order.index(mine[0])
        order[:] = [member for member in order if member not in set(mine)]
        order[place:place] = [view for view in full if view.part < _num_parts(view, parameters)]
        for view in full:
            # The new ones share inputs as those of the chain do.
            alike = next(v for v in chain if inputs[v] == inputs[view._replace(part=v.part)])
            key = inputs.get(alike._replace(part=view.part), len(inputs))
            if view.part < _num_parts(view, parameters):
                inputs.setdefault(view, key)
