"""What an output folder holds, read from the records of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.batch.identity import read_labels
from pipeline.batch.outputs import RUN, STATE, OutputFolder
from pipeline.batch.records import CaseRecord, FileState, read_record, record_files, state_of
from pipeline.batch.tables import run_facts
from pipeline.errors import ConfigError
from pipeline.io import printable, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResults:
    """The results in an output folder.

    Attributes:
        folder: the output folder.
        records: one per case, sorted by the name of the case.
        labels: name → value in the label maps, as in the spec; empty where it is not known, as in
            folders that an earlier version made.
        run: what produced the results, as in `run.json`.
        is_complete: whether no run is under way, and the last one was not killed.
    """

    folder: Path
    records: Sequence[CaseRecord]
    labels: Mapping[str, int]
    run: Mapping[str, Any]
    is_complete: bool = True


def read_results(folder: Path) -> BatchResults:
    """Return what an output folder holds, from its records and not from its tables.

    Raises:
        ConfigError: it is no output folder, or it holds no record of a case.
    """
    if not (folder / STATE).is_dir():
        raise ConfigError(f"{folder}: no output folder of volseg: {STATE} is not there")
    out = OutputFolder(folder)
    found = [read_record(path) for path in record_files(out)]
    records = [record for record in found if record is not None]
    if not records:
        raise ConfigError(f"{folder}: holds no record of a case; segment something into it first")
    records.sort(key=lambda record: printable(record.case))
    return BatchResults(
        folder=folder,
        records=records,
        labels=read_labels(out),
        run=run_facts(records, _last_command(folder)),
        is_complete=is_complete(folder),
    )


def read_case(folder: Path, case: str) -> CaseRecord | None:
    """Return the record of one case in an output folder; None where there is none."""
    return read_record(OutputFolder(folder).record(case))


def is_complete(folder: Path) -> bool:
    """Return whether no run is under way in an output folder, and the last one was not killed."""
    return not any(OutputFolder(folder).runs.glob("*.json"))


def count_records(folder: Path) -> int:
    """Return the number of records in an output folder; 0 where it is none."""
    return sum(1 for _ in record_files(OutputFolder(folder)))


def file_problem(folder: Path, state: FileState) -> str:
    """Return how a file differs from the state that a record gives; empty where it does not.

    Args:
        folder: the output folder, which paths of outputs are relative to.
        state: of an input or an output.
    """
    path = folder / state.path  # an absolute path of an input stays as it is
    try:
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (state.size, state.mtime_ns):
            return ""
        if status.st_size == state.size and state_of(path, state.path).sha256 == state.sha256:
            return ""  # copied or touched: the same bytes with another time
    except OSError as error:
        return f"{printable(path)} is gone or cannot be read ({error.strerror})"
    return f"{printable(path)} was changed after the case was segmented"


def _last_command(folder: Path) -> list[str]:
    with suppress(ConfigError, AttributeError, TypeError):
        return [str(word) for word in read_json(folder / RUN).get("command", [])]
    return []
