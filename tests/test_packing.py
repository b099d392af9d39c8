"""Packed tensors: bit for bit what went in, of the size that the format says, and nothing else is believed."""

import itertools
import math
import random

import pytest
import torch

from optimum_sparse.packing import Packed, pack, satisfies, smallest

FLOATS = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:5", "4:8", "7:8"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
    assert torch.equal(bits(tensor.flatten()), bits(expected.flatten()))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, sparsity: float, seed: int = 0) -> torch.Tensor:
    """Any bit patterns, so NaN of all payloads, infinities, denormals and -0.0 among them, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([], dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    raw[torch.rand(shape, generator=generator) < sparsity] = 0
    return raw.view(dtype).squeeze(-1)


def of_pattern(
    shape: tuple[int, ...], pattern: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, full: bool = False
):
    """Random bits with at most N of every M along the last dimension, some groups with fewer."""
    n, m = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape[:-1], shape[-1] // m, m, generator=generator).argsort(-1).argsort(-1)
    drop = (order >= n) | ((torch.rand(order.shape, generator=generator) < 0.1) & (not full))
    raw = bits(random_bits((*shape, 1), dtype, 0.0, seed)).clone()
    raw[(raw == 0).all(-1)] = 1
    raw[drop.reshape(shape)] = 0
    return raw.view(dtype).squeeze(-1)


def decode(packed: Packed) -> torch.Tensor:
    """The format as docs/packing.md describes it, one bit at a time."""
    stream = [byte >> i & 1 for byte in packed.positions.tolist() for i in range(8)]
    values = packed.values.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[packed.values.itemsize]
    )
    values, shape = iter(values.tolist()), list(packed.shape)
    if packed.transposed:
        shape[-2:] = shape[:-3:-1]
    if packed.form == "bitmask":
        mask = stream[: packed.numel]
    else:
        n, m = map(int, packed.form.split(":"))
        masks = sorted(sum(1 << i for i in chosen) for chosen in itertools.combinations(range(m), n))
        width = math.ceil(math.log2(len(masks)))
        mask = []
        for group in range(packed.numel // m):
            code = sum(bit << i for i, bit in enumerate(stream[group * width : (group + 1) * width]))
            mask += [masks[code] >> i & 1 for i in range(m)]
    dense = torch.tensor([next(values) if bit else 0 for bit in mask], dtype=torch.int64)
    dense = dense.to({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[packed.values.itemsize])
    dense = dense.view(packed.values.dtype).reshape(shape)
    return dense.mT if packed.transposed else dense


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (8, 8), (5, 13), (3, 4, 6), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_a_bitmask_is_lossless_to_the_bit(shape, sparsity, dtype):
    weight = random_bits(shape, dtype, sparsity)
    packed = pack(weight)
    assert_same(packed.unpack(), weight)
    assert_same(decode(packed), weight)
    assert len(packed.positions) == math.ceil(weight.numel() / 8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_a_pattern_is_lossless_to_the_bit(pattern, transposed, dtype):
    m = int(pattern.split(":")[1])
    for rows in ((3, m), (7, 5 * m), (2, 3, 2 * m), (0, m), (4, 0)):
        weight = of_pattern(rows, pattern, dtype)
        weight = weight.mT.contiguous() if transposed else weight
        packed = pack(weight, pattern, transposed)
        assert packed.unpack().is_contiguous()
        assert_same(packed.unpack(), weight)
        assert_same(decode(packed), weight)


def test_more_than_a_chunk():
    weight = random_bits((700, 1001), torch.bfloat16, 0.5)
    assert_same(pack(weight).unpack(), weight)
    for pattern in PATTERNS:
        weight = of_pattern((701, 280), pattern)
        assert_same(pack(weight, pattern).unpack(), weight)


def test_minus_zero_and_nan_are_values_and_plus_zero_is_not():
    nan = torch.tensor([0x7FC1, -63], dtype=torch.int16).view(torch.bfloat16)  # two payloads, one negative
    weight = torch.cat([torch.tensor([0.0, -0.0], dtype=torch.bfloat16), nan])
    packed = pack(weight)
    assert packed.positions.tolist() == [0b1110]
    assert_same(packed.unpack(), weight)
    assert packed.nonzero().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w[:, ::2],
        lambda w: w[1:, 3:],
        lambda w: w[:1].expand(4, -1),
        lambda w: w.view(8, 4, 8).mT,
    ],
    ids=["transposed", "strided", "offset", "expanded", "batched"],
)
def test_views_are_packed_as_what_they_show(view):
    weight = view(of_pattern((8, 32), "1:4"))
    assert_same(pack(weight).unpack(), weight)


def test_a_trained_parameter_is_packed_without_its_gradient():
    weight = torch.nn.Parameter(random_bits((4, 8), torch.float32, 0.5))
    packed = pack(weight)
    assert not packed.values.requires_grad
    assert_same(packed.unpack(), weight.detach())


@pytest.mark.parametrize(
    ("weight", "most"),
    [
        (random_bits((512, 512), torch.bfloat16, 0.5), 0.57),
        (random_bits((512, 512), torch.bfloat16, 0.6), 0.47),
        (of_pattern((512, 512), "2:4", full=True), 0.57),
    ],
    ids=["50 %", "60 %", "2:4"],
)
def test_sizes(weight, most):
    assert smallest(weight, [("2:4", False)]).nbytes <= most * weight.nbytes


def test_sizes_of_the_format():
    weight = of_pattern((64, 64), "2:4", torch.bfloat16)
    assert pack(weight, "2:4").nbytes == weight.nbytes * (2 / 4 + 3 / 4 / 16)
    assert pack(weight, "4:8").nbytes == weight.nbytes * (4 / 8 + 7 / 8 / 16)


def test_the_smallest_form_is_chosen():
    assert smallest(of_pattern((16, 16), "2:4", full=True), [("2:4", False)]).form == "2:4"
    assert smallest(of_pattern((16, 16), "2:4", full=True).mT, [("2:4", False), ("2:4", True)]).transposed
    mostly_zero = torch.zeros(16, 16).index_fill_(1, torch.tensor([3]), 1.0)
    assert smallest(mostly_zero, [("2:4", False)]).form == "bitmask"
    assert smallest(random_bits((16, 16), torch.bfloat16, 0.5), [("2:4", False)]).form == "bitmask"


def test_what_does_not_get_smaller_stays_as_it_is():
    assert smallest(random_bits((64, 64), torch.bfloat16, 0.0)) is None
    assert smallest(torch.zeros(0, 4)) is None


def test_patterns_are_checked():
    weight = of_pattern((4, 8), "2:4")
    assert satisfies(weight, "2:4") and satisfies(weight, "3:4") and not satisfies(weight, "1:4")
    assert not satisfies(weight, "8:16") and not satisfies(weight, "2:5")
    with pytest.raises(ValueError, match=r"not 1:4: a group of 4 inputs has more than 1"):
        pack(weight, "1:4")
    with pytest.raises(ValueError, match=r"shape \[4, 8\] cannot be divided into groups of 5"):
        pack(weight, "2:5")
    with pytest.raises(ValueError, match=r"16 cannot be packed: groups have up to 8 weights"):
        pack(weight, "8:16")
    with pytest.raises(ValueError, match="Only floating-point tensors"):
        pack(torch.arange(4))


def tensors(form: str = "bitmask") -> dict[str, torch.Tensor]:
    parts = pack(of_pattern((4, 12), "2:4"), form).to_tensors()
    return {"values": parts[""], "positions": parts["_positions"], "layout": parts["_layout"]}


def test_tensors_of_a_file():
    for form, transposed in (("bitmask", False), ("2:4", False), ("2:4", True)):
        weight = of_pattern((4, 12), "2:4")
        weight = weight.mT if transposed else weight
        packed = Packed.from_tensors(*pack(weight, form, transposed).to_tensors().values())
        assert (packed.form, packed.transposed) == (form, transposed)
        assert_same(packed.unpack(), weight)


def layout(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("bitmask", lambda t: {"values": t["values"][1:]}, "values for"),
        ("2:4", lambda t: {"values": t["values"][1:]}, "23 values for 24 positions"),
        ("bitmask", lambda t: {"values": t["values"].view(torch.int16)}, "values are torch.int16"),
        ("bitmask", lambda t: {"values": t["values"][None]}, "in one dimension"),
        ("bitmask", lambda t: {"positions": t["positions"][1:]}, "5 bytes of positions do not fit"),
        ("bitmask", lambda t: {"positions": t["positions"].view(torch.int8)}, "positions are torch.int8"),
        ("bitmask", lambda t: {"positions": t["positions"] ^ 1}, "values for"),
        ("2:4", lambda t: {"positions": t["positions"] | 0b111}, "out of range: 2:4 has 6 masks"),
        ("2:4", lambda t: {"positions": t["positions"] | 0b11110000}, "bits set behind the last|out of range"),
        ("bitmask", lambda t: {"layout": layout(0, 0, 0, 4, 13)}, "6 bytes of positions do not fit"),
        ("bitmask", lambda t: {"layout": layout(0, 0, 0, -4, -12)}, "none of 1 to 8 dimensions"),
        ("bitmask", lambda t: {"layout": layout(0, 0, 0, 2**62, 2**62)}, "larger than any tensor"),
        ("bitmask", lambda t: {"layout": layout(0, 0, 0, 0, 2**62, 2**62)}, "larger than any tensor"),
        ("bitmask", lambda t: {"layout": layout(0, 0, 0)}, "int64 .* is needed"),
        ("bitmask", lambda t: {"layout": t["layout"].int()}, "int64 .* is needed"),
        ("bitmask", lambda t: {"layout": layout(0, 0, 1, 4, 12)}, "that is no form"),
        ("2:4", lambda t: {"layout": layout(4, 2, 0, 4, 12)}, "that is no form"),
        ("2:4", lambda t: {"layout": layout(2, 4, 2, 4, 12)}, "that is no form"),
        ("2:4", lambda t: {"layout": layout(2, 10**9, 0, 4, 12)}, "that is no form"),
        ("2:4", lambda t: {"layout": layout(2, 4, 0, 4, 13)}, "cannot be divided"),
        ("2:4", lambda t: {"layout": layout(2, 4, 0, 48)}, "cannot be divided"),
    ],
)
def test_what_does_not_fit_is_refused(form, change, message):
    parts = tensors(form)
    with pytest.raises(ValueError, match=message):
        Packed.from_tensors(**{**parts, **change(parts)})


def test_bits_behind_the_last_weight_are_refused():
    packed = pack(torch.ones(3))
    with pytest.raises(ValueError, match="behind the last"):
        Packed(packed.values, packed.positions | 0b10000, packed.shape)


def test_a_bitmask_is_not_transposed():
    packed = pack(torch.ones(2, 3), transposed=True)
    assert not packed.transposed
    with pytest.raises(ValueError, match="never transposed"):
        Packed(packed.values, packed.positions, packed.shape, "bitmask", transposed=True)


def test_thousands_of_mutations_are_refused_or_change_nothing_but_values():
    """A mutated tensor is a ValueError, or a tensor of the shape that it claims."""
    generator, refused = random.Random(0), 0
    for index in range(3000):
        parts = tensors("2:4" if index % 2 else "bitmask")
        name = generator.choice(list(parts))
        raw = bytearray(bits(parts[name]).numpy().tobytes())
        for _ in range(generator.randint(1, 3)):
            raw[generator.randrange(len(raw))] = generator.randrange(256)
        size = generator.choice([len(raw)] * 3 + [generator.randrange(len(raw) + 1)]) // parts[name].itemsize
        parts[name] = torch.frombuffer(bytearray(raw) + bytearray(8), dtype=torch.uint8)[: size * parts[name].itemsize]
        parts[name] = parts[name].clone().view(tensors()[name].dtype)
        try:
            packed = Packed.from_tensors(**parts)
        except ValueError:
            refused += 1
        else:
            assert packed.unpack().shape == packed.shape
    assert 1000 < refused < 3000
