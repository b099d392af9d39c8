"""Where calibration data come from; the Hub is a stub or truly out of reach."""

import itertools
from collections.abc import Iterator

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from optimum_sparse.calibration import load_calibration
from optimum_sparse.config import SparseConfig
from tests.helpers import VOCABULARY

from .helpers import BOS, DOCUMENTS, TEXT_ROWS, WINDOWS, load, rows, word_tokenizer, words, write_jsonl

# Files and objects that hold texts

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
