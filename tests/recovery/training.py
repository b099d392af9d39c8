"""A training that a launcher starts in two processes, on the CPU: `training.py OUT MODE`."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments, set_seed

from optimum_sparse.recovery import SparsityCallback, keep_sparsity
from tests.helpers import tiny_batches

from .pruned import pruned_model

STEPS = 6


def rows(num: int = 32, seed: int = 1) -> list[dict]:
    batch = tiny_batches(num=1, rows=num, length=12, seed=seed)[0]["input_ids"]
    return [{"input_ids": row, "labels": row} for row in batch]


def arguments(output: Path, **options) -> TrainingArguments:
    defaults = dict(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return TrainingArguments(**{**defaults, **options})


def deepspeed(stage: str) -> dict:
    """How DeepSpeed takes part: with that stage of ZeRO."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # Its own optimizer for CPUs would be compiled first.
    own = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return {"zero_optimization": {"stage": int(stage)}, **dict.fromkeys(sizes, "auto"), **own}


def leave() -> NoReturn:
    """End the process here: when torch frees what belonged to the process group, gloo's threads may block forever."""
    sys.stdout.flush()
    os._exit(0)


def train(output: Path, mode: str) -> None:
    """Train with the stock Trainer, as the launcher and the mode say."""
    set_seed(0)
    model = pruned_model("gpt2" if mode == "conv1d" else "llama")
    callbacks = []
    if mode == "lora":
        model = keep_sparsity(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")))
    else:
        callbacks = [SparsityCallback(model)]
    options = {"deepspeed": deepspeed(mode[-1])} if mode.startswith("zero") else {}
    trainer = Trainer(model, arguments(output, **options), train_dataset=rows(), callbacks=callbacks)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        trained = trainer.model.merge_and_unload() if mode == "lora" else trainer.model
        trained.save_pretrained(output)
    trainer.accelerator.end_training()
    leave()


def train_sharded(output: Path) -> None:
    """Train with FSDP2, which Accelerate does not offer on a CPU; each process has its own half of the data."""
    torch.distributed.init_process_group("gloo")
    model = pruned_model()
    callback = SparsityCallback(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    callback.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for row in rows(2 * STEPS)[torch.distributed.get_rank() :: 2]:
        optimizer.zero_grad()
        model(**{name: value[None] for name, value in row.items()}).loss.backward()
        optimizer.step()
        for key, weight, mask in callback._local:
            assert not optimizer.state[weight]["exp_avg"].to_local()[~mask.expand()].any(), key
        callback.on_optimizer_step(None, None, None)
    callback.on_train_end(None, None, None)
    weights = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    if torch.distributed.get_rank() == 0:
        whole = pruned_model()
        whole.load_state_dict(weights)
        whole.save_pretrained(output)
    torch.distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    if sys.argv[2] == "sharded":
        train_sharded(Path(sys.argv[1]))
    else:
        train(Path(sys.argv[1]), sys.argv[2])
