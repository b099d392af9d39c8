"""Mask selection against sorting: exact counts, ties by index, every group on its own."""

import pytest
import torch

from optimum_sparse.patterns import NM, Unstructured, keep_all_but, keep_mask, num_pruned, parse_pattern


def by_sorting(scores, count):
    """Of each row, the set of indices of the `count` smallest scores, the first ones among equals."""
    return [set(sorted(range(len(row)), key=lambda i: (row[i], i))[:count]) for row in scores.tolist()]


def dropped(mask):
    return [set((~row).nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("values", [3, 1000], ids=["many ties", "few ties"])
def test_keep_all_but_equals_sorting(count, values):
    scores = torch.randint(values, (20, 12), generator=torch.Generator().manual_seed(0)).float()
    assert dropped(keep_all_but(scores, count)) == by_sorting(scores, count)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(8, 16), NM(1, 2), NM(3, 4)], ids=str)
def test_nm_keeps_n_of_every_m(pattern):
    scores = torch.rand(10, 48, generator=torch.Generator().manual_seed(0))
    mask = keep_mask(scores, pattern)
    groups = mask.reshape(-1, pattern.m)
    assert (groups.sum(dim=1) == pattern.n).all()
    assert dropped(groups) == by_sorting(scores.reshape(-1, pattern.m), pattern.m - pattern.n)
    assert 1 - mask.float().mean() == pytest.approx(pattern.sparsity)


def test_groups_compete_among_themselves():
    scores = torch.arange(24.0).reshape(4, 6)
    layer = keep_mask(scores, Unstructured(0.5), "layer")
    assert layer.sum(dim=1).tolist() == [0, 0, 6, 6]
    assert keep_mask(scores, Unstructured(0.5), "output").sum(dim=1).tolist() == [3, 3, 3, 3]
    stacked = keep_mask(scores, Unstructured(0.5), "layer", rows=(1, 3))
    assert torch.equal(
        stacked, torch.cat([keep_mask(scores[:1], Unstructured(0.5)), keep_mask(scores[1:], Unstructured(0.5))])
    )


@pytest.mark.parametrize(
    ("numel", "sparsity", "expected"),
    [(10, 0.35, 4), (10, 0.5, 5), (3, 0.5, 2), (1000, 0.7, 700), (7, 0.0, 0), (10, 0.99, 10)],
)
def test_num_pruned_rounds_to_the_nearest(numel, sparsity, expected):
    assert num_pruned(numel, sparsity) == expected


def test_parse_pattern():
    assert parse_pattern(None, "1:4") == NM(1, 4)
    assert parse_pattern(0.3, None) == Unstructured(0.3)
    assert str(NM(2, 4)) == "2:4" and str(Unstructured(0.625)) == "0.625"
