"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown.

    Args:
        header: names of the columns.
        lines: cells of each line; `|` and line breaks in them are made harmless.
    """
    rows = [_row(header), "|---" * len(header) + "|", *(_row(line) for line in lines)]
    return "\n".join(rows)


def _row(cells: Sequence[object]) -> str:
    shown = [" ".join(str(cell).split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(shown)} |"
