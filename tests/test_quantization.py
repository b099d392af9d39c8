"""Grids against their definition, one value at a time."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from optimum_sparse.config import QUANTIZATIONS, SparseConfig
from optimum_sparse.quantization import SHRINK, Grid, Rounding, read_grids, write_grids

CASES = [
    {"quantization": "int4", "group_size": 32},
    {"quantization": "int8", "group_size": 48},  # the last group is shorter
    {"quantization": "int3", "group_size": -1, "symmetric": True},
    {"quantization": "int2", "group_size": 1},
]


def weights(rows: int = 5, columns: int = 80, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[1] = weight[1].abs()  # all of one sign
    weight[2, :40] = 0  # groups of zeros
    return weight * torch.tensor([1.0, 1.0, 1.0, 1e-3, 1e3])[:, None]


def grid_of(weight: torch.Tensor, **options) -> Grid:
    rounding = Rounding(weight, SparseConfig(**options))
    rounding.enter(weight.T, 0, weight.shape[1])
    return rounding.grid


def values_of(scale: float, zero: int, bits: int) -> list[float]:
    return [scale * (code - zero) for code in range(2**bits)]


def naive_grid(values: list[float], bits: int, symmetric: bool) -> tuple[float, int, float]:
    """Scale, zero and squared error of the best of the ranges that are tried."""
    best = (1.0, 0, math.inf)
    low, high = min(0.0, *values), max(0.0, *values)
    for shrink in SHRINK:
        span = max(high, -low) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
        scale = torch.tensor(shrink * span).bfloat16().item()
        scale = scale if scale > 0 else 1.0
        zero = 2 ** (bits - 1) if symmetric else round(-shrink * low / scale)
        allowed = values_of(scale, zero, bits)
        error = sum(min((value - other) ** 2 for other in allowed) for value in values)
        if error < best[2] * (1 - 1e-6):
            best = (scale, zero, error)
    return best


@pytest.mark.parametrize("options", CASES, ids=str)
def test_grid_is_the_best_of_those_tried(options: dict):
    weight, grid = weights(), grid_of(weights(), **options)
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    assert grid.scale.dtype == torch.bfloat16 and grid.zero.dtype == torch.uint8
    assert grid.scale.shape == grid.zero.shape == (5, math.ceil(80 / size))
    for row, group in itertools.product(range(5), range(grid.scale.shape[1])):
        values = weight[row, group * size : (group + 1) * size].tolist()
        _, _, least = naive_grid(values, grid.bits, options.get("symmetric", False))
        allowed = values_of(grid.scale[row, group].item(), int(grid.zero[row, group]), grid.bits)
        error = sum(min((value - other) ** 2 for other in allowed) for value in values)
        assert error <= least * (1 + 1e-4) + 1e-12
        assert 0.0 in allowed


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_that_are_all_negative(quantization: str):
    """The code of 0 is then the largest, also where the scale was rounded down."""
    weight = -torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    grid = grid_of(weight, quantization=quantization, group_size=8)
    assert int(grid.zero.min()) > 0 and int(grid.zero.max()) == 2**grid.bits - 1
    assert torch.equal(grid.values(grid.codes(grid.round(weight))), grid.round(weight))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_round_gives_the_nearest_value(options: dict):
    weight, grid = weights() + 0.1, grid_of(weights(), **options)
    rounded = grid.round(weight)
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    for row, column in itertools.product(range(5), range(80)):
        scale, zero = grid.scale[row, column // size].item(), int(grid.zero[row, column // size])
        value = weight[row, column].item()
        nearest = min(values_of(scale, zero, grid.bits), key=lambda allowed: abs(allowed - value))
        # Exactly between two of them, either will do.
        assert abs(rounded[row, column].item() - value) <= abs(nearest - value) + 1e-6 * abs(value)
    assert torch.equal(grid.round(torch.zeros(5, 80)), torch.zeros(5, 80))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_codes_give_the_weights_back(quantization: str, dtype: torch.dtype):
    grid = grid_of(weights()[:4], quantization=quantization, group_size=32)
    weight = grid.round(weights()[:4]).to(dtype)
    codes = grid.codes(weight)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**grid.bits
    assert torch.equal(grid.values(codes).to(dtype), weight)


@pytest.mark.parametrize("zero", [0, 100, 128, 255])
def test_codes_of_all_weights_that_there_are_in_bfloat16(zero: int):
    """Every mantissa that a scale can have, and every code; two scales that are powers of two apart are alike."""
    scale = (1 + torch.arange(128) / 128).bfloat16()[:, None]
    grid = Grid(scale, torch.full((128, 1), zero, dtype=torch.uint8), 8, -1)
    weight = (scale.float() * (torch.arange(256) - zero)).bfloat16()
    assert torch.equal(grid.values(grid.codes(weight)).bfloat16(), weight)


@pytest.mark.parametrize("factor", [1e-3, 1e-5, 3e-6, 1e-6, 1e-7])
def test_codes_of_weights_that_are_small_for_half_precision(factor: float):
    """Near the smallest numbers of float16, 2^-24 apart, several codes have the same value."""
    weight = weights()[:1] * factor
    grid = grid_of(weight, quantization="int8", group_size=-1)
    rounded = grid.round(weight).half()
    assert (grid.scale.item() < 2**-24) == (factor <= 1e-6)
    assert torch.equal(grid.values(grid.codes(rounded)).half(), rounded)


def test_what_is_not_on_the_grid_is_found():
    grid = grid_of(weights(), quantization="int4", group_size=32)
    weight = grid.round(weights())
    weight[0, 3] += grid.scale[0, 0].item() / 3
    with pytest.raises(ValueError, match="1 of 400 weights are not on the grid of 4 bits"):
        grid.codes(weight)


def test_columns_are_rounded_as_the_whole():
    weight, config = weights(), SparseConfig(quantization="int4", group_size=32)
    rounding = Rounding(weight, config)
    columns = []
    for start in range(0, 80, 20):  # groups begin and end within blocks
        rounding.enter(weight.T[start:], start, 20)
        columns += [rounding.column(weight[:, start + i], i, start) for i in range(20)]
    assert torch.equal(torch.stack(columns, dim=1), rounding.grid.round(weight))
    assert torch.equal(rounding.grid.scale, grid_of(weight, quantization="int4", group_size=32).scale)


def test_scaled_grid_has_the_same_codes():
    grid = grid_of(weights(), quantization="int4", group_size=32)
    factor = torch.tensor([[0.5], [1.0], [1.1], [1.4], [2.0]])
    scaled = grid.scaled(factor)
    assert torch.equal(scaled.zero, grid.zero) and scaled.scale.dtype == torch.bfloat16
    codes = grid.codes(grid.round(weights()))
    assert torch.equal(scaled.codes(scaled.values(codes)), codes)
    assert torch.equal(scaled.values(codes)[[0, 1, 4]], (grid.values(codes) * factor)[[0, 1, 4]])
    torch.testing.assert_close(scaled.values(codes), grid.values(codes) * factor, rtol=2**-8, atol=0)


def test_stacked_grids_are_split():
    grid = grid_of(weights(), quantization="int4", group_size=32)
    first, second = grid.split((2, 3))
    assert torch.equal(torch.cat([first.scale, second.scale]), grid.scale)
    assert torch.equal(torch.cat([first.round(weights()[:2]), second.round(weights()[2:])]), grid.round(weights()))


def test_file(tmp_path: Path):
    grids = {f"layers.{i}.q": grid_of(weights(seed=i), quantization="int4", group_size=32) for i in range(2)}
    file = tmp_path / "quantization" / "grids.safetensors"
    write_grids(file, grids)
    found = read_grids(file)
    assert found.keys() == grids.keys()
    for name, grid in grids.items():
        assert (found[name].bits, found[name].group_size) == (4, 32)
        assert torch.equal(found[name].scale, grid.scale) and torch.equal(found[name].zero, grid.zero)


@pytest.mark.parametrize(("bits", "group_size"), [(16, 32), (1, 32), (99999, 32), (4, 0), (4, -2)])
def test_grids_that_cannot_be(tmp_path: Path, bits: int, group_size: int):
    grid = grid_of(weights(), quantization="int4", group_size=32)
    file = tmp_path / "grids.safetensors"
    write_grids(file, {"q": Grid(grid.scale, grid.zero, bits, group_size)})
    with pytest.raises(ValueError, match=rf"{bits} bits and groups of {group_size} are not possible"):
        read_grids(file)


@pytest.mark.parametrize("damage", ["truncated", "no metadata", "no zeros"])
def test_damaged_file(tmp_path: Path, damage: str):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "grids.safetensors"
    write_grids(file, {"q": grid_of(weights(), quantization="int4", group_size=32)})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        tensors = load_file(file)
        save_file(tensors if damage == "no metadata" else {"q.scale": tensors["q.scale"]}, file)
    with pytest.raises(ValueError, match=r"grids\.safetensors"):
        read_grids(file)
