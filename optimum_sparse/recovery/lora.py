"""LoRA whose update stays inside the sparsity pattern: `W + M ∘ (s B A)`, in training and in merging.

A pruned weight is written `W`, its mask `M`, and the update of all active adapters `left @ right`. Neither the masked
update nor its gradient is kept between forward and backward: both are computed again from the two thin factors, which
costs rank/tokens of the layer's own product. The effective weight has the dtype in which the layer computes, so that
what is trained is, to the bit, what merging gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper, _LoraParameterProxy
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .masks import Mask

# What else PEFT can initialise with changes the base weights, and with them the zeros.
HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def effective_weight(
    weight: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`weight + kept * (left @ right)` in `dtype`, or the update alone; computed in the dtype of the factors."""
    update = left @ right
    if weight is None:
        return update.mul_(kept).to(dtype)
    in_place = torch.promote_types(weight.dtype, update.dtype) == update.dtype
    return torch.addcmul(weight, update, kept, out=update if in_place else None).to(dtype)


class MaskedLinear(torch.autograd.Function):
    """`x @ (weight + mask ∘ (left @ right)).T + bias`, `weight` `[out, in]`, or `[in, out]` if `transposed`.

    The gradient of the effective weight, `G = dy.T @ x`, exists only inside the backward of this layer; the factors
    get `(M ∘ G) @ right.T` and `left.T @ (M ∘ G)`. The pruned weight itself gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        left: torch.Tensor,
        right: torch.Tensor,
        mask: Mask,
        transposed: bool,
    ) -> torch.Tensor:
        """Arguments as above."""
        ctx.save_for_backward(x, weight, left, right)
        ctx.mask, ctx.transposed = mask, transposed
        effective = effective_weight(weight, left, right, mask.expand(left.dtype), x.dtype)
        return functional.linear(x, effective.T if transposed else effective, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, bias, left and right."""
        x, weight, left, right = ctx.saved_tensors
        needs_x, _, needs_bias, *needs_factor, _, _ = ctx.needs_input_grad
        grad_x = grad_bias = grad_left = grad_right = None
        kept = ctx.mask.expand(left.dtype)
        if needs_x:
            effective = effective_weight(weight, left, right, kept, x.dtype)
            grad_x = grad @ (effective.T if ctx.transposed else effective)
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        if needs_bias:
            grad_bias = grad.sum(dim=0)
        if any(needs_factor):
            of_weight = (x.T @ grad if ctx.transposed else grad.T @ x).to(left.dtype)
            of_weight.mul_(kept)
            grad_left, grad_right = of_weight @ right.T, left.T @ of_weight
        return grad_x, None, grad_bias, grad_left, grad_right, None, None


class MaskedUpdate(torch.autograd.Function):
    """`weight + mask ∘ (left @ right)` as a tensor, for parameters that only their own module knows how to use."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Factors may have a leading dimension of experts."""
        ctx.save_for_backward(left, right)
        ctx.mask = mask
        return effective_weight(weight, left, right, mask.expand(left.dtype), weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of left and right."""
        left, right = ctx.saved_tensors
        of_weight = grad.to(left.dtype) * ctx.mask.expand(left.dtype)
        return None, of_weight @ right.mT, left.mT @ of_weight, None


class MaskedLoraLinear(Linear):
    """PEFT's LoRA layer over `nn.Linear` or `Conv1D`, with a mask on its update.

    PEFT merges and unmerges what `get_delta_weight` gives, so that its own `merge_and_unload`, `safe_merge` and the
    rest keep the zeros without further ado.
    """

    mask: Mask

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The masked update of one adapter, in the layout of the base weight."""
        delta = super().get_delta_weight(adapter)
        return delta.mul_(self.mask.to(delta.device).expand(delta.dtype))

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Masked LoRA cannot run several adapters in one batch (adapter_names): call set_adapter for each."
            )
        super()._check_forward_args(x, *args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's layer, with the mask."""
        self._check_forward_args(x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        if self._is_plain(base) and not any(self._drops(name) for name in adapters):
            result = self._masked(x, base.weight, base.bias, adapters)
        else:
            result = self.base_layer(x, *args, **kwargs)
            for name in adapters:
                result = result + self._masked(self.lora_dropout[name](x), None, None, [name]).to(result.dtype)
        for name in adapters:
            if self.lora_bias[name]:
                result = result + (self.lora_B[name].bias * self.scaling[name]).to(result.dtype)
        return result

    def _masked(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, adapters: list[str]
    ) -> torch.Tensor:
        device = x.device.type
        left = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in adapters], dim=1)
        right = torch.cat([self.lora_A[name].weight for name in adapters])
        if self.fan_in_fan_out:
            left, right = right.T, left.T
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
        self.mask = self.mask.to(x.device)
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.shape[-1])  # what comes out is no view then, and can be changed in place
            out = MaskedLinear.apply(rows, weight, bias, left, right, self.mask, self.fan_in_fan_out)
            return out.view(*x.shape[:-1], out.shape[-1])

    def _drops(self, adapter: str) -> bool:
        # Dropout is on the input of the update alone, which then needs a product of its own.
        dropout = self.lora_dropout[adapter]
        return dropout.training and getattr(dropout, "p", 0) > 0

    @staticmethod
    def _is_plain(base: nn.Module) -> bool:
        """Whether the base layer does nothing but multiply, so that its product and that of the update can be one."""
        multiplies = type(base).forward in (nn.Linear.forward, Conv1D.forward)
        # Accelerate's hooks, which move weights, replace the forward of the instance.
        return multiplies and "forward" not in vars(base) and not base._forward_hooks and not base._forward_pre_hooks


class MaskedParamWrapper(ParamWrapper):
    """PEFT's LoRA on a bare parameter (`target_parameters`), such as fused experts, with a mask on its update."""

    mask: Mask

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The masked update of one adapter, in the layout of the parameter."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        kept = self.mask.to(delta.device).expand(delta.dtype)
        return delta.view_as(kept).mul_(kept)  # of a single expert, PEFT gives two dimensions

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        base, parameter = self.get_base_layer(), self.get_param()
        self.mask = self.mask.to(parameter.device)
        factors = [self._factors(name) for name in adapters]
        proxy = _MaskedProxy(torch.cat([f[0] for f in factors], -1), torch.cat([f[1] for f in factors], -2), self.mask)
        trained = parameter.requires_grad
        parametrize.register_parametrization(base, self.parameter_name, proxy)
        base.parametrizations[self.parameter_name].original.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        if self.num_experts == 1:
            left, right = self.lora_B[adapter].weight * self.scaling[adapter], self.lora_A[adapter].weight
            return (left, right) if len(self.mask.shape) == 2 else (left[None], right[None])  # a single expert
        left, right, scaling = self.get_delta_factors(adapter)
        return left * scaling, right


MaskedParamWrapper.__name__ = "ParamWrapper"  # by which PEFT recognises it when another adapter is added


class _MaskedProxy(_LoraParameterProxy):
    """Stands in for the parameter during a forward. A subclass of PEFT's, which is how PEFT finds it to remove it."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, mask: Mask) -> None:
        super().__init__(None)
        self.left, self.right, self.mask = left, right, mask

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        with torch.autocast(W.device.type, enabled=False):  # the parameter must keep its dtype
            return MaskedUpdate.apply(W, self.left, self.right, self.mask)


def mask_layer(layer: LoraLayer, mask: Mask, key: str) -> None:
    """Confine the update of a LoRA layer to a mask, for all its adapters.

    Args:
        layer: Changed in place; one that has a mask already is left as it is.
        mask: Of the parameter that it adapts.
        key: Name of that parameter, for errors.

    Raises:
        ValueError: The layer is of a kind that cannot be masked, or its adapters are merged.
    """
    if isinstance(layer, (MaskedLoraLinear, MaskedParamWrapper)):
        return
    for adapter, variant in layer.lora_variant.items():
        raise ValueError(
            f"Adapter {adapter!r} is no plain LoRA: {type(variant).__name__} computes the update of {key} from the "
            "unmasked B A, in forward and in merge (DoRA divides by the norm of the filled weight). Use LoraConfig "
            "without use_dora and the like; use_rslora works."
        )
    masked = {Linear: MaskedLoraLinear, ParamWrapper: MaskedParamWrapper}.get(type(layer))
    if masked is None:
        raise ValueError(
            f"{key} is adapted by {type(layer).__module__}.{type(layer).__name__}, which cannot be masked: leave it "
            "out of target_modules. Supported are nn.Linear, Conv1D and target_parameters, unquantized."
        )
    if layer.merged:
        raise ValueError(f"The adapters of {key} are merged into its weights: call unmerge_adapter() first.")
    layer.__class__ = masked
    layer.mask = mask
