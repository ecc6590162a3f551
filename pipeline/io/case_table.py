"""Labelled cases in a table: a CSV or TSV file with one row per case."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.io.formats import image_stem, printable
from pipeline.io.layout import LABEL_ENDING, Layout, Problem, ProblemKind, make_case
from pipeline.io.manifest_file import read_rows
from pipeline.types import Case

TABLE_SUFFIXES = (".csv", ".tsv")
CASE, LABEL, FOLD, SUBJECT = "case", "label", "fold", "subject"
OWN_COLUMNS = (CASE, LABEL, FOLD, SUBJECT)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One row of a table; texts are empty where the table has no such cell."""

    place: str
    name: str
    images: tuple[str, ...]
    label: str
    fold: str
    subject: str


def table_layout(path: Path) -> Layout:
    """Return the cases that a table lists.

    Columns are `label`, one column per channel with the path of its image (a single one may name a
    4D file), and, if wanted, `case` (its name; by default that of the label map), `fold` (the fold
    that holds the case out) and `subject` (whose cases are in the same fold). Paths are relative to
    the table's folder.

    Args:
        path: table in UTF-8 with a header line: .csv with commas, .tsv with tabs.

    Raises:
        ConfigError: the table cannot be read, lacks a column, or gives folds to some cases only.
    """
    channels, rows = _read(path)
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    for row in rows:
        found = _case_or_problem(path.parent, row, channels, cases)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            cases[row.name] = found
    used = [row for row in rows if row.name in cases]
    return Layout(
        kind="a table of cases",
        cases=list(cases.values()),
        channels=channels,
        problems=problems,
        folds=_folds(path, used),
        subjects={row.name: row.subject for row in used if row.subject},
    )


def _read(path: Path) -> tuple[tuple[str, ...], list[_Row]]:
    """Return the names of the channels, and the rows of a table.

    Raises:
        ConfigError: it cannot be read, has no row, or lacks a column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{printable(path)}: cannot be read as UTF-8 text: {error}") from error
    lines = list(read_rows(path, text))
    if not lines:
        raise ConfigError(f"{printable(path)}: lists no case")
    columns = lines[0][1]
    channels = tuple(column for column in columns if column not in OWN_COLUMNS)
    if LABEL not in columns or not channels:
        raise ConfigError(
            f"{printable(path)}: found the columns {', '.join(columns)}; expected {LABEL}, and "
            f"one column per channel such as T1w; {CASE}, {FOLD} and {SUBJECT} are optional"
        )
    rows = []
    for number, cells in lines:
        rows.append(
            _Row(
                place=f"{printable(path)}, line {number}",
                name=cells.get(CASE) or LABEL_ENDING.sub("", image_stem(Path(cells[LABEL]))),
                images=tuple(cells[channel] for channel in channels),
                label=cells[LABEL],
                fold=cells.get(FOLD, ""),
                subject=cells.get(SUBJECT, ""),
            )
        )
    return channels, rows


def _case_or_problem(
    folder: Path, row: _Row, channels: Sequence[str], earlier: Collection[str]
) -> Case | Problem:
    """Return the case in a row, or why it cannot be used."""
    named = dict(zip((*channels, LABEL), (*row.images, row.label), strict=True))
    empty = [column for column, text in named.items() if not text]
    if empty:
        kind: ProblemKind = "no_label" if LABEL in empty else "no_image"
        return _problem(row, f"no path for {', '.join(empty)}", kind)
    if row.name in earlier:
        return _problem(row, f"a second case named {row.name}", "duplicate")
    paths = [folder / text for text in named.values()]
    missing = [printable(file) for file in paths if not file.is_file()]
    if missing:
        return _problem(row, f"listed, and missing: {', '.join(missing)}", "missing_file")
    return make_case(row.name, paths[:-1], paths[-1])


def _problem(row: _Row, text: str, kind: ProblemKind) -> Problem:
    return Problem(case=row.name, message=f"{row.place}: {text}", kind=kind)


def _folds(path: Path, rows: Sequence[_Row]) -> dict[str, str]:
    """Return case → fold; empty if the table has no folds.

    Raises:
        ConfigError: only some cases have a fold.
    """
    without = [row.name for row in rows if not row.fold]
    if len(without) == len(rows):
        return {}
    if without:
        raise ConfigError(
            f"{printable(path)}: {without[0]} has no {FOLD}; give all cases one, or none"
        )
    return {row.name: row.fold for row in rows}
