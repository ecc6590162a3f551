"""What is kept of a label map on the file's grid, where a spec says so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from pipeline.config import ALL, EACH, Spec
from pipeline.types import Affine, Array

OFF_GRID = 0.01  # voxels by which a position may lie beyond the outermost voxels and still count as in them


def keep_components(index: torch.Tensor, image: MetaTensor, spec: Spec) -> torch.Tensor:
    """Class numbers (1, X, Y, Z) without what lies beyond the part that was cut out, and without smaller parts of a class.

    Args:
        index: on the grid of the file that `image` came from.
        image: (C, x, y, z) on the network's grid, with `labels_affine` in its `meta`.
        spec: says whether.
    """
    labels = index[0]
    if spec.crop_resize is not None:
        own, target = (
            np.asarray(affine, dtype=np.float64)
            for affine in (image.affine, image.meta["labels_affine"])
        )
        labels = labels.masked_fill(
            outside_grid(image.shape[1:], own, target, labels.shape).to(labels.device), 0
        )
    if ALL in spec.largest_component:
        labels = fill_holes(
            labels * largest_components((labels > 0).to(torch.uint8)).to(labels.dtype)
        )
    names = [name for name in spec.largest_component if name != ALL]
    if names:
        labels = largest_components(
            labels, None if EACH in names else [list(spec.labels).index(name) for name in names]
        )
    return labels[None]


def largest_components(index: torch.Tensor, numbers: Sequence[int] | None = None) -> torch.Tensor:
    """(X, Y, Z) class numbers with only the largest connected part of classes; voxels that share a face are connected.

    A smaller part takes the class of the nearest voxel around it: background where it lies alone, the other structure where it
    lies in one, so that no hole is left.

    Args:
        index: the class numbers.
        numbers: of the classes that this is done to; None for all but background.
    """
    kept = index.cpu().numpy().copy()
    lone = np.zeros(kept.shape, dtype=np.uint8)
    for number, box in enumerate(ndimage.find_objects(kept), start=1):
        if box is not None and (numbers is None or number in numbers):
            parts, count = ndimage.label(kept[box] == number)
            if count > 1:
                lone[box] |= (parts > 0) & (parts != 1 + np.bincount(parts.ravel())[1:].argmax())
    _take_nearest(kept, lone)
    return torch.from_numpy(kept).to(index.device)


def fill_holes(index: torch.Tensor) -> torch.Tensor:
    """(X, Y, Z) class numbers in which background that is shut in by structures takes the nearest one."""
    kept = index.cpu().numpy().copy()
    boxes = ndimage.find_objects((kept > 0).astype(np.uint8))
    if boxes:
        parts, _ = ndimage.label(kept[boxes[0]] == 0)
        faces = [parts.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
        shut = ~np.isin(np.arange(parts.max() + 1), np.concatenate(faces))
        shut[0] = False
        holes = np.zeros(kept.shape, dtype=np.uint8)
        holes[boxes[0]] = shut[parts]
        _take_nearest(kept, holes)
    return torch.from_numpy(kept).to(index.device)


def _take_nearest(labels: Array, lost: Array) -> None:
    """Gives the voxels that are `lost` the label of the nearest that are not, in place."""
    for box in ndimage.find_objects(ndimage.label(lost)[0]) if lost.any() else []:
        wide = widen_box(box, labels.shape)
        nearest = ndimage.distance_transform_edt(
            lost[wide], return_distances=False, return_indices=True
        )
        labels[wide] = labels[wide][tuple(nearest)]


def widen_box(box: tuple[slice, ...], shape: Sequence[int]) -> tuple[slice, ...]:
    """A box with one voxel more at each end, where there is one."""
    return tuple(
        slice(max(0, s.start - 1), min(n, s.stop + 1)) for s, n in zip(box, shape, strict=True)
    )


def outside_grid(
    shape: Sequence[int], affine: Affine, target_affine: Affine, target_shape: Sequence[int]
) -> torch.Tensor:
    """Which voxels (X', Y', Z') of a target grid lie beyond the voxels of another: where a part was cut out, background."""
    matrix = np.linalg.inv(affine) @ target_affine
    beyond = torch.zeros(tuple(target_shape), dtype=torch.bool)
    for axis, size in enumerate(shape):
        terms = [
            torch.from_numpy(matrix[axis, dim] * np.arange(n)).float()
            for dim, n in enumerate(target_shape)
        ]
        place = (terms[0][:, None, None] + terms[1][None, :, None] + terms[2]) + float(
            matrix[axis, 3]
        )
        beyond |= (place < -0.5 - OFF_GRID) | (place > size - 0.5 + OFF_GRID)
    return beyond
