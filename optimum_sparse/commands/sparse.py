"""`optimum-cli sparse`, the parent of the commands."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .bench import BenchCommand
from .compare import CompareCommand
from .evaluate import EvaluateCommand
from .inspect import InspectCommand
from .pack import PackCommand, UnpackCommand
from .plan import PlanCommand
from .prune import PruneCommand
from .recover import RecoverCommand


class SparseCommand(BaseOptimumCLICommand):
    """Shows the help of the commands below it."""

    COMMAND = CommandInfo(name="sparse", help="Prune models; recover, evaluate, inspect, pack and time pruned ones.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (
            PruneCommand,
            PlanCommand,
            RecoverCommand,
            EvaluateCommand,
            CompareCommand,
            InspectCommand,
            PackCommand,
            UnpackCommand,
            BenchCommand,
        )
    )
