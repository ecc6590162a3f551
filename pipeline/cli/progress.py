"""What the command shows on stderr while it works, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from pipeline.errors import PipelineError

DONE, SOME_FAILED, WRONG = 0, 1, 2  # exit statuses
Advance = Callable[[str], None]


class UsageError(click.ClickException):
    """A PipelineError as the command line shows it: one line on stderr, exit status 2."""

    exit_code = WRONG


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns errors that the user can mend into messages without a traceback."""
    try:
        yield
    except PipelineError as error:
        raise UsageError(str(error)) from error


def case_line(row: dict[str, Any]) -> str:
    """One case, as progress says it."""
    if row["status"] == "failed":
        return f"failed   {row['case']}: {row['message']}"
    return f"{row['status']:8} {row['case']}" + (
        f" (warning: {row['warnings']})" if row["warnings"] else ""
    )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch of training, as progress says it."""
    said = f"epoch {row['epoch']} of {epochs}: loss {row['loss']:.4f}, {row['seconds']:.0f} s"
    return said + "".join(
        f", {name} {value:.4f}" for name, value in row.items() if name.startswith("dice")
    )


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Advance]:
    """A bar on stderr where it is a terminal, plain lines elsewhere; calling it says one line and counts one."""
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)

        def advance(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.advance(task)

        yield advance


def quiet() -> None:
    """Keeps the log and the notes of MONAI, Ignite and torch off the screen; errors are told once, by us."""
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"monai\.|ignite\.|torch\.")
