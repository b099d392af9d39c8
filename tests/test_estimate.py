"""The estimate against arithmetic by hand, and memory figures against memory that is really taken."""

import mmap

import pytest
import torch

from optimum_sparse import SparseConfig
from optimum_sparse.estimate import (
    available_memory,
    duration,
    held_memory,
    num_tokens,
    parse_size,
    peak_memory,
    run_seconds,
)
from optimum_sparse.plan import GroupShape

GROUPS = [GroupShape("block", 32, 128)]


def seconds(**options):
    """Of 300 tokens at 20 tokens per second."""
    return run_seconds(GROUPS, 300, 15.0, SparseConfig(**options))


def test_time_is_that_of_the_forwards():
    assert seconds(method="wanda") == 15
    assert seconds(method="wanda", true_sequential=False) == 30
    assert seconds(method="wanda", allocation="owl") == 30  # one more, through the dense model
    assert seconds(method="wanda", allocation="loss") == 75  # of 300 tokens gradients are taken of all


def test_sparsegpt_adds_the_gram_matrix_and_the_solve():
    """Per token 2 * 32 * 128 operations forward and 2 * 32 * 32 for the Gram matrix; 3 * 32 * 32 * 128 to solve."""
    forward = 300 * 2 * 32 * 128
    extra = 32 * 32 * (2 * 300 + 3 * 128)
    assert seconds(method="sparsegpt") == pytest.approx(15 * (1 + extra / forward))


def test_batches_without_tokens_count_their_rows():
    """The first tensor with a dimension has one row for each image; a flag before it has none."""
    batch = {"interpolate": True, "scale": torch.tensor(2.0), "input_ids": None, "pixels": torch.zeros(2, 3, 8, 8)}
    assert num_tokens(batch) == 2
    assert num_tokens({"input_ids": torch.zeros(2, 50)}) == 100


def test_durations_read_as_a_person_says_them():
    assert [duration(s) for s in (0.2, 75.0, 600.0, 9000.0)] == ["1 s", "75 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(
    ("size", "expected"), [("4GiB", 4 * 2**30), ("4GB", 4 * 10**9), ("500MB", 5 * 10**8), (123, 123), ("1.5GiB", None)]
)
def test_sizes(size, expected):
    if expected is None:
        expected = int(1.5 * 2**30)
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["much", "", "-1GB", 0, -5, True, "4 GiB of it", None, 1.5])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="max_memory must be a number of bytes or like '4GiB'"):
        parse_size(size)


def test_memory_sees_what_was_taken():
    cpu = torch.device("cpu")
    before, held = peak_memory(), held_memory(cpu)
    # Pages of its own: an allocator may give out again what tests before this one have freed.
    block = torch.frombuffer(mmap.mmap(-1, 200 * 2**20), dtype=torch.uint8).fill_(1)
    assert peak_memory() >= max(before, block.numel())
    assert held_memory(cpu) - held > 0.9 * block.numel()


def test_what_torch_has_freed_on_a_gpu_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert available_memory(torch.device("cuda")) == 60


def test_a_gpu_that_was_not_used_says_nothing_of_the_peak(monkeypatch):
    without = peak_memory()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert peak_memory() >= without
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert peak_memory() == 7


def test_a_size_may_be_a_number_of_bytes_in_a_text():
    assert parse_size("4000000000") == parse_size(4000000000) == 4 * 10**9
