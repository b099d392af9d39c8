"""Batches of the user's own, and batches of tokens taken apart: what belongs to a row or a token stays with it."""

import hashlib
import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from optimum_sparse.calibration import load_calibration
from optimum_sparse.calibration.batches import holds_tokens, num_rows, shortened, split_rows
from optimum_sparse.config import SparseConfig
from tests.beyond_text import IMAGE_TOKEN, MODELS
from tests.helpers import VOCABULARY, tiny_model

from .helpers import DOCUMENTS, WINDOWS, load, rows, words

# Batches of the user's own


def test_dataloader_is_passed_on_unchanged(llama):
    rows_of_tokens = [
        {"input_ids": torch.tensor([5, 6, index]), "position_ids": torch.arange(3)} for index in range(9)
    ]
    loader = DataLoader(rows_of_tokens, batch_size=3)
    calibration = load_calibration(SparseConfig(num_samples=9, batch_size=1), llama, None, loader)
    expected = list(loader)
    assert len(calibration.batches) == 3
    for batch, given in zip(calibration.batches, expected, strict=True):
        assert set(batch) == {"input_ids", "position_ids"}
        assert all(torch.equal(batch[name], given[name]) for name in given)
    assert calibration.record["dataset"] == "DataLoader"
    assert calibration.record["num_tokens"] == 27


def test_batches_end_at_num_samples(llama):
    given = ({"input_ids": torch.full((3, 2), 5 + index), "note": "x"} for index in itertools.count())
    calibration = load_calibration(SparseConfig(num_samples=6), llama, None, given)
    assert rows(calibration) == [[5, 5]] * 3 + [[6, 6]] * 3
    assert calibration.batches[0]["note"] == "x"


def test_last_batch_is_cut(llama):
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    given = [{"input_ids": torch.full((3, 2), 5 + index), "attention_mask": mask} for index in range(3)]
    calibration = load_calibration(SparseConfig(num_samples=5), llama, None, iter(given))
    assert [len(batch["input_ids"]) for batch in calibration.batches] == [3, 2]
    assert calibration.batches[1]["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert calibration.record["num_tokens"] == 5 + 3


@pytest.mark.parametrize("extra", ["x", torch.zeros(4, 2), torch.tensor(1)], ids=["string", "other rows", "scalar"])
def test_last_batch_that_cannot_be_cut(llama, extra):
    given = iter([{"input_ids": torch.full((3, 2), 5), "extra": extra}])
    with pytest.raises(ValueError, match=r"cannot be cut from 3 rows to 2, as 'extra' .* num_samples a multiple"):
        load_calibration(SparseConfig(num_samples=2), llama, None, given)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (DataLoader(TensorDataset(torch.ones(2, 3))), TypeError, r"Batch 0 .* got list.*collate_fn"),
        (iter(["text"]), TypeError, r"Batch 0 .* got str"),
        (iter([{"input_ids": [5, 6]}]), ValueError, r"'input_ids' in batch 0 .*integer tensor.* got list"),
        (iter([{"input_ids": torch.tensor([5, 6])}]), ValueError, r"\[rows, tokens\], got \[2\] of torch.int64"),
        (iter([{"input_ids": torch.ones(2, 2)}]), ValueError, r"got \[2, 2\] of torch.float32"),
        (iter([{"tokens": [5, 6]}]), ValueError, r"Batch 0 .* no tensor with a row .* only \[tokens: list\]"),
        (iter([{"attention_mask": torch.ones(2, 2)}]), ValueError, r"Batch 0 .* no tensor with a row"),
        (iter([{"input_ids": torch.ones(0, 2).long()}]), ValueError, r"no tensor .* \[input_ids: \[0, 2\] of torch"),
        (iter([]), ValueError, r"hold no rows"),
    ],
)
def test_bad_batches(llama, batches, error, message):
    with pytest.raises(error, match=message):
        load_calibration(SparseConfig(), llama, None, batches)


# Batches without tokens, and models that are no causal language models


def test_hand_written_decoder():
    model, _ = MODELS["plain"]()
    assert not hasattr(model, "config")
    from_tokens = load_calibration(SparseConfig(num_samples=2), model, None, [{"input_ids": row} for row in WINDOWS])
    from_text = load(DOCUMENTS, model=model, seqlen=4, num_samples=2)
    assert rows(from_tokens) == rows(from_text) == WINDOWS
    assert model(**from_text.batches[0]).shape == (2, 4, VOCABULARY)
    assert load([words([7] * 2100)], model=model, num_samples=1).record["seqlen"] == 2048
    # How many ids it knows cannot be seen from outside.
    assert rows(load([words([500] * 4)], model=model, seqlen=4, num_samples=1)) == [[500] * 4]


def test_hand_written_model_with_other_inputs():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Doubled(4, 4)
    numbers = torch.arange(12.0).view(3, 4)
    calibration = load_calibration(SparseConfig(num_samples=3), model, None, [{"x": numbers}])
    assert torch.equal(calibration.batches[0]["x"], numbers)
    with pytest.raises(ValueError, match=r"Doubled takes x and no input_ids, .* \(3 texts\): give batches"):
        load(DOCUMENTS, model=model)


@pytest.mark.parametrize("kind", ["list", "DataLoader", "generator"])
def test_batches_of_images(kind):
    model, _ = MODELS["vit"]()
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": pixels[:3], "labels": None, "note": "x"}, {"pixel_values": pixels[3:]}]
    data = {"list": batches, "DataLoader": DataLoader(batches, batch_size=None), "generator": (b for b in batches)}[
        kind
    ]
    calibration = load_calibration(SparseConfig(num_samples=4), model, None, data)
    first, second = calibration.batches
    assert set(first) == {"pixel_values", "labels", "note"}
    assert torch.equal(torch.cat([first["pixel_values"], second["pixel_values"]]), pixels[:4])
    assert calibration.record == {
        "dataset": "2 batches" if kind == "list" else kind,
        "num_samples": 4,
        "seqlen": None,
        "num_tokens": None,
        "seed": 0,
        "sha256": hashlib.sha256(pixels[:4].numpy().tobytes()).hexdigest(),
    }
    halved = load_calibration(SparseConfig(num_samples=4), model, None, {"pixel_values": pixels[:4].bfloat16()})
    rounded = pixels[:4].bfloat16().float().numpy().tobytes()
    assert halved.record["sha256"] == hashlib.sha256(rounded).hexdigest()
    assert halved.batches[0]["pixel_values"].dtype == torch.bfloat16


def test_rows_are_those_of_the_main_input():
    """Of Whisper, the features, whatever comes first; without a main input, its embeddings; never a mask."""
    whisper, ((batch), *_) = MODELS["whisper"]()
    features = batch["input_features"]
    given = {"decoder_input_ids": batch["decoder_input_ids"][:1], "input_features": features}
    calibration = load_calibration(SparseConfig(num_samples=2), whisper, None, [given])
    assert calibration.record["num_samples"] == 2
    assert calibration.record["sha256"] == hashlib.sha256(features.numpy().tobytes()).hexdigest()

    embeds = torch.randn(3, 5, 32)
    given = {"attention_mask": torch.ones(1, 5), "position_ids": torch.arange(5), "inputs_embeds": embeds}
    calibration = load_calibration(SparseConfig(num_samples=3), tiny_model(), None, [given])
    assert calibration.record["num_samples"] == 3
    assert calibration.record["seqlen"] is None


def test_batches_of_images_and_text():
    model, batches = MODELS["llava_mixed"]()
    calibration = load_calibration(SparseConfig(num_samples=8), model, None, batches)
    for batch, given in zip(calibration.batches, batches, strict=True):
        assert set(batch) == set(given)
        assert all(torch.equal(batch[name], given[name]) for name in given)
    assert calibration.record["dataset"] == "4 batches"
    assert calibration.record["seqlen"] == 24
    assert calibration.record["num_tokens"] == 4 * 2 * 24
    # Ids that stand for an image need no embedding, those of text do.
    batches[1]["input_ids"][batches[1]["input_ids"] == IMAGE_TOKEN] = VOCABULARY + 3
    load_calibration(SparseConfig(num_samples=8), model, None, batches)
    batches[0]["input_ids"][0, 0] = VOCABULARY + 3
    with pytest.raises(ValueError, match=rf"Token id {VOCABULARY + 3} is outside"):
        load_calibration(SparseConfig(num_samples=8), model, None, batches)


def test_text_tower_is_calibrated_on_text():
    model, _ = MODELS["llava"]()
    calibration = load(DOCUMENTS, model=model, seqlen=4, num_samples=2)
    assert rows(calibration) == WINDOWS
    assert set(calibration.batches[0]) == {"input_ids"}


@pytest.mark.parametrize("name", ["whisper", "vit", "convnext"])
@pytest.mark.parametrize(
    "dataset", ["c4", None, DOCUMENTS, [{"input_ids": [5, 6]}]], ids=["c4", "default", "texts", "tokens"]
)
def test_text_for_a_model_that_takes_none(name, dataset):
    model, _ = MODELS[name]()
    message = rf"{type(model).__name__} takes (input_features|pixel_values) and no input_ids, .* for its processor"
    with pytest.raises(ValueError, match=message):
        load(dataset, model=model)


# Batches of tokens taken apart

ROWS, TOKENS = 4, 300
IDS = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
BATCHES = {
    "ids": {"input_ids": IDS},
    "mask": {"input_ids": IDS, "attention_mask": IDS % 7},
    "no mask": {"input_ids": IDS, "attention_mask": None},
    "4-D mask": {"input_ids": IDS, "attention_mask": IDS[:, None, :, None] + IDS[:, None, None]},
    "labels": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS + 1},
    "classes": {"input_ids": IDS, "labels": torch.arange(ROWS)},
    "decoder": {"input_ids": IDS, "decoder_input_ids": IDS[:, :20], "decoder_attention_mask": IDS[:, :20] * 0 + 1},
}
OTHERS = {
    "images": {"input_ids": IDS, "pixel_values": torch.rand(ROWS, 3, 8, 8)},
    "patches": {"input_ids": IDS, "position_ids": torch.zeros(3, ROWS, TOKENS)},
    "flags": {"input_ids": IDS, "use_cache": False},
    "no tokens": {"inputs_embeds": torch.rand(ROWS, TOKENS, 8)},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_parts_have_all_that_belongs_to_their_rows(batch):
    assert holds_tokens(batch)
    parts = split_rows(batch, 3)
    assert [len(part["input_ids"]) for part in parts] == [3, 1]
    for name, value in batch.items():
        if value is None:
            assert all(part[name] is None for part in parts)
        else:
            assert torch.equal(torch.cat([part[name] for part in parts]), value)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_start_has_all_that_belongs_to_its_tokens(batch):
    found = shortened(batch, 256)
    assert found["input_ids"].tolist() == IDS[:, :256].tolist()
    for name, value in batch.items():
        if value is not None and value.ndim == 4:
            assert torch.equal(found[name], value[..., :256, :256])
        elif value is not None:
            assert torch.equal(found[name], value[:, :256] if value.ndim == 2 else value)


@pytest.mark.parametrize(("padded", "first"), [((100, 30), 30), ((299, 290), 44), ((0, 0), 0)])
def test_the_start_begins_with_a_token(padded, first):
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    for row, length in enumerate(padded):
        mask[row, :length] = 0
    found = shortened({"input_ids": IDS[:2], "attention_mask": mask, "decoder_input_ids": IDS[:2, :9]}, 256)
    assert torch.equal(found["input_ids"], IDS[:2, first : first + 256])
    assert torch.equal(found["attention_mask"], mask[:, first : first + 256])
    assert torch.equal(found["decoder_input_ids"], IDS[:2, :9])


@pytest.mark.parametrize("batch", OTHERS.values(), ids=OTHERS)
def test_other_things_stay_together(batch):
    assert not holds_tokens(batch)
    for same in (shortened(batch), *split_rows(batch, 1)):
        assert same.keys() == batch.keys() and all(same[name] is batch[name] for name in batch)


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ({"input_ids": (3, 9)}, 3),
        ({"input_ids": (3, 9), "pixel_values": (64, 12), "image_grid_thw": (3, 3)}, 3),  # patches of all images
        ({"pixel_values": (2, 3, 8, 8)}, 2),
        ({"mask": (), "inputs_embeds": (4, 9, 16)}, 4),
    ],
    ids=str,
)
def test_num_rows(shapes: dict[str, tuple[int, ...]], rows: int):
    assert num_rows({name: torch.zeros(shape) for name, shape in shapes.items()}) == rows


def test_batches_of_nothing_but_padding(llama):
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "attention_mask": torch.zeros(2, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="'attention_mask' in batch 0 of the calibration data is 0 for all tokens"):
        load_calibration(SparseConfig(num_samples=2), llama, None, iter([batch]))


def test_token_ids_that_are_none(llama):
    with pytest.raises(ValueError, match="'input_ids' in item 0 of the calibration data must be a list or tensor"):
        load_calibration(SparseConfig(num_samples=2), llama, None, [{"input_ids": None}])
