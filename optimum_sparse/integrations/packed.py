"""Plain `from_pretrained` of a packed checkpoint: it gives an ordinary dense model.

Importing this file registers the format with transformers as a quantisation method, the one way it has to read tensors
that are stored in another form. Nothing of that is left on the loaded model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import VERSION, Checkpoint, check_version
from ..loading import PACKED

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
            self._packed = checkpoint.packed
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The rules of the model for renaming and joining tensors, so that they see packed ones through."""
        from .unpacking import conversions_for_parts

        return conversions_for_parts(weight_conversions, self._packed)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from .unpacking import originals

        model._weight_conversions = originals(model._weight_conversions)
        return model

    def is_serializable(self) -> bool:
        """An ordinary model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An ordinary model can be trained."""
        return True
