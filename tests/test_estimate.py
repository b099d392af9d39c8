"""The estimate against arithmetic by hand, and the peak against memory that is really taken."""

import pytest
import torch

from optimum_sparse import SparseConfig
from optimum_sparse.estimate import Estimate, peak_memory
from optimum_sparse.matrices import find_matrices

from .helpers import tiny_model

BATCHES = [{"input_ids": torch.zeros(2, 50, dtype=torch.int64)}] * 3
PROBE = {"input_ids": torch.zeros(1, 10, dtype=torch.int64)}


def estimate(**options):
    config = SparseConfig(targets=["gate_proj", "up_proj"], **options)
    matrices, _ = find_matrices(tiny_model(num_hidden_layers=1), config)
    return Estimate.of([matrices], BATCHES, PROBE, 0.5, config)


def test_time_is_that_of_the_forwards():
    """300 tokens at 20 tokens per second, twice if the blocks run twice."""
    assert estimate(method="wanda").seconds == 15
    assert estimate(method="wanda", true_sequential=False).seconds == 30
    assert (estimate(method="wanda").matrices, estimate(method="wanda").tokens) == (2, 300)


def test_sparsegpt_adds_the_gram_matrix_and_the_solve():
    """Per token 2 * 32 * 128 operations forward and 2 * 32 * 32 for the Gram matrix; 6 * 32 * 32 * 128 to solve."""
    forward = 300 * 2 * 32 * 128
    extra = 32 * 32 * (2 * 300 + 6 * 128)
    assert estimate(method="sparsegpt").seconds == pytest.approx(15 * (1 + extra / forward))


def test_memory_grows_with_the_tokens_and_with_the_gram_matrix():
    assert estimate(method="wanda").memory == 300 * 4 * 4 * 32
    assert estimate(method="sparsegpt").memory == 300 * 4 * 4 * 32 + 24 * 32 * 32 + 20 * 32 * 128
    assert estimate(method="wanda", true_sequential=False).memory == 300 * 4 * 32


def test_batches_without_tokens_count_their_rows():
    """The first tensor with a dimension has one row for each image; a flag before it has none."""
    config = SparseConfig(method="wanda")
    batch = {"interpolate": True, "scale": torch.tensor(2.0), "input_ids": None, "pixels": torch.zeros(2, 3, 8, 8)}
    matrices, _ = find_matrices(tiny_model(num_hidden_layers=1), config)
    found = Estimate.of([matrices], [batch] * 3, batch, 0.5, config)
    assert (found.tokens, found.seconds) == (6, 1.5)


def test_it_reads_as_a_sentence():
    assert str(Estimate(14, 262144, 75.0, 3 * 2**30)) == (
        "14 matrices, 262,144 calibration tokens: about 75 s and 3.0 GiB beyond the model"
    )
    assert "about 10 min" in str(Estimate(1, 1, 600.0, 0))
    assert "about 2.5 h" in str(Estimate(1, 1, 9000.0, 0))


def test_peak_memory_sees_what_was_taken():
    before = peak_memory()
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    assert peak_memory() >= max(before, block.numel())
