"""The device that computes, and its instructions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pipeline.errors import ConfigError

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment variables
AMX_ISAS = ("AMX", "DEFAULT", "ALL")  # words in their values that allow AMX


def resolve_device(name: str) -> torch.device:
    """Return the torch device for a name; `auto` is a GPU if there is one, else the CPU.

    Args:
        name: `auto`, `cpu`, `mps`, `cuda` or `cuda:<number>`.

    Raises:
        ConfigError: this machine has no such device.
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


def has_amx() -> bool:
    """Return whether the CPU has Intel's matrix extensions (AMX) and torch knows of them.

    A limit of the user on the instructions counts. AMX multiplies matrices of bfloat16 several
    times as fast as other instructions multiply float32.
    """
    limit = isa_limit()
    if limit and not any(word in limit for word in AMX_ISAS):
        return False
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)  # older releases lack it
    return bool(check and check())


def isa_limit() -> str:
    """Return the newest instructions that the user lets oneDNN use, `AVX2` for example.

    oneDNN computes the convolutions of torch and of OpenVINO. Without a limit the result is empty.
    """
    return next((os.environ[name] for name in ISA_LIMITS if os.environ.get(name)), "").upper()


def processor_name(device: torch.device) -> str:
    """Return the product name of a device, such as `NVIDIA H100 80GB HBM3`."""
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
