"""Registers `optimum-cli sparse`: installed as `optimum/commands/register/`, where Optimum looks for commands."""

from optimum_sparse.commands.sparse import SparseCommand

REGISTER_COMMANDS = [SparseCommand]
