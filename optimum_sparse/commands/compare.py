"""`optimum-cli sparse compare`: several pruned models on one page."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import check_file, user_errors

DESCRIPTION = """\
Put the reports of several pruned models side by side: zeros, size, perplexity, divergence from the dense model and
speed, as far as `evaluate` and `bench` have measured them, with plots of what no other model beats.

example:
  optimum-cli sparse compare ./wanda ./sparsegpt ./admm
"""


class CompareCommand(BaseOptimumCLICommand):
    """Compares pruned models by their reports."""

    COMMAND = CommandInfo(name="compare", help="Put several pruned models on one page.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.usage = "%(prog)s DIR DIR... [options]"
        parser.description = DESCRIPTION
        parser.add_argument("models", metavar="DIR", nargs="+", type=Path, help="folders of pruned models")
        parser.add_argument(
            "--html",
            metavar="FILE.html",
            type=Path,
            default=Path("compare.html"),
            help="the page to write (default: compare.html)",
        )

    def run(self) -> None:
        """Compare, print, and write the page."""
        with user_errors():
            compare(self.args)


def compare(args: Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError: A folder has no report, or one that cannot be read.
        OSError: The page cannot be written.
    """
    from ..report import REPORT_FILE, compare_reports, read_report
    from ..saving import replace_file

    check_file(args.html, "--html")
    reports = {}
    for folder in dict.fromkeys(args.models):
        report = read_report(folder)
        if report is None:
            raise ValueError(
                f"{folder} has no {REPORT_FILE}: give folders that `sparse prune` or SparsePruner.save has written."
            )
        reports[folder] = report
    names = {folder: folder.resolve().name for folder in reports}
    taken = Counter(names.values())
    comparison = compare_reports(
        {str(folder) if taken[names[folder]] > 1 else names[folder]: report for folder, report in reports.items()}
    )
    print(comparison.table())
    args.html.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(args.html) as file:
        file.write_text(comparison.page(), encoding="utf-8")
    print(f"To look at: {args.html}")
