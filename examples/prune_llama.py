"""Prune a Llama-like model and see what it writes before and after.

    python examples/prune_llama.py HuggingFaceTB/SmolLM2-135M-Instruct pruned
    python examples/prune_llama.py meta-llama/Llama-3.2-1B pruned --pattern 2:4 --dataset my-text.txt

Works with any decoder-only model that transformers loads, from the Hub, a folder or a .gguf file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.config import METHOD_NAMES
from optimum_sparse.loading import load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, generate, prune, generate again, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, folder or .gguf file of the dense model")
    parser.add_argument("output", help="folder to save the pruned model in")
    parser.add_argument("--method", default="admm", choices=METHOD_NAMES)
    parser.add_argument("--sparsity", type=float, help="fraction of zeros (default: 0.5, or what the pattern implies)")
    parser.add_argument("--pattern", help="N:M, N non-zero weights of every M, such as 2:4")
    parser.add_argument("--dataset", default="c4", help="calibration text: a Hub dataset, a file or 'self'")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, help="tokens per window")
    parser.add_argument("--prompt", default="The most important thing about bread is", help="what to continue")
    args = parser.parse_args(arguments)

    config = SparseConfig(
        method=args.method,
        sparsity=args.sparsity,
        pattern=args.pattern,
        dataset=args.dataset,
        num_samples=args.num_samples,
        seqlen=args.seqlen,
    )
    model, tokenizer = load_model(args.model)
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer, which this example needs.")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    before = generate(model, tokenizer, args.prompt)
    pruner = SparsePruner(config)
    pruner.prune(model, tokenizer)
    pruner.save(model, args.output, tokenizer)

    print("dense: ", before)
    print("pruned:", generate(model, tokenizer, args.prompt))
    print(f"Saved to {args.output}: {pruner.report.sparsity:.2%} zeros in {len(pruner.report.matrices)} matrices.")


def generate(model, tokenizer, prompt: str, num_tokens: int = 30) -> str:
    """Continue a prompt with the most likely tokens."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return repr(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
