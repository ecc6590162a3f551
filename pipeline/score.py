"""How well predictions agree with labels, each case on its file's own grid and against the label as read.

References:
    Maier-Hein, Reinke et al.: Metrics reloaded. Nature Methods 21, 195-212 (2024), doi:10.1038/s41592-023-02151-z.
    Nikolov et al.: surface Dice at a tolerance. J Med Internet Res 23, e26151 (2021), doi:10.2196/26151.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy.stats import wilcoxon

from pipeline.errors import GeometryError
from pipeline.read import Image, corner_distance, read
from pipeline.types import Array, Case

TOLERANCE_MM = 1.0  # of surface Dice, unless another is asked for
SAME_GRID_MM = 0.01
INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Agreement of one label in one case.

    A label that only one of the two maps has is wholly wrong (Dice 0, distances inf, surface Dice 0); one that neither has is
    not scored (nan throughout, volumes 0).

    Attributes:
        dice: 0 to 1.
        hd95_mm: the larger of the two directed 95th percentiles of surface distances, mm.
        assd_mm: mean of the surface distances of both directions, mm.
        nsd: surface Dice at the tolerance asked for, 0 to 1.
        sensitivity: fraction of the reference that was found, 0 to 1.
        precision: fraction of what was found that is in the reference, 0 to 1.
        volume_ml, reference_ml: mL.
        difference_ml: volume_ml - reference_ml.
        difference_percent: the same, of reference_ml; inf where that is 0.
    """

    dice: float
    hd95_mm: float
    assd_mm: float
    nsd: float
    sensitivity: float
    precision: float
    volume_ml: float
    reference_ml: float
    difference_ml: float
    difference_percent: float


METRICS = tuple(Score.__dataclass_fields__)


def score(prediction: Array, reference: Array, spacing: Sequence[float], *, tolerance_mm: float = TOLERANCE_MM) -> Score:
    """The agreement of two masks.

    Args:
        prediction: (X, Y, Z), true where the label was found.
        reference: (X, Y, Z), true where it is.
        spacing: mm along the array's axes.
        tolerance_mm: how far a surface may be off and still count as right in `nsd`.

    Raises:
        GeometryError: the maps do not have one shape.
    """
    ours, theirs = np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
    if ours.shape != theirs.shape:
        raise GeometryError(
            f"prediction has shape {ours.shape}, reference {theirs.shape}: compare them on one grid "
            "(did you score before inverting the preprocessing?)"
        )
    found, there, both = int(ours.sum()), int(theirs.sum()), int((ours & theirs).sum())
    ml = float(np.prod(spacing)) / 1000
    distances = _surface_scores(ours, theirs, spacing, tolerance_mm) if found and there else _one_is_empty(found + there)
    return Score(
        dice=dice(ours, theirs),
        sensitivity=both / there if there else (0.0 if found else nan),
        precision=both / found if found else (0.0 if there else nan),
        volume_ml=found * ml,
        reference_ml=there * ml,
        difference_ml=(found - there) * ml,
        difference_percent=100 * (found - there) / there if there else (float("inf") if found else nan),
        **distances,
    )


def dice(prediction: Array, reference: Array) -> float:
    """Dice of two masks of one shape, 0 to 1; nan where both are empty."""
    size = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / size if size else nan


def _one_is_empty(voxels: int) -> dict[str, float]:
    """Surface scores where a mask is empty: wholly wrong, or not scored where both are."""
    if voxels:
        return {"hd95_mm": float("inf"), "assd_mm": float("inf"), "nsd": 0.0}
    return {"hd95_mm": nan, "assd_mm": nan, "nsd": nan}


def _surface_scores(ours: Array, theirs: Array, spacing: Sequence[float], tolerance_mm: float) -> dict[str, float]:
    """By MONAI, on the box that holds both masks with a margin, so that no surface lies on its edge."""
    places = np.argwhere(ours | theirs)
    box = tuple(slice(low, high + 1) for low, high in zip(places.min(axis=0), places.max(axis=0), strict=True))
    a, b = (torch.from_numpy(np.pad(mask[box], 1))[None, None].float() for mask in (ours, theirs))
    mm = [float(s) for s in spacing]
    options = {"include_background": True, "spacing": mm}
    return {
        "hd95_mm": float(compute_hausdorff_distance(a, b, percentile=95, **options)),
        "assd_mm": float(compute_average_surface_distance(a, b, symmetric=True, **options)),
        "nsd": float(compute_surface_dice(a, b, [tolerance_mm], use_subvoxels=True, **options)),
    }


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
    ours = _on_grid(read(prediction), reference, case["case"]) if prediction.is_file() else np.zeros_like(theirs)
    spacing = np.linalg.norm(reference.affine[:3, :3], axis=0)
    return [
        {
            "case": case["case"],
            "label": name,
            **asdict(score(ours == value, theirs == value, spacing, tolerance_mm=tolerance_mm)),
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


def summary(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
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
    tables = {name: {metric: np.array(listed) for metric, listed in values.items()} for name, values in by_label.items()}
    if len(tables) > 1:
        tables["mean"] = {metric: _nanmean(np.stack([t[metric] for t in tables.values()]), axis=0) for metric in METRICS}
    return [_summary_row(name, table, np.random.default_rng(seed)) for name, table in tables.items()]


def _summary_row(name: str, table: Mapping[str, Array], random: np.random.Generator) -> dict[str, Any]:
    row: dict[str, Any] = {"label": name, "cases": int(np.isfinite(table["dice"]).sum())}
    for metric, values in table.items():
        scored = values[~np.isnan(values)]
        low = high = nan
        if len(scored):
            means = scored[random.integers(len(scored), size=(RESAMPLES, len(scored)))].mean(axis=1)
            low, high = (float(np.percentile(means, q, method="inverted_cdf")) for q in INTERVAL)
        row |= {metric: float(scored.mean()) if len(scored) else nan, f"{metric}_low": low, f"{metric}_high": high}
    return row


def _nanmean(values: Array, axis: int) -> Array:
    """The mean without nan; nan where there is nothing else."""
    counted = ~np.isnan(values)
    total = np.where(counted, values, 0).sum(axis=axis)
    mean: Array = np.divide(total, counted.sum(axis=axis), out=np.full(total.shape, nan), where=counted.any(axis=axis))
    return mean


def compare(
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
    values = [{(str(row["case"]), str(row["label"])): float(row[metric]) for row in rows} for rows in (ours, theirs)]
    shared = [key for key in values[0] if key in values[1] and np.isfinite([values[0][key], values[1][key]]).all()]
    if not shared:
        raise GeometryError("the two results have no scored case and label in common: compare results of the same cases")
    rows = []
    for label in dict.fromkeys(label for _, label in shared):
        a, b = (np.array([table[key] for key in shared if key[1] == label]) for table in values)
        p_value = nan if len(a) < 2 else 1.0 if np.array_equal(a, b) else float(wilcoxon(a, b).pvalue)
        means = {"ours": float(a.mean()), "theirs": float(b.mean()), "difference": float((a - b).mean())}
        rows.append({"label": label, "cases": len(a), **means, "p_value": p_value})
    return rows
