"""What is said about a case: its volumes, its row in a table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.io.writer import write_atomically


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A table, whole or not at all; the columns are those of the rows, in the order in which they come up."""
    rows = list(rows)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(
            text,
            fieldnames=list(dict.fromkeys(key for row in rows for key in row)),
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    """The hash of a file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
