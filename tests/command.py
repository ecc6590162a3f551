"""The command `volseg` in processes of its own, with faults.

Importing torch and MONAI takes seconds, so a server imports them once and forks a process per
command. It differs from a command of a shell in nothing else: it is the leader of its group.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOADED = ["pipeline.cli", "pipeline.batch", "pipeline.bundle", "pipeline.io", "openvino"]
Fault = Callable[[], None]


@dataclass
class Running:
    """A command that runs, or has ended.

    Attributes:
        process: the command.
        log: file of its stderr.
    """

    process: Any
    log: Path

    @property
    def text(self) -> str:
        """What it has printed on stderr."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """Return the exit status; minus the number of the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} s: {self.text}")
        return int(self.process.exitcode)

    def signal(self, number: int) -> None:
        """Send a signal to the command and its workers, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill the command, which cannot notice; its workers end with it. It may have ended."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is so, while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.exitcode is not None:
                raise TimeoutError(f"it was never so: {self.text}")
            time.sleep(0.02)


@dataclass
class Volseg:
    """Starts commands.

    Attributes:
        folder: for what they print.
    """

    folder: Path
    started: list[Running] = field(default_factory=list)

    def start(self, *arguments: object, fault: Fault | None = None) -> Running:
        """Start a command.

        Args:
            arguments: of `volseg`.
            fault: called in the process before the command; pickled by name.
        """
        log = self.folder / f"stderr{len(self.started)}"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        words = [str(argument) for argument in arguments]
        process = context.Process(target=_run, args=(words, str(log), fault))
        process.start()
        running = Running(process, log)
        self.started.append(running)
        return running

    def __call__(self, *arguments: object, fault: Fault | None = None) -> tuple[int, str]:
        """Run a command to its end; return its exit status and what it printed on stderr."""
        running = self.start(*arguments, fault=fault)
        return running.wait(), running.text


@contextmanager
def commands(folder: Path) -> Iterator[Volseg]:
    """Yield a starter of commands, and kill those that still run at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    volseg = Volseg(folder)
    try:
        yield volseg
    finally:
        for running in volseg.started:
            if running.process.exitcode is None:
                running.signal(signal.SIGKILL)
                running.process.join()


def _run(arguments: list[str], log: str, fault: Fault | None) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["volseg", *arguments]
    from pipeline.cli import main

    if fault is not None:
        fault()
    main()
