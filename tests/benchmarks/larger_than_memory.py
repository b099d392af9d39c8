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
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


# Runs the command and prints the most memory that the process has held.
WORKER = """
import sys, torch
torch.set_num_threads(int(sys.argv.pop(1)))
sys.argv.insert(1, "sparse")
from optimum.commands.optimum_cli import main
from optimum_sparse.estimate import peak_memory
main()
print(peak_memory())
"""


def main() -> None:
    """Make the models, prune each in a process of its own, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put the models (default: a temporary folder)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32], help="numbers of blocks (default: 32)")
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=float, default=5.0, help="GiB of resident memory (default: 5)")
    parser.add_argument("--max-memory", default="4.8GiB", help="what the command is told (default: 4.8GiB)")
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
    _tokenizer().save_pretrained(folder)
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


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character."""
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(32, 127)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)


def prune_limited(source: Path, out: Path, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune with one call of the command line, in a process that is killed when it holds more memory than it may."""
    text = write_text(source.with_name("text.txt"), args.samples * args.seqlen)
    calibration = ["--dataset", text, "--num-samples", args.samples, "--seqlen", args.seqlen, "--batch-size", 1]
    command = [sys.executable, "-c", WORKER, args.threads, "prune", source, out, "--method", method, *calibration]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command), "--max-memory", args.max_memory], stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        time.sleep(0.02)
        if (held := _resident(process.pid)) > args.limit * 2**30:
            process.kill()
            sys.exit(f"{method} on {source.name} held {held / 2**30:.2f} GiB, more than {args.limit} GiB: killed.")
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode:
        sys.exit(f"{method} on {source.name} ended with exit code {process.returncode}: {printed}")
    report = json.loads((out / "sparsity_report.json").read_text(encoding="utf-8"))
    row = {
        "model": source.name,
        "gib": round(sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**30, 2),
        "method": method,
        "wall_s": round(time.perf_counter() - started),
        "peak_gib": round(int(printed.split()[-1]) / 2**30, 2),
        "exact": _exact(out),
        "phases_s": {phase: round(seconds) for phase, seconds in report["seconds"].items()},
    }
    shutil.rmtree(out)
    return row


def write_text(path: Path, length: int) -> Path:
    """A text that is longer than so many characters and does not repeat itself."""
    lines = (f"Line {n}: {n * n} is the square of {n}, {n**3} its cube." for n in range(length // 20 + 100))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _exact(folder: Path) -> bool:
    """Whether the files have exactly half of the weights of each matrix zero, counted one tensor at a time."""
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if "_proj" in name:
                    weight = tensors.get_tensor(name)
                    found.append(2 * int((weight == 0).sum()) == weight.numel())
    return bool(found) and all(found)


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return 0
    return 1024 * int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0


if __name__ == "__main__":
    main()
