"""The clock that phases are timed with."""

import time

import torch

from optimum_sparse.solver import Clock


def test_a_phase_has_the_time_of_the_gpu_work_it_started_and_of_no_other(monkeypatch):
    """A stand-in for a GPU: work takes time only when somebody waits for it."""
    now, queued = 100.0, 0.0

    def wait():
        nonlocal now, queued
        now, queued = now + queued, 0.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    queued = 5.0  # by a phase before
    clock = Clock()
    queued = 2.0
    assert clock.elapsed == 2.0


def test_without_a_gpu_nobody_waits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    assert Clock().elapsed >= 0
