"""Which weights a forward uses, and on what inputs: seen at the operators, whatever modules the model is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# The arguments of a module's call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class View(NamedTuple):
    """A matrix `[out_features, in_features]` inside a parameter: one of its equal parts.

    Attributes:
        parameter: Dotted name of the parameter.
        part: Which of the equal parts, 0 if the parameter is one matrix. Experts that share a parameter are its parts.
        shape: `(out_features, in_features)`.
        transposed: Whether it is stored as `[in_features, out_features]`.
    """

    parameter: str
    part: int
    shape: tuple[int, int]
    transposed: bool

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrix, `[out_features, in_features]`, sharing memory with `parameter`."""
        out_features, in_features = self.shape
        stride = (1, out_features) if self.transposed else (in_features, 1)
        start = parameter.storage_offset() + self.part * out_features * in_features
        return parameter.detach().as_strided(self.shape, stride, start)


@dataclass(frozen=True)
class Use:
    """A matrix product with a weight.

    Attributes:
        view: The weight.
        inputs: What it is multiplied with, `[..., in_features]`.
        together: `[parts, tokens, in_features]`: the inputs of all parts of the parameter, if one product takes all of
            them; an expert that a token is not meant for then sees zeros in its place.
        dense: What the inputs are in the dense model, if that is known token by token.
    """

    view: View
    inputs: torch.Tensor
    together: torch.Tensor | None = None
    dense: torch.Tensor | None = None


class Watched(Mapping[str, nn.Parameter]):
    """Parameters to watch, by name, which can be told by the memory that a tensor shares with them.

    Args:
        parameters: The parameters, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._by_name = dict(parameters)
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            self._names[_storage(parameter)].append(name)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def replace(self, name: str, parameter: nn.Parameter) -> None:
        """Another tensor stands for a parameter from now on, as when offloaded weights come and go."""
        self._names[_storage(self._by_name[name])].remove(name)
        self._names[_storage(parameter)].append(name)
        self._by_name[name] = parameter

    def find(self, tensor: torch.Tensor) -> str | None:
        """The name of the parameter that a tensor is a view of, if any."""
        for name in self._names.get(_storage(tensor), ()):
            parameter = self._by_name[name]
            if 0 <= tensor.storage_offset() - parameter.storage_offset() < parameter.numel():
                return name
        return None


class WeightUses(TorchFunctionMode):
    """While it is active, reports every matrix product with one of the parameters before it is computed.

    Args:
        parameters: The parameters to watch.
        on_use: Called with each use, in the middle of the forward. It may change the weight: the product is computed
            afterwards.
        on_call: Called after every function of torch with the function, its positional arguments and its result.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        on_use: Callable[[Use], None],
        on_call: Callable[[Any, Sequence[Any], Any], None] | None = None,
    ) -> None:
        super().__init__()
        self._watched = parameters if isinstance(parameters, Watched) else Watched(parameters)
        self._on_use = on_use
        self._on_call = on_call

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return _open_attention(*args, **kwargs)
        operands = _OPERANDS.get(func)
        if operands is not None:
            for use in self._uses(operands(self.watches, *args, **kwargs)):
                self._on_use(use)
        result = func(*args, **kwargs)
        if self._on_call is not None:
            self._on_call(func, args, result)
        return result

    def watches(self, tensor: Any) -> bool:
        """Whether a tensor is a view of a watched parameter."""
        return isinstance(tensor, torch.Tensor) and self._watched.find(tensor) is not None

    def _uses(self, products: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Use]:
        for weights, inputs in products:
            name = self._watched.find(weights)
            assert name is not None
            for weight, rows, together in _split(weights, inputs):
                view = _view_of(weight, name, self._watched[name])
                if view is not None:
                    yield Use(view, rows, together)


@contextmanager
def at_entries(model: nn.Module, entered: Mapping[str, Callable[[Arguments], Any]]) -> Iterator[None]:
    """In the body, call a function with the arguments whenever the module of its name is entered."""

    def enter(function: Callable[[Arguments], Any], _: nn.Module, *arguments: Any) -> None:
        function(arguments)  # what a hook returns would become the new arguments

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(enter, function), with_kwargs=True)
        for name, function in entered.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: torch.Tensor) -> int:
    """Identifies the memory of a tensor as long as the tensor lives, also that of one without data."""
    return tensor.untyped_storage()._cdata


def _split(
    weights: torch.Tensor, inputs: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Each matrix of a batch of them, with its inputs by the rules of broadcasting, and the inputs of all of them."""
    if weights.ndim == 2:
        yield weights, inputs, None
        return
    # The dimension that tells the matrices apart, counted from the last as in the inputs.
    dims = [dim for dim in range(-weights.ndim, -2) if weights.shape[dim] > 1]
    if len(dims) > 1:
        return
    dim = dims[0] if dims else -3
    own = inputs.ndim >= -dim and inputs.shape[dim] == weights.shape[dim]
    together = inputs.movedim(dim, 0).flatten(1, -2) if own else None
    for part in range(weights.shape[dim]):
        matrix = weights.select(dim, part)
        yield matrix.reshape(matrix.shape[-2:]), inputs.select(dim, part) if own else inputs, together


def _view_of(weight: torch.Tensor, name: str, parameter: nn.Parameter) -> View | None:
    """The part of the parameter that a matrix is, or `None` if it is none of equal, contiguous parts."""
    out_features, in_features = weight.shape
    strides = [stride for stride, size in zip(weight.stride(), weight.shape, strict=True) if size > 1]
    as_stored = [s for s, size in ((in_features, out_features), (1, in_features)) if size > 1]
    as_transposed = [s for s, size in ((1, out_features), (out_features, in_features)) if size > 1]
    size = max(weight.numel(), 1)
    part, rest = divmod(int(weight.storage_offset() - parameter.storage_offset()), size)
    if rest or parameter.numel() % size or strides not in (as_stored, as_transposed) or not parameter.is_contiguous():
        return None
    return View(name, part, (out_features, in_features), strides != as_stored)


def _transparent(function: Any) -> Callable[..., Any]:
    """A function of torch that hands itself to function modes as a whole, as one that lets them see what it calls."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_open_attention = _transparent(nn.functional.multi_head_attention_forward)


# What takes part in a product: the weights [(parts,) out_features, in_features] and inputs [..., in_features] of each
# product of a function, given its arguments and a function that tells weights from other tensors.
Products = list[tuple[torch.Tensor, torch.Tensor]]
Watches = Callable[[Any], bool]


def _linear(watches: Watches, input: Any, weight: Any, bias: Any = None) -> Products:
    return [(weight, input)] if watches(weight) else []


def _matmul(watches: Watches, input: Any, other: Any = None, **kwargs: Any) -> Products:
    other = kwargs.get("mat2", kwargs.get("vec", other))
    if watches(other) and other.ndim >= 2:
        return [(other.mT, input)]
    if watches(input) and input.ndim >= 2:
        return [(input, other.mT if other.ndim >= 2 else other)]
    return []


def _reflected(watches: Watches, other: Any, input: Any) -> Products:
    return _matmul(watches, input, other)


def _addmm(watches: Watches, input: Any, first: Any = None, second: Any = None, **kwargs: Any) -> Products:
    first = kwargs.get("mat1", kwargs.get("batch1", first))
    second = kwargs.get("mat2", kwargs.get("batch2", second))
    return _matmul(watches, first, second)


def _einsum(watches: Watches, equation: Any, *operands: Any, **_: Any) -> Products:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return []
    terms, output = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    which = next((index for index, operand in enumerate(operands) if watches(operand)), None)
    if which is None:
        return []
    (weight, w), (inputs, x) = ((operands[i], letters[i]) for i in (which, 1 - which))
    parts = [c for c in w if c in x and c in output]
    rows = [c for c in w if c not in x]
    columns = [c for c in w if c in x and c not in output]
    others = [c for c in x if c not in w]
    if set(parts + others + columns) != set(x) or not columns or not rows:
        return []
    weight = weight.permute([w.index(c) for c in parts + rows + columns])
    sizes = [weight.shape[: len(parts)].numel(), weight.shape[len(parts) : -len(columns)].numel()]
    inputs = inputs.permute([x.index(c) for c in parts + others + columns]).flatten(-len(columns))
    try:
        weight = weight.view(*sizes, -1)  # a copy would not be seen as a part of the parameter
    except RuntimeError:
        return []
    if not parts:
        return [(weight[0], inputs)]
    return [(weight, inputs.reshape(sizes[0], -1, inputs.shape[-1]))]


_OPERANDS: dict[Any, Callable[..., Products]] = {
    nn.functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), _matmul),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm), _matmul),
    torch.Tensor.mv: _matmul,
    torch.Tensor.__rmatmul__: _reflected,
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm), _addmm),
    torch.einsum: _einsum,
}
# Functions of which `_OPERANDS` knows the weights; what others do with parameters is not a matrix product to us.
PRODUCTS = frozenset(_OPERANDS)
