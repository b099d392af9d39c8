"""`from_pretrained(..., quantization_config=SparseConfig(...))`: prune while loading.

Importing this file registers it with transformers, which knows no other way to run code between loading and returning
a model. The result has nothing to do with quantisation: it is an ordinary model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import SparseConfig
from ..loading import check_not_quantized, load_tokenizer, snapshot_revision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "optimum_sparse"


@register_quantization_config(NAME)
class SparseQuantizationConfig(QuantizationConfigMixin):
    """Makes a `SparseConfig` from `quantization_config={"quant_method": "optimum_sparse", "sparsity": 0.6}`."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The `SparseConfig` of a dictionary, by the protocol of transformers."""
        config = SparseConfig.from_dict({key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(NAME)
class SparsePruningQuantizer(HfQuantizer):
    """Prunes a dense model as soon as its weights are loaded."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if checkpoint_files:
            config_file = Path(checkpoint_files[0]).with_name("config.json")
            if config_file.is_file():
                check_not_quantized(model.name_or_path, config_file)
            model.config._commit_hash = snapshot_revision(config_file.parent)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from ..pruner import SparsePruner

        config = self.quantization_config
        self.remove_quantization_config(model)
        for module in model.modules():
            # transformers marked the configuration of the model and of the models inside it.
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        model.eval()  # some versions of transformers do this only after this method
        tokenizer = load_tokenizer(model.name_or_path, getattr(model.config, "_commit_hash", None))
        return SparsePruner(config).prune(model, tokenizer)

    def is_serializable(self) -> bool:
        """An ordinary model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An ordinary model can be trained."""
        return True
