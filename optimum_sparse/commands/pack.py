"""`optimum-cli sparse pack` and `unpack`: from checkpoint to checkpoint, without building the model."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import check_output, folder_called, user_errors

if TYPE_CHECKING:
    from ..checkpoint import Sizes

PACK = """\
Pack the matrices of a checkpoint that has zeros in it, without loss: the files get smaller, about half as large at
50 % zeros. The packed model loads with from_pretrained after `import optimum_sparse`, and is then as large as before.

example:
  optimum-cli sparse pack ./pruned ./pruned-packed
"""
UNPACK = """\
Make a packed checkpoint dense, bit for bit as it was: then it loads everywhere. This also reads checkpoints that
compressed-tensors wrote in its former formats sparse-bitmask and sparse-24-bitmask; `pack` does, too.

example:
  optimum-cli sparse unpack ./pruned-packed ./pruned
"""


class PackCommand(BaseOptimumCLICommand):
    """Packs a checkpoint."""

    COMMAND = CommandInfo(name="pack", help="Make the files of a pruned model smaller.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        _declare(parser, PACK)

    def run(self) -> None:
        """Pack and say what that gained."""
        with user_errors():
            from ..checkpoint import pack_folder

            sizes = _convert(pack_folder, Path(self.args.model), self.args.output)
            share = f"{100 * sizes.packed_bytes / sizes.dense_bytes:.1f} %"
            print(
                f"Packed {sizes.packed_tensors} tensors to {_megabytes(sizes.packed_bytes)}, {share} of dense; all "
                f"weight files take {_megabytes(sizes.total_bytes)}.\n"
                f"Saved to {self.args.output}. Load it with AutoModelForCausalLM.from_pretrained after "
                "`import optimum_sparse`."
            )


class UnpackCommand(BaseOptimumCLICommand):
    """Makes a packed checkpoint dense."""

    COMMAND = CommandInfo(name="unpack", help="Make a packed checkpoint dense.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        _declare(parser, UNPACK)

    def run(self) -> None:
        """Unpack and say what was done."""
        with user_errors():
            from ..checkpoint import unpack_folder

            sizes = _convert(unpack_folder, Path(self.args.model), self.args.output)
            print(
                f"Unpacked {sizes.packed_tensors} tensors; all weight files take {_megabytes(sizes.total_bytes)}.\n"
                f"Saved to {self.args.output}."
            )


def _convert(convert: Callable[[Path, Path], Sizes], source: Path, output: Path) -> Sizes:
    """Write a checkpoint again, and what its files take now into the report that goes along.

    Raises:
        ValueError: `output` is `source`, or holds a dense model, which would be lost.
        OSError: Nothing can be written there.
    """
    from ..report import read_report, weight_bytes, write_report

    check_output(output, source, "DIR")
    report = read_report(source)
    sizes = convert(source, output)
    if report is not None and report.sizes:
        report.sizes["saved"] = weight_bytes(output)
        write_report(report, output)
    return sizes


def _declare(parser: ArgumentParser, description: str) -> None:
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description = description
    parser.add_argument("model", metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("output", metavar="OUT", type=folder_called, help="folder to save in; not DIR")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
