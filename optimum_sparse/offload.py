"""Block residency: weights that Accelerate keeps on the CPU or on disk come in for one block of the model at a time.

By itself, Accelerate brings in the weights of a module for each of its calls. A lockstep run calls a module once for
every batch, and changes its weights in between. Here a block comes in when the first batch enters it and goes when the
last one has left it; meanwhile the next one is read in the background. Weights that were changed go back to where they
are kept: to memory in place, to disk in new files, never to the files that they came from.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from accelerate.utils.modeling import named_module_tensors
from safetensors import safe_open
from torch import nn

from .saving import write_tensors
from .uses import Watched


@dataclass(frozen=True, eq=False)
class Place:
    """Where in a model a tensor belongs that is kept elsewhere, and Accelerate's hook that knows where."""

    module: nn.Module
    attribute: str
    hook: AlignDevicesHook

    @property
    def siblings(self) -> dict[str, Any]:
        """The tensors of the module, by attribute."""
        return self.module._parameters if self.attribute in self.module._parameters else self.module._buffers

    @property
    def device(self) -> torch.device:
        """Where it is computed with."""
        return torch.device(self.hook.execution_device)

    @property
    def in_memory(self) -> torch.Tensor | None:
        """The tensor that keeps its value, `None` if that is on disk."""
        store, key = self.store
        return (store.state_dict if isinstance(store, OffloadedWeightsLoader) else store).get(key)

    def load(self) -> torch.Tensor:
        """What is kept. A tensor on disk may be mapped into memory, so that nothing is read yet."""
        return self.hook.weights_map[self.attribute]

    def fetch(self) -> torch.Tensor:
        """What is kept, on the device where it is computed with; a copy unless it is kept there."""
        value = self.load()
        if self.device.type == "cuda":
            # In a stream of its own, the copy does not wait for the computation that it is to be hidden behind.
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                value = value.to(self.device)
            stream.synchronize()
            return value
        return value.clone() if self.in_memory is None else value.to(self.device)

    def keep(self, value: torch.Tensor, path: Path, name: str) -> None:
        """Keep another value: in place if it is kept in memory, else as the tensor `name` of a safetensors file."""
        kept = self.in_memory
        if kept is None:
            store, key = self.store
            dtype = str(value.dtype).removeprefix("torch.")
            store.index[key] = {"safetensors_file": str(path), "weight_name": name, "dtype": dtype}
        elif kept.data_ptr() != value.data_ptr():
            kept.copy_(value)

    @property
    def store(self) -> tuple[Any, str]:
        """What keeps it, and its name there."""
        store, key = self.hook.weights_map, self.attribute
        while isinstance(store, PrefixedDataset):
            store, key = store.dataset, store.prefix + key
        return store, key


@dataclass(eq=False)
class _Offloaded:
    """A tensor that is kept elsewhere.

    Attributes:
        away: The tensor without data that stands in the model for it.
        places: Where in the model it belongs, by dotted name: several if modules share it.
        users: How many units need it to be there now.
        version: Of the tensor that is there, when it last was what is kept.
    """

    away: torch.Tensor
    places: dict[str, Place] = field(default_factory=dict)
    users: int = 0
    version: int = 0

    @property
    def place(self) -> Place:
        """One of the places."""
        return next(iter(self.places.values()))

    @property
    def there(self) -> torch.Tensor:
        """What stands in the model now."""
        return self.place.siblings[self.place.attribute]

    @property
    def name(self) -> str:
        """Its dotted name: that of its first place."""
        return next(iter(self.places))

    def keep(self, value: torch.Tensor, path: Path, name: str) -> None:
        """Keep another value, as `Place.keep`."""
        for place in self.places.values():
            place.keep(value, path, name)


@dataclass(eq=False)
class _Unit:
    """What comes in and goes together: a block, or a module outside the blocks.

    Attributes:
        tensors: Its offloaded tensors.
        hooks: Accelerate's hooks that manage them.
        is_in: Whether they are there.
        inside: How many forwards are in it now.
        left: How many forwards have left it since it came in.
        held: How many times it was asked to stay.
        following: The unit that a forward enters next.
        coming: The tensors that are being read in the background.
    """

    tensors: list[_Offloaded] = field(default_factory=list)
    hooks: list[AlignDevicesHook] = field(default_factory=list)
    is_in: bool = False
    inside: int = 0
    left: int = 0
    held: int = 0
    following: _Unit | None = None
    coming: Future[dict[_Offloaded, torch.Tensor]] | None = None

    @property
    def num_bytes(self) -> int:
        """What its tensors take when they are there."""
        return sum(tensor.away.numel() * tensor.away.element_size() for tensor in self.tensors)


class Residency:
    """Keeps the offloaded weights of a model in memory while they are needed.

        with Residency(model, blocks, watched) as residency:
            model(**batch)                       # one block at a time, the next one being read
            with residency.forwards(len(batches)):
                ...                              # lockstep forwards; at each stop: residency.settle()

    A model without offloaded weights is left alone.

    Args:
        model: The model.
        blocks: Names of its blocks.
        watched: The parameters that are watched: told when one comes or goes.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str], watched: Watched) -> None:
        self._model = model
        self._watched = watched
        self._forwards = 1
        self._first: _Unit | None = None  # where forwards begin
        self._last: _Unit | None = None
        self._units: dict[str, _Unit] = {}
        self._by_name: dict[str, tuple[_Unit, _Offloaded]] = {}
        self._handles: list[Any] = []
        self._writing: list[Future[None]] = []
        self._folder: Path | None = None
        self._num_files = 0
        self._find(list(blocks))

    def _find(self, blocks: list[str]) -> None:
        tensors: dict[int, _Offloaded] = {}
        for name, place in offloaded_places(self._model).items():
            prefix = name.rpartition(".")[0]
            unit_name = next((block for block in blocks if f"{prefix}.".startswith(f"{block}.")), prefix)
            unit = self._units.setdefault(unit_name, _Unit())
            away = place.siblings[place.attribute]
            tensor = tensors.setdefault(id(away), _Offloaded(away))
            tensor.places[name] = place
            self._by_name[name] = (unit, tensor)
            if tensor not in unit.tensors:
                unit.tensors.append(tensor)
            if place.hook not in unit.hooks:
                unit.hooks.append(place.hook)

    @property
    def units(self) -> frozenset[str]:
        """Names of the blocks and modules that come and go."""
        return frozenset(self._units)

    @property
    def most_bytes(self) -> int:
        """What is there at most at a time: a unit and the one that follows."""
        return max(
            (unit.num_bytes + (unit.following or _Unit()).num_bytes for unit in self._units.values()), default=0
        )

    def __enter__(self) -> Residency:
        self._background = ThreadPoolExecutor(1, "offload")
        for name, unit in self._units.items():
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, unit)))
            self._handles.append(module.register_forward_hook(partial(self._leave, unit), always_call=True))
            # A block need not be called as a whole.
            owners = dict.fromkeys(place.module for tensor in unit.tensors for place in tensor.places.values())
            self._handles += [m.register_forward_pre_hook(partial(self._touch, unit)) for m in owners if m != module]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        try:
            for unit in self._units.values():
                self._evict(unit)
            self._check_written(wait=True)
        finally:
            self._background.shutdown(cancel_futures=True)

    @contextmanager
    def forwards(self, number: int) -> Iterator[None]:
        """The body runs so many forwards side by side: a unit goes when all of them have left it."""
        self._forwards = number
        try:
            yield
        finally:
            self._forwards = 1

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """In the body, the parameters of these names are there."""
        units = dict.fromkeys(self._by_name[name][0] for name in names if name in self._by_name)
        for unit in units:
            self._bring_in(unit)
            unit.held += 1
        try:
            yield
        finally:
            for unit in units:
                unit.held -= 1

    def settle(self) -> None:
        """All forwards are waiting: what none of them is in goes, and what they will enter next is read."""
        for unit in self._units.values():
            if not unit.inside and not unit.held:
                self._evict(unit)
        if self._last is not None:
            self._read_ahead(self._last.following)

    def saved(self, path: Path, names: Iterable[str]) -> None:
        """The parameters of these names are in a file as they are now, so that they need not be written again."""
        for name in names:
            if name in self._by_name:
                tensor = self._by_name[name][1]
                tensor.keep(tensor.there.detach(), path, name)
                tensor.version = tensor.there._version

    def restore(self, path: Path, names: Iterable[str]) -> None:
        """Give the parameters of these names the values that they have in a safetensors file."""
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in sorted(names):
                value = file.get_tensor(name)
                if name not in self._by_name:
                    self._model.get_parameter(name).copy_(value)
                    continue
                tensor = self._by_name[name][1]
                tensor.keep(value, path, name)
                for unit in self._units.values():
                    if tensor in unit.tensors:
                        unit.coming = None  # what was read ahead is as it was before
                if tensor.users:  # it is there already, as it was
                    tensor.there.data.copy_(value)
                    tensor.version = tensor.there._version

    def _enter(self, unit: _Unit, *_: Any) -> None:
        if self._forwards == 1:
            for other in self._units.values():
                if other is not unit and not other.inside and not other.held:
                    self._evict(other)
            self._first = self._first or unit
            if self._last is not None and unit is not self._first:
                self._last.following = unit
        self._bring_in(unit)
        unit.inside += 1
        self._last = unit
        if self._forwards == 1:
            self._read_ahead(unit.following)

    def _touch(self, unit: _Unit, *_: Any) -> None:
        self._bring_in(unit)

    def _leave(self, unit: _Unit, *_: Any) -> None:
        unit.inside -= 1
        unit.left += not unit.held
        if not unit.inside and not unit.held and unit.left >= self._forwards:
            self._evict(unit)

    def _read_ahead(self, unit: _Unit | None) -> None:
        if unit is not None and not unit.is_in and unit.coming is None:
            missing = [tensor for tensor in unit.tensors if not tensor.users]
            unit.coming = self._background.submit(lambda: {tensor: tensor.place.fetch() for tensor in missing})

    def _bring_in(self, unit: _Unit) -> None:
        if unit.is_in:
            return
        self._check_written(wait=False)  # here and not in `_evict`, of which none is left out when something is wrong
        self._read_ahead(unit)  # also waits for what is still being written
        assert unit.coming is not None
        values, unit.coming = unit.coming.result(), None
        for tensor in unit.tensors:
            if not tensor.users:
                value = values[tensor] if tensor in values else tensor.place.fetch()
                if value.device.type == "cuda":
                    value.record_stream(torch.cuda.current_stream(value.device))
                self._put(tensor, _like(tensor.away, value))
                tensor.version = tensor.there._version
            tensor.users += 1
        for hook in unit.hooks:
            hook.offload = False  # so that it neither loads nor evicts by itself
        unit.is_in, unit.left = True, 0

    def _evict(self, unit: _Unit) -> None:
        if not unit.is_in:
            return
        going = [tensor for tensor in unit.tensors if tensor.users == 1]
        changed = {tensor: tensor.there.detach() for tensor in going if tensor.there._version != tensor.version}
        if changed:
            self._writing.append(self._background.submit(self._write_back, changed))
        for tensor in unit.tensors:
            tensor.users -= 1
            if not tensor.users:
                self._put(tensor, tensor.away)
        for hook in unit.hooks:
            hook.offload = True
        unit.is_in, unit.inside = False, 0

    def _put(self, tensor: _Offloaded, value: Any) -> None:
        for name, place in tensor.places.items():
            place.siblings[place.attribute] = value
            if name in self._watched:
                self._watched.replace(name, value)

    def _write_back(self, changed: Mapping[_Offloaded, torch.Tensor]) -> None:
        to_disk = {tensor.name: value for tensor, value in changed.items() if tensor.place.in_memory is None}
        path = self._new_file() if to_disk else Path()
        if to_disk:
            write_tensors(path, to_disk)
        for tensor, value in changed.items():
            tensor.keep(value, path, tensor.name)

    def _check_written(self, wait: bool) -> None:
        """Raise what went wrong in writing."""
        done = [future for future in self._writing if wait or future.done()]
        self._writing = [future for future in self._writing if future not in done]
        for future in done:
            future.result()

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="pruned-", dir=_offload_folder(self._by_name.values())))
            # The model reads its weights from there as long as it lives.
            weakref.finalize(self._model, shutil.rmtree, self._folder, ignore_errors=True)
        self._num_files += 1
        return self._folder / f"{self._num_files:05}.safetensors"


def offloaded_places(model: nn.Module) -> dict[str, Place]:
    """Where the tensors of a model belong that Accelerate keeps elsewhere, by dotted name."""
    places = {}
    for prefix, module in model.named_modules():
        hook = _offloading_hook(module)
        if hook is not None:
            for name, tensor in named_module_tensors(module, include_buffers=hook.offload_buffers):
                if tensor.device.type == "meta":
                    places[f"{prefix}.{name}".removeprefix(".")] = Place(module, name, hook)
    return places


def tie_offloaded(model: nn.Module) -> None:
    """Let one tensor stand for offloaded weights that are tied: Accelerate gives each its own, in every forward."""
    places = offloaded_places(model)
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in places and source in places:
            places[name].siblings[places[name].attribute] = places[source].siblings[places[source].attribute]


@contextmanager
def savable(model: nn.Module) -> Iterator[None]:
    """In the body, `save_pretrained` of a model takes offloaded weights from where they are kept, shard by shard."""
    tie_offloaded(model)
    unnoticed = bool(offloaded_places(model)) and not hasattr(model, "hf_device_map")
    if unnoticed:  # it was offloaded without a device map
        model.hf_device_map = {"": "disk"}  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            yield
    finally:
        if unnoticed:
            del model.hf_device_map


def value_of(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module, or if that is offloaded and not there, what is kept of it, which is not to be changed.

    Args:
        module: The module that owns it.
        name: Its name in the module.
    """
    parameter = getattr(module, name)
    hook = _offloading_hook(module)
    return parameter if parameter.device.type != "meta" or hook is None else Place(module, name, hook).load()


def execution_device(module: nn.Module) -> torch.device:
    """The device that the first parameter in a module is computed with, wherever it is kept."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            hook = _offloading_hook(owner)
            return parameter.device if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    parts = [part for part in getattr(hook, "hooks", [hook]) if isinstance(part, AlignDevicesHook)]
    return next((part for part in parts if part.weights_map is not None), None)


def _offload_folder(tensors: Iterable[tuple[_Unit, _Offloaded]]) -> str | None:
    """The folder that the user named for offloaded weights, if any."""
    stores = (tensor.place.store[0] for _, tensor in tensors)
    return next((store.save_folder for store in stores if getattr(store, "save_folder", None)), None)


def _like(away: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=away.requires_grad) if isinstance(away, nn.Parameter) else value
