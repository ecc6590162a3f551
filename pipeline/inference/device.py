"""FIXME."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from pipeline.errors import ConfigError

MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> None:
    """Keeps freed memory in the process (glibc): a training step frees and asks for the same gigabyte each time."""
    try:
        libc: Any = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(MALLOPT_MMAP_MAX, 0)
    libc.mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)


def resolve_device(name: str) -> torch.device:
    """The device of a name: `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if has[device])
    if not has.get(name.split(":")[0], False):
        raise ConfigError(
            f"device {name}: not on this machine; it has {', '.join(d for d in has if has[d])}"
        )
    return torch.device(name)
