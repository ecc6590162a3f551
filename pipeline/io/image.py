"""One channel of a case in memory, and the checks that all readers share."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from pipeline.errors import GeometryError, VolumeError
from pipeline.types import Affine, Array, ImageSource

SAME_GRID_MM = 0.01  # float32 headers round: corners of images on one grid may differ by this much


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One channel, as read.

    Attributes:
        array: (X, Y, Z), scaled by the header's slope and intercept.
        affine: voxel index → RAS+ world, mm.
        header: the bytes of the NIfTI header (348 or 540), empty for other formats. A label map on
            the same grid is written with this header.
        warnings: what is doubtful about the file, one sentence each.
    """

    array: Array
    affine: Affine
    header: bytes = b""
    warnings: tuple[str, ...] = ()


def corner_distance(first: Affine, second: Affine, shape: tuple[int, ...]) -> float:
    """Return the largest distance between a volume's corner voxels under two affines, mm.

    Returns:
        infinity where one of the affines is not finite.
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("inf")
    last = np.array(shape[:3]) - 1
    corners = [[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)]
    offsets = (np.array(corners) @ (first - second).T)[:, :3]
    return float(np.linalg.norm(offsets, axis=1).max())


def check_same_grid(
    first_name: ImageSource, first: Image, other_name: ImageSource, other: Image
) -> None:
    """Check that two channels have one shape and one affine.

    Args:
        first_name: source of the first channel, for the message.
        first: the first channel.
        other_name: source of the other channel, for the message.
        other: the other channel.

    Raises:
        GeometryError: they differ; the message names both.
    """
    if first.array.shape != other.array.shape:
        raise GeometryError(
            f"{other_name} has shape {other.array.shape}, {first_name} {first.array.shape}: "
            "channels must share one grid"
        )
    distance = corner_distance(first.affine, other.affine, first.array.shape)
    if distance > SAME_GRID_MM:
        raise GeometryError(
            f"{other_name} and {first_name} lie up to {distance:.2f} mm apart: "
            "resample the channels to one grid first"
        )


def select_volume(array: Array, name: str, volume: int | None) -> Array:
    """Return one three-dimensional volume of a file's array.

    Args:
        array: (X, Y, Z) or (X, Y, Z, ...) with the volumes along all further axes.
        name: of the file, for the message.
        volume: number of the volume, from 0; None accepts arrays with a single volume only.

    Raises:
        VolumeError: too few dimensions, several volumes and no number, or no volume of that number.
    """
    spatial, extra = array.shape[:3], array.shape[3:]
    if len(spatial) < 3:
        raise VolumeError(
            f"{name}: has shape {array.shape}, expected three dimensions; "
            "a single slice needs a third axis of 1"
        )
    count = prod(extra)
    if count == 1 and volume in (None, 0):
        return array.reshape(spatial)
    if volume is None:
        raise VolumeError(
            f"{name}: holds {count} volumes, expected one; "
            f"pick one with --volume T (0 to {count - 1})"
        )
    if not 0 <= volume < count:
        raise VolumeError(
            f"{name}: --volume {volume} asked for, the file holds volumes 0 to {count - 1}"
        )
    # volumes are numbered as they are stored: the first of the further axes runs fastest
    return array.reshape(*spatial, count, order="F")[..., volume]
