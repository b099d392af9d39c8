"""`sparsity_config`: folding names, counting zeros, and telling true from false."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

from optimum_sparse.config import SparseConfig
from optimum_sparse.matrices import find_matrices
from optimum_sparse.metadata import (
    Count,
    count,
    differences,
    expand_name,
    fold_names,
    read_claims,
    recount,
    sparsity_config,
)

from .helpers import tiny_model

RECORD = {"dataset": "t.txt", "num_samples": 4, "seqlen": 16, "num_tokens": 64, "seed": 3, "sha256": "ab"}


def pruned_model(architecture: str = "llama", **options):
    """A model whose matrices start with zeros as asked, and its metadata; no pruning method involved."""
    model, config = tiny_model(architecture), SparseConfig(**options)
    matrices, _ = find_matrices(model, config)
    for matrix in matrices:
        zero = torch.zeros(matrix.shape, dtype=torch.bool)
        if ":" in str(matrix.pattern):
            n, m = map(int, str(matrix.pattern).split(":"))
            zero.view(-1, m)[:, n:] = True
        else:
            zero.view(-1)[: int(zero.numel() * matrix.pattern.sparsity)] = True
        matrix.write(torch.where(zero, 0.0, 1.0))
    model.config.sparsity_config = sparsity_config(model, config, matrices, RECORD)
    return model, model.config.sparsity_config


def claims_and_counts(model, metadata):
    found = {}
    for name, claim in ((n, c) for c in read_claims(metadata).values() for n in c.names):
        module = model.get_submodule(name)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        found[name] = count(weight, [claim.pattern] if claim.pattern else [])
    return read_claims(metadata), found


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.fc", "h.1.fc", "h.3.fc", "head"], ["h.{0-1,3}.fc", "head"]),
        (["layers.2.mlp"], ["layers.2.mlp"]),
        (["a.0.b", "a.0.c", "a.1.b"], ["a.{0-1}.b", "a.0.c"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w"], ["l.{0-1}.e.0.w", "l.0.e.1.w"]),
        (["7", "8", "x2.y", "a.01.b"], ["{7-8}", "x2.y", "a.01.b"]),
        ([], []),
    ],
)
def test_fold_names(names: list[str], folded: list[str]):
    assert fold_names(names) == folded
    assert sorted(itertools.chain.from_iterable(map(expand_name, folded))) == sorted(names)


def test_fold_names_ignores_order_and_repetition():
    assert fold_names(["b.10.w", "b.2.w", "b.9.w", "b.2.w"]) == ["b.{2,9-10}.w"]
    assert expand_name("b.{2,9-10}.w") == ["b.2.w", "b.9.w", "b.10.w"]


def test_expand_name_refuses_absurd_ranges():
    with pytest.raises(ValueError, match="more than 1000000 names"):
        expand_name("layers.{0-99999999999}.w")


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "3:5"])
def test_count_agrees_with_a_loop(pattern: str):
    n, m = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(0)
    satisfied = 0
    for density in (0.1, 0.2, 0.3, 0.5):
        for _ in range(20):
            weight = torch.rand(2, 2 * m, generator=generator) - 0.5
            weight *= torch.rand(2, 2 * m, generator=generator) < density
            groups = [row[i : i + m] for row in weight.tolist() for i in range(0, 2 * m, m)]
            holds = all(sum(value != 0 for value in group) <= n for group in groups)
            zeros = sum(value == 0 for row in weight.tolist() for value in row)
            assert count(weight, [pattern]) == Count(zeros, 4 * m, (pattern,) if holds else ())
            satisfied += holds
    assert 0 < satisfied < 80  # else the test above says nothing


def test_count_of_what_no_pattern_divides():
    assert count(torch.zeros(3, 6), ["2:4", "2:3"]) == Count(18, 18, ("2:3",))
    assert count(torch.zeros(2, 4, 4), ["2:4"]) == Count(32, 32, ())
    assert count(torch.tensor([[-0.0, 1.0]], dtype=torch.bfloat16)) == Count(1, 2)


def test_sparsity_config_of_a_model():
    _, metadata = pruned_model(pattern="2:4", block_range=(0, 1), overrides=[{"match": "mlp.*", "sparsity": 0.25}])
    assert json.loads(json.dumps(metadata)) == metadata
    assert set(metadata["versions"]) == {"optimum_sparse", "torch", "transformers"}
    assert metadata["versions"]["torch"] == torch.__version__
    expected = {
        "method": "sparsegpt",
        "pattern": "2:4",
        "sparsity": 0.5,
        "dataset": "t.txt",
        "num_samples": 4,
        "seqlen": 16,
        "num_tokens": 64,
        "seed": 0,
        "calibration_sha256": "ab",
        "base_model": None,
        "base_revision": None,
        "block_range": [0, 1],
        "overrides": [{"match": "mlp.*", "sparsity": 0.25}],
    }
    assert {key: metadata[key] for key in expected} == expected
    assert "true_sequential" not in metadata  # has its default
    q_proj, up_proj = (metadata["matrices"][f"model.layers.0.{n}"] for n in ("self_attn.q_proj", "mlp.up_proj"))
    assert q_proj == {"zeros": 32 * 32 // 2, "numel": 32 * 32, "pattern": "2:4"}
    assert up_proj == {"zeros": 32 * 64 // 4, "numel": 32 * 64, "pattern": None}
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64
    assert metadata["achieved_sparsity"] == pytest.approx((attention / 2 + mlp / 4) / (attention + mlp), abs=1e-6)


def test_blocks_that_were_pruned_alike_share_an_entry():
    _, metadata = pruned_model(overrides=[{"match": "layers.1.*", "sparsity": 0.75}], targets=["q_proj"])
    assert metadata["matrices"] == {
        "model.layers.0.self_attn.q_proj": {"zeros": 512, "numel": 1024, "pattern": None},
        "model.layers.1.self_attn.q_proj": {"zeros": 768, "numel": 1024, "pattern": None},
    }
    _, metadata = pruned_model(targets=["q_proj"])
    assert list(metadata["matrices"]) == ["model.layers.{0-1}.self_attn.q_proj"]


def test_metadata_without_calibration():
    model, config = tiny_model(), SparseConfig(method="magnitude")
    metadata = sparsity_config(model, config, find_matrices(model, config)[0], {})
    assert (metadata["dataset"], metadata["num_samples"], metadata["calibration_sha256"]) == (None, None, None)
    assert metadata["achieved_sparsity"] == 0.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_recount_leaves_the_truth_alone(architecture: str, caplog: pytest.LogCaptureFixture):
    model, metadata = pruned_model(architecture, pattern="2:4")
    assert recount(model, metadata) == metadata
    assert not caplog.records


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_recount_corrects_what_changed(architecture: str, caplog: pytest.LogCaptureFixture):
    model, metadata = pruned_model(architecture, pattern="2:4")
    before = json.dumps(metadata)
    name = {"llama": "model.layers.{0-1}.mlp.down_proj", "gpt2": "transformer.h.{0-1}.mlp.c_proj"}[architecture]
    model.get_submodule(name.replace("{0-1}", "1")).weight.data.fill_(1.0)
    with caplog.at_level(logging.WARNING):
        current = recount(model, metadata)
    old, new = metadata["matrices"].pop(name), current["matrices"].pop(name)
    assert (new["zeros"], new["numel"], new["pattern"]) == (old["zeros"] // 2, old["numel"], None)
    assert current["matrices"] == metadata["matrices"]
    assert current["achieved_sparsity"] < 0.5
    assert "corrected" in caplog.text
    assert json.dumps(json.loads(before)["matrices"][name]) == json.dumps(old)  # the argument was not changed


def test_recount_of_another_model():
    _, metadata = pruned_model("llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+', which GPT2LMHeadModel does not have: unwrap"):
        recount(tiny_model("gpt2"), metadata)


def test_the_truth_has_no_differences():
    assert differences(*claims_and_counts(*pruned_model("gpt2", pattern="2:4"))) == []


def test_differences():
    model, metadata = pruned_model(pattern="2:4")
    claims, found = claims_and_counts(model, metadata)
    down, up, gate, q = (
        f"model.layers.1.{n}" for n in ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj")
    )
    del found[down]
    found[up] = Count(found[up].zeros - 1, found[up].numel, found[up].patterns)
    found[gate] = Count(found[gate].zeros, found[gate].numel, ("4:8",))
    found[q] = Count(found[q].zeros, found[q].numel + 1, found[q].patterns)
    problems = differences(claims, found)
    assert sorted(problems) == sorted(
        [
            "model.layers.{0-1}.mlp.down_proj: there is no model.layers.1.mlp.down_proj.weight (1 of 2 missing).",
            "model.layers.{0-1}.mlp.up_proj: claims 2048 zeros of 4096, there are 2047 of 4096.",
            "model.layers.{0-1}.mlp.gate_proj: claims 2:4, but 1 of 2 are not.",
            "model.layers.{0-1}.self_attn.q_proj: claims 1024 zeros of 2048, there are 1024 of 2049.",
        ]
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        None,
        "50 %",
        [],
        {"matrices": {}},
        {"matrices": ["q_proj"], "achieved_sparsity": 0.5},
        {"matrices": {"q": 5}, "achieved_sparsity": 0.5},
        {"matrices": {"q": {"zeros": 1, "numel": 2}}, "achieved_sparsity": 0.5},
        {"matrices": {"q": {"zeros": "half", "numel": 2, "pattern": None}}, "achieved_sparsity": 0.5},
        {"matrices": {"q": {"zeros": 1, "numel": 2, "pattern": "two of four"}}, "achieved_sparsity": 0.5},
        {"matrices": {"q.{0-99999999}": {"zeros": 1, "numel": 2, "pattern": None}}, "achieved_sparsity": 0.5},
        {"format": "sparse-bitmask", "ignore": [], "registry_requires_subclass": False},
    ],
    ids=str,
)
def test_claims_of_another_form(metadata):
    with pytest.raises(ValueError, match="not of the form"):
        read_claims(metadata)


def test_claims_about_nothing():
    with pytest.raises(ValueError, match="names no matrix"):
        read_claims({"matrices": {}, "achieved_sparsity": 0.0})


def test_claims_that_contradict_themselves():
    _, metadata = pruned_model()
    with pytest.raises(ValueError, match=r"achieved_sparsity is 0\.6, but its matrices give 0\.5"):
        read_claims({**metadata, "achieved_sparsity": 0.6})


def base_of(name_or_path: str, commit: str | None = None) -> tuple[str | None, str | None]:
    model, config = tiny_model(), SparseConfig()
    model.name_or_path = name_or_path
    model.config._commit_hash = commit
    metadata = sparsity_config(model, config, [], RECORD)
    return metadata["base_model"], metadata["base_revision"]


def test_base_of_a_local_folder_is_its_name(tmp_path: Path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert base_of(str(folder)) == ("my-model", None)


def test_base_of_a_folder_of_the_hub_cache(tmp_path: Path):
    folder = tmp_path / "models--some--base-model" / "snapshots" / ("c0ffee" + "0" * 34)
    folder.mkdir(parents=True)
    assert base_of(str(folder)) == ("some/base-model", "c0ffee" + "0" * 34)


def test_base_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_of("some/base", commit="abc") == ("some/base", "abc")
    assert base_of("some/base") == ("some/base", None)
    snapshots = tmp_path / "models--some--base" / "snapshots"
    (snapshots / "111").mkdir(parents=True)
    assert base_of("some/base") == ("some/base", "111")
    (snapshots / "222").mkdir()
    assert base_of("some/base") == ("some/base", None)  # either of them may have been loaded
