"""Length, batch size, and randomness."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from optimum_sparse.calibration.interface import without_cache
from tests.architectures import sweep_model
from tests.helpers import VOCABULARY, tiny_model

from .helpers import DOCUMENTS, load, words


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("llama", {}, 128),
        ("llama", {"max_position_embeddings": 4096}, 2048),
        ("gpt2", {}, 128),  # n_positions
        ("mpt", {}, 128),  # max_seq_len
        ("bloom", {}, 2048),  # does not say
    ],
)
def test_default_seqlen(architecture, options, expected):
    calibration = load([words([7] * 2100)], model=tiny_model(architecture, **options), num_samples=1)
    assert calibration.record["seqlen"] == expected


def test_seqlen_of_a_model_with_a_text_part():
    text = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    vision |= dict(patch_size=14)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config)
    assert load([words([7] * 100)], model=model, num_samples=1).record["seqlen"] == 64
    with pytest.raises(ValueError, match=r"seqlen=65 is longer than the 64 tokens"):
        load([words([7] * 100)], model=model, seqlen=65)


def test_seqlen_longer_than_the_model_supports(llama):
    with pytest.raises(ValueError, match=r"seqlen=129 is longer than the 128 tokens that the model supports"):
        load(DOCUMENTS, model=llama, seqlen=129)


@pytest.mark.parametrize(
    ("device", "seqlen", "batch_size", "expected"),
    [
        ("cpu", 64, None, [32, 32, 6]),
        ("cpu", 100, None, [20, 20, 20, 10]),
        ("cpu", 3000, None, [1] * 3),
        ("cuda", 128, None, [70]),
        ("cuda", 3000, None, [3]),
        ("cuda", 6000, None, [2, 1]),
        ("cpu", 64, 50, [50, 20]),
        ("cuda", 6000, 1, [1, 1, 1]),
    ],
)
def test_batch_size(monkeypatch, device, seqlen, batch_size, expected):
    model = tiny_model(max_position_embeddings=8192)
    monkeypatch.setattr("optimum_sparse.calibration.execution_device", lambda model: torch.device(device))
    total = sum(expected)
    calibration = load(
        [words([7] * (seqlen * total))], model=model, seqlen=seqlen, batch_size=batch_size, num_samples=total
    )
    assert [len(batch["input_ids"]) for batch in calibration.batches] == expected
    assert {batch["input_ids"].device.type for batch in calibration.batches} == {"cpu"}


STREAM = datasets.Dataset.from_dict({"text": [words([number] * 9) for number in range(3, 60)]}).to_iterable_dataset()


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ([words(range(3, 100))], {}),
        ([words(range(3, 100))] * 9, {"pack_documents": False}),
        (STREAM, {}),
        ("self", {}),
    ],
    ids=["packed", "one per document", "stream", "self"],
)
def test_global_random_state_is_neither_read_nor_changed(llama, dataset, options):
    def state():
        return (
            random.getstate(),
            [part.tolist() for part in numpy.random.get_state()[1:2]],
            torch.get_rng_state().tolist(),
        )

    options = dict(options, seqlen=8, num_samples=4)
    torch.manual_seed(1)
    before = state()
    first = load(dataset, model=llama, **options)
    assert state() == before
    torch.manual_seed(2)
    random.seed(2)
    numpy.random.seed(2)
    assert load(dataset, model=llama, **options).record["sha256"] == first.record["sha256"]


def test_same_seed_gives_the_same_bits_in_another_process(llama):
    code = (
        "from tests.calibration.test_interface import *\n"
        "for data in ('self', [words(range(3, 100))], STREAM):\n"
        "    print(load(data, seqlen=16, num_samples=3, seed=11).record['sha256'])"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    here = [
        load(data, model=llama, seqlen=16, num_samples=3, seed=11).record["sha256"]
        for data in ("self", [words(range(3, 100))], STREAM)
    ]
    assert other.stdout.split() == here
    assert len(set(here)) == 3


class Config:
    def __init__(self, text: object) -> None:
        self.text = text

    def get_text_config(self) -> object:
        return self.text


@pytest.mark.parametrize(
    ("forward", "text", "has"),
    [
        (lambda input_ids, use_cache=None: None, None, True),
        (lambda input_ids, **others: None, SimpleNamespace(use_cache=True), True),
        (lambda input_ids, **others: None, SimpleNamespace(), False),
        (lambda input_ids: None, SimpleNamespace(use_cache=True), False),
        (lambda input_ids, **others: None, None, False),
    ],
)
def test_models_that_may_keep_a_cache(forward: object, text: object, has: bool):
    model = SimpleNamespace(forward=forward, config=None if text is None else Config(text))
    assert without_cache(model) == ({"use_cache": False} if has else {})


@pytest.mark.parametrize("name", ["granitemoe", "llama"])
def test_no_cache_is_kept(name: str):
    model = tiny_model("llama") if name == "llama" else sweep_model(name)
    ids = torch.ones(1, 4, dtype=torch.int64)
    assert model(input_ids=ids).past_key_values is not None
    assert model(input_ids=ids, **without_cache(model)).past_key_values is None
