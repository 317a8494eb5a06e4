"""Tables on stdout: aligned on a terminal, and one plain line a row elsewhere, for other programs to read."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(
    rows: Sequence[Sequence[str]], headings: Sequence[str] = (), *, styles: Sequence[str],
    numbers: Sequence[str] = (), separator: str = "\t",
) -> None:  # fmt: skip
    """Print a table of text.

    On a terminal each row has its style of rich's, and the columns whose headings are in `numbers` stand to the right;
    elsewhere the `separator` stands between two cells.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        for row in [headings, *rows] if headings else rows:
            print(separator.join(row))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(headings))
    for heading in headings or [""] * len(rows[0]):
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*map(Text, row), style=style)
    console.print(table)


def format_seconds(seconds: float) -> str:
    """Return a length of time for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
