"""How fast a pruned model decodes on this CPU: `python tests/benchmarks/runtime.py`.

Three measurements, each with all its variants in turn in one process, medians reported:

- the linear layers of a decoder, which are larger than the cache, one token at a time: `F.linear`, the dense products
  that are faster (oneDNN's with prepacked weights, and `DenseLinear`), and `SparseLinear`, also quantised to 8 bits;
- `generate` on the random model that has these layers: as Transformers loads it, with the fastest dense product for
  each layer, pruned, and pruned and quantised;
- the same on SmolLM2-135M-Instruct.

The bandwidth at which weights are read stands beside the largest that a plain sum of the same memory reaches.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, smollm2, write_json
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from optimum_sparse import SparseConfig, sparsify_for_inference
from optimum_sparse.loading import load_model
from optimum_sparse.quantization import Grid, Rounding
from optimum_sparse.runtime import QuantizedTiles, Tiles, kernels, ops
from optimum_sparse.runtime.bench import generation_speeds

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 2048, 5632, 12, 32000
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--only", choices=("linears", "llama", "smollm2"), nargs="+")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def in_turn(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turn, after one turn that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(repeats + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The weight without its smallest elements, counted in a sample: to 0.1 %."""
    sample = weight.abs().flatten()[::16].float()
    threshold = sample.kthvalue(max(1, int(sparsity * sample.numel()))).values
    return weight.masked_fill(weight.abs() <= threshold, 0)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    """The weight on a grid of 8 bits, and the grid."""
    rounding = Rounding(weight.float(), SparseConfig(quantization="int8"))
    rounding.enter(weight.float().T, 0, weight.shape[1])
    return rounding.grid.round(weight).to(weight.dtype), rounding.grid


class Linears:
    """The weights of all linear layers of the decoder, in each form."""

    def __init__(self, dtype: torch.dtype, sparsities: list[float]) -> None:
        self.dense = [torch.randn(shape).to(dtype) for _ in range(LAYERS) for shape in SHAPES]
        self.sparse = {s: [Tiles.pack(pruned(weight, s)) for weight in self.dense] for s in sparsities}
        self.int8 = {
            s: [QuantizedTiles.pack(*quantized(pruned(weight, s))) for weight in self.dense] for s in sparsities
        }
        self.inputs = {columns: torch.randn(1, columns).to(dtype) for columns in {c for _, c in SHAPES}}
        reorder = torch.ops.mkldnn._reorder_linear_weight
        in_order = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.prepacked = [reorder(weight, 1) for weight in self.dense] if in_order else []

    def torch(self) -> None:
        """As Transformers does it."""
        for weight in self.dense:
            F.linear(self.inputs[weight.shape[1]], weight)

    def onednn(self) -> None:
        """With weights in oneDNN's own order."""
        for weight, prepacked in zip(self.dense, self.prepacked, strict=True):
            torch.ops.mkldnn._linear_pointwise(self.inputs[weight.shape[1]], prepacked, None, "none", [], "")

    def ours(self) -> None:
        """Our dense product."""
        for weight in self.dense:
            ops.dense_linear(self.inputs[weight.shape[1]], weight, None)

    def packed(self, sparsity: float) -> None:
        """Our sparse product."""
        for tiles in self.sparse[sparsity]:
            parts = (tiles.masks, tiles.values, tiles.offsets)
            ops.tiles_linear(self.inputs[tiles.shape[1]], *parts, None, *tiles.shape)

    def codes(self, sparsity: float) -> None:
        """Our product of a sparse weight of 8 bits."""
        for tiles in self.int8[sparsity]:
            parts = (tiles.masks, tiles.codes, tiles.offsets, tiles.grids)
            ops.quantized_linear(self.inputs[tiles.shape[1]], *parts, None, *tiles.shape)


def measure_linears(linears: Linears, repeats: int) -> dict[str, Any]:
    """Milliseconds for one token through all layers, and the speed-ups."""
    everything = torch.ones(2**28 // 8, dtype=torch.int64)
    variants: dict[str, Callable[[], object]] = {"F.linear": linears.torch, "dense, ours": linears.ours}
    if linears.prepacked:
        variants["dense, oneDNN prepacked"] = linears.onednn
    variants |= {f"sparse, {s:.0%}": (lambda s=s: linears.packed(s)) for s in linears.sparse}
    variants |= {f"sparse int8, {s:.0%}": (lambda s=s: linears.codes(s)) for s in linears.int8}
    seconds = in_turn({**variants, "sum": everything.sum}, repeats)
    bytes_read = dict.fromkeys(variants, sum(weight.nbytes for weight in linears.dense))
    bytes_read |= {f"sparse, {s:.0%}": sum(t.nbytes for t in tiles) for s, tiles in linears.sparse.items()}
    bytes_read |= {f"sparse int8, {s:.0%}": sum(t.nbytes for t in tiles) for s, tiles in linears.int8.items()}
    ceiling = everything.nbytes / seconds["sum"]
    best = min(seconds[name] for name in variants if not name.startswith("sparse"))
    print(f"\nLinear layers, one token, {torch.get_num_threads()} threads; a plain sum reads {ceiling / 1e9:.1f} GB/s")
    print(f"{'':24} {'ms':>7} {'GB/s':>6} {'bytes':>6} {'vs F.linear':>12} {'vs best dense':>14}")
    rows = {}
    for name in variants:
        row = {
            "milliseconds": 1e3 * seconds[name],
            "bandwidth": bytes_read[name] / seconds[name] / 1e9,
            "bytes": bytes_read[name] / bytes_read["F.linear"],
            "over F.linear": seconds["F.linear"] / seconds[name],
            "over best dense": best / seconds[name],
        }
        rows[name] = row
        print(
            f"{name:24} {row['milliseconds']:7.2f} {row['bandwidth']:6.1f} {row['bytes']:6.3f} "
            f"{row['over F.linear']:12.2f} {row['over best dense']:14.2f}"
        )
    return {"threads": torch.get_num_threads(), "read ceiling": ceiling / 1e9, "rows": rows}


def random_llama(dtype: torch.dtype) -> PreTrainedModel:
    """The model whose linear layers are those above."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def prune(model: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    """Set the smallest weights of each linear layer of the decoder to zero."""
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = pruned(module.weight.data, sparsity)
    return model


def quantize(model: PreTrainedModel) -> dict[str, Grid]:
    """Round each linear layer of the decoder to a grid, by its name."""
    grids = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            module.weight.data, grids[name] = quantized(module.weight.data)
    return grids


def measure_model(model: PreTrainedModel, label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of `generate`, for the dense model and the pruned ones."""
    models = {"Transformers": model, "best dense": copy.deepcopy(model)}
    reports = {"best dense": sparsify_for_inference(models["best dense"])}
    for sparsity in options.sparsities:
        name = f"sparse, {sparsity:.0%}"
        models[name] = prune(copy.deepcopy(model), sparsity)
        reports[name] = sparsify_for_inference(models[name])
        name = f"int8, {sparsity:.0%}"
        models[name] = prune(copy.deepcopy(model), sparsity)
        reports[name] = sparsify_for_inference(models[name], grids=quantize(models[name]))
    repeats = max(3, options.repeats // 3)
    decode = generation_speeds(models, 1, 16, 64, repeats)
    prefill = generation_speeds(models, 1, options.prompt_tokens, 2, repeats)
    speeds = {name: {"decode": decode[name]["decode"], "prefill": prefill[name]["prefill"]} for name in models}
    print(f"\n{label}, batch 1, {torch.get_num_threads()} threads, tokens/s; prefill of {options.prompt_tokens}")
    print(f"{'':14} {'decode':>8} {'vs Transf.':>11} {'vs best dense':>14} {'prefill':>9} {'vs Transf.':>11}")
    stock, best = speeds["Transformers"], speeds["best dense"]
    for name, speed in speeds.items():
        print(
            f"{name:14} {speed['decode']:8.1f} {speed['decode'] / stock['decode']:11.2f} "
            f"{speed['decode'] / best['decode']:14.2f} {speed['prefill']:9.1f} "
            f"{speed['prefill'] / stock['prefill']:11.2f}"
        )
    layers = {name: report.to_dict() for name, report in reports.items()}
    return {"threads": torch.get_num_threads(), "speeds": speeds, "layers": layers}


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = arguments()
    dtype = getattr(torch, options.dtype)
    wanted = options.only or ["linears", "llama", "smollm2"]
    results: dict[str, Any] = {
        "machine": machine(max(options.threads)),
        "kernel": kernels.LEVEL,
        "dtype": options.dtype,
    }
    print({**results["machine"], "kernel": kernels.LEVEL, "dtype": options.dtype})
    with torch.no_grad():
        for threads in options.threads:
            torch.set_num_threads(threads)
            if "linears" in wanted:
                linears = Linears(dtype, options.sparsities)
                results.setdefault("linears", []).append(measure_linears(linears, options.repeats))
                del linears
            if "llama" in wanted:
                found = measure_model(random_llama(dtype), "Random Llama of 0.75 B", options)
                results.setdefault("llama", []).append(found)
            if "smollm2" in wanted:
                found = measure_model(load_model(smollm2(), dtype)[0], "SmolLM2-135M", options)
                results.setdefault("smollm2", []).append(found)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
