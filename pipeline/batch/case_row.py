"""One row of `cases.csv`: what became of one case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.types import Case

Status = Literal["done", "skipped", "failed"]
STEPS = ("read", "preprocess", "network", "invert", "write")
WARNING_SEPARATOR = "; "
INPUT_SEPARATOR = ";"  # between the files of a case with several channels
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRow:
    """What became of one case.

    Attributes:
        case: its name.
        status: `done`, `skipped` (done by an earlier run), or `failed`.
        input: its file, or its files.
        message: why it failed; empty otherwise.
        warnings: what makes it doubtful.
        seconds: wall time of each step that was done.
        peak_memory_mb: the process's largest resident memory while it was computed, MiB.
    """

    case: str
    status: Status
    input: str
    message: str = ""
    warnings: str = ""
    seconds: Mapping[str, str] = field(default_factory=dict)
    peak_memory_mb: str = ""

    @classmethod
    def failed(cls, case: Case, message: str, peak_bytes: int) -> CaseRow:
        """Return the row of a case that failed."""
        return cls(
            case=case["case"],
            status="failed",
            input=input_text(case),
            message=message,
            peak_memory_mb=f"{peak_bytes / MIB:.0f}",
        )

    @classmethod
    def done(
        cls, case: Case, warnings: tuple[str, ...], seconds: Mapping[str, float], peak_bytes: int
    ) -> CaseRow:
        """Return the row of a case whose output was written."""
        return cls(
            case=case["case"],
            status="done",
            input=input_text(case),
            warnings=WARNING_SEPARATOR.join(warnings),
            seconds={step: f"{seconds[step]:.3f}" for step in STEPS if step in seconds},
            peak_memory_mb=f"{peak_bytes / MIB:.0f}",
        )

    @classmethod
    def from_table(cls, row: Mapping[str, str]) -> CaseRow:
        """Return a row that was read from `cases.csv`; an unknown status counts as failed."""
        status = row.get("status", "")
        return cls(
            case=row["case"],
            status=status if status in get_args(Status) else "failed",  # type: ignore[arg-type]
            input=row.get("input", ""),
            message=row.get("message", ""),
            warnings=row.get("warnings", ""),
            seconds={step: row[f"{step}_s"] for step in STEPS if row.get(f"{step}_s")},
            peak_memory_mb=row.get("peak_memory_mb", ""),
        )

    def as_skipped(self) -> CaseRow:
        """Return the row of a case that an earlier run has done."""
        return replace(self, status="skipped")

    def to_table(self) -> dict[str, Any]:
        """Return the columns of `cases.csv`, in order."""
        return {
            "case": self.case,
            "status": self.status,
            "input": self.input,
            "message": self.message,
            "warnings": self.warnings,
            **{f"{step}_s": self.seconds.get(step, "") for step in STEPS},
            "peak_memory_mb": self.peak_memory_mb,
        }


def input_text(case: Case) -> str:
    """Return the file of a case, or its files, as `cases.csv` names them."""
    image = case["image"]
    if isinstance(image, str | Path):
        return str(image)
    return INPUT_SEPARATOR.join(map(str, image))
