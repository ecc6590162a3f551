"""How well predictions agree with labels, each case on its file's own grid and against the label as read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GeometryError
from pipeline.read import read
from pipeline.types import Array, Case


def dice(prediction: Array, reference: Array, value: int) -> float:
    """Dice of one label, 0 to 1; nan where neither map has it, 0 where one does.

    Raises:
        GeometryError: the maps do not have one shape.
    """
    if prediction.shape != reference.shape:
        raise GeometryError(
            f"prediction has shape {prediction.shape}, reference {reference.shape}: compare them on one grid "
            "(did you score before inverting the preprocessing?)"
        )
    ours, theirs = prediction == value, reference == value
    total = int(ours.sum()) + int(theirs.sum())
    return 2 * int((ours & theirs).sum()) / total if total else float("nan")


def score_case(case: Case, prediction: Path, names: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row a label: case, label, dice. A prediction that is missing has Dice 0 where the reference has the label.

    Args:
        case: with `case` and `label` (a path).
        prediction: the label map that `segment` wrote.
        names: name → output value, as in the spec.
    """
    reference = np.rint(read(case["label"]).array)
    ours = np.rint(read(prediction).array) if prediction.is_file() else np.zeros_like(reference)
    return [
        {"case": case["case"], "label": name, "dice": dice(ours, reference, value)}
        for name, value in names.items()
        if value != 0
    ]


def mean_dice(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean Dice of each label over its scored cases (nan is not scored)."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["label"], []).append(float(row["dice"]))
    return {name: float(np.nanmean(listed)) for name, listed in values.items()}
