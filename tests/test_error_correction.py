"""Error correction in runs of every kind."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sparse import SparseConfig, SparsePruner, solver
from optimum_sparse.blocks import Blocks
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.methods import METHODS, correction
from optimum_sparse.methods.correction import DAMPING
from optimum_sparse.patterns import Unstructured
from optimum_sparse.reconstruction import reconstruct
from optimum_sparse.statistics import GramStatistics, PairedStatistics

from .helpers import tiny_batches, tiny_mixtral, tiny_model
from .test_experts import CASES, batches_of

BATCHES = 8


def pruned(model, folder: Path | None = None, correction: float | None = 0.5, padding: bool = False, **options):
    arguments = {name: options.pop(name) for name in ("activation_device", "resume_from") if name in options}
    settings = {"method": "sparsegpt", "error_correction": correction, "batch_size": 2, **options}
    settings |= {} if "pattern" in options else {"sparsity": 0.6}
    settings |= {} if correction else {"true_sequential": False}
    pruner = SparsePruner(progress=False, **settings)
    pruner.prune(model, dataset=tiny_batches(BATCHES, padding=padding), **arguments)
    if folder is not None:
        pruner.save(model, folder)
    return pruner


def inputs_of(model, name: str, padding: bool) -> list[torch.Tensor]:
    """What a layer receives on each calibration batch, `[tokens, in_features]` float64, without padding."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batches = tiny_batches(BATCHES, padding=padding)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
    return [x[mask].double() for x, mask in zip(seen, masks, strict=True)]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_block_is_pruned_towards_what_the_dense_model_has_there(name: str, padding: bool):
    dense, model = tiny_model(), tiny_model()
    pruned(model, correction=0.7, padding=padding)
    before = copy.deepcopy(dense)  # as the second block was when it was pruned
    before.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    name = f"model.layers.1.{name}"
    seen, seen_dense = inputs_of(before, name, padding), inputs_of(dense, name, padding)
    x, paired, x_dense = torch.cat(seen), torch.cat(seen[1:]), torch.cat(seen_dense[1:])  # the first batch judges
    deviation = (x_dense - paired).T @ (paired / x.norm(dim=0)) * len(x) / len(paired)
    weight = dense.get_submodule(name).weight.detach().double()
    norms = x.norm(dim=0)
    gram = (x / norms).T @ (x / norms) + DAMPING * torch.eye(x.shape[1])
    target = weight + 0.7 * weight @ deviation @ torch.linalg.inv(gram) / norms
    assert (target - weight).norm() > 0.01 * weight.norm()  # there is something to correct
    statistics = GramStatistics(x.shape[1])
    statistics.add(x.float())
    config = SparseConfig(sparsity=0.6)
    expected = METHODS["sparsegpt"].solve(target.float(), statistics, Unstructured(0.6), config).weight
    found = model.get_submodule(name).weight
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_first_block_has_nothing_to_correct():
    corrected, plain = tiny_model(), tiny_model()
    pruned(corrected)
    pruned(plain, correction=None)
    first, other = corrected.model.layers[0].state_dict(), plain.model.layers[0].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.items())
    first, other = corrected.model.layers[1].state_dict(), plain.model.layers[1].state_dict()
    assert not torch.equal(first["mlp.down_proj.weight"], other["mlp.down_proj.weight"])


def distance(model: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return sum(
            (model(**batch).logits - dense(**batch).logits).square().mean().item() for batch in tiny_batches(BATCHES)
        )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"method": "wanda", "pattern": "2:4"}),
        ("llama", {"method": "admm"}),
        ("llama", {"quantization": "int8"}),
        ("gpt2", {"refine": "cg"}),
        ("zamba2", {}),  # a block that runs twice, which is pruned before
        ("mixtral", {}),
        ("mixtral", {"method": "wanda", "pattern": "2:4"}),
    ],
    ids=str,
)
def test_models_come_closer_to_the_dense_one(tmp_path: Path, kind: str, options: dict):
    def model():
        return tiny_mixtral() if kind == "mixtral" else tiny_model(kind)

    dense, corrected, plain = model(), model(), model()
    report, other = (pruned(m, tmp_path, c, **options).report for m, c in ((plain, None), (corrected, 0.5)))
    assert [entry.name for entry in report.matrices] == [entry.name for entry in other.matrices]
    if "quantization" not in options:  # which rounds some more to zero
        assert [entry.zeros for entry in report.matrices] == [entry.zeros for entry in other.matrices]
    assert distance(corrected, dense) < distance(plain, dense)
    assert inspect(str(tmp_path))["metadata_is_true"]


def assert_same(*folders: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("options", [{}, {"reconstruct": 1}], ids=str)
def test_waiting_elsewhere_changes_nothing(tmp_path: Path, options: dict):
    pruned(tiny_model(), tmp_path / "expected", **options)
    pruned(tiny_model(), tmp_path / "spilled", activation_device="disk", **options)
    tiny_model().save_pretrained(tmp_path / "dense")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    pruned(offloaded, tmp_path / "offloaded", **options)
    assert_same(tmp_path / "expected", tmp_path / "spilled")
    assert_same(tmp_path / "expected", tmp_path / "offloaded")


@pytest.mark.parametrize("options", [{}, {"reconstruct": 1}, {"ignore": []}], ids=str)
@pytest.mark.parametrize("finished", [1, 2])
def test_a_run_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, options: dict
):
    pruned(tiny_model(num_hidden_layers=3), tmp_path / "expected", **options)
    solve, solved = METHODS["sparsegpt"].solve, []

    def interrupted(*arguments):
        if len(solved) == 8 * finished:  # a block has four groups, each solved with and without correction
            raise KeyboardInterrupt
        solved.append(arguments)
        return solve(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(METHODS, "sparsegpt", replace(METHODS["sparsegpt"], solve=interrupted))
        pruned(tiny_model(num_hidden_layers=3), resume_from=tmp_path / "progress", **options)
    patched = replace(METHODS["sparsegpt"], solve=lambda *arguments: (solved.append(arguments), solve(*arguments))[1])
    monkeypatch.setitem(METHODS, "sparsegpt", patched)
    pruned(tiny_model(num_hidden_layers=3), tmp_path / "resumed", resume_from=tmp_path / "progress", **options)
    assert len(solved) == 8 * 3 + ("ignore" in options)  # each once
    assert_same(tmp_path / "expected", tmp_path / "resumed")


def test_a_block_that_runs_twice_is_there_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pruned(tiny_model("zamba2"), tmp_path / "expected")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        best, calls = Blocks._best, []

        def interrupted(*arguments):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(arguments)
            return best(*arguments)

        patch.setattr(Blocks, "_best", interrupted)
        pruned(tiny_model("zamba2"), resume_from=tmp_path / "progress")
    assert list((tmp_path / "progress").glob("*.safetensors"))
    pruned(tiny_model("zamba2"), tmp_path / "resumed", resume_from=tmp_path / "progress")
    assert_same(tmp_path / "expected", tmp_path / "resumed")


def test_what_does_not_help_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    corrected, plain = tiny_model(), tiny_model()
    right = correction.corrected_target
    monkeypatch.setattr(solver, "corrected_target", lambda weight, *arguments: 2 * weight - right(weight, *arguments))
    report = pruned(corrected, correction=1.0).report
    pruned(plain, correction=None)
    second = report.correction["model.layers.1"]
    assert (
        report.notes[-1].startswith("errors are not corrected in model.layers.") and "were better" in report.notes[-1]
    )
    assert second["correction"] == 0 and second["after"] == second["before"] > 0
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in corrected.named_parameters())


def test_the_report_has_the_errors_of_held_out_batches():
    dense, corrected = tiny_model(), tiny_model()
    report = pruned(corrected).report
    batch = tiny_batches(BATCHES)[0]
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True).hidden_states[1] for model in (corrected, dense)]
    difference, reference = (outputs[0] - outputs[1]).square().sum(-1), outputs[1].square().sum(-1)
    first, second = report.correction.values()
    assert first["after"] == pytest.approx((difference / reference).mean().item(), rel=1e-4)
    assert second["after"] < second["before"] and second["correction"] == 0.5


def test_the_report_has_what_is_not_corrected():
    report = pruned(tiny_mixtral(), ignore=[]).report
    left = [entry.name for entry in report.matrices if not entry.correction]
    assert any("experts" in name for name in left) and "lm_head" in left
    assert {entry.correction for entry in report.matrices if "self_attn" in entry.name} == {0.5}
    assert report.notes[-1].startswith(f"errors are not corrected in {len(left)} matrices, {left[0]} among them")


def test_inputs_that_overflow_in_the_dense_model_alone_are_refused(monkeypatch: pytest.MonkeyPatch):
    add = PairedStatistics.add_deviation
    monkeypatch.setattr(
        PairedStatistics, "add_deviation", lambda self, inputs, dense: add(self, inputs, dense * float("inf"))
    )
    with pytest.raises(ValueError, match=r"q_proj.*: the inputs in the dense model contain NaN or infinity"):
        pruned(tiny_model())


def test_blocks_are_trained_towards_the_dense_model_by_the_same_share(monkeypatch: pytest.MonkeyPatch):
    dense, model, targets = tiny_model(), tiny_model(), []

    def noted(block, names, outputs, *rest):
        targets.append({batch: output.clone() for batch, output in outputs.items()})
        return reconstruct(block, names, outputs, *rest)

    monkeypatch.setattr("optimum_sparse.blocks.reconstruct", noted)
    pruned(model, correction=0.3, reconstruct=1)
    before = copy.deepcopy(dense)  # as the second block was when it was pruned
    before.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    for one in (before, dense):
        one.model.norm = nn.Identity()  # so that what is behind the last block can be seen
    for index, batch in enumerate(tiny_batches(BATCHES)):
        with torch.no_grad():
            own, there = (one.model(**batch).last_hidden_state for one in (before, dense))
        torch.testing.assert_close(targets[1][index], own + 0.3 * (there - own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "jetmoe", "hand-written"])
def test_experts_are_not_paired_with_tokens_that_others_have_there(kind: str):
    model = CASES[kind].build()
    batches = batches_of(model)
    pruner = SparsePruner(progress=False, error_correction=0.5, sparsity=0.5, batch_size=6)
    pruner.prune(model, dataset=batches)
    assert pruner.report.calibration["num_samples"] == 6  # in one batch
    everything = sum(batch["input_ids"].numel() for batch in batches)
    experts = [e for e in pruner.report.matrices if "expert" in e.name and "shared" not in e.name]
    # One that all tokens go to has the same tokens.
    assert all(entry.correction == 0 or entry.num_tokens == everything for entry in experts)
    assert any(entry.correction == 0 for entry in experts)
    assert any(entry.correction == 0.5 for entry in pruner.report.matrices)


def test_a_single_batch_judges_the_correction(monkeypatch: pytest.MonkeyPatch):
    """Where it made a block worse, it is not taken, though there is nothing held out to judge by."""
    monkeypatch.setattr(solver, "corrected_target", lambda weight, statistics, share: weight + 10 * share)
    model, plain = tiny_model(), tiny_model()
    pruner = SparsePruner(method="sparsegpt", error_correction=0.5, progress=False)
    pruner.prune(model, dataset=tiny_batches(1))
    assert len(pruner.report.correction) == 2
    assert all(found["correction"] == 0 < found["before"] for found in pruner.report.correction.values())
    SparsePruner(method="sparsegpt", true_sequential=False, progress=False).prune(plain, dataset=tiny_batches(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
