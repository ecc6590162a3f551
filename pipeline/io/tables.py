"""Reading and writing CSV and JSON files, and the hash of a file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.io.writer import write_atomically


def write_csv(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    delimiter: str = ",",
    staging: Path | None = None,
) -> None:
    """Write a CSV file atomically (complete or not at all).

    Args:
        path: the CSV file; its folder is created if it does not exist.
        rows: one mapping per row, column → value; a cell is empty where the row lacks the column.
        columns: the columns in order; by default those of all rows, in the order in which they
            first occur, for which all rows are held in memory.
        delimiter: between the cells: a tab makes a TSV file.
        staging: folder of the temporary file; see `write_atomically`.

    Raises:
        WriteError: the folder cannot be created or written to.
    """
    if columns is None:
        rows = list(rows)
        columns = list({column: None for row in rows for column in row})
    text = io.StringIO()
    if columns:
        # "\n" on every system, so that the same table is the same bytes
        writer = csv.DictWriter(
            text, fieldnames=list(columns), delimiter=delimiter, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    # names of files may hold bytes that are no text
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"), staging=staging)


def read_csv(path: Path, *, delimiter: str = ",", quotes: bool = True) -> list[dict[str, str]]:
    """Return the rows of a CSV file, column → text; an empty list if the file does not exist.

    Args:
        path: of the file; spreadsheets may have put a byte order mark at its beginning.
        delimiter: between cells.
        quotes: whether a cell in double quotes may hold delimiters; without, quotes are text.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8-sig") as file:
        if quotes:
            return list(csv.DictReader(file, delimiter=delimiter))
        return list(csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConfigError: the file does not exist, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def write_json(path: Path, content: Any, *, staging: Path | None = None) -> None:
    """Write a JSON file atomically (complete or not at all).

    Args:
        path: the JSON file; its folder is created if it does not exist.
        content: dicts, lists, strings, numbers, booleans or None.

    Raises:
        WriteError: the folder cannot be created or written to.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"), staging=staging)


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
