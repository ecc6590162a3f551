"""The environment of the Python processes that volseg starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
