"""The rows of a report: its cases and its structures, as plain data for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.batch import BatchResults, CaseRecord, FileState
from pipeline.io import LABELS_ENDING, LabelColor, printable
from pipeline.report.outliers import VolumeRange, usual_range

RESULT_LETTERS = 12  # of the hash by which a mark knows the label map that it is about
DIGITS = 1  # of volumes in mm³
LABEL_MAP_ENDINGS = (LABELS_ENDING, "_dseg.nii.gz")  # the second in BIDS derivatives


def case_rows(
    results: BatchResults, marks: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Return one row per case, in the order of the records.

    Args:
        results: of an output folder.
        marks: case → `mark`, `note` and `result` of a rater.

    Returns:
        rows with `case`, `status`, `input`, `message`, `warnings`, `volumes` (mm³ per structure, in
        the order of `structure_names`, None where a case has none), `outliers` (numbers of
        structures), `dice` (predicted mean Dice or None), `columns`, `seconds`, `ended`, `result`
        (the label map's hash, cut), `mark`, `note` and `flagged`.
    """
    names = structure_names(results)
    ranges = _ranges(results, names)
    rows = []
    for record in results.records:
        row = _row(record, names)
        row["outliers"] = [
            number
            for number, volume in enumerate(row["volumes"] or ())
            if volume is not None and ranges[number].is_outlier(volume)
        ]
        mark = marks.get(row["case"], {})
        # a mark about another label map says nothing of this one
        if mark.get("result", "") in ("", row["result"]):
            row["mark"], row["note"] = mark.get("mark", ""), mark.get("note", "")
        row["flagged"] = bool(row["warnings"] or row["outliers"] or row["mark"] == "fail")
        rows.append(row)
    return rows


def label_map(record: CaseRecord) -> FileState | None:
    """Return the label map of a case; None for a case without one."""
    if record.is_failure:
        return None
    found = (state for state in record.outputs if state.path.endswith(LABEL_MAP_ENDINGS))
    return next(found, None)


def structure_names(results: BatchResults) -> list[str]:
    """Return the structures, and sums of them, that any case has a volume of."""
    return list({name: None for record in results.records for name in record.volumes_mm3})


def structure_rows(results: BatchResults, table: Sequence[LabelColor]) -> list[dict[str, Any]]:
    """Return one row per structure: name, colour (None for sums), and its usual volumes, mm³."""
    colors = {label.name: list(label.color) for label in table}
    names = structure_names(results)
    return [
        {
            "name": printable(name),
            "color": colors.get(name),
            "cases": usual.cases,
            "median": _finite(usual.median),
            "low": _finite(usual.low),
            "high": _finite(usual.high),
        }
        for name, usual in zip(names, _ranges(results, names), strict=True)
    ]


def _ranges(results: BatchResults, names: Sequence[str]) -> list[VolumeRange]:
    volumes = [record.volumes_mm3 for record in results.records if record.status == "done"]
    return [usual_range([case.get(name, math.nan) for case in volumes]) for name in names]


def _row(record: CaseRecord, names: Sequence[str]) -> dict[str, Any]:
    labels = label_map(record)
    done = record.status == "done"
    volumes = [_finite(record.volumes_mm3.get(name, math.nan)) for name in names]
    return {
        "case": printable(record.case),
        "status": record.status,
        "input": [printable(path) for path in record.image],
        "message": printable(record.error),
        "warnings": [printable(text) for text in record.warnings],
        "volumes": volumes if done else None,
        "dice": predicted_dice(record),
        "columns": {printable(name): printable(text) for name, text in record.columns.items()},
        "seconds": round(sum(record.seconds.values()), 1),
        "ended": printable(record.ended),
        "result": labels.sha256[:RESULT_LETTERS] if labels is not None else "",
        "mark": "",
        "note": "",
    }


def predicted_dice(record: CaseRecord) -> float | None:
    """Return the mean Dice that was predicted for a case; None where none was."""
    value: Any = getattr(record, "predicted_dice", None)
    if isinstance(value, Mapping):
        value = value.get("mean")
    if isinstance(value, Mapping):
        value = value.get("dice")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if not math.isfinite(value) else round(float(value), 4)


def _finite(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None
