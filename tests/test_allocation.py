"""Allocation against formulas written out and searches through everything, and what a run makes of it."""

import itertools
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sparse import SparseConfig, SparsePruner, allocation
from optimum_sparse.allocation import allocate, allocated, least_loss
from optimum_sparse.matrices import PrunableMatrix
from optimum_sparse.patterns import NM, Unstructured, num_pruned, parse_pattern
from optimum_sparse.report import SparsityReport
from optimum_sparse.statistics import NormStatistics
from optimum_sparse.uses import View
from tests.commands.cli import sparse
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model

# Of two blocks: rows and columns.
SHAPES = {
    "0.q": (6, 8),
    "0.v": (2, 8),
    "0.up": (12, 8),
    "0.down": (6, 12),
    "1.q": (6, 8),
    "1.v": (2, 8),
    "1.up": (12, 8),
    "1.down": (6, 12),
}


def problem(
    config: SparseConfig, shapes: dict[str, tuple[int, int]] = SHAPES, seed: int = 0
) -> tuple[list[PrunableMatrix], list[NormStatistics | None]]:
    """Random matrices of a block each, which is what their names begin with, and statistics of random inputs."""
    generator = torch.Generator().manual_seed(seed)
    pattern = parse_pattern(None if config.pattern else config.sparsity, config.pattern)
    matrices: list[PrunableMatrix] = []
    statistics: list[NormStatistics | None] = []
    for name, (rows, columns) in shapes.items():
        module = nn.Linear(columns, rows, bias=False)
        scale = 10 ** torch.rand(1, generator=generator)
        values = scale * torch.randn(rows, columns, generator=generator)
        # Tails of all weights, so that there are outliers, and matrices that stand more than others.
        module.weight.data = values * values.abs() ** (6 * torch.rand(1, generator=generator))
        view = View(f"{name}.weight", 0, (rows, columns), False)
        matrices.append(PrunableMatrix(name, view, module, pattern, name.partition(".")[0]))
        statistics.append(NormStatistics(columns))
        spread = torch.logspace(-1, 1, columns)
        statistics[-1].add(torch.randn(30, columns, generator=generator) * spread)
    return matrices, statistics


def scores(matrix: PrunableMatrix, statistics: NormStatistics) -> list[list[float]]:
    """(W_ij ||X_j||)^2 in float64."""
    return (matrix.read().double().square() * statistics.squared_norms.double()).tolist()


def error_of(rows: list[list[float]], config: SparseConfig, columns: int) -> float:
    """What pruning so many columns of weights loses, as a share of the outputs."""
    everything = sum(map(sum, rows))
    if config.pattern:
        n, m = map(int, config.pattern.split(":"))
        parts = [row[i : i + m] for row in rows for i in range(0, len(row), m)] if columns else []
        return sum(sum(sorted(part)[: m - n]) for part in parts) / everything
    if config.method == "wanda":
        return sum(sum(sorted(row)[:columns]) for row in rows) / everything
    return sum(sorted(itertools.chain(*rows))[: columns * len(rows)]) / everything


def budget_of(matrices: list[PrunableMatrix], config: SparseConfig) -> int:
    return num_pruned(sum(matrix.numel for matrix in matrices), config.sparsity)


@pytest.mark.parametrize("seed", range(20))
def test_least_loss_is_the_least_of_all_choices(seed: int):
    generator = torch.Generator().manual_seed(seed)
    steps = [4, 3, 5, 2]
    losses = [torch.rand(n, generator=generator, dtype=torch.float64).sort().values for n in steps]
    sizes = [1] * 4 if seed % 2 else torch.randint(1, 6, (4,), generator=generator).tolist()
    budget = int(0.6 * sum(n * size for n, size in zip(steps, sizes, strict=True)))
    taken = least_loss(losses, sizes, budget)

    def size_of(choice) -> int:
        return sum(number * size for number, size in zip(choice, sizes, strict=True))

    def loss_of(choice) -> float:
        return sum(loss[:number].sum().item() for number, loss in zip(choice, losses, strict=True))

    assert abs(size_of(taken) - budget) <= max(sizes) / 2
    for choice in itertools.product(*(range(n + 1) for n in steps)):
        if size_of(choice) >= size_of(taken):
            assert loss_of(choice) >= loss_of(taken) - 1e-12


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_the_least_of_all_allocations(monkeypatch: pytest.MonkeyPatch, method: str, seed: int):
    """Of those in whole columns, over matrices of equal size, so that each of them can be had to the element."""
    monkeypatch.setattr(allocation, "REACH", 1.0)
    config = SparseConfig(method=method, sparsity=0.5, allocation="error")
    matrices, statistics = problem(config, {f"{i}.w": (4, 6) for i in range(4)}, seed)
    matrices[1].parameter.data.sign_()  # unlike the others
    counts = allocate(matrices, statistics, config)
    assert sum(counts) == budget_of(matrices, config)
    found = [count // 4 for count in counts]
    assert [4 * columns for columns in found] == counts and max(found) > min(found)
    curves = [
        [error_of(scores(matrix, inputs), config, columns) for columns in range(7)]
        for matrix, inputs in zip(matrices, statistics, strict=True)
    ]
    # No matrix keeps less than half of its share.
    ceiling = math.floor(0.75 * 6)
    choices = [c for c in itertools.product(range(ceiling + 1), repeat=4) if sum(c) == sum(found)]
    least = min(sum(curve[n] for curve, n in zip(curves, choice, strict=True)) for choice in choices)
    assert sum(curve[n] for curve, n in zip(curves, found, strict=True)) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_loss_is_the_least_of_all_allocations(monkeypatch: pytest.MonkeyPatch, method: str):
    """The errors of each matrix, scaled so that half of its columns lose what the loss rises by."""
    monkeypatch.setattr(allocation, "REACH", 1.0)
    config = SparseConfig(method=method, sparsity=0.5, allocation="loss")
    matrices, statistics = problem(config, {f"{i}.w": (4, 6) for i in range(4)})
    rises = [0.1, 3.0, 0.0, 1.0]
    counts = allocate(matrices, statistics, config, rises)
    assert sum(counts) == budget_of(matrices, config) and counts[2] == math.floor(0.75 * 6) * 4
    curves = []
    for matrix, inputs, rise in zip(matrices, statistics, rises, strict=True):
        errors = [error_of(scores(matrix, inputs), config, columns) for columns in range(7)]
        curves.append([rise * error / errors[3] for error in errors])
    choices = [c for c in itertools.product(range(5), repeat=4) if sum(c) == sum(counts) // 4]
    least = min(sum(curve[n] for curve, n in zip(curves, choice, strict=True)) for choice in choices)
    assert sum(curve[n // 4] for curve, n in zip(curves, counts, strict=True)) == pytest.approx(least, rel=1e-6)
    assert counts != allocate(matrices, statistics, SparseConfig(method=method, sparsity=0.5, allocation="error"))


def test_loss_decides_what_stays_dense():
    config = SparseConfig(pattern="2:4", sparsity=0.25, allocation="loss")
    matrices, statistics = problem(config, {f"{i}.w": (4, 8) for i in range(4)})
    counts = allocate(matrices, statistics, config, [0.3, 0.1, 0.4, 0.2])
    assert counts == [0, 16, 0, 16]


def test_error_does_not_depend_on_size():
    """A matrix with all rows twice loses what it would with all rows once."""
    config = SparseConfig(sparsity=0.6, allocation="error")
    matrices, statistics = problem(config, {"0.w": (10, 60), "0.twice": (20, 60), "1.w": (10, 60)})
    matrices[1].parameter.data.copy_(matrices[0].parameter.data.repeat(2, 1))
    statistics[1] = statistics[0]
    matrices[2].parameter.data.sign_()
    one, twice, other = allocate(matrices, statistics, config)
    assert abs(twice - 2 * one) <= 2 * 20 and abs(other - one) > 40


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.3), ("1:4", 0.4)])
def test_what_stays_dense_is_the_best_of_all_choices(pattern: str, sparsity: float, seed: int):
    config = SparseConfig(pattern=pattern, sparsity=sparsity, allocation="error")
    matrices, statistics = problem(config, seed=seed)
    counts = allocate(matrices, statistics, config)
    zeros = [matrix.numel - matrix.numel // 4 * int(pattern[0]) for matrix in matrices]
    assert all(count in (0, number) for count, number in zip(counts, zeros, strict=True))
    assert 0 < counts.count(0) < len(counts)
    assert abs(sum(counts) - budget_of(matrices, config)) <= max(zeros) / 2
    errors = [error_of(scores(m, s), config, 1) for m, s in zip(matrices, statistics, strict=True)]

    def total(values, choice) -> float:
        return sum(value for value, pruned in zip(values, choice, strict=True) if pruned)

    found = total(errors, counts)
    for choice in itertools.product([False, True], repeat=len(matrices)):
        if total(zeros, choice) >= sum(counts):
            assert total(errors, choice) >= found - 1e-9
    patterns = [allocated(m, count).pattern for m, count in zip(matrices, counts, strict=True)]
    assert patterns == [NM(int(pattern[0]), 4) if count else Unstructured(0.0) for count in counts]


def naive_owl(blocks: list[list[float]], sparsity: float) -> list[float]:
    """Sparsity of each block from its |W| ||X||, as in the code of the paper, for blocks of equal size."""
    outliers = [sum(value > 5 * sum(block) / len(block) for value in block) / len(block) for block in blocks]
    scaled = [(d - min(outliers)) / (max(outliers) - min(outliers)) * 2 * 0.08 for d in outliers]
    return [1 - (keep - sum(scaled) / len(scaled) + 1 - sparsity) for keep in scaled]


def naive_dlp(blocks: list[list[float]], sparsity: float) -> list[float]:
    means = [sum(block) / len(block) for block in blocks]
    important = [1 - mean / sum(means) for mean in means]
    scaled = [(i - min(important)) / (max(important) - min(important)) * 2 * 0.15 for i in important]
    return [1 - (keep - sum(scaled) / len(scaled) + 1 - sparsity) for keep in scaled]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "formula"), [("owl", naive_owl), ("dlp", naive_dlp)])
def test_blocks_get_what_the_papers_give_them(name: str, formula, seed: int):
    config = SparseConfig(sparsity=0.4, allocation=name)
    shapes = {f"{block}.{kind}": shape for block in range(5) for kind, shape in (("a", (40, 96)), ("b", (96, 40)))}
    matrices, statistics = problem(config, shapes, seed)
    counts = allocate(matrices, statistics, config)
    blocks: dict[str, list[float]] = defaultdict(list)
    for matrix, inputs in zip(matrices, statistics, strict=True):
        blocks[matrix.block] += [math.sqrt(score) for row in scores(matrix, inputs) for score in row]
    expected = formula(list(blocks.values()), 0.4)
    assert max(expected) - min(expected) == pytest.approx(2 * allocation.SPREAD[name])
    for matrix, count in zip(matrices, counts, strict=True):
        assert count / matrix.numel == pytest.approx(expected[int(matrix.block)], abs=2 / matrix.shape[1])


@pytest.mark.parametrize("name", ["owl", "dlp", "error"])
@pytest.mark.parametrize("sparsity", [0.02, 0.35, 0.5, 0.617, 0.7, 0.95])
def test_zeros_are_exactly_what_was_asked_for(name: str, sparsity: float):
    config = SparseConfig(sparsity=sparsity, allocation=name)
    ceiling, floor = (1 + sparsity) / 2, 0.0
    if name == "error":
        ceiling, floor = min(ceiling, sparsity + allocation.REACH), sparsity - allocation.REACH
    for seed in range(5):
        matrices, statistics = problem(config, seed=seed)
        counts = allocate(matrices, statistics, config)
        assert sum(counts) == budget_of(matrices, config)
        for matrix, count in zip(matrices, counts, strict=True):
            assert 0 <= count <= matrix.numel
            column = 1.01 / matrix.shape[1]  # sparsities are whole columns, and what is left over is one at most
            assert floor - 2 * column <= count / matrix.numel <= ceiling + 2 * column
            # The pattern says the same number.
            assert num_pruned(matrix.numel, allocated(matrix, count).pattern.sparsity) == count
        if 0.3 < sparsity < 0.8 and name != "owl":  # two blocks may well have equally many outliers
            shares = [count / matrix.numel for matrix, count in zip(matrices, counts, strict=True)]
            assert max(shares) - min(shares) > 0.1


@pytest.mark.parametrize("name", ["owl", "dlp", "error"])
def test_weights_that_compete_in_outputs_are_near(name: str):
    config = SparseConfig(method="wanda", sparsity=0.617, allocation=name)
    for seed in range(5):
        matrices, statistics = problem(config, seed=seed)
        counts = allocate(matrices, statistics, config)
        rounded = [
            matrix.shape[0] * num_pruned(matrix.shape[1], count / matrix.numel)
            for matrix, count in zip(matrices, counts, strict=True)
        ]
        assert abs(sum(rounded) - budget_of(matrices, config)) <= max(matrix.shape[0] for matrix in matrices) / 2


@pytest.mark.parametrize("name", ["owl", "dlp", "error"])
def test_experts_share_and_what_did_not_run_is_left_out(name: str):
    config = SparseConfig(sparsity=0.6, allocation=name)
    experts = {f"{block}.experts.up.{number}": (12, 8) for block in range(2) for number in range(3)}
    matrices, statistics = problem(config, {**SHAPES, **experts, "head": (4, 8)})
    index = {matrix.name: number for number, matrix in enumerate(matrices)}
    statistics[index["1.experts.up.2"]] = None  # no token was routed to it
    unlike = matrices[index["0.experts.up.0"]].parameter.data
    unlike.copy_(unlike.sign())  # alone, it would lose much with each weight
    statistics[index["head"]] = NormStatistics(8)
    counts = allocate(matrices, statistics, config)
    for block in range(2):
        shares = {counts[index[f"{block}.experts.up.{number}"]] for number in range(3)}
        assert max(shares) - min(shares) <= 12
    assert counts[index["head"]] == num_pruned(32, 0.6)
    assert sum(counts) - counts[index["head"]] == budget_of(matrices[:-1], config)
    assert allocate(matrices, [None] * len(matrices), config) == [num_pruned(m.numel, 0.6) for m in matrices]


@pytest.mark.parametrize("name", ["dlp", "error"])
def test_none_keeps_less_than_half_of_its_share(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(allocation, "REACH", 1.0)
    config = SparseConfig(sparsity=0.5, allocation=name)
    matrices, statistics = problem(config, {f"{i}.w": (4, 40) for i in range(10)})
    extreme = matrices[3].parameter.data
    extreme.zero_()
    extreme[0, :2] = 1e8  # much larger than all others, and nothing is lost with the rest
    counts = allocate(matrices, statistics, config)
    assert max(counts) == counts[3] == 0.75 * 160 and sum(counts) == 800


@pytest.mark.parametrize("name", ["owl", "dlp"])
def test_what_shares_inputs_is_solved_together(name: str):
    """But for one matrix, which gets what rounding to columns leaves over."""
    config = SparseConfig(sparsity=0.617, allocation=name)
    matrices, statistics = problem(
        config, {f"{b}.{n}": shape for b in range(8) for n, shape in enumerate(SHAPES.values())}
    )
    patterns: dict[tuple[str, int], set[float]] = defaultdict(set)
    for matrix, count in zip(matrices, allocate(matrices, statistics, config), strict=True):
        patterns[matrix.block, matrix.shape[1]].add(allocated(matrix, count).pattern.sparsity)
    assert sorted(map(len, patterns.values())) in ([1] * 16, [1] * 15 + [2])


@pytest.mark.parametrize("name", ["owl", "dlp", "error"])
def test_infinite_inputs_are_left_to_the_solver(name: str):
    config = SparseConfig(sparsity=0.6, allocation=name)
    matrices, statistics = problem(config)
    statistics[0].add(torch.full((1, 8), math.inf))
    assert sum(allocate(matrices, statistics, config)) == budget_of(matrices, config)
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"down_proj contain NaN or infinity"):
        SparsePruner(config, progress=False).prune(model, dataset=tiny_batches())


def test_a_sample_of_large_matrices_is_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocation, "REACH", 1.0)
    config = SparseConfig(sparsity=0.4, allocation="error")
    matrices, statistics = problem(config, {f"{block}.w": (400, 100) for block in range(4)})
    whole = allocate(matrices, statistics, config)
    monkeypatch.setattr(allocation, "SAMPLE", 8_000)
    sample = allocate(matrices, statistics, config)
    assert sample != whole
    for one, other in zip(sample, whole, strict=True):
        assert abs(one - other) <= 0.08 * 40_000


# In a run.

OPTIONS = {
    "owl": {"allocation": "owl", "sparsity": 0.6},
    "dlp": {"allocation": "dlp", "sparsity": 0.7},
    "error": {"allocation": "error"},
    "admm": {"allocation": "error", "method": "admm", "sparsity": 0.7},
    "by output": {"allocation": "error", "method": "wanda"},
    "2:4": {"allocation": "error", "pattern": "2:4", "sparsity": 0.3},
    "loss": {"allocation": "loss", "sparsity": 0.6},
    "loss by output": {"allocation": "loss", "method": "wanda"},
    "loss, 2:4": {"allocation": "loss", "pattern": "2:4", "sparsity": 0.3},
}
OFFLOADED = [options for options in OPTIONS.values() if options["allocation"] != "loss"]  # gradients are in memory
BUILDS = {
    "llama": tiny_model,
    "mixtral": tiny_mixtral,
    "gpt2": lambda: tiny_model("gpt2"),
    "zamba2": lambda: tiny_model("zamba2"),
}


def pruned(model: nn.Module, **options) -> SparsityReport:
    pruner = SparsePruner(progress=False, **options)
    pruner.prune(model, dataset=tiny_batches(6, rows=1, padding=True))
    assert pruner.report is not None
    return pruner.report


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_run_prunes_what_was_allocated(build, options: dict):
    model, dense = build(), build()
    report = pruned(model, **options)
    zeros, numel = (sum(getattr(entry, what) for entry in report.matrices) for what in ("zeros", "numel"))
    left = abs(zeros - num_pruned(numel, options.get("sparsity", 0.5)))
    if "pattern" in options:
        assert {entry.pattern for entry in report.matrices} == {"0", "2:4"}
        assert left <= max(entry.numel for entry in report.matrices)  # half of the zeros of four experts
    else:
        assert len({entry.pattern for entry in report.matrices}) > 1
        rounded = options.get("method") == "wanda"
        assert left <= rounded * max(entry.shape[0] for entry in report.matrices) / 2
    for entry in report.matrices:
        if entry.pattern == "2:4":
            assert entry.zeros == entry.numel // 2
        elif entry.pattern == "0" and "experts" not in entry.name:
            name = f"{entry.name}.weight"
            assert entry.zeros == 0 and torch.equal(model.get_parameter(name), dense.get_parameter(name))
    (note,) = (note for note in report.notes if note.startswith("allocation "))
    assert repr(options["allocation"]) in note and f" {len(report.matrices)} matrices" in note
    assert report.seconds["allocation"] > 0
    metadata = model.config.sparsity_config
    assert metadata["allocation"] == options["allocation"]
    assert metadata["achieved_sparsity"] == round(zeros / numel, 6)


def test_overrides_are_no_part_of_it():
    model = tiny_model()
    overrides = [{"match": "down_proj", "sparsity": 0.25}, {"match": "k_proj", "pattern": "1:4"}]
    overrides.append({"match": "0.*.v_proj", "sparsity": 0})
    report = pruned(model, allocation="error", sparsity=0.7, overrides=overrides)
    others = [entry for entry in report.matrices if not entry.name.endswith(("down_proj", "k_proj"))]
    assert len(others) == 9
    assert sum(entry.zeros for entry in others) == num_pruned(sum(entry.numel for entry in others), 0.7)
    for entry in report.matrices:
        if entry.name.endswith("down_proj"):
            assert entry.zeros == entry.numel // 4
        if entry.name.endswith("k_proj"):
            assert entry.pattern == "1:4"


def test_everything_overridden_leaves_nothing_to_allocate():
    report = pruned(tiny_model(), allocation="error", overrides=[{"match": "*", "sparsity": 0.25}])
    assert report.sparsity == 0.25 and not [note for note in report.notes if note.startswith("allocation ")]


@pytest.mark.parametrize("options", OFFLOADED, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_weights_come_to_the_same(tmp_path: Path, options: dict):
    expected = tiny_model()
    report = pruned(expected, **options)
    expected.save_pretrained(tmp_path / "expected")
    tiny_model().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    pruner = SparsePruner(progress=False, **options)
    pruner.prune(model, dataset=tiny_batches(6, rows=1, padding=True), activation_device="disk")
    assert [(e.name, e.zeros, e.pattern) for e in pruner.report.matrices] == [
        (e.name, e.zeros, e.pattern) for e in report.matrices
    ]
    pruner.save(model, tmp_path / "out")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("expected", "out"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", ["error", "2:4"])
def test_inspect_and_packing_take_it(tmp_path: Path, name: str):
    model, pruner = tiny_model(), SparsePruner(progress=False, **OPTIONS[name])
    pruner.prune(model, dataset=tiny_batches())
    for compressed in (False, True):
        pruner.save(model, tmp_path / "out", compressed=compressed)
        assert sparse("inspect", tmp_path / "out") == 0
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.config.sparsity_config == model.config.sparsity_config
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "own"}, r"Unknown allocation 'own': did you mean 'owl'\?"),
        ({"allocation": "owl", "method": "magnitude"}, "does not go with method='magnitude'"),
        ({"allocation": "owl", "pattern": "2:4", "sparsity": 0.4}, "'owl' does not go with pattern '2:4'"),
        ({"allocation": "error", "pattern": "2:4"}, "Give a lower sparsity"),
        ({"allocation": "loss", "pattern": "2:4"}, "'loss' has nothing to choose.*Give a lower sparsity"),
        ({"allocation": "error", "pattern": "2:4", "sparsity": 0.5}, "Give a lower sparsity"),
        ({"allocation": "error", "pattern": "2:4", "sparsity": 0.6}, "leave sparsity out"),
        ({"pattern": "2:4", "sparsity": 0.4}, "leave sparsity out"),
    ],
    ids=str,
)
def test_what_does_not_fit_together(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)


def test_a_pattern_with_a_lower_sparsity_makes_the_round_trip():
    config = SparseConfig(allocation="error", pattern="2:4", sparsity=0.4)
    assert SparseConfig.from_dict(config.to_dict()) == config and config.sparsity == 0.4
    assert SparseConfig(allocation="dlp", method="magnitude", refine="cg").allocation == "dlp"
