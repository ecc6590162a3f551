"""The memory of this process, as the kernel counts it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

KIB = 1024
# ru_maxrss is in bytes on macOS, in KiB elsewhere
MAXRSS_UNIT = 1 if sys.platform == "darwin" else KIB
# parameters of glibc's mallopt, numbered in malloc.h
MALLOPT_TRIM_THRESHOLD = -1
MALLOPT_MMAP_MAX = -4
NEVER_TRIM = 2**31 - 1  # bytes, the largest threshold that mallopt takes


def resident_bytes() -> int:
    """Return the resident memory of this process, bytes; the peak where only that is known."""
    return _proc_status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak`, bytes.

    On systems other than Linux it is the largest since the process started, and 0 on Windows.
    """
    peak = _proc_status("VmHWM")
    if peak:
        return peak
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def reset_peak() -> None:
    """Let `peak_bytes` count from now on; this does nothing on systems other than Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def release_freed_memory() -> None:
    """Return freed memory to the system; do nothing without glibc.

    Its `malloc` keeps what many small arrays have left behind, such as a traced network's.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Configure `malloc` to keep freed memory in the process; do nothing without glibc.

    Each training step frees and allocates the same gigabyte. By default glibc returns it to the
    system, which then has to zero the pages again for the next step.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(MALLOPT_MMAP_MAX, 0)
        libc.mallopt(MALLOPT_TRIM_THRESHOLD, NEVER_TRIM)


def _glibc() -> Any:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return None


def _proc_status(key: str) -> int:
    """Return a size from /proc/self/status, bytes; 0 if there is no such file or entry."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(key):
            return int(line.split()[1]) * KIB
    return 0
