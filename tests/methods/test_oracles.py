"""Every method against the papers' equations in float64 (`oracles.py`), and the contract that all of them keep."""

import copy
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from optimum_sparse.config import METHOD_NAMES, SparseConfig
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import NM, Unstructured
from optimum_sparse.statistics import GramStatistics
from tests.methods import oracles

ORACLES = {
    "magnitude": oracles.magnitude,
    "wanda": oracles.wanda,
    "ria": oracles.ria,
    "sparsegpt": oracles.sparsegpt,
    "sparsegpt-reference": partial(oracles.sparsegpt, authors_dampening=True),
    "magnitude-update": oracles.magnitude_update,
    "wanda-update": oracles.wanda_update,
}
ITERATIVE = ("admm",)  # no equation gives its solution; test_admm.py checks what it must satisfy
SCORES = ("magnitude", "wanda", "ria")
GROUPED = ("magnitude", "wanda")
EXACT_UPDATES = ("sparsegpt", "sparsegpt-reference", "magnitude-update", "wanda-update")
COMPENSATING = (*EXACT_UPDATES, *ITERATIVE)
PATTERNS = [0.5, 0.7, 0.0, (2, 4), (1, 4), (4, 8), (8, 16)]


@dataclass(frozen=True)
class Case:
    """A weight, the inputs it sees, and how it is to be pruned; `pattern` as in `oracles.py`."""

    pattern: float | tuple[int, int]
    rows: int = 10
    columns: int = 160  # one block of 128 and a shorter one
    tokens: int = 320
    dead: tuple[int, ...] = ()
    block_size: int = 128
    dampening_frac: float = 0.01
    ties: bool = False
    group: str | None = None
    seed: int = 0


def weight_of(case: Case) -> torch.Tensor:
    weight = torch.randn(case.rows, case.columns, generator=torch.Generator().manual_seed(case.seed))
    return weight.mul(2).round().clamp(-2, 2) if case.ties else weight


def inputs_of(case: Case) -> torch.Tensor:
    """Correlated whole numbers, so that X^T X is exact in fp32 and both sides see the same Hessian."""
    if case.ties:
        return 2 * torch.eye(case.columns)
    generator = torch.Generator().manual_seed(case.seed + 1000)
    mix = torch.eye(case.columns) + 0.1 * torch.randn(case.columns, case.columns, generator=generator)
    scale = torch.randint(1, 5, (case.columns,), generator=generator)
    inputs = (2 * scale * (torch.randn(case.tokens, case.columns, generator=generator) @ mix)).round()
    inputs[:, list(case.dead)] = 0
    return inputs


def solve(method: str, case: Case, weight: torch.Tensor | None = None, rows: tuple[int, ...] | None = None):
    """Run a method of the package on a case."""
    pattern = NM(*case.pattern) if isinstance(case.pattern, tuple) else Unstructured(case.pattern)
    config = SparseConfig(
        method=method,
        block_size=case.block_size,
        dampening_frac=case.dampening_frac,
        comparison_group=case.group if method in GROUPED else None,
    )
    statistics = None
    if METHODS[method].statistics is not None:
        statistics = METHODS[method].statistics(case.columns)
        for batch in inputs_of(case).split(100):
            statistics.add(batch)
    weight = weight_of(case) if weight is None else weight
    return METHODS[method].solve(weight, statistics, pattern, config, rows=rows)


@cache
def expected(oracle, case: Case) -> oracles.OracleResult:
    options = {} if case.group is None else {"group": case.group}
    return oracle(
        weight_of(case),
        inputs_of(case),
        case.pattern,
        block_size=case.block_size,
        dampening_frac=case.dampening_frac,
        **options,
    )


def assert_matches_oracle(method: str, case: Case, tolerance: float = 1e-5) -> None:
    oracle = expected(ORACLES[method], case)
    # Below this, fp32 may honestly decide otherwise: the case needs another seed.
    assert oracle.margin > 2e-5, f"too close to call: {oracle.margin:.1e}"
    solution = solve(method, case)
    assert torch.equal(solution.mask, oracle.mask)
    difference = (solution.weight.double() - oracle.weight).abs().max()
    assert difference <= tolerance * oracle.weight.abs().max(), f"{difference:.2e}"


def test_every_method_has_an_oracle():
    assert {*ORACLES, *ITERATIVE} == set(METHODS) == set(METHOD_NAMES)


def test_integer_inputs_have_an_exact_gram():
    inputs = inputs_of(Case(0.5))
    statistics = GramStatistics(inputs.shape[1])
    for batch in inputs.split(100):
        statistics.add(batch)
    assert torch.equal(statistics.gram.double(), inputs.double().T @ inputs.double())


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns(method, pattern):
    assert_matches_oracle(method, Case(pattern, seed=13))


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("pattern", [0.5, 0.35, (2, 4), (1, 4)], ids=str)
def test_dead_columns(method, pattern):
    assert_matches_oracle(method, Case(pattern, dead=(0, 5, 6, 77, 128, 159), seed=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [0.25, (3, 4)], ids=str)
def test_more_dead_columns_than_zeros(method, pattern):
    """The mask still has exactly the zeros asked for; no live weight is among them if inputs matter to the method."""
    dead = tuple(j for j in range(40) if j % 4 != 3)
    solution = solve(method, Case(pattern, columns=40, dead=dead, seed=10))
    assert int((~solution.mask).sum()) == 100
    if not method.startswith("magnitude"):
        assert solution.mask[:, [j for j in range(40) if j not in dead]].all()


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("pattern", [0.5, (2, 4)], ids=str)
def test_fewer_tokens_than_columns(method, pattern):
    # The authors invert in fp32, which loses digits when the damping alone makes the Hessian invertible.
    tolerance = 1e-4 if method == "sparsegpt-reference" else 1e-5
    assert_matches_oracle(method, Case(pattern, tokens=40, seed=3), tolerance)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize(
    "case",
    [
        Case(0.5, columns=52, block_size=16),
        Case(0.5, columns=16, block_size=1, rows=5),
        Case(0.33, columns=37, rows=7, block_size=10),
        Case((4, 8), columns=72, block_size=20),
        Case((8, 16), columns=96, block_size=8),
        Case((2, 3), columns=63, block_size=16),
        Case((1, 32), columns=96, block_size=24),
        Case((7, 20), columns=20),
        Case(0.5, rows=1, columns=33),
        Case(0.5, rows=40, columns=1),
        Case(0.999, rows=6, columns=40, block_size=8),
    ],
    ids=str,
)
def test_blocks_that_do_not_divide(method, case):
    assert_matches_oracle(method, case)


@pytest.mark.parametrize("method", EXACT_UPDATES)
@pytest.mark.parametrize("dampening_frac", [1e-3, 0.1, 1.0])
def test_dampening(method, dampening_frac):
    assert_matches_oracle(method, Case(0.6, columns=64, dampening_frac=dampening_frac, seed=11))


@pytest.mark.parametrize("method", GROUPED)
@pytest.mark.parametrize("group", ["output", "layer"])
def test_comparison_groups(method, group):
    assert_matches_oracle(method, Case(0.55, columns=40, group=group, seed=5))


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("pattern", [0.5, 0.7, (2, 4), (5, 8)], ids=str)
def test_ties_are_broken_by_index(method, pattern):
    assert_matches_oracle(method, Case(pattern, columns=40, block_size=16, ties=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [0.5, 0.37, (2, 4), (1, 4)], ids=str)
def test_stacked_rows_are_separate_matrices(method, pattern):
    case, rows = Case(pattern, rows=15, seed=6), (4, 11)
    stacked = solve(method, case, rows=rows)
    parts = [solve(method, case, weight=part) for part in weight_of(case).split(rows)]
    assert torch.equal(stacked.mask, torch.cat([part.mask for part in parts]))
    weight = torch.cat([part.weight for part in parts])
    # Not to the bit: the rounding of a matrix product may depend on its number of rows, and ADMM's are in bfloat16.
    tolerance = 1e-3 if method == "admm" else 1e-6
    torch.testing.assert_close(stacked.weight, weight, rtol=0, atol=tolerance * float(weight.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_contract(method, pattern):
    """Pure, repeatable, exact in its number of zeros, and fp32 in, fp32 out."""
    case, rows = Case(pattern, rows=9, seed=7), (2, 7)
    weight = weight_of(case)
    before = weight.clone()
    solution = solve(method, case, weight=weight, rows=rows)
    assert torch.equal(weight, before)
    assert solution.weight.data_ptr() != weight.data_ptr()
    assert solution.weight.shape == solution.mask.shape == weight.shape
    assert solution.weight.dtype == torch.float32
    assert solution.mask.dtype == torch.bool
    assert torch.equal(solution.weight == 0, ~solution.mask)
    if isinstance(pattern, tuple):
        n, m = pattern
        assert (solution.mask.reshape(-1, m).sum(dim=1) == n).all()
    elif method.startswith("wanda"):  # each output has its share
        assert ((~solution.mask).sum(dim=1) == oracles.num_pruned(case.columns, pattern)).all()
    else:
        for mask in solution.mask.split(rows):
            assert int((~mask).sum()) == oracles.num_pruned(mask.numel(), pattern)
    if method in SCORES:
        assert torch.equal(solution.weight, weight * solution.mask)
    if pattern == 0.0:
        assert torch.equal(solution.weight, weight)
    again = solve(method, case, weight=weight, rows=rows)
    assert torch.equal(solution.weight, again.weight) and torch.equal(solution.mask, again.mask)
    assert (solution.damping is not None) == (method in COMPENSATING)
    assert (solution.residual is not None) == (method in ITERATIVE)


@pytest.mark.parametrize("method", ["wanda", "ria", *COMPENSATING])
def test_statistics_are_not_changed(method):
    case = Case(0.5, columns=48, seed=8, dead=(3,))
    statistics = METHODS[method].statistics(case.columns)
    statistics.add(inputs_of(case))
    before = copy.deepcopy(vars(statistics))
    first = METHODS[method].solve(weight_of(case), statistics, Unstructured(0.5), SparseConfig(method=method))
    after = vars(statistics)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[name], value), name
    second = METHODS[method].solve(weight_of(case), statistics, NM(2, 4), SparseConfig(method=method))
    assert not torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("method", COMPENSATING)
def test_compensation_lowers_the_output_error(method):
    """What the update is for: on the calibration inputs, SparseGPT beats dropping the same weights."""
    case = Case(0.5, seed=9)
    weight, inputs = weight_of(case), inputs_of(case)
    solution = solve(method, case)
    updated = ((weight - solution.weight) @ inputs.T).square().sum()
    dropped = ((weight * ~solution.mask) @ inputs.T).square().sum()
    assert updated < 0.9 * dropped


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_sparsegpt_keeps_the_largest_weights_if_no_input_was_ever_non_zero(pattern):
    statistics = GramStatistics(16)
    statistics.add(torch.zeros(5, 16))
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    config = SparseConfig(block_size=16)
    solution = METHODS["sparsegpt"].solve(weight, statistics, pattern, config, None)
    expected = METHODS["magnitude"].solve(weight, None, pattern, SparseConfig(method="magnitude"), None)
    assert torch.equal(solution.weight, expected.weight)
