"""Put masks on the LoRA adapters of a model, and mark the adapters so that they are not taken for plain LoRA.

A masked adapter without its mask is another function. PEFT writes the `peft_type` below into adapter_config.json: PEFT
alone does not know it and refuses to load the adapter; with this package imported, it loads and is masked again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import LoraLayer, ParamWrapper, dispatch_default
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .lora import HARMLESS_INITIALISATIONS, mask_layer
from .masks import Mask, bare, check_masks, find_masks, parameter

PEFT_TYPE = "SPARSE_LORA"

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class SparseLoraConfig(LoraConfig):
    """The configuration of a masked adapter. `keep_sparsity` makes it out of a `LoraConfig`."""

    masks: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Digest of the mask of each masked parameter of the base model."}
    )

    def __post_init__(self) -> None:
        """Have PEFT build the layers of a loaded adapter with `_masked_layer`."""
        super().__post_init__()
        self._register_custom_module({nn.Module: _masked_layer})

    def to_dict(self) -> dict[str, Any]:
        """As it is written to adapter_config.json."""
        return {**super().to_dict(), "peft_type": PEFT_TYPE}


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SparseLoraConfig


def _masked_layer(
    target: nn.Module, adapter_name: str, config: SparseLoraConfig, target_name: str, **kwargs: Any
) -> nn.Module | None:
    """The layer that PEFT puts in place of `target` when it loads a masked adapter; `None` for PEFT's own choice."""
    name = kwargs.get("parameter_name")
    key = target_name if name else f"{target_name}.weight"
    if key not in config.masks:
        return None
    mask = Mask.of(getattr(bare(target), name or "weight").detach() != 0)
    _check_digest(config, key, mask)
    layer = dispatch_default(target, adapter_name, config, target_name=target_name, **kwargs)
    mask_layer(layer, mask, key)
    return layer


def keep_sparsity(peft_model: Model, masks: Mapping[str, Mask] | None = None) -> Model:
    """Confine every LoRA update of a pruned model to the weights that were not pruned.

        model = keep_sparsity(get_peft_model(pruned, LoraConfig(target_modules="all-linear")))

    Train it as any other PEFT model; `merge_and_unload()` gives a model with the same zeros. The masks apply to all
    adapters of a layer. After adding another adapter, call this again.

    Args:
        peft_model: A pruned model with LoRA adapters, from `get_peft_model` or `add_adapter`; changed in place.
        masks: Instead of those that `find_masks` finds.

    Returns:
        The same model.

    Raises:
        ValueError: The model is dense or has no LoRA on a pruned matrix, or an adapter cannot be masked (DoRA and
            others) or belongs to another base model.
    """
    model: Any = peft_model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = _lora_layers(base)
    if not layers:
        raise ValueError(
            "The model has no LoRA layers: call get_peft_model(model, LoraConfig(...)) first. Other adapters need no "
            "mask (IA3, HiRA) or cannot have one."
        )
    configs = {name: config for name, config in model.peft_config.items() if isinstance(config, LoraConfig)}
    for name, config in configs.items():
        if config.init_lora_weights not in HARMLESS_INITIALISATIONS:
            raise ValueError(
                f"Adapter {name!r} has init_lora_weights={config.init_lora_weights!r}, which moves a part of the base "
                f"weights into the adapter and fills the zeros: use one of {HARMLESS_INITIALISATIONS}."
            )
    masks = find_masks(base) if masks is None else masks
    check_masks(base, masks)
    _check_no_copies(base, masks)
    adapted = {key: layer for key, layer in layers.items() if key in masks}
    if not adapted:
        raise ValueError(
            f"None of the pruned matrices is adapted: LoRA is on {', '.join(list(layers)[:3])}, pruned are "
            f"{', '.join(list(masks)[:3])}, ... Choose other target_modules."
        )
    _check_not_shared(base, adapted)
    for key, layer in adapted.items():
        mask_layer(layer, masks[key], key)
    for name, config in configs.items():
        if isinstance(config, SparseLoraConfig):
            for key in config.masks.keys() & masks.keys():
                _check_digest(config, key, masks[key])
        ours = {key: masks[key].digest for key, layer in adapted.items() if name in layer.lora_A}
        model.peft_config[name] = _marked(config, ours)
    return peft_model


def _lora_layers(base: nn.Module) -> dict[str, LoraLayer]:
    """LoRA layers by the name of the parameter that they adapt."""
    layers = {}
    for name, module in base.named_modules():
        if isinstance(module, ParamWrapper):
            owner = ".".join(part for part in name.split(".") if part != "base_layer")  # wrappers are nested
            layers[f"{owner}.{module.parameter_name}"] = module
        elif isinstance(module, LoraLayer):
            layers[f"{name}.weight"] = module
    return layers


def _marked(config: LoraConfig, masks: dict[str, str]) -> SparseLoraConfig:
    """The same configuration, to be saved as that of a masked adapter."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    return SparseLoraConfig(**{**values, "masks": masks})


def _check_digest(config: SparseLoraConfig, key: str, mask: Mask) -> None:
    if config.masks[key] != mask.digest:
        raise ValueError(
            f"This adapter was trained on a model with other zeros in {key!r}: load the pruned model that it belongs "
            f"to ({config.base_model_name_or_path or 'its name was not recorded'}), unmerged and in the same dtype."
        )


def _check_not_shared(base: nn.Module, keys: Iterable[str]) -> None:
    uses = Counter(id(weight) for _, weight in base.named_parameters(remove_duplicate=False))
    for key in keys:
        if uses[id(parameter(base, key))] > 1:
            raise ValueError(f"several modules use {key}, and each would have an adapter of its own")


def _check_no_copies(base: nn.Module, masks: Mapping[str, Mask]) -> None:
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(key.startswith(f"{name}.") for key in masks):
            raise ValueError(f"modules_to_save trains a copy of {name}, which was pruned: adapt it with LoRA instead.")
