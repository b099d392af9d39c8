"""Train a pruned model with masked LoRA and the stock Trainer, and merge it without losing a zero.

    python examples/recover_lora.py pruned recovered --dataset my-text.jsonl
    python examples/recover_lora.py pruned recovered --dataset Salesforce/wikitext:wikitext-2-raw-v1 --steps 500

`pruned` is a folder or Hub id of a model that SparsePruner has saved.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from optimum_sparse import SparsePruner
from optimum_sparse.recovery import keep_sparsity
from optimum_sparse.recovery.data import PadRight, read_rows, tokenize_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, train, merge, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the pruned model")
    parser.add_argument("output", help="folder to save the recovered model in")
    parser.add_argument("--dataset", required=True, help="a .jsonl, .parquet or .txt file, or a Hub dataset")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per text")
    args = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = tokenize_rows(read_rows(args.dataset), tokenizer, args.seqlen)

    # The one line that is new. Everything before and after it is PEFT and Trainer as everybody uses them.
    model = keep_sparsity(get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")))

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to=[],
        )
        collate = PadRight(tokenizer.pad_token_id or 0)
        Trainer(model, options, train_dataset=data, data_collator=collate).train()

    merged = model.merge_and_unload()
    SparsePruner().save(merged, args.output, tokenizer)
    print(f"Saved to {args.output}: {merged.config.sparsity_config['achieved_sparsity']:.2%} zeros, as before.")


if __name__ == "__main__":
    main()
