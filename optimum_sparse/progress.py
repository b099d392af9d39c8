"""What a person sees while a model is pruned."""

from __future__ import annotations

from tqdm.auto import tqdm

from .config import SparseConfig
from .report import MatrixReport


class Progress:
    """What a person sees while pruning: a bar over matrices and a few lines on stderr."""

    def __init__(self, shown: bool, config: SparseConfig) -> None:
        what = config.pattern or f"{config.sparsity:.0%}"
        self._bar = tqdm(desc=f"Pruning {what} with {config.method}", unit="matrix", disable=not shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def start(self, num_matrices: int) -> None:
        """The number of matrices is known."""
        self._bar.reset(num_matrices)

    def say(self, text: str) -> None:
        """Print lines without tearing the bar apart."""
        if not self._bar.disable:
            self._bar.write(text, file=self._bar.fp)

    def step(self, entry: MatrixReport) -> None:
        """One matrix is done."""
        error = "" if entry.error is None else f" error {100 * entry.error:.2f} %"
        self._bar.set_postfix_str(f"{entry.name}{error}", refresh=False)
        self._bar.update()
