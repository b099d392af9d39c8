"""`optimum-cli sparse`, the parent of the commands."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .bench import BenchCommand
from .inspect import InspectCommand
from .prune import PruneCommand
from .recover import RecoverCommand


class SparseCommand(BaseOptimumCLICommand):
    """Shows the help of the commands below it."""

    COMMAND = CommandInfo(name="sparse", help="Prune models, recover them, look at pruned ones, and measure them.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (PruneCommand, RecoverCommand, InspectCommand, BenchCommand)
    )
