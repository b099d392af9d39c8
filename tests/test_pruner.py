"""`SparsePruner` as a user meets it: what it changes, what it records, what it refuses."""

import copy
import json
import math
import re
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_sparse import SparseConfig, SparsePruner, run
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.matrices import find_matrices
from optimum_sparse.metadata import expand_name, matrix_of
from optimum_sparse.patterns import num_pruned
from optimum_sparse.recovery import find_masks
from optimum_sparse.solver import Solver

from .architectures import sweep_model
from .checkpoints import tiny_tokenizer, write_gguf
from .helpers import HIDDEN, tiny_batches, tiny_model

METHODS = ["magnitude", "wanda", "sparsegpt", "admm", "sparsegpt-reference"]
TEXT = [" ".join(f"{n} squared is {n * n}." for n in range(400))]


def pruned(model, dataset=None, tokenizer=None, **options):
    pruner = SparsePruner(SparseConfig(num_samples=6, **options), progress=False)
    pruner.prune(model, tokenizer, dataset if dataset is not None or tokenizer is not None else tiny_batches())
    return pruner


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "8:16"])
def test_zeros_are_exact_and_nothing_else_changes(method, pattern):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = pruned(model, method=method, pattern=pattern, sparsity=None if pattern else 0.6)
    matrices = {matrix.name: matrix for matrix in find_matrices(model, pruner.config)[0]}
    assert len(matrices) == 14
    for name, matrix in matrices.items():
        weight = matrix.read()
        if pattern:
            n, m = map(int, pattern.split(":"))
            assert ((weight != 0).reshape(-1, m).sum(dim=1) == n).all(), name
        elif method == "wanda":
            assert ((weight == 0).sum(dim=1) == num_pruned(weight.shape[1], 0.6)).all(), name
        else:
            assert (weight == 0).sum() == num_pruned(weight.numel(), 0.6), name
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") not in matrices:
            assert torch.equal(value, before[name]), name


def test_a_sparsity_of_zero_changes_nothing():
    model, dense = tiny_model(), tiny_model()
    for method in METHODS:
        pruned(model, method=method, sparsity=0.0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True)), method


def test_pruned_outputs_stay_close_in_the_order_of_the_methods():
    """On correlated inputs an update beats none, and activations beat magnitudes, at the model's own output."""
    errors = {}
    dense = tiny_model(seed=3)
    with torch.no_grad():
        dense.model.embed_tokens.weight *= torch.linspace(0.02, 3, HIDDEN)  # some features matter much more
    batches = tiny_batches(num=8, rows=4)
    for method in ("magnitude", "wanda", "sparsegpt", "admm"):
        model = copy.deepcopy(dense)
        pruner = SparsePruner(method=method, sparsity=0.5, num_samples=32, progress=False)
        pruner.prune(model, dataset=batches)
        with torch.no_grad():
            errors[method] = sum((model(**b).logits - dense(**b).logits).square().sum().item() for b in batches)
    assert errors["admm"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize(("method", "alike"), [("admm", True), ("sparsegpt", False), ("wanda", False)])
def test_all_tokens_count_alike_by_default_for_admm_only(method: str, alike: bool):
    models = {choice: tiny_model() for choice in (None, True, False)}
    for choice, model in models.items():
        with torch.no_grad():
            model.model.embed_tokens.weight[:9] *= 30  # tokens that the first norm does not make like the others
            model.model.layers[0].mlp.down_proj.weight[:, :5] *= 30
        pruned(model, method=method, equal_tokens=choice)
    weights = {choice: model.model.layers[0].mlp.down_proj.weight for choice, model in models.items()}
    assert torch.equal(weights[None], weights[alike]) and not torch.equal(weights[None], weights[not alike])


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize(("method", "rescaled"), [("admm", True), ("sparsegpt", False), ("wanda", False)])
def test_outputs_stay_as_large_by_default_for_admm_only(method: str, rescaled: bool, quantization: str | None):
    """The inputs of the first block are those of the dense model, so that they can be compared."""
    name, inputs = "model.layers.0.self_attn.v_proj", []
    dense = tiny_model()
    dense.get_submodule(name).register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2)))
    for batch in tiny_batches():
        with torch.no_grad():
            dense(**batch)
    outputs = torch.cat(inputs).double()
    ratios, weights = {}, {}
    for choice in (None, True, False):
        model = tiny_model()
        pruned(model, method=method, rescale=choice, equal_tokens=False, quantization=quantization)
        weights[choice] = model.get_submodule(name).weight
        after, before = (outputs @ w.double().T for w in (weights[choice], dense.get_submodule(name).weight))
        ratios[choice] = (after.norm(dim=0) / before.norm(dim=0)).detach()
    assert torch.equal(weights[None], weights[rescaled]) and not torch.equal(weights[None], weights[not rescaled])
    assert torch.equal(weights[True] == 0, weights[False] == 0)
    assert (ratios[False] - 1).abs().max() > 0.01
    if method != "wanda":  # which knows of norms only
        rounded = 2**-8 if quantization else 1e-4  # scales of grids are bfloat16
        torch.testing.assert_close(ratios[True], torch.ones_like(ratios[True]), rtol=rounded, atol=0)


@pytest.mark.parametrize("slower", [1.5, 7.0])
def test_a_cpu_that_is_slow_in_half_precision_is_named(monkeypatch, capsys, slower: float):
    monkeypatch.setattr(run, "half_penalty", lambda dtype: slower)
    pruner = SparsePruner(num_samples=6)
    pruner.prune(tiny_model().bfloat16(), dataset=tiny_batches())
    shown = capsys.readouterr().err
    assert ("takes 7 times as long for products in torch.bfloat16" in shown) == (slower > 2)
    assert ("This CPU takes" in shown) == (slower > 2)


def test_overrides_block_range_and_targets():
    model = tiny_model(num_hidden_layers=3)
    pruner = pruned(
        model,
        method="wanda",
        targets=["mlp.*", "k_proj", "v_proj"],
        block_range=(1, 3),
        overrides=[{"match": "mlp.*", "pattern": "1:4"}, {"match": "2.mlp.up_proj", "sparsity": 0}],
    )
    asked = {entry.name.removeprefix("model.layers."): entry.pattern for entry in pruner.report.matrices}
    assert asked == {
        "1.self_attn.k_proj": "0.5",
        "1.self_attn.v_proj": "0.5",
        "1.mlp.gate_proj": "1:4",
        "1.mlp.up_proj": "1:4",
        "1.mlp.down_proj": "1:4",
        "2.self_attn.k_proj": "0.5",
        "2.self_attn.v_proj": "0.5",
        "2.mlp.gate_proj": "1:4",
        "2.mlp.down_proj": "1:4",
    }
    skipped = pruner.report.skipped
    assert skipped["model.layers.0.mlp.up_proj"] == "outside block_range"
    assert skipped["model.layers.2.mlp.up_proj"] == "sparsity 0 in overrides"
    assert skipped["model.layers.1.self_attn.q_proj"] == "does not match targets"
    assert (model.model.layers[2].mlp.up_proj.weight != 0).all()


def test_metadata_is_pure_json_and_true():
    model = tiny_model()
    pruner = pruned(model, method="sparsegpt", pattern="2:4", seed=7)
    record = model.config.sparsity_config
    assert json.loads(json.dumps(record)) == record
    assert (record["method"], record["pattern"], record["sparsity"]) == ("sparsegpt", "2:4", 0.5)
    assert record["achieved_sparsity"] == 0.5 and record["seed"] == 7 and record["num_samples"] == 6
    assert set(record["versions"]) == {"optimum_sparse", "torch", "transformers"}
    down = record["matrices"]["model.layers.{0-1}.mlp.down_proj"]
    half = {"zeros": 2 * 64 * HIDDEN // 2, "numel": 2 * 64 * HIDDEN, "pattern": "2:4"}
    assert down == {**half, "shape": [HIDDEN, 64], "transposed": False}
    assert pruner.report.sparsity == 0.5


def test_save_and_load_are_exact_and_the_checkpoint_is_plain(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pruner = pruned(model, TEXT, tokenizer, method="sparsegpt", seqlen=32)
    pruner.save(model, tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and config["sparsity_config"]["achieved_sparsity"] == 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.sparsity_config == model.config.sparsity_config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    report = json.loads((tmp_path / "sparsity_report.json").read_text())
    assert len(report["matrices"]) == 14 and report["calibration"]["num_samples"] == 6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_compressed_checkpoint_is_the_same_model_in_fewer_bytes(architecture, tmp_path):
    model = tiny_model(architecture)
    pruner = pruned(model, method="magnitude", pattern="2:4")
    for folder, compressed in (("packed", True), ("dense", False)):
        pruner.save(model, tmp_path / folder, tiny_tokenizer(), max_shard_size="40KB", compressed=compressed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.config.sparsity_config == model.config.sparsity_config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    sizes = {path.parent.name: 0 for path in tmp_path.rglob("*.safetensors")}
    for path in tmp_path.rglob("*.safetensors"):
        sizes[path.parent.name] += path.stat().st_size
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    assert sizes["packed"] < 0.75 * sizes["dense"]  # embeddings and lm_head are not pruned
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {
        path.name for path in (tmp_path / "dense").iterdir()
    }


def test_a_compressed_checkpoint_replaces_a_dense_one(tmp_path):
    model = tiny_model()
    pruner = pruned(model, method="magnitude")
    pruner.save(model, tmp_path, max_shard_size="40KB")
    pruner.save(model, tmp_path, compressed=True)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    pruner.save(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_metadata_is_recomputed_on_save(tmp_path, caplog):
    model = tiny_model()
    pruner = pruned(model, method="magnitude")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1.0)
    pruner.save(model, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["sparsity_config"]
    up = record["matrices"]["model.layers.{0-1}.mlp.up_proj"]
    assert up["zeros"] == up["numel"] // 4
    assert record["achieved_sparsity"] < 0.5
    assert "weights changed after pruning" in caplog.text


def test_a_pruner_can_be_rebuilt_from_its_dict():
    pruner = SparsePruner(method="wanda", pattern="4:8")
    assert SparsePruner.from_dict(pruner.to_dict()).config == pruner.config


def test_a_model_that_had_been_pruned_keeps_its_origin():
    model = tiny_model()
    model.name_or_path = "where/it/comes-from"
    pruned(model, sparsity=0.5)
    model.name_or_path = "a/pruned-one"
    report = pruned(model, sparsity=0.3).report
    assert model.config.sparsity_config["base_model"] == report.model == "where/it/comes-from"
    (note,) = (note for note in report.notes if "pruned before" in note)
    assert "by admm, to 50.00% zeros" in note


def test_what_was_pruned_before_and_not_now_stays_in_the_record(tmp_path):
    model = tiny_model()
    pruned(model, method="magnitude", targets=["*.self_attn.*"], pattern="2:4")
    again = {"targets": ["*.mlp.*", "*.q_proj"], "ignore": ["*.0.self_attn.*"]}
    pruner = pruned(model, method="magnitude", sparsity=0.75, **again)
    record = model.config.sparsity_config
    names = {name for folded in record["matrices"] for name in expand_name(folded)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert names == linears and record["method"] == "magnitude" and record["sparsity"] == 0.75
    zeros = sum(int((model.get_submodule(name).weight == 0).sum()) for name in names)
    numel = sum(model.get_submodule(name).weight.numel() for name in names)
    assert record["achieved_sparsity"] == pytest.approx(zeros / numel, abs=1e-6)
    patterns = {name: entry["pattern"] for f, entry in record["matrices"].items() for name in expand_name(f)}
    assert {name for name in names if patterns[name] == "2:4"} == {
        name for name in names if "self_attn" in name and not name.endswith("1.self_attn.q_proj")
    }
    pruner.save(model, tmp_path)
    assert inspect(str(tmp_path))["metadata_is_true"]
    assert set(find_masks(AutoModelForCausalLM.from_pretrained(tmp_path))) == {f"{name}.weight" for name in names}


def test_an_earlier_record_of_another_class_is_left_out(caplog):
    model = tiny_model()
    pruned(model, method="magnitude")
    base = model.model  # whose modules have other names
    pruned(base, method="magnitude", sparsity=0.7, targets=["*.mlp.*"])
    assert "left out of the record, which is of another model" in caplog.text
    assert all(name.startswith("layers.") for name in base.config.sparsity_config["matrices"])


@pytest.mark.parametrize("record", [{"format": "sparse-bitmask"}, "2:4"], ids=str)
def test_records_of_others_say_nothing(record):
    model = tiny_model()
    model.config.sparsity_config = record
    assert not any("before" in note for note in pruned(model).report.notes)
    assert model.config.sparsity_config["achieved_sparsity"] == 0.5


def test_a_pruned_model_can_be_pruned_again():
    model = tiny_model()
    pruned(model, method="wanda", sparsity=0.3)
    pruned(model, method="sparsegpt", sparsity=0.6)
    assert model.config.sparsity_config["achieved_sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_tied_output_embeddings_stay_whole():
    model = tiny_model(tie_word_embeddings=True)
    before = model.model.embed_tokens.weight.clone()
    pruner = pruned(model, method="magnitude", ignore=[])
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert "shares its weight with the embedding" in pruner.report.skipped["lm_head"]


def test_untied_output_embeddings_are_pruned_if_asked():
    model = tiny_model(tie_word_embeddings=False)
    pruned(model, method="sparsegpt", ignore=[])
    assert (model.lm_head.weight == 0).float().mean() == 0.5


def test_output_embeddings_of_another_name_are_ignored_too(monkeypatch):
    model = tiny_model()
    model.unembed = model.lm_head
    del model.lm_head
    monkeypatch.setattr(model, "get_output_embeddings", lambda: model.unembed)
    matrices, skipped = find_matrices(model, SparseConfig())
    assert skipped == {"unembed": "matches ignore"} and len(matrices) == 14


def test_padding_does_not_count():
    """Rows with padding give the same weights as the same rows without."""
    ids = tiny_batches(num=1, rows=1, length=20)[0]["input_ids"]
    rest = tiny_batches(num=1, rows=1, length=20, seed=5)[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    models = [tiny_model(), tiny_model()]
    for model, first in zip(models, [{"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}], strict=True):
        pruner = pruned(model, [first, {"input_ids": rest}], method="wanda", batch_size=1)
        assert {entry.num_tokens for entry in pruner.report.matrices} == {40}
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a == 0, b == 0)


def test_a_mask_of_who_attends_to_whom_is_no_padding():
    model = tiny_model()
    ids = tiny_batches(num=1)[0]["input_ids"]
    causal = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    loader = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": causal} for row in ids], 2)
    pruner = pruned(model, loader, method="wanda")
    assert {entry.num_tokens for entry in pruner.report.matrices} == {ids.numel()}


def test_padding_that_cannot_be_told_apart_is_refused():
    """A layer that sees something else than a vector per token or text, here only the last two tokens of each row."""
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x[:, -2:]).mean(dim=1, keepdim=True).expand_as(x)
    with pytest.raises(ValueError, match=r"0\.mlp\.gate_proj\.weight: inputs of shape \[2, 2, 32\].*without padding"):
        pruned(model, tiny_batches(padding=True), method="wanda")


def test_one_vector_for_each_text_is_no_padding():
    """As in the pooling layers of encoders: it is the text's, however long that is."""
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x[:, :1]).expand_as(x)
    batches = tiny_batches(padding=True)
    pruner = pruned(model, batches, method="wanda")
    tokens = {entry.name: entry.num_tokens for entry in pruner.report.matrices}
    assert tokens["model.layers.0.mlp.gate_proj"] == sum(len(batch["input_ids"]) for batch in batches)
    per_token = sum(int(batch.get("attention_mask", torch.ones(2, 24)).sum()) for batch in batches)
    assert tokens["model.layers.1.mlp.gate_proj"] == per_token


# Bad input: a clear error, and the model as it was.


def test_training_mode():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        pruned(tiny_model().train())


def test_offloaded_weights():
    model = tiny_model()
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="meta device"):
        pruned(model)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cpu", "cuda:0"], r"spread over cpu, cuda:0: move it to one device"),
        (["mps"], r"no float64.*model\.to\('cpu'\)"),
    ],
)
def test_devices_that_cannot_be_used(devices, message, monkeypatch):
    model = tiny_model()
    elsewhere = [types.SimpleNamespace(device=torch.device(name)) for name in devices]
    monkeypatch.setattr(model, "parameters", lambda: iter(elsewhere))
    with pytest.raises(ValueError, match=message):
        pruned(model)


def test_not_a_model():
    with pytest.raises(TypeError, match="from_pretrained"):
        SparsePruner(progress=False).prune("meta-llama/Llama-2-7b")


def test_config_and_options_together():
    with pytest.raises(TypeError, match="either config or options"):
        SparsePruner(SparseConfig(), sparsity=0.5)
    with pytest.raises(TypeError, match="from_dict"):
        SparsePruner({"sparsity": 0.5})
    with pytest.raises(ValueError, match="did you mean 'sparsity'"):
        SparsePruner(sparsty=0.5)


def test_no_tokenizer_with_text():
    with pytest.raises(ValueError, match="tokenizer"):
        pruned(tiny_model(), TEXT)


def test_pattern_that_does_not_divide_a_layer():
    with pytest.raises(
        ValueError, match=r"Pattern 2:5 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q_proj"
    ):
        pruned(tiny_model(), pattern="2:5")


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match=r"Nothing to prune.*targets=\['qproj'\].*15 .*does not match targets"):
        pruned(tiny_model(), targets=["qproj"])


def test_model_without_matrices():
    with pytest.raises(ValueError, match=r"Nothing to prune in Sequential.* it has no weight matrix"):
        pruned(torch.nn.Sequential(torch.nn.LayerNorm(3)).eval())


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_weights_names_the_layer(method):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"weights of model\.layers\.1\.mlp\.down_proj contain NaN"):
        pruned(model, method=method)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_nan_in_activations_names_the_layer(method, true_sequential):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.mlp\.gate_proj.* contain NaN"):
        pruned(model, method=method, true_sequential=true_sequential)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_with_adapters_are_refused():
    model = tiny_model()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match=r"adapters \(default\).*merge_and_unload"):
        pruned(model)


def test_compiled_models_are_refused():
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        pruned(torch.compile(tiny_model(), backend="eager"))


def test_models_with_a_compiled_module_are_refused():
    inner, whole = tiny_model(), tiny_model()
    inner.model.layers[0] = torch.compile(inner.model.layers[0])
    whole.compile()
    for model in (inner, whole):
        with pytest.raises(ValueError, match=r"compiled.*before torch\.compile"):
            pruned(model)


@pytest.mark.parametrize("given", ["my-text.txt", ["a text"]], ids=["name", "texts"])
def test_what_is_no_tokenizer_is_refused(given):
    with pytest.raises(TypeError, match=r"tokenizer must be a loaded tokenizer.*dataset="):
        SparsePruner(progress=False).prune(tiny_model(), given)


def test_a_memory_that_is_none_is_refused_before_the_data_are_read():
    with pytest.raises(ValueError, match="max_memory must be"):
        SparsePruner(progress=False).prune(tiny_model(), dataset="no such data", max_memory="lots")


def test_other_default_types(monkeypatch):
    """Not those of the solvers."""
    expected = {method: tiny_model() for method in ("sparsegpt", "wanda-update")}
    for method, model in expected.items():
        pruned(model, method=method)
    for dtype in (torch.bfloat16, torch.float64):
        for method, model in expected.items():
            other = tiny_model()
            torch.set_default_dtype(dtype)
            try:
                pruned(other, method=method)
            finally:
                torch.set_default_dtype(torch.float32)
            same = zip(model.parameters(), other.parameters(), strict=True)
            assert all(torch.equal(a == 0, b == 0) for a, b in same)


def test_little_text_is_said_to_be():
    def notes(length, **options):
        found = pruned(tiny_model(), tiny_batches(1, length=length), **options).report.notes
        return [note for note in found if "little text" in note]

    assert notes(8) and notes(8, method="sparsegpt")
    assert not notes(8, method="magnitude") and not notes(100)


def test_pruned_output_embeddings_are_said_to_be():
    assert any("output embeddings are pruned" in n for n in pruned(tiny_model(), ignore=["k_proj"]).report.notes)
    assert not any("output embeddings" in n for n in pruned(tiny_model()).report.notes)


def test_slips_in_names_are_said():
    notes = pruned(tiny_model(), ignore=["lm_head", "kproj"]).report.notes
    assert "ignore: 'kproj' matches no weight of the model" in notes


def test_a_list_of_texts_is_given_to_prune_in_the_code_of_the_report():
    pruner = SparsePruner(dataset=TEXT, seqlen=16, num_samples=4, progress=False)
    pruner.prune(tiny_model(), tiny_tokenizer())
    assert "pruner.prune(model, tokenizer, dataset)" in pruner.report.command and "texts" not in pruner.report.command


def test_seconds_of_matrices_that_are_solved_apart(monkeypatch):
    """Those of one do not count for the next, though they share their inputs."""
    solve, now = Solver._solve_stack, [0]

    def taking_a_second(*args):
        now[0] += 1
        return solve(*args)

    monkeypatch.setattr(Solver, "_solve_stack", taking_a_second)
    monkeypatch.setattr("optimum_sparse.solver.time", SimpleNamespace(perf_counter=lambda: now[0]))
    overrides = [{"match": "q_proj", "sparsity": 0.2}, {"match": "k_proj", "sparsity": 0.3}]
    entries = pruned(tiny_model(), sparsity=0.5, overrides=overrides).report.matrices
    assert all(entry.seconds == 1 for entry in entries if entry.name.endswith(("q_proj", "k_proj", "v_proj")))


def test_quantized_models_are_refused():
    model = tiny_model()
    model.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "bitsandbytes"})})()
    with pytest.raises(ValueError, match="quantized with bitsandbytes"):
        pruned(model)


def test_saving_what_was_not_pruned(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.sparsity_config"):
        SparsePruner(progress=False).save(tiny_model(), tmp_path)


def test_saving_over_the_files_of_an_offloaded_model(tmp_path):
    pruner, source = SparsePruner(method="magnitude", progress=False), tmp_path / "source"
    model = tiny_model()
    pruner.prune(model)
    pruner.save(model, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    offloaded = LlamaForCausalLM.from_pretrained(source, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"source holds model\.safetensors, from which this offloaded model"):
        pruner.save(offloaded, source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_model_loaded_from_gguf_can_be_pruned_and_saved(tmp_path):
    """As transformers loads it on its own: with a quantizer attached, which refuses to save."""
    file = write_gguf(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
    assert model.hf_quantizer is not None
    pruner = pruned(model, method="magnitude", pattern="2:4")
    pruner.save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert pruner.report.sparsity == 0.5


def test_tensors_with_more_dimensions_are_named():
    model = tiny_model()
    model.model.layers[0].experts = torch.nn.Parameter(torch.ones(4, 8, 32))
    skipped = pruned(model, method="magnitude").report.skipped
    assert skipped["model.layers.0.experts"] == "is not used in a matrix product on the calibration data"


# Models that say little of themselves.


class Experts(nn.Module):
    """Two experts of hand: each takes half of the tokens, by a router that ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2, bias=False)
        self.up = nn.Parameter(torch.randn(2, 24, 16))
        self.down = nn.Linear(24, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 16)
        chosen = self.router(flat).topk(1, dim=-1).indices[:, 0]
        output = torch.zeros_like(flat)
        for expert in range(2):
            where = (chosen == expert).nonzero()[:, 0]
            output[where] = self.down(nn.functional.linear(flat[where], self.up[expert]).relu())
        return hidden + output.view_as(hidden)


class Plain(nn.Module):
    """A model that is none of Transformers, has no configuration, and calls its input as it likes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(10, 16)
            self.layers = nn.ModuleList([Experts(), Experts()])
            self.last = nn.Linear(16, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.first(features)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.last(hidden)


def feature_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"features": torch.randn(4, 6, 10, generator=generator)} for _ in range(3)]


def assert_half_of_each(model: nn.Module, pruner: SparsePruner, dense: dict[str, torch.Tensor]) -> set[str]:
    """Each matrix has the zeros it was asked for, and what is no matrix of the report has not changed."""
    touched = set()
    for entry in pruner.report.matrices:
        parameter, weight = matrix_of(model, entry.name, entry.shape, transposed=False)
        assert entry.zeros == int((weight == 0).sum()) == weight.numel() // 2, entry.name
        touched.add(parameter)
    for name, value in model.state_dict().items():
        assert (name in touched) != torch.equal(value, dense[name]), name
    return {entry.name for entry in pruner.report.matrices}


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_a_configuration(method, true_sequential, tmp_path):
    model = Plain().eval()
    dense = copy.deepcopy(model.state_dict())
    pruner = SparsePruner(method=method, true_sequential=true_sequential, num_samples=12, progress=False)
    assert pruner.prune(model, dataset=feature_batches()) is model
    of_layer = ("up.0", "up.1", "down")
    assert assert_half_of_each(model, pruner, dense) == {
        "first",
        *(f"layers.{layer}.{name}" for layer in range(2) for name in of_layer),
    }
    assert pruner.report.skipped == {
        "layers.0.router": "is a router: its outputs are ranked to choose among them",
        "layers.1.router": "is a router: its outputs are ranked to choose among them",
        "last": "is a gate: it has a single output",
    }
    assert pruner.report.calibration["num_samples"] == 12 and pruner.report.calibration["num_tokens"] is None
    assert not hasattr(model, "config")
    with pytest.raises(ValueError, match=r"Plain is none of Transformers.*state_dict"):
        pruner.save(model, tmp_path)


def test_magnitude_where_no_forward_can_be_run():
    """Plain takes no tokens, and there is no other data: classes tell what is a matrix, and the report says so."""
    model = Plain().eval()
    dense = copy.deepcopy(model.state_dict())
    pruner = SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    found = assert_half_of_each(model, pruner, dense)
    assert found == {"first", *(f"layers.{layer}.{name}" for layer in range(2) for name in ("router", "down"))}
    assert pruner.report.skipped["layers.0.up"] == "only a forward shows how it is used"
    (note,) = pruner.report.notes
    assert re.search(r"does not run on input_ids .*'input_ids'.*Pass dataset=", note)
    assert note in pruner.report.table()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_magnitude_tells_experts_from_routers_without_data(model_type):
    model = sweep_model(model_type)
    dense = copy.deepcopy(model.state_dict())
    pruner = SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    assert pruner.report.calibration == {} and pruner.report.notes == []
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])}
    fused = {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    assert fused and fused <= changed
    for name in fused:
        for expert in model.get_parameter(name):
            assert int((expert == 0).sum()) == expert.numel() // 2
    routers = [name for name, reason in pruner.report.skipped.items() if reason.startswith("is a router")]
    assert routers and not any(f"{name}.weight" in changed for name in routers)
    assert {model.get_submodule(name).weight.shape[0] for name in routers} == {len(model.get_parameter(min(fused)))}


def test_batches_that_the_model_refuses():
    model = Plain().eval()
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'") as caught:
        pruned(model, [{"inputs": torch.randn(2, 3, 10)}], method="wanda")
    (note,) = caught.value.__notes__
    assert "Plain.forward was called with inputs. It takes features" in note


def test_a_hessian_that_needs_more_damping_is_reported(caplog):
    """One token and almost no damping: the factorisation fails until damping is raised, and the report says so."""
    model = tiny_model()
    batch = [{"input_ids": torch.tensor([[5, 6]])}]
    pruner = SparsePruner(method="sparsegpt", dampening_frac=1e-17, num_samples=1, progress=False)
    pruner.prune(model, dataset=batch)
    raised = [entry for entry in pruner.report.matrices if entry.notes]
    assert raised and all(entry.damping > 1e-17 for entry in raised)
    assert "damping was raised" in caplog.text and "damping was raised" in pruner.report.table()


def test_progress_says_what_to_expect_and_what_was_done(capsys):
    pruner = SparsePruner(method="sparsegpt", num_samples=6)
    pruner.prune(tiny_model(), dataset=tiny_batches())
    shown = capsys.readouterr().err
    assert "14 matrices, 144 calibration tokens: about" in shown
    assert "activations of waiting batches" in shown and "every layer sees pruned inputs" in shown
    assert "model.layers.1.mlp.down_proj error" in shown and "total" in shown and "50.00 %" in shown


def test_no_progress_is_silent(capsys):
    pruned(tiny_model())
    out = capsys.readouterr()
    assert out.err == "" and out.out == ""


def test_weights_that_are_dense_again_have_not_been_pruned(tmp_path):
    model = tiny_model()
    for layer in model.model.layers:  # as those of 8 bits, a few weights are zero in the dense model
        layer.self_attn.k_proj.weight.data[0, :3] = 0
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruned(model, method="magnitude")
    model.load_state_dict(dense)
    pruner = pruned(model, method="magnitude", block_range=(0, 1))
    assert not any("pruned before" in note for note in pruner.report.notes)
    assert set(model.config.sparsity_config["matrices"]) == {entry.name for entry in pruner.report.matrices}
    assert model.config.sparsity_config["achieved_sparsity"] == 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"matrices": None},
        {"matrices": []},
        {"matrices": {"model.layers.0.mlp.up_proj": None}},
        {"achieved_sparsity": "half"},
        {"method": None},
    ],
    ids=str,
)
def test_a_damaged_record_is_left_out(change, caplog):
    model = tiny_model()
    pruned(model, method="magnitude")
    record = {**model.config.sparsity_config, **change}
    model.config.sparsity_config = {name: value for name, value in record.items() if name != "method" or value}
    pruned(model, method="magnitude", block_range=(0, 1))
    assert "left out of the record" in caplog.text
    assert len(model.config.sparsity_config["matrices"]) == 7


def test_matrices_of_two_types_that_share_inputs_keep_their_values():
    model = tiny_model()
    layer = model.model.layers[0].self_attn
    layer.q_proj.bfloat16()
    before = layer.k_proj.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        pruned(model, method="wanda", targets=["*.q_proj", "*.k_proj"])
    kept = layer.k_proj.weight != 0
    assert torch.equal(layer.k_proj.weight[kept], before[kept]) and kept.float().mean() == 0.5
    assert layer.q_proj.weight.dtype == torch.bfloat16


def test_adapters_in_a_part_of_the_model_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    get_peft_model(model.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"carries adapters \(default\)"):
        pruned(model)


def test_a_card_of_another_model_is_left_alone_and_named(tmp_path, caplog):
    from optimum_sparse.integrations.hub import model_card, save_card

    model = tiny_model()
    pruned(model, method="magnitude").save(model, tmp_path)
    assert not (tmp_path / "README.md").exists()
    save_card(model_card(model.config.sparsity_config), tmp_path)
    card = (tmp_path / "README.md").read_text()
    model = tiny_model()
    pruned(model, method="wanda").save(model, tmp_path)
    assert "README.md is left alone, and tells of the model that was there before" in caplog.text
    assert (tmp_path / "README.md").read_text() == card
    caplog.clear()
    (tmp_path / "README.md").write_text("mine")
    pruned(model, method="magnitude").save(model, tmp_path)
    assert "left alone" not in caplog.text


def test_what_is_still_pruned_stays_in_the_record():
    model = tiny_model()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruned(model, method="magnitude")
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data.copy_(dense[name])
    pruned(model, method="magnitude", targets=["*.down_proj"])
    kinds = {name.split(".")[-1] for name in model.config.sparsity_config["matrices"]}
    assert kinds == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_records_with_text_for_numbers_are_left_out(caplog):
    model = tiny_model()
    pruned(model, method="magnitude")
    next(iter(model.config.sparsity_config["matrices"].values()))["zeros"] = "512"
    pruned(model, method="magnitude", block_range=(0, 1))
    assert "zeros and numel must be whole numbers" in caplog.text


@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({"method": "sparsegpt"}, True),
        ({"method": "admm"}, False),
        ({"method": "admm", "quantization": "int4", "group_size": 16}, True),
        ({"method": "wanda", "quantization": "int4", "group_size": 16}, False),
        ({"method": "wanda", "refine": "cg", "quantization": "int4", "group_size": 16}, True),
    ],
    ids=str,
)
def test_a_sweep_without_its_kernel_is_noted(options, slow, monkeypatch):
    """Also the one that rounds, behind methods that prune without a sweep."""
    monkeypatch.setattr("optimum_sparse.run.fused.missing", lambda device, rounds: "no kernel")
    assert ("no kernel" in pruned(tiny_model(), **options).report.notes) == slow
