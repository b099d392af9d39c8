"""Train all weights of a pruned model to predict what the dense model predicts, and keep every zero.

    python examples/recover_distill.py pruned recovered --teacher ./dense --dataset my-text.txt

With --cache the teacher's likeliest tokens are kept on disk: from the second epoch on, or in another run over the same
texts, the teacher is not run any more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from optimum_sparse import SparsePruner
from optimum_sparse.recovery import DistillationTrainer, SparsityCallback, TopKCache
from optimum_sparse.recovery.data import PadRight, read_rows, tokenize_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Load both models, train one, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the pruned model")
    parser.add_argument("output", help="folder to save the recovered model in")
    parser.add_argument("--teacher", required=True, help="folder or Hub id of the dense model")
    parser.add_argument("--dataset", required=True, help="a .jsonl, .parquet or .txt file, or a Hub dataset")
    parser.add_argument("--cache", help="folder for what the teacher predicts")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per text")
    args = parser.parse_args(arguments)

    # The steps of full fine-tuning are too small for half precision.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = tokenize_rows(read_rows(args.dataset), tokenizer, args.seqlen)

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            learning_rate=5e-5,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
        )
        DistillationTrainer(
            model,
            options,
            train_dataset=data,
            data_collator=PadRight(tokenizer.pad_token_id or 0),
            teacher=AutoModelForCausalLM.from_pretrained(args.teacher, dtype="auto"),
            cache=TopKCache(args.cache) if args.cache else None,
            callbacks=[SparsityCallback(model)],
        ).train()

    SparsePruner().save(model, args.output, tokenizer)
    print(f"Saved to {args.output}: {model.config.sparsity_config['achieved_sparsity']:.2%} zeros, as before.")


if __name__ == "__main__":
    main()
