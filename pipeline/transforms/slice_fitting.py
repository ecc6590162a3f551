"""A volume cut to what it shows, its slices brought to one square size.

It is the way in of the FLAIR abnormality U-Net, step by step: the dark is set to 0, what is left is cut out, slices are padded
to squares and resized with quadratic splines. The affine follows, so that a label map finds its way back by itself.

References:
    Buda, Saha, Mazurowski: Association of genomic subtypes of lower-grade gliomas with shape features automatically extracted
    by a deep learning algorithm. Computers in Biology and Medicine 109 (2019), doi:10.1016/j.compbiomed.2019.05.002.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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

SPLINE_ORDER = 2


class CropResizeSlicesd(MapTransform):
    """Sets the dark of `image` to 0, cuts `image` and `label` to what is left, and resizes their slices.

    Channels are first brought to a largest value of 1, so that one floor means the same for all of them.

    Args:
        keys: the image first, (C, X, Y, Z) MetaTensors; a label is allowed to be absent.
        fit: floor, size and axis.
        orientation: the axis codes of the grid at hand.
    """

    def __init__(self, keys: KeysCollection, fit: CropResize, orientation: str) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.fit = fit
        self.axis = [AXES[code] for code in orientation].index(AXES[fit.axis])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        first = self.keys[0]
        image: MetaTensor = case[first]
        values = above_floor(image.as_tensor().numpy(), self.fit.floor)
        low, high = nonzero_box(values)
        case[first] = self._fitted(image, values, low, high, order=SPLINE_ORDER)
        for key in self.keys[1:]:
            if key in case:
                case[key] = self._fitted(
                    case[key], case[key].as_tensor().numpy(), low, high, order=0
                )
        return case

    def _fitted(
        self, tensor: MetaTensor, values: Array, low: Array, high: Array, *, order: int
    ) -> MetaTensor:
        """One volume through cut, pad and resize, with the affine that the result has."""
        cut = values[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        square, before = padded_square(cut, self.axis)
        resized = resized_slices(square, self.axis, self.fit.slice_size, order=order)
        scale = np.array(square.shape[1:]) / np.array(resized.shape[1:])
        step: Affine = np.diag([*scale, 1.0])
        step[:3, 3] = low - before + (scale - 1) / 2
        affine = np.asarray(tensor.affine, dtype=np.float64) @ step
        meta = {key: value for key, value in tensor.meta.items() if key != "affine"}
        return MetaTensor(torch.from_numpy(resized), affine=torch.from_numpy(affine), meta=meta)


def above_floor(image: Array, floor: float) -> Array:
    """Each channel of (C, X, Y, Z) divided by its largest value, values below `floor` set to 0.

    Raises:
        VolumeError: a channel without a value above 0.
    """
    highest = image.max(axis=(1, 2, 3), keepdims=True)
    if (highest <= 0).any():
        raise VolumeError(
            "a channel has no value above 0, expected magnitudes: the box of what is bright cannot be found"
        )
    image = image / highest
    return np.where(image < floor, 0, image).astype(np.float32)


def nonzero_box(image: Array) -> tuple[Array, Array]:
    """The first voxel, and the one after the last, that is not 0 in any channel of (C, X, Y, Z), along each axis."""
    filled = (image != 0).any(axis=0)
    ends = [
        np.flatnonzero(filled.any(axis=tuple(i for i in range(3) if i != axis)))[[0, -1]]
        for axis in range(3)
    ]
    return np.array([low for low, _ in ends]), np.array([high + 1 for _, high in ends])


def padded_square(image: Array, axis: int) -> tuple[Array, Array]:
    """(C, X, Y, Z) with slices along `axis` padded by 0 to squares, and how many voxels were put before each axis."""
    size = np.array(image.shape[1:])
    missing = np.delete(size, axis).max() - size
    missing[axis] = 0
    before = missing // 2
    pads = [(0, 0), *((int(b), int(m - b)) for b, m in zip(before, missing, strict=True))]
    return np.pad(image, pads), before


def resized_slices(image: Array, axis: int, size: int, *, order: int) -> Array:
    """(C, X, Y, Z) with slices along `axis` resized to size × size by splines of an order; edges of the picture stay edges."""
    zoom: Sequence[float] = [1.0 if i == axis else size / n for i, n in enumerate(image.shape[1:])]
    channels = [
        ndimage.zoom(
            channel.astype(np.float64), zoom, order=order, mode="grid-constant", grid_mode=True
        )
        for channel in image
    ]
    return np.stack(
        [np.clip(new, old.min(), old.max()) for new, old in zip(channels, image, strict=True)]
    ).astype(np.float32)


class ClippedZscored(MapTransform):
    """Clips a volume at two percentiles of all its channels together, then brings each channel to mean 0 and deviation 1."""

    def __init__(self, keys: KeysCollection, lower: float, upper: float) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            values = case[key].as_tensor().numpy().astype(np.float64)
            clipped = np.clip(values, *np.percentile(values, [self.lower, self.upper]))
            mean, deviation = (f(clipped, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.std))
            scaled = (clipped - mean) / np.where(deviation > 0, deviation, 1)
            case[key] = case[key].clone().copy_(torch.from_numpy(scaled))
        return case
