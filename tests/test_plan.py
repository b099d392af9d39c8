"""The plan: what fits is chosen, what does not is refused, and the figures are those of real runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.config import METHOD_NAMES
from optimum_sparse.matrices import find_blocks, find_weights
from optimum_sparse.methods import METHODS
from optimum_sparse.plan import Footprint, GroupShape, Workload, make_plan, measure
from optimum_sparse.uses import Watched
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model

MIB = 2**20
WORK = Workload(
    groups=[GroupShape("0", 1024, 4096), GroupShape("0", 4096, 1024)],
    tokens=8 * 2048,
    batch_rows=8,
    row_tokens=512,
    footprint=Footprint(waiting=20_000, entering=5_000, running=40_000),
    held=400 * MIB,
    units=0,
    cpu=None,
    disk=2**40,
)


def plans(config: SparseConfig, work: Workload = WORK) -> list:
    """The plans from plenty of memory to the least that is enough."""
    found = []
    for budget in range(4000, 0, -10):
        try:
            found.append(make_plan(work, config, budget * MIB))
        except ValueError:
            break
    return found


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_less_memory_first_changes_where_then_how(method: str) -> None:
    chosen = plans(SparseConfig(method=method))
    assert all(plan.peak <= plan.budget for plan in chosen)
    choices = list(dict.fromkeys((p.activation_device, p.batch_rows, p.true_sequential) for p in chosen))
    assert choices[:2] == [(None, 8, True), ("disk", 8, True)]
    # What changes nothing comes first, what changes rounding second, what changes the result last.
    assert choices == sorted(choices, key=lambda c: (not c[2], -c[1], c[0] is not None))
    peaks = [plan.peak for plan in chosen]
    assert peaks == sorted(peaks, reverse=True)


def test_what_was_asked_for_is_left_alone() -> None:
    config = SparseConfig(true_sequential=True, batch_size=8)
    assert {(p.batch_rows, p.true_sequential) for p in plans(config)} == {(8, True)}
    assert {p.true_sequential for p in plans(replace(config, true_sequential=False))} == {False}
    assert make_plan(WORK, config, 2**40, "disk").activation_device == "disk"


def test_a_gpu_spills_to_the_cpu_first_if_there_is_room() -> None:
    config = SparseConfig()
    devices = dict.fromkeys(plan.activation_device for plan in plans(config, replace(WORK, cpu=2**40)))
    assert list(devices) == [None, "cpu"]
    devices = dict.fromkeys(plan.activation_device for plan in plans(config, replace(WORK, cpu=10 * MIB)))
    assert list(devices) == [None, "disk"]


def test_a_full_disk_leaves_the_other_order() -> None:
    full = replace(WORK, disk=10 * MIB)
    assert {plan.activation_device for plan in plans(SparseConfig(), full)} == {None}
    assert plans(SparseConfig(), full)[-1].true_sequential is False


def test_refused_with_numbers_and_advice() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.\d\d GiB .* held before 0\.39 GiB.*solving") as refusal:
        make_plan(WORK, SparseConfig(), 100 * MIB)
    for word in ("seqlen", "method='sparsegpt'", "method='wanda'", "offloaded", "Allow it"):
        assert word in str(refusal.value)
    advised = float(str(refusal.value).split("Allow it ")[1].split()[0])
    assert make_plan(WORK, SparseConfig(), int(advised * 2**30)).peak <= advised * 2**30


def test_gradients_are_planned_for() -> None:
    """Those of all blocks at once, if the model is in memory."""
    uniform, by_loss = SparseConfig(method="wanda"), SparseConfig(method="wanda", allocation="loss")
    several = replace(WORK, groups=[replace(group, block=str(b)) for group in WORK.groups for b in range(40)])
    one, other = (make_plan(several, config, 2**40).memory["running batch"] for config in (uniform, by_loss))
    assert other >= 2 * 40 * WORK.footprint.running * 8 * 256 > one
    classes = replace(several, footprint=replace(WORK.footprint, logits=50_000))
    assert make_plan(classes, by_loss, 2**40).memory["running batch"] >= other + 50_000 * 20 * 8 * 256
    assert make_plan(several, by_loss, 1800 * MIB).batch_rows < 8
    with pytest.raises(ValueError, match=r"try .*allocation='error'"):
        make_plan(several, by_loss, 500 * MIB)
    with pytest.raises(ValueError, match=r"gradients of the whole model.*allocation='error'"):
        make_plan(replace(WORK, units=MIB), by_loss, 2**40)


def test_pruning_refuses_before_it_starts() -> None:
    model = tiny_model()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="This run takes at least"):
        SparsePruner(progress=False).prune(model, dataset=tiny_batches(2), max_memory="1MiB")
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="max_memory must be"):
        SparsePruner(progress=False).prune(model, dataset=tiny_batches(2), max_memory="lots")


def test_what_was_chosen_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that only fits by block says so, and gives what it gives if asked for."""
    expected = tiny_model()
    SparsePruner(progress=False, true_sequential=False, batch_size=2).prune(expected, dataset=tiny_batches(3))
    choose = make_plan

    def tight(work: Workload, config: SparseConfig, budget: int, place: str | None) -> object:
        return replace(choose(work, config, budget, place), true_sequential=False, batch_rows=2)

    monkeypatch.setattr("optimum_sparse.run.make_plan", tight)
    model, pruner = tiny_model(), SparsePruner(progress=False)
    pruner.prune(model, dataset=tiny_batches(3, rows=2))
    assert model.config.sparsity_config["true_sequential"] is False
    assert pruner.report.config["true_sequential"] is False
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_smaller_batches_hold_the_same_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = make_plan
    monkeypatch.setattr("optimum_sparse.run.make_plan", lambda *args: replace(choose(*args), batch_rows=1))
    seen: list[int] = []
    model, batches = tiny_model(), tiny_batches(2, rows=3, padding=True)
    pruner = SparsePruner(progress=False, method="wanda")
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    pruner.prune(model, dataset=batches)
    handle.remove()
    assert seen[-7:] == [1] * 6 + [3]  # the last one sees how far hidden states have moved, on the batch of the probe
    tokens = sum(int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in batches)
    assert {entry.num_tokens for entry in pruner.report.matrices} == {tokens}


def test_footprint_of_a_forward_that_can_be_counted_by_hand() -> None:
    """In a llama, the most that waits: at down_proj, the residual stream, gate, up and their product."""
    model = tiny_model("llama", num_hidden_layers=2)
    watched = Watched({weight.parameter: weight.value for weight in find_weights(model)})
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        found = measure(
            lambda b: model.model(**b, use_cache=False), {"input_ids": ids}, 64, watched, model, find_blocks(model)
        )
    hidden, inner, heads = 32, 64, 8
    rotary = 2 * heads
    per_token = 4 * (hidden + inner + rotary)  # residual stream, input of down_proj, sine and cosine
    assert per_token <= found.waiting <= per_token + 4 * (2 * hidden + 2 * inner)
    assert 4 * (hidden + rotary) <= found.entering <= 4 * (3 * hidden + rotary)
    assert found.running >= found.waiting >= found.entering
    assert set(found.shares.values()) == {1.0}


def test_experts_share_the_tokens() -> None:
    model = tiny_mixtral()
    model.set_experts_implementation("eager")
    watched = Watched({weight.parameter: weight.value for weight in find_weights(model)})
    batch = {"input_ids": torch.arange(3, 103)[None]}
    with torch.no_grad():
        found = measure(lambda b: model(**b, use_cache=False), batch, 100, watched, model, find_blocks(model))
    name = "model.layers.0.mlp.experts.down_proj"
    assert 0.5 <= found.shares[name] <= 0.7  # two of four experts; more if not all of them were used
    assert found.shares["model.layers.0.self_attn.q_proj.weight"] == 1.0


def test_every_method_says_what_it_takes() -> None:
    assert set(METHODS) == set(METHOD_NAMES)
    assert all(per_weight >= 4 for per_weight, _ in (method.memory for method in METHODS.values()))


# Without this, the C library of Linux keeps freed memory by rules that depend on the addresses it happens to get: the
# same run takes 310 to 430 MB. What is measured is what is asked for.
RETURNED_AT_ONCE = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}

# Each case in a process of its own, a copy of one that has imported what it needs.
IN_COPIES = """
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(json.dumps(measured(*arguments)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""

# The solver: how much more than before it has held at most.
SOLVE = """
import json, os, sys, torch
from contextlib import nullcontext
from torch import nn
from optimum_sparse.config import SparseConfig
from optimum_sparse.distributed import Processes
from optimum_sparse.matrices import PrunableMatrix
from optimum_sparse.methods import workspace
from optimum_sparse.patterns import parse_pattern
from optimum_sparse.progress import Progress
from optimum_sparse.report import SparsityReport
from optimum_sparse.solver import Solver
from optimum_sparse.uses import View

class Resident:
    def holding(self, names):
        return nullcontext()

def status(field):
    return 1024 * int(open("/proc/self/status").read().split(field + ":")[1].split()[0])

def measured(options, width, rows):
    config = SparseConfig(**options)
    layer = nn.Linear(width, rows, bias=False, dtype=torch.bfloat16)
    matrix = PrunableMatrix("w", View("weight", 0, (rows, width), False), layer, parse_pattern(0.5, None), "b")
    solver = Solver(config, SparsityReport(config={}), Progress(False, config), Resident(), Processes())
    statistics = solver.new_statistics(matrix) if solver.statistics else None
    if statistics is not None:
        statistics.add(torch.randn(256, width))
        statistics.add_up(Processes())
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = status("VmRSS")
    with torch.no_grad():
        solver.solve([matrix], statistics)
    return status("VmHWM") - before, workspace(config, width, rows)
"""
SOLVED = [
    ({"method": "wanda"}, 1024, 16384),
    ({"method": "sparsegpt"}, 1024, 16384),
    ({"method": "sparsegpt"}, 4096, 512),
    ({"method": "ria"}, 1024, 8192),
    ({"method": "magnitude"}, 1024, 8192),
    ({"method": "wanda-update"}, 2048, 1024),
    ({"method": "admm"}, 1024, 1024),
    ({"method": "wanda", "refine": "cg"}, 1024, 1024),
    ({"method": "sparsegpt", "quantization": "int4"}, 1024, 4096),
    ({"method": "wanda", "quantization": "int4"}, 1024, 4096),
    ({"method": "wanda", "quantization": "int4", "rescale": True}, 1024, 4096),
    ({"method": "admm", "quantization": "int4"}, 1024, 1024),
]

# A whole run.
RUN = """
import json, os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from optimum_sparse import SparsePruner
from optimum_sparse.estimate import held_memory, peak_memory
from optimum_sparse.run import PruningRun

config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
                     vocab_size=512)
plans = []
make = PruningRun._make_plan
def noted(self, groups):
    make(self, groups)
    open("/proc/self/clear_refs", "w").write("5")
    plans.append(self.plan)
PruningRun._make_plan = noted

def measured(options, dtype, place):
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    batches = [{"input_ids": torch.randint(0, 512, (4, 256))} for _ in range(4)]
    SparsePruner(progress=False, **options).prune(model, dataset=batches, activation_device=place or None)
    held = plans[0].memory["held before"]
    return peak_memory() - held, plans[0].peak - held
"""
RUNS = [
    ({"method": "wanda"}, "bfloat16", ""),  # only this, for the sake of CPUs that are slow at it
    ({}, "float32", ""),
    ({}, "float32", "disk"),
    ({"true_sequential": False}, "float32", "disk"),
    ({"method": "wanda", "allocation": "loss"}, "float32", ""),
    ({"reconstruct": 1}, "float32", ""),
    ({"error_correction": 0.5}, "float32", ""),
    ({"error_correction": 0.5, "reconstruct": 1}, "float32", "disk"),
]


@cache
def taken_and_said(script: str) -> list[tuple[int, int]]:
    """Bytes that each case of `SOLVE` or `RUN` takes, and those that it is said to take."""
    cases = json.dumps(SOLVED if script is SOLVE else RUNS)
    command = [sys.executable, "-c", script + IN_COPIES, cases]
    result = subprocess.run(command, capture_output=True, text=True, env=RETURNED_AT_ONCE)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux")
@pytest.mark.parametrize("case", range(len(SOLVED)), ids=[str(case) for case in SOLVED])
def test_the_solver_takes_what_it_is_said_to_take(case: int) -> None:
    taken, said = taken_and_said(SOLVE)[case]
    assert taken <= 1.1 * said
    assert said <= 1.5 * taken + 100 * MIB  # libraries do not always set their buffers aside


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux")
@pytest.mark.parametrize("case", range(len(RUNS)), ids=[str(case) for case in RUNS])
def test_a_run_takes_what_the_plan_says(case: int) -> None:
    taken, said = taken_and_said(RUN)[case]
    assert taken <= 1.1 * said
    assert said <= 1.6 * taken + 100 * MIB


def test_batches_that_cannot_be_split_stay_whole() -> None:
    assert {plan.batch_rows for plan in plans(SparseConfig())} == {8, 4, 2, 1}
    assert {plan.batch_rows for plan in plans(SparseConfig(), replace(WORK, in_parts=False))} == {8}


def test_processes_plan_for_the_one_that_needs_most() -> None:
    found = Footprint(waiting=10.5, entering=3, running=20, logits=7).of_all(lambda size: max(size, 12))
    assert found == Footprint(waiting=12, entering=12, running=20, logits=12)
