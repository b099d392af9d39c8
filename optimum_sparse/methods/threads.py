"""How many CPU threads a computation uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """In the body, operations run on one CPU thread.

    For many operations of a few microseconds, sharing them out gains little, and costs milliseconds each as soon as
    another process holds one of the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
