"""FIXME."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from pipeline.errors import GeometryError
from pipeline.evaluation.metrics import METRICS, TOLERANCE_MM, score_masks
from pipeline.io import Image, corner_distance, read
from pipeline.types import Array, Case

SAME_GRID_MM = 0.01


INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval


RESAMPLES = 10_000


def score_case(
    case: Case, prediction: Path, names: Mapping[str, int], *, tolerance_mm: float = TOLERANCE_MM
) -> list[dict[str, Any]]:
    """One row a label: case, label and all of `Score`. A prediction that is missing is scored as an empty one.

    Args:
        case: with `case` and `label` (a path).
        prediction: the label map that `segment` wrote.
        names: name → output value, as in the spec.
        tolerance_mm: of surface Dice.

    Raises:
        GeometryError: the prediction does not lie on the label's grid.
    """
    reference = read(case["label"])
    theirs = np.rint(reference.array)
    ours = (
        _on_grid(read(prediction), reference, case["case"])
        if prediction.is_file()
        else np.zeros_like(theirs)
    )
    spacing = np.linalg.norm(reference.affine[:3, :3], axis=0)
    return [
        {
            "case": case["case"],
            "label": name,
            **asdict(
                score_masks(ours == value, theirs == value, spacing, tolerance_mm=tolerance_mm)
            ),
        }
        for name, value in names.items()
        if value != 0
    ]


def worst_cases(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """The cases with the lowest mean Dice over their labels, the worst first; cases that are not scored are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"] == row["dice"]:
            found.setdefault(row["case"], []).append(row["dice"])
    return sorted(found, key=lambda case: fmean(found[case]))[:count]


def _on_grid(prediction: Image, reference: Image, name: str) -> Array:
    if prediction.array.shape == reference.array.shape:
        apart = corner_distance(prediction.affine, reference.affine, reference.array.shape)
        if apart > SAME_GRID_MM:
            raise GeometryError(
                f"{name}: prediction and label lie up to {apart:.2f} mm apart; do image and label share a grid?"
            )
    return np.rint(prediction.array)


def summarise_scores(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row a label and one for their mean: of each metric the mean over cases with a bootstrap 95 % interval.

    Cases are resampled, and nan (a label that neither map has) is not scored. The mean row averages the labels within a case
    first.

    Args:
        rows: from `score_case`.
        seed: of the resampling.
    """
    by_label: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values = by_label.setdefault(row["label"], {metric: [] for metric in METRICS})
        for metric in METRICS:
            values[metric].append(float(row[metric]))
    tables = {
        name: {metric: np.array(listed) for metric, listed in values.items()}
        for name, values in by_label.items()
    }
    if len(tables) > 1:
        tables["mean"] = {
            metric: _nanmean(np.stack([t[metric] for t in tables.values()]), axis=0)
            for metric in METRICS
        }
    return [
        _summary_row(name, table, np.random.default_rng(seed)) for name, table in tables.items()
    ]


def _summary_row(
    name: str, table: Mapping[str, Array], random: np.random.Generator
) -> dict[str, Any]:
    row: dict[str, Any] = {"label": name, "cases": int(np.isfinite(table["dice"]).sum())}
    for metric, values in table.items():
        scored = values[~np.isnan(values)]
        low = high = nan
        if len(scored):
            means = scored[random.integers(len(scored), size=(RESAMPLES, len(scored)))].mean(axis=1)
            low, high = (float(np.percentile(means, q, method="inverted_cdf")) for q in INTERVAL)
        row |= {
            metric: float(scored.mean()) if len(scored) else nan,
            f"{metric}_low": low,
            f"{metric}_high": high,
        }
    return row


def _nanmean(values: Array, axis: int) -> Array:
    """The mean without nan; nan where there is nothing else."""
    counted = ~np.isnan(values)
    total = np.where(counted, values, 0).sum(axis=axis)
    mean: Array = np.divide(
        total, counted.sum(axis=axis), out=np.full(total.shape, nan), where=counted.any(axis=axis)
    )
    return mean


def compare_scores(
    ours: Iterable[Mapping[str, Any]], theirs: Iterable[Mapping[str, Any]], metric: str = "dice"
) -> list[dict[str, Any]]:
    """One row a label: both means of one metric over the cases that both have, and a paired Wilcoxon signed-rank test.

    Args:
        ours, theirs: rows of `score_case`.
        metric: a field of `Score`; cases with nan or inf in either are left out.

    Returns:
        dicts of label, cases, ours, theirs, difference and p_value (nan with fewer than 2 cases, 1 where all are equal).

    Raises:
        GeometryError: no case and label in common.
    """
    values = [
        {(str(row["case"]), str(row["label"])): float(row[metric]) for row in rows}
        for rows in (ours, theirs)
    ]
    shared = [
        key
        for key in values[0]
        if key in values[1] and np.isfinite([values[0][key], values[1][key]]).all()
    ]
    if not shared:
        raise GeometryError(
            "the two results have no scored case and label in common: compare results of the same cases"
        )
    rows = []
    for label in dict.fromkeys(label for _, label in shared):
        a, b = (np.array([table[key] for key in shared if key[1] == label]) for table in values)
        p_value = (
            nan if len(a) < 2 else 1.0 if np.array_equal(a, b) else float(wilcoxon(a, b).pvalue)
        )
        means = {
            "ours": float(a.mean()),
            "theirs": float(b.mean()),
            "difference": float((a - b).mean()),
        }
        rows.append({"label": label, "cases": len(a), **means, "p_value": p_value})
    return rows
