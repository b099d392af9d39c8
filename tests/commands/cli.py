"""Run `optimum-cli sparse` in this process."""

from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand

from optimum_sparse.commands.sparse import SparseCommand


def sparse(*arguments: object) -> int:
    """Run `optimum-cli sparse` with these arguments, as Optimum does, and return its exit code."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(SparseCommand, root)
    try:
        namespace = root.parser.parse_args(["sparse", *map(str, arguments)])
        namespace.func(namespace).run()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0
