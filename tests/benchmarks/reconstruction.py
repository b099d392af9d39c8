"""What training a pruned block is worth, with Muon and with Adam: one block of SmolLM2-135M-Instruct.

The block is pruned alone, on 16 windows of 2,048 tokens of WikiText-2 raw validation, and trained on 14 of them;
errors are those of the other two.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
from common import arguments, calibration_windows, machine, smollm2, write_json
from parity import CALIBRATION_WINDOWS
from quality import TARGETS

from optimum_sparse import SparsePruner, reconstruction
from optimum_sparse.loading import load_model
from optimum_sparse.muon import Muon


class Adam(torch.optim.Adam):
    """Adam for the matrices, at the learning rate that vectors have; pruned weights, without a gradient, stay zero."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        rate = reconstruction.VECTOR_RATE / reconstruction.MATRIX_RATE
        super().__init__(
            [{"params": group["params"], "lr": rate * group["lr"]} for group in groups], betas=reconstruction.BETAS
        )


def main() -> None:
    """Prune the block, train a copy of it with each optimizer, print and write JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="how many zeros")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2(), "float32")
    windows = calibration_windows(args.data, tokenizer, CALIBRATION_WINDOWS)
    name = f"model.layers.{args.block}"
    calls, outputs = run_dense(model, name, windows)
    print(f"{'':<24} {'error, %':>9} {'less by, %':>10} {'of CPU, s':>9}")
    rows = []
    for target in args.only:
        pruned = copy.deepcopy(model)
        pruner = SparsePruner(targets=(f"{name}.*",), num_samples=len(windows), progress=False, **TARGETS[target])
        pruner.prune(pruned, dataset={"input_ids": windows})
        for optimizer in (Adam, Muon):
            for epochs in args.epochs:
                row = train(copy.deepcopy(pruned.get_submodule(name)), calls, outputs, optimizer, epochs)
                rows.append({"target": target, **row})
                label = f"{target}, {optimizer.__name__}, {epochs} epochs"
                print(
                    f"{label:<24} {100 * row['after']:9.3f} "
                    f"{100 * (1 - row['after'] / row['before']):10.1f} {row['processor_seconds']:9.1f}",
                    flush=True,
                )
    write_json(args.json, {"machine": machine(args.threads), "block": args.block, "rows": rows})


def run_dense(
    model: Any, name: str, windows: torch.Tensor
) -> tuple[list[Callable[[Callable[..., Any]], Any]], dict[int, torch.Tensor]]:
    """What calls a function as the dense model calls a block, for each window, and what the block puts out."""
    calls: list[Callable[[Callable[..., Any]], Any]] = []
    outputs: dict[int, torch.Tensor] = {}

    def keep(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        outputs[len(calls)] = reconstruction.hidden_states(output)
        calls.append(lambda function: function(*given, **named))

    hook = model.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for window in windows:
            model.model(window[None], use_cache=False)
    hook.remove()
    return calls, outputs


def train(
    block: torch.nn.Module,
    calls: list[Callable[[Callable[..., Any]], Any]],
    outputs: dict[int, torch.Tensor],
    optimizer: type[torch.optim.Optimizer],
    epochs: int,
) -> dict[str, Any]:
    """Train a block, and return its errors and the time."""
    names = [name for name, _ in block.named_parameters()]
    with patch.object(reconstruction, "Muon", optimizer), torch.no_grad():
        used = time.process_time()
        found = reconstruction.reconstruct(
            block, names, outputs, lambda batch, function: calls[batch](function), epochs
        )
        used = time.process_time() - used
    return {
        "optimizer": optimizer.__name__,
        "epochs": epochs,
        "before": found.before,
        "after": found.after,
        "processor_seconds": used,
    }


if __name__ == "__main__":
    main()
