"""Progress of a run on disk, so that a run that was killed can be taken up where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .config import SparseConfig
from .distributed import Processes
from .matrices import PrunableMatrix
from .metadata import versions
from .offload import Residency, execution_device, value_of
from .quantization import Grid, read_grids, write_grids
from .report import MatrixReport, SparsityReport
from .saving import replace_file, write_tensors
from .spill import ACTIVATIONS_FOLDER

FINGERPRINT_FILE = "run.json"
FILES = "[0-9]*.safetensors"
GRIDS = "grids-"
# Of each weight, so many values at its start, in its middle and at its end are looked at.
SAMPLE = 1024


class Steps:
    """The steps of a run, in order; with a folder, those that are done are kept there.

    After the last step of a block, the weights that were written since the last time go to one file, with what the
    report says of them in its header. A file that can be seen is complete.

    Args:
        members: For each step the matrices that it prunes, in order.
        model: The model, before anything is changed.
        residency: Its offloaded weights.
        report: Gets the entries of the steps that were done before; has those of the others.
        grids: The same of what matrices were rounded to, by name.
        processes: All of them read the files, the main one writes them.
        folder: Where the files are, or will be; `None` to keep nothing.
        depends_on: What the result of the run depends on besides the model and the steps, as pure JSON.
        at_once: Whether the model gets what was done before at once, or each step when it is restored.

    Attributes:
        left: The steps that were not done before.
        late: How many batches came to a step too late to count.
        trained: The parameters that were changed besides those of pruned matrices since the last file, by name, and in
            which step.

    Raises:
        ValueError: `folder` has the progress of another run, or something else.
    """

    def __init__(
        self,
        members: Mapping[Any, Sequence[PrunableMatrix]],
        model: nn.Module,
        residency: Residency,
        report: SparsityReport,
        grids: dict[str, Grid],
        processes: Processes,
        folder: Path | None,
        depends_on: Mapping[str, Any],
        at_once: bool = True,
    ) -> None:
        self._model = model
        self._residency = residency
        self._report = report
        self._grids = grids
        self._processes = processes
        self._folder = folder
        self._order = {step: position for position, step in enumerate(members)}
        self._matrices = {matrix.name: matrix for matrices in members.values() for matrix in matrices}
        self._step_of = {matrix.name: step for step, matrices in members.items() for matrix in matrices}
        last = {matrix.block: step for step, matrices in members.items() for matrix in matrices}
        self._ends = {self._order[step] for step in last.values()}
        self.late: Counter[Any] = Counter()
        self.trained: dict[str, Any] = {}
        self._to_restore: dict[Any, dict[Path, set[str]]] = defaultdict(lambda: defaultdict(set))
        done = 0
        if folder is not None:
            names = [[matrix.name for matrix in matrices] for matrices in members.values()]
            steps = digest([json.dumps(names).encode()])
            with processes.main_first():
                _open(folder, {**fingerprint(model), **depends_on, "steps": steps})
            for file in sorted(folder.glob(FILES)):
                done = self._take_up(file)
            for step in list(self._to_restore) if at_once else ():
                self.restore(step)
            processes.wait()
        self._num_saved = len(report.matrices)
        self._reached = done
        self.left = frozenset(step for step, position in self._order.items() if position >= done)

    def _take_up(self, file: Path) -> int:
        with safe_open(file, framework="pt") as tensors:
            record = json.loads(tensors.metadata()["record"])
        steps = list(self._order)
        entries = [_entry(fields) for fields in record["entries"]]
        of_matrices = {self._matrices[e.name].view.parameter: self._step_of[e.name] for e in entries}
        for name, step in {**of_matrices, **{name: steps[at] for name, at in record["trained"].items()}}.items():
            self._to_restore[step][file].add(name)
        grids = file.with_name(f"{GRIDS}{file.name}")
        if grids.is_file():
            self._grids |= read_grids(grids)
        self._report.matrices += entries
        self._report.reconstruction |= record["reconstruction"]
        self._report.correction |= record["correction"]
        if self._processes.is_main:  # the counts are those of all
            self.late = Counter({steps[position]: count for position, count in record["late"]})
        return record["done"]

    def restore(self, step: Any) -> None:
        """Give the model what a step has changed that was done before, unless it has it."""
        for file, names in self._to_restore.pop(step, {}).items():
            self._residency.restore(file, names)

    def come_to(self, step: Any) -> None:
        """What stands before a step is done, or will not be: the last step of a block need not come itself.

        Raises:
            OSError: As `did`.
        """
        position = self._order[step]
        if any(self._reached <= end < position for end in self._ends):
            self._save(position)
        self._reached = position

    def did(self, step: Any) -> None:
        """A step is done.

        Raises:
            OSError: It could not be saved; the files before it are as they were.
        """
        position = self._order[step]
        if position in self._ends:
            self._save(position + 1)

    def finish(self) -> None:
        """All steps are done, or came to nothing."""
        self._save(len(self._order))

    def all_late(self) -> Counter[Any]:
        """`late`, of all processes together."""
        counts = self._processes.totals(*(self.late[step] for step in self._order))
        return Counter({step: count for step, count in zip(self._order, counts, strict=True) if count})

    def _save(self, done: int) -> None:
        entries = self._report.matrices[self._num_saved :]
        if self._folder is None or not entries:
            return
        self._num_saved += len(entries)
        late = [(self._order[step], count) for step, count in self.all_late().items()]
        record = {
            "done": done,
            "late": late,
            "entries": [dataclasses.asdict(entry) for entry in entries],
            "reconstruction": self._report.reconstruction,
            "correction": self._report.correction,
            "trained": {name: self._order[step] for name, step in self.trained.items()},
        }
        changed = {self._matrices[entry.name].view.parameter for entry in entries}.union(self.trained)
        self.trained = {}
        path = self._folder / f"{done:06}.safetensors"
        with self._residency.holding(changed):
            grids = {entry.name: self._grids[entry.name] for entry in entries if entry.name in self._grids}
            if grids and self._processes.is_main:  # before the weights, whose file says that all is there
                write_grids(path.with_name(f"{GRIDS}{path.name}"), grids)
            tensors = {name: self._model.get_parameter(name) for name in sorted(changed)}
            if self._processes.is_main:
                write_tensors(path, tensors, {"record": json.dumps(record)})
            self._processes.wait()
            self._residency.saved(path, tensors)


def remove_progress(folder: Path) -> None:
    """Delete the progress of a run, and its folder unless there is something else in it."""
    for activations in folder.glob(f"{ACTIVATIONS_FOLDER}-*"):
        shutil.rmtree(activations)
    # The last first: what is left if this is interrupted is the progress of the same run, a few steps before.
    steps = sorted(folder.glob(FILES), reverse=True)
    for path in [*steps, *folder.glob(f"{GRIDS}*"), *folder.glob(".*.tmp"), folder / FINGERPRINT_FILE]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def depends_on(config: SparseConfig, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the result of a run depends on besides the model: how it is pruned, on which data.

    Args:
        config: How it is pruned.
        batches: The calibration data.
    """
    options = config.to_dict()
    del options["dataset"]  # what was taken from it counts
    return {"config": options, "calibration data": digest(_batch_bytes(batches))}


def kept_allocation(folder: Path | None) -> list[int] | None:
    """The zeros of each matrix that a run has decided on before its first step, if there is one in a folder.

    Args:
        folder: Where the progress is kept, if anywhere. Whether it is that of the same run, `Steps` will see.
    """
    file = None if folder is None else folder / FINGERPRINT_FILE
    if file is None or not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("allocation")


def _open(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """See that a folder has the progress of this run, or can be used for it.

    Raises:
        ValueError: It has that of another run, or something else.
    """
    file = folder / FINGERPRINT_FILE
    if file.is_file():
        _compare(folder, json.loads(file.read_text(encoding="utf-8")), fingerprint)
        return
    folder.mkdir(parents=True, exist_ok=True)
    check_progress_folder(folder)
    with replace_file(file) as temporary:
        temporary.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")


def check_progress_folder(folder: Path) -> None:
    """See that a folder, if there is one, has the progress of a run, or nothing.

    Raises:
        ValueError: It is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder to keep the progress in.")
    if not folder.is_dir() or (folder / FINGERPRINT_FILE).is_file():
        return
    others = {path.name for path in folder.iterdir() if not path.name.startswith(f"{ACTIVATIONS_FOLDER}-")}
    if others - {f".{FINGERPRINT_FILE}.tmp"}:
        raise ValueError(f"{folder} has other files than those of an interrupted run: name a folder of its own.")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The model, of whose weights a sample is taken, and what computes with it."""
    device = execution_device(model).type
    return {"model": type(model).__name__, "weights": _weights_hash(model), "device": device, "versions": versions()}


def _compare(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = _flat(there), _flat(now)
    hashes = ("weights", "calibration data", "steps", "allocation")
    differences = [
        f"the {name} differ" if name in hashes else f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} has the progress of another run: {'; '.join(differences)}. Do as that run did to continue it, "
            "or name an empty folder to start anew."
        )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _entry(fields: Mapping[str, Any]) -> MatrixReport:
    return MatrixReport(**{**fields, "shape": tuple(fields["shape"]), "notes": tuple(fields["notes"])})


def _weights_hash(model: nn.Module) -> str:
    def parts() -> Iterable[bytes]:
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{prefix}.{name} {parameter.dtype} {list(parameter.shape)}".encode()
                flat = value_of(module, name).detach().reshape(-1)
                for start in (0, max(0, len(flat) // 2 - SAMPLE // 2), max(0, len(flat) - SAMPLE)):
                    yield _bytes(flat[start : start + SAMPLE])

    return digest(parts())


def _batch_bytes(batches: Iterable[Mapping[str, Any]]) -> Iterable[bytes]:
    for batch in batches:
        for name, value in sorted(batch.items()):
            tensor = isinstance(value, torch.Tensor)
            yield f"{name} {value.dtype} {list(value.shape)}".encode() if tensor else f"{name} {value!r}".encode()
            yield _bytes(value) if tensor else b""


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of bytes one after the other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()
