"""`optimum-cli sparse bench`: a pruned model against itself, dense and sparse."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import add_trust_option, check_file, user_errors

DESCRIPTION = """\
Load a pruned model twice, as it is and with its linear layers packed where that is faster, and measure both in turn:
seconds to load, resident memory, and tokens per second of prefill (to the first token) and decode.

It takes the memory of two models, and a machine that does nothing else.
"""


class BenchCommand(BaseOptimumCLICommand):
    """Measures what the zeros of a model are worth on this machine."""

    COMMAND = CommandInfo(name="bench", help="Measure a pruned model on this machine, dense and sparse.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = DESCRIPTION
        parser.usage = "%(prog)s MODEL [options]"
        parser.add_argument("model", metavar="MODEL", help="folder, Hub id or .gguf file of a pruned model")
        parser.add_argument(
            "--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="sequences at once (default: 1 4 16)"
        )
        parser.add_argument("--prompt-tokens", type=int, default=128, help="length of the prompts (default: 128)")
        parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default: 32)")
        parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default: 3)")
        parser.add_argument("--threads", type=int, help="threads to use (default: as torch does)")
        parser.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16"),
            default="auto",
            help="type of the weights (default: the checkpoint's)",
        )
        add_trust_option(parser)
        parser.add_argument(
            "--prefer",
            choices=("speed", "memory"),
            default="speed",
            help="pack the layers that are faster so, or all that become smaller (default: speed)",
        )
        parser.add_argument("--layers", action="store_true", help="print what became of each layer, too")
        parser.add_argument("--json", metavar="FILE.json", type=Path, help="write the figures to a file")
        parser.add_argument("--plot", metavar="FILE.svg", type=Path, help="draw them, as .svg or .png")

    def run(self) -> None:
        """Measure, print, and write what was asked for."""
        import torch

        from ..report import REPORT_FILE, read_report, write_report
        from ..runtime import bench as measure

        args = self.args
        with user_errors():
            check_file(args.json, "--json")
            check_file(args.plot, "--plot")
            if args.plot is not None:
                measure.check_plot(args.plot)
            if args.threads is not None:
                if args.threads < 1:
                    raise ValueError(f"--threads must be at least 1, got {args.threads}.")
                torch.set_num_threads(args.threads)
            report = read_report(args.model)
            findings, reports = measure.bench(
                args.model,
                args.batch_sizes,
                args.prompt_tokens,
                args.new_tokens,
                args.repeats,
                args.dtype,
                args.prefer,
                args.trust_remote_code,
            )
        print(measure.table(findings))
        with user_errors():
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(findings, indent=2) + "\n", encoding="utf-8")
            if args.plot is not None:
                args.plot.parent.mkdir(parents=True, exist_ok=True)
                measure.plot(findings, args.plot)
        if report is not None:
            # A report is published with the model: no paths of this machine.
            report.bench = {**findings, "model": Path(args.model).resolve().name}
            with user_errors():
                write_report(report, args.model)
            print(f"\nAdded to {Path(args.model, REPORT_FILE)}.")
        if args.layers:
            for layers in reports:
                print(f"\n{layers}")
