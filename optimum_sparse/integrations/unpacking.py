"""The rules of transformers by which tensors are renamed and joined while loading, for tensors that come in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, apply_renamings

from ..packing import LAYOUT, POSITIONS, Packed

_PARTS = (POSITIONS, LAYOUT)

# Told the name of a parameter and the value that was unpacked for it, says whether it takes the value.
Taker = Callable[[str, torch.Tensor], bool]


def conversions_for_parts(conversions: Sequence[Any], packed: Iterable[str], take: Taker | None = None) -> list[Any]:
    """The rules of a model, so that they do with packed tensors what they do with dense ones.

    Args:
        conversions: The rules of the model.
        packed: The names of the packed tensors in the files.
        take: Is offered what was packed; what it takes is not put into the model.
    """
    renamings = deepcopy([rule for rule in conversions if isinstance(rule, WeightRenaming)])
    renamed = frozenset(apply_renamings(name, renamings) for name in packed)

    class UnpackTheRest(UnpackingConverter):
        """Unpacks what no rule of the model has matched."""

        original = None

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            name, part = _split(source_key)
            return (name, part) if name in renamed else (source_key, None)

    rules = [Renaming(rule) if isinstance(rule, WeightRenaming) else Converter(rule) for rule in conversions]
    rest = UnpackTheRest(["", *_PARTS], "", [Unpack([""], [])])
    if take is not None:
        for rule in (*rules, rest):
            if isinstance(rule, UnpackingConverter):
                # Rules are copied for each parameter, a method with all that it belongs to, but a function is not.
                rule.take = lambda name, value: take(name, value)
    rest.force_cpu = True  # the parts are not moved to a device only to be unpacked on the CPU
    return [*rules, rest]


def originals(conversions: Iterable[Any]) -> list[Any]:
    """The rules of the model among those of `conversions_for_parts`: saving a model undoes them."""
    return [rule.original for rule in conversions if rule.original is not None]


class Renaming(WeightRenaming):
    """Renames the parts of a packed tensor as the tensor."""

    def __init__(self, original: WeightRenaming) -> None:
        self.original = original
        super().__init__(list(original.source_patterns), list(original.target_patterns))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name of a tensor or of a part of one, and the pattern that it was found by, if any."""
        name, part = _split(source_key)
        renamed, pattern = self.original.rename_source_key(name)
        return renamed + part, pattern

    def was_used(self) -> bool:
        """Whether it has renamed anything."""
        return self.original.was_used()


class UnpackingConverter(WeightConverter):
    """Unpacks tensors, and offers what was packed to `take`, if there is one, before it goes into the model."""

    take: Taker | None = None

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `WeightConverter`; the result is without what was taken."""
        packed = any(pattern.endswith(_PARTS) for pattern in self.collected_tensors)
        found = super().convert(layer_name, *args, **kwargs)
        if self.take is None or not packed:
            return found
        values = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        taken = {name for name, value in values.items() if self.take(name, value)}
        kwargs["loading_info"].missing_keys.difference_update(taken)
        return {name: value for name, value in values.items() if name not in taken}


class Converter(UnpackingConverter):
    """Collects the parts of packed tensors along with the tensors, and unpacks them before all else."""

    def __init__(self, original: WeightConverter) -> None:
        self.original = original
        sources = list(original.source_patterns)
        parts = [source + part for source in sources for part in _PARTS]
        operation = Unpack(sources, original.operations)
        super().__init__([*sources, *parts], list(original.target_patterns), [operation])
        if hasattr(original, "force_cpu"):  # newer than the oldest version of transformers that is supported
            self.force_cpu = original.force_cpu

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name of what a tensor or a part of one becomes part of, and the pattern that it was found by, if any."""
        name, part = _split(source_key)
        renamed, pattern = self.original.rename_source_key(name)
        return (source_key, None) if pattern is None else (renamed, pattern + part)

    def was_used(self) -> bool:
        """Whether it has converted anything."""
        return self.original.was_used()


class Unpack(ConversionOps):
    """Unpacks the tensors found for some patterns, and goes on with the operations of the model.

    Args:
        sources: The patterns of the tensors, without those of their parts.
        then: The operations.
    """

    supports_many_to_many = True

    def __init__(self, sources: Sequence[str], then: Sequence[ConversionOps]) -> None:
        self.sources, self.then = list(sources), list(then)

    def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """See `ConversionOps`."""
        tensors = {source: list(_unpacked(input_dict, source)) for source in self.sources if source in input_dict}
        if not self.then:
            return {kwargs["full_layer_name"]: tensors[""]}
        for operation in self.then:
            tensors = operation.convert(tensors, **{**kwargs, "source_patterns": self.sources})
        return tensors

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: saving undoes the rules of the model only."""
        raise NotImplementedError


def _unpacked(found: Mapping[str, Any], source: str) -> Iterator[torch.Tensor]:
    """The tensors found for a pattern, e.g. one for each expert; there may be some among them that are not packed."""
    parts = zip(*(found.get(source + part, []) for part in _PARTS), strict=True)
    for tensor in found[source]:
        # Only matrices are packed, and then have one dimension.
        packed = next(parts, None) if tensor.ndim == 1 else None
        if packed is None:
            yield tensor
        else:
            positions, layout = packed
            yield Packed.from_tensors(tensor.cpu(), positions.cpu(), layout.cpu()).unpack().to(tensor.device)


def _split(key: str) -> tuple[str, str]:
    """The name of a tensor, and which part of it a key of a file is."""
    part = next((part for part in _PARTS if key.endswith(part)), "")
    return key.removesuffix(part), part
