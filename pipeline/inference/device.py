"""The device that computes, and its memory."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError

# parameters of glibc's mallopt, numbered in malloc.h
MALLOPT_TRIM_THRESHOLD = -1
MALLOPT_MMAP_MAX = -4
NEVER_TRIM = 2**31 - 1  # bytes, the largest threshold that mallopt takes


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, where the C library is glibc.

    A training step frees and requests the same gigabyte each time. By default glibc returns it to
    the system, and the pages have to be zeroed again for the next step.
    """
    try:
        libc: Any = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return
    libc.mallopt(MALLOPT_MMAP_MAX, 0)
    libc.mallopt(MALLOPT_TRIM_THRESHOLD, NEVER_TRIM)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is a GPU where there is one, else the CPU.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    if name.split(":")[0] not in available:
        raise ConfigError(f"device {name}: not on this machine; it has {', '.join(available)}")
    return torch.device(name)


def processor_name(device: torch.device) -> str:
    """Return the name of a device's processor, such as `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # Python's platform module gives only the architecture on Linux
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
