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
    """Agreement of prediction and reference for one label in one case.

    If only one of the two label maps has the label, Dice, surface Dice, sensitivity and precision
    are 0 and distances inf. If neither has it, the label is not scored: all metrics are nan, and
    volumes and their difference are 0.

    Attributes:
        dice: Dice coefficient, 0 to 1.
        hd95_mm: 95th percentile Hausdorff distance, mm: the larger of the two directed percentiles.
        assd_mm: average symmetric surface distance, mm: the mean of the distances in both
            directions.
        nsd: normalised surface Dice at a tolerance, 0 to 1.
        sensitivity: fraction of the reference that was predicted, 0 to 1.
        precision: fraction of the prediction that lies in the reference, 0 to 1.
        volume_ml: volume of the prediction, mL.
        reference_ml: volume of the reference, mL.
        difference_ml: `volume_ml - reference_ml`, mL.
        difference_percent: `difference_ml` in percent of `reference_ml`; inf if only the reference
            is empty.
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
    """The metrics of `LabelScore` that depend on the distances between the two surfaces.

    Attributes:
        hd95_mm: 95th percentile Hausdorff distance, mm.
        assd_mm: average symmetric surface distance, mm.
        nsd: normalised surface Dice at a tolerance, 0 to 1.
    """

    hd95_mm: float
    assd_mm: float
    nsd: float


# For an empty mask MONAI returns nan as HD95, which a mean would skip: a missed label would not
# count. Empty masks are therefore scored without MONAI.
ONE_MASK_EMPTY = SurfaceScore(hd95_mm=inf, assd_mm=inf, nsd=0.0)
BOTH_MASKS_EMPTY = SurfaceScore(hd95_mm=nan, assd_mm=nan, nsd=nan)


def score_masks(
    prediction: Array,
    reference: Array,
    spacing: Sequence[float],
    *,
    tolerance_mm: float = TOLERANCE_MM,
) -> LabelScore:
    """Return all metrics of a predicted and a reference mask.

    Args:
        prediction: (X, Y, Z) mask, true where the label was predicted.
        reference: (X, Y, Z) mask, true where the reference has the label.
        spacing: voxel size along the three axes of the arrays, mm.
        tolerance_mm: largest distance at which `nsd` counts a part of the surface as correct, mm.

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
    """Return the surface metrics of two masks, as MONAI computes them.

    Args:
        prediction: (X, Y, Z) bool, not empty.
        reference: (X, Y, Z) bool, not empty.
        spacing: voxel size along the three axes, mm.
        tolerance_mm: tolerance of `nsd`, mm.
    """
    box = _bounding_box(prediction | reference)
    # Padded by one voxel, so that structures at the edge of the cropped array have a closed surface
    predicted, true = (
        torch.from_numpy(np.pad(mask[box], 1))[None, None].float()
        for mask in (prediction, reference)
    )
    # MONAI accepts a spacing of Python floats only, not of numpy's
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
        use_subvoxels=True,  # areas of the surface, as in Nikolov et al., instead of voxel counts
    )
    return SurfaceScore(hd95_mm=float(hd95), assd_mm=float(assd), nsd=float(nsd))


def _bounding_box(mask: Array) -> tuple[slice, ...]:
    voxels = np.argwhere(mask)
    lowest, highest = voxels.min(axis=0), voxels.max(axis=0)
    return tuple(slice(low, high + 1) for low, high in zip(lowest, highest, strict=True))


def _fraction(common_voxels: int, *, of: int, other: int) -> float:
    """Return the common voxels as a fraction of one mask.

    If that mask is empty, the fraction is nan if the other mask is empty too, else 0.
    """
    if of:
        return common_voxels / of
    return 0.0 if other else nan


def _difference_percent(predicted_voxels: int, true_voxels: int) -> float:
    if true_voxels:
        return 100 * (predicted_voxels - true_voxels) / true_voxels
    return inf if predicted_voxels else nan
