"""The GPU kernels, run by Triton's interpreter and compiled for GPUs, against `Tiles.unpack` and float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

# Triton asks for its interpreter when a kernel is defined, so that takes a process of its own.
SETUP = """
import numpy
import torch
from itertools import product
from torch.nn import functional as F
from triton.runtime import interpreter
import triton.language as tl
from optimum_sparse.runtime import Tiles, gpu, ops

# The interpreter multiplies the bits of bfloat16 as if they were integers.
dot = interpreter.InterpreterBuilder.create_dot
def floats(handle):
    if handle.dtype.scalar is not tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: dot(self, floats(a), floats(b), *others)
gpu.usable = lambda x: True

generator = torch.Generator().manual_seed(0)
def random(*shape, dtype, sparsity=0):
    full = torch.randn(shape, generator=generator)
    return full.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0).to(dtype)

def parts(tiles):
    return tiles.masks, tiles.values, tiles.offsets

def bits(weight):
    return weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)

TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""

PRODUCTS = """
shapes = [(1, 1), (8, 32), (9, 33), (17, 600)]  # the last one takes more than one chunk
for dtype, shape, sparsity in product(TYPES, shapes, (0, 0.5, 0.7, 1)):
    weight = random(*shape, dtype=dtype, sparsity=sparsity)
    tiles = Tiles.pack(weight)
    for tokens in (1, 2, 5, 16):
        x, bias = random(tokens, shape[1], dtype=dtype), random(shape[0], dtype=dtype) if tokens % 2 else None
        out = ops.tiles_linear(x, *parts(tiles), bias, *shape)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        magnitude = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
        error = (out.double() - exact).abs()
        rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)  # the interpreter cuts bfloat16 off
        bound = 1.01 * rounding * exact.abs() + 2e-6 * magnitude
        assert out.dtype == dtype and (error <= bound).all(), (dtype, shape, sparsity, tokens, float(error.max()))
print("done")
"""

UNPACKED = """
for dtype, shape, sparsity in product(TYPES, [(3, 5), (9, 33), (20, 300)], (0, 0.5, 1)):
    weight = random(*shape, dtype=dtype, sparsity=sparsity)
    weight[0, 0], weight[-1, -1], weight[1, 2] = -0.0, float("nan"), float("inf")
    assert torch.equal(bits(gpu.unpack(*parts(Tiles.pack(weight)), shape)), bits(weight)), (dtype, shape, sparsity)
    x, bias = random(2, 9, shape[1], dtype=dtype), random(shape[0], dtype=dtype)  # more tokens than the kernel takes
    out = ops.tiles_linear(x, *parts(Tiles.pack(weight)), bias, *shape)
    torch.testing.assert_close(out, F.linear(x, weight, bias), equal_nan=True)
print("done")
"""

INPUTS = """
weight = random(24, 40, dtype=torch.float32, sparsity=0.5)
tiles = Tiles.pack(weight)
wide = random(6, 80, dtype=torch.float32)
for x in (wide[:, ::2], wide.view(2, 3, 80)[..., 40:], wide[:0, :40], wide[0, :40], wide.T[:40].T[:1]):
    torch.testing.assert_close(ops.tiles_linear(x, *parts(tiles), None, 24, 40), F.linear(x, weight))

# Not-a-number and infinity go where a dense product sends them, whether a weight is stored there or not.
for dtype, tokens, value in product(TYPES, (1, 4), (0.0, float("inf"), float("nan"))):
    weight, x = random(24, 100, dtype=dtype, sparsity=0.5), random(tokens, 100, dtype=dtype)
    weight[3, 5], weight[9, 99], x[0, 50] = float("nan"), float("inf"), value
    out = ops.tiles_linear(x, *parts(Tiles.pack(weight)), None, 24, 100)
    expected = F.linear(x.double(), weight.double())
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())

# Nothing around the output is written, and every cut gives the same.
weight, x = random(9, 70, dtype=torch.float32, sparsity=0.5), random(3, 70, dtype=torch.float32)
tiles, around = Tiles.pack(weight), torch.full((5, 9), 7.0)
new_empty = torch.Tensor.new_empty
torch.Tensor.new_empty = lambda self, *shape, **others: (
    around[1:4] if shape == (3, 9) else new_empty(self, *shape, **others)
)
gpu.tiles_linear(x, *parts(tiles), None, (9, 70))
torch.Tensor.new_empty = new_empty
assert (around[[0, 4]] == 7).all()
torch.testing.assert_close(around[1:4], F.linear(x, weight))
for run, size, warps in product((1, 2, 4), (4, 8), (2, 4)):
    gpu.SINGLE = gpu.SEVERAL = gpu.UNPACK = gpu.Cut(run, 2 * size, warps)
    for tokens in (1, 3):
        out = gpu.tiles_linear(x[:tokens], *parts(tiles), None, (9, 70))
        torch.testing.assert_close(out, F.linear(x[:tokens], weight))
    assert torch.equal(gpu.unpack(*parts(tiles), (9, 70)), weight)
print("done")
"""

# Without a GPU, Triton compiles down to the GPU's own instructions all the same.
COMPILES = """
import re
import subprocess
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimum_sparse.runtime import gpu

def compile(kernel, values, architecture, cut, **constants):
    constants |= {**cut.options(values), "WARPS": cut.warps}
    warps = constants.pop("num_warps")
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[values.dtype]
    types = dict(dict.fromkeys(["x", "values", "bias", "out"], name), masks="*i32", offsets="*i64")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    values = torch.empty(0, dtype=dtype)
    for architecture in (80, 90):
        single = compile(gpu._multiply, values, architecture, gpu.SINGLE, TOKENS=1, BIAS=True)
        several = compile(gpu._multiply, values, architecture, gpu.SEVERAL, TOKENS=gpu.MOST_TOKENS, BIAS=False)
        dense = compile(gpu._unpack, values, architecture, gpu.UNPACK)
        assert "mma.sync" in several.asm["ptx"]  # the tensor cores
        for kernel in (single, several, dense):
            ptx = kernel.asm["ptx"]
            assert kernel.asm["cubin"] and ".local" not in ptx  # all of it in registers
            # One instruction counts the bits of a run, and two more those of a mask.
            assert ptx.count("popc.b32") > 2
            # Between two chunks, what is exchanged are masks and positions, never weights.
            exchanged = re.findall(r"convert_layout .* : tensor<8x\\d+x\\d+x", kernel.asm["ttgir"])
            assert kernel is several or not exchanged, exchanged
ones = dict.fromkeys(["tokens", "rows", "columns", "tiles"], 1)  # of which Triton makes constants
assert compile(gpu._multiply, values, 90, gpu.SINGLE, TOKENS=1, BIAS=True, **ones).asm["cubin"]
assert compile(gpu._unpack, values, 90, gpu.UNPACK, **ones).asm["cubin"]
print("done")
"""


def run(script: str, tmp_path: Path, **environment: str) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("script", [PRODUCTS, UNPACKED, INPUTS], ids=["products", "unpacked", "inputs"])
def test_the_kernels_compute_what_dense_products_do(script: str, tmp_path: Path):
    assert "done" in run(SETUP + script, tmp_path, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus(tmp_path: Path):
    assert "done" in run(COMPILES, tmp_path)
