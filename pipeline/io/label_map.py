"""Reading label maps: whole numbers on the grid of their image, with the values that are known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import GeometryError, VolumeError
from pipeline.io.formats import printable
from pipeline.io.image import SAME_GRID_MM, Image, corner_distance
from pipeline.io.reader import read
from pipeline.types import Affine, Array, PathOrStr

MAX_LABEL_VALUES = 4096  # a file with more values is an image
MAX_COUNTED_RANGE = 2**20  # of the values, for which one count each is held
NAMED_VALUES = 5  # unknown values that a message names


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelImage:
    """A label map, as read.

    Attributes:
        array: (X, Y, Z) int64 or int32 label values.
        affine: voxel index → RAS+ world, mm.
        voxels: value → number of its voxels, the background, 0, included where it occurs.
    """

    array: Array
    affine: Affine
    voxels: dict[int, int]


def read_label_map(path: PathOrStr, values: Collection[int] | None = None) -> LabelImage:
    """Read a label map. `plan` and `evaluate` read with it, so that they accept the same files.

    Args:
        path: the file.
        values: the values that it may have, the background and the ignore label among them; None
            for any whole numbers.

    Raises:
        ReadError: the file is missing, damaged or of an unknown format.
        VolumeError: it holds fractions, nan or inf, values that are not in `values`, or more than
            `MAX_LABEL_VALUES` different ones.
    """
    image = read(str(path))
    name = printable(path)
    array = _whole_numbers(np.asarray(image.array), name)
    voxels = _count_values(array, name)
    if values is not None:
        _check_known(list(voxels), values, name)
    return LabelImage(array=array, affine=image.affine, voxels=voxels)


def check_label_grid(path: PathOrStr, label: LabelImage, image: Image) -> None:
    """Check that a label map is on the grid of its image.

    Args:
        path: of the label map, for the message.
        label: the label map.
        image: its image, or another label map on the image's grid.

    Raises:
        GeometryError: shapes differ, or a corner lies more than `SAME_GRID_MM` away.
    """
    name = printable(path)
    if label.array.shape != image.array.shape:
        raise GeometryError(
            f"{name}: has shape {label.array.shape}, its image {image.array.shape}; "
            "expected the same grid"
        )
    distance = corner_distance(image.affine, label.affine, image.array.shape)
    if distance > SAME_GRID_MM:
        raise GeometryError(
            f"{name}: lies up to {distance:.2f} mm from its image, expected the same grid"
        )


def _whole_numbers(array: Array, name: str) -> Array:
    """Return label values as integers.

    Raises:
        VolumeError: some are fractions, nan or infinite.
    """
    if array.dtype.kind == "f":
        not_finite = int(np.count_nonzero(~np.isfinite(array)))
        if not_finite:
            raise VolumeError(
                f"{name}: {not_finite} voxels are not a number (nan or infinite), expected whole "
                "numbers for labels; write 0 for the background"
            )
        fractions = array[array != np.rint(array)]
        if len(fractions):
            raise VolumeError(
                f"{name}: expected whole numbers for labels, "
                f"got {len(np.unique(array))} values such as {fractions[0]:g}"
            )
    largest = max(abs(int(array.min())), abs(int(array.max())))
    whole: Array = array.astype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    return whole


def _count_values(array: Array, name: str) -> dict[int, int]:
    """Return value → number of its voxels.

    Raises:
        VolumeError: there are too many values for labels.
    """
    low, high = int(array.min()), int(array.max())
    if high - low < MAX_COUNTED_RANGE:  # counting is much faster than the sorting of np.unique
        all_counts = np.bincount((array - low).ravel())
        found = np.flatnonzero(all_counts)
        counts, found = all_counts[found], found + low
    else:
        found, counts = np.unique(array, return_counts=True)
    if len(found) > MAX_LABEL_VALUES:
        raise VolumeError(
            f"{name}: expected labels, got {len(found)} different values; is this an image?"
        )
    return {int(value): int(count) for value, count in zip(found, counts, strict=True)}


def _check_known(found: Sequence[int], values: Collection[int], name: str) -> None:
    unknown = [str(value) for value in found if value not in values]
    if unknown:
        more = f" and {len(unknown) - NAMED_VALUES} more" if len(unknown) > NAMED_VALUES else ""
        raise VolumeError(
            f"{name}: has the values {', '.join(unknown[:NAMED_VALUES])}{more}, "
            f"expected only {sorted(values)}"
        )
