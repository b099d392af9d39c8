"""`sparsity_config`: folding names, counting zeros, and telling true from false."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_sparse import SparsePruner
from optimum_sparse.config import SparseConfig
from optimum_sparse.matrices import find_matrices
from optimum_sparse.metadata import (
    Claim,
    Count,
    count,
    differences,
    expand_name,
    fold_names,
    matrix_of,
    read_claims,
    recount,
    sparsity_config,
)

from .architectures import sweep_model
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


def claim_of(name: str, **fields):
    """Metadata of one entry, true of a matrix of two weights but for `fields`."""
    entry = {"zeros": 1, "numel": 2, "pattern": None, "shape": [1, 2], "transposed": False, **fields}
    return {"matrices": {name: entry}, "achieved_sparsity": 0.5}


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
        ([f"h.{b}.experts.up.{e}" for b in (0, 1, 4) for e in range(8)], ["h.{0-1,4}.experts.up.{0-7}"]),
        ([f"{a}.{b}.x.{c}" for a in range(2) for b in (3, 5) for c in range(2)], ["{0-1}.{3,5}.x.{0-1}"]),
        # Some blocks have fewer experts than others.
        ([f"h.{b}.e.{e}" for b in range(3) for e in range(4 - b)], ["h.{0-2}.e.{0-1}", "h.{0-1}.e.2", "h.0.e.3"]),
        (["h.0.fc", "h.1.fc", "h.0.e.0", "h.0.e.1"], ["h.{0-1}.fc", "h.0.e.{0-1}"]),
        ([], []),
    ],
)
def test_fold_names(names: list[str], folded: list[str]):
    assert fold_names(names) == folded
    assert sorted(itertools.chain.from_iterable(map(expand_name, folded))) == sorted(names)


def test_fold_names_ignores_order_and_repetition():
    assert fold_names(["b.10.w", "b.2.w", "b.9.w", "b.2.w"]) == ["b.{2,9-10}.w"]
    assert expand_name("b.{2,9-10}.w") == ["b.2.w", "b.9.w", "b.10.w"]


def test_expand_name_goes_through_the_last_index_first():
    assert expand_name("h.{0-1}.up.{0,2}") == ["h.0.up.0", "h.0.up.2", "h.1.up.0", "h.1.up.2"]


@pytest.mark.parametrize("name", ["layers.{0-99999999999}.w", "layers.{0-9999}.experts.{0-9999}"])
def test_expand_name_refuses_absurd_ranges(name: str):
    with pytest.raises(ValueError, match="more than 1000000 names"):
        expand_name(name)


@pytest.mark.parametrize("name", ["h.{5-4}.w", "h.{5-4}.{0-99999999999}", "h.{0-1,9-8}"])
def test_expand_name_refuses_ranges_that_end_before_they_begin(name: str):
    with pytest.raises(ValueError, match="ends before it begins"):
        expand_name(name)


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
        "method": "admm",
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
    layout = {"shape": [32, 32], "transposed": False}
    assert q_proj == {"zeros": 32 * 32 // 2, "numel": 32 * 32, "pattern": "2:4", **layout}
    assert up_proj == {"zeros": 32 * 64 // 4, "numel": 32 * 64, "pattern": None, **layout, "shape": [64, 32]}
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64
    assert metadata["achieved_sparsity"] == pytest.approx((attention / 2 + mlp / 4) / (attention + mlp), abs=1e-6)


def test_blocks_that_were_pruned_alike_share_an_entry():
    _, metadata = pruned_model(overrides=[{"match": "layers.1.*", "sparsity": 0.75}], targets=["q_proj"])
    layout = {"shape": [32, 32], "transposed": False}
    assert metadata["matrices"] == {
        "model.layers.0.self_attn.q_proj": {"zeros": 512, "numel": 1024, "pattern": None, **layout},
        "model.layers.1.self_attn.q_proj": {"zeros": 768, "numel": 1024, "pattern": None, **layout},
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


class Experts(nn.Module):
    """Three experts in a parameter, two in another that is transposed, a matrix of its own, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.arange(3 * 4 * 6.0).view(3, 4, 6))
        self.down = nn.Parameter(torch.arange(2 * 4 * 6.0).view(2, 6, 4))
        self.alone = nn.Parameter(torch.arange(24.0).view(4, 6))
        self.stack = nn.ModuleList([nn.Linear(6, 4), Conv1D(4, 6)])


@pytest.mark.parametrize(
    ("name", "transposed", "parameter", "expected"),
    [
        ("block.up.0", False, "block.up", lambda block: block.up[0]),
        ("block.up.2", False, "block.up", lambda block: block.up[2]),
        ("block.down.1", True, "block.down", lambda block: block.down[1].T),
        ("block.alone", False, "block.alone", lambda block: block.alone),
        ("block.stack.0", False, "block.stack.0.weight", lambda block: block.stack[0].weight),
        ("block.stack.1", True, "block.stack.1.weight", lambda block: block.stack[1].weight.T),
    ],
)
def test_matrix_of(name: str, transposed: bool, parameter: str, expected):
    model = nn.Module()
    model.block = Experts()
    found, matrix = matrix_of(model, name, (4, 6), transposed)
    assert found == parameter
    assert torch.equal(matrix, expected(model.block)) and not matrix.requires_grad
    matrix[1, 2] = -7.0  # it is the weight itself, not a copy
    assert expected(model.block)[1, 2] == -7.0


@pytest.mark.parametrize("name", ["block.up.3", "block.up.-1", "block.nothing", "block.stack.2", "up.0", "block", ""])
def test_matrix_of_nothing(name: str):
    model = nn.Module()
    model.block = Experts()
    with pytest.raises(ValueError, match=rf"names the matrix '{name}' of shape \[4, 6\], which Module does not have"):
        matrix_of(model, name, (4, 6), False)


def test_experts_that_share_a_parameter_have_one_entry():
    model = sweep_model("mixtral")
    SparsePruner(method="magnitude", pattern="2:4", progress=False).prune(model)
    metadata = model.config.sparsity_config
    up = metadata["matrices"]["model.layers.{0-1}.mlp.experts.gate_up_proj.{0-3}"]
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    assert (
        up
        == {
            "zeros": fused.numel(),  # half of both blocks
            "numel": 2 * fused.numel(),
            "pattern": "2:4",
            "shape": list(fused.shape[1:]),
            "transposed": False,
        }
    )
    assert recount(model, metadata) == metadata
    with torch.no_grad():
        fused[3, 0, 0:4] = 1.0
    now = recount(model, metadata)["matrices"]["model.layers.{0-1}.mlp.experts.gate_up_proj.{0-3}"]
    assert (now["zeros"], now["pattern"]) == (fused.numel() - 2, None)


def test_weights_of_conv1d_are_transposed_and_counted_as_such():
    """Zeros in 2:4 along the outputs instead of the inputs are as many, but no 2:4."""
    model, metadata = pruned_model("gpt2", pattern="2:4")
    (folded,) = (name for name in metadata["matrices"] if name.endswith("mlp.c_fc"))
    weight = model.transformer.h[0].mlp.c_fc.weight
    inputs, outputs = weight.shape
    assert (metadata["matrices"][folded]["shape"], metadata["matrices"][folded]["transposed"]) == (
        [outputs, inputs],
        True,
    )
    with torch.no_grad():
        weight.copy_((torch.arange(outputs) % 4 < 2).expand_as(weight))
    now = recount(model, metadata)["matrices"][folded]
    assert (now["zeros"], now["pattern"]) == (metadata["matrices"][folded]["zeros"], None)


def test_recount_of_another_model():
    _, metadata = pruned_model("llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+' of shape \[32, 32\], which GPT2LMHead"):
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
        claim_of("q", zeros="half"),
        claim_of("q", pattern="two of four"),
        claim_of("q.{0-99999999}"),
        {"matrices": {"q": {"zeros": "half", "numel": 2, "pattern": None}}, "achieved_sparsity": 0.5},
        {"matrices": {"q": {"zeros": 1, "numel": 2, "pattern": "two of four"}}, "achieved_sparsity": 0.5},
        {"matrices": {"q": {"zeros": 1, "numel": 2, "pattern": None}}, "achieved_sparsity": 0.5},
        claim_of("q", shape=[2, 2]),
        claim_of("q", shape=[-1, -2]),
        claim_of("q", shape=[2]),
        claim_of("q.{0-1}", shape=[1, 2]),
        {"matrices": {"q.{0-99999999}": {"zeros": 1, "numel": 2, "pattern": None}}, "achieved_sparsity": 0.5},
        {"format": "sparse-bitmask", "ignore": [], "registry_requires_subclass": False},
    ],
    ids=str,
)
def test_claims_of_another_form(metadata):
    with pytest.raises(ValueError, match="not of the form"):
        read_claims(metadata)


def test_claims_of_the_right_form():
    claim = Claim(["q"], zeros=1, numel=2, pattern=None, shape=(1, 2), transposed=False)
    assert read_claims(claim_of("q")) == {"q": claim}
    assert read_claims(claim_of("q.{0-1}", shape=[1, 1]))["q.{0-1}"].names == ["q.0", "q.1"]


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
