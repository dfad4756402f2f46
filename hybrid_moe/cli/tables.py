"""How subcommands lay facts out on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hybrid_moe.cli.terminal import console


def facts(title: str, rows: Mapping[str, str]) -> None:
    """Print a titled list of names and values."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))  # Text: brackets are no markup
    # a title of the table would be cut into lines: a path stays in one piece
    console().print(Text(title, "bold"), soft_wrap=True)
    console().print(table)


def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with a header; all columns but the first are right-aligned."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)
