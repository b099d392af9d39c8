"""Refinement against exact least squares and recomputed errors in float64."""

import pytest
import torch

from optimum_sparse.config import SparseConfig
from optimum_sparse.methods import METHODS, cg, swaps
from optimum_sparse.methods import refine as refinement
from optimum_sparse.methods.refine import refine
from optimum_sparse.patterns import NM, Unstructured
from tests.methods import oracles
from tests.methods.test_admm import correlated, gram, random

PATTERNS = [Unstructured(0.5), Unstructured(0.8), NM(2, 4), NM(4, 8)]
STARTS = ["magnitude", "wanda", "sparsegpt", "admm"]


def start(method: str, weight: torch.Tensor, inputs: torch.Tensor, pattern):
    statistics = gram(inputs) if METHODS[method].statistics else None
    return METHODS[method].solve(weight, statistics, pattern, SparseConfig(method=method), None)


def problem(seed: int, tokens: int = 200, columns: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    return random(20, columns, seed=seed), correlated(tokens, columns, seed)


@pytest.mark.parametrize("kind", ["cg", "swaps"])
@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_never_raises_the_error_of_an_output(kind, method, pattern):
    for seed, tokens in ((0, 10), (10, 40), (20, 100), (30, 1000)):
        weight, inputs = problem(seed, tokens)
        inputs[:, seed % 7] *= 1e4
        inputs[:, 20:23] = 0
        solution = start(method, weight, inputs, pattern)
        before = solution.weight.clone(), solution.mask.clone()
        refined = refine(kind, solution, weight, gram(inputs), pattern, SparseConfig())
        assert torch.equal(solution.weight, before[0]) and torch.equal(solution.mask, before[1])
        old, new = (oracles.error(weight, x.weight, inputs) for x in (solution, refined))
        # fp32 knows an error only up to the rounding of the output.
        slack = 1e-6 * oracles.error(weight, torch.zeros_like(weight), inputs)
        assert (new <= old + slack).all()
        assert method == "admm" or new.sum() < old.sum()
        assert torch.equal(refined.weight == 0, ~refined.mask)
        if isinstance(pattern, NM):
            assert (refined.mask.view(-1, pattern.m).sum(dim=1) == pattern.n).all()
        assert torch.equal(refined.mask.sum(dim=1), solution.mask.sum(dim=1))
        if kind == "cg":
            assert torch.equal(refined.mask, solution.mask)


@pytest.mark.parametrize("dampening_frac", [1e-4, 0.01, 0.3])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_cg_ends_at_least_squares(method, dampening_frac, monkeypatch):
    monkeypatch.setattr(refinement, "ROUNDS", 60)
    weight, inputs = problem(0)
    solution = start(method, weight, inputs, Unstructured(0.5))
    config = SparseConfig(dampening_frac=dampening_frac)
    # From a start that is closer to the data than the damped optimum, a row would rightly stay where it is.
    refined = refine("cg", solution, weight, gram(inputs), Unstructured(0.5), config)
    expected = oracles.least_squares(weight, inputs, solution.mask, dampening_frac)
    moved = (refined.weight != solution.weight).any(dim=1)
    assert moved.sum() >= (18 if dampening_frac < 0.1 else 1)
    difference = (refined.weight - expected)[moved] * inputs.norm(dim=0)
    assert difference.norm() < 2e-3 * (expected[moved] * inputs.norm(dim=0)).norm()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_cg_is_close_to_least_squares(method):
    """With the steps that it takes by default."""
    ours = best = 0.0
    for seed in (0, 10, 20):
        weight, inputs = problem(seed, tokens=1000, columns=128)
        solution = start(method, weight, inputs, Unstructured(0.5))
        refined = refine("cg", solution, weight, gram(inputs), Unstructured(0.5), SparseConfig(dampening_frac=1e-4))
        ours += oracles.error(weight, refined.weight, inputs).sum()
        best += oracles.error(weight, oracles.least_squares(weight, inputs, solution.mask), inputs).sum()
    assert best <= ours < 1.02 * best


def exchange(weight, solution, inputs, row: int, pruned: int, revived: int, dense: bool) -> float:
    """The error of a row after a swap, in float64."""
    changed = solution.weight[row].double().clone()
    changed[pruned] = 0
    deviation = weight[row].double() - changed
    x = inputs.double()
    best = (deviation @ x.T) @ x[:, revived] / x[:, revived].square().sum()
    changed[revived] = weight[row, revived].double() if dense else best
    return float(((weight[row].double() - changed) @ x.T).square().sum())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_gain_of_a_swap_is_that_of_recomputing(method, pattern):
    """And it is the best of all swaps."""
    weight, inputs = random(6, 16, seed=0), correlated(100, 16, seed=1)
    solution, dense = start(method, weight, inputs, pattern), method == "wanda"
    unit, norms = cg.unit_gram(gram(inputs))
    deviation = (weight - solution.weight) * norms
    change, pruned, revived, value = swaps._best_swap(
        deviation, solution.mask, weight * norms, deviation @ unit, unit, pattern, dense
    )
    errors = oracles.error(weight, solution.weight, inputs)
    for row in range(6):
        kept, gone = solution.mask[row].nonzero().flatten(), (~solution.mask[row]).nonzero().flatten()
        same = (lambda p, u: p // 4 == u // 4) if isinstance(pattern, NM) else (lambda p, u: True)
        every = {
            (int(p), int(u)): exchange(weight, solution, inputs, row, int(p), int(u), dense)
            for p in kept
            for u in gone
            if same(int(p), int(u))
        }
        assert min(every, key=every.get) == (int(pruned[row]), int(revived[row]))
        assert float(errors[row] + change[row]) == pytest.approx(min(every.values()), rel=1e-4)
    if dense:
        assert torch.equal(value, (weight * norms)[torch.arange(6), revived])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_swaps_end_where_none_lowers_the_error(method, pattern, monkeypatch):
    monkeypatch.setattr(swaps, "MAX_SWAPS", 10)
    weight, inputs = random(6, 16, seed=2), correlated(100, 16, seed=3)
    solution = refine("swaps", start(method, weight, inputs, pattern), weight, gram(inputs), pattern, SparseConfig())
    errors = oracles.error(weight, solution.weight, inputs)
    for row in range(6):
        for p in solution.mask[row].nonzero().flatten():
            for u in (~solution.mask[row]).nonzero().flatten():
                if not isinstance(pattern, NM) or p // 4 == u // 4:
                    after = exchange(weight, solution, inputs, row, int(p), int(u), method == "wanda")
                    assert after > (1 - 1.1 * swaps.TOLERANCE) * errors[row]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_swaps_after_wanda_choose_among_dense_weights(pattern):
    weight, inputs = problem(0)
    solution = start("wanda", weight, inputs, pattern)
    swapped = refine("swaps", solution, weight, gram(inputs), pattern, SparseConfig())
    assert not torch.equal(swapped.mask, solution.mask)
    assert torch.equal(swapped.weight, weight * swapped.mask)


def test_rows_are_swapped_in_chunks_alike(monkeypatch):
    weight, inputs = problem(0)
    for pattern in PATTERNS:
        solution = start("sparsegpt", weight, inputs, pattern)
        whole = refine("swaps", solution, weight, gram(inputs), pattern, SparseConfig())
        with monkeypatch.context() as patch:
            patch.setattr(swaps, "CHUNK", 5000)
            parts = refine("swaps", solution, weight, gram(inputs), pattern, SparseConfig())
        assert torch.equal(whole.mask, parts.mask)
        torch.testing.assert_close(whole.weight, parts.weight)


@pytest.mark.parametrize("kind", ["cg", "swaps"])
def test_nothing_to_gain_changes_nothing(kind):
    weight, inputs = problem(0)
    for pattern, x in ((Unstructured(0.0), inputs), (Unstructured(0.5), torch.zeros_like(inputs))):
        solution = start("wanda", weight, x, pattern)
        refined = refine(kind, solution, weight, gram(x), pattern, SparseConfig())
        if x is inputs or kind == "cg":
            assert torch.equal(refined.weight, solution.weight)
        assert refined.weight.isfinite().all()
