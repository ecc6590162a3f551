"""The tables and `run.json` of an output folder, derived from the records of its cases."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.batch.case_worker import STEPS
from pipeline.batch.identity import read_labels
from pipeline.batch.outputs import CASES, QUALITY, RUN, STATE, VOLUMES, OutputFolder
from pipeline.batch.records import CaseRecord, read_record, record_files
from pipeline.errors import ConfigError, WriteError
from pipeline.io import locked, printable, read_json, write_csv, write_json, write_label_files

WARNING_SEPARATOR = "; "
INPUT_SEPARATOR = ";"  # between the files of a case with several channels
MIB = 2**20
COLUMNS = (
    "case",
    "status",
    "input",
    "message",
    "warnings",
    *(f"{step}_s" for step in STEPS),
    "peak_memory_mb",
    "reason",
)
# further columns of a case with a predicted Dice
PREDICTED = ("predicted_dice", "predicted_dice_low", "predicted_dice_high")


def case_columns(record: CaseRecord) -> dict[str, str]:
    """Return the columns of `cases.csv` for one case, in order.

    Further columns of a manifest follow; one with the name of ours gets `manifest_` in front.
    """
    peak = f"{record.peak_memory / MIB:.0f}" if record.peak_memory else ""
    row = {
        "case": printable(record.case),
        "status": record.status,
        "input": INPUT_SEPARATOR.join(map(printable, record.image)),
        "message": record.error,
        "warnings": WARNING_SEPARATOR.join(record.warnings),
        **{f"{step}_s": _seconds(record, step) for step in STEPS},
        "peak_memory_mb": peak,
        "reason": record.reason,
    }
    if record.predicted_dice:
        row |= _interval_columns("predicted_dice", record.predicted_dice["mean"])
    for name, text in record.columns.items():
        row[f"manifest_{name}" if name in (*COLUMNS, *PREDICTED) else name] = text
    return row


def _seconds(record: CaseRecord, step: str) -> str:
    return f"{record.seconds[step]:.3f}" if step in record.seconds else ""


def _interval_columns(name: str, interval: Mapping[str, float]) -> dict[str, str]:
    """Return the columns of a predicted Dice and of the ends of its interval."""
    ends = {name: "dice", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: f"{interval[end]:.3f}" for column, end in ends.items()}


def quality_columns(record: CaseRecord) -> dict[str, Any]:
    """Return the columns of `quality.csv` for one case that has a predicted Dice.

    They are `<structure>`, `<structure>_low` and `<structure>_high`; a structure without voxels has
    none.
    """
    row: dict[str, Any] = {"case": printable(record.case)}
    for name, interval in record.predicted_dice["labels"].items():
        row |= _interval_columns(name, interval)
    return row | further_columns(record, row)


def volume_columns(record: CaseRecord) -> dict[str, Any]:
    """Return the columns of `volumes.csv` for one case that was done."""
    row = {"case": printable(record.case), **record.volumes_mm3}
    return row | further_columns(record, row)


def further_columns(record: CaseRecord, row: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of the manifest; one with a name of `row` gets `manifest_` in front."""
    return {
        f"manifest_{name}" if name in row else name: text for name, text in record.columns.items()
    }


@dataclass
class _Run:
    """What `run.json` says, gathered from the records."""

    counts: dict[str, int] = field(default_factory=dict)
    computed: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    hosts: set[str] = field(default_factory=set)
    made_by: Mapping[str, str] = field(default_factory=dict)
    started: str = ""
    ended: str = ""

    def add(self, record: CaseRecord) -> None:
        self.counts[record.status] = self.counts.get(record.status, 0) + 1
        self.made_by = record.made_by or self.made_by
        if record.computed is not None and record.status == "done":
            content = dict(record.computed)
            self.computed[json.dumps(content, sort_keys=True)] = content
        versions = dict(record.versions)
        self.versions[json.dumps(versions, sort_keys=True)] = versions
        self.hosts.add(record.host)
        self.started = min(filter(None, (self.started, record.started)), default="")
        self.ended = max(self.ended, record.ended)

    def content(self, command: list[str]) -> dict[str, Any]:
        return {
            **self.made_by,
            "computed": list(self.computed.values()),
            "command": [printable(word) for word in command],
            "versions": list(self.versions.values()),
            "cases": dict(sorted(self.counts.items())),
            "hosts": sorted(self.hosts),
            "started": self.started,
            "ended": self.ended,
        }


def run_facts(records: Iterable[CaseRecord], command: Sequence[str]) -> dict[str, Any]:
    """Return the content of `run.json`: what produced the results of these cases.

    Args:
        records: of all cases.
        command: the words of the command that ran last.
    """
    run = _Run()
    for record in records:
        run.add(record)
    return run.content(list(command))


def write_tables(folder: Path) -> dict[str, int]:
    """Write cases.csv, volumes.csv and run.json of an output folder from its records.

    quality.csv is written as well if any case has a predicted Dice.

    The names and colours of the labels are written as well, where they are known.

    Rows are sorted by case. Of several processes that do so at the same time, each waits for the
    one before it, so that the tables of the last one hold all records.

    Args:
        folder: an output folder.

    Returns:
        the number of cases by status.

    Raises:
        ConfigError: the folder holds no records.
        WriteError: a table cannot be written.
    """
    out = OutputFolder(folder)
    if not (folder / STATE).is_dir():
        raise ConfigError(f"{folder}: no output folder of volseg: {STATE} is not there")
    try:
        with locked(out.tables_lock):
            return _derive_tables(out)
    except OSError as error:
        raise WriteError(f"{folder}: the tables cannot be derived: {error.strerror}") from error


def _derive_tables(out: OutputFolder) -> dict[str, int]:
    run, cases, volumes, quality = _Run(), TableRows(), TableRows(), TableRows()
    for path in record_files(out):
        record = read_record(path)
        if record is None:
            continue
        run.add(record)
        cases.add(case_columns(record))
        if record.status == "done":
            volumes.add(volume_columns(record))
        if record.predicted_dice:
            quality.add(quality_columns(record))
    cases.write(out.root / CASES, out.staging)
    volumes.write(out.root / VOLUMES, out.staging)
    if len(quality):
        quality.write(out.root / QUALITY, out.staging)
    write_json(out.root / RUN, run.content(_command(out.root)), staging=out.staging)
    labels = read_labels(out)
    if labels:
        write_label_files(out.root, labels, staging=out.staging)
    return run.counts


class TableRows:
    """The rows of a table, held as short as possible: there may be a million."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._rows: list[tuple[tuple[str, ...], tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Mapping[str, Any]) -> None:
        columns = tuple(row)
        columns = self._columns.setdefault(columns, columns)  # one tuple for all rows alike
        self._rows.append((columns, tuple(row.values())))

    def write(self, path: Path, staging: Path, *, delimiter: str = ",") -> None:
        """Write the table, sorted by case, which is the first column."""
        self._rows.sort(key=lambda row: row[1][0])
        names = list({name: None for columns in self._columns for name in columns})
        rows = (dict(zip(columns, values, strict=True)) for columns, values in self._rows)
        write_csv(path, rows, columns=names, delimiter=delimiter, staging=staging)


def _command(folder: Path) -> list[str]:
    """Return the command of the last run; `volseg tables` keeps the one that was written."""
    if len(sys.argv) > 1 and sys.argv[1] == "tables":
        try:
            return list(read_json(folder / RUN).get("command", []))
        except (ConfigError, AttributeError):
            return []
    return sys.argv
