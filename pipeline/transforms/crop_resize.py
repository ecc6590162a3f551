"""Cropping a volume to its bright part and resizing its slices to one square size.

These are the steps that the FLAIR abnormality U-Net was trained with: values below a fraction of
the maximum are set to 0, the volume is cropped to the rest, slices are padded to squares and
resized with quadratic splines. The affine follows each step, so that the inverse resampling of a
label map needs nothing else.

References:
    Buda, Saha, Mazurowski: Association of genomic subtypes of lower-grade gliomas with shape
    features automatically extracted by a deep learning algorithm. Computers in Biology and
    Medicine 109 (2019), doi:10.1016/j.compbiomed.2019.05.002.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from pipeline.config import AXES, CropResize
from pipeline.errors import VolumeError
from pipeline.types import Affine, Array

IMAGE_SPLINE_ORDER = 2  # as in the published code
LABEL_SPLINE_ORDER = 0  # nearest neighbour


@dataclass(frozen=True, slots=True)
class Box:
    """A box of voxels.

    Attributes:
        start: (3,) first voxel along each axis.
        stop: (3,) first voxel after the box along each axis.
    """

    start: Array
    stop: Array

    def of(self, array: Array) -> Array:
        """Return the part of an array (C, X, Y, Z) that is inside the box."""
        x, y, z = (slice(*ends) for ends in zip(self.start, self.stop, strict=True))
        cropped: Array = array[:, x, y, z]
        return cropped


class CropResizeSlicesd(MapTransform):
    """Crop image and label to the bright part of the image, and resize their slices.

    Each channel of the image is divided by its largest value, and values below a threshold are set
    to 0. Image and label are cropped to the remaining voxels, slices are padded to squares, and
    these are resized.

    Args:
        keys: keys of MetaTensors (C, X, Y, Z), the image first; missing labels are allowed.
        settings: gives the threshold, the size of the slices and their axis.
        orientation: axis codes of the input, such as `RAS`.
    """

    def __init__(self, keys: KeysCollection, settings: CropResize, orientation: str) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.settings = settings
        self.axis = [AXES[code] for code in orientation].index(AXES[settings.axis])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        image_key, *label_keys = self.keys
        image: MetaTensor = case[image_key]
        values = zero_below(image.as_tensor().numpy(), self.settings.floor)
        box = nonzero_box(values)
        case[image_key] = self._crop_resize(image, values, box, order=IMAGE_SPLINE_ORDER)
        for key in label_keys:
            if key in case:
                label: MetaTensor = case[key]
                case[key] = self._crop_resize(
                    label, label.as_tensor().numpy(), box, order=LABEL_SPLINE_ORDER
                )
        return case

    def _crop_resize(
        self, tensor: MetaTensor, values: Array, box: Box, *, order: int
    ) -> MetaTensor:
        """Return values cropped, padded and resized, with the affine of the new grid.

        Args:
            tensor: MetaTensor with the affine and the other metadata of the values.
            values: (C, X, Y, Z) values.
            box: part that is kept.
            order: order of the splines, 0 for nearest neighbours.
        """
        square, before = pad_to_squares(box.of(values), self.axis)
        resized = resize_slices(square, self.axis, self.settings.slice_size, order=order)
        scale = np.array(square.shape[1:]) / np.array(resized.shape[1:])
        # New voxel → old voxel. The outer edges of the slices keep their place, so the centre of
        # the first voxel moves by half of the difference of the voxel sizes
        to_old: Affine = np.diag([*scale, 1.0])
        to_old[:3, 3] = box.start - before + (scale - 1) / 2
        affine = np.asarray(tensor.affine, dtype=np.float64) @ to_old
        meta = {key: value for key, value in tensor.meta.items() if key != "affine"}
        return MetaTensor(torch.from_numpy(resized), affine=torch.from_numpy(affine), meta=meta)


def zero_below(image: Array, floor: float) -> Array:
    """Return each channel divided by its largest value, with 0 for values below a threshold.

    Args:
        image: (C, X, Y, Z) image.
        floor: threshold, as a fraction of the channel's largest value.

    Raises:
        VolumeError: a channel has no value above 0.
    """
    highest = image.max(axis=(1, 2, 3), keepdims=True)
    if (highest <= 0).any():
        raise VolumeError(
            "a channel has no value above 0, expected magnitudes: the bright part to crop to "
            "cannot be found"
        )
    image = image / highest
    return np.where(image < floor, 0, image).astype(np.float32)


def nonzero_box(image: Array) -> Box:
    """Return the bounding box of the voxels of (C, X, Y, Z) that are not 0 in any channel."""
    (_, *ends) = ndimage.find_objects((image != 0).any(axis=0, keepdims=True).astype(np.uint8))[0]
    return Box(np.array([part.start for part in ends]), np.array([part.stop for part in ends]))


def pad_to_squares(image: Array, axis: int) -> tuple[Array, Array]:
    """Return an image whose slices are padded with 0, at both ends, to squares.

    Args:
        image: (C, X, Y, Z) image.
        axis: spatial axis, 0 to 2, along which the slices are stacked.

    Returns:
        The padded image, and the number of voxels added before the first one of each axis, (3,).
    """
    size = np.array(image.shape[1:])
    missing = np.delete(size, axis).max() - size
    missing[axis] = 0
    before = missing // 2
    pads = [(0, 0), *zip(before.tolist(), (missing - before).tolist(), strict=True)]
    return np.pad(image, pads), before


def resize_slices(image: Array, axis: int, size: int, *, order: int) -> Array:
    """Return an image whose slices are resized to size × size voxels by splines.

    The outer edges of the slices keep their place. Values are clipped to the range of their
    channel, because splines overshoot.

    Args:
        image: (C, X, Y, Z) image.
        axis: spatial axis, 0 to 2, along which the slices are stacked.
        size: new size of a slice, voxels.
        order: order of the splines, 0 for nearest neighbours.
    """
    zoom = [1.0 if i == axis else size / n for i, n in enumerate(image.shape[1:])]
    resized = []
    for channel in image:
        values = ndimage.zoom(
            channel.astype(np.float64), zoom, order=order, mode="grid-constant", grid_mode=True
        )
        resized.append(np.clip(values, channel.min(), channel.max()))
    return np.stack(resized).astype(np.float32)
