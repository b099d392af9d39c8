"""Prune a model that is larger than the memory it may use: see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, write_json

# Llama-3-8B.
SHAPE: dict[str, Any] = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    dtype="bfloat16",
)


def main() -> None:
    """Make the models, prune each in a process of its own, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put the models (default: a temporary folder)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32], help="numbers of blocks (default: 32)")
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=float, default=5.0, help="GiB of resident memory (default: 5)")
    parser.add_argument("--max-memory", default="4.5GiB", help="what the pruner is told (default: 4.5GiB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = args.folder or Path(tempfile.mkdtemp(prefix="larger-than-memory-"))
    rows = []
    for blocks in args.blocks:
        source = folder / f"llama-{blocks}"
        make_model(source, blocks)
        for method in args.method:
            rows.append(prune_limited(source, folder / "out", method, args))
            print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(source)
    write_json(args.json, {"machine": machine(args.threads), "limit_gib": args.limit, "rows": rows})
    if any(row["peak_gib"] > args.limit or not row["exact"] for row in rows):
        sys.exit(1)


def make_model(folder: Path, blocks: int, **shape: int) -> None:
    """Write a random Llama of SHAPE, or of another one, one shard for each block, holding one at a time."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], **{**SHAPE, **shape})
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(".".join(parts[:3]) if "layers" in parts else name, []).append(name)
    weight_map = {}
    for index, names in enumerate(shards.values()):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)


def prune_limited(source: Path, out: Path, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune in a process that is killed when it holds more memory than it may."""
    result = out.with_name("result.json")
    work = [sys.executable, __file__.replace(".py", "_worker.py").replace("larger", "_larger"), str(source), str(out)]
    options = [method, str(args.samples), str(args.seqlen), args.max_memory, str(args.threads), str(result)]
    started = time.perf_counter()
    process = subprocess.Popen([*work, *options])
    while process.poll() is None:
        time.sleep(0.02)
        if (held := _resident(process.pid)) > args.limit * 2**30:
            process.kill()
            sys.exit(f"{method} on {source.name} held {held / 2**30:.2f} GiB, more than {args.limit} GiB: killed.")
    if process.returncode:
        sys.exit(f"{method} on {source.name} ended with exit code {process.returncode}.")
    row = json.loads(result.read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return {"model": source.name, "method": method, "wall_s": round(time.perf_counter() - started, 1), **row}


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return 0
    return 1024 * int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0


if __name__ == "__main__":
    main()
