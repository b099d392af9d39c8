"""Quantised tiles: packing, unpacking and products, with each set of instructions, against loops and float64."""

import dataclasses
import itertools
import random

import pytest
import torch
from torch.nn import functional as F

from optimum_sparse.quantization import Grid
from optimum_sparse.runtime import QuantizedTiles, kernels, ops

from .levels import COMPILED, use_level

SHAPES = [(1, 1), (3, 5), (8, 128), (9, 129), (50, 300), (16, 1300)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PARTS = ("masks", "codes", "offsets", "grids")


@pytest.fixture(params=[*COMPILED, "torch"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_level(monkeypatch, request.param)
    return request.param


def random_grid(rows: int, columns: int, bits: int = 8, group_size: int = 128, seed: int = 0) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    scale = (0.001 + 0.02 * torch.rand(rows, groups, generator=generator)).bfloat16()
    zero = torch.randint(2**bits, (rows, groups), generator=generator).to(torch.uint8)
    return Grid(scale, zero, bits, group_size)


def random_values(rows: int, columns: int, grid: Grid, sparsity: float, seed: int = 0) -> torch.Tensor:
    """Values of the grid in float64, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    size = columns if grid.group_size == -1 else grid.group_size
    codes = torch.randint(2**grid.bits, (rows, columns), generator=generator).double()
    scale, zero = (part.double().repeat_interleave(size, dim=1)[:, :columns] for part in (grid.scale, grid.zero))
    return (scale * (codes - zero)).masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0)


def random_inputs(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """As in a language model, with a few that are a thousand times larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    return torch.where(torch.rand(tokens, columns, generator=generator) < 0.01, 1000 * x, x).to(dtype)


def parts(tiles: QuantizedTiles) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(tiles, name) for name in PARTS)


def multiply(x: torch.Tensor, tiles: QuantizedTiles, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.quantized_linear(x, *parts(tiles), bias, *tiles.shape)


@pytest.mark.parametrize("shape", [(3, 5), (9, 129), (17, 300)], ids=str)
def test_layout_is_the_documented_one(level: str, shape: tuple[int, int]):
    (rows, columns), grid = shape, random_grid(*shape)
    weight = random_values(*shape, grid, 0.5)
    tiles = QuantizedTiles.pack(weight.bfloat16(), grid)
    masks, codes, offsets, scales, zeros = [], [], [0], [], []
    for block in range(0, rows, 8):
        for tile, row in itertools.product(range(0, columns, 128), range(block, block + 8)):
            inside = row < rows
            scales.append(grid.scale[row, tile // 128].item() if inside else 0)
            zeros.append(int(grid.zero[row, tile // 128]) if inside else 0)
            for byte in range(tile, tile + 128, 8):
                stored = [j for j in range(byte, min(byte + 8, columns)) if inside and weight[row, j] != 0]
                masks.append(sum(1 << (j - byte) for j in stored))
                codes += [round(weight[row, j].item() / scales[-1]) + zeros[-1] for j in stored]
        offsets.append(len(codes))
    assert tiles.masks.flatten().tolist() == masks
    # Two codes that are the same weight in bfloat16 are as good as each other.
    values = tiles.codes.tolist()
    assert len(values) == len(codes) + 64 and max(abs(a - b) for a, b in zip(values, codes, strict=False)) <= 1
    assert values[-64:] == [0] * 64
    assert tiles.offsets.tolist() == offsets
    assert (tiles.grids & 0xFF).flatten().tolist() == zeros
    assert (tiles.grids >> 16 << 16).view(torch.float32).flatten().tolist() == scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 128), (8, 384), (4, -1), (2, 2048)])
def test_round_trip_is_exact(level: str, dtype: torch.dtype, sparsity: float, bits: int, group_size: int):
    for shape in SHAPES:
        grid = random_grid(*shape, bits, group_size)
        weight = random_values(*shape, grid, sparsity).to(dtype)
        unpacked = QuantizedTiles.pack(weight, grid).unpack()
        assert unpacked.dtype == dtype and torch.equal(unpacked, weight), shape


def test_size():
    grid = random_grid(512, 512)
    weight = random_values(512, 512, grid, 0.5).bfloat16()
    assert QuantizedTiles.pack(weight, grid).nbytes <= 0.33 * weight.nbytes


def assert_close_to_float64(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """Sums of the values of the grid as exact as float32 makes them, of inputs rounded as documented, rounded once."""
    x, bias = x.double(), 0.0 if bias is None else bias.double()
    padding = -x.shape[1] % 128
    largest = F.pad(x.abs(), (0, padding)).unflatten(1, (-1, 128)).amax(2)
    in_groups = F.pad(weight.abs(), (0, padding)).unflatten(1, (-1, 128)).sum(2)
    expected, magnitude = x @ weight.T + bias, x.abs() @ weight.abs().T + abs(bias)
    rounding = torch.finfo(out.dtype).eps / 2 * 1.01
    bound = rounding * expected.abs() + 1e-6 * magnitude + 2**-22 * (largest @ in_groups.T)
    error = (out.double() - expected).abs()
    assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
def test_products(level: str, dtype: torch.dtype, tokens: int):
    # Where the product is that of dense weights, these are rounded.
    rounded = level == "torch" or (level == "avx512_bf16" and tokens > 4)
    for seed, shape in enumerate(SHAPES):
        for sparsity, bits in ((0, 8), (0.5, 8), (0.95, 4), (1, 8)):
            grid = random_grid(*shape, bits, seed=seed)
            weight = random_values(*shape, grid, sparsity, seed)
            # Codes that are the same weight in bfloat16 are not told apart: the product is that of those packed.
            tiles = QuantizedTiles.pack(weight.float(), grid)
            x = random_inputs(tokens, shape[1], dtype, seed)
            bias = random_inputs(1, shape[0], dtype, seed)[0] if seed % 2 else None
            used = weight.to(dtype).double() if rounded else weight
            assert_close_to_float64(multiply(x, tiles, bias), x, used, bias)


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_products_with_rounded_weights(level: str, tokens: int):
    """Those of the dense bfloat16 weights to 2^-8 of each product, which is how they were rounded."""
    grid = random_grid(50, 300)
    weight, x = random_values(50, 300, grid, 0.5).bfloat16(), random_inputs(tokens, 300, torch.bfloat16)
    expected, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    error = (multiply(x, QuantizedTiles.pack(weight, grid)).double() - expected).abs()
    assert (error <= 2**-8 * (1.01 * expected.abs() + 1.01 * magnitude)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [0, 1e-44, 1e-38, 1e-30, 1e30])
def test_inputs_of_any_size(level: str, dtype: torch.dtype, factor: float):
    grid = random_grid(24, 300)
    weight = random_values(24, 300, grid, 0.5).bfloat16()
    x = (random_inputs(1, 300, torch.float32) * factor).to(dtype)
    expected = x.double() @ weight.double().T
    error = (multiply(x, QuantizedTiles.pack(weight, grid)).double() - expected).abs()
    # Numbers below the smallest normal one may be taken for zero.
    assert (error <= 0.02 * (x.double().abs() @ weight.double().abs().T) + 300 * 5 * 2**-126).all()


def test_the_largest_input_of_a_tile_may_be_anything(level: str):
    """Whatever its leading bits are: those of 1 to 2 in steps of 2^-9, and the numbers just below them."""
    grid = random_grid(8, 128)
    weight = random_values(8, 128, grid, 0.5)
    tiles = QuantizedTiles.pack(weight.float(), grid)
    x = random_inputs(1024, 128, torch.float32).clamp(-1, 1)
    x[:512, 7] = 1 + torch.arange(512) / 512
    x[512:, 7] = torch.nextafter(x[:512, 7], torch.zeros(()))
    out = torch.cat([multiply(part, tiles) for part in x.split(4)])
    assert_close_to_float64(out, x, weight, None)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_nan_and_infinity_go_where_a_dense_product_sends_them(level: str, tokens: int):
    grid = random_grid(24, 300)
    weight, x = random_values(24, 300, grid, 0.5).bfloat16(), random_inputs(tokens, 300, torch.bfloat16)
    tiles = QuantizedTiles.pack(weight, grid)
    for value in (float("inf"), float("nan")):
        x[0, 290] = value
        out, expected = multiply(x, tiles), F.linear(x.double(), weight.double())
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert not out[1:].isnan().any()


def test_pruned_groups_count_for_nothing(level: str):
    """A group of zeros has a grid, too, of any scale: it must not disturb the rest of its row."""
    grid = random_grid(8, 256)
    weight = random_values(8, 256, grid, 0).float()
    weight[:, :128] = 0
    grid.scale[:, 0], grid.zero[:, 0] = 1000, 128
    x = random_inputs(1, 256, torch.float32)
    out = multiply(x, QuantizedTiles.pack(weight, grid))
    alone = QuantizedTiles.pack(weight[:, 128:].contiguous(), Grid(grid.scale[:, 1:], grid.zero[:, 1:], 8, 128))
    torch.testing.assert_close(out, multiply(x[:, 128:], alone), rtol=1e-6, atol=1e-5)


def test_a_token_in_a_batch_has_the_same_bits_as_alone(monkeypatch: pytest.MonkeyPatch):
    use_level(monkeypatch, "avx512_bf16")
    grid = random_grid(50, 300)
    tiles = QuantizedTiles.pack(random_values(50, 300, grid, 0.5).float(), grid)
    x = random_inputs(4, 300, torch.float32)
    assert torch.equal(multiply(x, tiles), torch.cat([multiply(row, tiles) for row in x.split(1)]))


@pytest.mark.parametrize("level", COMPILED)
def test_every_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, level: str):
    use_level(monkeypatch, level)
    grid = random_grid(100, 300)
    weight, x = random_values(100, 300, grid, 0.5).float(), random_inputs(5, 300, torch.float32)
    tiles, before, outs = QuantizedTiles.pack(weight, grid), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            outs.append([tiles.unpack(), multiply(x[:1], tiles), multiply(x, tiles)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *outs))


def test_inputs_of_any_shape_and_strides(level: str):
    grid = random_grid(24, 140)
    weight, x = random_values(24, 140, grid, 0.5), random_inputs(6, 280, torch.float32)
    tiles = QuantizedTiles.pack(weight.float(), grid)
    for view in (x[:, ::2], x.view(2, 3, 280)[..., 140:], x[:0, :140], x[0, :140]):
        out = multiply(view, tiles)
        assert out.shape == (*view.shape[:-1], 24)
        assert_close_to_float64(out.view(-1, 24), view.reshape(-1, 140), weight, None)


def test_many_tokens_unpack_rows_after_rows(level: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "BUFFER_ROWS", 1)
    monkeypatch.setattr(ops, "BUFFER_UNIT", 8)
    monkeypatch.setattr(ops, "BUFFER_BYTES", 8 * 300 * 4 * 2)  # 16 rows
    grid = random_grid(50, 300)
    weight, x = random_values(50, 300, grid, 0.5), random_inputs(ops.MOST_TOKENS + 1, 300, torch.float32)
    bias = torch.arange(50.0)
    out = multiply(x, QuantizedTiles.pack(weight.float(), grid), bias)
    assert_close_to_float64(out, x, weight, bias)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_parts_are_refused(level: str, seed: int):
    """One wrong bit anywhere in masks or offsets, or one code more or less."""
    rng = random.Random(seed)
    shape = rng.randint(1, 40), rng.randint(1, 300)
    grid = random_grid(*shape)
    tiles = QuantizedTiles.pack(random_values(*shape, grid, rng.random()).bfloat16(), grid)
    for _ in range(100):
        mutated = {name: getattr(tiles, name).clone() for name in ("masks", "offsets", "codes")}
        name = rng.choice(list(mutated))
        if name == "codes":
            part = mutated["codes"]
            mutated["codes"] = part[:-1] if rng.random() < 0.5 else torch.cat([part, part[:1]])
        else:
            part = mutated[name].view(-1)
            bit = rng.randrange(8 * part.itemsize)
            part[rng.randrange(len(part))] ^= -(2**63) if bit == 63 else 1 << bit
        with pytest.raises(ValueError, match=r"do not belong together|no quantised tiles of a matrix"):
            dataclasses.replace(tiles, **mutated)


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_wrong_size_or_type_are_refused(part: str):
    grid = random_grid(20, 140)
    tiles = QuantizedTiles.pack(random_values(20, 140, grid, 0.5).float(), grid)
    good, x = dict(zip(PARTS, parts(tiles), strict=True)), torch.ones(1, 140)
    for bad in (good[part][:0], good[part].to(torch.int16), good[part][None].expand(2, *good[part].shape)):
        with pytest.raises(ValueError, match="no quantised tiles of a matrix"):
            dataclasses.replace(tiles, **{part: bad})
        with pytest.raises(ValueError, match="no quantised tiles of a matrix"):
            ops.quantized_linear(x, *(good | {part: bad}).values(), None, 20, 140)
    with pytest.raises(ValueError, match="no quantised tiles of a matrix 20 x 265"):
        ops.quantized_linear(torch.ones(1, 265), *good.values(), None, 20, 265)
    with pytest.raises(TypeError, match=r"got torch\.int8"):
        dataclasses.replace(tiles, like=torch.ones(0, dtype=torch.int8))


def test_inputs_of_wrong_type_or_size_are_refused():
    grid = random_grid(8, 128)
    tiles = QuantizedTiles.pack(random_values(8, 128, grid, 0.5).float(), grid)
    with pytest.raises(ValueError, match=r"the input is torch\.float64 on cpu"):
        multiply(torch.ones(1, 128, dtype=torch.float64), tiles)
    with pytest.raises(ValueError, match="does not fit a weight with 128 columns"):
        multiply(torch.ones(1, 129), tiles)
    with pytest.raises(ValueError, match=r"bias must be \[8\] torch\.float32"):
        multiply(torch.ones(1, 128), tiles, torch.ones(7))


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((8, 256), random_grid(8, 256, group_size=64), "64 inputs, which is no multiple of 128"),
        ((8, 300), random_grid(8, 300, group_size=200), "200 inputs, which is no multiple of 128"),
        ((8, 256), random_grid(8, 128), r"has \(8, 1\) groups, and not \(8, 2\)"),
        ((8, 256), random_grid(7, 256), r"has \(7, 2\) groups"),
        ((256,), random_grid(1, 256), "two dimensions"),
        ((0, 256), random_grid(1, 256), "none of them zero"),
    ],
    ids=["64 inputs", "200 inputs", "too few groups", "too few rows", "one dimension", "empty"],
)
def test_weights_that_cannot_be_packed(shape: tuple[int, ...], grid: Grid, message: str):
    with pytest.raises(ValueError, match=message):
        QuantizedTiles.pack(torch.zeros(shape), grid)


def test_a_group_that_is_the_whole_row_may_be_of_any_size(level: str):
    grid = random_grid(8, 60, group_size=64)
    weight = random_values(8, 60, grid, 0.5).float()
    assert torch.equal(QuantizedTiles.pack(weight, grid).unpack(), weight)


def test_weights_that_are_not_on_the_grid():
    grid = random_grid(8, 128)
    weight = random_values(8, 128, grid, 0.5).float()
    weight[0, 0], weight[1, 0] = 0.0173, float("nan")
    with pytest.raises(ValueError, match="2 of 1024 weights are not on the grid"):
        QuantizedTiles.pack(weight, grid)


@pytest.mark.parametrize("tokens", [1, 3])
def test_operator_tells_the_compiler_the_truth(tokens: int):
    grid = random_grid(20, 140)
    tiles = QuantizedTiles.pack(random_values(20, 140, grid, 0.5).float(), grid)
    arguments = (torch.randn(2, tokens, 140), *parts(tiles), torch.randn(20), 20, 140)
    operator = torch.ops.optimum_sparse.quantized_linear.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_codes_are_multiplied_as_whole_numbers(monkeypatch: pytest.MonkeyPatch):
    """The fastest level rounds nothing before the sum of a tile: weights that cancel leave exactly nothing."""
    use_level(monkeypatch, kernels.LEVELS[-1] or "avx512_bf16")
    grid = Grid(torch.full((8, 1), 0.0123).bfloat16(), torch.full((8, 1), 100, dtype=torch.uint8), 8, 128)
    weight = grid.values(torch.cat([torch.full((8, 64), 90), torch.full((8, 64), 110)], dim=1))
    half = random_inputs(1, 64, torch.bfloat16) / 1000
    out = multiply(torch.cat([half, half], dim=1), QuantizedTiles.pack(weight, grid))
    assert out.abs().max() == 0
