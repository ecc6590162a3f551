"""Faults of a command: each is called in its process before it begins, and changes what is called.

The package has no hooks for tests: functions are replaced.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.inference import predictor
from pipeline.io import writer


@dataclass(frozen=True)
class WhileReading:
    """Does something while the cases of some names are read.

    Attributes:
        names: of the files, without suffix; all if empty.
        action: `kill`, `segfault`, `hang`, `exit`, `remove` (the file), `sleep`.
        seconds: of `sleep`.
        once: path of a file; the fault happens only while it does not exist, and makes it.
    """

    names: tuple[str, ...]
    action: str
    seconds: float = 0.0
    once: str = ""

    def __call__(self) -> None:
        original = predictor.prepare

        def prepare(model: Any, image: Any) -> Any:
            name = Path(image).name.partition(".")[0]
            if (not self.names or name in self.names) and self._is_due():
                self._act(Path(image))
            return original(model, image)

        vars(predictor)["prepare"] = prepare

    def _is_due(self) -> bool:
        if not self.once:
            return True
        due = not Path(self.once).exists()
        Path(self.once).touch()
        return due

    def _act(self, path: Path) -> None:
        actions: dict[str, Callable[[], object]] = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "hang": lambda: time.sleep(300),
            "exit": lambda: _exit(),
            "remove": path.unlink,
            "sleep": lambda: time.sleep(self.seconds),
        }
        actions[self.action]()


def _exit() -> None:
    raise SystemExit(3)


@dataclass(frozen=True)
class WhileWriting:
    """Fails when files are renamed to their final names.

    Attributes:
        part: of the final path of these files.
        times: how often each file fails.
        number: of the error.
    """

    part: str
    times: int = 1
    number: int = errno.EIO

    def __call__(self) -> None:
        original, counts = os.replace, dict[str, int]()

        def replace(source: Any, target: Any) -> None:
            name = str(target)
            counts[name] = counts.get(name, 0) + 1
            if self.part in name and counts[name] <= self.times:
                raise OSError(self.number, os.strerror(self.number))
            original(source, target)

        vars(os)["replace"] = replace
        vars(writer)["RETRY_SECONDS"] = (0.01, 0.01, 0.01)


@dataclass(frozen=True)
class Together:
    """Several faults."""

    faults: tuple[Callable[[], None], ...]

    def __call__(self) -> None:
        for fault in self.faults:
            fault()
