"""The grids of a quantised model, from wherever they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..loading import find_file
from ..quantization import Grid, read_grids
from ..saving import GRIDS_FILE


def find_grids(
    model: nn.Module, grids: Mapping[str, Grid] | str | os.PathLike | None
) -> tuple[Mapping[str, Grid], str | None]:
    """What the matrices of a model were rounded to.

    Args:
        model: The model.
        grids: The grids themselves, by the names of the matrices; the folder of a checkpoint; or the file. By default
            those of the checkpoint that the model was loaded from, if it says that it is quantised.

    Returns:
        The grids, and why there are none although there should be.

    Raises:
        FileNotFoundError: The folder has none, or there is no such file.
        ValueError: The file is damaged, or something else.
    """
    if isinstance(grids, Mapping):
        return grids, None
    if grids is not None:
        path = Path(grids)
        file = path / GRIDS_FILE if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}: give the folder that SparsePruner.save wrote.")
        return read_grids(file), None
    config = getattr(model, "config", None)
    claim = getattr(config, "sparsity_config", None)
    if not isinstance(claim, Mapping) or "quantization" not in claim:
        return {}, None
    source = str(getattr(model, "name_or_path", "") or "")
    remedy = "give grids=pruner.grids, or the folder that SparsePruner.save wrote"
    try:
        found = find_file(source, GRIDS_FILE, getattr(config, "_commit_hash", None)) if source else None
        if found is not None:
            return read_grids(found), None
    except (OSError, ValueError) as error:
        return {}, f"the grids of {source} cannot be read ({error}): {remedy}"
    return {}, f"the model is quantised, but there is no {GRIDS_FILE} where it was loaded from: {remedy}"
