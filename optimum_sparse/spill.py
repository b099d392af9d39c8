"""Activations of waiting batches, moved to the CPU or to files for as long as the batches wait.

While a batch is parked, what it has computed is held by the frames of its forward, where nobody else can take it away.
So the memory under the tensors is freed, and is there again, with the same content, when the batch goes on.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ACTIVATION_DEVICES = ("cpu", "disk")

ACTIVATIONS_FOLDER = "activations"

# Less than this, in bytes, is not worth the trouble.
SMALLEST = 4096
# What is copied at once between memory and a file, in bytes.
CHUNK = 2**24


class Activations:
    """What all batches have computed and still need, and where it is.

        with Activations("disk") as activations:
            with activations.computing(batch):
                ...                          # in the forward of the batch
                with activations.away(batch):
                    ...                      # it waits
            with activations.shown(tensor):
                ...                          # while it waits, one of its tensors is there

    Args:
        device: `"cpu"` or `"disk"` to move it there, `None` to leave it where it is.
        folder: Where a folder for files is made; by default where the system has its temporary files.
        process: Which of several processes that have the same `folder` this is.
    """

    def __init__(self, device: str | None, folder: Path | None = None, process: int = 0) -> None:
        self._device = device
        self._parent: Any = folder
        self._name = f"{ACTIVATIONS_FOLDER}-{process}"
        # The memory that each batch has allocated and still holds.
        self._owned: dict[int, weakref.WeakSet[torch.UntypedStorage]] = defaultdict(weakref.WeakSet)
        self._away: dict[torch.UntypedStorage, _Away] = {}

    def __enter__(self) -> Activations:
        if self._device == "disk" and self._parent is None:
            self._folder = Path(tempfile.mkdtemp(prefix="activations-"))
        elif self._device == "disk":
            self._folder = self._parent / self._name
            shutil.rmtree(self._folder, ignore_errors=True)  # left behind by a run that was killed
            self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._away.clear()
        if self._device == "disk":
            shutil.rmtree(self._folder)

    def computing(self, batch: int) -> AbstractContextManager[Any]:
        """A context that notes what memory a batch allocates."""
        return nullcontext() if self._device is None else _Computing(self, batch)

    @contextmanager
    def away(self, batch: int) -> Iterator[None]:
        """In the body, what a batch has allocated is not there."""
        if self._device is None:
            yield
            return
        path = None
        if self._device == "disk":
            path = self._folder / str(batch)
            path.write_bytes(b"")
        try:
            for storage in [s for s in self._owned[batch] if s.nbytes() >= SMALLEST and s.resizable()]:
                self._away[storage] = _Away(storage, path)
            yield
        finally:
            for storage in list(self._owned[batch]):
                self.bring_back(storage)

    @contextmanager
    def shown(self, values: Any) -> Iterator[None]:
        """In the body, the tensors among some values are there, only to be read, though their batch is away."""
        storages = _storages(values) & self._away.keys()
        for storage in storages:
            self._away[storage].load()
        try:
            yield
        finally:
            for storage in storages & self._away.keys():
                storage.resize_(0)

    def bring_back(self, storage: torch.UntypedStorage) -> None:
        """If memory is away, have it again."""
        if storage in self._away:
            self._away.pop(storage).load()

    def held(self, batch: int) -> int:
        """Bytes that a batch has allocated and still holds."""
        return sum(storage.nbytes() for storage in self._owned[batch])

    def allocated(self, batch: int, storage: torch.UntypedStorage) -> None:
        """A batch has allocated memory."""
        self._owned[batch].add(storage)


class _Computing(TorchFunctionMode):
    """Tells what a batch allocates, and brings back what it meets of others: models may keep tensors between calls."""

    def __init__(self, activations: Activations, batch: int) -> None:
        super().__init__()
        self._activations = activations
        self._batch = batch

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))
        for storage in given:
            self._activations.bring_back(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result) - given:
            self._activations.allocated(self._batch, storage)
        return result


class _Away:
    """The content of memory that was freed.

    Args:
        storage: The memory, which is freed.
        path: File to append its content to; without one it is kept on the CPU.
    """

    def __init__(self, storage: torch.UntypedStorage, path: Path | None) -> None:
        self._storage = storage
        self._num_bytes = storage.nbytes()
        self._path = path
        content = _bytes(storage)
        if path is None:
            self._content = content.to("cpu", copy=True)
        else:
            with path.open("ab") as file:
                self._start = file.tell()
                for chunk in content.split(CHUNK):
                    # A copy, since memory that numpy has seen cannot be freed any more.
                    file.write(chunk.to("cpu", copy=True).numpy().data)
        storage.resize_(0)

    def load(self) -> None:
        """Have the memory and its content again."""
        if self._storage.nbytes() == self._num_bytes:
            return
        self._storage.resize_(self._num_bytes)
        content = _bytes(self._storage)
        if self._path is None:
            content.copy_(self._content)
            return
        with self._path.open("rb") as file:
            file.seek(self._start)
            for chunk in content.split(CHUNK):
                buffer = torch.empty(len(chunk), dtype=torch.uint8)
                if file.readinto(buffer.numpy().data) != len(chunk):
                    raise OSError(f"{self._path} is shorter than it was written.")
                chunk.copy_(buffer)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(values: Any) -> set[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided)
    return {tensor.untyped_storage() for tensor in tensors}
