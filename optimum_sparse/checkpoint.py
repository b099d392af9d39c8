"""Checkpoints of safetensors files whose tensors may be packed: reading them, packing and unpacking them.

A packed tensor NAME stands in a file as NAME (its values), NAME_positions and NAME_layout, and config.json names the
format in its `quantization_config`: software that does not know it finds tensors of the wrong shape and stops.
Checkpoints that compressed-tensors wrote as "sparse-bitmask" or "sparse-24-bitmask" can be read, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .loading import PACKED, quantization_method, read_json
from .metadata import read_claims
from .packing import LAYOUT, POSITIONS, Packed, smallest
from .saving import GRIDS_FILE, WEIGHT_FILES, replace_folder

Encoding = Literal["dense", "packed", "compressed-tensors"]

VERSION = 1
INDEX = "model.safetensors.index.json"
LEGACY_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")

# What is appended to a name for each part of a packed tensor: the values first.
_PARTS: dict[Encoding, tuple[str, ...]] = {
    "dense": (),
    "packed": ("", POSITIONS, LAYOUT),
    "compressed-tensors": (".compressed", ".bitmask", ".shape"),
}


@dataclass(frozen=True)
class Sizes:
    """What packing or unpacking did.

    Attributes:
        packed_tensors: How many tensors are packed, in the packed checkpoint.
        dense_bytes: Bytes of these tensors when they are dense.
        packed_bytes: Bytes of the same tensors packed.
        total_bytes: Bytes of all weight files written.
    """

    packed_tensors: int
    dense_bytes: int
    packed_bytes: int
    total_bytes: int


def encoding(config: Mapping[str, Any]) -> Encoding:
    """How the tensors of a checkpoint are stored, as its config.json says.

    Raises:
        ValueError: They are quantised, or packed in a way that is not known here.
    """
    method = quantization_method(config)
    if method is None:
        return "dense"
    details = config["quantization_config"]
    quantization = details if isinstance(details, dict) else {}
    if method == PACKED:
        check_version(quantization.get("version"))
        return "packed"
    sparsity = quantization.get("sparsity_config") if method == "compressed-tensors" else None
    legacy = isinstance(sparsity, dict) and sparsity.get("format") in LEGACY_FORMATS
    if legacy and not quantization.get("config_groups"):
        return "compressed-tensors"
    raise ValueError(
        f"The checkpoint is quantised with {method}: what can be read is dense, or packed by this package, or in the "
        f"format {' or '.join(LEGACY_FORMATS)} of compressed-tensors without quantisation."
    )


def check_version(version: Any) -> None:
    """Refuse a packed checkpoint of a format that is not known here.

    Raises:
        ValueError: It is not.
    """
    if version != VERSION:
        raise ValueError(
            f"The checkpoint is packed in version {version!r} of the format, and this package reads version "
            f"{VERSION}: pip install --upgrade optimum-sparse."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: There are none, or one that the index names is not there.
        ValueError: The index is not valid.
    """
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError(f"{index} has no weight_map to files beside it: download or save the checkpoint again.")
        files = [folder / name for name in sorted(set(names.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)}, which {index.name} names: download it again."
            )
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors files: other formats cannot be read.")
    return files


class Checkpoint:
    """The tensors of some safetensors files, by name. Opening it reads the headers only.

    Args:
        files: The files.
        encoding: How tensors are stored in them.

    Attributes:
        names: For each file the names of its tensors; a packed one counts where its values are.
        packed: The names of the packed tensors.

    Raises:
        ValueError: A file is corrupt, or a part of a packed tensor is missing.
    """

    def __init__(self, files: Iterable[Path], encoding: Encoding = "dense") -> None:
        self._legacy = encoding == "compressed-tensors"
        self._opened: tuple[Path, Any] | None = None
        self._where: dict[str, Path] = {}
        self.names: dict[Path, list[str]] = {}
        for file in files:
            with _corrupt(file):
                self._where |= dict.fromkeys(self._open(file).keys(), file)
            self.names[file] = []
        packed = self._find_packed(_PARTS[encoding])
        first_parts = {parts[0]: name for name, parts in packed.items()}
        other_parts = {part for _, *others in packed.values() for part in others}
        self.packed = list(packed)
        self._parts: dict[str, tuple[str, ...]] = {}
        for part, file in self._where.items():
            if part not in other_parts:
                name = first_parts.get(part, part)
                self._parts[name] = packed.get(name, (part,))
                self.names[file].append(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened = None

    def read(self, name: str) -> torch.Tensor | Packed:
        """A tensor; one that is not packed is a view of the file.

        Raises:
            ValueError: Its parts do not fit together. Nothing has been allocated in proportion to what they claim.
        """
        file = self._where[self._parts[name][0]]
        with _corrupt(file):
            tensors = [self._open(self._where[part]).get_tensor(part) for part in self._parts[name]]
        if len(tensors) == 1:
            return tensors[0]
        values, positions, layout = tensors[:3]
        try:
            return (_from_legacy if self._legacy else Packed.from_tensors)(values, positions, layout)
        except ValueError as error:
            raise ValueError(f"{file} is corrupt: in the tensor {name} {error} Download or save it again.") from error

    def check(self) -> None:
        """Check all packed tensors, one at a time.

        Raises:
            ValueError: One is not valid.
        """
        for name in self.packed:
            self.read(name)

    def _open(self, file: Path) -> Any:
        """One file is open at a time: what was read of others takes no memory any more."""
        opened = self._opened
        if opened is None or opened[0] != file:
            opened = self._opened = (file, safe_open(file, framework="pt").__enter__())
        return opened[1]

    def _find_packed(self, suffixes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The parts of each packed tensor, by its name."""
        found = {}
        marks = [suffix for suffix in suffixes if suffix]
        for base in dict.fromkeys(
            name.removesuffix(mark) for mark in marks for name in self._where if name.endswith(mark)
        ):
            parts = tuple(base + suffix for suffix in suffixes)
            there = [part for part in parts if part in self._where]
            if len(there) < len(parts):
                missing = next(part for part in parts if part not in self._where)
                raise ValueError(
                    f"{self._where[there[0]]} has the tensor {there[0]}, but there is no {missing}: download or save "
                    "the checkpoint again."
                )
            if self._legacy:
                offsets = f"{base}.row_offsets"
                found[f"{base}.weight"] = (*parts, offsets) if offsets in self._where else parts
            else:
                found[base] = parts
        return found


def pack_folder(source: Path, output: Path) -> Sizes:
    """Pack the matrices of a checkpoint that get smaller by it, one weight file in memory at a time.

    Args:
        source: Folder of the checkpoint. Its other files are copied; of what is in folders inside it, only grids.
        output: Where to, see `saving.replace_folder`.

    Raises:
        OSError: There is no such checkpoint, or writing failed; what was in `output` is unchanged.
        ValueError: It is packed already or quantised, no matrix gets smaller, a file is corrupt, or `output` is
            `source`.
    """
    return _convert_folder(source, output, pack=True)


def unpack_folder(source: Path, output: Path) -> Sizes:
    """Make a packed checkpoint dense, as `pack_folder`.

    Raises:
        OSError: There is no such checkpoint, or writing failed; what was in `output` is unchanged.
        ValueError: It is dense already or quantised, a file is corrupt, or `output` is `source`.
    """
    return _convert_folder(source, output, pack=False)


def convert(source: Path, folder: Path, pack: bool) -> Sizes:
    """Write a checkpoint to another folder, where nothing is yet, packed or dense; see `pack_folder`."""
    files, config = weight_files(source), read_json(source / "config.json")
    stored = encoding(config)
    if stored == ("packed" if pack else "dense"):
        raise ValueError(f"{source} is {stored} already.")
    patterns = _patterns(config, stored)
    weight_map: dict[str, str] = {}
    count = dense_bytes = packed_bytes = 0
    with Checkpoint(files, stored) as checkpoint, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        if pack:
            _check_names(checkpoint)

        def read(name: str) -> tuple[torch.Tensor | Packed, Packed | None]:
            tensor = checkpoint.read(name)
            return _packed(tensor, patterns) if pack else _dense(tensor)

        for file, names in checkpoint.names.items():
            tensors: dict[str, torch.Tensor] = {}
            for name, (tensor, packed) in zip(names, pool.map(read, names), strict=True):
                if packed is not None:
                    count, packed_bytes = count + 1, packed_bytes + packed.nbytes
                    dense_bytes += packed.numel * packed.values.element_size()
                parts = tensor.to_tensors() if isinstance(tensor, Packed) else {"": tensor}
                tensors |= {name + suffix: part for suffix, part in parts.items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
    if pack and not count:
        raise ValueError(
            "No matrix gets smaller by packing: too few of their weights are zero (-0.0 is none). Prune the model, or "
            "leave it dense."
        )
    total_bytes = sum((folder / file.name).stat().st_size for file in files)
    if (source / INDEX).is_file():
        metadata = read_json(source / INDEX).get("metadata")
        metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_bytes}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    config.pop("quantization_config", None)
    if pack:
        config["quantization_config"] = {"quant_method": PACKED, "version": VERSION}
    _write_json(folder / "config.json", config)
    written = {"config.json", *(file.name for file in files)}
    for path in source.iterdir():
        if path.is_file() and path.name not in written and not any(map(path.match, WEIGHT_FILES)):
            shutil.copyfile(path, folder / path.name)
    if (source / GRIDS_FILE).is_file():
        (folder / GRIDS_FILE).parent.mkdir()
        shutil.copyfile(source / GRIDS_FILE, folder / GRIDS_FILE)
    return Sizes(count, dense_bytes, packed_bytes, total_bytes)


def _convert_folder(source: Path, output: Path, pack: bool) -> Sizes:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give the folder of a checkpoint.")
    if output.exists() and output.samefile(source):
        raise ValueError(f"OUT is DIR ({output}): give another folder, what is there is not overwritten.")
    with replace_folder(output) as folder:
        return convert(source, folder, pack)


def _check_names(checkpoint: Checkpoint) -> None:
    for file, names in checkpoint.names.items():
        for name in names:
            if name.endswith((POSITIONS, LAYOUT)):
                raise ValueError(f"{file} has the tensor {name}: such names are for parts of packed tensors.")


def _packed(tensor: torch.Tensor | Packed, patterns: list[tuple[str, bool]]) -> tuple[Any, Packed | None]:
    """What to write for a tensor if it is to be packed, and, if it is, its packed form."""
    dense = tensor.unpack() if isinstance(tensor, Packed) else tensor
    packed = smallest(dense, patterns) if dense.ndim >= 2 and dense.is_floating_point() else None
    return (dense if packed is None else packed), packed


def _dense(tensor: torch.Tensor | Packed) -> tuple[torch.Tensor, Packed | None]:
    """What to write for a tensor if it is to be dense, and, if it was packed, its packed form."""
    return (tensor.unpack(), tensor) if isinstance(tensor, Packed) else (tensor, None)


def _patterns(config: Mapping[str, Any], stored: Encoding) -> list[tuple[str, bool]]:
    """The N:M patterns that the matrices of a checkpoint are said to have, and whether they are stored transposed."""
    if stored == "compressed-tensors":
        return [("2:4", False)]
    if "sparsity_config" not in config:
        return []
    claims = read_claims(config["sparsity_config"]).values()
    return list(dict.fromkeys((claim.pattern, claim.transposed) for claim in claims if claim.pattern is not None))


def _from_legacy(values: torch.Tensor, bitmask: torch.Tensor, shape: torch.Tensor) -> Packed:
    """A tensor of compressed-tensors, whose bitmask has whole bytes for each row."""
    sizes = shape.flatten().tolist() if shape.dtype == torch.int64 and shape.numel() == 2 else []
    if not sizes or bitmask.dtype != torch.uint8 or list(bitmask.shape) != [sizes[0], -(-sizes[1] // 8)]:
        raise ValueError(f"the bitmask is {bitmask.dtype} {list(bitmask.shape)}, which is not for a shape of {sizes}.")
    positions = bitmask.reshape(-1)
    if sizes[1] % 8:
        bits = np.unpackbits(bitmask.numpy(), axis=1, count=sizes[1], bitorder="little")
        positions = torch.from_numpy(np.packbits(bits, bitorder="little"))
    return Packed(values.reshape(-1), positions, tuple(sizes))


@contextmanager
def _corrupt(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error}): download or save it again.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
