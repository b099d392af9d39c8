"""`PrunableMatrix`: a weight seen as `[out_features, in_features]`, and how a model's matrices are found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .config import SparseConfig
from .patterns import NM, Pattern, parse_pattern


@dataclass(frozen=True)
class PrunableMatrix:
    """One weight matrix of a model and the pattern it is to be pruned to.

    Attributes:
        name: Dotted name of the module that owns the weight.
        modules: The modules that use the weight: one, or several that share it.
        pattern: Which zeros are asked for.
        block: Name of the decoder block it belongs to, or its own name if it stands outside the blocks.
    """

    name: str
    modules: tuple[nn.Module, ...]
    pattern: Pattern
    block: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, in the model's own layout."""
        weight = self.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @cached_property
    def transposed(self) -> bool:
        """Whether the parameter is stored as `[in_features, out_features]`."""
        return isinstance(self.modules[0], Conv1D)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> torch.Tensor:
        """A view of the weight, `[out_features, in_features]` in the model's dtype."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    def write(self, weight: torch.Tensor) -> None:
        """Replace the weight in place, so that everything that shares it follows.

        Args:
            weight: `[out_features, in_features]`, any dtype and device.
        """
        self.read().copy_(weight)


def find_matrices(model: nn.Module, config: SparseConfig) -> tuple[list[PrunableMatrix], dict[str, str]]:
    """Find what `config` asks to prune in a model.

    Args:
        model: The model; nothing about its architecture is assumed.
        config: Names, overrides, block range and pattern.

    Returns:
        The matrices, in the order of `named_modules`, and for each linear layer and each parameter with more than two
        dimensions that stays dense the reason.

    Raises:
        ValueError: Nothing matches, or a pattern does not divide a matrix.
    """
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and isinstance(module.weight, nn.Parameter):
            owners[module.weight].append((name, module))
    if not owners:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or Conv1D layer, so there is nothing to prune.")

    embeddings = {m.weight: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    blocks = find_blocks(model)
    matrices: list[PrunableMatrix] = []
    skipped: dict[str, str] = {}
    for parameter, users in owners.items():
        name = users[0][0]
        block = next((i for i, b in enumerate(blocks) if name == b or name.startswith(f"{b}.")), None)
        aliases = [n for n, _ in users] + ["lm_head" for _, module in users if module is output]
        override: dict[str, Any] = next((o for o in reversed(config.overrides) if matches([o["match"]], aliases)), {})
        if not matches(config.targets, aliases):
            reason = "does not match targets"
        elif matches(config.ignore, aliases):
            reason = "matches ignore"
        elif parameter in embeddings:
            reason = f"shares its weight with the embedding {embeddings[parameter]}"
        elif config.block_range and (block is None or not config.block_range[0] <= block < config.block_range[1]):
            reason = "outside block_range"
        elif override.get("sparsity") == 0:
            reason = "sparsity 0 in overrides"
        else:
            pattern = _pattern(config, override)
            matrix = PrunableMatrix(
                name, tuple(m for _, m in users), pattern, name if block is None else blocks[block]
            )
            _check_shape(matrix)
            matrices.append(matrix)
            continue
        skipped.update((n, reason) for n, _ in users)
    # Fused experts, convolutions and the like: what stays dense is named.
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim > 2}
    skipped.update((name, f"is no matrix but a tensor of shape {shape}") for name, shape in shapes.items())
    if not matrices:
        _raise_nothing_left(model, config, skipped)
    return matrices, skipped


def matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether any name, or a dotted suffix of it, matches any of the shell-style patterns."""
    names = list(names)
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns for name in names)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the model's repeated blocks: the outermost lists of layers that Transformers checkpoints one by one.

    Models that do not use Transformers' layer class are searched for the longest list of like modules that hold
    matrices. The order is that of `named_modules`; a model without blocks gives an empty list.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    for scope in [decoder, model]:
        if not isinstance(scope, nn.Module):
            continue
        lists = [m for m in scope.modules() if isinstance(m, nn.ModuleList) and len(m) and _has_matrix(m)]
        found = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
        if not found:
            found = sorted((m for m in lists if len({type(layer) for layer in m}) == 1), key=len)[-1:]
        inner = {child for m in found for child in m.modules() if child is not m}
        layers = [layer for m in found if m not in inner for layer in m]
        if layers:
            names = {module: name for name, module in model.named_modules()}
            return [names[layer] for layer in layers]
    return []


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _pattern(config: SparseConfig, override: dict) -> Pattern:
    if override:
        return parse_pattern(override.get("sparsity"), override.get("pattern"))
    return parse_pattern(config.sparsity, config.pattern)


def _check_shape(matrix: PrunableMatrix) -> None:
    pattern, in_features = matrix.pattern, matrix.shape[1]
    if isinstance(pattern, NM) and in_features % pattern.m:
        raise ValueError(
            f"Pattern {pattern} does not divide the {in_features} inputs of {matrix.name}: choose an M that divides "
            f"{in_features}, or leave this module out with ignore=[{matrix.name.rsplit('.', 1)[-1]!r}]."
        )


def _raise_nothing_left(model: nn.Module, config: SparseConfig, skipped: dict[str, str]) -> None:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        reasons[reason].append(name)
    found = "; ".join(f"{len(names)} ({names[0]}, ...) {reason}" for reason, names in reasons.items())
    raise ValueError(
        f"Nothing to prune in {type(model).__name__} with targets={list(config.targets)}, "
        f"ignore={list(config.ignore)}, block_range={config.block_range}: {found}. "
        "Targets are shell-style patterns of module names or of their dotted suffixes, e.g. 'q_proj' or '*.mlp.*'."
    )
