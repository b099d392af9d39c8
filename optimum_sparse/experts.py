"""Experts that few tokens are routed to: how a module of experts is told who takes which token, and shown others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .uses import Use, View, WeightUses


@dataclass(frozen=True)
class Routed:
    """The tokens that one batch brings to a module of experts.

    Attributes:
        arguments: What the module was called with, by name.
        tokens: Name of the argument that holds the tokens, `[tokens, features]`.
        index: Name of the one that says who takes them: `[tokens, k]` integers, the experts that each token is routed
            to; or a list with the number of tokens of each expert, which stand one expert after the other.
        weights: Name of the one with the weights of the experts' outputs, of the shape of `index`, if any.
        keep: `[tokens]` bool: which of them are no padding; `None` for all.
    """

    arguments: dict[str, Any]
    tokens: str
    index: str
    weights: str | None
    keep: torch.Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routed | None:
        """From the arguments of a call; `None` if they do not say who takes which token."""
        if not any(_is_index(value) for value in (*args, *kwargs.values())):
            return None
        signature = inspect.signature(module.forward)
        try:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:
            return None  # the module itself will say what it does not take
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        floats = [name for name, value in arguments.items() if _is_float(value)]
        if not floats or arguments[floats[0]].ndim < 2:
            return None
        tokens = arguments[floats[0]]
        arguments[floats[0]] = tokens = tokens.reshape(-1, tokens.shape[-1])
        for name, value in arguments.items():
            if isinstance(value, list) and _is_index(value) and sum(value) == len(tokens):
                return cls(arguments, floats[0], name, None)
            if isinstance(value, torch.Tensor) and _is_index(value) and len(value) == len(tokens):
                weights = next((other for other in floats[1:] if arguments[other].shape == value.shape), None)
                return cls(arguments, floats[0], name, weights)
        return None

    @property
    def experts(self) -> torch.Tensor:
        """`[tokens, k]`: the experts that each token is routed to."""
        index = self.arguments[self.index]
        if isinstance(index, list):
            device = self.arguments[self.tokens].device
            sizes = torch.tensor(index, device=device)
            index = torch.arange(len(sizes), device=device).repeat_interleave(sizes)[:, None]
        return index

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, without padding."""
        return len(self.experts) if self.keep is None else int(self.keep.sum())

    def num_routed(self, expert: int) -> int:
        """How many tokens are routed to an expert."""
        experts = self.experts if self.keep is None else self.experts[self.keep]
        return int((experts == expert).any(dim=-1).sum())

    def alone(self, expert: int, everyone: bool) -> dict[str, Any]:
        """Arguments with which the module shows an expert only its own tokens, or all tokens.

        What the other experts are shown is left as it was for these tokens.
        """
        mine = (self.experts == expert).any(dim=-1)
        chosen = torch.full_like(mine, True) if everyone else mine
        if self.keep is not None:
            chosen &= self.keep
        changed = {self.tokens: self.arguments[self.tokens][chosen]}
        index = self.arguments[self.index]
        if isinstance(index, list):
            changed[self.index] = [int(chosen.sum()) if e == expert else 0 for e in range(len(index))]
        else:
            index = index[chosen]
            index[:, 0] = index[:, 0].where(mine[chosen], expert)
            changed[self.index] = index
        if self.weights is not None:
            changed[self.weights] = self.arguments[self.weights][chosen]
        return {**self.arguments, **changed}


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_index(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(count) is int for count in value)
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) and value.ndim == 2


@dataclass(frozen=True)
class Experts:
    """A module of experts and the tokens that all batches bring to it.

    Attributes:
        name: Name of the module.
        module: The module.
        routed: Index of each batch, and its tokens.
        run: Calls a function with arguments as the forward of a batch would.
    """

    name: str
    module: nn.Module
    routed: Sequence[tuple[int, Routed]]
    run: Callable[[int, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]

    def hold(self, view: View) -> bool:
        """Whether a matrix is in the module."""
        return view.parameter.startswith(f"{self.name}.")

    @property
    def num_tokens(self) -> int:
        """How many tokens the module receives, without padding."""
        return sum(tokens.num_tokens for _, tokens in self.routed)

    def num_routed(self, expert: int) -> int:
        """How many tokens are routed to an expert."""
        return sum(tokens.num_routed(expert) for _, tokens in self.routed)

    def inputs(self, parameter: nn.Parameter, view: View, everyone: bool) -> Iterator[torch.Tensor]:
        """What an expert's matrix is multiplied with, `[tokens, in_features]` for each batch.

        Args:
            parameter: That of the matrix.
            view: The matrix.
            everyone: Show the expert all tokens instead of its own.
        """
        for batch, tokens in self.routed:
            arguments = tokens.alone(view.part, everyone)
            found: list[torch.Tensor] = []

            def note(use: Use, found: list[torch.Tensor] = found) -> None:
                if use.view == view:
                    found.append(use.inputs.reshape(-1, use.inputs.shape[-1]))

            def watched(note: Callable[[Use], None] = note, **arguments: Any) -> None:
                with WeightUses({view.parameter: parameter}, note):
                    self.module(**arguments)

            if arguments[tokens.tokens].numel():
                self.run(batch, watched, (), arguments)
            yield from found
