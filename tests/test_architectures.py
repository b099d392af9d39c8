"""The sweep: every causal language model type of Transformers, against an oracle that reruns the whole model.

The oracle sees matrix products one level below the package, where PyTorch dispatches them, and knows nothing of stops,
greenlets or layer classes: it finds what goes into each group of matrices when all that run before it are pruned, and
prunes the group on that. It shares with the package only the methods.

`python -m tests.test_architectures` writes the support table of the docs, which the tests compare with what they see.
"""

import copy
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.matrices import find_blocks, find_weights
from optimum_sparse.metadata import expand_name, fold_names, matrix_of
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import parse_pattern

from .architectures import CAUSAL_LM_TYPES, MISSING, sweep_batches, sweep_model

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
MARKER = "<!-- the table below is written by `python -m tests.test_architectures` -->\n"
COMBINATIONS = [
    {"method": method, **target}
    for method in ("wanda", "sparsegpt")
    for target in ({"sparsity": 0.5}, {"pattern": "2:4"})
]

aten = torch.ops.aten
Key = tuple[str, int]  # name of a parameter, and number of the matrix in it
Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Product:
    """A matrix product with a part of a parameter.

    Attributes:
        key: The parameter and the part.
        inputs: `[tokens, in_features]`.
        source: The same for products that take the very same tensor.
        together: Whether the product takes other parts of the parameter as well.
    """

    key: Key
    inputs: torch.Tensor
    source: int
    together: bool


class Products(TorchDispatchMode):
    """Records matrix products with parameters, in `products`, and sees through copies made on the way to them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._alive: list[torch.Tensor] = []  # so that no later tensor gets the address of an earlier one
        self._source: dict[int, int] = {}  # storage of a copy -> storage of what it was copied from
        # storage -> name of the parameter, its size, and where each entry of the storage stands in it
        self._weights: dict[int, tuple[str, int, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                places = torch.arange(parameter.storage_offset() + parameter.numel()) - parameter.storage_offset()
                self._weights[storage(parameter)] = (name, parameter.numel(), places)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default, aten.mv.default):
            self._product(args[0], args[1])
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self._product(args[1], args[2])
        result = func(*args, **(kwargs or {}))
        if func is aten.clone.default:
            self._alive += [args[0], result]
            self._source[storage(result)] = self._source.get(storage(args[0]), storage(args[0]))
            if storage(args[0]) in self._weights and result.is_contiguous():
                name, numel, places = self._weights[storage(args[0])]
                copied = places.as_strided(args[0].shape, args[0].stride(), args[0].storage_offset())
                self._weights[storage(result)] = (name, numel, copied.reshape(-1))
        return result

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if storage(right) in self._weights:
            self._note(right.mT, left)
        elif storage(left) in self._weights:
            self._note(left, right.mT if right.ndim > 1 else right[None])

    def _note(self, weights: torch.Tensor, inputs: torch.Tensor) -> None:
        """Note the product of `[out, in]` and `[tokens, in]`, or of as many of both as there are."""
        name, _, places = self._weights[storage(weights)]
        self._alive.append(inputs)
        source = self._source.get(storage(inputs), storage(inputs))
        rows: dict[Key, list[torch.Tensor]] = {}
        pairs = [(weights, inputs)] if weights.ndim == 2 else list(zip(weights, inputs, strict=True))
        for matrix, mine in pairs:
            place = places.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())
            order = place[0].argsort()  # of the columns, as they stand in the parameter
            rows.setdefault((name, int(place.min()) // matrix.numel()), []).append(mine[:, order])
        for key, parts in rows.items():
            self.products.append(Product(key, torch.cat(parts), source, len(rows) > 1))


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def one_expert_at_a_time(model: PreTrainedModel) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    yield
    model.set_experts_implementation(before)


def products_of(model: PreTrainedModel, batch: Mapping[str, Any]) -> list[Product]:
    with torch.no_grad(), one_expert_at_a_time(model), Products(model) as seen:
        model(**batch, use_cache=False)
    return seen.products


def in_order(sequences: Sequence[Sequence[Key]]) -> list[Key]:
    """All keys so that each comes after those that precede it in any of the sequences."""
    before: dict[Key, set[Key]] = {}
    for sequence in sequences:
        for place, key in enumerate(sequence):
            before.setdefault(key, set()).update(sequence[:place])
    order: list[Key] = []
    while before:
        ready = next(key for key, needs in before.items() if not needs & before.keys())
        del before[ready]
        order.append(ready)
    return order


def prune_as_by_reruns(
    weights: Mapping[Key, torch.Tensor],
    dense: Sequence[Sequence[Product]],
    pruned: Sequence[Sequence[Product]],
    config: SparseConfig,
) -> None:
    """Prune matrices as if the whole model were run again, for each group in turn, with all groups before it pruned.

    What goes into a group depends on what runs before it, and on nothing else. So a single run of the pruned model
    shows the inputs that each group had at its turn, if those before it are right; of these, the same holds.

    Args:
        weights: Of the dense model, `[out, in]` each; pruned in place.
        dense: Products of the dense model, for each batch. What is used more than once is pruned on these.
        pruned: The same of the model that was pruned.
        config: How.
    """

    def statistics_of(products: Sequence[Product]) -> Any:
        statistics = METHODS[config.method].statistics(products[0].inputs.shape[1])
        for product in products:
            # Where all experts take part in one product, a token that is routed elsewhere is a row of zeros.
            rows = product.inputs
            statistics.add(rows[rows.any(dim=1)] if product.together else rows)
        return statistics

    def solve(group: Sequence[Key], statistics: Any) -> None:
        stack = [weights[key] for key in group]
        rows = [len(weight) for weight in stack]
        pattern = parse_pattern(config.sparsity, config.pattern)
        solution = METHODS[config.method].solve(torch.cat(stack), statistics, pattern, config, rows)
        for weight, solved in zip(stack, solution.weight.split(rows), strict=True):
            weight.copy_(solved)

    counts = Counter()
    for products in dense:
        counts |= Counter(product.key for product in products)
    repeated = {key for key, count in counts.items() if count > 1 and key in weights}
    for key in repeated:
        solve([key], statistics_of([product for products in dense for product in products if product.key == key]))
    passes = [{product.key: product for product in products} for products in pruned]
    left = [key for key in in_order([list(products) for products in passes]) if key in weights and key not in repeated]
    while left:
        mine = [products.get(left[0]) for products in passes]
        group = [
            other
            for other in left
            if all(
                a is b or (a and b and a.source == b.source and torch.equal(a.inputs, b.inputs))
                for a, b in zip(mine, (products.get(other) for products in passes), strict=True)
            )
        ]
        solve(group, statistics_of([product for product in mine if product is not None]))
        left = [key for key in left if key not in group]


# What the table says.


@dataclass(frozen=True)
class Row:
    """A line of the support table. Exactness is what `test_sweep` asserts for each of them."""

    model_type: str
    matrices: int
    coverage: float
    dense: str

    def __str__(self) -> str:
        return f"| {self.model_type} | {self.matrices} | {100 * self.coverage:.0f} % | to the bit | {self.dense} |"


EXPECTED_DENSE = ("is a convolution", "is a router", "is a gate", "matches ignore", "shares its weight")


def row_of(model: PreTrainedModel, pruner: SparsePruner) -> Row:
    """Count what was pruned of the matrices in the blocks; routers, gates, embeddings and convolutions are none."""
    blocks = tuple(f"{name}." for name in find_blocks(model))
    pruned = sum(matrix.numel for matrix in pruner.report.matrices if matrix.name.startswith(blocks))
    left: dict[str, list[str]] = {}
    numel = 0
    for weight in find_weights(model):
        for name, reason in pruner.report.skipped.items():
            whole = name == weight.names[0]
            layer = isinstance(weight.modules[0], (nn.Linear, Conv1D)) or not whole
            mine = whole or name.rpartition(".")[0] == weight.names[0]
            if mine and layer and name.startswith(blocks) and not reason.startswith(EXPECTED_DENSE):
                left.setdefault(reason.partition(":")[0], []).append(name)
                numel += weight.value.numel() // (1 if whole else weight.value.shape[0])
    return Row(
        model.config.model_type,
        len(pruner.report.matrices),
        pruned / (pruned + numel),
        "; ".join(
            f"{', '.join(fold_names(names)[:2])}, ... ({len(names)}) {reason}" for reason, names in left.items()
        ),
    )


def matrices_of(model: PreTrainedModel) -> dict[str, tuple[Key, torch.Tensor]]:
    """Name, place and value of each matrix that the metadata of a pruned model names."""
    found = {}
    for folded, entry in model.config.sparsity_config["matrices"].items():
        for name in expand_name(folded):
            parameter, matrix = matrix_of(model, name, tuple(entry["shape"]), entry["transposed"])
            value = dict(model.named_parameters(remove_duplicate=False))[parameter]
            canonical = next(n for n, p in model.named_parameters() if p is value)
            part = (matrix.storage_offset() - value.storage_offset()) // matrix.numel()
            found[name] = ((canonical, part), matrix)
    return found


def prune(model: PreTrainedModel, batches: Batches, options: Mapping[str, Any]) -> SparsePruner:
    # Experts with a single token are pruned on it alone: tests/test_experts.py has the others.
    pruner = SparsePruner(batch_size=2, block_size=16, min_expert_tokens=1, progress=False, **options)
    pruner.prune(model, dataset=batches)
    return pruner


def check_zeros(model: PreTrainedModel, dense: PreTrainedModel, pruner: SparsePruner) -> None:
    """Each matrix has exactly half of its weights zero, and nothing else has changed by a bit."""
    matrices = matrices_of(model)
    assert len(matrices) == len(pruner.report.matrices) > 0
    reference = dict(dense.named_parameters())
    touched: dict[str, torch.Tensor] = {}
    for name, ((parameter, _), matrix) in matrices.items():
        assert int((matrix == 0).sum()) * 2 == matrix.numel(), name
        if pruner.config.pattern:
            assert ((matrix.reshape(-1, 4) == 0).sum(dim=1) == 2).all(), name
        value = model.get_parameter(parameter)
        mask = touched.setdefault(parameter, torch.zeros_like(value, dtype=torch.bool))
        mask.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset() - value.storage_offset()).fill_(True)
    for name, value in model.named_parameters():
        untouched = ~touched.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[untouched], reference[name][untouched]), name
    for (name, buffer), (_, before) in zip(model.named_buffers(), dense.named_buffers(), strict=True):
        assert torch.equal(buffer, before), name


def check_oracle(
    model: PreTrainedModel, dense: PreTrainedModel, batches: Batches, pruner: SparsePruner, run: list[list[Product]]
) -> None:
    """The same bits as by reruns, but for experts that no token went to: reruns do not show them.

    `run` has the products of the dense model for each batch.
    """
    expected = copy.deepcopy(dense)
    expected.config.sparsity_config = model.config.sparsity_config
    shared = {entry.name for entry in pruner.report.matrices if entry.layer_share}
    ours, theirs = matrices_of(model), matrices_of(expected)
    weights = {key: matrix.detach() for name, (key, matrix) in theirs.items() if name not in shared}
    prune_as_by_reruns(weights, run, [products_of(model, batch) for batch in batches], pruner.config)
    different = [name for name in ours if name not in shared and not torch.equal(ours[name][1], theirs[name][1])]
    assert not different


def check_reload(model: PreTrainedModel, batches: Batches, pruner: SparsePruner, folder: Path) -> None:
    """Saving, which splits fused experts, and loading give the same bits and the same outputs."""
    pruner.save(model, folder)
    again = type(model).from_pretrained(folder).eval()
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
        value.data = value.data.clone()  # memory-mapped weights are not aligned, which changes sums by an ulp
    with torch.no_grad():
        ours, theirs = (m(**batches[0], use_cache=False) for m in (model, again))
    assert torch.equal(ours.logits, theirs.logits)
    assert again.config.sparsity_config == model.config.sparsity_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", [t for t in CAUSAL_LM_TYPES if t not in MISSING])
def test_sweep(model_type, tmp_path):
    dense = sweep_model(model_type)
    batches = sweep_batches(dense, num=2, encoder=True)
    run = [products_of(dense, batch) for batch in batches]
    for options in COMBINATIONS:
        model = copy.deepcopy(dense)
        pruner = prune(model, batches, options)
        check_zeros(model, dense, pruner)
        check_oracle(model, dense, batches, pruner, run)
    row = row_of(model, pruner)
    assert row.coverage >= 0.95 or row.dense
    assert str(row) in TABLE.read_text(encoding="utf-8"), f"run: python -m tests.test_architectures\n{row}"
    check_reload(model, batches, pruner, tmp_path)


def test_every_type_is_built_or_named():
    table = TABLE.read_text(encoding="utf-8")
    assert set(MISSING) < set(CAUSAL_LM_TYPES)
    for model_type, reason in MISSING.items():
        assert f"| {model_type} | | | | {reason} |" in table


def write_table() -> None:
    """Prune a model of each type and write the table."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    for model_type in CAUSAL_LM_TYPES:
        if model_type in MISSING:
            rows.append(f"| {model_type} | | | | {MISSING[model_type]} |")
            continue
        model = sweep_model(model_type)
        rows.append(str(row_of(model, prune(model, sweep_batches(model, num=2, encoder=True), COMBINATIONS[-1]))))
    columns = ("model type", "matrices", "coverage", "equals reruns", "what stays dense in the blocks")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    before = TABLE.read_text(encoding="utf-8").partition(MARKER)[0]
    TABLE.write_text(before + MARKER + "\n" + head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_table())
