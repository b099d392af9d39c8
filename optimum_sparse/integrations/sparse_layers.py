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
from ..runtime.grids import find_grids
from ..runtime.quantized import QuantizedTiles
from ..runtime.sparsify import copy_what_stays, fold_reasons, why_not_codes

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
        self._grids, self._no_grids = find_grids(model, None)
        self._not_codes: dict[str, str | None] = {}
        self._tiles: dict[str, Tiles | QuantizedTiles] = {}
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
            tiles, self._not_codes[owner] = self._pack(owner, weight)
            obstacle = "it has too few zeros to become smaller"
        if tiles is None or tiles.nbytes >= weight.nbytes:
            self._refused[owner if attribute == "weight" else name] = obstacle
            return False
        module.weight._is_hf_initialized = True  # nothing random is to take its place
        self._tiles[owner] = tiles
        return True

    def _pack(self, name: str, weight: torch.Tensor) -> tuple[Tiles | QuantizedTiles, str | None]:
        """The weight of a layer, as codes if it is quantised; and why not, although the model is."""
        grid = self._grids.get(name)
        if grid is None:
            return Tiles.pack(weight), "there is no grid for it" if self._grids else self._no_grids
        reason = why_not_codes(weight, grid)
        return (QuantizedTiles.pack(weight, grid), None) if reason is None else (Tiles.pack(weight), reason)

    def put(self) -> RuntimeReport:
        """Make the layers, and say what became of all."""
        layers = {}
        for name in list(self._tiles):
            parent, _, attribute = name.rpartition(".")
            linear = self._model.get_submodule(name)
            layers[name] = SparseLinear(self._tiles.pop(name), linear.bias).eval()
            setattr(self._model.get_submodule(parent), attribute, layers[name])
        copy_what_stays(self._model)
        report = sparsify_for_inference(self._model, prefer="memory")  # matrices that are dense in the files, too
        refused = {name: f"restored dense: {reason}" for name, reason in fold_reasons(self._refused).items()}
        report = replace(
            report,
            layers=[*_choices(layers, self._not_codes), *report.layers],
            untouched={**report.untouched, **refused},
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


def _choices(layers: Mapping[str, SparseLinear], not_codes: Mapping[str, str | None]) -> list[LayerChoice]:
    """What became of layers, those of one shape, type and, within 5 %, sparsity together."""
    kinds: dict[tuple[object, ...], dict[str, SparseLinear]] = {}
    for name, layer in layers.items():
        weight, zeros = layer.weight, round(20 * layer.tiles.sparsity)
        kinds.setdefault((weight.shape, weight.dtype, zeros, not_codes[name]), {})[name] = layer
    return [_choice(members, not_codes[next(iter(members))]) for members in kinds.values()]


def _choice(members: Mapping[str, SparseLinear], reason: str | None) -> LayerChoice:
    weight, tiles = next(iter(members.values())).weight, [layer.tiles for layer in members.values()]
    return LayerChoice(
        names=fold_names(members),
        count=len(members),
        shape=tiles[0].shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        sparsity=sum(part.sparsity for part in tiles) / len(tiles),
        choice="int8" if isinstance(tiles[0], QuantizedTiles) else "sparse",
        reason=None if reason is None else f"not as int8: {reason}",
        microseconds={},
        dense_bytes=len(tiles) * weight.nbytes,
        bytes=sum(part.nbytes for part in tiles),
    )
