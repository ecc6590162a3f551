"""Weights of voxels in the loss: balanced classes, and more weight between close objects.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28, equation 2.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import Array

WEIGHT = "weight"


class BorderWeightd(MapTransform):
    """Add `weight` to a case: the weight of each voxel in the loss, (1, X, Y, Z) float32.

    It is the sum of `class_weights` and `border_weights`. Distances are in mm, by the label's
    affine.

    Args:
        keys: key of the label, a MetaTensor (1, X, Y, Z) of channel numbers, negative for voxels
            that do not count: they have the weight 0 and belong to no object.
        weight: factor on the border term.
        sigma_mm: scale on which the border term falls with the distance from two objects, mm.
    """

    def __init__(self, keys: KeysCollection, weight: float, sigma_mm: float) -> None:
        super().__init__(keys)
        self.weight, self.sigma_mm = weight, sigma_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        label: MetaTensor = case[self.keys[0]]
        spacing = np.linalg.norm(np.asarray(label.affine, dtype=np.float64)[:3, :3], axis=0)
        classes = np.rint(label.as_tensor().numpy()[0]).astype(np.int64)
        counted = classes >= 0
        weights = border_weights(
            np.where(counted, classes, 0), spacing.tolist(), self.weight, self.sigma_mm
        )
        weights[counted] += class_weights(classes[counted])
        weights[~counted] = 0
        case[WEIGHT] = MetaTensor(
            torch.from_numpy(weights.astype(np.float32))[None], meta=label.meta.copy()
        )
        return case


def class_weights(classes: Array) -> NDArray[np.float64]:
    """Return a weight for each voxel, such that the weights of each class have the same sum.

    Only classes that occur in the array count. The mean weight is 1.

    Args:
        classes: class numbers, an array of any shape.
    """
    values, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    weights = classes.size / (len(values) * counts)
    balanced: NDArray[np.float64] = weights[inverse].reshape(classes.shape)
    return balanced


def border_weights(
    classes: Array, spacing: Sequence[float], weight: float, sigma: float
) -> NDArray[np.float64]:
    """Return the border term weight · exp(−(d1 + d2)² / (2 sigma²)) of each voxel.

    d1 and d2 are the distances to the two nearest objects, where an object is a connected part
    (voxels that share a face) of one class other than 0. Distances run between voxel centres, so
    d1 is 0 inside an object. With fewer than two objects the term is 0.

    Args:
        classes: class numbers, a 2D or 3D array.
        spacing: voxel size along each axis, mm.
        weight: factor on the term, its largest value.
        sigma: scale on which the term falls, mm.
    """
    nearest, second = np.full((2, *classes.shape), np.inf)
    for value in np.unique(classes[classes != 0]):
        parts, count = ndimage.label(classes == value)
        for number in range(1, count + 1):
            distance = ndimage.distance_transform_edt(parts != number, sampling=spacing)
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
    term: NDArray[np.float64] = weight * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    return term
