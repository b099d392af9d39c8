"""Writing a folder of files so that a failure half-way leaves the old ones as they were."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

# The grids of quantised weights. They are not beside the weights: software that loads every safetensors file it finds
# there would take them for such.
GRIDS_FILE = "quantization/grids.safetensors"
# Files of an earlier save, which would be loaded along with the new ones.
WEIGHT_FILES = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    GRIDS_FILE,
)

# How the names of folders begin that a save is written to before it replaces the target's files.
TEMPORARY = ".saving-"


@contextmanager
def replace_folder(directory: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, and move its files to `directory` when all of them are complete.

    Files of the same name are replaced one by one by atomic renames, the weight files of an earlier model go last, and
    whatever else stands in `directory` stays. If the body raises, for instance because the disk is full, nothing there
    has changed.

    Raises:
        ValueError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a folder to save into.")
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    for left_behind in directory.glob(f"{TEMPORARY}*"):  # by a process that was killed while it wrote
        shutil.rmtree(left_behind, ignore_errors=True)
    # Beside the target, hence on the same disk, so that the moves are renames.
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=directory))
    try:
        yield temporary
        new = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        for name in new:
            (directory / name).parent.mkdir(exist_ok=True)
        # The index of sharded weights comes after the shards it names, the rest after the weights.
        for name in sorted(new, key=lambda name: (name.suffix != ".safetensors", name)):
            os.replace(temporary / name, directory / name)
        for pattern in WEIGHT_FILES:
            for path in directory.glob(pattern):
                if path.relative_to(directory) not in new:
                    path.unlink()
                    if path.parent != directory and not any(path.parent.iterdir()):
                        path.parent.rmdir()
    finally:
        shutil.rmtree(temporary)
        if is_new and not any(directory.iterdir()):
            directory.rmdir()


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` when it is complete.

    If the body raises, `path` is as it was. What is at `path` is complete on the disk, even if the machine stops.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:  # Windows flushes only what can be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, or leave what is there as it is.

    Args:
        path: Where to.
        tensors: The tensors by name, on any device.
        metadata: Goes in the header of the file.
    """
    with replace_file(path) as temporary:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, temporary, metadata=dict(metadata or {}))


def check_target(model: nn.Module, directory: str | Path) -> None:
    """Refuse to save a disk-offloaded model over the files that its weights are still read from.

    Raises:
        ValueError: `directory` holds a file that `model` reads its weights from.
    """
    directory = Path(directory).resolve()
    for path in offload_files(model):
        if path.resolve().parent == directory:
            raise ValueError(
                f"{directory} holds {path.name}, from which this offloaded model still reads its weights: saving "
                "there would destroy them. Choose another folder."
            )


def offload_files(model: nn.Module) -> set[Path]:
    """The safetensors files from which Accelerate loads offloaded weights of `model`, if any."""
    files = set()
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            weights = getattr(part, "weights_map", None)
            weights = getattr(weights, "dataset", weights)
            for entry in (getattr(weights, "index", None) or {}).values():
                if "safetensors_file" in entry:
                    files.add(Path(entry["safetensors_file"]))
    return files
