"""What is kept of a label map on the file's grid, where a spec says so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from pipeline.spec import Spec
from pipeline.types import Affine

OFF_GRID = 0.01  # voxels by which a position may lie beyond the outermost voxels and still count as in them


def kept(index: torch.Tensor, image: MetaTensor, spec: Spec) -> torch.Tensor:
    """Class numbers (1, X, Y, Z) without what lies beyond the part that was cut out, and without smaller parts of a class.

    Args:
        index: on the grid of the file that `image` came from.
        image: (C, x, y, z) on the network's grid, with `file_affine` in its `meta`.
        spec: says whether.
    """
    labels = index[0]
    if spec.fit is not None:
        own, target = (np.asarray(affine, dtype=np.float64) for affine in (image.affine, image.meta["file_affine"]))
        labels = labels.masked_fill(outside(image.shape[1:], own, target, labels.shape).to(labels.device), 0)
    if spec.largest_component == "each":
        labels = largest_components(labels)
    if spec.largest_component == "all":
        labels = labels * largest_components((labels > 0).to(torch.uint8)).to(labels.dtype)
    return labels[None]


def largest_components(index: torch.Tensor) -> torch.Tensor:
    """(X, Y, Z) class numbers with only the largest connected part of each class; voxels that share a face are connected."""
    kept = index.cpu().numpy().copy()
    for number in range(1, int(kept.max()) + 1):
        parts, count = ndimage.label(kept == number)
        if count > 1:
            sizes = np.bincount(parts.ravel())
            kept[(parts > 0) & (parts != 1 + sizes[1:].argmax())] = 0
    return torch.from_numpy(kept).to(index.device)


def outside(shape: Sequence[int], affine: Affine, target_affine: Affine, target_shape: Sequence[int]) -> torch.Tensor:
    """Which voxels (X', Y', Z') of a target grid lie beyond the voxels of another: where a part was cut out, background."""
    matrix = np.linalg.inv(affine) @ target_affine
    beyond = torch.zeros(tuple(target_shape), dtype=torch.bool)
    for axis, size in enumerate(shape):
        terms = [torch.from_numpy(matrix[axis, dim] * np.arange(n)).float() for dim, n in enumerate(target_shape)]
        place = (terms[0][:, None, None] + terms[1][None, :, None] + terms[2]) + float(matrix[axis, 3])
        beyond |= (place < -0.5 - OFF_GRID) | (place > size - 0.5 + OFF_GRID)
    return beyond
