"""What the command line shows on stderr while it works."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pipeline.io.formats import printable
from pipeline.log import LOGGER

if TYPE_CHECKING:
    from pipeline.batch import CaseRecord
    from pipeline.training import EpochRow

Advance = Callable[[str], None]


def case_line(record: CaseRecord) -> str:
    """Return one line about a case: what became of it, and why or with which warnings."""
    line = f"{record.status:8} {printable(record.case)}"
    if record.is_failure:
        return f"{line}: {record.error}"
    return line + (f" (warning: {'; '.join(record.warnings)})" if record.warnings else "")


def epoch_line(row: EpochRow, epochs: int) -> str:
    """Return one line about an epoch of training."""
    line = f"epoch {row.epoch} of {epochs}: loss {row.loss:.4f}, {row.seconds:.0f} s"
    for name, value in row.metrics.items():
        if name.startswith("dice"):
            line += f", {name} {value:.4f}"
    return line


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Advance]:
    """Show a bar on stderr where it is a terminal, else plain lines; nothing with `--quiet`.

    Args:
        title: in front of the bar.
        total: how many steps there are.

    Yields:
        a function that shows one line and counts one step.
    """
    if not LOGGER.isEnabledFor(logging.WARNING):  # --quiet
        yield lambda line: None
        return
    if not sys.stderr.isatty():
        count = iter(range(1, total + 1))
        yield lambda line: click.echo(f"[{next(count, total)}/{total}] {line}", err=True)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # without a thread that refreshes the bar, because a process with threads cannot fork safely
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(title, total=total)

        def advance(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.advance(task)
            bar.refresh()

        yield advance
