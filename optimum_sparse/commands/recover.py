"""`optimum-cli sparse recover`: train a pruned model and keep every zero."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import fields
from functools import partial
from typing import get_args, get_type_hints

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..loading import load_model, local_path
from ..recovery.config import METHODS, RecoveryConfig
from . import DTYPES, add_trust_option, check_output, device_called, folder_called, user_errors

DESCRIPTION = """\
Train a pruned model without changing a single zero, and save it like the pruned one. A run that was interrupted goes
on from its last checkpoint when the same command is given again.

The rows of the dataset have the column "text", the columns "prompt" and "completion", or the column "messages".

examples:
  optimum-cli sparse recover ./pruned ./recovered --dataset my-text.jsonl
  optimum-cli sparse recover ./pruned ./recovered --dataset my-text.jsonl --distill ./dense
  optimum-cli sparse recover ./pruned ./recovered --dataset trl-lib/Capybara --method full --max-steps 1000
"""


class RecoverCommand(BaseOptimumCLICommand):
    """Trains a pruned model and saves it."""

    COMMAND = CommandInfo(name="recover", help="Train a pruned model and keep every zero.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.usage = "%(prog)s DIR OUT --dataset DATA [options]"
        parser.description = DESCRIPTION
        parser.add_argument("model", metavar="DIR", help="folder or Hub id of the pruned model")
        parser.add_argument("output", metavar="OUT", type=folder_called, help="folder to save the recovered model in")
        parser.add_argument(
            "--dataset",
            required=True,
            metavar="DATA",
            help="a .jsonl, .json, .parquet or .txt file, or a Hub dataset as path[:config[:split]]",
        )
        parser.add_argument("--distill", metavar="TEACHER", help="learn from this dense model (folder or Hub id)")
        parser.add_argument(
            "--teacher-cache", metavar="FOLDER", help="keep the 512 likeliest tokens of the teacher on disk"
        )
        hints = get_type_hints(RecoveryConfig)
        for field in fields(RecoveryConfig):
            hint = hints[field.name]
            help_text = field.metadata["help"]
            if "(default" not in help_text:
                help_text += f" (default: {field.default})"
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                default=SUPPRESS,
                type=get_args(hint)[0] if get_args(hint) else hint,
                choices=METHODS if field.name == "method" else None,
                help=help_text.replace("%", "%%"),
            )
        parser.add_argument(
            "--dtype", choices=DTYPES, default="auto", help="type of the saved weights (default: the checkpoint's)"
        )
        add_trust_option(parser)
        parser.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)"
        )

    def run(self) -> None:
        """Train and save."""
        with user_errors():
            recover_from(self.args)


def recover_from(args: Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError: An option is wrong, or model, data and teacher do not go together.
        OSError: A file cannot be read or written, or the Hub cannot be reached.
    """
    config = RecoveryConfig(
        **{field.name: getattr(args, field.name) for field in fields(RecoveryConfig) if hasattr(args, field.name)}
    )
    output, source = args.output, local_path(args.model)
    check_output(output, source, "DIR")
    if args.teacher_cache and not args.distill:
        raise ValueError("--teacher-cache needs a teacher: give --distill TEACHER.")

    from ..evaluation import check_same_tokenizer
    from ..recovery.recover import recover
    from ..recovery.teacher_cache import TopKCache
    from ..report import PAGE_FILE, REPORT_FILE, read_report, weight_bytes, write_report

    device_called(args.device)  # it is there
    report = None if source is None else read_report(source)
    load = partial(load_model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    model, tokenizer = load(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: save that of the dense model along with it.")
    teacher, other = load(args.distill) if args.distill else (None, None)
    check_same_tokenizer(tokenizer, other, "teacher")
    record = recover(
        model,
        tokenizer,
        output,
        args.dataset,
        config,
        teacher=teacher,
        teacher_cache=TopKCache(args.teacher_cache) if args.teacher_cache else None,
        device=None if args.device == "auto" else args.device,
    )
    if report is not None and source is not None:
        report.recovery = record
        report.evaluations, report.bench, report.generations = [], None, []  # they are of the model before
        report.sizes["saved"] = weight_bytes(output)
        write_report(report, output, page=(source / PAGE_FILE).is_file())
    else:  # nor is there to be one of what was in OUT before
        for file in (REPORT_FILE, PAGE_FILE):
            (output / file).unlink(missing_ok=True)
    print(
        f"Perplexity on {config.eval_samples} held-out texts: {record['perplexity_before']:.4g} before, "
        f"{record['perplexity_after']:.4g} after.\n"
        f"Saved to {output}. Check the zeros with: optimum-cli sparse inspect {output}"
    )
