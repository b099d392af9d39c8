"""How far the hidden states of a model move away from those of the dense model, from block to block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Tokens whose hidden states are kept for every block: few, so that they take no memory to speak of.
TOKENS = 64


class DepthError:
    """The hidden states behind each block, before and after a model is changed.

    Args:
        model: The model.
        blocks: Names of its blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._model = model
        self._blocks = blocks
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._before: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remember what the first forward of the whole model in the body sees; it is taken to be that of before."""
        seen: dict[str, torch.Tensor] = {}

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.clear()
            self._inputs = args, _first_row(kwargs)

        def leave(*_: Any) -> None:
            self._before = seen
            remove()

        handles = [
            self._model.register_forward_pre_hook(enter, with_kwargs=True),
            *self._record(seen),
            self._model.register_forward_hook(leave),
        ]

        def remove() -> None:
            while handles:
                handles.pop().remove()

        try:
            yield
        finally:
            remove()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Run the model as it is now on the same inputs.

        Returns:
            For each block, in the order in which they run, the squared norm of the difference relative to that of the
            hidden states of before, as the mean over tokens: the few whose hidden states are a hundred times as large
            as those of the others would outweigh them in one norm of all. Empty if no forward was seen.
        """
        after: dict[str, torch.Tensor] = {}
        if self._inputs is None or not self._before:
            return {}
        handles = self._record(after)
        try:
            args, kwargs = self._inputs
            self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        errors = {}
        for name, before in self._before.items():
            reference = before.double()
            error = ((after[name].double() - reference).square().sum(-1) / reference.square().sum(-1)).mean()
            if error.isfinite():
                errors[name] = error.item()
        return errors

    def _record(self, seen: dict[str, torch.Tensor]) -> list[Any]:
        """Hooks that keep the first hidden states that leave each block."""

        def keep(name: str, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and name not in seen:
                row = hidden[:1] if self._inputs and _is_text(self._inputs[1]) else hidden
                seen[name] = row.detach().reshape(-1, row.shape[-1])[:TOKENS].to("cpu", copy=True)

        def hook(name: str) -> Any:
            return lambda module, inputs, output: keep(name, output)

        return [self._model.get_submodule(name).register_forward_hook(hook(name)) for name in self._blocks]


def _first_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """One row of a batch of text, which takes less memory than any batch of the run; other batches as they are."""
    if not _is_text(inputs):
        return inputs
    return {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _is_text(inputs: dict[str, Any]) -> bool:
    return {name for name, value in inputs.items() if isinstance(value, torch.Tensor)} <= {
        "input_ids",
        "attention_mask",
    }
