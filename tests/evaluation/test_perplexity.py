"""Perplexity against the formula written out token by token, and the text against the published one."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from optimum_sparse.evaluation import perplexity, wikitext_tokens
from optimum_sparse.evaluation.perplexity import CHUNK
from tests.helpers import VOCABULARY, tiny_model


def random_tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))


def naive_perplexity(model: nn.Module, tokens: list[int], seqlen: int, num_windows: int) -> float:
    """Mean over the windows of the mean over their predicted tokens, in double precision, one window at a time."""
    means = []
    for index in range(num_windows):
        window = tokens[index * seqlen : (index + 1) * seqlen]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        losses = []
        for position in range(seqlen - 1):
            probabilities = logits[position].exp() / logits[position].exp().sum()
            losses.append(-math.log(probabilities[window[position + 1]]))
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_the_naive_formula(batch_size):
    model, tokens = tiny_model("llama"), random_tokens(5 * 24 + 7)
    result = perplexity(model, tokens, seqlen=24, batch_size=batch_size, progress=False)
    assert result.value == pytest.approx(naive_perplexity(model, tokens.tolist(), 24, 5), rel=1e-5)
    assert dataclasses.astuple(result)[1:4] == (5, 24, 5 * 23)


def test_only_the_first_windows_count():
    model, tokens = tiny_model("llama"), random_tokens(5 * 24)
    result = perplexity(model, tokens, seqlen=24, num_windows=2, progress=False)
    changed = torch.cat([tokens[:48], random_tokens(72).flip(0)])
    assert result.value == pytest.approx(naive_perplexity(model, tokens.tolist(), 24, 2), rel=1e-5)
    assert perplexity(model, changed, seqlen=24, num_windows=2, progress=False) == result


def test_windows_longer_than_a_chunk():
    seqlen = 2 * CHUNK + 5
    model, tokens = tiny_model("llama", max_position_embeddings=seqlen), random_tokens(seqlen)
    result = perplexity(model, tokens, seqlen=seqlen, progress=False)
    assert result.value == pytest.approx(naive_perplexity(model, tokens.tolist(), seqlen, 1), rel=1e-5)


def test_half_precision_logits_are_summed_in_fp32():
    model, tokens = tiny_model("llama").bfloat16(), random_tokens(96)
    result = perplexity(model, tokens, seqlen=48, progress=False)
    assert result.value == pytest.approx(naive_perplexity(model, tokens.tolist(), 48, 2), rel=1e-5)


def test_a_broken_model_has_a_perplexity_that_says_so():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    assert math.isnan(perplexity(model, random_tokens(48), seqlen=24, progress=False).value)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (random_tokens(20), {"seqlen": 24}, "20 tokens has 0"),
        (random_tokens(50), {"seqlen": 24, "num_windows": 3}, "50 tokens has 2"),
        (random_tokens(50), {"seqlen": 24, "num_windows": 0}, "0 windows"),
        (random_tokens(50), {"seqlen": 1}, "seqlen must be at least 2, got 1"),
        (random_tokens(50), {"seqlen": 24, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        (random_tokens(50)[None], {"seqlen": 24}, r"shape \[tokens\].*got \[1, 50\]"),
        (random_tokens(50).tolist(), {"seqlen": 24}, r"shape \[tokens\].*got list"),
    ],
)
def test_bad_arguments(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), tokens, progress=False, **options)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        perplexity(tiny_model("llama").train(), random_tokens(48), seqlen=24, progress=False)


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
