"""`runtime="sparse"`: packed matrices of a checkpoint become `SparseLinear` layers, one at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..metadata import fold_names
from ..runtime import LayerChoice, RuntimeReport, SparseLinear, Tiles, kernels, sparsify_for_inference
from ..runtime.sparsify import copy_what_stays, fold_reasons

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class SparseLayers:
    """The linear layers of a model that get their weights packed, while the model is loaded.

    `take` is offered every matrix that is packed in the files, and at the end `put` makes the layers. Until then their
    places in the model stay empty: transformers, which knows no other parameters, would overwrite packed ones.

    Args:
        model: The model, before any weight is loaded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        uses = Counter(map(id, parameters.values()))
        self._shared = {name for name, parameter in parameters.items() if uses[id(parameter)] > 1}
        self._shared |= {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._tiles: dict[str, Tiles] = {}
        self._refused: dict[str, str] = {}

    def take(self, name: str, weight: torch.Tensor) -> bool:
        """Take the weight that was unpacked for a parameter, if the layer can have it packed.

        Args:
            name: Of the parameter.
            weight: Its value.

        Returns:
            Whether it was taken. If not, it has to be put into the model as it is.
        """
        owner, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(owner)
        tiles = None
        if type(module) is not nn.Linear or attribute != "weight":
            obstacle = f"only nn.Linear can have packed weights, and this is one of {type(module).__name__}"
        elif name in self._shared:
            obstacle = "another layer uses the same weight"
        elif weight.dtype not in kernels.TYPES:
            obstacle = f"there is no packed form for {weight.dtype}"
        elif weight.shape != module.weight.shape:
            obstacle = f"its layer has the shape {list(module.weight.shape)}"
        else:
            tiles = Tiles.pack(weight)
            obstacle = "it has too few zeros to become smaller"
        if tiles is None or tiles.nbytes >= weight.nbytes:
            self._refused[owner if attribute == "weight" else name] = obstacle
            return False
        module.weight._is_hf_initialized = True  # nothing random is to take its place
        self._tiles[owner] = tiles
        return True

    def put(self) -> RuntimeReport:
        """Make the layers, and say what became of all."""
        while self._tiles:
            name, tiles = self._tiles.popitem()
            parent, _, attribute = name.rpartition(".")
            linear = self._model.get_submodule(name)
            setattr(self._model.get_submodule(parent), attribute, SparseLinear(tiles, linear.bias).eval())
        copy_what_stays(self._model)
        report = sparsify_for_inference(self._model, prefer="memory")  # matrices that are dense in the files, too
        dense = [layer for layer in report.layers if layer.choice != "sparse"]
        refused = {name: f"restored dense: {reason}" for name, reason in fold_reasons(self._refused).items()}
        report = replace(
            report, layers=[*_packed_layers(self._model), *dense], untouched={**report.untouched, **refused}
        )
        self._warn(report)
        return report

    def _warn(self, report: RuntimeReport) -> None:
        """Say what is not as one may think."""
        for reason in dict.fromkeys(self._refused.values()):
            names = [name for name, other in self._refused.items() if other == reason]
            logger.warning("Packed in the files but dense in memory, %s: %s.", reason, ", ".join(fold_names(names)))
        compiled = {str(dtype).removeprefix("torch.") for dtype in kernels.MULTIPLIED if kernels.compiled()}
        slow = {layer.dtype for layer in report.layers if layer.choice == "sparse"} - compiled
        if slow:
            logger.warning(
                "There are no compiled kernels here for packed weights in %s: each product unpacks them, which takes "
                "longer than a dense product.",
                ", ".join(sorted(slow)),
            )


def _packed_layers(model: nn.Module) -> list[LayerChoice]:
    """The `SparseLinear` layers of a model, those of one shape, type and, within 5 %, sparsity together."""
    kinds: dict[tuple[object, ...], dict[str, Tiles]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and isinstance(tiles := module.tiles, Tiles):
            kind = (tiles.shape, tiles.values.dtype, round(20 * tiles.sparsity))
            kinds.setdefault(kind, {})[name] = tiles
    return [_choice(members) for members in kinds.values()]


def _choice(members: Mapping[str, Tiles]) -> LayerChoice:
    first = next(iter(members.values()))
    return LayerChoice(
        names=fold_names(members),
        count=len(members),
        shape=first.shape,
        dtype=str(first.values.dtype).removeprefix("torch."),
        sparsity=sum(tiles.sparsity for tiles in members.values()) / len(members),
        choice="sparse",
        reason=None,
        microseconds={},
        dense_bytes=len(members) * first.shape[0] * first.shape[1] * first.values.itemsize,
        bytes=sum(tiles.nbytes for tiles in members.values()),
    )
