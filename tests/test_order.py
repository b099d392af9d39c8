"""Order statistics against Python's own sorting, in each of the ways they are found."""

import math

import pytest
import torch

from optimum_sparse import order
from optimum_sparse.order import in_order, kth_smallest

GPU = torch.device("cuda")


@pytest.fixture(params=["NumPy", "search", "sort"])
def way(request, monkeypatch):
    """Each way that rows may be gone through, whatever the device and the number of threads."""
    monkeypatch.setattr(order, "_numpy", lambda rows: request.param == "NumPy")
    monkeypatch.setattr(order, "_sorts", lambda *what: request.param == "sort")


def rows_of(values, columns=300):
    return torch.randint(values, (3, columns), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("values", [3, 1000], ids=["many ties", "few ties"])
@pytest.mark.parametrize("count", [1, 2, 150, 300])
def test_kth_smallest(values, count):
    rows = rows_of(values)
    expected = [[sorted(row)[count - 1]] for row in rows.tolist()]
    assert kth_smallest(rows, count).tolist() == expected
    assert kth_smallest(rows.T.contiguous().T, count).tolist() == expected


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_not_rounded(dtype):
    rows = (rows_of(1000) / 7).to(dtype)
    assert kth_smallest(rows, 100).double().tolist() == [[sorted(row)[99]] for row in rows.double().tolist()]
    assert in_order(rows).double().tolist() == [sorted(row) for row in rows.double().tolist()]


@pytest.mark.usefixtures("way")
def test_nan_is_the_largest():
    rows = torch.tensor([[math.nan, 2, math.inf, -math.inf, 1]])
    assert [kth_smallest(rows, count).item() for count in (1, 2, 3, 4)] == [-math.inf, 1, 2, math.inf]
    assert kth_smallest(rows, 5).isnan().all() and in_order(rows)[0, 4].isnan()
    assert rows[0, 0].isnan() and rows[0, 4] == 1  # they are left as they were


@pytest.mark.usefixtures("way")
def test_in_order():
    rows = rows_of(1000).requires_grad_()
    assert in_order(rows).tolist() == [sorted(row) for row in rows.tolist()]


def test_numpy_works_where_few_threads_would(monkeypatch):
    asked = []
    monkeypatch.setattr(order, "_as_numpy", lambda rows: asked.append(len(rows)) or rows.numpy())
    for threads, sizes in ((order.THREADS - 1, (1, 100)), (order.THREADS, (1,))):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        asked.clear()
        for size in (1, 100):
            kth_smallest(torch.rand(size, 5), 3)
            in_order(torch.rand(size, 5))
        assert asked == [size for size in sizes for _ in range(2)]
    assert not order._numpy(torch.empty(1, 5, device="meta"))


def test_few_rows_are_sorted_on_a_gpu_only():
    assert order._sorts(GPU, 1, 128 * 22016)  # a block of SparseGPT
    assert not order._sorts(torch.device("cpu"), 1, 128 * 22016)
    assert not order._sorts(GPU, 1024, 4096)  # outputs of Wanda: enough rows
    assert not order._sorts(GPU, 1, 4096 * 14336)  # a whole matrix: sorting takes more memory than is planned for
