"""Whether a volume that was read can be segmented, and what is doubtful about it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from pipeline.errors import VolumeError
from pipeline.types import Affine, Array

MAX_NONFINITE = 0.01  # fraction of voxels that may be NaN or infinite and are then replaced
SPACING_MM = (
    0.05,
    20.0,
)  # outside of this a header is wrong (metres, micrometres, a unit never set)
MAX_SHEAR = 0.01  # cosine of the angle between two axes; float32 headers stay below 1e-4
LABEL_VALUES = 512  # a label map has at most so many different values
LABEL_EQUAL = 0.6  # of neighbouring voxels above 0, the fraction that are equal in a label map; images stay under .3


class CheckVolumed(MapTransform):
    """Refuses volumes that cannot be segmented; replaces a few bad voxels and adds what is doubtful to `meta["warnings"]`.

    Args:
        keys: of images (not of labels), (C, X, Y, Z) MetaTensors from `ReadVolumed`.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            lines = [image.meta["warnings"]]
            for source, channel in zip(image.meta["sources"], image.as_tensor(), strict=True):
                try:
                    check_affine(np.asarray(image.affine, dtype=np.float64))
                    lines += check_values(channel)
                except VolumeError as error:
                    raise VolumeError(f"{source or key}: {error}") from error
            image.meta["warnings"] = "\n".join(filter(None, lines))
        return case


def check_affine(affine: Affine) -> None:
    """Nothing, if voxels under this affine are boxes of a plausible size.

    Raises:
        VolumeError: zero or absurd spacing, singular or sheared axes, or numbers that are not finite.
    """
    if not np.isfinite(affine).all():
        raise VolumeError(
            "the affine holds NaN or infinity, expected finite numbers; set the file's sform or qform"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    text = " × ".join(f"{mm:.4g}" for mm in spacing)
    if (spacing == 0).any():
        raise VolumeError(
            f"the spacing is {text} mm, expected above 0; set the file's sform or qform"
        )
    if (spacing < SPACING_MM[0]).any() or (spacing > SPACING_MM[1]).any():
        raise VolumeError(
            f"the spacing is {text} mm, expected {SPACING_MM[0]} to {SPACING_MM[1]}; is the header in metres or micrometres?"
        )
    axes = affine[:3, :3] / spacing
    if abs(np.linalg.det(axes)) < 1e-3:
        raise VolumeError(
            "the affine is singular: its axes lie in one plane, expected three directions"
        )
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > MAX_SHEAR:
        degrees = np.degrees(np.arccos(min(shear, 1.0)))
        raise VolumeError(
            f"the affine is sheared: two axes meet at {degrees:.1f}°, expected 90°; resample the file to a straight grid first"
        )


def check_values(channel: torch.Tensor) -> list[str]:
    """What is doubtful about one channel's values, after mending it in place.

    Args:
        channel: (X, Y, Z) float32; a few voxels that are NaN or infinite become the smallest finite value.

    Raises:
        VolumeError: no voxels, too many that are not finite, one value throughout, or the look of a label map.
    """
    if channel.numel() == 0:
        raise VolumeError(f"the volume has shape {tuple(channel.shape)}: it holds no voxels")
    lines = _replace_nonfinite(channel)
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        word = "is empty: every voxel is 0" if low == 0 else f"is constant: every voxel is {low:g}"
        raise VolumeError(f"the volume {word}; expected an image")
    if looks_like_labels(channel.numpy()):
        raise VolumeError(
            "the volume looks like a label map (few whole numbers, in even patches), expected an image; was a mask or a "
            "segmentation given by mistake?"
        )
    return lines


def looks_like_labels(array: Array) -> bool:
    """Whether an array is piecewise constant with few whole values, as label maps and masks are and images are not."""
    sample = array[:: max(1, array.shape[0] // 64)]
    if not np.array_equal(sample, np.rint(sample)) or len(np.unique(sample)) > LABEL_VALUES:
        return False
    first, second = array[:, :-1], array[:, 1:]
    inside = (first != 0) & (second != 0)
    return bool(inside.any()) and float((first == second)[inside].mean()) > LABEL_EQUAL


def _replace_nonfinite(channel: torch.Tensor) -> list[str]:
    bad = ~torch.isfinite(channel)
    count = int(bad.sum())
    if not count:
        return []
    fraction = count / channel.numel()
    if fraction > MAX_NONFINITE:
        raise VolumeError(
            f"{count} voxels ({fraction:.1%}) are NaN or infinite, expected at most {MAX_NONFINITE:.0%}; where they mark the "
            "background, set them to 0 first"
        )
    channel[bad] = channel[~bad].min()
    return [f"{count} voxels were NaN or infinite and were set to the smallest value"]
