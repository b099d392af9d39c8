"""Tables as text, to the letter."""

from optimum_sparse.tables import text_table

TABLE = """\
block        zeros   error
──────────────────────────
layers.0   50.00 %
[bold]x      5.0 %     1 %
──────────────────────────
total      27.50 %     1 %"""


def test_table_with_a_total():
    rows = [("layers.0", "50.00 %", ""), ("[bold]x", "5.0 %", "1 %")]
    assert text_table(("block", "zeros", "error"), rows, ("total", "27.50 %", "1 %")) == TABLE


def test_left_columns_and_long_cells():
    wide = "x" * 500
    lines = text_table(("a", "b", "c"), [(wide, "1", "2"), ("y", "10", "20")], left=2).splitlines()
    assert lines[0].split() == ["a", "b", "c"] and len(lines) == 4
    assert lines[2] == f"{wide}   1     2" and lines[3] == f"y{' ' * 499}   10   20"


def test_no_rows():
    assert text_table(("a", "b"), []).splitlines()[0].split() == ["a", "b"]
