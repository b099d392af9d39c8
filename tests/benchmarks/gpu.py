"""A model on a GPU: time against what its arithmetic takes at least, and against the papers' way; see README.md."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, write_json

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.dry_run import Rates, outline, phases
from optimum_sparse.methods import METHODS, fused, sparsegpt
from optimum_sparse.patterns import parse_pattern
from optimum_sparse.statistics import GramStatistics

LLAMA = dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32, max_position_embeddings=4096)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(LLAMA, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000),
    "llama-3-8b": dict(LLAMA, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        vocab_size=1000,
    ),
}
RUNS: dict[str, dict[str, Any]] = {
    "SparseGPT 50 %": dict(method="sparsegpt"),
    "SparseGPT 2:4": dict(method="sparsegpt", pattern="2:4"),
    "Wanda 50 %": dict(method="wanda"),
}


def main() -> None:
    """Print what was measured, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-2-7b", "llama-3-8b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument(
        "--reference-blocks", type=int, default=2, help="blocks to prune the papers' way, for their time"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    results: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "device": name_of(device)}
    results["rates"] = rates = measured_rates(device)
    say("rates", {name: f"{getattr(rates, name) / 1e12:.3g} TFLOP/s" for name in ("half", "single", "double")})
    for shape in args.shape:
        config = LlamaConfig(**SHAPES[shape])
        results[shape] = {"sweep": sweep(config, device)}
        say(f"{shape}, sweep of one matrix", results[shape]["sweep"])
        results[shape]["runs"] = runs = {name: run(config, device, options, args) for name, options in RUNS.items()}
        for name, found in runs.items():
            found["least"] = least(config, options=RUNS[name], rates=rates, args=args)
            say(f"{shape}, {name}", found)
        reference = papers_way(config, device, args)
        reference["times ours"] = reference["seconds"] / runs["SparseGPT 50 %"]["seconds"]["total"]
        results[shape]["the papers' way"] = reference
        say(f"{shape}, SparseGPT 50 % the papers' way", reference)
    results["rates"] = vars(rates)
    write_json(args.json, results)


def say(what: str, found: dict[str, Any]) -> None:
    """Print some figures."""
    print(f"{what}: " + ", ".join(f"{name} {_shown(value)}" for name, value in found.items()), flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_shown(part)}" for name, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def name_of(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seconds(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The least time of some calls, after one to warm up, until the device has finished."""
    best = float("inf")
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        taken = time.perf_counter() - started
        best = min(best, taken) if _ else best
    return best


def wait(device: torch.device) -> None:
    """Until a device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_rates(device: torch.device) -> Rates:
    """Operations per second of large products."""
    size = 8192 if device.type == "cuda" else 512
    found = {}
    for name, dtype in (("half", torch.bfloat16), ("single", torch.float32), ("double", torch.float64)):
        one = torch.randn(size, size, device=device, dtype=dtype)
        found[name] = 2 * size**3 / seconds(partial(torch.mm, one, one), device)
    return Rates(**found, read=1e9, memory=0, is_cpu=device.type == "cpu")


def build(config: LlamaConfig, device: torch.device, blocks: int | None = None) -> PreTrainedModel:
    """A random model, made on the device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks or config.num_hidden_layers
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def windows(config: LlamaConfig, args: argparse.Namespace) -> torch.Tensor:
    """Random tokens `[samples, seqlen]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (args.samples, args.seqlen), generator=generator)


def run(
    config: LlamaConfig, device: torch.device, options: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Prune a model, as a user would."""
    model = build(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pruner = SparsePruner(num_samples=args.samples, seqlen=args.seqlen, progress=False, **options)
    pruner.prune(model, dataset=[{"input_ids": window} for window in windows(config, args)])
    report = pruner.report
    assert report is not None and report.sparsity == 0.5
    return {"seconds": report.seconds, "peak GiB": (report.peak_memory or 0) / 2**30, "notes": report.notes}


def least(config: LlamaConfig, options: dict[str, Any], rates: Rates, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each phase if all its operations ran at the rates of large products."""
    how = SparseConfig(num_samples=args.samples, seqlen=args.seqlen, **options)
    found = phases(
        outline(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), how), how, False, rates
    )
    return {**found, "total": sum(found.values())}


def sweep(config: LlamaConfig, device: torch.device) -> dict[str, float]:
    """The panels of one square matrix: the kernel, and the loop over columns."""
    width = config.hidden_size
    generator = torch.Generator(device).manual_seed(0)
    columns = torch.randn(width, width, device=device, generator=generator)
    inverse = torch.randn(fused.PANEL, fused.PANEL, device=device, generator=generator).triu() / fused.PANEL
    inverse.diagonal().fill_(1)
    mask = torch.rand(width, width, device=device, generator=generator) > 0.5
    found: dict[str, float] = {}
    for name, pattern in (("50 %", parse_pattern(0.5, None)), ("2:4", parse_pattern(None, "2:4"))):

        def panels(function: Callable[..., Any], pattern: Any = pattern, choose: bool = name == "2:4") -> None:
            for start in range(0, width, fused.PANEL):
                part = slice(start, start + fused.PANEL)
                function(columns[part], inverse, mask[part], pattern, choose)

        found[f"{name} loop s"] = seconds(partial(panels, sparsegpt._sweep_panel), device)
        if fused.usable(columns):
            found[f"{name} kernel s"] = seconds(partial(panels, fused.sweep), device)
            found[f"{name} times faster"] = found[f"{name} loop s"] / found[f"{name} kernel s"]
    return found


@torch.no_grad()
def papers_way(config: LlamaConfig, device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of all blocks from those of a few: two forwards, an fp32 Gram matrix per layer, a loop over columns."""
    model, how = build(config, device, args.reference_blocks), SparseConfig(method="sparsegpt")
    inputs: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append((positional[0], named))
        raise InterruptedError

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows(config, args).split(4):
        try:
            model(input_ids=window.to(device), use_cache=False)
        except InterruptedError:
            continue
    handle.remove()
    wait(device)
    started = time.perf_counter()
    for block in model.model.layers:
        grams = {
            layer: GramStatistics(layer.in_features, device)
            for layer in block.modules()
            if isinstance(layer, nn.Linear)
        }

        def add(layer: nn.Linear, positional: tuple[Any, ...], grams: dict[Any, Any] = grams) -> None:
            grams[layer].add(positional[0].flatten(0, -2).float())

        handles = [layer.register_forward_pre_hook(add) for layer in grams]
        for hidden, named in inputs:
            block(hidden, **named)
        for handle in handles:
            handle.remove()
        for layer, gram in grams.items():
            solution = METHODS["sparsegpt-reference"].solve(layer.weight.float(), gram, parse_pattern(0.5, None), how)
            layer.weight.copy_(solution.weight)
        inputs = [(block(hidden, **named), named) for hidden, named in inputs]
    wait(device)
    taken = time.perf_counter() - started
    return {
        "seconds": taken * config.num_hidden_layers / len(model.model.layers),
        "measured blocks": args.reference_blocks,
    }


if __name__ == "__main__":
    main()
