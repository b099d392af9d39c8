"""Prune a model, publish it on the Hub, load it from there and check it.

    hf auth login
    python examples/push_to_hub.py HuggingFaceTB/SmolLM2-135M-Instruct me/smollm2-135m-sparse --private

One commit holds the weights, the tokenizer, the report and a model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from huggingface_hub import get_token
from transformers import AutoModelForCausalLM

from optimum_sparse import SparsePruner
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.loading import load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, prune, upload, download, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, folder or .gguf file of the dense model")
    parser.add_argument("repo_id", help="where to: user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--sparsity", type=float, help="fraction of zeros (default: 0.5, or what the pattern implies)")
    parser.add_argument("--pattern", help="N:M, N non-zero weights of every M, such as 2:4")
    parser.add_argument("--dataset", default="c4", help="calibration text: a Hub dataset, a file or 'self'")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, help="tokens per window")
    args = parser.parse_args(arguments)
    if get_token() is None:
        raise SystemExit("Log in first: hf auth login")

    model, tokenizer = load_model(args.model)
    pruner = SparsePruner(
        sparsity=args.sparsity,
        pattern=args.pattern,
        dataset=args.dataset,
        num_samples=args.num_samples,
        seqlen=args.seqlen,
    )
    pruner.prune(model, tokenizer)
    print("Uploaded:", pruner.push_to_hub(model, args.repo_id, tokenizer, private=args.private))

    published = AutoModelForCausalLM.from_pretrained(args.repo_id)
    record = published.config.sparsity_config
    print(f"Loaded again: {record['method']}, {record['achieved_sparsity']:.2%} zeros, from {record['base_model']}.")
    findings = inspect(args.repo_id)
    print("Its metadata tells the truth." if findings["metadata_is_true"] else findings["problems"])


if __name__ == "__main__":
    main()
