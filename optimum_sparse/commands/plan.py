"""`optimum-cli sparse plan`: what pruning a model will take, without loading its weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..loading import model_without_weights
from . import DTYPES, add_trust_option, user_errors
from .prune import add_config_options, build_config

DESCRIPTION = """\
Say how long pruning a model will take and what will be in memory, from its configuration alone.

examples:
  optimum-cli sparse plan meta-llama/Llama-3.1-8B --sparsity 0.5
  optimum-cli sparse plan ./my-model --max-memory 4GiB --method wanda
  optimum-cli sparse plan config.json --assume h200 --dtype bfloat16
"""

# The keys of `optimum_sparse.dry_run.ASSUMED`, which is not imported here: this file must be light.
MACHINES = ("h200", "h100", "a100", "rtx-4090")


class PlanCommand(BaseOptimumCLICommand):
    """Prints what pruning will take."""

    COMMAND = CommandInfo(name="plan", help="Say what pruning a model will take, without loading its weights.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.usage = "%(prog)s MODEL [options]"
        parser.description = DESCRIPTION
        parser.add_argument("model", metavar="MODEL", help="Hub id, folder, or config.json of the dense model")
        add_config_options(parser)
        run = parser.add_argument_group("running")
        run.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: the model's)")
        add_trust_option(run)
        run.add_argument("--max-memory", metavar="SIZE", help="what may be held at once, as in 4GiB (default: all)")
        run.add_argument(
            "--assume",
            choices=MACHINES,
            help="a GPU, with assumed speeds, instead of this machine's CPU, whose speed is measured",
        )

    def run(self) -> None:
        """Print the plan."""
        with user_errors():
            print(plan(self.args))


def plan(args: Namespace) -> str:
    """What pruning will take, as a text.

    Raises:
        ValueError: An option is wrong, or nothing can be pruned.
        OSError: The configuration cannot be read.
    """
    config = build_config(args)

    import torch

    from ..dry_run import ASSUMED, measured_rates, outline, phases, place, window_length, workload
    from ..estimate import available_memory, duration, held_memory, parse_size
    from ..plan import gib, make_plan

    cpu = torch.device("cpu")
    machine = ASSUMED[args.assume] if args.assume else measured_rates(held_memory(cpu) + available_memory(cpu))
    budget = parse_size(args.max_memory) if args.max_memory else machine.memory
    held = held_memory(cpu) if machine.is_cpu else 0
    model = outline(lambda: model_without_weights(args.model, args.dtype, args.trust_remote_code), config)
    seqlen = window_length(model, config)
    numel = sum(group.in_features * group.rows for group in model.groups)
    speeds = ", ".join(f"{name} {getattr(machine, name) / 1e12:.3g} TFLOP/s" for name in ("half", "single", "double"))
    lines = [
        f"{sum(group.matrices for group in model.groups):,} matrices, {numel:,} weights; model {gib(model.weights)}",
        f"{config.num_samples:,} calibration windows of {seqlen:,} tokens: {config.num_samples * seqlen:,} tokens",
        f"{'assumed speed of ' + args.assume if args.assume else 'measured speed of this CPU'}: {speeds}; "
        f"assumed for offloaded weights: {machine.read / 1e9:g} GB/s",
        *model.notes,
    ]
    for title, offloaded in (("weights in memory", False), ("weights on disk, brought in block by block", True)):
        times = phases(model, config, offloaded, machine)
        reading = times.pop("reading", 0.0)
        lines += ["", title]
        try:
            lines.append(str(make_plan(workload(model, config, held, offloaded, machine.is_cpu), config, budget)))
        except ValueError as error:
            lines.append(str(error))
            continue
        seconds = ", ".join(f"{phase} {duration(time)}" for phase, time in times.items())
        lines.append(f"time: {seconds}; together {duration(max(sum(times.values()), reading))}")
        if offloaded:
            lines.append(f"reading, beside that: {duration(reading)}")
    offloaded, _ = place(model, config, held, budget, machine.is_cpu)
    lines += ["", f"chosen: weights {'on disk' if offloaded else 'in memory'}; will be written: {gib(model.weights)}"]
    return "\n".join(lines)
