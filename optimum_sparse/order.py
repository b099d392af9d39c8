"""Order statistics of rows: the k-th smallest of each, and all of them in order."""

from __future__ import annotations

import numpy as np
import torch

# So many threads of PyTorch, which works on rows in parallel, are about as fast as one of NumPy, which is vectorised.
THREADS = 8
# So many numbers are sorted in place of a search, for what that takes in memory besides them.
FEW = 2**22
# On a GPU, fewer rows than this leave most of it idle if each is searched by itself.
FEW_ROWS = 64


def kth_smallest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The `count`-th smallest number of each row; NaN counts as larger than all.

    Args:
        rows: `[rows, columns]` of any float dtype.
        count: 1 <= count <= columns.

    Returns:
        `[rows, 1]`, in float32 if `rows` are in half precision and on a CPU.
    """
    if _numpy(rows):
        found = np.partition(_as_numpy(rows), count - 1, axis=1)[:, count - 1 : count]
        return torch.from_numpy(found.copy())  # else all rows would stay in memory
    if _sorts(rows.device, *rows.shape):
        return rows.sort(dim=1).values[:, count - 1 : count]
    return rows.kthvalue(count, dim=1, keepdim=True).values


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """The numbers of each row, the smallest first and NaN last; shapes and dtypes as for `kth_smallest`."""
    return torch.from_numpy(np.sort(_as_numpy(rows), axis=1)) if _numpy(rows) else rows.sort(dim=1).values


def _numpy(rows: torch.Tensor) -> bool:
    """Whether NumPy is faster."""
    return rows.device.type == "cpu" and min(len(rows), torch.get_num_threads()) < THREADS


def _as_numpy(rows: torch.Tensor) -> np.ndarray:
    """The same numbers; NumPy has no bfloat16."""
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).numpy()


def _sorts(device: torch.device, rows: int, columns: int) -> bool:
    """Whether to sort: `kthvalue` has one thread block for each row there, and sorting has all of them."""
    return device.type == "cuda" and rows < FEW_ROWS and rows * columns <= FEW
