"""Tables for people: ruled on a terminal, aligned plain text elsewhere."""

import sys
from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows` under `header`; an empty header is left out."""
    if sys.stdout.isatty():
        from rich import box, console, table

        shown = table.Table(box=box.SIMPLE, show_header=any(header), header_style="bold")
        for name in header:
            shown.add_column(name)
        for row in rows:
            shown.add_row(*row)
        console.Console().print(shown)
        return
    lines = [tuple(header), *rows] if any(header) else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
