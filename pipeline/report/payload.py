"""Data of a page as a script file, because a page at a file:// address may load scripts only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.io import write_atomically

CALL = "volseg.receive("
END = ");\n"
# characters that could end a script or a comment around it, if a payload is ever put into a page
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def payload(name: str, content: Any) -> bytes:
    """Return a script, in ASCII, that hands data to the page.

    Args:
        name: of the data, by which the page knows it.
        content: dicts, lists, strings, finite numbers, booleans or None.

    Raises:
        ValueError: a number is infinite or nan, which JSON lacks.
    """
    text = json.dumps([name, content], allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPED.items():
        text = text.replace(character, escape)
    return f"{CALL}{text}{END}".encode("ascii")


def write_payload(path: Path, name: str, content: Any) -> None:
    """Write data as a script file, atomically; see `payload`.

    Raises:
        WriteError: it cannot be written.
    """
    write_atomically(path, payload(name, content))
