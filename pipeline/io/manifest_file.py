"""Lists of cases in a file: CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.io.formats import image_stem, printable
from pipeline.types import Case

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl")
CASE, IMAGE = "case", "image"
Row = tuple[int, dict[str, str]]  # the number of its line, and column → text


def read_manifest(path: Path, channels: Sequence[str]) -> list[Case]:
    """Return the cases that a file lists.

    Columns: `case` (the output's relative path without suffix; the name of the first image by
    default), then one column per channel of the model, named as the channel, or `image`, for a
    model of one channel or a 4D file of all channels. All other columns are kept in the tables of
    results. Paths are relative to the file's folder.

    Args:
        path: a table with a header line (.csv with commas, .tsv with tabs), or one JSON object per
            line (.jsonl), in UTF-8.
        channels: of the model.

    Raises:
        ConfigError: the file cannot be read, or lacks the columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{printable(path)}: cannot be read as UTF-8 text: {error}") from error
    rows = list(
        _json_rows(path, text) if path.suffix.lower() == ".jsonl" else read_rows(path, text)
    )
    if not rows:
        raise ConfigError(f"{printable(path)}: lists no case")
    return [_case(path, number, row, channels) for number, row in rows]


def read_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the rows of a table with a header line, with the numbers of their lines.

    Raises:
        ConfigError: the table is malformed.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ConfigError(
                    f"{printable(path)}, line {reader.line_num}: more fields than the header names"
                )
            yield reader.line_num, {name.strip(): (row[name] or "").strip() for name in row}
    except csv.Error as error:
        line = reader.reader.line_num  # the DictReader's own counts whole rows only
        raise ConfigError(f"{printable(path)}, line {line}: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{printable(path)}, line {number}: is not JSON: {error}") from error
        if not isinstance(row, Mapping):
            raise ConfigError(f"{printable(path)}, line {number}: expected an object, got {line!r}")
        values = {str(name): _text(value) for name, value in row.items()}
        try:
            os.fsencode("".join([*values, *values.values()]))
        except UnicodeEncodeError as error:  # JSON can name what is no character
            raise ConfigError(f"{printable(path)}, line {number}: is no text: {error}") from error
        yield number, values


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _case(path: Path, number: int, row: Mapping[str, str], channels: Sequence[str]) -> Case:
    columns = _image_columns(path, row, channels)
    images = [row[column] for column in columns]
    name = row.get(CASE, "") or image_stem(Path(next(filter(None, images), "")))
    if not name:
        raise ConfigError(f"{printable(path)}, line {number}: neither a case nor an image is named")
    paths = [str(path.parent / image) for image in images]
    case = Case(case=name, image=paths[0] if len(paths) == 1 else paths)
    extra = {key: text for key, text in row.items() if key not in (CASE, *columns)}
    if extra:
        case["columns"] = extra
    missing = [column for column, image in zip(columns, images, strict=True) if not image]
    if missing:
        case["problem"] = f"{printable(path)}, line {number}: no path for {', '.join(missing)}"
    return case


def _image_columns(path: Path, row: Mapping[str, str], channels: Sequence[str]) -> Sequence[str]:
    """Return the columns that hold the paths, one per channel, or one for a 4D file of them all."""
    if all(channel in row for channel in channels):
        return channels
    if IMAGE in row:
        return [IMAGE]
    expected = IMAGE if len(channels) == 1 else ", ".join(channels)
    raise ConfigError(
        f"{printable(path)}: found the columns {', '.join(row) or 'none'}, expected {expected}, "
        f"and {CASE} for the names of the outputs"
    )
