"""A pruned model that is smaller in memory and faster: packed weights, and kernels that read nothing else."""

from .linear import DenseLinear, SparseLinear
from .quantized import QuantizedTiles
from .report import LayerChoice, RuntimeReport
from .semi_structured import SemiStructuredLinear
from .sparsify import sparsify_for_inference
from .tiles import Tiles

__all__ = [
    "DenseLinear",
    "LayerChoice",
    "QuantizedTiles",
    "RuntimeReport",
    "SemiStructuredLinear",
    "SparseLinear",
    "Tiles",
    "sparsify_for_inference",
]
