"""Swaps: exchange kept and pruned weights one pair at a time (SparseSwaps, Zimmer et al., 2025)."""

from __future__ import annotations

import torch

from ..patterns import NM, Pattern

# Pairs are sought among so many of the kept weights that are cheapest to prune and of the pruned ones that gain most.
CANDIDATES = 32
# A swap must lower the error of its output by more than this fraction.
TOLERANCE = 1e-4
# Swaps of an output, as a fraction of its inputs, after which it is left alone.
MAX_SWAPS = 0.25
# Entries of the gains that are held at a time.
CHUNK = 2**24


def swap(
    deviation: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, gram: torch.Tensor, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower D G D^T of each row by swaps, each with its exact gain.

    With c = D G, pruning the weight v_p and moving the pruned w_u, which is 0, to s changes the error of the row by

        2 v_p c_p + v_p^2 G_pp - 2 s c_u + s^2 G_uu - 2 v_p s G_pu.

    Where a method left the weights that it kept as they were, revived ones return to their dense value, as in the
    paper; else they take the best one, s = (c_u + v_p G_pu) / G_uu.

    Args:
        deviation: D = target - weight in units of `gram`, `[rows, in]` fp32.
        mask: `[rows, in]`, true where a weight is kept.
        target: In units of `gram`.
        gram: G with unit diagonal, zero rows for features that were always zero.
        pattern: If N:M, pairs belong to the same group.

    Returns:
        The new deviation and mask. Rows whose error did not fall stay as they were.
    """
    in_features = target.shape[1]
    pairs = in_features * pattern.m if isinstance(pattern, NM) else CANDIDATES**2
    height = max(1, CHUNK // max(pairs, in_features))
    chunks = zip(deviation.split(height), mask.split(height), target.split(height), strict=True)
    parts = [_swap_rows(*chunk, gram, pattern) for chunk in chunks]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _swap_rows(
    deviation: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, gram: torch.Tensor, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    before, mask_before, product = deviation, mask, deviation @ gram
    error_before = (product * deviation).sum(dim=1)
    dense = not (deviation * mask).any()
    deviation, mask, error = deviation.clone(), mask.clone(), error_before.clone()
    active = torch.arange(len(target), device=target.device)  # rows that may still gain
    for _ in range(int(MAX_SWAPS * target.shape[1]) + 1):
        change, pruned, revived, value = _best_swap(
            deviation[active], mask[active], target[active], product[active], gram, pattern, dense
        )
        gains = change < -TOLERANCE * error[active]
        if not gains.any():
            break
        active, change, pruned, revived, value = (x[gains] for x in (active, change, pruned, revived, value))
        removed = target[active, pruned] - deviation[active, pruned]
        deviation[active, pruned] = target[active, pruned]
        deviation[active, revived] -= value
        mask[active, pruned], mask[active, revived] = False, True
        product[active] += removed[:, None] * gram[pruned] - value[:, None] * gram[revived]
        error[active] += change
    # The running error is rounded a little with each swap, so the last word has a fresh one.
    better = (((deviation @ gram) * deviation).sum(dim=1) < error_before)[:, None]
    return torch.where(better, deviation, before), torch.where(better, mask, mask_before)


def _best_swap(
    deviation: torch.Tensor,
    mask: torch.Tensor,
    target: torch.Tensor,
    product: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
    dense: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best swap of each row: change of its error, column to prune, column to revive, value to revive it with."""
    weight = target - deviation
    cost = torch.where(mask, (2 * product + weight) * weight, torch.inf)
    if isinstance(pattern, NM):  # all pairs of a group, [rows, groups, m, m]
        drop = grow = torch.arange(target.shape[1], device=target.device).view(1, -1, pattern.m)
    else:  # the most promising pairs, [rows, 1, candidates, candidates]
        gain = torch.where(mask, -torch.inf, (2 * product - target) * target if dense else product.square())
        count = min(CANDIDATES, target.shape[1])
        drop = cost.topk(count, largest=False).indices[:, None]
        grow = gain.topk(count).indices[:, None]

    def at(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return values.gather(1, columns.flatten(1).expand(len(values), -1)).view(len(values), *columns.shape[1:])

    pull = at(weight, drop)[..., None] * gram[drop[..., :, None], grow[..., None, :]] + at(product, grow)[..., None, :]
    value = at(target, grow)[..., None, :] if dense else pull
    change = at(cost, drop)[..., None] - (2 * pull - value) * value
    change = change.masked_fill(at(mask, grow)[..., None, :], torch.inf)
    best = change.flatten(1).argmin(dim=1, keepdim=True)
    width = change.shape[-1]
    change, value = (x.flatten(1).gather(1, best).squeeze(1) for x in (change, value.expand_as(change)))
    pruned = drop.flatten(1).expand(len(target), -1).gather(1, best // width).squeeze(1)
    group, place = best // width**2, best % width
    revived = grow.flatten(1).expand(len(target), -1).gather(1, group * width + place).squeeze(1)
    return change, pruned, revived, value
