"""Packing, unpacking and the products, with each set of instructions, against loops and float64."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from optimum_sparse.runtime import Tiles, kernels, ops

from .levels import COMPILED, use_level

SHAPES = [(1, 1), (3, 5), (7, 31), (8, 32), (9, 33), (64, 64), (50, 300), (16, 1100)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=[*COMPILED, "torch"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_level(monkeypatch, request.param)
    return request.param


def random_weight(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0).to(dtype)


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


def naive_tiles(weight: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """Masks, bits of the values, and offsets, one weight after the other, as kernels.h defines them."""
    integers, (rows, columns) = bits(weight), weight.shape
    masks, values, offsets = [], [], [0]
    for block in range(0, rows, 8):
        for tile in range(0, columns, 32):
            for row in range(block, block + 8):
                for byte in range(tile, tile + 32, 8):
                    mask = 0
                    for j in range(byte, byte + 8):
                        if row < rows and j < columns and int(integers[row, j]) != 0:
                            mask |= 1 << (j - byte)
                            values.append(int(integers[row, j]))
                    masks.append(mask)
        offsets.append(len(values))
    return masks, values, offsets


@pytest.mark.parametrize("shape", [(3, 5), (9, 33), (17, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_is_the_documented_one(level: str, shape: tuple[int, int], dtype: torch.dtype):
    weight = random_weight(*shape, 0.5, dtype)
    tiles = Tiles.pack(weight)
    masks, values, offsets = naive_tiles(weight)
    assert tiles.masks.flatten().tolist() == masks
    assert bits(tiles.values).tolist() == values + [0] * 32
    assert tiles.offsets.tolist() == offsets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 1])
def test_round_trip_is_exact(level: str, dtype: torch.dtype, sparsity: float):
    rng = random.Random(0)
    for shape in SHAPES:
        weight = random_weight(*shape, sparsity, dtype)
        for value in (-0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).tiny / 4):
            weight.view(-1)[rng.randrange(weight.numel())] = value
        assert torch.equal(bits(Tiles.pack(weight).unpack()), bits(weight)), shape


def test_packs_weights_of_any_strides(level: str):
    weight = random_weight(60, 90, 0.5, torch.bfloat16)
    for view in (weight.T, weight[::2], weight[:, ::3], weight[5:20, 7:60]):
        assert torch.equal(Tiles.pack(view).unpack(), view)


def test_size():
    weight = random_weight(512, 512, 0.5, torch.bfloat16)
    assert Tiles.pack(weight).nbytes <= 0.57 * weight.nbytes
    assert Tiles.pack(torch.zeros(512, 512)).nbytes <= 0.033 * 512 * 512 * 4


def assert_close_to_float64(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """As exact as sums in float32 can be, rounded once to the type of the output."""
    x, weight, bias = x.double(), weight.double(), 0.0 if bias is None else bias.double()
    expected, magnitude = x @ weight.T + bias, x.abs() @ weight.abs().T + abs(bias)
    rounding = torch.finfo(out.dtype).eps / 2 * 1.01  # a little more: float32 is rounded after the sum has an error
    error = (out.double() - expected).abs()
    assert (error <= rounding * expected.abs() + 2e-6 * magnitude).all(), float((error / magnitude).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 33])
def test_products(level: str, dtype: torch.dtype, tokens: int):
    for seed, shape in enumerate(SHAPES):
        for sparsity in (0, 0.5, 0.95, 1):
            weight = random_weight(*shape, sparsity, dtype, seed)
            x = random_weight(tokens, shape[1], 0, dtype, seed + 1)
            bias = random_weight(1, shape[0], 0, dtype, seed + 2)[0] if seed % 2 else None
            tiles = Tiles.pack(weight)
            out = multiply(x, tiles, bias)
            assert_close_to_float64(out, x, weight, bias)
            assert_close_to_float64(ops.dense_linear(x[:1], weight, bias), x[:1], weight, bias)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)], ids=str)
def test_patterns(level: str, pattern: tuple[int, int]):
    n, m = pattern
    weight = random_weight(40, 96, 0, torch.bfloat16).view(40, -1, m)
    weight = torch.cat([weight[..., :n], torch.zeros_like(weight[..., n:])], -1).view(40, 96)
    x = random_weight(1, 96, 0, torch.bfloat16)
    tiles = Tiles.pack(weight)
    assert_close_to_float64(multiply(x, tiles), x, weight, None)


@pytest.mark.parametrize("level", COMPILED)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, level: str, threads: int):
    use_level(monkeypatch, level)
    weight, x = random_weight(100, 70, 0.5, torch.float32), random_weight(5, 70, 0, torch.float32)
    tiles = Tiles.pack(weight)
    before = torch.get_num_threads()
    outs = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            assert torch.equal(Tiles.pack(weight).unpack(), weight)
            outs.append([multiply(x[:n], tiles) for n in (1, 5)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *outs))


def multiply(x: torch.Tensor, tiles: Tiles, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.tiles_linear(x, *parts(tiles), bias, *tiles.shape)


def parts(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tiles.masks, tiles.values, tiles.offsets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_nan_and_infinity_go_where_a_dense_product_sends_them(level: str, dtype: torch.dtype, tokens: int):
    weight, x = random_weight(24, 100, 0.5, dtype), random_weight(tokens, 100, 0, dtype)
    weight[3, 5], weight[9, 99] = float("nan"), float("inf")
    tiles = Tiles.pack(weight)
    for value in (0.0, float("inf"), float("nan")):
        x[0, 50] = value
        expected = F.linear(x.double(), weight.double())
        for out in (multiply(x, tiles), ops.dense_linear(x, weight, None)):
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.isinf(), expected.isinf())


def test_inputs_of_any_shape_and_strides(level: str):
    weight, x = random_weight(24, 40, 0.5, torch.float32), random_weight(6, 80, 0, torch.float32)
    tiles = Tiles.pack(weight)
    for view in (x[:, ::2], x.view(2, 3, 80)[..., 40:], x[:0, :40], x[0, :40], x.T[:40].T[:1]):
        out = multiply(view, tiles)
        torch.testing.assert_close(out, F.linear(view, weight))
        torch.testing.assert_close(ops.dense_linear(view, weight, None), F.linear(view, weight))


@pytest.mark.parametrize("bias", [None, torch.arange(50.0)], ids=["no bias", "bias"])
def test_many_tokens_unpack_rows_after_rows(level: str, bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "BUFFER_ROWS", 1)
    monkeypatch.setattr(ops, "BUFFER_UNIT", 8)
    monkeypatch.setattr(ops, "BUFFER_BYTES", 8 * 100 * 4 * 2)  # 16 rows
    weight, x = random_weight(50, 100, 0.5, torch.float32), random_weight(ops.MOST_TOKENS + 1, 100, 0, torch.float32)
    out = multiply(x, Tiles.pack(weight), bias)
    assert_close_to_float64(out, x, weight, bias)
    assert torch.equal(multiply(x.view(1, -1, 1, 100), Tiles.pack(weight), bias).view_as(out), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("amx", [False, True], ids=["without AMX", "with AMX"])
def test_fewer_tokens_unpack_where_products_are_fast(amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "exact_in_half", lambda x: amx and x.dtype == torch.bfloat16)
    multiplied = []
    monkeypatch.setattr(ops, "_multiply", lambda x, *rest: (multiplied.append(len(x)), x.new_empty(len(x), 24))[1])
    packed = Tiles.pack(random_weight(24, 40, 0.5, dtype))
    for tokens in (1, 12, 13, 96, 97):
        multiply(random_weight(tokens, 40, 0, dtype), packed)
    assert multiplied == ([1, 12] if amx and dtype == torch.bfloat16 else [1, 12, 13, 96])


@pytest.mark.parametrize("seed", range(3))
def test_mutated_parts_are_refused(level: str, seed: int):
    """One wrong bit anywhere in masks or offsets, or one value more or less."""
    rng = random.Random(seed)
    tiles = Tiles.pack(random_weight(rng.randint(1, 40), rng.randint(1, 100), rng.random(), torch.bfloat16, seed))
    for _ in range(200):
        mutated = {name: getattr(tiles, name).clone() for name in ("masks", "values", "offsets")}
        name = rng.choice(["masks", "offsets", "values"])
        if name == "values":
            part = mutated["values"]
            mutated["values"] = part[:-1] if rng.random() < 0.5 else torch.cat([part, part[:1]])
        else:
            part = mutated[name].view(-1)
            bit = rng.randrange(8 * part.itemsize)
            part[rng.randrange(len(part))] ^= -(2**63) if bit == 63 else 1 << bit
        with pytest.raises(ValueError, match=r"do not belong together|no tiles of a matrix"):
            dataclasses.replace(tiles, **mutated)


@pytest.mark.parametrize("part", ["masks", "values", "offsets"])
def test_parts_of_wrong_size_or_type_are_refused(part: str):
    tiles = Tiles.pack(random_weight(20, 40, 0.5, torch.float32))
    good = {name: getattr(tiles, name) for name in ("masks", "values", "offsets")}
    x = torch.ones(1, 40)
    for bad in (good[part][:0], good[part].to(torch.int32), good[part][None].expand(2, *good[part].shape)):
        changed = good | {part: bad}
        with pytest.raises((ValueError, TypeError), match=r"no tiles of a matrix|cannot be packed"):
            Tiles(tiles.shape, **changed)
        with pytest.raises((ValueError, TypeError), match=r"no tiles of a matrix|cannot be packed"):
            ops.tiles_linear(x, *changed.values(), None, 20, 40)
    with pytest.raises(ValueError, match="no tiles of a matrix 20 x 65"):
        ops.tiles_linear(torch.ones(1, 65), *good.values(), None, 20, 65)
    with pytest.raises(ValueError, match="no tiles of a matrix 28 x 40"):
        ops.tiles_linear(x, *good.values(), None, 28, 40)


def test_inputs_of_wrong_type_or_size_are_refused():
    tiles, weight = Tiles.pack(torch.ones(8, 32)), torch.ones(8, 32)
    for call in (
        lambda x, bias: multiply(x, tiles, bias),
        lambda x, bias: ops.dense_linear(x, weight, bias),
    ):
        with pytest.raises(ValueError, match=r"input is torch.bfloat16 .* weight torch.float32"):
            call(torch.ones(1, 32, dtype=torch.bfloat16), None)
        for bias in (torch.ones(7), torch.ones(8, dtype=torch.bfloat16), torch.ones(1, 8)):
            with pytest.raises(ValueError, match=r"bias must be \[8\] torch.float32"):
                call(torch.ones(1, 32), bias)
        for x in (torch.ones(1, 33), torch.ones(())):
            with pytest.raises(ValueError, match="does not fit a weight with 32 columns"):
                call(x, None)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(4), ValueError, "two dimensions"),
        (torch.ones(0, 4), ValueError, "none of them zero"),
        (torch.ones(4, 4, dtype=torch.float64), TypeError, "torch.float64 cannot be packed"),
        (torch.ones(4, 4, dtype=torch.int8), TypeError, "torch.int8 cannot be packed"),
    ],
    ids=["one dimension", "empty", "float64", "int8"],
)
def test_weights_that_cannot_be_packed(weight: torch.Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Tiles.pack(weight)


@pytest.mark.parametrize("name", ["tiles_linear", "dense_linear"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_operators_tell_the_compiler_the_truth(name: str, tokens: int):
    x, weight, bias = torch.randn(2, tokens, 40), random_weight(20, 40, 0.5, torch.float32), torch.randn(20)
    tiles = Tiles.pack(weight)
    arguments = (x, *parts(tiles), bias, 20, 40) if name == "tiles_linear" else (x, weight, bias)
    operator = getattr(torch.ops.optimum_sparse, name).default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_environment_variable_chooses_the_level():
    code = "from optimum_sparse.runtime import kernels; print(kernels.LEVEL)"
    slowest = kernels.LEVELS[0] if kernels.LEVELS else "torch"
    assert run_with_level(code, slowest).stdout.strip() == slowest
    result = run_with_level(code, "sse9")
    assert "ValueError: OPTIMUM_SPARSE_KERNEL='sse9': this machine has" in result.stderr


def run_with_level(code: str, level: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {kernels.VARIABLE: level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
