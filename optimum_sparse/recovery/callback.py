"""Full fine-tuning with the stock `Trainer`: pruned weights get no gradient and stay zero."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainerCallback

from .masks import Mask, check_masks, count_outside, find_masks, parameter

Model = TypeVar("Model", bound=nn.Module)


class SparsityCallback(TrainerCallback):
    """Keeps the zeros of a pruned model while a `Trainer` trains all of its weights.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SparsityCallback(model)])

    The gradient of a pruned weight is zero before it is accumulated, so the gradient norm and the moments of the
    optimizer are those of the kept weights alone; after each optimizer step the zeros are written once more. Works
    with gradient accumulation, mixed precision, data parallelism and FSDP2, whose shards get their part of the masks.

    Args:
        model: The pruned model, before training: what is zero now stays zero. When training is resumed, give the
            model from which it was started.
        masks: Instead of those that `find_masks` finds in the model.

    Attributes:
        masks: The masks, by parameter name.

    Raises:
        ValueError: The model is dense, was changed after pruning, or has adapters.
    """

    def __init__(self, model: PreTrainedModel, masks: Mapping[str, Mask] | None = None) -> None:
        if getattr(model, "peft_config", None):
            raise ValueError(
                "SparsityCallback is for training the weights themselves, and this model has adapters: use "
                "keep_sparsity(model) instead."
            )
        self.masks = dict(find_masks(model) if masks is None else masks)
        check_masks(model, self.masks)
        self._local: list[tuple[str, torch.Tensor, Mask]] = []
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start to mask gradients; a checkpoint to resume from has been loaded by now."""
        self._remove_hooks()
        self._local = [(key, weight, _local_mask(key, weight, m)) for key, weight, m in self._parameters(model)]
        self._check("when training began")
        for _, weight, mask in self._local:
            if weight.requires_grad and isinstance(weight, DTensor):
                # FSDP2 writes the gradients of its shards without autograd, but runs these hooks.
                self._hooks.append(weight.register_post_accumulate_grad_hook(partial(_mask_accumulated, mask=mask)))
            elif weight.requires_grad:
                self._hooks.append(weight.register_hook(partial(_masked, mask=mask)))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the zeros again, for optimizers that move weights without a gradient."""
        for _, weight, mask in self._local:
            if weight.requires_grad:
                local = _local_tensor(weight)
                local.mul_(mask.expand(local.dtype))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the result; the best checkpoint, if asked for, has been loaded by now."""
        self._remove_hooks()
        self._check("when training ended")
        self._local = []

    def _parameters(self, model: nn.Module) -> list[tuple[str, torch.Tensor, Mask]]:
        try:
            return [(key, parameter(model, key), mask) for key, mask in self.masks.items()]
        except AttributeError as error:
            raise ValueError(
                f"The trained {type(model).__name__} has other parameters than the model of the callback ({error}): "
                "give both the same model; of the sharding schemes, FSDP2 is supported (fsdp_config={'version': 2})."
            ) from error

    def _check(self, when: str) -> None:
        for key, weight, mask in self._local:
            outside = count_outside(_local_tensor(weight), mask)
            if outside:
                raise ValueError(
                    f"{outside} pruned weights of {key} were not zero {when}: the checkpoint that was loaded comes "
                    "from a training without this callback, or from another model."
                )

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def train_norms_only(model: Model) -> Model:
    """Freeze everything but norms and biases, the cheapest recovery; it cannot touch a zero.

    Args:
        model: Changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: It has neither.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.ndim == 1 or name.endswith("bias"))
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"{type(model).__name__} has neither norms nor biases to train: use LoRA.")
    return model


def _masked(grad: torch.Tensor, mask: Mask) -> torch.Tensor:
    return grad * mask.expand(grad.dtype)


def _mask_accumulated(weight: torch.Tensor, mask: Mask) -> None:
    assert weight.grad is not None
    grad = _local_tensor(weight.grad)
    grad.mul_(mask.expand(grad.dtype))


def _local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_mask(key: str, weight: torch.Tensor, mask: Mask) -> Mask:
    """The mask of the part of a parameter that this process holds."""
    if tuple(weight.shape) != mask.shape:
        raise ValueError(
            f"{key} is {list(weight.shape)} in this process and {list(mask.shape)} in the pruned model: it is sharded "
            "in a way that is not supported (DeepSpeed ZeRO-3 or FSDP1). Use FSDP2, or LoRA."
        )
    mask = mask.to(weight.device)
    if isinstance(weight, DTensor):
        # src_data_rank=None: every process cuts its own piece, nothing is sent.
        kept = distribute_tensor(mask.expand(), weight.device_mesh, weight.placements, src_data_rank=None)
        return Mask.of(kept.to_local())
    return mask
