"""Tables as text, for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None, left: int = 1
) -> str:
    """A table as text, as wide as its cells.

    Args:
        head: Names of the columns.
        rows: Cells.
        total: Cells of a last row that is set off from the others.
        left: So many columns are aligned to the left, the others to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, show_footer=total is not None)
    for index, name in enumerate(head):
        justify: Literal["left", "right"] = "left" if index < left else "right"
        footer = "" if total is None else total[index]
        # As Text, so that brackets in names are no markup.
        table.add_column(Text(name), Text(footer), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # Wide enough for everything: what is too wide for a terminal is still whole in a log.
    console = Console(width=10_000, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
