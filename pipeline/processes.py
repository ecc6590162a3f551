"""Python processes: the environment of those that volseg starts, and how modules are imported."""

from __future__ import annotations

import gc
import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SLOW_MODULE = "torch"  # after it, and what comes with it, few modules are left to import
UNKNOWN_USER = "unknown"
SAFE_PATH = "PYTHONSAFEPATH"  # variable of Python's that keeps the working folder off sys.path


@contextmanager
def without_working_folder() -> Iterator[None]:
    """Have Python processes that start meanwhile import nothing from their working folder.

    It would be the first place that they look in, and may be the folder of a foreign bundle. At the
    end all variables of the environment are as they were: Dask, for one, sets some for good.
    """
    before = dict(os.environ)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def ensure_user_name() -> None:
    """Set the variable USER where the user has no name, because MONAI cannot be imported then.

    Containers and clusters run programs under numbers that no table of users lists.
    """
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):  # Windows, Python before and after 3.13
        os.environ["USER"] = UNKNOWN_USER


@contextmanager
def importing() -> Iterator[None]:
    """Import modules without the garbage collector, which takes a fifth of the time.

    PyTorch and MONAI make a million objects that stay, and the collector looks at all of them again
    and again. At the end they are excluded from all later collections.
    """
    if SLOW_MODULE in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
