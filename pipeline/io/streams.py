"""Reading a file's bytes up to a limit, decompressed where its content is compressed.

Files are found with a wrong .gz suffix, and without one that they need, so the content decides.
Memory is taken as bytes arrive, never because a header declares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from isal.igzip import IGzipFile
from numpy.typing import NDArray

from pipeline.errors import ReadError
from pipeline.io.formats import printable
from pipeline.types import PathOrStr

GZIP_MAGIC = b"\x1f\x8b"
GZIP_WINDOW, ZLIB_WINDOW = 31, 15  # zlib's `wbits`
PIECE_BYTES = 2**20
MAX_RATIO = 1032  # deflate packs at most this many bytes into one


def read_start(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, decompressed; fewer where it is shorter.

    Raises:
        ReadError: the file is empty.
    """
    with open_bytes(path) as stream:
        content = b""
        while len(content) < count:
            piece = stream.read(count - len(content))
            if not piece:
                break
            content += piece
    if not content and not path.stat().st_size:
        raise ReadError(f"{printable(path)}: the file is empty")
    return content


def read_range(path: Path, start: int, count: int, *, end: int, slack: int) -> NDArray[np.uint8]:
    """Return a range of a file's bytes, decompressed.

    A compressed file is read to its end, so that a wrong checksum is found, but no further than
    `slack` bytes after `end`.

    Args:
        path: the file.
        start: first byte of the range.
        count: bytes of the range.
        end: length of the decompressed file by its header, bytes.
        slack: bytes that may follow them.

    Raises:
        ReadError: the file is shorter than `end`, or a compressed one is longer than `end + slack`.
        EOFError, OSError: it is truncated or damaged within.
    """
    with open_bytes(path) as stream:
        if not isinstance(stream, IGzipFile):
            stream.seek(start)
            content = np.empty(count, dtype=np.uint8)
            if _fill(stream, content) < count:
                raise too_short(path, end, path.stat().st_size)
            return content
        found = discard(stream, start)
        growing = bytearray()
        while len(growing) < count:
            piece = stream.read(min(PIECE_BYTES, count - len(growing)))
            if not piece:
                break
            growing += piece
        found += len(growing)
        found += discard(stream, end + slack + 1 - found)
    check_length(path, found, end, slack)
    return np.frombuffer(growing, dtype=np.uint8)


def check_room(path: Path, end: int, slack: int) -> None:
    """Check by a file's size alone that it can hold what its header declares.

    Args:
        path: the file, compressed or not.
        end: bytes that the header declares, from the beginning of the decompressed file.
        slack: bytes that may follow them.

    Raises:
        ReadError: the file is too short, or an uncompressed one too long.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    size = path.stat().st_size
    if not compressed:
        check_length(path, size, end, slack)
    elif size * MAX_RATIO < end:
        raise unreadable(
            path,
            f"it is truncated (its header declares {end} bytes, {size} compressed bytes hold at "
            f"most {size * MAX_RATIO})",
        )


def check_zlib(path: Path, offset: int, count: int) -> None:
    """Check that the zlib or gzip stream in a file holds a number of bytes, without keeping them.

    Args:
        path: the file.
        offset: of the stream.
        count: bytes that the header declares, decompressed.

    Raises:
        ReadError: it holds fewer or more.
        zlib.error: it is damaged.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        packed = file.read(PIECE_BYTES)
        window_bits = GZIP_WINDOW if packed.startswith(GZIP_MAGIC) else ZLIB_WINDOW
        inflater = isal_zlib.decompressobj(window_bits)
        found = 0
        while packed and not inflater.eof and found <= count:
            found += len(inflater.decompress(packed, PIECE_BYTES))
            packed = inflater.unconsumed_tail or file.read(PIECE_BYTES)
    if found <= count and not inflater.eof:
        raise unreadable(path, f"it is truncated (a compressed stream ends after {found} bytes)")
    check_length(path, found, count, 0)


def check_length(path: Path, found: int, end: int, slack: int) -> None:
    """Check the number of bytes in a file, decompressed, against those that its header declares.

    Raises:
        ReadError: they differ, by more than `slack` where there are more.
    """
    if found < end:
        raise too_short(path, end, found)
    if found > end + slack:
        raise unreadable(
            path,
            f"its header declares {end} bytes, the file holds {found} or more, so one of them is "
            "wrong",
        )


def too_short(path: Path, end: int, found: int) -> ReadError:
    """Return the error about a file that holds fewer bytes than its header declares."""
    return unreadable(
        path, f"it is truncated (its header declares {end} bytes, the file holds {found})"
    )


def unreadable(path: PathOrStr, reason: str) -> ReadError:
    """Return the error about a file that cannot be read, for a reason."""
    return ReadError(
        f"{printable(path)}: cannot be read: {reason}; is the file whole? Copy or convert it again"
    )


@contextmanager
def open_bytes(path: Path, offset: int = 0) -> Iterator[Any]:
    """Open a file for reading its bytes after `offset`, decompressed."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        compressed = file.read(2) == GZIP_MAGIC
        file.seek(offset)
        yield IGzipFile(fileobj=file, mode="rb") if compressed else file  # type: ignore[no-untyped-call]


def discard(stream: Any, count: int) -> int:
    """Read up to `count` bytes and keep none; return how many there were."""
    found = 0
    while found < count:
        piece = stream.read(min(PIECE_BYTES, count - found))
        if not piece:
            break
        found += len(piece)
    return found


def _fill(stream: Any, content: NDArray[np.uint8]) -> int:
    """Read bytes into an array until it is full or the file ends; return how many there were."""
    found, view = 0, memoryview(content.data)
    while found < len(content):
        count = stream.readinto(view[found:])
        if not count:
            break
        found += count
    return found
