"""One step of speed.py on our side, in a process of its own; prints its result as JSON."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import calibration_windows, peak_memory, resident_memory, smollm2

from optimum_sparse import SparsePruner
from optimum_sparse.loading import load_model
from optimum_sparse.statistics import GramStatistics


def main() -> None:
    """Run a step and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", help="folder of the dense model")
    parser.add_argument("--windows", type=Path, required=True, help="JSON file with the tokens of each window")
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("prepare", help="write the model and the windows that both sides read")
    step.add_argument("--data", type=Path, required=True)
    step.add_argument("--samples", type=int, required=True)
    step.add_argument("--output", required=True, help="folder for the dense model")
    step.set_defaults(run=prepare)
    step = steps.add_parser("prune", help="prune the model")
    step.add_argument("--method", required=True)
    step.add_argument("--sparsity", type=float, required=True)
    step.set_defaults(run=prune)
    step = steps.add_parser("floor", help="measure what no pruning can do without")
    step.set_defaults(run=floor)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(args.run(args)))


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the dense model as a plain folder, and the calibration windows."""
    model, tokenizer = load_model(args.model or smollm2())
    windows = calibration_windows(args.data, tokenizer, args.samples)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    args.windows.write_text(json.dumps(windows.tolist()))
    return {}


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Prune through the public API, one window per forward."""
    windows = torch.tensor(json.loads(args.windows.read_text()))
    model, _ = load_model(args.model)
    pruner = SparsePruner(
        method=args.method,
        sparsity=args.sparsity,
        num_samples=len(windows),
        seqlen=windows.shape[1],
        batch_size=1,
        progress=False,
    )
    loaded = resident_memory()
    start, busy = time.perf_counter(), time.process_time()
    pruner.prune(model, dataset={"input_ids": windows})
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    report = pruner.report
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loaded": loaded,
        "peak": peak_memory(),
        "sparsity": report.sparsity,
        "phases": report.seconds,
    }


def floor(args: argparse.Namespace) -> dict[str, Any]:
    """Time one forward of the decoder, without the output embeddings, and one Gram matrix per distinct input."""
    windows = torch.tensor(json.loads(args.windows.read_text()))
    model, _ = load_model(args.model)
    decoder = model.base_model
    inputs: dict[int, torch.Tensor] = {}  # by address, which is not used twice while the tensors are kept

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(args[0].data_ptr(), args[0])

    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep)
    grams: dict[int, GramStatistics] = {}
    seconds = {"forward": 0.0, "gram": 0.0}
    with torch.no_grad():
        decoder(windows[:1], use_cache=False)  # warm-up
        for window in windows.split(1):
            inputs.clear()
            start = time.perf_counter()
            decoder(window, use_cache=False)
            seconds["forward"] += time.perf_counter() - start
            start = time.perf_counter()
            for hidden in inputs.values():
                width = hidden.shape[-1]
                grams.setdefault(width, GramStatistics(width)).add(hidden.view(-1, width))
            seconds["gram"] += time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
