"""Calibration data against windows written out by hand; the Hub is a stub or truly out of reach."""

import hashlib
import itertools
import json
import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    T5EncoderModel,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperProcessor,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from optimum_sparse.calibration import Calibration, load_calibration
from optimum_sparse.config import SparseConfig
from tests.beyond_text import FRAMES, IMAGE_TOKEN, MELS, MODELS, random_model
from tests.helpers import VOCABULARY, tiny_model

PAD, BOS, EOS = 0, 1, 2
RATE = 16_000  # of sound, in Hz
DOCUMENTS = ["10 11 12", "13 14", "15 16 17 18"]
# The documents joined with EOS are 10 11 12 2 | 13 14 2 15 | 16 17 18: two windows of 4.
WINDOWS = [[10, 11, 12, EOS], [13, 14, EOS, 15]]


def word_tokenizer(template: str | None = None, eos: bool = True, sep: bool = False) -> PreTrainedTokenizerFast:
    """One token per word: the word "17" is token 17. `template` adds special tokens, as in "<s> $A </s>"."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words = Tokenizer(WordLevel(special | {str(number): number for number in range(3, 1000)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    if template:
        words.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>" if eos else None, sep_token="</s>" if sep else None
    )


def words(numbers) -> str:
    return " ".join(map(str, numbers))


def load(dataset, tokenizer=None, model=None, **options) -> Calibration:
    return load_calibration(SparseConfig(**options), model or tiny_model(), tokenizer or word_tokenizer(), dataset)


def rows(calibration: Calibration) -> list[list[int]]:
    return [row for batch in calibration.batches for row in batch["input_ids"].tolist()]


@pytest.fixture(scope="module")
def llama():
    return tiny_model()


# Packing


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (word_tokenizer(), WINDOWS),
        (word_tokenizer(eos=False), [[10, 11, 12, 13], [14, 15, 16, 17]]),
        (word_tokenizer(eos=False, sep=True), WINDOWS),
        (word_tokenizer("<s> $A"), [[1, 10, 11, 12], [2, 1, 13, 14], [2, 1, 15, 16]]),
        (word_tokenizer("$A </s>"), [[10, 11, 12, 2], [13, 14, 2, 15], [16, 17, 18, 2]]),
    ],
    ids=["eos", "no eos", "sep", "bos and eos between", "eos by the tokenizer"],
)
def test_documents_are_joined_and_cut_into_windows(llama, tokenizer, expected):
    calibration = load(DOCUMENTS, tokenizer, llama, seqlen=4, num_samples=len(expected))
    assert rows(calibration) == expected
    assert all(set(batch) == {"input_ids"} for batch in calibration.batches)
    assert calibration.batches[0]["input_ids"].dtype == torch.int64


def test_blank_documents_leave_nothing_behind(llama):
    texts = ["", DOCUMENTS[0], " \n", *DOCUMENTS[1:], ""]
    assert rows(load(texts, model=llama, seqlen=4, num_samples=2)) == WINDOWS


def test_record(llama):
    calibration = load(DOCUMENTS, model=llama, seqlen=4, num_samples=2, seed=7)
    digest = hashlib.sha256(numpy.array(WINDOWS, dtype="<i8").tobytes()).hexdigest()
    assert calibration.record == {
        "dataset": "3 texts",
        "num_samples": 2,
        "seqlen": 4,
        "num_tokens": 8,
        "seed": 7,
        "sha256": digest,
    }


def test_dataset_of_the_configuration_is_used(llama):
    config = SparseConfig(dataset=DOCUMENTS, seqlen=4, num_samples=2)
    assert rows(load_calibration(config, llama, word_tokenizer())) == WINDOWS


def test_choice_among_many_windows_is_random_and_in_order(llama):
    everything = [[3 + 2 * i, 4 + 2 * i] for i in range(40)]
    text = words(range(3, 83))

    def chosen(seed: int) -> list[list[int]]:
        return rows(load([text], model=llama, seqlen=2, num_samples=10, seed=seed))

    for seed in range(3):
        positions = [everything.index(row) for row in chosen(seed)]
        assert len(positions) == 10
        assert positions == sorted(set(positions))
        assert positions[-1] > 20  # not just the beginning
        assert chosen(seed) == chosen(seed)
    assert chosen(0) != chosen(1)


def test_fewer_windows_than_asked_are_announced(llama, caplog):
    with caplog.at_level(logging.WARNING, "optimum_sparse"):
        calibration = load(DOCUMENTS, model=llama, seqlen=4, num_samples=3)
    assert calibration.record["num_samples"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Calibrating on 2 samples instead of num_samples=3: 3 texts holds no more."
    ]


def test_enough_windows_are_no_reason_to_warn(llama, caplog):
    with caplog.at_level(logging.WARNING):
        load(DOCUMENTS, model=llama, seqlen=4, num_samples=2)
    assert not caplog.records


# One window per document


def test_a_window_from_each_long_document(llama):
    documents = [range(10, 16), range(20, 24), range(30, 37), range(40, 43)]  # only those of 6 and 7 words exceed 4
    starts = set()
    for seed in range(20):
        options = dict(seqlen=4, num_samples=2, seed=seed, pack_documents=False)
        first, second = rows(load([words(document) for document in documents], model=llama, **options))
        assert first == list(range(first[0], first[0] + 4))
        assert second == list(range(second[0], second[0] + 4))
        starts.add((first[0], second[0]))
    assert {first for first, _ in starts} == {10, 11, 12}
    assert {second for _, second in starts} == {30, 31, 32, 33}


def test_choice_among_many_long_documents(llama):
    documents = [words([number] * 5) for number in range(10, 50)]
    calibration = load(documents, model=llama, seqlen=4, num_samples=10, pack_documents=False)
    numbers = [row[0] for row in rows(calibration)]
    assert len(numbers) == 10
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 30


def test_too_few_long_documents(llama):
    with pytest.raises(ValueError, match=r"1 of 3 documents are longer than seqlen=3 .* num_samples=2"):
        load(DOCUMENTS, model=llama, seqlen=3, num_samples=2, pack_documents=False)


# Files and objects that hold texts


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


TEXT_ROWS = [{"id": index, "text": text, "url": "x"} for index, text in enumerate(DOCUMENTS)]
BODY_ROWS = [{"id": index, "body": text} for index, text in enumerate(DOCUMENTS)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("records", [TEXT_ROWS, BODY_ROWS], ids=["text column", "only string column"])
def test_rows_with_a_text_column(llama, tmp_path, kind, records):
    if kind == "jsonl":
        data, name = write_jsonl(tmp_path / "data.jsonl", records), "data.jsonl"
    elif kind == "parquet":
        data, name = tmp_path / "data.parquet", "data.parquet"
        datasets.Dataset.from_list(records).to_parquet(data)
    else:
        data, name = datasets.Dataset.from_list(records), "Dataset of 3 rows"
    calibration = load(data, model=llama, seqlen=4, num_samples=2)
    assert rows(calibration) == WINDOWS
    assert calibration.record["dataset"] == name


def test_column_of_a_file(llama, tmp_path):
    path = write_jsonl(tmp_path / "a.JSONL", [{"text": "99", "story": text} for text in DOCUMENTS])
    assert rows(load(f"{path}:story", model=llama, seqlen=4, num_samples=2)) == WINDOWS


def test_text_file_is_one_document(llama, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    calibration = load(str(path), model=llama, seqlen=4, num_samples=2)
    assert rows(calibration) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert calibration.record["dataset"] == "data.txt"  # not the folders of this machine


@pytest.mark.parametrize(("suffix", "text"), [("", "text"), (":::story", "story")], ids=["text", "a column"])
def test_folder_of_a_dataset(llama, tmp_path, suffix, text):
    folder = tmp_path / "stories"
    folder.mkdir()
    write_jsonl(folder / "data.jsonl", [{"text": words([n] * 4), "story": words([n + 50] * 4)} for n in range(3, 9)])
    calibration = load(f"{folder}{suffix}", word_tokenizer(eos=False), llama, seqlen=4, num_samples=6)
    first = 3 if text == "text" else 53
    assert sorted(rows(calibration)) == [[n] * 4 for n in range(first, first + 6)]
    assert calibration.record["dataset"] == f"stories{suffix}"


def test_iterable_dataset_is_shuffled_and_read_as_far_as_needed(llama):
    def endless() -> Iterator[dict[str, str]]:
        yield from ({"text": words([3 + index % 100] * 4)} for index in itertools.count())

    stream = datasets.IterableDataset.from_generator(endless)
    first, again, other = (
        rows(load(stream, word_tokenizer(eos=False), llama, seqlen=4, num_samples=30, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert [row[0] for row in first] != list(range(3, 33))
    assert len(first) == 30
    assert all(len(set(row)) == 1 for row in first)


def test_long_documents_of_an_endless_stream(llama):
    def endless() -> Iterator[dict[str, str]]:
        yield from ({"text": words([3 + index % 100] * (3 + index % 2 * 5))} for index in itertools.count())

    stream = datasets.IterableDataset.from_generator(endless)
    calibration = load(stream, model=llama, seqlen=4, num_samples=30, pack_documents=False)
    assert len(rows(calibration)) == 30
    assert all(len(set(row)) == 1 and row[0] % 2 == 0 for row in rows(calibration))  # only odd indices are long


# Hub


class HubStub:
    """Stands in for `datasets.load_dataset`: notes how it was called and returns `rows`."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.calls: list[tuple] = []

    def __call__(self, path, **options):
        self.calls.append((path, options))
        data = datasets.Dataset.from_list(self.rows)
        return data.to_iterable_dataset() if options.get("streaming") else data


@pytest.fixture
def hub(monkeypatch):
    def install(rows: list[dict]) -> HubStub:
        stub = HubStub(rows)
        monkeypatch.setattr(datasets, "load_dataset", stub)
        return stub

    return install


def test_c4_is_the_shard_of_the_papers_and_streamed(llama, hub):
    stub = hub([{"text": words([number] * 4), "url": "x"} for number in range(3, 103)])
    tokenizer = word_tokenizer(eos=False)
    calibration = load(None, tokenizer, llama, seqlen=4, num_samples=5)
    shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert stub.calls == [("allenai/c4", {"data_files": shard, "split": "train", "streaming": True})]
    assert calibration.record["dataset"] == "c4"
    first = [row[0] for row in rows(calibration)]
    assert len(set(first)) == 5
    assert first != sorted(first)  # shuffled
    assert rows(load("c4", tokenizer, llama, seqlen=4, num_samples=5, seed=1)) != rows(calibration)


def test_wikitext_is_one_text(llama, hub):
    stub = hub([{"text": ""}, {"text": " 10 11 \n"}, {"text": " 12 13 14 \n"}])
    calibration = load("wikitext2", word_tokenizer("<s> $A"), llama, seqlen=3, num_samples=2)
    assert stub.calls == [("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"})]
    assert rows(calibration) == [[BOS, 10, 11], [12, 13, 14]]


def test_wikitext_lines_are_joined_as_in_the_papers(llama, hub):
    hub([{"text": "10"}, {"text": "11"}])
    seen = []

    class Spy(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            seen.append(text)
            return super().__call__(text, **options)

    tokenizer = Spy(tokenizer_object=word_tokenizer().backend_tokenizer, eos_token="</s>")
    load("wikitext2", tokenizer, llama, seqlen=2, num_samples=1)
    assert seen == ["10\n\n11"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("me/data", {"name": None, "split": "train"}),
        ("me/data:small", {"name": "small", "split": "train"}),
        ("me/data:small:validation", {"name": "small", "split": "validation"}),
        ("me/data::validation:body", {"name": None, "split": "validation"}),
        ("allenai/c4:en:validation", {"name": "en", "split": "validation"}),
    ],
)
def test_any_hub_dataset(llama, hub, name, options):
    stub = hub([{"body": words(range(10, 14))}])
    calibration = load(name, model=llama, seqlen=4, num_samples=1)
    assert stub.calls == [(name.split(":")[0], {**options, "streaming": True})]
    assert rows(calibration) == [[10, 11, 12, 13]]
    assert calibration.record["dataset"] == name


def test_hub_dataset_of_tokens(llama, hub):
    hub([{"input_ids": [5, 6, 7]}])
    assert rows(load("me/tokens", model=llama, num_samples=1)) == [[5, 6, 7]]


@pytest.mark.parametrize("name", ["me/data", "me/data:default:train:title"])
def test_unclear_or_unknown_column_on_the_hub(llama, hub, name):
    hub([{"question": "10 11", "answer": "12", "score": 3}])
    with pytest.raises(ValueError, match=r"olumn.*\[question, answer, score\]"):
        load(name, model=llama)


@pytest.mark.parametrize("name", ["c4", "wikitext2", "me/data"])
def test_hub_out_of_reach(llama, name):
    """HF_HUB_OFFLINE=1 is set for all tests."""
    with pytest.raises(OSError, match=r"from the Hub .*\.txt, \.jsonl or \.parquet file, a list of strings, .*'self'"):
        load(name, model=llama)


def test_connection_lost_while_streaming(llama, monkeypatch):
    from huggingface_hub.utils import httpx

    def lost():
        yield {"text": "10 11"}
        raise httpx.ReadError("connection reset")

    stream = datasets.IterableDataset.from_generator(lost)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(OSError, match=r"'allenai/c4' from the Hub \(ReadError: connection reset\).*'self'"):
        load("c4", model=llama)


# Tokens


def test_token_dicts_keep_order_lengths_and_masks(llama):
    data = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": torch.tensor([8, 9, 10], dtype=torch.int32)},
        {"input_ids": [[11, 12, 13], [14, 15, 16]]},
        {"input_ids": torch.tensor([[17, 18, PAD], [PAD, 19, 20]]), "attention_mask": [[1, 1, 0], [0, 1, 1]]},
        {"input_ids": [21, 22], "attention_mask": torch.tensor([True, True])},
    ]
    calibration = load(data, model=llama, batch_size=3, num_samples=7)
    assert [{name: value.tolist() for name, value in batch.items()} for batch in calibration.batches] == [
        {"input_ids": [[5, 6, 7], [8, 9, 10], [11, 12, 13]]},
        {"input_ids": [[14, 15, 16]]},
        {"input_ids": [[17, 18, PAD], [PAD, 19, 20]], "attention_mask": [[1, 1, 0], [0, 1, 1]]},
        {"input_ids": [[21, 22]], "attention_mask": [[1, 1]]},
    ]
    assert all(value.dtype == torch.int64 for batch in calibration.batches for value in batch.values())
    assert calibration.record["num_samples"] == 7
    assert calibration.record["num_tokens"] == 3 * 4 + 2 * 2 + 2
    assert calibration.record["seqlen"] == 3
    assert calibration.record["dataset"] == "5 token dicts"


def test_token_dicts_up_to_num_samples(llama):
    data = [{"input_ids": [[5, 6], [7, 8]]}, {"input_ids": [[9, 10], [11, 12]]}]
    assert rows(load(data, model=llama, num_samples=3)) == [[5, 6], [7, 8], [9, 10]]


def test_output_of_a_tokenizer(llama):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "<pad>"
    encoded = tokenizer(["10 11 12", "13"], padding=True, return_tensors="pt")
    (batch,) = load(encoded, model=llama, num_samples=2).batches
    assert batch["input_ids"].tolist() == [[10, 11, 12], [13, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("kind", ["dataset", "torch", "stream", "jsonl"])
def test_rows_with_input_ids(llama, tmp_path, kind):
    records = [{"input_ids": [5, 6, PAD], "attention_mask": [1, 1, 0], "text": "10"}, {"input_ids": [7, 8, 9]}]
    records[1] |= {"attention_mask": [1, 1, 1], "text": "11"}
    data = datasets.Dataset.from_list(records)
    if kind == "torch":
        data = data.with_format("torch")
    elif kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "jsonl":
        data = write_jsonl(tmp_path / "tokens.jsonl", records)
    (batch,) = load_calibration(SparseConfig(num_samples=2), llama, None, data).batches
    assert batch["input_ids"].tolist() == [[5, 6, PAD], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_stream_of_tokens_keeps_its_order(llama):
    stream = datasets.Dataset.from_dict({"input_ids": [[5, 6, number] for number in range(20)]}).to_iterable_dataset()
    assert [row[2] for row in rows(load(stream, model=llama, num_samples=12))] == list(range(12))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"ids": [5]}, r"no 'input_ids' in item 1 .*\[ids\]"),
        ({"input_ids": []}, r"'input_ids' in item 1 .* must be integers \[tokens\] or \[rows, tokens\], got \[0\]"),
        ({"input_ids": [0.5]}, r"must be integers .* got \[1\] of torch\.float32"),
        ({"input_ids": [[[5]]]}, r"must be integers .* got \[1, 1, 1\]"),
        ({"input_ids": [[5, 6], [7]]}, r"rows of one length"),
        ({"input_ids": "10 11"}, r"must be a list or tensor"),
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            r"'attention_mask' in item 1 .* is \[1, 1\], but .* is \[1, 2\]",
        ),
        ({"input_ids": [5, 6], "attention_mask": [1, 2]}, r"'attention_mask' in item 1 .* must be 0 .* 1"),
        ({"input_ids": [[5], [6]], "attention_mask": [[1], [0]]}, r"at least one token of each row"),
        ({"input_ids": [5, VOCABULARY]}, rf"Token id {VOCABULARY} is outside of the model's vocabulary"),
        ({"input_ids": [5, -1]}, r"Token id -1 is outside"),
        ({"input_ids": [5] * 129}, r"has 129 tokens, but the model supports 128"),
    ],
)
def test_bad_token_dicts(llama, item, message):
    with pytest.raises(ValueError, match=message):
        load([{"input_ids": [5]}, item], model=llama)


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


# Processors


class Pixels(ImageProcessingMixin):
    """Cuts images of 20 x 24 pixels, `[20, 24, 3]`, to 16 x 16; unlike Transformers' own, without Pillow."""

    model_input_names = ("pixel_values",)

    def __call__(self, images, scale=255, return_tensors=None):
        images = torch.from_numpy(numpy.asarray(images).reshape(-1, 20, 24, 3))
        pixels = (images[:, :16, :16] / scale).permute(0, 3, 1, 2).float()
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def random_images(count: int) -> numpy.ndarray:
    return numpy.random.RandomState(0).randint(0, 256, (count, 20, 24, 3), dtype=numpy.uint8)


def whisper_processor() -> WhisperProcessor:
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, hop_length=RATE // FRAMES)
    return WhisperProcessor(extractor, word_tokenizer())


def test_images_by_an_image_processor():
    model, _ = MODELS["vit"]()
    images = random_images(4)
    items = [{"images": images[0]}, {"images": list(images[1:3])}, {"images": images[3]}]
    calibration = load_calibration(SparseConfig(num_samples=3), model, Pixels(), items)
    expected = torch.from_numpy(images[:3, :16, :16] / 255).permute(0, 3, 1, 2).float()
    assert [len(batch["pixel_values"]) for batch in calibration.batches] == [1, 2]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in calibration.batches]), expected)
    assert calibration.record["dataset"] == "3 items"
    assert calibration.record["num_samples"] == 3
    assert json.loads(json.dumps(calibration.record)) == calibration.record
    assert model(**calibration.batches[0]).logits.isfinite().all()


def test_images_by_a_processor_of_transformers():
    pytest.importorskip("PIL", reason="the image processors of Transformers need Pillow")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model, _ = MODELS["vit"]()
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = random_images(2)
    calibration = load_calibration(
        SparseConfig(num_samples=2), model, processor, [{"images": image} for image in images]
    )
    expected = processor(images=list(images), return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in calibration.batches]), expected)
    assert model(**calibration.batches[0]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["dataset", "stream", "jsonl"])
def test_rows_with_images(tmp_path, kind):
    model, _ = MODELS["vit"]()
    images = random_images(2)
    data = datasets.Dataset.from_list([{"images": image.tolist(), "scale": 255} for image in images])
    if kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "jsonl":
        data = write_jsonl(tmp_path / "data.jsonl", list(data))
    calibration = load_calibration(SparseConfig(num_samples=2), model, Pixels(), data)
    found = torch.cat([batch["pixel_values"] for batch in calibration.batches])
    expected = Pixels()(list(images), return_tensors="pt")["pixel_values"]
    assert sorted(found.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())  # a stream is shuffled


def test_sound_and_text_by_a_processor():
    model, _ = MODELS["whisper"]()
    processor = whisper_processor()
    sound = numpy.sin(numpy.arange(4000) / 7).astype(numpy.float32)
    item = {"audio": sound, "sampling_rate": RATE, "text": "10 11 12"}
    calibration = load_calibration(SparseConfig(num_samples=1), model, processor, item)
    (batch,) = calibration.batches
    expected = processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"], expected)
    assert expected.shape == (1, MELS, FRAMES)
    assert batch["labels"].tolist() == [[10, 11, 12]]
    assert "decoder" not in calibration.record
    assert model(**batch).loss.isfinite()


def test_sound_without_text_leaves_the_decoder_without_inputs():
    model, _ = MODELS["whisper"]()
    item = {"raw_speech": numpy.zeros(4000), "sampling_rate": RATE}
    extractor = whisper_processor().feature_extractor
    with pytest.raises(ValueError, match=r"Batch 0 .* nothing for the decoder of Whisper.*\[input_features\].*'text'"):
        load_calibration(SparseConfig(num_samples=1), model, extractor, [item])


def test_what_a_processor_makes_has_the_type_of_the_model():
    model = MODELS["vit"]()[0].bfloat16()
    calibration = load_calibration(SparseConfig(num_samples=1), model, Pixels(), {"images": random_images(1)[0]})
    assert calibration.batches[0]["pixel_values"].dtype == torch.bfloat16
    assert model(**calibration.batches[0]).logits.isfinite().all()


def test_text_with_a_processor(llama):
    processor = whisper_processor()
    for data in (DOCUMENTS, datasets.Dataset.from_list(TEXT_ROWS)):
        assert rows(load_calibration(SparseConfig(seqlen=4, num_samples=2), llama, processor, data)) == WINDOWS
    with pytest.raises(ValueError, match=r"\(3 texts\) are text, but Pixels has no tokenizer"):
        load_calibration(SparseConfig(), llama, Pixels(), DOCUMENTS)


def test_ready_batches_are_not_processed():
    model, batches = MODELS["vit"]()
    calibration = load_calibration(SparseConfig(num_samples=6), model, Pixels(), batches)
    assert all(
        batch["pixel_values"].equal(given["pixel_values"])
        for batch, given in zip(calibration.batches, batches, strict=True)
    )
    assert rows(load_calibration(SparseConfig(), tiny_model(), whisper_processor(), {"input_ids": [5, 6]})) == [[5, 6]]


@pytest.mark.parametrize(
    ("item", "cause", "message"),
    [
        ({"image": 1}, TypeError, r"keys \[image\] \(TypeError: .*'image'.*\(images, scale, return_tensors\): rename"),
        ({"images": "?"}, ValueError, r"keys \[images\] \("),
        ({"images": numpy.zeros((20, 24, 3)), "return_tensors": "np"}, TypeError, r"multiple values"),
    ],
)
def test_item_that_the_processor_refuses(item, cause, message):
    model, _ = MODELS["vit"]()
    data = [{"images": random_images(1)[0]}, item]
    with pytest.raises(ValueError, match=rf"(?s)Pixels refuses item 1 of the calibration data, .*{message}") as caught:
        load_calibration(SparseConfig(), model, Pixels(), data)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(("key", "value"), [("image", "photo.png"), ("picture", [1])])
def test_what_a_processor_would_ignore_is_refused(key, value):
    """Those of Transformers take any keyword, and go on without it if they do not know it."""

    class Both(ProcessorMixin):
        model_input_names = ("input_ids", "pixel_values")

        def __init__(self):
            self.seen = []

        def __call__(self, images=None, text=None, return_tensors=None, **options):
            self.seen.append(options)
            return {"input_ids": torch.tensor([[5, 6]]), "pixel_values": torch.ones(1, 3)}

    processor, options = Both(), {"padding": True, "size": {"height": 2}, "suffix": "10"}
    data = [{"text": "10", "images": [1], **options}, {"text": "11", key: value}]
    with pytest.raises(
        ValueError, match=rf"item 1 .* no argument '{key}'\).* \(images, text, return_tensors\): rename"
    ):
        load_calibration(SparseConfig(), tiny_model(), processor, data)
    assert processor.seen == [options]


def test_images_without_a_processor(llama):
    with pytest.raises(ValueError, match=r"no 'input_ids' in item 0 .* \[images\]: .* the model's processor"):
        load([{"images": random_images(1)[0].tolist()}], model=llama)
    with pytest.raises(ValueError, match=r"0 of \[images\] hold strings.* processor instead"):
        load(datasets.Dataset.from_dict({"images": [[1]]}), model=llama)


# Encoders and decoders


def shifted(row: list[int], start: int) -> list[int]:
    return [start, *row[:-1]]


@pytest.mark.parametrize(("name", "start"), [("t5", 0), ("bart", 2)])
@pytest.mark.parametrize(
    "data", [DOCUMENTS, [{"input_ids": row} for row in WINDOWS], "DataLoader"], ids=["texts", "tokens", "DataLoader"]
)
def test_decoder_reads_the_windows_shifted_right(name, start, data):
    model, _ = MODELS[name]()
    given = {"input_ids": torch.tensor(WINDOWS)}
    calibration = load(iter([given]) if data == "DataLoader" else data, model=model, seqlen=4, num_samples=2)
    (batch,) = calibration.batches
    assert batch["input_ids"].tolist() == WINDOWS
    assert batch["decoder_input_ids"].tolist() == [shifted(row, start) for row in WINDOWS]
    assert calibration.record["decoder"] == "the windows themselves, shifted right"
    assert calibration.record["num_tokens"] == 8
    assert set(given) == {"input_ids"}  # the user's own batch is left alone
    # By the model itself: BART from the input, T5 from labels.
    own = model(**given) if name == "bart" else model(**given, labels=given["input_ids"])
    assert torch.equal(model(**batch).logits, own.logits)


def test_decoder_of_a_model_that_cannot_shift():
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(vocab_size=VOCABULARY, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32)
    config = AutoConfig.for_model("m2m_100", decoder_start_token_id=2, **sizes)
    model = random_model(lambda: AutoModelForSeq2SeqLM.from_config(config))
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    (batch,) = load(DOCUMENTS, model=model, seqlen=4, num_samples=2).batches
    assert batch["decoder_input_ids"].tolist() == [shifted(row, 2) for row in WINDOWS]
    assert model(**batch).logits.isfinite().all()
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"M2M100.* has no config.decoder_start_token_id .* 'decoder_input_ids'"):
        load(DOCUMENTS, model=model, seqlen=4, num_samples=2)


def test_tokens_for_the_decoder_are_kept():
    model, batches = MODELS["t5"]()
    data = [
        {"input_ids": [5, 6, 7], "labels": [8, 9], "token_type_ids": [0, 0, 0]},
        {"input_ids": [[10, 11, 12]], "labels": [[13, -100]]},
        {"input_ids": [14, 15, 16], "labels": [17]},
        {"input_ids": [18, 19, 20], "attention_mask": [1, 1, 0], "decoder_input_ids": [0, 21]},
    ]
    calibration = load(data, model=model, num_samples=4)
    assert [{name: value.tolist() for name, value in batch.items()} for batch in calibration.batches] == [
        {"input_ids": [[5, 6, 7], [10, 11, 12]], "labels": [[8, 9], [13, -100]]},
        {"input_ids": [[14, 15, 16]], "labels": [[17]]},
        {"input_ids": [[18, 19, 20]], "attention_mask": [[1, 1, 0]], "decoder_input_ids": [[0, 21]]},
    ]
    assert "decoder" not in calibration.record
    assert all(model(**batch).logits.isfinite().all() for batch in calibration.batches)
    calibration = load_calibration(SparseConfig(num_samples=6), model, None, iter(batches))
    assert all(batch["decoder_input_ids"].shape == (2, 16) for batch in calibration.batches)
    with pytest.raises(ValueError, match=r"'labels' in item 0 .* has 1 rows, but 'input_ids' has 2"):
        load({"input_ids": [[5, 6], [7, 8]], "labels": [9, 10]}, model=model)


def test_encoder_alone_needs_nothing_for_a_decoder():
    model = T5EncoderModel(MODELS["t5"]()[0].config)
    calibration = load(DOCUMENTS, model=model, seqlen=4, num_samples=2)
    assert set(calibration.batches[0]) == {"input_ids"}
    assert "decoder" not in calibration.record
    whisper, batches = MODELS["whisper"]()
    model = WhisperForAudioClassification(whisper.config)
    assert model.config.is_encoder_decoder
    data = [{"input_features": batch["input_features"]} for batch in batches]
    calibration = load_calibration(SparseConfig(num_samples=6), model, None, data)
    assert all(set(batch) == {"input_features"} for batch in calibration.batches)


def test_positions_of_roberta_are_counted_from_behind_padding():
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, pad_token_id=1)
    config = AutoConfig.for_model("roberta", max_position_embeddings=34, num_attention_heads=2, **sizes)
    model = random_model(lambda: AutoModelForMaskedLM.from_config(config))
    calibration = load([words([7] * 40)], word_tokenizer(eos=False, sep=True), model, num_samples=1)
    assert calibration.record["seqlen"] == 32
    assert model(**calibration.batches[0]).logits.shape == (1, 32, VOCABULARY)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, 33), 7))


# Text by the model itself


def sample_by_hand(model, prefix: list[int], seqlen: int, seed: int) -> list[int]:
    """Sample with top-p 0.95 and without EOS, running the whole text through the model for every token."""
    ids = list(prefix)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        while len(ids) < seqlen:
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            logits[EOS] = -torch.inf
            likely, order = logits.softmax(0).sort(descending=True)
            kept = order[: int((likely.cumsum(0) < 0.95).sum()) + 1]
            probabilities = torch.zeros(len(logits), dtype=torch.float64)
            probabilities[kept] = logits[kept].softmax(0)
            ids.append(int(torch.multinomial(probabilities.float(), 1)))
    return ids


def test_self_generated_text_is_sampled_from_the_model():
    model = tiny_model()
    # What the authors chose for chatting must not matter.
    model.generation_config.update(do_sample=False, temperature=0.1, top_k=3, top_p=0.2, repetition_penalty=9.0)
    calibration = load_calibration(SparseConfig(dataset="self", seqlen=40, num_samples=1, seed=5), model)
    assert rows(calibration) == [sample_by_hand(model, [BOS], 40, seed=5)]
    assert len(set(rows(calibration)[0])) > 15
    assert calibration.record["dataset"] == "self"
    assert calibration.record["generation"] == {"temperature": 1.0, "top_p": 0.95}
    assert json.loads(json.dumps(calibration.record)) == calibration.record


def test_self_generated_windows_are_full_and_differ(llama, caplog):
    with caplog.at_level(logging.WARNING):
        calibration = load_calibration(SparseConfig(seqlen=48, num_samples=12), llama, dataset="self")
    windows = rows(calibration)
    assert len({tuple(window) for window in windows}) == 12
    assert all(len(window) == 48 and window[0] == BOS and EOS not in window for window in windows)
    assert not caplog.records
    other_seed = rows(load_calibration(SparseConfig(seqlen=48, num_samples=12, seed=1), llama, dataset="self"))
    assert windows != other_seed


def test_self_generated_text_in_several_steps(llama, monkeypatch):
    monkeypatch.setattr("optimum_sparse.calibration.generation.TOKENS_AT_ONCE", 80)  # two windows of 40
    calls = []
    generate = type(llama).generate
    monkeypatch.setattr(
        type(llama), "generate", lambda self, ids, **options: calls.append(len(ids)) or generate(self, ids, **options)
    )
    windows = rows(load_calibration(SparseConfig(seqlen=40, num_samples=5), llama, dataset="self"))
    assert calls == [2, 2, 1]
    assert len({tuple(window) for window in windows}) == 5


def test_generation_shows_how_far_it_is(llama, monkeypatch, capsys):
    class Closed(tqdm):
        def close(self) -> None:
            counts.add((self.n, self.total))
            super().close()

    counts: set[tuple[int, int]] = set()
    monkeypatch.setattr("optimum_sparse.calibration.generation.tqdm", Closed)
    config = SparseConfig(dataset="self", seqlen=40, num_samples=5)
    shown = load_calibration(config, llama, progress=True)
    assert counts == {(5 * 39, 5 * 39)}
    assert "Generating text to calibrate on" in capsys.readouterr().err
    assert rows(shown) == rows(load_calibration(config, llama))
    assert not capsys.readouterr().err


def test_self_generated_text_without_bos():
    model = tiny_model(bos_token_id=None, eos_token_id=[2, 5])
    first = {row[0] for row in rows(load("self", model=model, seqlen=2, num_samples=2000))}
    assert first == set(range(VOCABULARY)) - {PAD, 2, 5}


def test_self_generated_text_from_prefixes(llama, tmp_path):
    path = tmp_path / "start.txt"
    path.write_text(words(range(10, 10 + 3 * 8 + 5)), encoding="utf-8")
    calibration = load(f"self:{path}", model=llama, seqlen=12, num_samples=3)
    assert [row[:8] for row in rows(calibration)] == [list(range(start, start + 8)) for start in (10, 18, 26)]
    assert all(len(row) == 12 for row in rows(calibration))
    assert calibration.record["dataset"] == "self:start.txt"
    one = load(f"self:{path}", model=llama, seqlen=12, num_samples=1)
    assert rows(one) == [sample_by_hand(llama, rows(one)[0][:8], 12, seed=0)]


def test_self_generation_that_cannot_be(llama, tmp_path):
    start = tmp_path / "start.txt"
    start.write_text(words(range(3, 30)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"can generate text, got LlamaModel.*AutoModelForCausalLM"):
        load("self", model=AutoModel.from_config(llama.config).eval(), seqlen=8)
    for name in ("t5", "bert", "whisper", "vit", "plain"):
        model, _ = MODELS[name]()
        with pytest.raises(ValueError, match=rf"decoder-only model .* got {type(model).__name__}: .* give texts"):
            load("self", model=model, seqlen=8)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        load("self", model=tiny_model().train(), seqlen=8)
    with pytest.raises(ValueError, match=r"seqlen to be at least 2 here, got 1"):
        load("self", model=llama, seqlen=1)
    with pytest.raises(ValueError, match=r"seqlen to be at least 9 here, got 8"):
        load(f"self:{start}", model=llama, seqlen=8)
    with pytest.raises(ValueError, match=r"needs a tokenizer"):
        load_calibration(SparseConfig(), llama, None, f"self:{start}")
    with pytest.raises(ValueError, match=r"must name texts .* got self"):
        load("self:self", model=llama)
    start.write_text(words(range(120, 140)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"Token id 1\d\d is outside of the model's vocabulary"):
        load(f"self:{start}", model=llama, num_samples=2)


# Length, batch size, randomness


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
        "from tests.test_calibration import *\n"
        "for data in ('self', [words(range(3, 100))], STREAM):\n"
        "    print(load(data, seqlen=16, num_samples=3, seed=11).record['sha256'])"
    )
    root = Path(__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    here = [
        load(data, model=llama, seqlen=16, num_samples=3, seed=11).record["sha256"]
        for data in ("self", [words(range(3, 100))], STREAM)
    ]
    assert other.stdout.split() == here
    assert len(set(here)) == 3


# Bad input


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, r"empty list"),
        ([" ", "\n"], ValueError, r"hold no text"),
        (["10 11 12"], ValueError, r"hold 3 tokens, less than one window of 4: .* seqlen to at most 3"),
        (["10", {"input_ids": [5]}], TypeError, r"only strings, or only dicts with input_ids, got: dict, str"),
        ([[5, 6]], TypeError, r"got: list\. Write token ids as \{'input_ids': ids\}"),
        (7, TypeError, r"cannot be of type int"),
        ("a:b:c:d:e", ValueError, r"path\[:config\[:split\[:column\]\]\], got 'a:b:c:d:e'"),
        (" ", ValueError, r"path\[:config"),
        ("nowhere/data.txt", FileNotFoundError, r"no calibration file 'nowhere/data\.txt'"),
        ("nowhere/data.jsonl:text", FileNotFoundError, r"no calibration file 'nowhere/data\.jsonl'"),
        (datasets.Dataset.from_dict({"text": []}), ValueError, r"Dataset of 0 rows\) hold no rows"),
        (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), ValueError, r"2 of \[a, b\] hold strings"),
        (datasets.Dataset.from_dict({"a": [1]}), ValueError, r"0 of \[a\] hold strings"),
        (datasets.Dataset.from_dict({"text": ["10", None]}), ValueError, r"'text' is NoneType in row 1"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["10"]})), ValueError, r"only \[train\]"),
    ],
)
def test_bad_data(llama, dataset, error, message):
    with pytest.raises(error, match=message):
        load(dataset, model=llama, seqlen=4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"hold no text"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt' is not UTF-8 text"),
        ("a.txt:body", b"10 11", r"'a\.txt' is plain text and has no column 'body'"),
        ("a.jsonl", b"", r"a\.jsonl\) hold no rows"),
        ("a.jsonl", b'{"text": "10"}\n\n{"text": \n', r"a\.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", b'["10"]', r"a\.jsonl, line 1 must be a JSON object, got list"),
        ("a.jsonl", b'{"text": "10"}\n{"body": "11"}', r"'text' is not among \[body\] in row 1"),
        ("a.jsonl:body", b'{"text": "10"}', r"'body' is not among \[text\] in row 0"),
        ("a.jsonl:number", b'{"text": "10", "number": 3}', r"'number' is int in row 0"),
        ("a.jsonl", b'{"title": "10", "body": "11"}', r"2 of \[title, body\] hold strings"),
        ("a.parquet", b"10 11", r"a\.parquet' is not a parquet file"),
        ("a.csv", b"text\n10", r"unknown kind: use \.txt, \.jsonl or \.parquet"),
    ],
)
def test_bad_files(llama, tmp_path, name, content, message):
    (tmp_path / name.split(":")[0]).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / name), model=llama, seqlen=4)


def test_text_without_a_tokenizer(llama):
    with pytest.raises(ValueError, match=r"3 texts\) are text, which needs a tokenizer: pass that of the model"):
        load_calibration(SparseConfig(dataset=DOCUMENTS), llama)


def test_tokenizer_of_another_model(llama):
    with pytest.raises(ValueError, match=rf"Token id 500 .* vocabulary of {VOCABULARY} ids: use the tokenizer"):
        load([words([10, 500, 11, 12])], model=llama, seqlen=4)
