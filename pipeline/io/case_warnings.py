"""The warnings about a case, in the `meta` of its MetaTensor.

The warnings are stored as the lines of one string, because MONAI's collation cannot carry a tuple
of strings: it transposes a batch of tuples, refuses a batch in which their lengths differ, and
loses an empty one. No other module needs to know how they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

WARNINGS = "warnings"  # key of `meta`


def warnings_of(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the warnings in a `meta`, in the order in which they were added."""
    return tuple(str(meta.get(WARNINGS, "")).splitlines())


def add_warnings(meta: MutableMapping[str, Any], *warnings: str) -> None:
    """Add warnings to a `meta`, which holds the key afterwards even if there are none.

    Args:
        meta: changed in place.
        warnings: one sentence each, on a single line.
    """
    meta[WARNINGS] = "\n".join([*warnings_of(meta), *warnings])
