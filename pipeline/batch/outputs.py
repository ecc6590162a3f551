"""The names of the files that a batch writes."""

from __future__ import annotations

from pathlib import Path

CASES, VOLUMES, RUN = "cases.csv", "volumes.csv", "run.json"


def output_path(output_dir: Path, case: str) -> Path:
    """Return where a case's label map is written."""
    return output_dir / f"{case}_seg.nii.gz"


def uncertainty_path(output_dir: Path, case: str) -> Path:
    """Return where a case's uncertainty is written, if it is asked for."""
    return output_dir / f"{case}_uncertainty.nii.gz"
