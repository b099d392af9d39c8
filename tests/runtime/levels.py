"""Runs a test with each set of instructions that there are kernels for."""

import pytest

from optimum_sparse.runtime import kernels, ops

COMPILED = ["portable", "avx2", "avx512", "avx512_bf16"]


def use_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """Let the kernels use a level, also for as many tokens as AMX is faster for; skip the test where there is none."""
    if level != "torch" and kernels.EXTENSION is None:
        pytest.skip(str(kernels.MISSING))
    if level != "torch" and level not in kernels.LEVELS:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setattr(kernels, "LEVEL", level)
    monkeypatch.setattr(ops, "exact_in_half", lambda x: False)
