"""Checks that a loaded volume can be segmented."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from pipeline.errors import VolumeError
from pipeline.io import add_warnings
from pipeline.types import Affine, Array

MAX_NONFINITE = 0.01  # fraction of voxels that may be NaN or infinite and are then replaced
# mm; a spacing outside these limits is a wrong header (metres, micrometres, a unit never set)
SPACING_LIMITS_MM = (0.05, 20.0)
MAX_SHEAR = 0.01  # cosine of the angle between two axes; float32 headers stay below 1e-4
MIN_DETERMINANT = 1e-3  # of the axes as unit vectors; 1 where they are perpendicular
MAX_LABEL_VALUES = 512  # a volume with more distinct values is no label map
# Fraction of neighbouring voxels other than 0 with equal values: images stay below 0.3
MIN_EQUAL_NEIGHBOURS = 0.6


class CheckVolumed(MapTransform):
    """Refuse volumes that cannot be segmented, and warn about doubtful ones.

    A few voxels that are not finite are replaced. Warnings are added to the tensor's `meta`.

    Args:
        keys: (C, X, Y, Z) images from `LoadVolumed`, not labels.

    Raises:
        VolumeError: the volume cannot be segmented; the message starts with the channel's file.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            for source, channel in zip(image.meta["sources"], image.as_tensor(), strict=True):
                try:
                    check_affine(np.asarray(image.affine, dtype=np.float64))
                    add_warnings(image.meta, *check_values(channel))
                except VolumeError as error:
                    raise VolumeError(f"{source or key}: {error}") from error
        return case


def check_affine(affine: Affine) -> None:
    """Raise an error unless voxels under this affine are boxes of a plausible size.

    Raises:
        VolumeError: the affine has a zero or implausible spacing, singular or sheared axes, or
            numbers that are not finite.
    """
    if not np.isfinite(affine).all():
        raise VolumeError(
            "the affine holds NaN or infinity, expected finite numbers; set the file's sform or "
            "qform"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    text = " × ".join(f"{mm:.4g}" for mm in spacing)
    if (spacing == 0).any():
        raise VolumeError(
            f"the spacing is {text} mm, expected above 0; set the file's sform or qform"
        )
    lowest, highest = SPACING_LIMITS_MM
    if (spacing < lowest).any() or (spacing > highest).any():
        raise VolumeError(
            f"the spacing is {text} mm, expected {lowest} to {highest}; is the header in metres or "
            "micrometres?"
        )
    axes = affine[:3, :3] / spacing
    if abs(np.linalg.det(axes)) < MIN_DETERMINANT:
        raise VolumeError(
            "the affine is singular: its axes lie in one plane, expected three directions"
        )
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > MAX_SHEAR:
        degrees = np.degrees(np.arccos(min(shear, 1.0)))
        raise VolumeError(
            f"the affine is sheared: two axes meet at {degrees:.1f}°, expected 90°; resample the "
            "file to a straight grid first"
        )


def check_values(channel: torch.Tensor) -> list[str]:
    """Return warnings about one channel's values, after replacing a few that are not finite.

    Args:
        channel: (X, Y, Z) float32. NaN and infinite values are set to the smallest finite value,
            in place.

    Raises:
        VolumeError: the channel has no voxels, too many values that are not finite, or a single
            value throughout, or looks like a label map.
    """
    if channel.numel() == 0:
        raise VolumeError(f"the volume has shape {tuple(channel.shape)}: it holds no voxels")
    warnings = _replace_nonfinite(channel)
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        found = "is empty: every voxel is 0" if low == 0 else f"is constant: every voxel is {low:g}"
        raise VolumeError(f"the volume {found}; expected an image")
    if looks_like_labels(channel.numpy()):
        raise VolumeError(
            "the volume looks like a label map (few whole numbers, in even patches), expected an "
            "image; was a mask or a segmentation given by mistake?"
        )
    return warnings


def looks_like_labels(array: Array) -> bool:
    """Return whether a volume is piecewise constant with few whole values, like a label map.

    Args:
        array: (X, Y, Z).
    """
    # About 64 planes are enough to find values that are not whole numbers, or many values
    sample = array[:: max(1, array.shape[0] // 64)]
    if not np.array_equal(sample, np.rint(sample)):
        return False
    if len(np.unique(sample)) > MAX_LABEL_VALUES:
        return False
    first, second = array[:, :-1], array[:, 1:]
    # Background is left out, because skull-stripped images have large areas of 0 too
    both_nonzero = (first != 0) & (second != 0)
    if not both_nonzero.any():
        return False
    return float((first == second)[both_nonzero].mean()) > MIN_EQUAL_NEIGHBOURS


def _replace_nonfinite(channel: torch.Tensor) -> list[str]:
    """Set values that are not finite to the smallest finite value, in place; return a warning."""
    nonfinite = ~torch.isfinite(channel)
    count = int(nonfinite.sum())
    if count == 0:
        return []
    fraction = count / channel.numel()
    if fraction > MAX_NONFINITE:
        raise VolumeError(
            f"{count} voxels ({fraction:.1%}) are NaN or infinite, expected at most "
            f"{MAX_NONFINITE:.0%}; where they mark the background, set them to 0 first"
        )
    channel[nonfinite] = channel[~nonfinite].min()
    return [f"{count} voxels were NaN or infinite and were set to the smallest value"]
