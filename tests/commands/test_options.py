"""The options of every command, frozen: scripts of users depend on their names, values and defaults."""

import argparse
from pathlib import Path

from optimum_sparse.commands.sparse import SparseCommand

FROZEN = Path(__file__).with_name("options.txt")


def options() -> str:
    """One line for each option of each command: names, number of values, choices and default."""
    lines = []
    for info in SparseCommand.SUBCOMMANDS:
        parser = argparse.ArgumentParser()
        info.subcommand_class.parse_args(parser)
        for action in parser._actions:
            if action.dest != "help":
                default = "" if action.default == argparse.SUPPRESS else f" default={action.default}"
                choices = "" if action.choices is None else f" choices={','.join(action.choices)}"
                names = " ".join(action.option_strings) or action.metavar
                values = "" if action.nargs is None else f" nargs={action.nargs}"
                lines.append(f"{info.name}: {names}{values}{choices}{default}")
    return "\n".join(lines) + "\n"


def test_options_are_those_that_users_know():
    """If the change is wanted: python -c 'from tests.commands.test_options import *; FROZEN.write_text(options())'."""
    assert options() == FROZEN.read_text()
