"""Perplexity and what is compared with it, against the formulas written out token by token."""

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sparse.evaluation import compare, perplexity
from optimum_sparse.evaluation.perplexity import CHUNK
from optimum_sparse.offload import execution_device
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
    assert result.interval[0] < result.value < result.interval[1]


def test_only_the_first_windows_count():
    model, tokens = tiny_model("llama"), random_tokens(5 * 24)
    result = perplexity(model, tokens, seqlen=24, num_windows=2, progress=False)
    changed = torch.cat([tokens[:48], random_tokens(72).flip(0)])
    assert result.value == pytest.approx(naive_perplexity(model, tokens.tolist(), 24, 2), rel=1e-5)
    assert perplexity(model, changed, seqlen=24, num_windows=2, progress=False) == result
    assert result.interval is None  # of two windows


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


def naive_predictions(model: nn.Module, window: list[int]) -> torch.Tensor:
    """Probabilities of the next token at each predicted position, `[seqlen - 1, vocabulary]` float64."""
    with torch.no_grad():
        return model(torch.tensor([window])).logits[0, :-1].double().softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_comparison_is_the_naive_one(batch_size):
    model, dense = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():  # near enough that they often agree
        for own, other in zip(model.parameters(), dense.parameters(), strict=True):
            own.copy_(other + 0.3 * own)
    tokens = random_tokens(6 * 24)
    result = compare(model, dense, tokens, seqlen=24, batch_size=batch_size, progress=False)
    ratios, divergences, agreements = [], [], []
    for window in tokens.view(6, 24).tolist():
        p, q = naive_predictions(dense, window), naive_predictions(model, window)
        ratios.append(sum(math.log(p[i, t] / q[i, t]) for i, t in enumerate(window[1:])) / 23)
        divergences.append((p * (p / q).log()).sum().item() / 23)
        agreements.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.model == perplexity(model, tokens, seqlen=24, progress=False)
    assert result.baseline == perplexity(dense, tokens, seqlen=24, progress=False)
    assert result.ratio == pytest.approx(math.exp(statistics.fmean(ratios)), rel=1e-5)
    assert result.ratio == pytest.approx(result.model.value / result.baseline.value, rel=1e-6)
    assert result.kl == pytest.approx(statistics.fmean(divergences), rel=1e-4)
    assert result.top1_agreement == pytest.approx(statistics.fmean(agreements)) and 0.1 < result.top1_agreement < 1
    reach = 2.571 / 6**0.5  # of Student's t with five degrees of freedom
    for values, (low, high) in ((divergences, result.kl_interval), (agreements, result.top1_interval)):
        assert (high - low) / 2 == pytest.approx(reach * statistics.stdev(values), rel=2e-3)
    low, high = map(math.log, result.ratio_interval)
    assert (high - low) / 2 == pytest.approx(reach * statistics.stdev(ratios), rel=2e-3)


def test_a_model_is_like_itself():
    model = tiny_model("llama")
    result = compare(model, model, random_tokens(5 * 24), seqlen=24, progress=False)
    assert (result.ratio, result.kl, result.top1_agreement) == (1.0, 0.0, 1.0)
    assert (result.ratio_interval, result.kl_interval, result.top1_interval) == ((1, 1), (0, 0), (1, 1))


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match=f"{VOCABULARY} tokens in its vocabulary and the baseline {VOCABULARY + 3}"):
        larger = tiny_model("llama", vocab_size=VOCABULARY + 3)
        compare(tiny_model("llama"), larger, random_tokens(48), seqlen=24, progress=False)


def test_offloaded_models(tmp_path):
    model, tokens = tiny_model("llama"), random_tokens(4 * 24)
    expected = perplexity(model, tokens, seqlen=24, progress=False)
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert execution_device(offloaded).type == "cpu"
    assert perplexity(offloaded, tokens, seqlen=24, progress=False) == expected
