"""Batches of tokens taken apart: what belongs to a row or a token stays with it."""

import pytest
import torch

from optimum_sparse.calibration.batches import holds_tokens, shortened, split_rows

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
