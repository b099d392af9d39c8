"""What `test_distributed.py` runs in two processes, and in one for comparison.

`python -m tests.two_processes FOLDER` prunes models and leaves their weights and records in the folder.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sparse import SparsePruner
from optimum_sparse.distributed import Processes
from optimum_sparse.methods import admm, cg
from optimum_sparse.solver import Solver
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model
from tests.test_experts import CASES, batches_of

# The run that shows its progress.
SHOWN = "magnitude"
# The run whose one batch is split.
SPLIT = "one batch of three rows"
# name -> model, batches, options. Of 3 batches, the processes have 2 and 1.
RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], dict[str, Any]]] = {}


def _add(name: str, build: Callable[[], nn.Module], batches: Callable[[nn.Module], Any], **options: Any) -> None:
    RUNS[name] = (build, batches, options)


def _padded(model: nn.Module) -> Any:
    return tiny_batches(3, padding=True)


for order in (True, False):
    for method in ("sparsegpt", "wanda", "admm", "sparsegpt-reference"):
        _add(f"llama {method} {order}", tiny_model, _padded, method=method, true_sequential=order)
    _add(f"llama 2:4 {order}", tiny_model, _padded, pattern="2:4", true_sequential=order)
    _add(f"gpt2 {order}", lambda: tiny_model("gpt2"), _padded, true_sequential=order)
    _add(f"refined {order}", tiny_model, _padded, method="wanda", refine="cg", true_sequential=order)
    _add(f"swapped {order}", tiny_model, _padded, refine="swaps", true_sequential=order)
    _add(f"quantized {order}", tiny_model, _padded, method="sparsegpt", quantization="int8", true_sequential=order)
    _add(f"rounded {order}", tiny_model, _padded, quantization="int4", true_sequential=order)
    _add(f"repeated {order}", lambda: tiny_model("zamba2"), _padded, true_sequential=order)
    _add(f"mixtral {order}", tiny_mixtral, _padded, true_sequential=order)
    for experts in ("gpt_oss", "llama4", "jetmoe", "hand-written"):
        build = CASES[experts].build
        _add(f"{experts} {order}", build, batches_of, method="sparsegpt", true_sequential=order)
_add(SHOWN, lambda: tiny_model("llama"), _padded, method="magnitude")
_add("wanda-update", tiny_model, _padded, method="wanda-update", comparison_group="layer")
for allocation in ("owl", "dlp", "error", "loss"):
    _add(f"allocated {allocation}", tiny_model, _padded, method="wanda", allocation=allocation)
_add("allocated experts", tiny_mixtral, _padded, allocation="error", pattern="2:4", sparsity=0.3)
_add("corrected", tiny_model, _padded, error_correction=0.5)
_add(SPLIT, tiny_model, lambda model: tiny_batches(1, rows=3, length=96))


def inexact(name: str) -> bool:
    """Whether products of a run are of a few rows, or of batches that were split: their last bits may differ."""
    return name == SPLIT or name.split()[0] in CASES


@contextmanager
def fp32_steps() -> Iterator[None]:
    """Steps in fp32 also on CPUs that take bfloat16 for them, in which a last bit that differs becomes much more."""
    with ExitStack() as patches:
        for module in (admm, cg):
            patches.enter_context(mock.patch.object(module, "product_dtype", lambda device: torch.float32))
        yield


def main(folder: Path) -> None:
    """Prune all models, and try what belongs to several processes."""
    processes = Processes()
    # Sums over the inputs, as the solver gets them.
    sums: dict[str, torch.Tensor] = {}
    solve = Solver.solve

    def noted(self: Solver, group: Any, statistics: Any, *rest: Any) -> Any:
        if statistics is not None:
            sums[f"sums {group[0].name}"] = statistics._sums.clone()
        return solve(self, group, statistics, *rest)

    Solver.solve = noted  # type: ignore[method-assign]
    for name, (build, batches_for, options) in RUNS.items():
        sums.clear()
        model = build()
        pruner = SparsePruner(progress=name == SHOWN, block_size=16, **options)
        with fp32_steps() if inexact(name) else nullcontext():
            pruner.prune(model, dataset=batches_for(model))
        assert pruner.report is not None
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        processes.check_same({f"weights of {name}": sha256(weights)})
        if processes.is_main:
            save_file({**weights, **sums}, folder / f"{name}.safetensors")
            entries = [asdict(entry) for entry in pruner.report.matrices]
            record = {"entries": entries, "skipped": pruner.report.skipped, "notes": pruner.report.notes}
            (folder / f"{name}.json").write_text(json.dumps(record))
    if processes.count > 1:
        save_and_resume(folder)
        (folder / f"errors-{processes.index}.json").write_text(json.dumps(errors(processes)))


def save_and_resume(folder: Path) -> None:
    """Of a run that stopped in the middle, one process's files are enough for both, on disk and in memory."""
    processes, source = Processes(), folder / "source"
    if processes.is_main:
        tiny_model("llama").save_pretrained(source)
    processes.wait()

    def run(out: str, progress: Path, place: str | None) -> None:
        options = {} if place is None else {"device_map": {"": place}, "offload_folder": folder / "offload"}
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        pruner = SparsePruner(progress=False)
        pruner.prune(model, dataset=tiny_batches(3), resume_from=progress, activation_device="disk")
        pruner.save(model, folder / out)
        assert (folder / out / "model.safetensors").exists() or not processes.is_main

    for place in (None, "disk"):
        progress = folder / f"progress-{place}"
        run(f"undisturbed-{place}", progress, place)
        processes.wait()
        if processes.is_main:
            files = sorted(progress.glob("*.safetensors"))
            assert len(files) == 2
            files[-1].unlink()
        processes.wait()
        run(f"resumed-{place}", progress, place)


def errors(processes: Processes) -> list[str]:
    """What each process is told if they do not fit together."""
    told = []
    for batches in (tiny_batches(3, seed=processes.index), tiny_batches(1, rows=1)):
        model = tiny_model()
        try:
            SparsePruner(progress=False).prune(model, dataset=batches)
        except ValueError as error:
            told.append(str(error))
    return told


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Of all bits."""
    from optimum_sparse.resume import digest

    return digest(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for value in tensors.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # when torch ends gloo after all else, it may wait for ever
