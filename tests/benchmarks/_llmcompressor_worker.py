"""Prunes a model folder with llm-compressor and prints what that took as JSON.

speed.py runs this with the python of the baseline's environment, in which optimum_sparse is not installed.
"""

import argparse
import json
import time
from pathlib import Path

from common import peak_memory, resident_memory


def main() -> None:
    """Prune once and print one line of JSON, after whatever llm-compressor prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--windows", type=Path, required=True, help="JSON file with the tokens of each window")
    parser.add_argument("step", choices=["prune"])
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--save", help="folder for the pruned model (default: not saved)")
    args = parser.parse_args()

    import datasets
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    windows = json.loads(args.windows.read_text())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]
    # A list of targets: the string "Linear" is taken letter by letter and prunes nothing, without a word.
    recipe = modifier(sparsity=args.sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])

    loaded = resident_memory()
    start, busy = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=recipe,
        dataset=datasets.Dataset.from_dict({"input_ids": windows}),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        batch_size=1,
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    peak = peak_memory()

    weights = [module.weight for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    sparsity = zeros / sum(weight.numel() for weight in weights)
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loaded": loaded,
        "peak": peak,
        "sparsity": sparsity,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
