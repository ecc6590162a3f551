"""The record of a case: the only truth about what became of it. Tables are derived from records."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

from pipeline.batch.outputs import OutputFolder
from pipeline.io import write_atomically

Status = Literal["done", "skipped", "failed", "quarantined", "left out"]
FORMAT = 1  # of a record, to be raised when its keys change their meaning


@dataclass(frozen=True, kw_only=True, slots=True)
class FileState:
    """A file as it was at one moment.

    Attributes:
        path: absolute for an input, relative to the output folder for an output.
        size: bytes.
        mtime_ns: time of the last modification, nanoseconds.
        sha256: hash of the content, hexadecimal.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRecord:
    """What became of one case.

    Attributes:
        case: its name.
        status: `done`; `failed`; `quarantined`: the process died twice while it computed the case,
            which is not tried again; `left out`: no volume, which is no failure; `skipped`: done by
            an earlier run (never stored).
        image: the files that were given.
        error: why it failed or was left out; empty otherwise.
        error_class: class of that error.
        reason: why the case was done again; empty the first time.
        warnings: what makes it doubtful.
        seconds: step → wall time.
        peak_memory: largest resident memory of the process while it computed the case, bytes.
        volumes_mm3: structure → mm³.
        predicted_dice: `mean` → `dice`, `low` and `high` of the mean over all structures, and
            `labels` → structure → the same; empty if the bundle predicts none.
        quality_features: from `QualityFeatures.columns`; empty unless they were requested.
        inputs: the files that were read.
        outputs: the files that were written.
        columns: further columns of the manifest.
        dicom_codes: hash of the codes that were given for labels in DICOM objects; empty for none.
        made_by: the identity of the results: model, settings and their hashes.
        computed: what computed the network; None where it did not run.
        versions: package → version.
        host: name of the machine.
        started, ended: ISO 8601, UTC.
    """

    case: str
    status: Status
    image: tuple[str, ...] = ()
    error: str = ""
    error_class: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    volumes_mm3: Mapping[str, float] = field(default_factory=dict)
    predicted_dice: Mapping[str, Any] = field(default_factory=dict)
    quality_features: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[FileState, ...] = ()
    outputs: tuple[FileState, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    dicom_codes: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    started: str = ""
    ended: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether the case has no result."""
        return self.status in ("failed", "quarantined")


# what the fields of a record are, where they are no text
_KINDS: Mapping[str, type | UnionType] = {
    **dict.fromkeys(("image", "warnings", "inputs", "outputs"), tuple),
    **dict.fromkeys(("seconds", "volumes_mm3", "columns", "made_by", "versions"), dict),
    **dict.fromkeys(("predicted_dice", "quality_features"), dict),
    "peak_memory": int,
    "computed": dict | None,
}


def write_record(out: OutputFolder, record: CaseRecord) -> None:
    """Write the record of a case, atomically.

    Raises:
        WriteError: it cannot be written.
    """
    content = {"format": FORMAT, **asdict(record)}
    write_atomically(
        out.record(record.case), json.dumps(content).encode("ascii"), staging=out.staging
    )


def read_record(path: Path) -> CaseRecord | None:
    """Return the record in a file; None where there is none, or one that is damaged."""
    try:
        content = json.loads(path.read_bytes())
        return _record(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def record_time(out: OutputFolder, case: str) -> int:
    """Return when the record of a case was written, nanoseconds; 0 where there is none."""
    try:
        return out.record(case).stat().st_mtime_ns
    except OSError:
        return 0


def _record(content: Mapping[str, Any]) -> CaseRecord:
    known = {item.name for item in fields(CaseRecord)}
    values = {key: value for key, value in content.items() if key in known}
    if content["format"] != FORMAT or values["status"] not in get_args(Status):
        raise ValueError("no record of a case")
    for name in ("image", "warnings"):
        values[name] = tuple(values.get(name, ()))
    for name in ("inputs", "outputs"):
        values[name] = tuple(FileState(**state) for state in values.get(name, ()))
    record = CaseRecord(**values)
    for item in fields(CaseRecord):
        if not isinstance(getattr(record, item.name), _KINDS.get(item.name, str)):
            raise TypeError(f"{item.name} is of another type")
    return record


def record_files(out: OutputFolder) -> Iterator[Path]:
    """Yield the files of all records."""
    if not out.records.is_dir():
        return
    for folder in sorted(out.records.iterdir()):
        yield from sorted(path for path in folder.iterdir() if path.suffix == ".json")


def state_of(path: Path, shown: str) -> FileState:
    """Return the present state of a file, its hash included.

    Args:
        path: the file.
        shown: the path to store.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileState(path=shown, size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=digest)


def states_of_inputs(files: Sequence[Path]) -> tuple[FileState, ...]:
    """Return the present state of the files of a case."""
    return tuple(state_of(path, str(path.absolute())) for path in files)
