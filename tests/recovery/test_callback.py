"""`SparsityCallback` with the stock Trainer: the zeros hold, the kept weights train as if there were nothing else."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from optimum_sparse.recovery import SparsityCallback, find_masks, keep_sparsity, train_norms_only
from tests.helpers import tiny_model

from .pruned import assert_zeros_kept, pruned_model, zero_positions
from .training import STEPS, arguments, rows

ROOT = Path(__file__).parents[2]


class Spy(TrainerCallback):
    """Looks at the weights and the gradients at each optimizer step."""

    def __init__(self, model):
        self.zeros, self.model, self.steps = zero_positions(model), model, 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, weight in self.model.named_parameters():
            if name in self.zeros and weight.grad is not None and "embed" not in name and "lm_head" not in name:
                assert (weight.grad[self.zeros[name]] == 0).all()
                assert (weight.grad[~self.zeros[name]] != 0).any()

    def on_step_end(self, args, state, control, **kwargs):
        assert_zeros_kept(self.model, self.zeros)
        self.steps += 1


def train(model, output, callbacks=(), resume=None, data=None, **options):
    torch.manual_seed(0)
    trainer = Trainer(
        model,
        arguments(output, **options),
        train_dataset=data or rows(),
        eval_dataset=rows(8, seed=2),
        callbacks=[SparsityCallback(model), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"optim": "sgd"}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulation", "bf16", "sgd", "checkpointing"],
)
def test_the_zeros_hold_at_every_step(architecture, options, tmp_path):
    model = pruned_model(architecture)
    before = copy.deepcopy(model.state_dict())
    spy = Spy(model)
    trainer = train(model, tmp_path, [spy], **options)
    assert spy.steps == trainer.state.global_step == 6
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(changed) == len(before)
    moments = {id(p): s["exp_avg"] for p, s in trainer.optimizer.state.items() if "exp_avg" in s}
    for key, mask in find_masks(pruned_model(architecture)).items():
        weight = model.get_parameter(key)
        if id(weight) in moments:
            assert (moments[id(weight)][~mask.expand()] == 0).all()
    assert not any(p._backward_hooks for p in model.parameters() if p._backward_hooks is not None)


def test_training_equals_the_naive_implementation():
    """Against a float64 model whose weight is `M ∘ W`, differentiated by autograd, with AdamW written out."""
    model = pruned_model().double()
    masks = {key: mask.expand(torch.float64) for key, mask in find_masks(model).items()}
    naive = copy.deepcopy(model)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in naive.named_parameters()}
    callback = SparsityCallback(model)
    callback.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in leaves.items()}
    for step, row in enumerate(rows(6), start=1):
        batch = {name: value[None] for name, value in row.items()}
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None)

        effective = {name: p * masks.get(name, 1) for name, p in leaves.items()}
        expected = functional_call(naive, effective, kwargs=batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        grads = torch.autograd.grad(expected, list(leaves.values()))
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            first, second = moments[name]
            first.mul_(0.9).add_(grad, alpha=0.1)
            second.mul_(0.999).add_(grad**2, alpha=0.001)
            with torch.no_grad():
                leaf.mul_(1 - 0.01 * 0.1)
                leaf -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), leaves[name].detach(), rtol=1e-8, atol=1e-11)


def test_resuming_in_the_middle_gives_the_same_bits(tmp_path):
    whole, model = pruned_model(), pruned_model()
    zeros = zero_positions(whole)
    train(whole, tmp_path / "whole")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    options = dict(save_strategy="steps", save_steps=3)
    train(model, tmp_path / "parts", [Stop()], **options)
    assert not torch.equal(model.state_dict()["model.norm.weight"], whole.state_dict()["model.norm.weight"])
    resumed = pruned_model()
    spy = Spy(resumed)
    train(resumed, tmp_path / "parts", [spy], resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    assert spy.steps == 3
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    assert_zeros_kept(AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-6"), zeros)


def test_the_best_model_keeps_the_zeros(tmp_path):
    model = pruned_model()
    zeros = zero_positions(model)
    trainer = train(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        learning_rate=0.5,
        greater_is_better=True,  # of the loss: one that is not the last
    )
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(best.model.norm.weight, model.model.norm.weight)
    assert_zeros_kept(model, zeros)


def test_lora_resumes_and_loads_the_best(tmp_path):
    from peft import LoraConfig, get_peft_model

    def lora():
        torch.manual_seed(1)
        return keep_sparsity(get_peft_model(pruned_model(), LoraConfig(r=4, target_modules="all-linear")))

    def run(model, output, **options):
        trainer = Trainer(
            model,
            arguments(output, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=3,
                      save_steps=3),
            train_dataset=rows(),
            eval_dataset=rows(8, seed=2),
        )  # fmt: skip
        trainer.train(**options)
        return trainer

    whole, resumed = lora(), lora()
    run(whole, tmp_path / "whole")
    trainer = run(resumed, tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.state.best_model_checkpoint is not None
    first, second = (model.merge_and_unload() for model in (whole, resumed))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert_zeros_kept(first, zero_positions(pruned_model()))


def launch(mode, output):
    # --multi_gpu is Accelerate's name for several processes; the training itself asks for the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if mode == "sharded" or mode.startswith("zero"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_addr",
            "127.0.0.1",
        ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    by_torch = "torch.distributed.run" in command
    command += ["--master_port" if by_torch else "--main_process_port", port]
    module = ["-m"] if by_torch else ["--module"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [*module, "tests.recovery.training", str(output), mode]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "conv1d", "lora"])
def test_two_processes(mode, tmp_path):
    """`accelerate launch` with gloo: the zeros hold, and everything was trained."""
    original = pruned_model("gpt2" if mode == "conv1d" else "llama")
    trained = launch(mode, tmp_path)
    assert_zeros_kept(trained, zero_positions(original))
    for key in find_masks(original):
        assert not torch.equal(trained.get_parameter(key), original.get_parameter(key)), key


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "zero2"])
def test_deepspeed(mode, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; it is not part of what CI installs")
    test_two_processes(mode, tmp_path)


@pytest.mark.slow
def test_shards(tmp_path):
    """FSDP2 on two processes equals one process with both halves of the data."""
    trained, model = launch("sharded", tmp_path), pruned_model()
    zeros = zero_positions(model)
    callback = SparsityCallback(model)
    callback.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    data = rows(2 * STEPS)
    for pair in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        sum(model(**{name: value[None] for name, value in row.items()}).loss / 2 for row in pair).backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    assert_zeros_kept(trained, zeros)


def test_norms_only(tmp_path):
    model = train_norms_only(pruned_model())
    before = copy.deepcopy(model.state_dict())
    train(model, tmp_path)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_norms_only_trains_biases():
    model = train_norms_only(pruned_model("gpt2"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if name.endswith("bias") or ".ln_" in name}


def test_nothing_to_train():
    with pytest.raises(ValueError, match="Linear has neither norms nor biases to train"):
        train_norms_only(torch.nn.Linear(2, 2, bias=False))


class TestRefused:
    def test_a_dense_model(self):
        with pytest.raises(ValueError, match="not known to be pruned"):
            SparsityCallback(tiny_model())

    def test_adapters(self):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(pruned_model(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"this model has adapters: use keep_sparsity\(model\)"):
            SparsityCallback(model)

    def test_another_model(self, tmp_path):
        trainer = Trainer(pruned_model("gpt2"), arguments(tmp_path), train_dataset=rows())
        trainer.add_callback(SparsityCallback(pruned_model()))
        with pytest.raises(
            ValueError, match=r"The trained GPT2LMHeadModel has other parameters than the model of the c"
        ):
            trainer.train()

    def test_resuming_from_a_dense_checkpoint(self, tmp_path):
        model = pruned_model()
        Trainer(model, arguments(tmp_path, save_strategy="steps", save_steps=3), train_dataset=rows()).train()
        with pytest.raises(
            ValueError, match=r"pruned weights of model\.layers\.0\.self_attn\.q_proj\.weight were not zer"
        ):
            train(pruned_model(), tmp_path, resume=str(tmp_path / "checkpoint-3"))

    def test_a_parameter_that_is_not_whole(self):
        model = pruned_model()
        callback = SparsityCallback(model)
        model.model.layers[0].mlp.up_proj.weight.data = torch.empty(0)  # as DeepSpeed ZeRO-3 leaves it
        with pytest.raises(ValueError, match=r"is \[0\] in this process and \[64, 32\] .*DeepSpeed ZeRO-3 or FSDP1"):
            callback.on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize("adapters", [False, True], ids=["callback", "masked LoRA"])
def test_scaled_gradients_of_half_precision(adapters):
    """Steps whose gradients overflow are skipped, the others train, and the zeros hold in both."""
    model = pruned_model()
    zeros, dense = zero_positions(model), copy.deepcopy(model.state_dict())
    callback = None if adapters else SparsityCallback(model)
    if adapters:
        model = keep_sparsity(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")))
    else:
        callback.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    skipped = 0
    for row in rows(30):
        before = copy.deepcopy(model.state_dict())
        with torch.autocast("cpu", torch.float16):
            loss = model(**{name: value[None] for name, value in row.items()}).loss
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if callback is not None:
            callback.on_optimizer_step(None, None, None)
        optimizer.zero_grad()
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same == (scaler.get_scale() < scale)
        skipped += same
    assert 0 < skipped < 30
    trained = model.merge_and_unload() if adapters else model
    assert_zeros_kept(trained, zeros)
    pruned = [name for name, positions in zeros.items() if positions.any() and "embed" not in name]
    assert pruned and not any(torch.equal(trained.get_parameter(name), dense[name]) for name in pruned)
