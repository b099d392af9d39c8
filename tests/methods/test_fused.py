"""The GPU kernel of the sweep, run by Triton's interpreter and compiled for GPUs, against the loop over columns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

# Triton asks for its interpreter when a kernel is defined, so that takes a process of its own.
EQUAL = """
import torch
from itertools import product
from optimum_sparse.methods import fused, sparsegpt
from optimum_sparse.patterns import NM, Unstructured

def factor(width, generator):
    # R of a Hessian with correlated inputs, upper triangular
    inputs = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    gram = (inputs.T @ inputs).double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(width)
    return torch.linalg.inv(torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)).triu().float()

generator = torch.Generator().manual_seed(0)
patterns = [Unstructured(0.5), Unstructured(0.0), Unstructured(1.0), NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(1, 3)]
for pattern, (width, rows) in product(patterns, [(24, 5), (24, 16), (24, 37), (72, 33)]):
    weight = torch.randn(width, rows, generator=generator)
    weight[:, ::3] = weight[:, ::3].round()  # ties
    choose = isinstance(pattern, NM)
    chosen = torch.rand(width, rows, generator=generator) >= pattern.sparsity
    # A part of a larger tensor, as in a block: what is around it must not be touched.
    around = torch.full((width + 2, rows), 7.0)
    around[1:-1] = weight
    found, expected = around[1:-1], weight.clone()
    inverse, masks = factor(width, generator), [chosen.clone(), chosen.clone()]
    errors = fused.sweep(found, inverse, masks[0], pattern, choose)
    oracle = sparsegpt._sweep_panel(expected, inverse, masks[1], pattern, choose)
    what = f"{pattern} {width} x {rows}"
    assert torch.equal(*masks), what
    assert torch.equal(found == 0, expected == 0), what
    for one, other in ((found, expected), (errors, oracle)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item() + 1e-7, msg=what)
    assert (around[[0, -1]] == 7).all(), what
print("done")

# The whole method by way of the kernel.
from optimum_sparse.config import SparseConfig
from optimum_sparse.statistics import GramStatistics
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import parse_pattern

statistics = GramStatistics(160)
statistics.add(torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator))
weight = torch.randn(40, 160, generator=generator)
for options in ({}, {"pattern": "2:4"}, {"method": "wanda-update"}):
    config = SparseConfig(**options)
    args = weight.clone(), statistics, parse_pattern(config.sparsity, config.pattern), config, [24, 16]
    solutions = []
    for usable in (lambda columns: True, lambda columns: False):
        fused.usable = usable
        solutions.append(METHODS[config.method].solve(*args))
    assert torch.equal(solutions[0].mask, solutions[1].mask), options
    torch.testing.assert_close(solutions[0].weight, solutions[1].weight, rtol=1e-4, atol=1e-4)
print("methods done")
"""

# Without a GPU, Triton compiles down to the GPU's own instructions all the same.
COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimum_sparse.methods import fused

pointers = dict(columns="*fp32", inverse="*fp32", mask="*u8", errors="*fp32")
for choose, group in ((False, 1), (True, 4)):
    constants = dict(NUM_PRUNED=group // 2, GROUP=group, CHOOSE=choose, WIDTH=fused.PANEL, ROWS=fused.ROWS)
    names = [name for name in fused._sweep.arg_names if name not in pointers and name not in constants]
    signature = {**pointers, **dict.fromkeys(names, "i32"), **dict.fromkeys(constants, "constexpr")}
    for architecture in (80, 90):
        source = ASTSource(fn=fused._sweep, signature=signature, constexprs=constants)
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert kernel.asm["cubin"] and ".local" not in kernel.asm["ptx"]  # all of it in registers
print("done")
"""


def run(script: str, tmp_path: Path, **environment: str) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_kernel_does_what_the_loop_does(tmp_path: Path) -> None:
    assert "methods done" in run(EQUAL, tmp_path, TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    assert "done" in run(COMPILES, tmp_path)
