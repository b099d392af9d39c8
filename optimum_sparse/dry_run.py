"""What pruning a model will take, found out without its weights: a forward of tensors without data, and arithmetic."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .calibration import BATCH_TOKENS_ACCELERATOR, BATCH_TOKENS_CPU, DEFAULT_SEQLEN
from .calibration.interface import is_encoder_decoder, longest_input, without_cache
from .config import SparseConfig
from .estimate import (
    available_memory,
    collects_grams,
    gram_flops,
    linear_flops,
    num_forwards,
    solve_flops,
    training_forwards,
)
from .matrices import find_blocks, find_matrices, find_weights
from .methods import admm
from .plan import Footprint, GroupShape, Plan, Workload, make_plan, measure
from .trace import trace
from .uses import Watched

# Tokens of the forward.
PROBE_TOKENS = 256
EXPERTS = "optimum_sparse_dry_run"


@dataclass(frozen=True)
class Outline:
    """A model as numbers; memory in bytes.

    Attributes:
        groups: What is to be pruned.
        footprint: What activations take.
        weights: What all weights take.
        units: What a block and the one behind it take, or whatever two modules that follow each other take more.
        hidden: Width of the residual stream.
        longest: Tokens that the model takes at most, if that is known.
        blocks: Names of the blocks.
        others: Names of the largest modules that hold no block.
        notes: What could not be found out.
    """

    groups: tuple[GroupShape, ...]
    footprint: Footprint
    weights: int
    units: int
    hidden: int
    longest: int | None
    blocks: tuple[str, ...]
    others: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rates:
    """How fast a machine is; operations and bytes per second.

    Attributes:
        half: Matrix products in bfloat16.
        single: Matrix products in float32.
        double: Matrix products in float64.
        read: From where offloaded weights are kept.
        memory: Bytes of memory that there are.
        is_cpu: Whether it is a CPU, which computes Gram matrices in float32.
    """

    half: float
    single: float
    double: float
    read: float
    memory: int
    is_cpu: bool = False


# Assumptions, not measurements: what large products reach of the data sheets, and a host that reads 5 GB/s.
ASSUMED = {
    "h200": Rates(650e12, 50e12, 30e12, 5e9, 141 * 10**9),
    "h100": Rates(650e12, 50e12, 30e12, 5e9, 80 * 10**9),
    "a100": Rates(250e12, 17e12, 17e12, 5e9, 80 * 10**9),
    "rtx-4090": Rates(150e12, 60e12, 1.1e12, 5e9, 24 * 10**9),
}


def outline(build: Callable[[], nn.Module], config: SparseConfig) -> Outline:
    """See what a model is made of, and what its forward takes.

    Args:
        build: Makes the model; no memory is taken for its weights.
        config: What is to be pruned.

    Raises:
        ValueError: As `find_matrices`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return _outline(build().eval(), config)


def _outline(model: nn.Module, config: SparseConfig) -> Outline:
    blocks = find_blocks(model)
    watched = Watched({w.parameter: w.value for w in find_weights(model) if not w.is_convolution})
    tokens = min(PROBE_TOKENS, longest_input(model) or PROBE_TOKENS)
    batch: dict[str, Any] = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    seen, notes, footprint = None, [], Footprint(0, 0, 0)
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation(EXPERTS)

    options = without_cache(model)

    def forward(inputs: Mapping[str, Any]) -> None:
        model(**inputs, **options)

    if is_encoder_decoder(model):
        batch["decoder_input_ids"] = batch["input_ids"]
    try:
        seen = trace(forward, [batch], model, watched, blocks)
        footprint = measure(forward, batch, tokens, watched, model, blocks)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        seen = None
        notes.append(
            f"The model does not run without data ({str(error).splitlines()[0]}): activations are not counted, and "
            "only nn.Linear and Conv1D are."
        )
    matrices, _ = find_matrices(model, config, seen)
    if seen is None:
        groups = [[matrix] for matrix in matrices]
    else:
        by_view = {matrix.view: matrix for matrix in matrices}
        groups = [[by_view[view] for view in stop] for stop in seen.stops(by_view) if not isinstance(stop, str)]
        groups += [[matrix] for matrix in matrices if matrix.view in seen.repeated]
    sizes = {name: _bytes(model.get_submodule(name)) for name in blocks}
    weights = _bytes(model)
    rest = [p.numel() * p.element_size() for n, p in model.named_parameters() if not n.startswith(tuple(sizes))]
    inside = sorted(sizes.values())[-2:]
    return Outline(
        groups=tuple(GroupShape.of(group, footprint) for group in groups),
        footprint=footprint,
        weights=weights,
        units=max(sum(inside), sum(inside[-1:]) + max(rest, default=0)),
        hidden=getattr(model.config.get_text_config(), "hidden_size", 0) if isinstance(model, PreTrainedModel) else 0,
        longest=longest_input(model),
        blocks=tuple(blocks),
        others=tuple(_others(model, blocks)),
        notes=tuple(notes),
    )


def _others(model: nn.Module, blocks: Sequence[str], prefix: str = "") -> Iterator[str]:
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if path not in blocks and any(block.startswith(f"{path}.") for block in blocks):
            yield from _others(child, blocks, f"{path}.")
        elif path not in blocks:
            yield path


def offloading_map(model: Outline, device: torch.device, where: str) -> dict[str, Any]:
    """A device map that keeps blocks elsewhere and brings them to a device one at a time.

    Args:
        model: The model.
        device: The device that computes.
        where: `"cpu"` or `"disk"`.
    """
    if device.type == "cpu":
        return {"": "disk"}
    return {**dict.fromkeys(model.others, device), **dict.fromkeys(model.blocks, where)}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def place(model: Outline, config: SparseConfig, held: int, budget: int, on_cpu: bool = True) -> tuple[bool, Plan]:
    """Whether the weights have to be offloaded for a run to fit, and its plan.

    Args:
        model: The model.
        config: How it is pruned.
        held: What is held besides the weights, in bytes.
        budget: What may be held.
        on_cpu: Whether it is pruned on a CPU.

    Raises:
        ValueError: It does not fit even if they are offloaded.
    """
    try:
        return False, make_plan(workload(model, config, held, False, on_cpu), config, budget)
    except ValueError:
        return True, make_plan(workload(model, config, held, True, on_cpu), config, budget)


def workload(model: Outline, config: SparseConfig, held: int, offloaded: bool, on_cpu: bool = True) -> Workload:
    """The numbers of a run.

    Args:
        model: The model.
        config: How it is pruned.
        held: What is held besides the weights, in bytes.
        offloaded: Whether the weights are brought in block by block.
        on_cpu: Whether it is pruned on a CPU.
    """
    seqlen = window_length(model, config)
    batch_tokens = BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS_ACCELERATOR
    return Workload(
        groups=model.groups,
        tokens=config.num_samples * seqlen,
        batch_rows=config.batch_size or min(config.num_samples, max(1, batch_tokens // seqlen)),
        row_tokens=seqlen,
        footprint=model.footprint,
        held=held + (0 if offloaded else model.weights),
        units=model.units if offloaded else 0,
        cpu=None if on_cpu else available_memory(torch.device("cpu")),
        disk=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def window_length(model: Outline, config: SparseConfig) -> int:
    """Tokens in a calibration window, as calibration chooses them."""
    return config.seqlen or min(DEFAULT_SEQLEN, model.longest or DEFAULT_SEQLEN)


def phases(model: Outline, config: SparseConfig, offloaded: bool, machine: Rates) -> dict[str, float]:
    """Seconds of each part of a run, if each is as fast as large products and files are.

    Args:
        model: The model.
        config: How it is pruned.
        offloaded: Whether the weights are brought in block by block.
        machine: How fast it is.
    """
    seqlen = window_length(model, config)
    tokens = config.num_samples * seqlen
    attention = 2 * len(model.blocks) * seqlen * model.hidden * tokens
    forward = (linear_flops(model.groups, tokens) + attention) / machine.half
    found = {"forward": num_forwards(config, tokens) * forward}
    if collects_grams(config):
        sums = gram_flops(model.groups, tokens, config)
        found["statistics"] = sums / (machine.single if machine.is_cpu else machine.half)
        cubes, iterates = sum(g.in_features**3 for g in model.groups), config.method == "admm"
        # One factorisation in double precision; or one inverse, and a product for each penalty but the first.
        squares = 2 * (admm.LEVELS - 1) * cubes / max(machine.single, machine.half)
        found["factors"] = cubes / machine.single + squares if iterates else cubes / 3 / machine.double
        found["solve"] = solve_flops(model.groups, config) / machine.single
    if config.reconstruct:
        found["reconstruction"] = training_forwards(config) * forward
    if offloaded:
        # The probe, the forward that is measured and the run read everything once; to allocate, a forward and a look
        # at the weights do.
        found["reading"] = (3 + 2 * (config.allocation is not None)) * model.weights / machine.read
    return found


def measured_rates(memory: int, size: int = 2048) -> Rates:
    """How fast this CPU is at what linear layers do, in a few seconds.

    Args:
        memory: Bytes that may be used.
        size: Width of the products.
    """

    def rate(dtype: torch.dtype) -> float:
        one = torch.randn(size, size).to(dtype)
        nn.functional.linear(one, one)
        started = time.perf_counter()
        nn.functional.linear(one, one)
        return 2 * size**3 / (time.perf_counter() - started)

    half, single, double = (max(rate(t), rate(t)) for t in (torch.bfloat16, torch.float32, torch.float64))
    return Rates(half, single, double, 1e9, memory, is_cpu=True)


def _experts(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """One expert of a module on its part of the tokens, if they are routed evenly; the others are like it."""
    up, down = self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj
    # Also what holds the result and the choice of each token, as in Transformers' own loop over experts.
    result = torch.zeros_like(hidden_states)
    chosen = nn.functional.one_hot(top_k_index, num_classes=len(up)).permute(2, 1, 0)
    inner = hidden_states[: max(1, top_k_index.numel() // len(up))].clone()
    inner = _product(inner, up[0], self.is_transposed)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    _product(inner, down[0], self.is_transposed)
    del chosen
    return result


def _product(inputs: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    return inputs @ weight if transposed else nn.functional.linear(inputs, weight)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
