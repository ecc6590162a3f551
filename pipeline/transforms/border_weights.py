"""How much each voxel counts in training: class balance, and more between objects that nearly touch.

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
    """Adds `weight` (1, X, Y, Z) float32, on the grid of the label, with distances in the mm of its affine.

    Args:
        keys: of the label, (1, X, Y, Z) channel numbers.
        weight: of the border term.
        sigma_mm: how far apart two objects may be to count as near.
    """

    def __init__(self, keys: KeysCollection, weight: float, sigma_mm: float) -> None:
        super().__init__(keys)
        self.weight, self.sigma_mm = weight, sigma_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        label: MetaTensor = case[self.keys[0]]
        spacing = np.linalg.norm(np.asarray(label.affine, dtype=np.float64)[:3, :3], axis=0)
        classes = np.rint(label.as_tensor().numpy()[0]).astype(np.int64)
        weights = class_weights(classes) + border_weights(
            classes, spacing.tolist(), self.weight, self.sigma_mm
        )
        case[WEIGHT] = MetaTensor(
            torch.from_numpy(weights.astype(np.float32))[None], meta=label.meta.copy()
        )
        return case


def class_weights(classes: Array) -> NDArray[np.float64]:
    """A weight a voxel that gives all classes present the same sum; the mean over the voxels is 1.

    Args:
        classes: whole numbers, of any shape.
    """
    values, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    balanced: NDArray[np.float64] = (classes.size / (len(values) * counts))[inverse].reshape(
        classes.shape
    )
    return balanced


def border_weights(
    classes: Array, spacing: Sequence[float], weight: float, sigma: float
) -> NDArray[np.float64]:
    """The border term weight · exp(−(d1 + d2)² / (2 sigma²)), d1 and d2 the distances to the two nearest objects.

    An object is a connected part of one class other than 0 (voxels that share a face); distances run between voxel centres, so
    d1 is 0 inside of an object. Where there are fewer than two objects the term is 0.

    Args:
        classes: whole numbers, 2D or 3D.
        spacing: along each axis; distances and sigma have its unit (mm).
    """
    nearest = np.full((2, *classes.shape), np.inf)
    for value in np.unique(classes[classes != 0]):
        parts, count = ndimage.label(classes == value)
        for number in range(1, count + 1):
            distance = ndimage.distance_transform_edt(parts != number, sampling=spacing)
            nearest[1] = np.minimum(nearest[1], np.maximum(nearest[0], distance))
            nearest[0] = np.minimum(nearest[0], distance)
    term: NDArray[np.float64] = weight * np.exp(-((nearest[0] + nearest[1]) ** 2) / (2 * sigma**2))
    return term
