"""Masked LoRA against a naive implementation in float64, and through PEFT's own merging."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call

from optimum_sparse.recovery import find_masks, keep_sparsity
from optimum_sparse.recovery.masks import parameter
from tests.helpers import tiny_batches, tiny_model

from .pruned import assert_zeros_kept, pruned_model, zero_positions

TOKENS = tiny_batches(num=6)


def lora_config(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def masked(model, seed=0, **options):
    """A copy of a pruned model with masked LoRA whose update is not zero from the start."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = keep_sparsity(get_peft_model(model, lora_config(init_lora_weights=False, **options)))
    return peft_model


def loss_of(model, batch):
    return model(**batch, labels=batch["input_ids"]).loss


class Naive:
    """`W + M ∘ (s B A)` written out: the dense weight as a function of the factors, differentiated by autograd."""

    def __init__(self, pruned, peft_model, scaling, experts=()):
        self.model = copy.deepcopy(pruned).requires_grad_(False)
        self.factors = {}
        self.scaling = scaling
        for name, value in peft_model.named_parameters():
            if ".lora_" in name:
                bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
                self.factors[bare] = value.detach().clone().requires_grad_()
        self.experts = experts

    def weights(self):
        weights = {}
        for key in {name.partition(".lora_")[0] for name in self.factors}:
            matrix = f"{key}.weight"
            weight = self.model.get_parameter(matrix)
            update = sum(
                self.scaling * self.factors[f"{key}.lora_B.{a}.weight"] @ self.factors[f"{key}.lora_A.{a}.weight"]
                for a in {name.split(".")[-2] for name in self.factors if name.startswith(f"{key}.lora_A.")}
            )
            if update.shape != weight.shape or "c_" in key:  # Conv1D is [in, out]
                update = update.T
            weights[matrix] = weight + torch.where(weight != 0, update, torch.zeros_like(update))
        return weights

    def loss(self, batch):
        return functional_call(self.model, self.weights(), kwargs={**batch, "labels": batch["input_ids"]}).loss


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_training_equals_the_naive_implementation_step_by_step(architecture, options):
    pruned = pruned_model(architecture).double()
    peft_model = masked(pruned, **options).eval()  # GPT-2 and OPT have dropout of their own
    naive = Naive(pruned, peft_model, scaling=8 / 4**0.5 if options else 8 / 4)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(params, lr=0.01) for params in (trained, naive.factors.values())]
    for batch in TOKENS:
        losses = [loss_of(peft_model, batch), naive.loss(batch)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for ours, theirs in zip(trained, naive.factors.values(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(trained, naive.factors.values(), strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-7, atol=1e-9)
    assert_zeros_kept(peft_model.merge_and_unload(), zero_positions(pruned))


def test_several_active_adapters_equal_the_naive_sum():
    pruned = pruned_model().double()
    peft_model = masked(pruned)
    peft_model.add_adapter("second", lora_config(init_lora_weights=False, r=4))
    keep_sparsity(peft_model)
    peft_model.base_model.set_adapter(["default", "second"])
    naive = Naive(pruned, peft_model, scaling=2)
    loss, expected = loss_of(peft_model, TOKENS[0]), naive.loss(TOKENS[0])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward(), expected.backward()
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in peft_model.named_parameters() if "lora_" in n}
    for name, factor in naive.factors.items():
        torch.testing.assert_close(grads[name], factor.grad, rtol=1e-9, atol=1e-12)
    merged = peft_model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(loss_of(merged, TOKENS[0]), expected, rtol=1e-12, atol=0)
    assert_zeros_kept(merged, zero_positions(pruned))


def test_a_single_fused_expert():
    """PEFT has no dimension of experts in the factors then, and the parameter has one."""
    pruned = pruned_model("mixtral", num_local_experts=1, num_experts_per_tok=1, intermediate_size=24).double()
    peft_model = masked(pruned, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    expected = loss_of(peft_model, TOKENS[0])
    expected.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in peft_model.named_parameters() if "lora_" in n)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(loss_of(merged, TOKENS[0]), expected.detach(), rtol=1e-12, atol=0)
    assert (loss_of(pruned, TOKENS[0]) - expected).abs() > 1e-6
    assert_zeros_kept(merged, zero_positions(pruned))


def test_what_a_layer_puts_out_can_be_changed_in_place():
    """As some models do: `linear(x) += ...`."""
    gradients = []
    for change in (torch.Tensor.add_, torch.Tensor.add):
        peft_model = masked(pruned_model("gpt2").double(), target_modules=["c_fc"])
        layer = peft_model.get_submodule("base_model.model.transformer.h.0.mlp.c_fc")
        layer.register_forward_hook(lambda module, args, output, change=change: change(output, 0.1))
        loss_of(peft_model, TOKENS[0]).backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if "lora_" in n})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_fused_experts(architecture, adapters):
    pruned = pruned_model(architecture).double()
    options = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    peft_model = masked(pruned, **options)
    if adapters == 2:
        peft_model.add_adapter("second", lora_config(init_lora_weights=False, **options))
        keep_sparsity(peft_model)
        peft_model.base_model.set_adapter(["default", "second"])
    loss = loss_of(peft_model, TOKENS[0])
    loss.backward()

    dense = copy.deepcopy(pruned).requires_grad_(False)
    weights = {}
    experts = peft_model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    wrappers = {experts.parameter_name: experts, experts.base_layer.parameter_name: experts.base_layer}
    factors = {}
    for name, wrapper in wrappers.items():
        key = f"model.layers.0.mlp.experts.{name}"
        weight = dense.get_parameter(key)
        update = 0
        for adapter in wrapper.lora_A:
            a = factors[name, adapter, "A"] = wrapper.lora_A[adapter].weight.detach().clone().requires_grad_()
            b = factors[name, adapter, "B"] = wrapper.lora_B[adapter].weight.detach().clone().requires_grad_()
            # PEFT keeps the factors of the experts one after the other in A, interleaved in B.
            slices = [2 * b[:, e :: len(weight)] @ a[4 * e : 4 * e + 4] for e in range(len(weight))]
            delta = torch.stack(slices)
            update = update + (delta.mT if architecture == "gpt_oss" else delta)
        weights[key] = weight + (weight != 0) * update
    q = peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    weight = dense.model.layers[0].self_attn.q_proj.weight
    update = sum(2 * q.lora_B[n].weight.detach() @ q.lora_A[n].weight.detach() for n in q.lora_A)
    weights["model.layers.0.self_attn.q_proj.weight"] = weight + (weight != 0) * update
    expected = functional_call(dense, weights, kwargs={**TOKENS[0], "labels": TOKENS[0]["input_ids"]}).loss
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, adapter, which), factor in factors.items():
        ours = getattr(wrappers[name], f"lora_{which}")[adapter].weight.grad
        torch.testing.assert_close(ours, factor.grad, rtol=1e-9, atol=1e-12)
    merged = peft_model.merge_and_unload(adapter_names=["default", "second"][:adapters])
    torch.testing.assert_close(loss_of(merged, TOKENS[0]), expected, rtol=1e-12, atol=0)
    assert_zeros_kept(merged, zero_positions(pruned))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unmerging(architecture, safe_merge):
    pruned = pruned_model(architecture)
    zeros = zero_positions(pruned)
    peft_model = masked(pruned)
    before = {key: parameter(peft_model.get_base_model(), key).clone() for key in find_masks(pruned)}
    logits = peft_model(**TOKENS[0]).logits
    assert not torch.allclose(logits, pruned(**TOKENS[0]).logits, atol=1e-2)

    peft_model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(peft_model(**TOKENS[0]).logits, logits, rtol=1e-5, atol=1e-5)
    for key, weight in before.items():
        merged = parameter(peft_model.get_base_model(), key)
        assert (merged[weight == 0] == 0).all()
        assert not torch.equal(merged, weight)

    peft_model.unmerge_adapter()
    for key, weight in before.items():
        unmerged = parameter(peft_model.get_base_model(), key)
        assert (unmerged[weight == 0] == 0).all()
        torch.testing.assert_close(unmerged, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(peft_model(**TOKENS[0]).logits, logits, rtol=1e-5, atol=1e-5)

    merged = peft_model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(pruned)
    assert_zeros_kept(merged, zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unmerged_and_merged_are_the_same_bits_in_half_precision(dtype):
    peft_model = masked(pruned_model().to(dtype))
    assert peft_model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    with torch.no_grad():
        unmerged = peft_model(**TOKENS[0]).logits
        merged = peft_model.merge_and_unload()(**TOKENS[0]).logits
    assert unmerged.dtype == dtype
    assert torch.equal(unmerged, merged)


def test_autocast_trains_in_the_lower_precision():
    peft_model = masked(pruned_model())
    expected = loss_of(peft_model, TOKENS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(peft_model, TOKENS[0])
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for n, p in peft_model.named_parameters() if "lora_" in n
    )


def test_dropout_is_on_the_input_of_the_update_alone():
    pruned = pruned_model().double()
    peft_model = masked(pruned, lora_dropout=0.5)
    without = masked(pruned)
    torch.testing.assert_close(loss_of(peft_model.eval(), TOKENS[0]), loss_of(without, TOKENS[0]), rtol=1e-12, atol=0)
    layer = peft_model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").train()
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = layer.lora_dropout["default"](x)
    base = layer.get_base_layer().weight
    update = (base != 0) * (2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    torch.testing.assert_close(y, x @ base.T + dropped @ update.T, rtol=1e-12, atol=1e-12)


def test_bias_of_the_adapter():
    peft_model = masked(pruned_model("gpt2"), lora_bias=True)
    with torch.no_grad():
        logits = peft_model(**TOKENS[0]).logits
        for name, p in peft_model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                p.add_(0.1)
        changed = peft_model(**TOKENS[0]).logits
        assert not torch.allclose(changed, logits, atol=1e-3)
        torch.testing.assert_close(peft_model.merge_and_unload()(**TOKENS[0]).logits, changed, rtol=1e-4, atol=1e-4)


def test_a_kept_weight_that_is_zero_is_still_trained():
    """What the mask says counts, not what the weight is at the moment."""
    pruned = pruned_model().double()
    masks = find_masks(pruned)
    key = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        pruned.get_parameter(key).zero_()
    peft_model = masked_with(pruned, masks)
    merged = peft_model.merge_and_unload()
    assert torch.equal(merged.get_parameter(key) != 0, masks[key].expand())


def masked_with(model, masks):
    torch.manual_seed(0)
    return keep_sparsity(get_peft_model(copy.deepcopy(model), lora_config(init_lora_weights=False)), masks)


def test_matrices_that_were_not_pruned_get_ordinary_lora():
    pruned = pruned_model()
    matrices = pruned.config.sparsity_config["matrices"]
    dense = "model.layers.0.mlp.down_proj"
    del matrices[dense]
    merged = masked(pruned).merge_and_unload()
    assert (merged.get_submodule(dense).weight != 0).all()
    assert (merged.model.layers[1].mlp.down_proj.weight == 0).sum() >= 1024


def test_no_dense_tensor_is_kept_for_backward():
    """What autograd saves is inputs and factors; the pruned weight itself is shared, not copied."""
    pruned = pruned_model(hidden_size=32)
    peft_model = masked(pruned).train()
    layer = peft_model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 32, requires_grad=True))
    weight = layer.get_base_layer().weight
    dense = [t for t in saved if t.numel() >= weight.numel()]
    assert dense and all(t.data_ptr() == weight.data_ptr() for t in dense)


def test_gradient_checkpointing_changes_nothing():
    peft_model = masked(pruned_model().double()).train()
    loss_of(peft_model, TOKENS[0]).backward()
    expected = {n: p.grad.clone() for n, p in peft_model.named_parameters() if p.grad is not None}
    peft_model.zero_grad()
    peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(peft_model, TOKENS[0]).backward()
    for name, p in peft_model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-14)


def test_a_base_layer_with_hooks_is_called():
    """Accelerate moves weights in hooks of the base layer, which must then be called itself."""
    peft_model = masked(pruned_model().double())
    expected = loss_of(peft_model, TOKENS[0])
    calls = []
    base = peft_model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_base_layer()
    base.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(loss_of(peft_model, TOKENS[0]), expected, rtol=1e-12, atol=0)
    assert calls == [1]


def test_disabling_the_adapter_gives_the_pruned_model():
    pruned = pruned_model()
    peft_model = masked(pruned)
    with torch.no_grad(), peft_model.disable_adapter():
        assert torch.equal(peft_model(**TOKENS[0]).logits, pruned(**TOKENS[0]).logits)


def test_transformers_own_adapter_api(monkeypatch):
    # transformers 5.24 wants PEFT 0.22, which is not there yet
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    pruned = pruned_model()
    zeros = zero_positions(pruned)
    model = copy.deepcopy(pruned)
    model.add_adapter(lora_config(init_lora_weights=False), adapter_name="a")
    assert keep_sparsity(model) is model
    layer = model.model.layers[0].mlp.up_proj
    layer.merge()
    assert (layer.get_base_layer().weight[zeros["model.layers.0.mlp.up_proj.weight"]] == 0).all()


class TestOnItsOwn:
    """An adapter saved without its base model."""

    def test_it_is_restored_with_its_mask(self, tmp_path):
        pruned = pruned_model()
        peft_model = masked(pruned)
        peft_model.save_pretrained(tmp_path)
        restored = PeftModel.from_pretrained(copy.deepcopy(pruned), tmp_path)
        with torch.no_grad():
            assert torch.equal(restored(**TOKENS[0]).logits, peft_model(**TOKENS[0]).logits)
        assert_zeros_kept(restored.merge_and_unload(), zero_positions(pruned))

    def test_experts_and_transformers_own_loading(self, tmp_path):
        pruned = pruned_model("mixtral")
        peft_model = masked(pruned, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
        peft_model.save_pretrained(tmp_path)
        restored = PeftModel.from_pretrained(copy.deepcopy(pruned), tmp_path)
        with torch.no_grad():
            assert torch.equal(restored(**TOKENS[0]).logits, peft_model(**TOKENS[0]).logits)
        assert_zeros_kept(restored.merge_and_unload(), zero_positions(pruned))

    def test_transformers_load_adapter(self, tmp_path):
        pruned = pruned_model()
        peft_model = masked(pruned)
        peft_model.save_pretrained(tmp_path)
        model = copy.deepcopy(pruned)
        model.load_adapter(str(tmp_path))
        with torch.no_grad():
            assert torch.equal(model(**TOKENS[0]).logits, peft_model(**TOKENS[0]).logits)

    def test_plain_peft_refuses_it(self, tmp_path):
        masked(pruned_model()).save_pretrained(tmp_path)
        tiny_model().save_pretrained(tmp_path / "base")
        code = (
            "import sys\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
            "PeftModel.from_pretrained(model, sys.argv[1])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, tmp_path, tmp_path / "base"], capture_output=True, text=True
        )
        assert result.returncode != 0
        assert result.stderr.strip().endswith("KeyError: 'SPARSE_LORA'")

    def test_saving_twice_gives_the_same_file(self, tmp_path):
        peft_model = masked(pruned_model())
        peft_model.save_pretrained(tmp_path / "a")
        keep_sparsity(peft_model)
        peft_model.save_pretrained(tmp_path / "b")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config == json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert config["peft_type"] == "SPARSE_LORA"
        assert len(config["masks"]) == 14

    @pytest.mark.parametrize("base", ["other zeros", "dense", "merged"])
    def test_another_base_is_refused(self, base, tmp_path):
        peft_model = masked(pruned_model())
        peft_model.save_pretrained(tmp_path)
        if base == "merged":  # by ordinary LoRA
            model = get_peft_model(pruned_model(), lora_config(init_lora_weights=False)).merge_and_unload()
        else:
            model = pruned_model(seed=1) if base == "other zeros" else tiny_model()
        with pytest.raises(
            ValueError, match=r"trained on a model with other zeros in 'model\.layers\.0\.self_attn\.q_"
        ):
            PeftModel.from_pretrained(model, tmp_path)

    def test_training_goes_on_after_loading(self, tmp_path):
        pruned = pruned_model()
        masked(pruned).save_pretrained(tmp_path)
        restored = PeftModel.from_pretrained(copy.deepcopy(pruned), tmp_path, is_trainable=True)
        loss_of(restored, TOKENS[0]).backward()
        assert all(p.grad is not None for n, p in restored.named_parameters() if "lora_" in n)


class TestRefused:
    def test_dora(self):
        model = get_peft_model(pruned_model(), lora_config(use_dora=True))
        with pytest.raises(ValueError, match=r"DoraLinearVariant computes the update .* .DoRA divides by the norm"):
            keep_sparsity(model)

    def test_a_dense_model(self):
        with pytest.raises(ValueError, match="not known to be pruned"):
            keep_sparsity(get_peft_model(tiny_model(), lora_config()))

    def test_no_lora(self):
        with pytest.raises(ValueError, match=r"no LoRA layers: call get_peft_model"):
            keep_sparsity(pruned_model())

    def test_lora_elsewhere(self):
        with pytest.raises(ValueError, match=r"None of the pruned matrices is adapted: LoRA is on lm_head\.weight"):
            keep_sparsity(get_peft_model(pruned_model(), lora_config(target_modules=["lm_head"])))

    def test_merged_adapters(self):
        model = get_peft_model(pruned_model(), lora_config())
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"are merged into its weights: call unmerge_adapter\(\) first"):
            keep_sparsity(model)

    def test_an_initialisation_that_changes_the_weights(self):
        model = get_peft_model(pruned_model(), lora_config(init_lora_weights="pissa"))
        with pytest.raises(ValueError, match=r"init_lora_weights='pissa', which moves a part of the base"):
            keep_sparsity(model)

    def test_masks_of_another_model(self):
        model = get_peft_model(pruned_model(), lora_config())
        with pytest.raises(ValueError, match=r"are not zero, but the mask says that they were pruned"):
            keep_sparsity(model, find_masks(pruned_model(seed=1)))

    def test_copies_of_pruned_modules(self):
        model = get_peft_model(pruned_model(), lora_config(target_modules=["q_proj"], modules_to_save=["up_proj"]))
        with pytest.raises(ValueError, match=r"modules_to_save trains a copy of model\.layers\.0\.mlp\.up_proj"):
            keep_sparsity(model)

    def test_mixed_batches(self):
        peft_model = masked(pruned_model()).eval()
        with pytest.raises(ValueError, match=r"cannot run several adapters in one batch"):
            peft_model(**TOKENS[0], adapter_names=["default", "__base__"])


def test_weights_that_several_modules_use_are_refused():
    model = pruned_model()
    first, second = (layer.mlp for layer in model.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(ValueError, match=r"several modules use model\.layers\.0\.mlp\.up_proj\.weight"):
        keep_sparsity(get_peft_model(model, lora_config()))


def test_weights_that_several_modules_use_may_be_left_alone():
    model = pruned_model()
    first, second = (layer.mlp for layer in model.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    keep_sparsity(get_peft_model(model, lora_config(target_modules=["down_proj"])))


def test_replicated_layers_are_refused():
    with pytest.raises(ValueError, match="several modules use"):
        keep_sparsity(get_peft_model(pruned_model(), lora_config(layer_replication=[(0, 2), (0, 2)])))
