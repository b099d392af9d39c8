"""The texts, against what the papers' code makes of the same rows."""

import json

import datasets
import pytest
import torch

from optimum_sparse.evaluation import load_text, wikitext_tokens
from optimum_sparse.evaluation.texts import DOCUMENTS


class ByteTokenizer:
    """One token per byte, after a token for the start of the text."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [256, *text.encode()]}


ROWS = ["", " = Title = \n", "", " A line with \u2028 and \x0b in it . \n", "", " The end . \n"]


def test_wikitext_is_joined_like_the_dataset(tmp_path):
    file = tmp_path / "wiki.test.raw"
    file.write_bytes("".join(row or " \n" for row in ROWS).encode())
    tokens = wikitext_tokens(file, ByteTokenizer())
    assert bytes(tokens[1:].tolist()).decode() == "\n\n".join(ROWS)
    assert tokens[0] == 256 and tokens.dtype == torch.int64 and tokens.dim() == 1
    assert torch.equal(wikitext_tokens(str(file), ByteTokenizer()), tokens)
    assert torch.equal(wikitext_tokens(ROWS, ByteTokenizer()), tokens)


@pytest.mark.parametrize("rows", [[], ["", " \n"]])
def test_wikitext_without_text(rows):
    with pytest.raises(ValueError, match=f"{len(rows)} rows and no text"):
        wikitext_tokens(rows, ByteTokenizer())


class Hub:
    """Stands in for `datasets.load_dataset`: notes how it was called and gives these rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, column: str, rows: list[str]) -> None:
        self.rows = [{column: row} for row in rows]
        self.calls: list[tuple] = []
        monkeypatch.setattr(datasets, "load_dataset", self)

    def __call__(self, path: str, **options) -> list[dict]:
        self.calls.append((path, options))
        return self.rows


def text_of(source: str) -> str:
    return bytes(load_text(source, ByteTokenizer()).input_ids[1:].tolist()).decode()


def test_wikitext2_is_the_test_split(monkeypatch):
    hub = Hub(monkeypatch, "text", ROWS)
    assert text_of("wikitext2") == "\n\n".join(ROWS)
    assert hub.calls == [("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})]
    assert load_text("wikitext2", ByteTokenizer()).num_windows is None


def test_c4_is_the_first_validation_file(monkeypatch):
    documents = [f"document {index}" for index in range(DOCUMENTS + 5)]
    hub = Hub(monkeypatch, "text", documents)
    assert text_of("c4") == " ".join(documents[:1100])
    file = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub.calls == [("allenai/c4", {"data_files": file, "split": "validation", "streaming": True})]
    assert load_text("c4", ByteTokenizer()).num_windows == 256


def test_ptb_is_joined_with_spaces(monkeypatch):
    hub = Hub(monkeypatch, "sentence", ["no it was n't", "<unk> said"])
    assert text_of("ptb") == "no it was n't <unk> said"
    assert [path for path, _ in hub.calls] == ["ptb-text-only/ptb_text_only"]


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.raw").write_text("".join(row or " \n" for row in ROWS))
    (tmp_path / "a.txt").write_text("One text.\nTwo lines.\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text, "body": "x"}) + "\n" for text in ("a", "b c")))
    assert text_of("wiki.raw") == "\n\n".join(ROWS)
    assert text_of("a.txt") == "One text.\nTwo lines.\n"
    assert text_of("b.jsonl") == "a b c" and text_of(str(tmp_path / "b.jsonl") + ":body") == "x x"
    # What is published has no folders in it.
    assert [load_text(str(tmp_path / name), ByteTokenizer()).name for name in ("wiki.raw", "a.txt")] == [
        "wiki.raw",
        "a.txt",
    ]


def test_what_is_no_text(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_text("nowhere.txt", ByteTokenizer())
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2]}) + "\n")
    with pytest.raises(ValueError, match="holds tokens, but a text"):
        load_text(str(tmp_path / "ids.jsonl"), ByteTokenizer())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(OSError, match=r"Cannot read Salesforce/wikitext from the Hub .*offline.*\.raw file"):
        load_text("wikitext2", ByteTokenizer())
