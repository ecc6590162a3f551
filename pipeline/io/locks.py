"""Exclusive locks on files, which the system releases when their process dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, which is made if it does not exist.

    On a file system without locks nothing is locked.

    Raises:
        OSError: the file cannot be made.
    """
    with open(path, "ab") as file:
        with suppress(OSError):
            _lock(file.fileno(), wait=True)
        yield  # closing the file releases the lock


@contextmanager
def locked_once(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file without waiting for it; the file exists only meanwhile.

    On a file system without locks nothing is locked.

    Raises:
        BlockingIOError: another process, or another part of this one, holds the lock.
        OSError: the file cannot be made.
    """
    while True:
        with open(path, "ab") as file:
            try:
                _lock(file.fileno(), wait=False)
            except BlockingIOError:
                raise
            except OSError:
                pass
            if not _is_file_of(path, file):
                continue  # its last holder has removed it in the meantime
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _is_file_of(path: Path, file: BinaryIO) -> bool:
    """Return whether an open file is still the one at the path."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> None:
        if wait:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # tries for ten seconds
            return
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
