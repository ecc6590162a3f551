"""Computing in a forked process after the parent has computed."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

HARD = 2  # omp_pause_hard of the OpenMP API: free everything, threads included


@cache
def keep_forks_computing() -> None:
    """Let processes that are forked from now on compute in torch on several threads.

    torch's kernels run on the threads of OpenMP, which a forked process does not inherit. That of
    GNU, which torch's packages for Linux contain, waits for them for ever in the first kernel of a
    child whose parent used them before. So this process ends the threads of the forking thread
    before each fork; its next kernel starts new ones, in less than a millisecond.
    """
    pause = _gnu_pause()
    if pause is not None and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: pause(HARD))


def _gnu_pause() -> ctypes._NamedFuncPointer | None:
    """Return the function of torch's own GNU OpenMP that ends its threads, None without it."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        if hasattr(library, "omp_pause_resource_all"):  # since GCC 9
            return library.omp_pause_resource_all
    return None
