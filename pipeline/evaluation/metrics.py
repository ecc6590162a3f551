"""How well predictions agree with labels, each case on its file's own grid and against the label as read.

References:
    Maier-Hein, Reinke et al.: Metrics reloaded. Nature Methods 21, 195-212 (2024), doi:10.1038/s41592-023-02151-z.
    Nikolov et al.: surface Dice at a tolerance. J Med Internet Res 23, e26151 (2021), doi:10.2196/26151.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from pipeline.errors import GeometryError
from pipeline.types import Array

TOLERANCE_MM = 1.0  # of surface Dice, unless another is asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScore:
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


METRICS = tuple(LabelScore.__dataclass_fields__)


def score_masks(
    prediction: Array,
    reference: Array,
    spacing: Sequence[float],
    *,
    tolerance_mm: float = TOLERANCE_MM,
) -> LabelScore:
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
    distances = (
        _surface_scores(ours, theirs, spacing, tolerance_mm)
        if found and there
        else _one_is_empty(found + there)
    )
    return LabelScore(
        dice=dice(ours, theirs),
        sensitivity=both / there if there else (0.0 if found else nan),
        precision=both / found if found else (0.0 if there else nan),
        volume_ml=found * ml,
        reference_ml=there * ml,
        difference_ml=(found - there) * ml,
        difference_percent=100 * (found - there) / there
        if there
        else (float("inf") if found else nan),
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


def _surface_scores(
    ours: Array, theirs: Array, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """By MONAI, on the box that holds both masks with a margin, so that no surface lies on its edge."""
    places = np.argwhere(ours | theirs)
    box = tuple(
        slice(low, high + 1)
        for low, high in zip(places.min(axis=0), places.max(axis=0), strict=True)
    )
    a, b = (torch.from_numpy(np.pad(mask[box], 1))[None, None].float() for mask in (ours, theirs))
    mm = [float(s) for s in spacing]
    options = {"include_background": True, "spacing": mm}
    return {
        "hd95_mm": float(compute_hausdorff_distance(a, b, percentile=95, **options)),
        "assd_mm": float(compute_average_surface_distance(a, b, symmetric=True, **options)),
        "nsd": float(compute_surface_dice(a, b, [tolerance_mm], use_subvoxels=True, **options)),
    }
