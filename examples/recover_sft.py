"""Fine-tune a pruned chat model with TRL's SFTTrainer, and merge it without losing a zero.

    python examples/recover_sft.py pruned tuned --dataset conversations.jsonl

The rows of the dataset have the column "messages", or "prompt" and "completion", as TRL describes them. Needs
`pip install trl`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from optimum_sparse import SparsePruner
from optimum_sparse.recovery import keep_sparsity


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, train, merge, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the pruned model")
    parser.add_argument("output", help="folder to save the tuned model in")
    parser.add_argument("--dataset", required=True, help="a .jsonl file in one of TRL's formats")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per example")
    args = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Put the adapters on before SFTTrainer sees the model, instead of passing it a peft_config.
    model = keep_sparsity(get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")))

    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            max_length=args.seqlen,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            save_strategy="no",
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            report_to=[],
        )
        data = load_dataset("json", data_files=args.dataset, split="train")
        SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer).train()

    merged = model.merge_and_unload()
    SparsePruner().save(merged, args.output, tokenizer)
    print(f"Saved to {args.output}: {merged.config.sparsity_config['achieved_sparsity']:.2%} zeros, as before.")


if __name__ == "__main__":
    main()
