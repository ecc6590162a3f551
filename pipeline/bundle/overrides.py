"""`--set ID=VALUE`: changes of a foreign bundle's configuration, as MONAI's command takes them."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any

from pipeline.errors import ConfigError

ACTIVE = ("$", "@", "%")  # what MONAI's parser acts on
WORDS = {"true": True, "false": False, "null": None, "none": None}


class Removed(Enum):
    """The value of a key that is to be removed; it stays itself when it is pickled."""

    REMOVED = ""


REMOVED = Removed.REMOVED
# the case that is segmented, as the bundle's dataset would list it: further entries of every case
ITEM = ("dataset", "data", "0")


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Return id → value of overrides.

    An id leads to its place by `#` or `::`, such as `network_def#out_channels`. A value is a
    literal of Python, `true`, `false`, `null`, or text; without a value the key is removed.

    Args:
        texts: each `id=value`.

    Raises:
        ConfigError: a text has no `=`, or no id before it.

    >>> parse_overrides(["a#b=[1, 2]", "c=$@d", "e=true", "f=x y"])
    {'a::b': [1, 2], 'c': '$@d', 'e': True, 'f': 'x y'}
    """
    parsed = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = "::".join(part.strip() for part in key.replace("#", "::").split("::"))
        if not equals or not key:
            raise ConfigError(
                f"--set {text}: expected ID=VALUE, such as network_def#out_channels=3"
            )
        parsed[key] = _value(value) if value else REMOVED
    return parsed


def _value(text: str) -> Any:
    if text.startswith(ACTIVE):
        return text
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """Return overrides as one text, the same whatever their order."""
    return "; ".join(
        f"{key}={'' if value is REMOVED else repr(value)}"
        for key, value in sorted(overrides.items())
    )


def item_entries(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further entries of every case, which `dataset#data#0#KEY=VALUE` gives."""
    entries = {}
    for key, value in overrides.items():
        parts = tuple(key.split("::"))
        if parts[:3] == ITEM and len(parts) == 4:
            entries[parts[3]] = value
    return entries


def apply_overrides(config: dict[str, Any], overrides: Mapping[str, Any], where: str) -> None:
    """Change a configuration, in place.

    MONAI accepts an unknown id without a word; here it is an error.

    Args:
        config: as read, not evaluated.
        overrides: id → value, from `parse_overrides`.
        where: name of the configuration in messages.

    Raises:
        ConfigError: an id leads to nothing.
    """
    for key, value in overrides.items():
        parts = key.split("::")
        if tuple(parts[:3]) == ITEM:
            continue
        place: Any = config
        for number, part in enumerate(parts[:-1]):
            place = _inside(place, part, key, parts[:number], where)
        _set(place, parts, value, where)


def _inside(place: Any, part: str, key: str, before: Sequence[str], where: str) -> Any:
    if isinstance(place, dict) and part in place:
        return place[part]
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    raise _unknown(place, part, key, before, where)


def _set(place: Any, parts: Sequence[str], value: Any, where: str) -> None:
    last, key = parts[-1], "::".join(parts)
    is_part = isinstance(place, dict) and len(parts) > 1  # its target may take further arguments
    if isinstance(place, list):
        _inside(place, last, key, parts[:-1], where)
        if value is REMOVED:
            del place[int(last)]
        else:
            place[int(last)] = value
    elif isinstance(place, dict) and (last in place or (is_part and value is not REMOVED)):
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    else:
        raise _unknown(place, last, key, parts[:-1], where)


def _unknown(place: Any, part: str, key: str, before: Sequence[str], where: str) -> ConfigError:
    inside = f" in {'#'.join(before)}" if before else ""
    if isinstance(place, list):
        found = f"a list of {len(place)}"
    elif isinstance(place, dict):
        near = get_close_matches(part, [str(name) for name in place], n=3)
        found = f"did you mean {', '.join(near)}?" if near else f"one of {', '.join(place)}"
    else:
        found = f"{place!r}, which has no parts"
    return ConfigError(f"--set {key.replace('::', '#')}: {where} has no {part}{inside}; {found}")
