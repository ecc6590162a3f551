"""An exclusive lock on a file, which the system releases when its process dies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, which is made if it does not exist.

    On a file system without locks nothing is locked.

    Raises:
        OSError: the file cannot be made.
    """
    with open(path, "ab") as file:
        with suppress(OSError):
            _lock(file.fileno())
        yield  # closing the file releases the lock


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # tries for ten seconds
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
