"""Warnings about a case, such as an implausible grid, in the `meta` of its MetaTensor.

They are stored as the lines of one string, because MONAI's collation cannot handle a tuple of
strings: it transposes a batch of tuples, raises an error where their lengths differ, and drops
empty ones. Other modules use the two functions here and do not depend on the storage.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

WARNINGS = "warnings"  # key of `meta`


def warnings_of(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the warnings in the `meta` of a MetaTensor, in the order in which they were added."""
    return tuple(str(meta.get(WARNINGS, "")).splitlines())


def add_warnings(meta: MutableMapping[str, Any], *warnings: str) -> None:
    """Add warnings to the `meta` of a MetaTensor, in place.

    The key is set even if there is no warning: MONAI's collation drops keys that not all cases of a
    batch have.

    Args:
        meta: `meta` of the MetaTensor.
        warnings: warnings, each a sentence without line breaks.
    """
    meta[WARNINGS] = "\n".join([*warnings_of(meta), *warnings])
