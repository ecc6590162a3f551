"""Reading and writing CSV and JSON files, and the hash of a file."""

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
    """Write a table atomically.

    Args:
        path: the CSV file.
        rows: column → value. The columns are those of all rows, in the order in which they first
            occur; a value that a row does not have is left empty.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    rows = list(rows)
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    text = io.StringIO()
    if rows:
        # "\n" on every system, so that the same table is the same bytes
        writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, column → text; no rows where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConfigError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
