"""The papers' equations, one weight at a time in float64: what every pruning method is compared with.

Nothing here is shared with the package, nothing is fast, and only matrix inversion is left to a library.

`inputs` is X, [tokens, in_features], one row for each token. Unstructured sparsity is a fraction; an N:M pattern is a
tuple (n, m), n non-zero of m consecutive inputs. Of equal scores the one with the smaller index, row by row, is pruned
first.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass
class OracleResult:
    """What an oracle decided.

    Attributes:
        weight: [rows, in_features] float64.
        mask: [rows, in_features] bool, True where the weight is kept.
        margin: the smallest relative gap, over all decisions, between the largest score that was pruned and the
            smallest score that was kept; a method in lower precision can only be asked to agree if it is not tiny.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    margin: float


def num_pruned(numel: int, sparsity: float) -> int:
    """`sparsity * numel` to the nearest integer, a half up, with the decimal number that the user wrote."""
    return math.floor(Fraction(repr(sparsity)) * numel + Fraction(1, 2))


def smallest(scores: dict, count: int) -> tuple[set, float]:
    """The keys of the `count` smallest scores, the smaller key first among equals, and the margin of the decision."""
    order = sorted(scores, key=lambda key: (scores[key], key))
    if count in (0, len(order)):
        return set(order[:count]), math.inf
    last_pruned, first_kept = scores[order[count - 1]], scores[order[count]]
    # A tie is decided by index in any precision: it is no close call.
    margin = math.inf if first_kept == last_pruned else (first_kept - last_pruned) / first_kept
    return set(order[:count]), margin


def apply_scores(weight: torch.Tensor, scores: torch.Tensor, pattern, group: str) -> OracleResult:
    """Zero the smallest scores of the matrix ("layer"), of each row ("output"), or of each N:M group."""
    rows, columns = weight.shape
    if isinstance(pattern, tuple):
        n, m = pattern
        groups = [([(i, j) for j in range(j0, j0 + m)], m - n) for i in range(rows) for j0 in range(0, columns, m)]
    elif group == "output":
        groups = [([(i, j) for j in range(columns)], num_pruned(columns, pattern)) for i in range(rows)]
    else:
        every = [(i, j) for i in range(rows) for j in range(columns)]
        groups = [(every, num_pruned(len(every), pattern))]

    result, mask, margin = weight.clone(), torch.ones(rows, columns, dtype=torch.bool), math.inf
    for entries, count in groups:
        pruned, gap = smallest({entry: float(scores[entry]) for entry in entries}, count)
        margin = min(margin, gap)
        for entry in pruned:
            result[entry] = 0.0
            mask[entry] = False
    return OracleResult(result, mask, margin)


def magnitude(weight: torch.Tensor, inputs: torch.Tensor, pattern, group: str = "layer", **_) -> OracleResult:
    """S_ij = |W_ij|."""
    weight = weight.double()
    return apply_scores(weight, weight.abs(), pattern, group)


def wanda(weight: torch.Tensor, inputs: torch.Tensor, pattern, group: str = "output", **_) -> OracleResult:
    """S_ij = |W_ij| * ||X_j||_2 (Sun et al., 2024, equation 1)."""
    weight, inputs = weight.double(), inputs.double()
    scores = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        norm = math.sqrt(sum(float(x) ** 2 for x in inputs[:, j]))
        for i in range(weight.shape[0]):
            scores[i, j] = abs(float(weight[i, j])) * norm
    return apply_scores(weight, scores, pattern, group)


def ria(weight: torch.Tensor, inputs: torch.Tensor, pattern, group: str = "layer", **_) -> OracleResult:
    """S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^0.5 (Zhang et al., 2024)."""
    weight, inputs = weight.double(), inputs.double()
    scores = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        norm = math.sqrt(sum(float(x) ** 2 for x in inputs[:, j]))
        of_input = sum(abs(float(w)) for w in weight[:, j])
        for i in range(weight.shape[0]):
            of_output = sum(abs(float(w)) for w in weight[i])
            share = 1 / of_input + 1 / of_output if of_input and of_output else 0.0
            scores[i, j] = abs(float(weight[i, j])) * share * math.sqrt(norm)
    return apply_scores(weight, scores, pattern, group)


def wanda_update(weight: torch.Tensor, inputs: torch.Tensor, pattern, **options) -> OracleResult:
    """Wanda's mask, then the update of Optimal Brain Surgeon."""
    return update(wanda(weight, inputs, pattern), weight, inputs, **options)


def magnitude_update(weight: torch.Tensor, inputs: torch.Tensor, pattern, **options) -> OracleResult:
    """The mask of magnitude pruning, then the update of Optimal Brain Surgeon."""
    return update(magnitude(weight, inputs, pattern), weight, inputs, **options)


def update(
    chosen: OracleResult, weight: torch.Tensor, inputs: torch.Tensor, dampening_frac: float = 0.01, **_
) -> OracleResult:
    """As `sparsegpt`, from left to right, with a mask that was chosen before."""
    weight, inputs = weight.double().clone(), inputs.double()
    hessian = inputs.T @ inputs
    live = [float(value) for value in hessian.diagonal() if value > 0]
    hessian += dampening_frac * sum(live) / len(live) * torch.eye(len(hessian), dtype=torch.float64)
    for j in range(len(hessian)):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for i in range(len(weight)):
            if not chosen.mask[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0]
                weight[i, j] = 0.0
    return OracleResult(weight, chosen.mask, chosen.margin)


def least_squares(
    weight: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor, dampening_frac: float = 0.0
) -> torch.Tensor:
    """The v of least ||(w - v) X||^2 + dampening_frac * sum_j ||X_j||^2 (w_j - v_j)^2 that a mask allows."""
    weight, hessian = weight.double(), inputs.double().T @ inputs.double()
    hessian += dampening_frac * torch.diag(hessian.diagonal())
    result = torch.zeros_like(weight)
    for i in range(len(weight)):
        kept = mask[i].nonzero().squeeze(1)
        result[i, kept] = torch.linalg.lstsq(
            hessian[kept][:, kept], (hessian @ weight[i])[kept, None], driver="gelsd"
        ).solution.squeeze(1)
    return result


def error(weight: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """||(w - v) X||^2 of each row."""
    return ((weight.double() - pruned.double()) @ inputs.double().T).square().sum(dim=1)


def sparsegpt(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    pattern,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    authors_dampening: bool = False,
    **_,
) -> OracleResult:
    """Optimal Brain Surgeon from the left column to the right one (Frantar and Alistarh, 2023, equations 3 and 4).

    For column j the columns before it are frozen, so the Hessian of what may still change is H[j:, j:], and with its
    inverse V the saliency of w_ij is w_ij^2 / V_00 and pruning it moves the rest of the row by -w_ij / V_00 * V_0:.
    Unstructured masks are chosen for a block of columns when the sweep enters it, N:M masks group by group.

    The weights of an input that is always zero are set to zero and its diagonal to one. The dampening is a fraction of
    the mean diagonal of the others; with `authors_dampening` these ones count in the mean, as in the authors' code.
    """
    weight, inputs = weight.double().clone(), inputs.double()
    rows, columns = weight.shape
    hessian = 2 / len(inputs) * inputs.T @ inputs
    dead = [j for j in range(columns) if hessian[j, j] == 0]
    for j in dead:
        hessian[j, j] = 1.0
        weight[:, j] = 0.0
    counted = [float(hessian[j, j]) for j in range(columns) if authors_dampening or j not in dead]
    for j in range(columns):
        hessian[j, j] += dampening_frac * sum(counted) / len(counted)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]

    def select(j0: int, j1: int, count: int, row_set) -> float:
        scores = {(i, j): float(weight[i, j]) ** 2 / float(inverses[j][0, 0]) for i in row_set for j in range(j0, j1)}
        pruned, gap = smallest(scores, count)
        for entry in pruned:
            mask[entry] = False
        return gap

    mask, margin = torch.ones(rows, columns, dtype=torch.bool), math.inf
    for j in range(columns):
        if isinstance(pattern, tuple):
            n, m = pattern
            if j % m == 0:
                margin = min(margin, *(select(j, j + m, m - n, [i]) for i in range(rows)))
        elif j % block_size == 0:
            end = min(j + block_size, columns)
            count = num_pruned(rows * end, pattern) - num_pruned(rows * j, pattern)
            margin = min(margin, select(j, end, count, range(rows)))
        inverse = inverses[j]
        for i in range(rows):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0]
                weight[i, j] = 0.0  # it is, up to rounding
    return OracleResult(weight, mask, margin)
