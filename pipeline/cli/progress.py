"""What the command line shows on stderr while it works."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from pipeline.log import LOGGER

if TYPE_CHECKING:
    from pipeline.batch import CaseRecord
    from pipeline.training import EpochRow

PACE_SECONDS = 30.0  # between two lines about the pace, where there is no terminal
SECONDS_SHOWN, MINUTES_SHOWN = 90, 90  # times below are shown in seconds, in minutes


class Advance(Protocol):
    """Shows one line and counts one step."""

    def __call__(self, line: str, *, worked: bool = True, failed: bool = False) -> None:
        """Show a line.

        Args:
            line: what was done.
            worked: whether the step took time, or had been done before.
            failed: whether it failed.
        """


def case_line(record: CaseRecord) -> str:
    """Return one line about a case: what became of it, and why or with which warnings."""
    from pipeline.io import printable

    line = f"{record.status:8} {printable(record.case)}"
    if record.is_failure or record.status == "left out":
        return f"{line}: {record.error}"
    return line + (f" (warning: {'; '.join(record.warnings)})" if record.warnings else "")


def epoch_line(row: EpochRow, epochs: int) -> str:
    """Return one line about an epoch of training."""
    line = f"epoch {row.epoch} of {epochs}: loss {row.loss:.4f}, {row.seconds:.0f} s"
    if row.validation_seconds:
        line += f", validation {row.validation_seconds:.0f} s"
    for name, value in row.metrics.items():
        if name.startswith("dice"):
            line += f", {name} {value:.4f}"
    return line


def validation_line(number: int, count: int, name: str) -> None:
    """Show one line on stderr about a case of a validation; nothing with `--quiet`."""
    from pipeline.io import printable

    if LOGGER.isEnabledFor(logging.WARNING):
        click.echo(f"validated {printable(name)} ({number} of {count})", err=True)


class Pace:
    """How fast a run is, and how long it will take.

    Args:
        total: number of steps.
    """

    def __init__(self, total: int) -> None:
        self.total, self.seen, self.worked, self.failed = total, 0, 0, 0
        self._started = time.monotonic()

    def count(self, *, worked: bool, failed: bool) -> None:
        """Count a step.

        Args:
            worked: whether it took time; steps that were done before do not count for the pace.
            failed: whether it failed.
        """
        if not self.worked and not worked:
            self._started = time.monotonic()
        self.seen += 1
        self.worked += worked
        self.failed += failed

    def text(self) -> str:
        """Return seconds per step, the time that is left, and the failures so far."""
        parts = [f"{self.failed} failed"] if self.failed else []
        if self.worked:
            each = (time.monotonic() - self._started) / self.worked
            left = each * max(0, self.total - self.seen)
            parts = [f"{each:.1f} s each", f"{duration(left)} left", *parts]
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a time in the unit that fits: `40 s`, `12 min`, `3.5 h`."""
    if seconds < SECONDS_SHOWN:
        return f"{seconds:.0f} s"
    if seconds < MINUTES_SHOWN * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Advance]:
    """Show a bar on stderr where it is a terminal, else plain lines; nothing with `--quiet`.

    Args:
        title: text in front of the bar.
        total: number of steps.

    Yields:
        a function that shows one line and counts one step.
    """
    pace = Pace(total)
    if not LOGGER.isEnabledFor(logging.WARNING):  # --quiet
        yield lambda line, *, worked=True, failed=False: None
    elif not sys.stderr.isatty():
        yield _plain_lines(pace)
    else:
        with _bar(title, pace) as advance:
            yield advance


def _plain_lines(pace: Pace) -> Advance:
    """Return a function that prints each line, and the pace every half minute."""
    shown = time.monotonic()

    def advance(line: str, *, worked: bool = True, failed: bool = False) -> None:
        nonlocal shown
        pace.count(worked=worked, failed=failed)
        text = f"[{pace.seen}/{pace.total}] {line}"
        if time.monotonic() - shown > PACE_SECONDS and pace.seen < pace.total:
            shown = time.monotonic()
            text += f"\n({pace.text()})"
        click.echo(text, err=True)

    return advance


@contextmanager
def _bar(title: str, pace: Pace) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    # without a thread that refreshes the bar, because a process with threads cannot fork safely
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(title, total=pace.total, pace="")

        def advance(line: str, *, worked: bool = True, failed: bool = False) -> None:
            pace.count(worked=worked, failed=failed)
            bar.console.print(line, markup=False, highlight=False)
            bar.update(task, advance=1, pace=pace.text(), refresh=True)

        yield advance
