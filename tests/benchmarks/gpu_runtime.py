"""How fast a pruned model runs on a GPU, against the dense one: `python tests/benchmarks/gpu_runtime.py`.

First the kernels are checked on this card, against float64 and under `torch.compile`. Then:

- products: each matrix of a block alone, as CUDA graphs, for 1 to 16 tokens: time and bandwidth beside the largest
  that a plain sum of memory reaches, and beside the card's. `--tune` tries other cuts of the work.
- decode: `generate` with a static cache, which Transformers runs as CUDA graphs, batch 1, dense and pruned.
- prefill: a prompt through some blocks, dense and with 2:4 weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, write_json
from gpu import SHAPES, build, name_of, say, seconds
from runtime import pruned

from optimum_sparse import sparsify_for_inference
from optimum_sparse.runtime import SparseLinear, gpu, ops, sparsify
from optimum_sparse.runtime.bench import generation_speeds

TOKENS = (1, 2, 4, 8, 16)
# What the project wants at least, as ratios to the dense model.
TARGETS = {"decode, 50 %": 1.3, "decode, 60 %": 1.5, "prefill, 2:4": 1.3}
CUTS = [gpu.Cut(run, tiles, warps) for run, (tiles, warps) in product((1, 2, 4), ((8, 2), (16, 4), (32, 4), (32, 8)))]


def main() -> None:
    """Print what was measured, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--only", choices=("products", "decode", "prefill"), nargs="+")
    parser.add_argument("--tune", action="store_true", help="time the products with other cuts of the work, too")
    parser.add_argument("--new-tokens", type=int, default=128, help="to decode")
    parser.add_argument("--prefill-tokens", type=int, default=4096, help="in prompts of 2,048 or less")
    parser.add_argument("--prefill-blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, config = torch.device(args.device), LlamaConfig(**SHAPES[args.shape])
    wanted = args.only or ["products", "decode", "prefill"]
    results: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "device": name_of(device)}
    with torch.no_grad():
        check(device)
        results["bandwidth"] = bandwidths(device)
        say("bandwidth, GB/s", results["bandwidth"])
        if "products" in wanted:
            results["products"] = products(config, device, args)
        if "decode" in wanted:
            results["decode"] = {
                f"{s:.0%}".replace("%", " %"): decode(config, device, s, args) for s in args.sparsities
            }
        if "prefill" in wanted:
            results["prefill"] = {"2:4": prefill(config, device, args)}
    results["targets"] = {}
    for name, least in TARGETS.items():
        what, which = name.split(", ")
        if which in results.get(what, {}):
            found = results[what][which]["ratio"]
            results["targets"][name] = {"ratio": found, "at least": least, "met": found >= least}
            say(f"target: {name}", results["targets"][name])
    write_json(args.json, results)


def check(device: torch.device) -> None:
    """End with an error if a kernel is wrong on this card; most of its output is what the tests check elsewhere."""
    torch.manual_seed(0)
    for dtype, tokens, (rows, columns) in product(
        (torch.bfloat16, torch.float16, torch.float32), (1, 3, 16, 40), ((64, 64), (50, 300), (1024, 4096))
    ):
        linear = nn.Linear(columns, rows, device=device, dtype=dtype)
        linear.weight.data[torch.rand(rows, columns, device=device) < 0.5] = 0
        layer, x = SparseLinear.from_linear(linear), torch.randn(tokens, columns, device=device).to(dtype)
        assert torch.equal(layer.weight, linear.weight), (dtype, rows, columns)
        if gpu.usable(x):
            parts = (layer.masks, layer.values, layer.offsets)
            assert torch.equal(gpu.unpack(*parts, (rows, columns)), linear.weight), (dtype, rows, columns)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        magnitude = F.linear(x.double().abs(), linear.weight.double().abs(), linear.bias.double().abs())
        allowed = 1.01 * torch.finfo(dtype).eps / 2 * exact.abs() + 4e-6 * magnitude
        if tokens > gpu.MOST_TOKENS:
            allowed *= 4  # a dense product, whose sums may be made in parts
        assert ((layer(x).double() - exact).abs() <= allowed).all(), (dtype, tokens, rows, columns)
    arguments = (x, layer.masks, layer.values, layer.offsets, layer.bias, rows, columns)
    torch.library.opcheck(ops.tiles_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    if device.type == "cuda":
        x = x[:1]
        compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), mode="reduce-overhead", fullgraph=True)
        for _ in range(4):  # warms up, records, replays
            torch.testing.assert_close(compiled(x).clone(), layer(x).relu())
    print("the kernels compute on this device what they should", flush=True)


def bandwidths(device: torch.device) -> dict[str, float]:
    """What a plain sum of memory reaches, and what the card says of itself."""
    memory = torch.ones(2**31 // 8 if device.type == "cuda" else 2**24, dtype=torch.int64, device=device)
    found = {"sum": memory.nbytes / seconds(memory.sum, device, 10) / 1e9}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        if hasattr(card, "memory_clock_rate") and hasattr(card, "memory_bus_width"):
            found["card"] = 2e3 * card.memory_clock_rate * card.memory_bus_width / 8 / 1e9
    return found


def products(config: LlamaConfig, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds and bandwidth of each matrix of a block."""
    hidden, width = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    found = []
    for rows, columns in dict.fromkeys([(hidden, hidden), (keys, hidden), (width, hidden), (hidden, width)]):
        copies = max(1, min(64, 2**29 // (2 * rows * columns)))  # more than the cache holds
        for sparsity in args.sparsities:
            dense = [nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16) for _ in range(copies)]
            for layer in dense:
                layer.weight.data = pruned(layer.weight.data, sparsity)
            ways = {"torch": dense, "sparse": [SparseLinear.from_linear(layer) for layer in dense]}
            size = {"torch": dense[0].weight.nbytes, "sparse": ways["sparse"][0].tiles.nbytes}
            for tokens in TOKENS:
                x = torch.randn(tokens, columns, device=device).to(torch.bfloat16)
                for cut, times in cuts(ways, x, args.tune):
                    row: dict[str, Any] = {"rows": rows, "columns": columns, "sparsity": sparsity, "tokens": tokens}
                    row |= {"cut": cut, "ratio": times["torch"] / times["sparse"], "microseconds": times}
                    row["GB/s"] = {way: size[way] / times[way] / 1e3 for way in ways}
                    found.append(row)
                    say("product", row)
    return found


def cuts(ways: dict[str, Any], x: torch.Tensor, tune: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """The times with the kernels as they are, and if wanted with each other cut."""
    name = "SINGLE" if len(x) == 1 else "SEVERAL"
    before = getattr(gpu, name)
    for cut in [before, *(cut for cut in CUTS if tune and cut != before)]:
        setattr(gpu, name, cut)
        yield repr(cut), sparsify._times(ways, x, x.is_cuda)
    setattr(gpu, name, before)


def linears(model: PreTrainedModel) -> list[nn.Linear]:
    """Those of the blocks."""
    return [module for module in model.model.modules() if isinstance(module, nn.Linear)]


def decode(config: LlamaConfig, device: torch.device, sparsity: float, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one sequence, dense and then pruned."""
    model = build(config, device)
    model.generation_config.cache_implementation = "static"
    model.generation_config.eos_token_id = None

    def speed() -> float:
        torch.compiler.reset()
        return generation_speeds({"": model}, 1, 32, args.new_tokens, args.repeats)[""]["decode"]

    found: dict[str, Any] = {"dense tokens/s": speed()}
    for layer in linears(model):
        layer.weight.data = pruned(layer.weight.data, sparsity)
    report = sparsify_for_inference(model, cuda_graphs=device.type == "cuda")
    print(report, flush=True)
    found["sparse tokens/s"] = speed()
    found["ratio"] = found["sparse tokens/s"] / found["dense tokens/s"]
    say(f"decode, {sparsity:.0%}", found)
    return {**found, "layers": report.to_dict()}


def prefill(config: LlamaConfig, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of prompts, dense and then with the 2:4 units where they are faster."""
    model = build(config, device, args.prefill_blocks)
    for layer in linears(model):
        groups = layer.weight.data.view(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    length = min(2048, args.prefill_tokens)
    prompts = torch.randint(config.vocab_size, (args.prefill_tokens // length, length), device=device)
    run = partial(model, prompts, use_cache=False, logits_to_keep=1)
    found: dict[str, Any] = {"tokens": prompts.numel(), "dense tokens/s": prompts.numel() / seconds(run, device, 10)}
    expected = run().logits
    report = sparsify_for_inference(model, batch_size=prompts.numel())
    print(report, flush=True)
    found["2:4 tokens/s"] = prompts.numel() / seconds(run, device, 10)
    found["ratio"] = found["2:4 tokens/s"] / found["dense tokens/s"]
    found["largest difference of a logit"] = float((run().logits - expected).abs().max() / expected.abs().max())
    say("prefill, 2:4", found)
    return {**found, "layers": report.to_dict()}


if __name__ == "__main__":
    main()
