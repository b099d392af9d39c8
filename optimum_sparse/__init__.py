"""One-shot pruning of Hugging Face language models.

Importing the package is cheap: torch and transformers are imported when a public name is first used.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SparseConfig
    from .integrations.packed import PackedConfig
    from .pruner import SparsePruner
    from .report import SparsityReport
    from .runtime import sparsify_for_inference

__version__ = "0.1.0"
__all__ = ["PackedConfig", "SparseConfig", "SparsePruner", "SparsityReport", "sparsify_for_inference"]

_HOME = {
    "PackedConfig": ".integrations.packed",
    "SparseConfig": ".config",
    "SparsePruner": ".pruner",
    "SparsityReport": ".report",
    "sparsify_for_inference": ".runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make `from_pretrained` know packed checkpoints and `quantization_config=SparseConfig(...)`."""
    importlib.import_module(".integrations.quantizer", __name__)
    importlib.import_module(".integrations.packed", __name__)


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Registers as soon as transformers loads its quantizers, which every `from_pretrained` does.

    To register at once would be to import transformers, which takes seconds: `import optimum_sparse` shall not.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "transformers.quantizers":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers.quantizers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
