"""Plain `from_pretrained` of a packed checkpoint: it gives an ordinary dense model.

Importing this file registers the format with transformers as a quantisation method, the one way it has to read tensors
that are stored in another form. Nothing of that is left on the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import VERSION, Checkpoint, check_version
from ..loading import PACKED
from ..packing import LAYOUT, POSITIONS, Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(PACKED)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint.

    Args:
        version: Of the format.

    Raises:
        ValueError: This version of the package does not know it.
    """

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        check_version(version)
        self.quant_method = PACKED
        self.version = version
        self.dequantize = True  # the loaded model has no trace of this


@register_quantizer(PACKED)
class PackedQuantizer(HfQuantizer):
    """Unpacks the tensors of a checkpoint while they are loaded."""

    requires_calibration = True  # transformers' way to say that it makes no packed model of a dense one

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if getattr(model, "_tp_size", None) is not None:
            raise ValueError(
                "A packed checkpoint cannot be loaded with tensor parallelism, which cuts tensors as they are in the "
                "files: make it dense first, with `optimum-cli sparse unpack DIR OUT`."
            )
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise ValueError("config.json says that the weights are packed, but they are not in safetensors files.")
        with Checkpoint(map(Path, checkpoint_files), "packed") as checkpoint:
            checkpoint.check()
            self._leaves = sorted({name.rpartition(".")[2] for name in checkpoint.packed})
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Let the model's own conversions, such as joining experts, find their tensors packed, and unpack all others."""
        from transformers.core_model_loading import WeightConverter

        self._originals: dict[int, Any] = {}
        result = []
        for conversion in weight_conversions:
            sources, targets = conversion.source_patterns, conversion.target_patterns
            ends = [source.removesuffix("$").endswith(tuple(self._leaves)) for source in sources]
            if not self._leaves or not any(ends):
                result.append(conversion)
            elif isinstance(conversion, WeightConverter):
                unpack = _unpack_operation(conversion.operations, sources)
                result.append(conversion.copy([*_with_parts(sources)], list(targets), operations=[unpack]))
                self._originals[id(result[-1])] = conversion
            else:
                # A new name for a tensor is one for its parts, too.
                result.append(conversion)
                if len(sources) == len(targets) == 1:
                    parts = (POSITIONS, LAYOUT)
                    added = [conversion.copy([_with(sources[0], p)], [_with(targets[0], p)]) for p in parts]
                    result += added
                    self._originals |= {id(copy): None for copy in added}
        for leaf in self._leaves:
            result.append(WeightConverter([*_with_parts([f"{leaf}$"])], leaf, [_unpack_operation([], [f"{leaf}$"])]))
            self._originals[id(result[-1])] = None
        return result

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Saving undoes the conversions of loading: those of the model, not ours.
        used = [self._originals.get(id(conversion), conversion) for conversion in model._weight_conversions]
        model._weight_conversions = [conversion for conversion in used if conversion is not None]
        return model

    def is_serializable(self) -> bool:
        """An ordinary model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An ordinary model can be trained."""
        return True


def _unpack_operation(then: Sequence[Any], sources: Sequence[str]) -> Any:
    """An operation of transformers that unpacks the tensors found for `sources` and goes on with what the model does."""
    from transformers.core_model_loading import ConversionOps

    class Unpack(ConversionOps):
        supports_many_to_many = True

        def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
            tensors = {source: list(_unpacked(input_dict, source)) for source in sources if source in input_dict}
            if not then:
                return {kwargs["full_layer_name"]: next(iter(tensors.values()))}
            for operation in then:
                tensors = operation.convert(tensors, **{**kwargs, "source_patterns": list(sources)})
            return tensors

    return Unpack()


def _unpacked(found: Mapping[str, Any], source: str) -> Iterator[torch.Tensor]:
    """The tensors found for a name, e.g. one for each expert. Among them may be some that are not packed."""
    parts = zip(*(found.get(_with(source, part), []) for part in (POSITIONS, LAYOUT)), strict=True)
    for tensor in found[source]:
        # Only matrices are packed, and only packed ones have one dimension and further parts.
        packed = next(parts, None) if tensor.ndim == 1 else None
        if packed is None:
            yield tensor
        else:
            positions, layout = packed
            yield Packed.from_tensors(tensor.cpu(), positions.cpu(), layout.cpu()).unpack().to(tensor.device)


def _with_parts(sources: Sequence[str]) -> Iterator[str]:
    for source in sources:
        yield from (source, _with(source, POSITIONS), _with(source, LAYOUT))


def _with(pattern: str, part: str) -> str:
    """The pattern of the name of a part of a packed tensor."""
    end = "$" * pattern.endswith("$")
    return pattern.removesuffix("$") + part + end
