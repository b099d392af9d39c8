"""Documents and tokens as windows written out by hand."""

import hashlib
import logging

import datasets
import numpy
import pytest
import torch

from optimum_sparse.calibration import load_calibration
from optimum_sparse.config import SparseConfig
from tests.helpers import VOCABULARY

from .helpers import DOCUMENTS, PAD, WINDOWS, load, rows, word_tokenizer, words, write_jsonl

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
