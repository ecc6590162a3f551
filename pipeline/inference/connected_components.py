"""Postprocessing of a label map: largest connected components, holes, the cropped region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from pipeline.config import ALL, EACH, Spec
from pipeline.inference.boxes import widen_box
from pipeline.types import Affine, Array

# voxels; a position that is less than this beyond a grid's edge counts as inside, because affines
# in files are rounded
OUTSIDE_TOLERANCE = 0.01


def keep_components(index: torch.Tensor, image: MetaTensor, spec: Spec) -> torch.Tensor:
    """Return class numbers (1, X, Y, Z) with the postprocessing that the spec asks for.

    Voxels outside the region that `spec.crop_resize` cropped the image to become background. Of the
    classes in `spec.largest_component`, only the largest connected component is kept; `all` stands
    for all structures together, and then holes inside them are filled.

    Args:
        index: (1, X, Y, Z) class numbers on the grid of the label map.
        image: (C, x, y, z) image on the network's grid; its `meta` has the `labels_affine`.
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
    """Return class numbers (X, Y, Z) in which each class is a single connected component.

    Voxels that share a face are connected. Of each class the largest component is kept. The voxels
    of smaller ones get the class of the nearest voxel outside them: background if they are
    isolated, but the surrounding structure if they lie inside one, so that they leave no hole.

    Args:
        index: (X, Y, Z) class numbers.
        numbers: numbers of the classes that are changed; None for all but the background.
    """
    labels = index.cpu().numpy().copy()
    removed = np.zeros(labels.shape, dtype=np.uint8)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or (numbers is not None and number not in numbers):
            continue
        components, count = ndimage.label(labels[box] == number)
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]  # component 0 is all other classes
            removed[box] |= (components > 0) & (components != 1 + sizes.argmax())
    _take_nearest_label(labels, removed)
    return torch.from_numpy(labels).to(index.device)


def fill_holes(index: torch.Tensor) -> torch.Tensor:
    """Return class numbers (X, Y, Z) in which holes have the class of the nearest structure.

    A hole is a connected component of the background (voxels that share a face) that does not reach
    a face of the bounding box around all structures.

    Args:
        index: (X, Y, Z) class numbers.
    """
    labels = index.cpu().numpy().copy()
    boxes = ndimage.find_objects((labels > 0).astype(np.uint8))
    if boxes:
        components, _ = ndimage.label(labels[boxes[0]] == 0)
        faces = []
        for axis in range(3):
            faces += [components.take(0, axis=axis).ravel(), components.take(-1, axis=axis).ravel()]
        is_hole = ~np.isin(np.arange(components.max() + 1), np.concatenate(faces))
        is_hole[0] = False  # component 0 is the structures
        holes = np.zeros(labels.shape, dtype=np.uint8)
        holes[boxes[0]] = is_hole[components]
        _take_nearest_label(labels, holes)
    return torch.from_numpy(labels).to(index.device)


def _take_nearest_label(labels: Array, replaced: Array) -> None:
    """Give each voxel of a mask the label of the nearest voxel outside the mask, in place.

    Args:
        labels: (X, Y, Z) class numbers, changed in place.
        replaced: (X, Y, Z) mask of the voxels to change.
    """
    if not replaced.any():
        return
    # one component at a time: distance transforms of small boxes are much faster than of the volume
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
        shape: size of the other grid, voxels.
        affine: affine of the other grid, voxel → world, mm.
        target_affine: affine of the target grid, voxel → world, mm.
        target_shape: size (X', Y', Z') of the target grid, voxels.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    outside = torch.zeros(tuple(target_shape), dtype=torch.bool)
    for axis, size in enumerate(shape):
        # the position along this axis is the sum of a term for each target axis: broadcasting makes
        # a single array as large as the volume
        x, y, z = (
            torch.from_numpy(matrix[axis, dim] * np.arange(n)).float()
            for dim, n in enumerate(target_shape)
        )
        position = (x[:, None, None] + y[None, :, None] + z) + float(matrix[axis, 3])
        outside |= position < -0.5 - OUTSIDE_TOLERANCE
        outside |= position > size - 0.5 + OUTSIDE_TOLERANCE
    return outside
