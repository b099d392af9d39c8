"""Packed checkpoints of a random Llama: size, speed and memory of saving and loading; long runs of what tests sample.

`--fuzz N` reads N mutated files, and `--sweep` packs and loads a tiny model of each type of causal language model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine, peak_memory, write_json

ROOT = Path(__file__).parents[2]
CASES = {"50 %": (0.5, None), "60 %": (0.6, None), "70 %": (0.7, None), "2:4": (0.5, "2:4"), "4:8": (0.5, "4:8")}
# hidden size, intermediate size, layers, vocabulary
SHAPES = {"small": (576, 1536, 30, 49152), "0.75B": (2048, 5632, 12, 32000)}


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="0.75B", help="shape of the model (default: 0.75B)")
    parser.add_argument("--case", action="append", choices=CASES, help="once or more (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each step; the fastest counts (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default: 2)")
    parser.add_argument("--fuzz", type=int, metavar="N", help="instead, read N mutated files")
    parser.add_argument("--sweep", action="store_true", help="instead, pack and load a model of every type")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    if args.step:
        step(*args.step)
    elif args.fuzz is not None:
        fuzz(args.fuzz)
    elif args.sweep:
        sweep()
    else:
        write_json(args.json, measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Sizes, speeds and memory of each case."""
    results: dict[str, Any] = {"machine": machine(args.threads), "model": args.model}
    for case in args.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            result = results[case] = run_case(args, case, Path(folder))
        print(f"\n{case}: {result['size']:.4f} of the dense matrices ({result['model'] / 1e6:,.0f} MB of weights)")
        print(f"{'':28}{'GB/s':>8}{'GB/CPU s':>10}{'peak above import, MB':>24}{'held by the model, MB':>24}")
        for name, (seconds, cpu_seconds, *growth, size) in result["runs"].items():
            memory = "".join(f"{grown / 1e6:24,.0f}" for grown in growth if grown)
            print(f"{name:28}{size / 1e9 / seconds:8.2f}{size / 1e9 / cpu_seconds:10.2f}{memory}", flush=True)
    print("\nGB are those of dense weights; the fastest of several runs. Pages of a mapped file count as memory.")
    return results


def run_case(args: argparse.Namespace, case: str, folder: Path) -> dict[str, Any]:
    """One case: in this process what is done in memory, in fresh ones what is done with files."""
    import torch

    from optimum_sparse.packing import smallest

    torch.set_num_threads(args.threads)
    sparsity, pattern = CASES[case]
    model = save_model(args.model, sparsity, pattern, folder / "dense")
    matrix = masked(torch.randn(4096, 4096, dtype=torch.bfloat16), sparsity, pattern)
    patterns = [(pattern, False)] if pattern else []
    packed = smallest(matrix, patterns)
    assert packed is not None
    steps: dict[str, tuple[Callable[[], tuple[float, ...]], int]] = {
        "pack a matrix": (lambda: timed(lambda: smallest(matrix, patterns)), matrix.nbytes),
        "unpack a matrix": (lambda: timed(packed.unpack), matrix.nbytes),
        "sparse pack": (lambda: child("pack", folder / "dense", folder / "packed"), model),
        "sparse unpack": (lambda: child("unpack", folder / "packed", folder / "again"), model),
        "from_pretrained, packed": (lambda: child("load", folder / "packed"), model),
        "the same, runtime='sparse'": (lambda: child("load-sparse", folder / "packed"), model),
        "from_pretrained, dense": (lambda: child("load", folder / "dense"), model),
    }
    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, (run, size) in steps.items():
            runs[name].append((*run(), size))
    fastest = {name: tuple(map(min, zip(*seen, strict=True))) for name, seen in runs.items()}
    return {"size": packed.nbytes / matrix.nbytes, "model": model, "runs": fastest}


def step(name: str, *folders: str) -> None:
    """One step with files; print its seconds, CPU seconds, and how much memory this process took for it.

    That is how much it grew at most, and what a model that was loaded holds after its first token.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from optimum_sparse import PackedConfig
    from optimum_sparse.checkpoint import pack_folder, unpack_folder
    from optimum_sparse.runtime.bench import resident_bytes

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    assert LlamaForCausalLM  # imports what from_pretrained would
    load = AutoModelForCausalLM.from_pretrained
    functions = {
        "load": load,
        "load-sparse": lambda folder: load(folder, quantization_config=PackedConfig(runtime="sparse")),
        "pack": pack_folder,
        "unpack": unpack_folder,
    }
    before = resident_bytes()
    results: list[Any] = []
    seconds, cpu_seconds, *_ = timed(lambda: results.append(functions[name](*map(Path, folders))))
    peak, held = peak_memory() - before, 0
    if name.startswith("load"):
        with torch.no_grad():
            results[0](torch.zeros(1, 1, dtype=torch.int64))
        held = resident_bytes() - before
    print(seconds, cpu_seconds, peak, held)


def child(name: str, *folders: Path) -> tuple[float, ...]:
    """What `step` prints in a fresh process."""
    command = [sys.executable, __file__, "--step", name, *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return tuple(map(float, output.stdout.split()))


def timed(function: Callable[[], Any]) -> tuple[float, float, float, float]:
    """Seconds and CPU seconds of a call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cpu_start, 0.0, 0.0


def masked(weight: Any, sparsity: float, pattern: str | None) -> Any:
    """A matrix without its smallest weights: of each row, or of each group of the pattern."""
    n, m = map(int, pattern.split(":")) if pattern else (weight.shape[1] - round(sparsity * weight.shape[1]),) * 2
    m = m if pattern else weight.shape[1]
    groups = weight.abs().view(-1, m)
    drop = groups.argsort(dim=1)[:, : m - n]
    return weight.masked_fill(groups.new_zeros(groups.shape).scatter_(1, drop, 1).view_as(weight).bool(), 0)


def save_model(shape: str, sparsity: float, pattern: str | None, folder: Path) -> int:
    """Write a random Llama with zeros in the matrices of its blocks; return the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimum_sparse import SparsePruner

    hidden, intermediate, layers, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    options = {"pattern": pattern} if pattern else {"sparsity": sparsity}
    pruner = SparsePruner(method="magnitude", progress=False, **options)
    pruner.prune(model)
    pruner.save(model, folder, max_shard_size="500MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def fuzz(mutations: int) -> None:
    """Read mutated files; anything but a ValueError ends the program."""
    from tests.test_checkpoint import fuzz as read_mutated

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outcomes = read_mutated(Path(folder), mutations, seed=1)
    print(f"{mutations} mutated files in {time.perf_counter() - start:.0f} s: {outcomes}")


def sweep() -> None:
    """Pack and load a model of every type of causal language model, and compare it with the dense one."""
    from tests.architectures import CAUSAL_LM_TYPES, MISSING, sweep_model
    from tests.integrations.test_packed import assert_equal
    from tests.integrations.test_packed import test_the_model_is_that_of_the_dense_checkpoint as check
    from tests.integrations.test_sparse_layers import load_sparse

    types = sorted(set(CAUSAL_LM_TYPES) - set(MISSING))
    for model_type in types:
        with tempfile.TemporaryDirectory() as folder:
            check(model_type, Path(folder))
            model_class = type(sweep_model(model_type))
            sparse = load_sparse(Path(folder, "packed"), model_class)
            assert_equal(sparse, model_class.from_pretrained(Path(folder, "dense")))
        print(model_type, "ok", flush=True)
    print(f"{len(types)} types")


if __name__ == "__main__":
    main()
