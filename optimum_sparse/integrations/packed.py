"""Plain `from_pretrained` of a packed checkpoint: an ordinary dense model, or one that stays packed in memory.

Importing this file registers the format with transformers as a quantisation method, the one way it has to read tensors
that are stored in another form. Nothing of that is left on the loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import VERSION, Checkpoint, check_version
from ..loading import PACKED, RUNTIMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .sparse_layers import SparseLayers


@register_quantization_config(PACKED)
class PackedConfig(QuantizationConfigMixin):
    """How to load a packed checkpoint: `from_pretrained(DIR, quantization_config=PackedConfig(runtime="sparse"))`.

    Args:
        version: Of the format, as the checkpoint says.
        runtime: `"dense"`: an ordinary model. `"sparse"`: packed matrices stay packed in memory, as `SparseLinear`
            layers, and the dense model never exists; `model.runtime_report` says what became of each layer.
        quant_method: As the checkpoint says.

    Raises:
        ValueError: This version of the package does not know the version, or there is no such runtime.
    """

    dequantize = True  # the loaded model has no trace of this

    def __init__(self, version: int = VERSION, runtime: str = "dense", quant_method: str = PACKED) -> None:
        check_version(version)
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}.")
        self.quant_method = quant_method
        self.version = version
        self.runtime = runtime

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the user decides, and not the checkpoint."""
        return {"runtime": self.runtime}


# Of other types, transformers ignores what the user gives besides the configuration of the checkpoint.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (PackedConfig,)


@register_quantizer(PACKED)
class PackedQuantizer(HfQuantizer):
    """Unpacks the tensors of a checkpoint while they are loaded, or gives them to the layers packed."""

    requires_calibration = True  # transformers' way to say that it makes no packed model of a dense one

    def __init__(self, quantization_config: PackedConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            raise ValueError(
                "The checkpoint is not packed, which PackedConfig is for: pack it with `optimum-cli sparse pack DIR "
                "OUT`, or load it as it is; `sparsify_for_inference(model, prefer='memory')` packs it in memory."
            )
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self._layers: SparseLayers | None = None

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
            self._packed = checkpoint.packed
        if self.quantization_config.runtime == "sparse":
            from .sparse_layers import SparseLayers

            _check_on_cpu(kwargs.get("device_map"))
            self._layers = SparseLayers(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The rules of the model for renaming and joining tensors, so that they see packed ones through."""
        from .unpacking import conversions_for_parts

        take = None if self._layers is None else self._layers.take
        return conversions_for_parts(weight_conversions, self._packed, take)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Leave nothing of this on the model but the rules that a dense checkpoint leaves, which saving undoes."""
        from .unpacking import originals

        rules = originals(model._weight_conversions)  # transformers 5.24 removes them, too
        super().remove_quantization_config(model)
        model._weight_conversions = rules

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._layers is not None:
            model.runtime_report = self._layers.put()
        return model

    def is_serializable(self) -> bool:
        """An ordinary model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An ordinary model can be trained."""
        return True


def _check_on_cpu(device_map: str | Mapping[str, Any] | None) -> None:
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map or "cpu"]
    if any(str(place).partition(":")[0] != "cpu" for place in places):
        raise ValueError(
            f"runtime='sparse' is for models that are on the CPU as a whole, and device_map is {device_map!r}: leave "
            "it out or give 'cpu'. For other devices, and to offload a part, load the model without runtime='sparse'."
        )
