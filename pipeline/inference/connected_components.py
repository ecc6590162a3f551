"""Cleaning up a label map on the file's grid: connected components, holes, the cropped region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from pipeline.config import ALL, EACH, Spec
from pipeline.inference.boxes import widen_box
from pipeline.types import Affine, Array

# voxels by which a position may lie beyond the outermost voxels and still count as inside them:
# affines come from files and are rounded
OUTSIDE_TOLERANCE = 0.01


def keep_components(index: torch.Tensor, image: MetaTensor, spec: Spec) -> torch.Tensor:
    """Return class numbers (1, X, Y, Z) with only the components that the spec keeps.

    Voxels outside the region that `spec.crop_resize` cut out become background, and smaller
    components of the classes in `spec.largest_component` are removed.

    Args:
        index: (1, X, Y, Z) class numbers, on the grid of the file that `image` was read from.
        image: (C, x, y, z) on the network's grid, with `labels_affine` in its `meta`.
        spec: gives `crop_resize` and `largest_component`.
    """
    labels = index[0]
    if spec.crop_resize is not None:
        own_affine = np.asarray(image.affine, dtype=np.float64)
        labels_affine = np.asarray(image.meta["labels_affine"], dtype=np.float64)
        outside = outside_grid(image.shape[1:], own_affine, labels_affine, labels.shape)
        labels = labels.masked_fill(outside.to(labels.device), 0)
    if ALL in spec.largest_component:
        largest = largest_components((labels > 0).to(torch.uint8))
        labels = fill_holes(labels * largest.to(labels.dtype))
    names = [name for name in spec.largest_component if name != ALL]
    if EACH in names:
        labels = largest_components(labels)
    elif names:
        all_names = list(spec.labels)
        labels = largest_components(labels, [all_names.index(name) for name in names])
    return labels[None]


def largest_components(index: torch.Tensor, numbers: Sequence[int] | None = None) -> torch.Tensor:
    """Return class numbers (X, Y, Z) with only the largest connected component of classes.

    Voxels that share a face are connected. A smaller component takes the class of the nearest
    voxel around it: background where it lies alone, another structure where it lies within that
    structure, so that no hole is left.

    Args:
        index: (X, Y, Z) class numbers.
        numbers: the classes to clean up; None for all but background.
    """
    labels = index.cpu().numpy().copy()
    removed = np.zeros(labels.shape, dtype=np.uint8)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or (numbers is not None and number not in numbers):
            continue
        components, count = ndimage.label(labels[box] == number)
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]  # without what is not of this class
            removed[box] |= (components > 0) & (components != 1 + sizes.argmax())
    _take_nearest_label(labels, removed)
    return torch.from_numpy(labels).to(index.device)


def fill_holes(index: torch.Tensor) -> torch.Tensor:
    """Return class numbers (X, Y, Z) in which holes have the class of the nearest structure.

    A hole is background from which no path of voxels that share faces leads out of the box around
    all structures.
    """
    labels = index.cpu().numpy().copy()
    boxes = ndimage.find_objects((labels > 0).astype(np.uint8))
    if boxes:
        components, _ = ndimage.label(labels[boxes[0]] == 0)
        faces = []
        for axis in range(3):
            faces += [components.take(0, axis=axis).ravel(), components.take(-1, axis=axis).ravel()]
        is_hole = ~np.isin(np.arange(components.max() + 1), np.concatenate(faces))
        is_hole[0] = False  # the structures
        holes = np.zeros(labels.shape, dtype=np.uint8)
        holes[boxes[0]] = is_hole[components]
        _take_nearest_label(labels, holes)
    return torch.from_numpy(labels).to(index.device)


def _take_nearest_label(labels: Array, replaced: Array) -> None:
    """Give the voxels that are `replaced` the label of the nearest voxel that is not, in place."""
    if not replaced.any():
        return
    # one component at a time: a distance transform of its box is much cheaper than of the volume
    components, _ = ndimage.label(replaced)
    for box in ndimage.find_objects(components):
        wide = widen_box(box, labels.shape)
        nearest = ndimage.distance_transform_edt(
            replaced[wide], return_distances=False, return_indices=True
        )
        labels[wide] = labels[wide][tuple(nearest)]


def outside_grid(
    shape: Sequence[int], affine: Affine, target_affine: Affine, target_shape: Sequence[int]
) -> torch.Tensor:
    """Return which voxels of a target grid lie outside another grid, (X', Y', Z') bool.

    Args:
        shape: of the other grid, voxels.
        affine: voxel → world of the other grid, mm.
        target_affine: voxel → world of the target grid, mm.
        target_shape: (X', Y', Z') of the target grid, voxels.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    outside = torch.zeros(tuple(target_shape), dtype=torch.bool)
    for axis, size in enumerate(shape):
        # the position along this axis is a sum of one term per target axis, so that only one
        # array as large as the volume is made
        x, y, z = (
            torch.from_numpy(matrix[axis, dim] * np.arange(n)).float()
            for dim, n in enumerate(target_shape)
        )
        position = (x[:, None, None] + y[None, :, None] + z) + float(matrix[axis, 3])
        outside |= position < -0.5 - OUTSIDE_TOLERANCE
        outside |= position > size - 0.5 + OUTSIDE_TOLERANCE
    return outside
