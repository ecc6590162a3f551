"""Images that MONAI's own loading has left in memory: tensors and arrays, as nibabel images.

MONAI Label and MONAI Deploy hand over such images in place of paths. In the order of their axes the
channel may be missing, the first or the last, which only their `meta` or their sizes tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.spatialimages import SpatialImage

from pipeline.errors import VolumeError
from pipeline.types import Affine, Array, ImageSource

NO_ORIENTATION = (
    "the image in memory has no orientation: its voxels count as 1 mm along R, A and S, and left "
    "and right may be swapped"
)
LPS = "LPS"  # value of MONAI's `SpaceKeys` for world coordinates of ITK
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_in_memory(source: Any) -> bool:
    """Return whether a source is a tensor or an array."""
    return isinstance(source, np.ndarray) or hasattr(source, "detach")


def has_orientation(source: Any) -> bool:
    """Return whether an array has an affine that is not MONAI's default, the identity."""
    return not np.array_equal(_affine(source), np.eye(4))


def images_in_memory(
    sources: Sequence[ImageSource], channels: int | None = None
) -> list[ImageSource]:
    """Return the sources with each tensor or array replaced by one nibabel image per channel.

    Args:
        sources: of one case; those that are neither tensors nor arrays stay as they are.
        channels: number of channels of the model; None if it is not known.

    Raises:
        VolumeError: a tensor has neither three axes nor four of which one is that of the channels.
    """
    replaced: list[ImageSource] = []
    for source in sources:
        if not is_in_memory(source):
            replaced.append(source)
            continue
        affine = _affine(source)
        for channel in _channels(source, channels):
            replaced.append(SpatialImage(channel, affine))
    return replaced


def _affine(source: Any) -> Affine:
    """Return the affine of a tensor or an array, voxel → RAS+ world in mm."""
    affine: Affine = np.asarray(getattr(source, "affine", np.eye(4)), dtype=np.float64)
    if _meta(source).get("space") == LPS:
        return LPS_TO_RAS @ affine
    return affine


def _channels(source: Any, channels: int | None) -> list[Array]:
    """Return the channels (X, Y, Z) of a tensor or an array."""
    array: Array = source if isinstance(source, np.ndarray) else source.detach().cpu().numpy()
    if array.ndim == 3:
        return [array]
    first, last = _channel_axis(array.shape, _meta(source).get("spatial_shape"), channels)
    if array.ndim != 4 or first == last:
        raise VolumeError(
            f"the image in memory has shape {array.shape}, expected (X, Y, Z) or (C, X, Y, Z)"
            + (f" with {channels} channels" if channels else "")
        )
    return list(array) if first else list(np.moveaxis(array, -1, 0))


def _channel_axis(
    shape: tuple[int, ...], spatial_shape: Any, channels: int | None
) -> tuple[bool, bool]:
    """Return whether the first axis and whether the last axis is that of the channels.

    Args:
        shape: of the array.
        spatial_shape: from MONAI's `meta`, which tells it for most images; None without.
        channels: number of channels of the model, which tells it for the others.
    """
    size = () if spatial_shape is None else tuple(int(n) for n in np.ravel(spatial_shape))
    if (shape[1:] == size) != (shape[:-1] == size):
        return shape[1:] == size, shape[:-1] == size
    if channels is None or shape[0] == shape[-1] == channels:
        return True, False  # MONAI's transforms put the channels first
    return shape[0] == channels, shape[-1] == channels


def _meta(source: Any) -> dict[str, Any]:
    meta: dict[str, Any] = getattr(source, "meta", {})
    return meta
