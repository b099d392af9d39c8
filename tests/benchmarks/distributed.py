"""Two processes against one, with the same number of threads together: see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, calibration_windows, machine, smollm2, write_json


def main() -> None:
    """Alternate between the two, and compare what they give."""
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reversed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    rows = []
    for method in args.method:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            runs: dict[int, list[dict[str, Any]]] = {1: [], args.processes: []}
            each = args.threads // args.processes
            for _ in range(args.repeats):
                for count, results in runs.items():
                    results.append(run(count, args.threads // count, method, folder / f"{count}.safetensors", args))
            run(1, each, method, folder / "reversed.safetensors", args, "--reversed")
            row = {
                "method": method,
                **{f"{count}_processes_s": statistics.median(r["seconds"] for r in runs[count]) for count in runs},
                "ratio": statistics.median(
                    many["seconds"] / one["seconds"] for one, many in zip(*runs.values(), strict=True)
                ),
                "same_zeros": runs[1][0]["zeros"] == runs[args.processes][0]["zeros"],
                "largest_difference_of_errors": max(
                    abs(one - many) / one
                    for one, many in zip(*(results[0]["errors"] for results in runs.values()), strict=True)
                ),
                "same_mask": same_mask(folder / "1.safetensors", folder / f"{args.processes}.safetensors"),
                f"same_mask_as_one_with_{each}_threads_in_the_opposite_order": same_mask(
                    folder / f"{args.processes}.safetensors", folder / "reversed.safetensors"
                ),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_json(args.json, {"machine": machine(args.threads), "rows": rows})


def same_mask(first: Path, second: Path) -> dict[str, float]:
    """Which part of the weights is zero in both or in neither: in the first block, and in all."""
    one, other = load_file(first), load_file(second)
    same: dict[str, list[int]] = {"first block": [0, 0], "all": [0, 0]}
    for name, weight in one.items():
        for counts in [same["all"]] + ([same["first block"]] if ".layers.0." in name else []):
            counts[0] += int(((weight == 0) == (other[name] == 0)).sum())
            counts[1] += weight.numel()
    return {where: equal / total for where, (equal, total) in same.items()}


def run(count: int, threads: int, method: str, out: Path, args: argparse.Namespace, *options: str) -> dict[str, Any]:
    """Prune in so many processes of so many threads, and give the time and the record of the main one."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [__file__, "--data", str(args.data), "--samples", str(args.samples), "--method", method]
    command += ["--threads", str(threads), "--worker", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(out.with_suffix(".json").read_text())


def work(args: argparse.Namespace) -> None:
    """In a process of its own: prune, and leave weights and record."""
    from optimum_sparse import SparsePruner
    from optimum_sparse.distributed import Processes
    from optimum_sparse.loading import load_model

    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2(), torch.float32)
    windows = calibration_windows(args.data, tokenizer, args.samples)
    if args.reversed:
        windows = windows.flip(0)
    pruner = SparsePruner(method=args.method[0], batch_size=1, progress=False)
    pruner.prune(model, dataset=[{"input_ids": window[None]} for window in windows])
    report = pruner.report
    assert report is not None
    if Processes().is_main:
        weights = {f"{entry.name}.weight": model.get_parameter(f"{entry.name}.weight") for entry in report.matrices}
        save_file({name: value.detach() for name, value in weights.items()}, args.worker)
        record = {
            "seconds": report.seconds["total"],
            "zeros": [entry.zeros for entry in report.matrices],
            "errors": [entry.error for entry in report.matrices],
        }
        args.worker.with_suffix(".json").write_text(json.dumps(record))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # when torch ends gloo after all else, it may wait for ever


if __name__ == "__main__":
    main()
