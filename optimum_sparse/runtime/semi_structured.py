"""2:4 matrices on the units that GPUs have for them, by way of torch's semi-structured tensors and cuSPARSELt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# What cuSPARSELt takes: types, and what rows and columns must be multiples of.
DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16
# The first GPUs that have the units.
CAPABILITY = (8, 0)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of each four consecutive weights of a row at least two are zero, and all of them finite."""
    rows, columns = weight.shape
    if columns % 4 or not weight.isfinite().all():
        return False
    return bool((torch.count_nonzero(weight.reshape(rows, -1, 4), dim=-1) <= 2).all())


def obstacle(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the units do not take a 2:4 matrix, if so."""
    if dtype not in DTYPES:
        return f"weights must be {' or '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        return f"rows and columns must be multiples of {MULTIPLE}"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "this GPU has no units for it: they came with compute capability 8.0"
    return None


class SemiStructuredLinear(nn.Linear):
    """A linear layer whose weight is 2:4, packed for the GPU's units. For many tokens at once: it is slow for few.

    The weight cannot be trained, but gradients flow through the layer. A state dict has the dense weight, in which
    zeros have lost their sign; none can be loaded. What is not finite in an input does not meet the zeros of the
    weight, which are not there: it does not spread as far as in a dense product.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SemiStructuredLinear:
        """Pack a dense layer, which stays as it is.

        Raises:
            ValueError: Its weight is not 2:4, or not finite, or torch packs it to another one.
            RuntimeError: It is not on a GPU, or of a shape or type that torch does not pack.
        """
        weight = linear.weight.detach().contiguous()
        if not is_two_of_four(weight):
            raise ValueError("the weight must be finite, and of four consecutive weights of a row at least two zero.")
        packed = torch.sparse.to_sparse_semi_structured(weight)
        if not torch.equal(packed.to_dense(), weight):
            raise ValueError("the packed weight is not equal to the dense one: torch cannot pack it on this machine.")
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = nn.Parameter(packed, requires_grad=False), linear.bias
        return layer.train(linear.training)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight takes."""
        packed: Any = self.weight
        names, _ = packed.__tensor_flatten__()
        return sum(getattr(packed, name).nbytes for name in names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `nn.Linear`."""
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight.to_dense(), self.bias)
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        # Of torch's ways to a product with such a tensor, the one for matrices is the one that is documented.
        out = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.to_dense()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, error_msgs = args
        error_msgs.append(f"{prefix}weight is packed for the 2:4 units: load the model before sparsify_for_inference.")
