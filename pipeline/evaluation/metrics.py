"""Metrics of two masks on one grid: overlap, surface distances and volumes.

References:
    Maier-Hein, Reinke et al.: Metrics reloaded: recommendations for image analysis validation.
        Nature Methods 21, 195-212 (2024), doi:10.1038/s41592-023-02151-z.
    Nikolov et al.: Clinically applicable segmentation of head and neck anatomy (surface Dice at a
        tolerance). J Med Internet Res 23, e26151 (2021), doi:10.2196/26151.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import numpy as np
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from pipeline.errors import GeometryError
from pipeline.types import Array

TOLERANCE_MM = 1.0  # default tolerance of surface Dice: about one voxel of a structural scan


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScore:
    """Agreement of the prediction and the reference for one label in one case.

    A label that only one of the two maps has is completely wrong: Dice 0, distances inf, surface
    Dice 0. A label that neither has is not scored: all metrics are nan, the volumes 0.

    Attributes:
        dice: Dice coefficient, 0 to 1.
        hd95_mm: the larger of the two directed 95th percentiles of the surface distances, mm.
        assd_mm: mean of the surface distances in both directions, mm.
        nsd: surface Dice at a tolerance (normalised surface Dice), 0 to 1.
        sensitivity: fraction of the reference that was predicted, 0 to 1.
        precision: fraction of the prediction that lies in the reference, 0 to 1.
        volume_ml: volume of the prediction, mL.
        reference_ml: volume of the reference, mL.
        difference_ml: `volume_ml - reference_ml`.
        difference_percent: `difference_ml` in percent of `reference_ml`; inf where the reference
            is empty and the prediction is not.
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


METRICS = tuple(LabelScore.__dataclass_fields__)  # names, in the order of the columns of scores.csv


@dataclass(frozen=True, kw_only=True, slots=True)
class SurfaceScore:
    """The metrics of `LabelScore` that depend on the distances between the two surfaces."""

    hd95_mm: float
    assd_mm: float
    nsd: float


# MONAI's values for an empty mask flatter (a missed label has an HD95 of nan, which a mean skips),
# so empty masks never reach it.
ONE_MASK_EMPTY = SurfaceScore(hd95_mm=inf, assd_mm=inf, nsd=0.0)
BOTH_MASKS_EMPTY = SurfaceScore(hd95_mm=nan, assd_mm=nan, nsd=nan)


def score_masks(
    prediction: Array,
    reference: Array,
    spacing: Sequence[float],
    *,
    tolerance_mm: float = TOLERANCE_MM,
) -> LabelScore:
    """Return the agreement of two masks.

    Args:
        prediction: (X, Y, Z), true where the label was predicted.
        reference: (X, Y, Z), true where the reference has the label.
        spacing: mm along the three axes of the arrays.
        tolerance_mm: largest distance at which `nsd` counts a piece of surface as correct, mm.

    Raises:
        GeometryError: the two masks differ in shape.
    """
    predicted = np.asarray(prediction, dtype=bool)
    true = np.asarray(reference, dtype=bool)
    if predicted.shape != true.shape:
        raise GeometryError(
            f"prediction has shape {predicted.shape}, reference {true.shape}: compare them on one "
            "grid (did you score before inverting the preprocessing?)"
        )
    predicted_voxels, true_voxels = int(predicted.sum()), int(true.sum())
    common_voxels = int((predicted & true).sum())
    voxel_ml = float(np.prod(spacing)) / 1000
    if predicted_voxels and true_voxels:
        surface = surface_score(predicted, true, spacing, tolerance_mm)
    else:
        surface = ONE_MASK_EMPTY if predicted_voxels or true_voxels else BOTH_MASKS_EMPTY
    return LabelScore(
        dice=dice(predicted, true),
        hd95_mm=surface.hd95_mm,
        assd_mm=surface.assd_mm,
        nsd=surface.nsd,
        sensitivity=_fraction(common_voxels, of=true_voxels, other=predicted_voxels),
        precision=_fraction(common_voxels, of=predicted_voxels, other=true_voxels),
        volume_ml=predicted_voxels * voxel_ml,
        reference_ml=true_voxels * voxel_ml,
        difference_ml=(predicted_voxels - true_voxels) * voxel_ml,
        difference_percent=_difference_percent(predicted_voxels, true_voxels),
    )


def dice(prediction: Array, reference: Array) -> float:
    """Return the Dice coefficient of two boolean masks of one shape, 0 to 1; nan if both are empty.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
    """
    size = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / size if size else nan


def surface_score(
    prediction: Array, reference: Array, spacing: Sequence[float], tolerance_mm: float
) -> SurfaceScore:
    """Return the metrics of the surfaces of two masks, neither of them empty, by MONAI.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        spacing: mm along the three axes.
        tolerance_mm: tolerance of `nsd`, mm.
    """
    box = _bounding_box(prediction | reference)
    # A margin of one voxel, so that the surfaces are closed inside the cropped array.
    predicted, true = (
        torch.from_numpy(np.pad(mask[box], 1))[None, None].float()
        for mask in (prediction, reference)
    )
    # MONAI takes Python floats only: numpy's are not a spacing to it.
    spacing_mm = [float(mm) for mm in spacing]
    hd95 = compute_hausdorff_distance(
        predicted, true, include_background=True, percentile=95, spacing=spacing_mm
    )
    assd = compute_average_surface_distance(
        predicted, true, include_background=True, symmetric=True, spacing=spacing_mm
    )
    nsd = compute_surface_dice(
        predicted,
        true,
        [tolerance_mm],
        include_background=True,
        spacing=spacing_mm,
        use_subvoxels=True,  # areas of surface as in Nikolov et al., not counts of voxels
    )
    return SurfaceScore(hd95_mm=float(hd95), assd_mm=float(assd), nsd=float(nsd))


def _bounding_box(mask: Array) -> tuple[slice, ...]:
    voxels = np.argwhere(mask)
    lowest, highest = voxels.min(axis=0), voxels.max(axis=0)
    return tuple(slice(low, high + 1) for low, high in zip(lowest, highest, strict=True))


def _fraction(common_voxels: int, *, of: int, other: int) -> float:
    """Return the common part as a fraction of one mask; if that mask is empty, 0 or nan."""
    if of:
        return common_voxels / of
    return 0.0 if other else nan


def _difference_percent(predicted_voxels: int, true_voxels: int) -> float:
    if true_voxels:
        return 100 * (predicted_voxels - true_voxels) / true_voxels
    return inf if predicted_voxels else nan
