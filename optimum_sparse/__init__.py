"""One-shot pruning of Hugging Face language models.

Importing the package is cheap: torch and transformers are imported when a public name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SparseConfig
    from .pruner import SparsePruner
    from .report import SparsityReport
    from .runtime import sparsify_for_inference

__version__ = "0.1.0"
__all__ = ["SparseConfig", "SparsePruner", "SparsityReport", "sparsify_for_inference"]

_HOME = {
    "SparseConfig": ".config",
    "SparsePruner": ".pruner",
    "SparsityReport": ".report",
    "sparsify_for_inference": ".runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if name in ("SparseConfig", "SparsePruner"):
        # Registers the configuration with transformers, so that from_pretrained(quantization_config=...) knows it.
        importlib.import_module(".integrations.quantizer", __name__)
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
