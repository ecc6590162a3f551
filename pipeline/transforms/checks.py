"""Checks that a loaded volume can be segmented."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from pipeline.config import Spec
from pipeline.errors import VolumeError
from pipeline.io import Grid, add_warnings
from pipeline.transforms.network_grid import network_grid_shape
from pipeline.types import Affine, Array

MAX_NONFINITE = 0.01  # fraction of voxels that may be NaN or infinite and are then replaced
# mm; a spacing outside these limits is a wrong header (metres, micrometres, a unit never set)
SPACING_LIMITS_MM = (0.05, 20.0)
MAX_SHEAR = 0.01  # cosine of the angle between two axes; float32 headers stay below 1e-4
MIN_DETERMINANT = 1e-3  # of the axes as unit vectors; 1 where they are perpendicular
MAX_LABEL_VALUES = 512  # a volume with more distinct values is no label map
# Fraction of neighbouring voxels other than the background with equal values: images stay below 0.3
MIN_EQUAL_NEIGHBOURS = 0.6
# The range of all values over that between the percentiles: MR images stay below 5
MAX_OUTLIER_RATIO = 15
OUTLIER_PERCENTILES = (1, 99)  # of all voxels but those of the most frequent value
SAMPLE_VOXELS = 2**18
MIN_BACKGROUND = 0.01  # fraction of the voxels that have one value
# A network's grid may be finer than the file's, but the voxels of a file of 5 mm slices become only
# 10 times as many for a network of 0.8 mm
MAX_GRID_RATIO, MAX_GRID_VOXELS = 100, 2**27
MAX_FIELD_OF_VIEW_MM = 1000


class CheckVolumed(MapTransform):
    """Refuse volumes that cannot be segmented, and warn about doubtful ones.

    A few voxels that are not finite are replaced. Warnings are added to the tensor's `meta`.

    Args:
        keys: (C, X, Y, Z) images from `LoadVolumed`, not labels.
        warn_outliers: whether a few extreme values are worth a warning, because the normalisation
            does not clip them.

    Raises:
        VolumeError: the volume cannot be segmented; the message starts with the channel's file.
    """

    def __init__(self, keys: KeysCollection, *, warn_outliers: bool = True) -> None:
        super().__init__(keys)
        self.warn_outliers = warn_outliers

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            for source, channel in zip(image.meta["sources"], image.as_tensor(), strict=True):
                try:
                    check_affine(np.asarray(image.affine, dtype=np.float64))
                    add_warnings(image.meta, *check_values(channel))
                    if self.warn_outliers:
                        add_warnings(image.meta, *outlier_warnings(channel.numpy()))
                except VolumeError as error:
                    raise VolumeError(f"{source or key}: {error}") from error
        return case


class CheckProportiond(MapTransform):
    """Refuse volumes whose size on the network's grid is out of proportion to the file.

    Args:
        keys: (C, X, Y, Z) images that `CheckVolumed` has passed.
        spec: the network's orientation and spacing.

    Raises:
        VolumeError: see `check_proportion`; the message starts with the file.
    """

    def __init__(self, keys: KeysCollection, spec: Spec) -> None:
        super().__init__(keys)
        self.spec = spec

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            file = Grid(
                affine=np.asarray(image.affine, dtype=np.float64), shape=tuple(image.shape[1:])
            )
            grid_shape = network_grid_shape(self.spec, file)
            try:
                warnings = check_proportion(file.shape, file.affine, grid_shape)
            except VolumeError as error:
                raise VolumeError(f"{image.meta['sources'][0] or key}: {error}") from error
            add_warnings(image.meta, *warnings)
        return case


def check_proportion(
    shape: tuple[int, ...], affine: Affine, grid_shape: tuple[int, ...]
) -> list[str]:
    """Return warnings about a volume that is far larger than a body part.

    Args:
        shape: (X, Y, Z) voxels of the file.
        affine: voxel index → RAS+ world, mm.
        grid_shape: of the same volume on the network's grid, voxels.

    Raises:
        VolumeError: the network's grid would have over `MAX_GRID_RATIO` times the file's voxels and
            over `MAX_GRID_VOXELS`: hours of computing for a file with a wrong spacing.
    """
    extent = np.array(shape) * np.linalg.norm(affine[:3, :3], axis=0)
    field = " × ".join(f"{mm:.0f}" for mm in extent)
    ratio = prod(grid_shape) / max(1, prod(shape))
    if ratio > MAX_GRID_RATIO and prod(grid_shape) > MAX_GRID_VOXELS:
        raise VolumeError(
            f"its {_times(shape)} voxels ({field} mm) would be {_times(grid_shape)} on the "
            f"network's grid, {ratio:.0f} times as many, expected at most {MAX_GRID_RATIO} times; "
            "is the spacing in the header right?"
        )
    warnings = []
    if extent.max() > MAX_FIELD_OF_VIEW_MM:
        warnings.append(
            f"the field of view is {field} mm, expected at most {MAX_FIELD_OF_VIEW_MM} mm: is the "
            "spacing in the header right?"
        )
    if ratio > MAX_GRID_RATIO:
        warnings.append(
            f"the network's grid has {ratio:.0f} times the file's voxels: most of what it is given "
            "is interpolated"
        )
    return warnings


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


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
            "micrometres? Set its unit, or its sform and qform"
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
    # a part of them first, because sorting all values of a large image is slow
    if len(np.unique(sample[:, ::4, ::4])) > MAX_LABEL_VALUES:
        return False
    values, counts = np.unique(sample, return_counts=True)
    if len(values) > MAX_LABEL_VALUES:
        return False
    # Background is left out, because skull-stripped images have large constant areas too: of 0, of
    # 255 in inverted ones, of -1024 in CT units
    background = values[counts.argmax()]
    first, second = array[:, :-1], array[:, 1:]
    both_foreground = (first != background) & (second != background)
    if not both_foreground.any():
        return False
    return float((first == second)[both_foreground].mean()) > MIN_EQUAL_NEIGHBOURS


def outlier_warnings(array: Array) -> list[str]:
    """Return a warning where a few voxels, or a constant background, hold most of the range.

    Spikes and marks of padding are such values: a z-score leaves no contrast to all others.

    Args:
        array: (X, Y, Z), finite.
    """
    step = max(1, round((array.size / SAMPLE_VOXELS) ** (1 / 3)))
    sample = array[::step, ::step, ::step]
    values, counts = np.unique(sample, return_counts=True)
    has_background = counts.max() > MIN_BACKGROUND * sample.size
    background = float(values[counts.argmax()]) if has_background else np.nan
    low, high = float(array.min()), float(array.max())
    foreground = sample[sample != background]
    if not foreground.size:
        foreground = sample
    inner_low, inner_high = np.percentile(foreground, OUTLIER_PERCENTILES).tolist()
    allowed = MAX_OUTLIER_RATIO * (inner_high - inner_low)
    if high - low <= allowed:
        return []
    others = array != background
    low = float(array.min(where=others, initial=high))
    high = float(array.max(where=others, initial=low))
    if high - low <= allowed:
        return [
            f"the background is {background:g}, far from all other values ({low:g} to {high:g}): "
            "the segmentation is less reliable; set it to 0"
        ]
    return [
        f"a few voxels have extreme values: they run from {low:g} to {high:g}, nearly all others "
        f"from {inner_low:g} to {inner_high:g}; the segmentation is less reliable"
    ]


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
