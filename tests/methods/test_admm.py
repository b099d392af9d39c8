"""What the solution of ADMM must satisfy, though no equation gives it."""

import itertools
import math

import pytest
import torch

from optimum_sparse.config import SparseConfig
from optimum_sparse.methods import METHODS, admm
from optimum_sparse.patterns import NM, SharedRows, Unstructured, keep_mask
from optimum_sparse.statistics import GramStatistics
from tests.methods import oracles

PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(1, 4), NM(8, 16)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs of low rank and noise, some features much larger than others, as in language models."""
    rank = max(1, columns // 8)
    inputs = random(tokens, rank, seed=seed) @ random(rank, columns, seed=seed + 1) + random(
        tokens, columns, seed=seed + 2
    )
    return inputs * random(columns, seed=seed + 3).exp()


def gram(inputs: torch.Tensor) -> GramStatistics:
    statistics = GramStatistics(inputs.shape[1])
    statistics.add(inputs)
    return statistics


def solve(method: str, weight: torch.Tensor, inputs: torch.Tensor, pattern, rows=None, **options):
    config = SparseConfig(**{"method": method, **options})
    return METHODS[method].solve(weight, gram(inputs), pattern, config, rows)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [20, 60, 400], ids=lambda n: f"{n} tokens")
def test_no_worse_than_sparsegpt(pattern, tokens):
    for seed in range(0, 40, 10):
        weight, inputs = random(24, 64, seed=seed), correlated(tokens, 64, seed)
        ours, theirs = (
            oracles.error(weight, solve(method, weight, inputs, pattern).weight, inputs).sum()
            for method in ("admm", "sparsegpt")
        )
        assert ours < theirs


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_weights_are_the_best_for_their_mask(pattern):
    """The limit for a mask is least squares: little is left to gain."""
    for seed in (0, 10, 20):
        weight, inputs = random(24, 64, seed=seed), correlated(400, 64, seed)
        solution = solve("admm", weight, inputs, pattern)
        best = oracles.least_squares(weight, inputs, solution.mask)
        assert oracles.error(weight, solution.weight, inputs).sum() < 1.01 * oracles.error(weight, best, inputs).sum()


def test_close_to_the_best_of_all_masks():
    """On 30 problems small enough to try every mask, the error is within a tenth of the least on average."""
    ours, best = 0.0, 0.0
    for seed in range(0, 300, 10):
        weight, inputs = random(1, 8, seed=seed), correlated(40, 8, seed)
        weight /= inputs.norm(dim=0)
        scale = (weight @ inputs.T).square().sum()
        masks = torch.zeros(70, 8, dtype=torch.bool)
        for mask, kept in zip(masks, itertools.combinations(range(8), 4), strict=True):
            mask[list(kept)] = True
        every = oracles.least_squares(weight.expand(70, -1), inputs, masks)
        best += oracles.error(weight.expand(70, -1), every, inputs).min() / scale
        ours += oracles.error(weight, solve("admm", weight, inputs, Unstructured(0.5)).weight, inputs).sum() / scale
    assert best < ours < 1.1 * best


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_independent_inputs(pattern):
    """Then nothing can be made up for: the largest weights times norms are kept, and stay as they are."""
    weight, inputs = random(200, 64, seed=0), torch.diag(random(64, seed=1).exp())
    solution = solve("admm", weight, inputs, pattern)
    best = solve("wanda", weight, inputs, pattern, comparison_group="layer")
    assert (solution.mask == best.mask).float().mean() > 0.995
    kept = solution.mask & best.mask
    torch.testing.assert_close(solution.weight[kept], weight[kept], rtol=2e-3, atol=0)
    ours, least = (oracles.error(weight, x.weight, inputs).sum() for x in (solution, best))
    assert least <= ours < 1.001 * least


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_awkward_inputs(pattern):
    """A huge channel, dead channels, equal channels and fewer tokens than features, with weights of bfloat16."""
    weight, inputs = random(24, 64, seed=0).bfloat16().float(), correlated(30, 64, seed=0)
    inputs[:, 7] *= 1e5
    inputs[:, [3, 40, 41]] = 0
    inputs[:, 12] = inputs[:, 11]
    solution = solve("admm", weight, inputs, pattern)
    assert solution.weight.isfinite().all()
    assert not solution.mask[:, [3, 40]].any()
    theirs = solve("sparsegpt", weight, inputs, pattern)
    assert oracles.error(weight, solution.weight, inputs).sum() < oracles.error(weight, theirs.weight, inputs).sum()


def test_no_live_input_keeps_the_largest_weights():
    weight = random(6, 16, seed=0)
    solution = solve("admm", weight, torch.zeros(5, 16), Unstructured(0.5))
    expected = METHODS["magnitude"].solve(weight, None, Unstructured(0.5), SparseConfig(), None)
    assert torch.equal(solution.mask, expected.mask)
    torch.testing.assert_close(solution.weight, expected.weight)


def test_each_output_has_its_share_if_asked():
    weight, inputs = random(24, 64, seed=0), correlated(400, 64, seed=0)
    # Options are of the whole package: the method looks at the group only.
    config = SparseConfig(method="wanda", comparison_group="output")
    solution = admm.solve(weight, gram(inputs), Unstructured(0.75), config)
    assert (solution.mask.sum(dim=1) == 16).all()


@pytest.mark.parametrize("iterations", [1, 3, 8, 10])
def test_as_many_iterations_as_asked_for_and_no_more_rows_at_once(monkeypatch, iterations: int):
    iterate, rows = admm._iterate, []
    monkeypatch.setattr(admm, "ROWS", {"cpu": 10})
    monkeypatch.setattr(admm, "TOLERANCE", 0.0)  # or it ends when nothing moves
    monkeypatch.setattr(admm, "_iterate", lambda state, *rest: (rows.append(len(state)), iterate(state, *rest))[1])
    weight, inputs = random(24, 64, seed=0), correlated(400, 64, seed=0)
    found = solve("admm", weight, inputs, Unstructured(0.5), iterations=iterations)
    assert rows == [10, 10, 4] * iterations
    monkeypatch.setattr(admm, "ROWS", {})
    whole = solve("admm", weight, inputs, Unstructured(0.5), iterations=iterations)
    assert torch.equal(found.mask, whole.mask)
    torch.testing.assert_close(found.weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_pruned_weights_are_plain_zeros():
    """Not -0, which a packed matrix would have to store."""
    solution = solve("admm", random(24, 64, seed=0), correlated(400, 64, 0), Unstructured(0.5))
    assert not solution.weight[~solution.mask].signbit().any()
    assert solution.weight[solution.mask].all()


def test_residual():
    weight, inputs = random(24, 64, seed=0), correlated(400, 64, seed=0)
    assert solve("admm", weight, inputs, Unstructured(0.0)).residual == 0
    assert 0 < solve("admm", weight, inputs, Unstructured(0.5)).residual < 0.05


@pytest.mark.parametrize("shrink", [1.0, 1.7])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_an_iteration_is_that_of_the_formula(pattern, shrink, monkeypatch):
    """V = B + (Z - U - B) R, and S = V + U moves from Z + U by more than V - Z; U is smaller where rho has grown."""
    monkeypatch.setattr(admm, "product_dtype", lambda device: torch.float32)
    state, target = random(30, 40, seed=0), random(30, 40, seed=1)
    factor = random(40, 40, seed=2)
    gram = factor @ factor.T / 40
    resolvent = admm._resolvent(gram, 0.01, 0.5)
    exact = 0.5 * torch.linalg.inv(gram.double() + 0.51 * torch.eye(40))
    torch.testing.assert_close(resolvent.double(), exact, rtol=0, atol=1e-5)
    scores = state.abs()
    limits = scores.median(dim=1, keepdim=True).values
    keep = keep_mask(scores, pattern) if isinstance(pattern, NM) else scores > limits
    z, b = (state * keep).double(), target.double()
    u = (state * ~keep).double() / shrink
    v = b + (z - u - b) @ exact
    squares = admm._iterate(state, target, limits, pattern, resolvent, shrink)
    torch.testing.assert_close(state.double(), z + u + admm.RELAXATION * (v - z), rtol=0, atol=1e-4)
    norms = torch.stack([(v - z).square().sum(dim=1), z.square().sum(dim=1)], dim=1)
    torch.testing.assert_close(squares.double(), norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("growth", [1.2, 1.7, 5.0])
def test_the_resolvent_of_a_larger_penalty(growth, monkeypatch):
    """Each product changes eigenvalues by 3 % more or less than it should at most, and none of independent inputs."""
    monkeypatch.setattr(admm, "product_dtype", lambda device: torch.float32)
    factor = random(40, 40, seed=0)
    products = math.ceil(math.log(growth, admm.STEP))
    for gram, error in ((factor @ factor.T / 40, 0.03 * products), (torch.eye(40), 1e-5)):
        exact = admm._resolvent(gram, 0.01, 0.2 * growth)
        resolvent = admm._raised(admm._resolvent(gram, 0.01, 0.2), 0.2, growth, 0.01)
        vectors = torch.linalg.eigh(gram.double()).eigenvectors
        found, expected = ((vectors.T @ x.double() @ vectors).diagonal() for x in (resolvent, exact))
        torch.testing.assert_close(found, expected, rtol=error, atol=0)
        torch.testing.assert_close(vectors.T @ resolvent.double() @ vectors, found.diag(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), NM(15, 16)], ids=str)
def test_masks_on_the_way_are_exact_without_ties(pattern):
    scores = random(30, 240, seed=0)
    mask = admm._loose_mask(scores, pattern, admm._limits(scores, pattern, "layer", [30]))
    assert torch.equal(mask.bool(), keep_mask(scores.abs(), pattern))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_thresholds_of_samples_are_close(sparsity, monkeypatch):
    """Also if the sample would otherwise meet the same columns again and again."""
    monkeypatch.setattr(admm, "SAMPLE", 4096)
    scores = random(512, 256, seed=0) * torch.arange(256)
    pattern = Unstructured(sparsity)
    mask = admm._loose_mask(scores, pattern, admm._limits(scores, pattern, "layer", [512]))
    assert abs((mask == 0).float().mean().item() - sparsity) < 0.03


def test_thresholds_do_not_depend_on_who_has_which_rows(monkeypatch):
    monkeypatch.setattr(admm, "SAMPLE", 200)
    scores, sizes, parts = random(48, 64, seed=0) * torch.arange(64), (30, 18), (slice(0, 24), slice(24, 48))

    def gather(own: torch.Tensor) -> torch.Tensor:
        samples = [admm._sample(scores[part], SharedRows(sizes, part, gather)) for part in parts]
        assert any(torch.equal(own, sample) for sample in samples)
        return torch.cat(samples)

    whole = admm._limits(scores, Unstructured(0.5), "layer", sizes)
    assert len(whole.unique()) == 2  # one for each matrix
    for part in parts:
        limits = admm._limits(scores[part], Unstructured(0.5), "layer", SharedRows(sizes, part, gather))
        assert torch.equal(limits, whole[part])
