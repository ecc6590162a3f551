"""Output folders and records without images, for tests of what lies around the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, FileState, write_record


def record_of(name: str, **changes: Any) -> CaseRecord:
    """Return the record of a case that was done."""
    values: dict[str, Any] = {
        "case": name,
        "status": "done",
        "image": (f"/data/{name}.nii.gz",),
        "seconds": {"read": 0.25, "network": 1.5},
        "peak_memory": 3 * 2**20,
        "volumes_mm3": {"front": 12.5, "back": 0.0},
        "inputs": (FileState(path=f"/data/{name}.nii.gz", size=7, mtime_ns=8, sha256="ab"),),
        "made_by": {"bundle": "tiny"},
        "computed": {"runtime": "openvino"},
        "versions": {"volseg": "1"},
        "host": "node1",
        "started": "2026-01-02T03:04:05.000+00:00",
        "ended": "2026-01-02T03:04:06.000+00:00",
    }
    return CaseRecord(**(values | changes))


def store(folder: Path, *records: CaseRecord) -> OutputFolder:
    """Write records into an output folder, which is made."""
    out = OutputFolder.create(folder)
    for record in records:
        write_record(out, record)
    return out
