"""Time and memory of large models, computed without their weights: see README.md in this folder."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, write_json

from optimum_sparse import SparseConfig
from optimum_sparse.dry_run import ASSUMED, measured_rates, outline, phases, place, workload
from optimum_sparse.estimate import available_memory, duration, held_memory
from optimum_sparse.plan import make_plan

LLAMA = dict(model_type="llama", num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192)
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": dict(
        LLAMA,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
    "Llama-3-8B": dict(
        LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=128256,
    ),
    "Llama-3-70B": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256),
    "Llama-3.1-405B": dict(
        LLAMA,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        vocab_size=128256,
    ),
    "128 experts (as Qwen3-30B-A3B)": dict(
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
}


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assume", nargs="+", choices=[*ASSUMED, "cpu"], default=["h200"], help="machines")
    parser.add_argument("--method", nargs="+", default=["sparsegpt", "wanda"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(
        "| model | weights | machine | method | weights are | forward | statistics | factors | solve | together | ",
        end="",
    )
    print("reading | memory |\n|---|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = []
    for name, shape in SHAPES.items():
        for method in args.method:
            config = SparseConfig(method=method, num_samples=args.samples, seqlen=args.seqlen)
            rows += [row(name, shape, config, where) for where in args.assume]
            print(
                line(rows[-1]) if len(args.assume) == 1 else "\n".join(map(line, rows[-len(args.assume) :])),
                flush=True,
            )
    write_json(args.json, {"machine": machine(torch.get_num_threads()), "rows": rows})


def row(name: str, shape: dict[str, Any], config: SparseConfig, where: str) -> dict[str, Any]:
    """What a run takes: seconds by phase, bytes at its peak."""
    model = outline(
        lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16), config
    )
    cpu = torch.device("cpu")
    rates = measured_rates(held_memory(cpu) + available_memory(cpu)) if where == "cpu" else ASSUMED[where]
    found: dict[str, Any] = {"model": name, "weights": model.weights, "machine": where, "method": config.method}
    try:
        offloaded, plan = place(model, config, 0, rates.memory, rates.is_cpu)
    except ValueError:  # more than there is: say how much it would be at least
        work = replace(workload(model, config, 0, True, rates.is_cpu), batch_rows=1)
        offloaded, plan = True, make_plan(work, config, 2**62, "disk")
    seconds = phases(model, config, offloaded, rates)
    reading = seconds.pop("reading", 0.0)
    together = max(sum(seconds.values()), reading)
    return {
        **found,
        "offloaded": offloaded,
        "seconds": seconds,
        "reading": reading,
        "together": together,
        "memory": plan.peak,
    }


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [found["model"], f"{found['weights'] / 2**30:.0f} GiB", found["machine"], found["method"]]
    cells.append("on disk" if found["offloaded"] else "in memory")
    cells += [
        duration(found["seconds"][phase]) if phase in found["seconds"] else ""
        for phase in ("forward", "statistics", "factors", "solve")
    ]
    cells += [duration(found["together"]), duration(found["reading"]) if found["offloaded"] else ""]
    return f"| {' | '.join(cells)} | {found['memory'] / 2**30:.1f} GiB |"


if __name__ == "__main__":
    main()
