"""What it costs to prune from disk instead of from memory: see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, write_json
from larger_than_memory import make_model

# The hidden sizes of TinyLlama-1.1B.
SHAPE = dict(hidden_size=2048, intermediate_size=5632, num_key_value_heads=4, vocab_size=32000)

WORKER = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from optimum_sparse import SparsePruner
from optimum_sparse.estimate import peak_memory

source, offload, method, samples, seqlen, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
options = dict(device_map={"": "disk"}, offload_folder=offload) if offload else {}
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **options)
if not offload:  # have it read, not only mapped into memory
    sum(parameter.sum() for parameter in model.parameters())
loaded = time.perf_counter() - started
generator = torch.Generator().manual_seed(0)
windows = torch.randint(0, 32000, (int(samples), int(seqlen)), generator=generator)
pruner = SparsePruner(method=method, progress=False, batch_size=1)
started = time.perf_counter()
pruner.prune(model, dataset=[{"input_ids": window[None]} for window in windows])
pruned = time.perf_counter() - started
print(json.dumps(dict(load=loaded, prune=pruned, peak=peak_memory(), sparsity=pruner.report.sparsity)))
"""


def main() -> None:
    """Alternate between the two, each in a fresh process that finds nothing of the model in the page cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put the model (default: a temporary folder)")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = args.folder or Path(tempfile.mkdtemp(prefix="offload-"))
    source, offload = folder / "model", folder / "offload"
    make_model(source, args.blocks, **SHAPE)
    rows = []
    for method in args.method:
        runs: dict[str, list[dict[str, Any]]] = {"memory": [], "disk": []}
        for _ in range(args.repeats):
            for place, results in runs.items():
                _forget(source)
                where = str(offload) if place == "disk" else ""
                options = [str(source), where, method, str(args.samples), str(args.seqlen), str(args.threads)]
                done = subprocess.run(
                    [sys.executable, "-c", WORKER, *options], check=True, capture_output=True, text=True
                )
                results.append(json.loads(done.stdout.splitlines()[-1]))
        total = {place: [run["load"] + run["prune"] for run in results] for place, results in runs.items()}
        row = {
            "method": method,
            **{f"{place}_s": round(statistics.median(seconds), 1) for place, seconds in total.items()},
            "ratio": round(statistics.median(d / m for d, m in zip(total["disk"], total["memory"], strict=True)), 3),
            **{f"{place}_gib": round(max(r["peak"] for r in results) / 2**30, 2) for place, results in runs.items()},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    shutil.rmtree(source)
    write_json(args.json, {"machine": machine(args.threads), "rows": rows})
    if any(row["ratio"] > 1.3 for row in rows):
        sys.exit("from disk it takes more than 1.3 times as long as from memory")


def _forget(folder: Path) -> None:
    """Have the system drop what it keeps in memory of the files in a folder."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
