"""Text by the model itself, against sampling by hand."""

import json
import logging

import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from optimum_sparse.calibration import load_calibration
from optimum_sparse.config import SparseConfig
from tests.beyond_text import MODELS
from tests.helpers import VOCABULARY, tiny_model

from .helpers import BOS, EOS, PAD, load, rows, words


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


@pytest.mark.parametrize(
    "choice",
    [
        {"min_p": 0.9},
        {"suppress_tokens": [5, 6, 7]},
        {"do_sample": True, "num_return_sequences": 2},
        {"max_time": 0.0001},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"forced_eos_token_id": EOS},
    ],
    ids=str,
)
def test_what_the_authors_chose_for_chatting_does_not_matter(choice):
    found = []
    for choices in ({}, choice):
        model = tiny_model()
        model.generation_config.update(**choices)
        before = model.generation_config
        found.append(rows(load("self", model=model, seqlen=24, num_samples=3)))
        assert model.generation_config is before
    assert found[0] == found[1]
