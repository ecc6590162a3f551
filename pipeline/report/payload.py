"""Data of a page as a script file, because a page at a file:// address may load scripts only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
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


def read_payload(path: Path) -> Any:
    """Return the data in a script file that `write_payload` wrote.

    Raises:
        ConfigError: it cannot be read, or is another script.
    """
    try:
        text = path.read_text(encoding="ascii")
        if text.startswith(CALL) and text.endswith(END):
            return json.loads(text[len(CALL) : -len(END)])[1]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: is no data of a report ({error})") from error
    raise ConfigError(f"{path}: is no data of a report: expected {CALL}…)")
