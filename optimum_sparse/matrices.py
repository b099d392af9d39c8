"""`PrunableMatrix`: a weight seen as `[out_features, in_features]`, and how a model's matrices are found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .config import SparseConfig
from .offload import execution_device, value_of
from .patterns import NM, Pattern, parse_pattern
from .trace import Trace
from .uses import View


@dataclass(frozen=True)
class PrunableMatrix:
    """One weight matrix of a model and the pattern it is to be pruned to.

    Attributes:
        name: Dotted name of the module that owns the weight; of the parameter if that is not called `weight`. Experts
            that share a parameter have their number behind it.
        view: Where in its parameter the matrix is.
        module: The module that owns the parameter.
        pattern: Which zeros are asked for.
        block: Name of the block it belongs to, or of the weight itself if it stands outside the blocks.
        overridden: Whether the pattern is that of an override.
    """

    name: str
    view: View
    module: nn.Module
    pattern: Pattern
    block: str
    overridden: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that it is a part of or the whole of, in the model's own layout."""
        return self.module.get_parameter(self.view.parameter.rpartition(".")[2])

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.view.shape

    @property
    def is_part(self) -> bool:
        """Whether its parameter holds other matrices as well, as that of experts does."""
        return self.numel < self.parameter.numel()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        """The device that it is computed with."""
        return execution_device(self.module)

    def read(self) -> torch.Tensor:
        """A view of the weight, `[out_features, in_features]` in the model's dtype.

        If it is offloaded and not in memory, a view of what is kept of it, on whatever device that is.
        """
        return self.view.of(value_of(self.module, self.view.parameter.rpartition(".")[2]))

    def write(self, weight: torch.Tensor) -> None:
        """Replace the weight in place, so that everything that shares it follows.

        Args:
            weight: `[out_features, in_features]`, any dtype and device.
        """
        self.view.of(self.parameter).copy_(weight)


@dataclass(frozen=True)
class Weight:
    """A parameter that may hold matrices.

    Attributes:
        names: By which users know it: those of the modules that own it, or of the parameter if it is not called
            `weight`; several if modules share it.
        parameter: Dotted name of the parameter.
        modules: The modules that own it, in the order of `names`.
    """

    names: tuple[str, ...]
    parameter: str
    modules: tuple[nn.Module, ...]

    @property
    def is_convolution(self) -> bool:
        """Whether it is that of a convolution, which is in no matrix product."""
        return isinstance(self.modules[0], _ConvNd)

    @property
    def value(self) -> nn.Parameter:
        """The parameter."""
        return self.modules[0].get_parameter(self.parameter.rpartition(".")[2])


def find_weights(model: nn.Module) -> list[Weight]:
    """All parameters with two or more dimensions, but for those that belong to embeddings only."""
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
                owners[parameter].append((f"{prefix}.{attribute}".removeprefix("."), module))
    return [
        Weight(tuple(name.removesuffix(".weight") for name, _ in users), users[0][0], tuple(m for _, m in users))
        for users in owners.values()
    ]


def find_matrices(
    model: nn.Module, config: SparseConfig, seen: Trace | None = None, unused_too: bool = False
) -> tuple[list[PrunableMatrix], dict[str, str]]:
    """Find what `config` asks to prune in a model.

    Args:
        model: The model; nothing about its architecture is assumed.
        config: Names, overrides, block range and pattern.
        seen: What forwards have shown of the model. Without it only the weights of `nn.Linear` and `Conv1D` are found,
            routers among them.
        unused_too: Also find weights of `nn.Linear` and `Conv1D` that the forwards did not use.

    Returns:
        The matrices, in the order of `named_modules`, and for each weight that stays dense the reason.

    Raises:
        ValueError: Nothing matches, a pattern does not divide a matrix, or the layout of experts is unknown.
    """
    choice, layouts = _Choice(model, config), _seen_layouts(seen)
    matrices: list[PrunableMatrix] = []
    skipped: dict[str, str] = {}
    undecided = False
    for weight in find_weights(model):
        views = layouts.get(weight.parameter, [])
        if not views and (seen is None or unused_too):
            views = _class_layout(weight)
        reasons: dict[str, str] = {}
        for view in views:
            several = weight.value.numel() > view.shape[0] * view.shape[1]
            names = [f"{name}.{view.part}" for name in weight.names] if several else list(weight.names)
            reason = choice.against(weight, names) or _no_matrix(view, seen)
            if reason is None:
                matrices.append(choice.matrix(weight, view, names))
            else:
                reasons.update(dict.fromkeys(names, reason))
        if not views:
            reason = choice.against(weight, list(weight.names))
            undecided |= reason is None and seen is None
            reasons = dict.fromkeys(weight.names, reason or _unseen(weight, seen))
        elif len(reasons) == len(views) * len(weight.names) and len(set(reasons.values())) == 1:
            reasons = dict.fromkeys(weight.names, reasons.popitem()[1])  # the same for all experts
        skipped |= reasons
    if not matrices and not undecided:
        _raise_nothing_left(model, config, skipped)
    return matrices, skipped


class _Choice:
    """What a configuration chooses of a model."""

    def __init__(self, model: nn.Module, config: SparseConfig) -> None:
        self._config = config
        self._blocks = find_blocks(model)
        self._text = text_models(model)
        self._head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        self._embeddings = {m.weight: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}

    def against(self, weight: Weight, names: list[str]) -> str | None:
        """Why a matrix is not to be pruned, or `None`."""
        config, aliases, block = self._config, self.aliases(weight, names), self._block(weight)
        if not matches(config.targets, aliases):
            return "does not match targets"
        if matches(config.ignore, aliases):
            return "matches ignore"
        if weight.value in self._embeddings:
            return f"shares its weight with the embedding {self._embeddings[weight.value]}"
        if weight.is_convolution:
            return "is a convolution"
        if not weight.value.is_contiguous():
            return "is not contiguous in memory: make it so with .contiguous()"
        if config.block_range and (block is None or not config.block_range[0] <= block < config.block_range[1]):
            return "outside block_range"
        if self._override(weight, names).get("sparsity") == 0:
            return "sparsity 0 in overrides"
        asked_for = matches((target for target in config.targets if target != "*"), aliases)
        if self._text and not _inside(weight.parameter, self._text) and not asked_for:
            return f"is outside the text model: to prune it, name it in targets, e.g. '{self._tower(weight)}.*'"
        return None

    def _tower(self, weight: Weight) -> str:
        """The largest module around a weight that holds no model for text."""
        parts = weight.names[0].split(".")
        modules = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((m for m in modules if not _inside(f"{self._text[0]}.", [m])), weight.names[0])

    def matrix(self, weight: Weight, view: View, names: list[str]) -> PrunableMatrix:
        """The matrix, with the pattern asked for it."""
        override, index = self._override(weight, names), self._block(weight)
        if override:
            pattern = parse_pattern(override.get("sparsity"), override.get("pattern"))
        else:  # of the two, the pattern says more: an allocation leaves matrices dense until the sparsity is met
            pattern = parse_pattern(None if self._config.pattern else self._config.sparsity, self._config.pattern)
        if isinstance(pattern, NM) and view.shape[1] % pattern.m:
            module = weight.names[0].rsplit(".", 1)[-1]
            raise ValueError(
                f"Pattern {pattern} does not divide the {view.shape[1]} inputs of {names[0]}: choose an M that "
                f"divides {view.shape[1]}, or leave this module out with ignore={[*self._config.ignore, module]}."
            )
        block = weight.names[0] if index is None else self._blocks[index]
        return PrunableMatrix(names[0], view, weight.modules[0], pattern, block, bool(override))

    def aliases(self, weight: Weight, names: list[str]) -> list[str]:
        """All names by which a matrix can be called."""
        head = ["lm_head" for module in weight.modules if module is self._head]
        return [*names, *weight.names, *head]

    def _override(self, weight: Weight, names: list[str]) -> dict[str, Any]:
        aliases = self.aliases(weight, names)
        return next((o for o in reversed(self._config.overrides) if matches([o["match"]], aliases)), {})

    def _block(self, weight: Weight) -> int | None:
        return next((i for i, block in enumerate(self._blocks) if _inside(weight.parameter, [block])), None)


def unmatched(model: nn.Module, config: SparseConfig) -> list[str]:
    """What to say of patterns of names that match no weight of a model, so that a slip does not go unseen."""
    choice = _Choice(model, config)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)} | {"lm_head"}
    for weight in find_weights(model):
        parts = range(len(weight.value)) if weight.value.ndim > 2 else ()
        names.update(choice.aliases(weight, [f"{name}.{part}" for name in weight.names for part in parts]))
    asked = {
        "targets": config.targets,
        "ignore": config.ignore,
        "overrides": [override["match"] for override in config.overrides],
    }
    missing = [(option, p) for option, patterns in asked.items() for p in patterns if not matches([p], names)]
    return [f"{option}: {pattern!r} matches no weight of the model" for option, pattern in missing]


def matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether any name, or a dotted suffix of it, matches any of the shell-style patterns."""
    names = list(names)
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns for name in names)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(not module or name.startswith(f"{module}.") for module in modules)


def _class_layout(weight: Weight) -> list[View]:
    """What the class of the module says; nothing if only a forward can tell."""
    module = weight.modules[0]
    if not isinstance(module, (nn.Linear, Conv1D)) or weight.value.ndim != 2:
        return []
    rows, columns = weight.value.shape
    transposed = isinstance(module, Conv1D)
    return [View(weight.parameter, 0, (columns, rows) if transposed else (rows, columns), transposed)]


def _seen_layouts(seen: Trace | None) -> dict[str, list[View]]:
    """The matrices that each parameter was used as; parameters that were used in several ways have none."""
    layouts: dict[str, list[View]] = defaultdict(list)
    for view in sorted(seen.inputs) if seen is not None else ():
        layouts[view.parameter].append(view)
    alike = {name: len({(view.shape, view.transposed) for view in views}) == 1 for name, views in layouts.items()}
    return {name: views for name, views in layouts.items() if alike[name]}


def _no_matrix(view: View, seen: Trace | None) -> str | None:
    """Why a weight that is used as a matrix is not to be pruned, or `None`."""
    if seen is not None and view in seen.routers:
        return "is a router: its outputs are ranked to choose among them"
    if view.shape[0] == 1:
        return "is a gate: it has a single output"
    return None


def _unseen(weight: Weight, seen: Trace | None) -> str:
    """Why no matrix was found in a weight.

    Raises:
        ValueError: It looks like experts whose inputs cannot be seen.
    """
    if seen is None:
        return "only a forward shows how it is used"
    if weight.parameter not in seen.copied:
        return "is not used in a matrix product on the calibration data"
    if weight.value.ndim > 2:
        raise ValueError(
            f"{weight.parameter} of shape {list(weight.value.shape)} in {type(weight.modules[0]).__name__} is "
            "gathered or cast before it is multiplied, so that the inputs of its matrices cannot be seen: choose an "
            "implementation that takes one expert at a time (in Transformers, experts_implementation='eager'), or "
            f"leave it dense with ignore=[{weight.names[0].rsplit('.', 1)[-1]!r}]."
        )
    return "is copied before it is used, so that its inputs cannot be seen"


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the model's repeated blocks, in the order of `named_modules`.

    They are the outermost lists of layers that Transformers checkpoints one by one; in models that do not use its
    layer class, the outermost lists of like modules that hold matrices. Those of the decoder come first, so that they
    have the lowest numbers; a model that has an encoder and a decoder is taken as a whole.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    scopes = [model] if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else [decoder, model]
    layers = dict.fromkeys(layer for scope in scopes if isinstance(scope, nn.Module) for layer in _layers(scope))
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    for layer in layers:
        if not _inside(names[layer], found):
            found.append(names[layer])
    return found


def _layers(scope: nn.Module) -> list[nn.Module]:
    lists = [m for m in scope.modules() if isinstance(m, nn.ModuleList) and len(m) and _has_matrix(m)]
    found = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
    if not found:
        found = [
            m for m in lists if len({type(layer) for layer in m}) == 1 and not isinstance(m[0], (nn.Linear, Conv1D))
        ]
    inner = {child for m in found for child in m.modules() if child is not m}
    return [layer for m in found if m not in inner for layer in m]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def text_models(model: nn.Module) -> list[str]:
    """Names of the models for text inside a model that also takes something else; none in a plain model."""
    text_config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    if text_config is None or text_config is model.config:
        return []
    inner = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))
    return [name for name, module in inner if module is not model and module.config is text_config]


def _raise_nothing_left(model: nn.Module, config: SparseConfig, skipped: dict[str, str]) -> None:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        reasons[reason].append(name)
    found = "; ".join(f"{len(names)} ({names[0]}, ...) {reason}" for reason, names in reasons.items())
    raise ValueError(
        f"Nothing to prune in {type(model).__name__} with targets={list(config.targets)}, "
        f"ignore={list(config.ignore)}, block_range={config.block_range}: {found or 'it has no weight matrix'}. "
        "Targets are shell-style patterns of module names or of their dotted suffixes, e.g. 'q_proj' or '*.mlp.*'."
    )
