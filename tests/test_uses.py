"""Uses of weights, against the results of the operators themselves and against what PyTorch dispatches below them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from optimum_sparse.uses import Use, View, WeightUses
from tests.architectures import sweep_batches, sweep_model

OUT, IN, PARTS, ROWS = 6, 4, 3, 5

Call = Callable[[nn.Parameter, torch.Tensor], torch.Tensor]
# From the result of an operator to what each part has made, in the order of the uses, each [..., out].
Outputs = Callable[[torch.Tensor], list[torch.Tensor]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uses_of(call: Call, weight: nn.Parameter, inputs: torch.Tensor) -> tuple[list[Use], torch.Tensor]:
    found: list[Use] = []
    with torch.no_grad(), WeightUses({"weight": weight}, found.append):
        result = call(weight, inputs)
    return found, result


def whole(result: torch.Tensor) -> list[torch.Tensor]:
    return [result]


def first(result: torch.Tensor) -> list[torch.Tensor]:
    """Results of parts [parts, ...]."""
    return list(result)


def columns(result: torch.Tensor) -> list[torch.Tensor]:
    """Of `weight @ inputs`: [..., out, tokens]."""
    return [result.mT]


@dataclass(frozen=True)
class Form:
    """A way to multiply with a weight.

    Attributes:
        call: Does it, given the weight and the inputs; without a bias, or with one of zeros.
        weight: Shape of the parameter.
        inputs: Shape of the inputs.
        outputs: What the parts have made of it.
        parts: Which parts are used.
        shape: Of each of them.
        transposed: How it is stored.
    """

    call: Call
    weight: tuple[int, ...] = (OUT, IN)
    inputs: tuple[int, ...] = (2, ROWS, IN)
    outputs: Outputs = whole
    parts: tuple[int, ...] = (0,)
    shape: tuple[int, int] = (OUT, IN)
    transposed: bool = False


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def linear_module(weight: nn.Parameter, inputs: torch.Tensor) -> torch.Tensor:
    module = nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
    module.weight = weight
    return module(inputs)


def conv1d_module(weight: nn.Parameter, inputs: torch.Tensor) -> torch.Tensor:
    module = Conv1D(OUT, IN).double()
    module.weight = weight
    return module(inputs)


def one_by_one(weight: nn.Parameter, inputs: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.linear(inputs, weight[part]) for part in range(PARTS)])


def by_tensor_index(weight: nn.Parameter, inputs: torch.Tensor) -> torch.Tensor:
    """As loops over the experts that were hit do."""
    return torch.stack([inputs @ weight[part] for part in torch.arange(PARTS)])


def one_block_of_rows(weight: nn.Parameter, inputs: torch.Tensor) -> torch.Tensor:
    """Experts in a 2-D parameter, one below the other."""
    return F.linear(inputs, weight.view(PARTS, OUT, IN)[1])


FLAT = (ROWS, IN)
AS_IN_OUT: dict[str, Any] = dict(weight=(IN, OUT), transposed=True)
EXPERTS: dict[str, Any] = dict(weight=(PARTS, OUT, IN), parts=(0, 1, 2), outputs=first)
EXPERTS_IN_OUT: dict[str, Any] = dict(weight=(PARTS, IN, OUT), parts=(0, 1, 2), outputs=first, transposed=True)
BATCHED = (PARTS, ROWS, IN)
COLUMNS = (IN, ROWS)

FORMS = {
    # One matrix, stored [out, in].
    "linear": Form(lambda w, x: F.linear(x, w)),
    "linear with a bias": Form(lambda w, x: F.linear(x, w, zeros(OUT))),
    "linear with keywords": Form(lambda w, x: F.linear(input=x, weight=w, bias=zeros(OUT))),
    "nn.Linear": Form(linear_module),
    "linear of a vector": Form(lambda w, x: F.linear(x, w), inputs=(IN,)),
    "x @ w.T": Form(lambda w, x: x @ w.T),
    "x @ w.mT": Form(lambda w, x: x @ w.mT),
    "x.matmul(w.t())": Form(lambda w, x: x.matmul(w.t())),
    "x.matmul keyword": Form(lambda w, x: x.matmul(other=w.T)),
    "torch.matmul": Form(lambda w, x: torch.matmul(x, w.transpose(0, 1))),
    "torch.matmul keywords": Form(lambda w, x: torch.matmul(input=x, other=w.T)),
    "vector @ w.T": Form(lambda w, x: x @ w.T, inputs=(IN,)),
    "x.__matmul__": Form(lambda w, x: x.__matmul__(w.T)),
    "__rmatmul__": Form(lambda w, x: w.T.__rmatmul__(x)),
    "torch.mm": Form(lambda w, x: torch.mm(x, w.T), inputs=FLAT),
    "torch.mm keyword": Form(lambda w, x: torch.mm(x, mat2=w.T), inputs=FLAT),
    "x.mm": Form(lambda w, x: x.mm(w.T), inputs=FLAT),
    "torch.addmm": Form(lambda w, x: torch.addmm(zeros(OUT), x, w.T), inputs=FLAT),
    "torch.addmm keywords": Form(lambda w, x: torch.addmm(input=zeros(OUT), mat1=x, mat2=w.T), inputs=FLAT),
    "torch.addmm with beta": Form(lambda w, x: torch.addmm(zeros(OUT), x, w.T, beta=2.0), inputs=FLAT),
    "bias.addmm": Form(lambda w, x: zeros(OUT).addmm(x, w.T), inputs=FLAT),
    "bias.addmm keywords": Form(lambda w, x: zeros(OUT).addmm(mat1=x, mat2=w.T), inputs=FLAT),
    # The weight on the left, as in Mamba.
    "w @ x": Form(lambda w, x: w @ x, inputs=COLUMNS, outputs=columns),
    "w @ batched x": Form(lambda w, x: w @ x, inputs=(2, *COLUMNS), outputs=columns),
    "w.mm(x)": Form(lambda w, x: w.mm(x), inputs=COLUMNS, outputs=columns),
    "torch.mm(w, x)": Form(torch.mm, inputs=COLUMNS, outputs=columns),
    "w @ vector": Form(lambda w, x: w @ x, inputs=(IN,)),
    "torch.mv": Form(torch.mv, inputs=(IN,)),
    "w.mv": Form(lambda w, x: w.mv(x), inputs=(IN,)),
    "torch.mv keyword": Form(lambda w, x: torch.mv(w, vec=x), inputs=(IN,)),
    # One matrix, stored [in, out].
    "Conv1D": Form(conv1d_module, **AS_IN_OUT),
    "x @ w": Form(lambda w, x: x @ w, **AS_IN_OUT),
    "w.T @ x": Form(lambda w, x: w.T @ x, inputs=COLUMNS, outputs=columns, **AS_IN_OUT),
    "linear of w.T": Form(lambda w, x: F.linear(x, w.T), **AS_IN_OUT),
    "torch.addmm of w": Form(lambda w, x: torch.addmm(zeros(OUT), x, w), inputs=FLAT, **AS_IN_OUT),
    # Several matrices in a parameter, one at a time.
    "w[i]": Form(one_by_one, **EXPERTS),
    "w[0-d tensor]": Form(by_tensor_index, **EXPERTS_IN_OUT),
    "rows of a 2-D parameter": Form(one_block_of_rows, weight=(PARTS * OUT, IN), parts=(1,)),
    "halves of the outputs": Form(lambda w, x: F.linear(x, w[OUT:]), weight=(2 * OUT, IN), parts=(1,)),
    # All of them in one product.
    "torch.bmm": Form(lambda w, x: torch.bmm(x, w.mT), inputs=BATCHED, **EXPERTS),
    "torch.bmm keyword": Form(lambda w, x: torch.bmm(x, mat2=w.mT), inputs=BATCHED, **EXPERTS),
    "x.bmm": Form(lambda w, x: x.bmm(w), inputs=BATCHED, **EXPERTS_IN_OUT),
    "torch.baddbmm": Form(lambda w, x: torch.baddbmm(zeros(1, OUT), x, w.mT), inputs=BATCHED, **EXPERTS),
    "torch.baddbmm keywords": Form(
        lambda w, x: torch.baddbmm(input=zeros(1, OUT), batch1=x, batch2=w), inputs=BATCHED, **EXPERTS_IN_OUT
    ),
    "bias.baddbmm": Form(lambda w, x: zeros(PARTS, 1, OUT).baddbmm(x, w.mT), inputs=BATCHED, **EXPERTS),
    "broadcast inputs": Form(lambda w, x: x @ w, inputs=(1, ROWS, IN), **EXPERTS_IN_OUT),
    "inputs without the dimension": Form(lambda w, x: x @ w, inputs=FLAT, **EXPERTS_IN_OUT),
    "grouped view": Form(
        lambda w, x: (x.unsqueeze(-2) @ w.view(PARTS, OUT, IN).mT).squeeze(-2),
        **EXPERTS | dict(weight=(PARTS * OUT, IN), outputs=lambda result: list(result.unbind(-2))),
        inputs=(2, ROWS, PARTS, IN),
    ),
    "4-D weights, broadcast": Form(
        lambda w, x: x @ w[None].mT,
        **EXPERTS | dict(outputs=lambda result: list(result.unbind(1))),
        inputs=(2, PARTS, ROWS, IN),
    ),
    "4-D weights, broadcast in the middle": Form(
        lambda w, x: x @ w[:, None],
        **EXPERTS_IN_OUT,
        inputs=(PARTS, 2, ROWS, IN),
    ),
    "4-D weights, inputs broadcast": Form(
        lambda w, x: x @ w[None].mT,
        **EXPERTS | dict(outputs=lambda result: list(result.unbind(1))),
        inputs=(2, 1, ROWS, IN),
    ),
    # Einsum.
    "einsum": Form(lambda w, x: torch.einsum("bsi,oi->bso", x, w)),
    "einsum, weight first": Form(lambda w, x: torch.einsum("oi, bsi -> bso", w, x)),
    "einsum of a list": Form(lambda w, x: torch.einsum("bsi,oi->bso", [x, w])),
    "einsum, stored [in, out]": Form(lambda w, x: torch.einsum("bsi,io->bso", x, w), **AS_IN_OUT),
    "einsum, other order of outputs": Form(lambda w, x: torch.einsum("bsi,oi->obs", x, w).movedim(0, -1)),
    "einsum into heads": Form(
        lambda w, x: torch.einsum("bsi,ihd->bshd", x, w).flatten(-2), **AS_IN_OUT | dict(weight=(IN, 2, OUT // 2))
    ),
    "einsum out of heads": Form(
        lambda w, x: torch.einsum("bshd,ohd->bso", x, w), weight=(OUT, 2, IN // 2), inputs=(2, ROWS, 2, IN // 2)
    ),
    "einsum out of heads in another order": Form(
        lambda w, x: torch.einsum("bhsd,hdo->bso", x, w),
        **AS_IN_OUT | dict(weight=(2, IN // 2, OUT)),
        inputs=(2, 2, ROWS, IN // 2),
    ),
    "einsum of each head": Form(
        lambda w, x: torch.einsum("bsgi,goi->bsgo", x, w),
        **EXPERTS | dict(outputs=lambda result: [part.flatten(0, 1) for part in result.unbind(2)]),
        inputs=(2, ROWS, PARTS, IN),
    ),
    "einsum of all experts": Form(lambda w, x: torch.einsum("eti,eio->eto", x, w), inputs=BATCHED, **EXPERTS_IN_OUT),
    # Dimensions of size 1.
    "one output": Form(lambda w, x: F.linear(x, w), weight=(1, IN), shape=(1, IN)),
    "one input": Form(lambda w, x: F.linear(x, w), weight=(OUT, 1), shape=(OUT, 1), inputs=(2, ROWS, 1)),
    "one weight": Form(lambda w, x: F.linear(x, w), weight=(1, 1), shape=(1, 1), inputs=(2, ROWS, 1)),
    "one part": Form(lambda w, x: torch.bmm(x, w.mT), weight=(1, OUT, IN), inputs=(1, ROWS, IN), outputs=first),
    "a part of three": Form(lambda w, x: F.linear(x, w[2]), weight=(PARTS, OUT, IN), parts=(2,)),
    "parts with one output": Form(
        lambda w, x: torch.bmm(x, w.mT), **EXPERTS | dict(weight=(PARTS, 1, IN)), shape=(1, IN), inputs=BATCHED
    ),
    "parts with one input": Form(
        lambda w, x: torch.bmm(x, w.mT),
        **EXPERTS | dict(weight=(PARTS, OUT, 1)),
        shape=(OUT, 1),
        inputs=(PARTS, ROWS, 1),
    ),
    "one token": Form(lambda w, x: x @ w.T, inputs=(1, 1, IN)),
    "no token": Form(lambda w, x: F.linear(x, w), inputs=(0, IN)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form):
    weight, inputs = nn.Parameter(random(*form.weight)), random(*form.inputs, seed=1)
    uses, result = uses_of(form.call, weight, inputs)
    with torch.no_grad():
        assert torch.equal(result, form.call(weight, inputs))
    assert [use.view for use in uses] == [View("weight", part, form.shape, form.transposed) for part in form.parts]
    for use, expected in zip(uses, form.outputs(result), strict=True):
        assert use.inputs.shape[-1] == form.shape[1]
        product = use.inputs @ use.view.of(weight).T
        assert product.numel() == expected.numel()
        torch.testing.assert_close(product, expected.reshape(product.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_written_to_a_view_is_in_the_parameter(form):
    """And the parts that are used do not overlap."""
    weight, inputs = nn.Parameter(random(*form.weight)), random(*form.inputs, seed=1)
    uses, _ = uses_of(form.call, weight, inputs)
    for number, use in enumerate(uses):
        matrix = use.view.of(weight)
        assert not matrix.requires_grad and tuple(matrix.shape) == form.shape
        matrix.fill_(100 + number)
    if len(form.parts) * form.shape[0] * form.shape[1] == weight.numel():
        assert (weight >= 100).all()
    for number, use in enumerate(uses):
        assert (use.view.of(weight) == 100 + number).all()
    with torch.no_grad():
        outputs = form.outputs(form.call(weight, inputs))
    for number, (use, output) in enumerate(zip(uses, outputs, strict=True)):
        expected = (100 + number) * use.inputs.sum(-1, keepdim=True).expand(*use.inputs.shape[:-1], form.shape[0])
        torch.testing.assert_close(output.reshape(expected.shape), expected)


def test_a_change_made_when_a_use_is_reported_takes_part_in_it():
    weight, inputs = nn.Parameter(random(OUT, IN)), random(ROWS, IN, seed=1)

    def halve(use: Use) -> None:
        use.view.of(weight).mul_(0.5)

    with torch.no_grad():
        expected = F.linear(inputs, weight * 0.5)
        with WeightUses({"weight": weight}, halve):
            assert torch.equal(F.linear(inputs, weight), expected)


NO_PART = {
    "rows that start in the middle of a part": lambda w, x: F.linear(x, w[1:4]),
    "rows of which there are no equal parts": lambda w, x: F.linear(x, w[:4]),
    "every second row": lambda w, x: F.linear(x, w[::2]),
    "some columns": lambda w, x: F.linear(x[..., :2], w[:, :2]),
    "a copy": lambda w, x: F.linear(x, w.clone()),
    "a cast": lambda w, x: F.linear(x.float(), w.float()).double(),
    "rows by index": lambda w, x: F.linear(x, w[torch.tensor([0, 1, 2])]),
    "an element-wise product": lambda w, x: x[..., :1, :] * w,
    "a sum over an outer product": lambda w, x: torch.einsum("bsi,oj->bso", x, w),
    "a diagonal": lambda w, x: torch.einsum("bsi,ii->bsi", x, w[:IN]),
    "a product of weights with their outputs": lambda w, x: torch.einsum("oi,oi->o", w, w),
}


@pytest.mark.parametrize("call", NO_PART.values(), ids=NO_PART)
def test_what_is_no_contiguous_part_is_not_reported(call):
    weight, inputs = nn.Parameter(random(OUT, IN)), random(2, ROWS, IN, seed=1)
    uses, result = uses_of(call, weight, inputs)
    assert uses == []
    with torch.no_grad():
        assert torch.equal(result, call(weight, inputs))


def test_interleaved_outputs_are_no_part():
    weight, inputs = nn.Parameter(random(PARTS, IN, 2 * OUT)), random(ROWS, IN, seed=1)
    uses, _ = uses_of(lambda w, x: x @ w[0, :, ::2], weight, inputs)
    assert uses == []


def test_a_parameter_that_is_not_contiguous_is_not_reported():
    weight = nn.Parameter(random(IN, OUT).T)
    assert not weight.is_contiguous()
    uses, _ = uses_of(lambda w, x: F.linear(x, w), weight, random(ROWS, IN, seed=1))
    assert uses == []


def test_only_the_parameters_that_are_watched():
    watched, other = nn.Parameter(random(OUT, IN)), nn.Parameter(random(OUT, IN, seed=2))
    found: list[Use] = []
    mode = WeightUses({"weight": watched}, found.append)
    with torch.no_grad(), mode:
        F.linear(random(ROWS, IN), other)
        F.linear(random(ROWS, IN), random(OUT, IN))
        assert mode.watches(watched) and mode.watches(watched[2:]) and mode.watches(watched.T)
        assert not mode.watches(other) and not mode.watches(watched.clone()) and not mode.watches("weight")
    assert found == []
    F.linear(random(ROWS, IN), watched)  # the mode has ended
    assert found == []


def test_tied_weights_are_one():
    first, second = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
    second.weight = first.weight
    found: list[Use] = []
    inputs = random(ROWS, IN).float()
    with torch.no_grad(), WeightUses({"first.weight": first.weight}, found.append):
        second(inputs)
        first(inputs)
    assert [use.view for use in found] == [View("first.weight", 0, (OUT, IN), False)] * 2


def test_parameters_that_share_a_storage_are_told_apart():
    """As optimizers that flatten all parameters leave them, or a checkpoint that is mapped into memory."""
    flat = random(5 + OUT * IN + PARTS * IN * OUT)
    one = nn.Parameter(flat[5 : 5 + OUT * IN].view(OUT, IN))
    several = nn.Parameter(flat[5 + OUT * IN :].view(PARTS, IN, OUT))
    found: list[Use] = []
    inputs = random(ROWS, IN, seed=1)
    with torch.no_grad(), WeightUses({"one": one, "several": several}, found.append):
        results = [inputs @ several[2], F.linear(inputs, one), inputs @ several[0]]
    assert [(use.view.parameter, use.view.part) for use in found] == [("several", 2), ("one", 0), ("several", 0)]
    for use, result in zip(found, results, strict=True):
        torch.testing.assert_close(
            use.inputs @ use.view.of({"one": one, "several": several}[use.view.parameter]).T, result
        )


def test_the_inputs_of_all_parts_come_along_if_one_product_takes_them():
    weight, inputs = nn.Parameter(random(PARTS, OUT, IN)), random(PARTS, ROWS, IN, seed=1)
    for use in uses_of(lambda w, x: torch.bmm(x, w.mT), weight, inputs)[0]:
        assert torch.equal(use.together, inputs)
        assert torch.equal(use.inputs, inputs[use.view.part])
    grouped = random(2, ROWS, PARTS, 1, IN, seed=1)
    for use in uses_of(lambda w, x: x @ w.mT, weight, grouped)[0]:
        assert use.together.shape == (PARTS, 2 * ROWS, IN)
        assert torch.equal(use.together[use.view.part], use.inputs.reshape(-1, IN))
    for use in uses_of(one_by_one, weight, random(ROWS, IN))[0]:
        assert use.together is None


def test_functions_and_their_results_are_passed_on():
    calls: list[tuple[Any, Any]] = []
    weight, inputs = nn.Parameter(random(OUT, IN)), random(ROWS, IN)
    note = lambda func, args, result: calls.append((func, result))  # noqa: E731
    with torch.no_grad(), WeightUses({"weight": weight}, lambda use: None, note):
        picked = inputs[torch.tensor([0, 2])]
        product = F.linear(picked, weight)
    functions = [func for func, _ in calls]
    assert functions.index(torch.Tensor.__getitem__) < functions.index(F.linear)
    assert dict(calls)[torch.Tensor.__getitem__] is picked and dict(calls)[F.linear] is product


def test_errors_of_the_operator_are_its_own():
    weight = nn.Parameter(random(OUT, IN))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        uses_of(lambda w, x: F.linear(x, w), weight, random(ROWS, IN + 1))


# Against an observer that sits below the functions of torch, where each product is a plain one of two tensors.

aten = torch.ops.aten
Key = tuple[str, int, tuple[int, int], bool]


class Products(TorchDispatchMode):
    """The rows that each part of a parameter is multiplied with, from the operands that PyTorch dispatches.

    Of each operand it knows which elements of which parameter it holds, through the copies that operators make of what
    they broadcast or permute.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[Key, list[torch.Tensor]] = defaultdict(list)
        # Address of a storage -> name of a parameter, and which of its elements lies at each place of the storage.
        self._elements = {
            parameter.untyped_storage().data_ptr(): (name, torch.arange(parameter.numel()))
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1
        }
        self._copies: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.clone.default and (found := self._elements_of(args[0])):
            name, elements = found
            places = torch.empty(result.numel(), dtype=torch.int64)
            places.as_strided(result.shape, result.stride()).copy_(elements)
            self._elements[result.untyped_storage().data_ptr()] = name, places
            self._copies.append(result)
        if func in (aten.mm.default, aten.bmm.default, aten.mv.default):
            self._product(*args[:2])
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self._product(*args[1:3])
        return result

    def _elements_of(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter, and for each element of the tensor its number there."""
        found = self._elements.get(tensor.untyped_storage().data_ptr())
        return found and (found[0], found[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if right.ndim == 1:
            right = right[:, None]
        if found := self._elements_of(right):
            name, elements, inputs = found[0], found[1].mT, left
        elif found := self._elements_of(left):
            name, elements, inputs = *found, right.mT
        else:
            return
        pairs = [(elements, inputs)] if elements.ndim == 2 else zip(elements, inputs, strict=True)
        for matrix, rows in pairs:
            columns = matrix[0].argsort()
            matrix = matrix[matrix[:, 0].argsort()][:, columns]
            start = int(matrix.min())
            # Equal parts without gaps; `start` and the steps between rows and columns say all of them.
            assert torch.equal(matrix.flatten().sort().values, torch.arange(start, start + matrix.numel()))
            transposed = min(matrix.shape) > 1 and int(matrix[0, 1] - matrix[0, 0]) != 1
            key = (name, start // matrix.numel(), tuple(matrix.shape), transposed)
            self.rows[key].append(rows[:, columns].double())


@contextmanager
def one_expert_at_a_time(model: Any) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    yield
    model.set_experts_implementation(before)


def in_some_order(rows: list[torch.Tensor]) -> torch.Tensor:
    """All rows, sorted by a random projection: equal for equal multisets."""
    together = torch.cat([part.reshape(-1, part.shape[-1]) for part in rows])
    keys = (together * random(together.shape[-1], seed=3)).sum(-1)
    return together[keys.argsort()]


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gpt2",
        "falcon",
        "mixtral",
        "gpt_oss",
        "llama4_text",
        "jetmoe",
        "dbrx",
        "longcat_flash",
        "mamba",
        "jamba",
        "recurrent_gemma",
        "xlnet",
        "zamba",
        "deepseek_v4",
    ],
)
def test_nothing_that_is_dispatched_is_missed(model_type):
    """The same weights, on the same rows, as plain products show; and the model is not disturbed."""
    model = sweep_model(model_type)
    batch = sweep_batches(model, num=1)[0]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    seen: dict[Key, list[torch.Tensor]] = defaultdict(list)

    def note(use: Use) -> None:
        seen[tuple(use.view)].append(use.inputs.double())

    with torch.no_grad(), one_expert_at_a_time(model):
        plain = model(**batch, use_cache=False)[0]
        with WeightUses(parameters, note):
            watched = model(**batch, use_cache=False)[0]
        with Products(model) as products:
            model(**batch, use_cache=False)
    assert torch.equal(plain, watched)
    expected = products.rows
    assert seen.keys() == expected.keys()
    for key in seen:
        ours, theirs = in_some_order(seen[key]), in_some_order(expected[key])
        assert torch.equal(ours, theirs), key


def test_attention_of_torch():
    """`nn.MultiheadAttention` computes its products in one function, and leaves the forward of `out_proj` out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64).eval()
    inputs = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found: list[Use] = []
    with torch.no_grad():
        expected = layer(inputs)
        with WeightUses({name: p for name, p in layer.named_parameters() if p.ndim == 2}, found.append):
            torch.testing.assert_close(layer(inputs), expected)
    views = {use.view.parameter: use.view for use in found}
    assert list(views) == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert views["self_attn.in_proj_weight"].shape == (48, 16)
    attended = layer.self_attn(inputs, inputs, inputs)[0]
    use = next(use for use in found if use.view.parameter == "self_attn.out_proj.weight")
    output = use.inputs @ layer.self_attn.out_proj.weight.T + layer.self_attn.out_proj.bias
    torch.testing.assert_close(output.reshape(5, 2, 16).transpose(0, 1), attended)
