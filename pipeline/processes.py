"""The environment of the Python processes that volseg starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SAFE_PATH = "PYTHONSAFEPATH"  # variable of Python's that keeps the working folder off sys.path


@contextmanager
def without_working_folder() -> Iterator[None]:
    """Have Python processes that start meanwhile import nothing from their working folder.

    It would be the first place that they look in, and may be the folder of a foreign bundle.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SAFE_PATH, None)
        else:
            os.environ[SAFE_PATH] = before
