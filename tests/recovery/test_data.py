"""Rows in TRL's formats, against what TRL and the tokenizer make of them."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from optimum_sparse.recovery.data import PadRight, read_rows, tokenize_rows
from tests.checkpoints import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_is_joined_with_eos_and_cut(tokenizer):
    examples = tokenize_rows([{"text": "abcde"}, {"text": "fgh"}], tokenizer, 4)
    whole = [*ids(tokenizer, "abcde"), 2, *ids(tokenizer, "fgh"), 2]
    assert [e["input_ids"] for e in examples] == [whole[:4], whole[4:8]]  # a rest of two tokens is dropped
    assert all(e["labels"] == e["input_ids"] for e in examples)


@pytest.mark.parametrize("row", [{"text": "abcde"}, {"prompt": "ab", "completion": "cde"}], ids=["text", "prompt"])
def test_tokenizers_that_end_texts_themselves(tokenizer, row):
    expected = tokenize_rows([row, row], tokenizer, 6)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 2)])
    assert tokenizer("ab")["input_ids"][-1] == 2
    assert tokenize_rows([row, row], tokenizer, 6) == expected
    assert len(expected) == 2


def test_an_end_that_the_prompt_has_itself_stays(tokenizer):
    (example,) = tokenize_rows([{"prompt": "ab" + tokenizer.eos_token, "completion": "c"}], tokenizer, 100)
    assert example["input_ids"] == [*ids(tokenizer, "ab"), 2, *ids(tokenizer, "c"), 2]


def test_only_the_completion_is_learned(tokenizer):
    (example,) = tokenize_rows([{"prompt": "ab", "completion": "cde"}], tokenizer, 100)
    assert example["input_ids"] == [*ids(tokenizer, "abcde"), 2]
    assert example["labels"] == [-100, -100, *ids(tokenizer, "cde"), 2]


def test_conversations_are_written_with_the_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (example,) = tokenize_rows([{"messages": messages}], tokenizer, 100)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert example == {"input_ids": expected, "labels": expected}
    (split,) = tokenize_rows([{"prompt": messages[:1], "completion": messages[1:]}], tokenizer, 100)
    assert split["input_ids"] == expected
    start = tokenizer.apply_chat_template(messages[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert split["labels"] == [-100] * len(start["input_ids"]) + expected[len(start["input_ids"]) :]


def test_long_examples_are_cut_and_those_without_labels_dropped(tokenizer):
    rows = [{"prompt": "abcdef", "completion": "gh"}, {"prompt": "a", "completion": "bcdefgh"}]
    (example,) = tokenize_rows(rows, tokenizer, 4)
    assert example["input_ids"] == ids(tokenizer, "abcd")


def test_padding():
    batch = PadRight(7)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_files(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text("one\ntwo")
        expected = [{"text": "one\ntwo"}]
    else:
        expected = [{"text": "one"}, {"text": "two"}]
        if kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, expected)))
        else:
            import pandas

            pandas.DataFrame(expected).to_parquet(path)
    assert read_rows(path) == expected
    assert read_rows(str(path), limit=1) == expected[:1]


class TestRefused:
    def test_unknown_columns(self, tokenizer):
        with pytest.raises(ValueError, match=r"has the columns answer, question, but needs 'text', 'prompt'"):
            tokenize_rows([{"question": "a", "answer": "b"}], tokenizer, 8)

    def test_too_little_text(self, tokenizer):
        with pytest.raises(ValueError, match=r"no text to learn from in pieces of seqlen=100 tokens"):
            tokenize_rows([{"text": "abc"}], tokenizer, 100)

    def test_no_chat_template(self):
        with pytest.raises(ValueError, match="the tokenizer has no chat template"):
            tokenize_rows([{"messages": [{"role": "user", "content": "a"}]}], tiny_tokenizer(), 8)

    def test_no_such_file(self):
        with pytest.raises(FileNotFoundError, match=r"There is no file 'nowhere\.jsonl'"):
            read_rows("nowhere.jsonl")

    def test_no_rows(self, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        for data in ([], tmp_path / "empty.jsonl"):
            with pytest.raises(ValueError, match="has no rows"):
                read_rows(data)

    def test_unknown_kind(self, tmp_path):
        (tmp_path / "data.csv").write_text("text\n1")
        with pytest.raises(ValueError, match=r"data\.csv' is a file of an unknown kind: give \.jsonl"):
            read_rows(tmp_path / "data.csv")

    def test_columns_that_are_not_read_may_hold_anything(self, tokenizer):
        assert tokenize_rows([{"text": "abcdefgh", "prompt": None, "messages": 3}] * 3, tokenizer, 4)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": None}, r"Row 2 of the dataset has None as 'text': give text\."),
            ({}, r"Row 2 of the dataset has None as 'text'"),
            ({"text": 3}, r"has 3 as 'text'"),
            ({"prompt": "a", "completion": None}, r"None as 'completion': give text or a list of messages"),
            ({"messages": "a"}, r"'a' as 'messages': give a list of messages"),
        ],
    )
    def test_rows_that_lack_something(self, tokenizer, row, message):
        names = row or {"text": ""}
        good = {name: [{"role": "user", "content": "a"}] if name == "messages" else "abc" for name in names}
        with pytest.raises(ValueError, match=message):
            tokenize_rows([good, row], tokenizer, 8)
