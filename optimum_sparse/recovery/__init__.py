"""Recovery: train a pruned model and keep every zero."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import SparseLoraConfig, keep_sparsity
    from .callback import SparsityCallback, train_norms_only
    from .distillation import DistillationTrainer
    from .masks import Mask, find_masks, load_masks, masks_of, save_masks
    from .teacher_cache import TopKCache

__all__ = [
    "DistillationTrainer",
    "Mask",
    "SparseLoraConfig",
    "SparsityCallback",
    "TopKCache",
    "find_masks",
    "keep_sparsity",
    "load_masks",
    "masks_of",
    "save_masks",
    "train_norms_only",
]

_HOME = {
    "DistillationTrainer": ".distillation",
    "Mask": ".masks",
    "SparseLoraConfig": ".adapter",
    "SparsityCallback": ".callback",
    "TopKCache": ".teacher_cache",
    "find_masks": ".masks",
    "keep_sparsity": ".adapter",
    "load_masks": ".masks",
    "masks_of": ".masks",
    "save_masks": ".masks",
    "train_norms_only": ".callback",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(f"{name} needs PEFT: pip install 'optimum-sparse[recovery]'") from error
