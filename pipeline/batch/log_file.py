"""`volseg.log` in an output folder: what happened to each case, and when."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pipeline.io import printable


def append_log(path: Path, text: str) -> None:
    """Append a line with time, machine and process; a log that cannot be written is no error.

    Lines of several processes do not mix: each is appended by one call of the system.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    line = f"{time} {socket.gethostname()} {os.getpid()} {printable(text)}\n"
    with suppress(OSError):
        descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
