"""From the network's logits to a label map on the file's own grid.

Soft scores are interpolated one class at a time and the running maximum kept, so that no second C × volume array is made.
The result is that of softmax → linear resampling → argmax.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from torch.nn import functional

from pipeline.preprocess import IMAGE
from pipeline.spec import Spec
from pipeline.types import Affine, Logits

PRED = "pred"
OFF_GRID = 0.01  # voxels by which a position may miss a grid line and still count as on it
SLAB_VOXELS = 2**21  # of one slab where axes are not parallel: its coordinates take 24 bytes a voxel


def inversion(spec: Spec) -> MapTransform:
    """The step after the network: `pred` from logits to output values on the file's grid."""
    return InvertLabelsd(spec)


class InvertLabelsd(MapTransform):
    """Turns `pred` (classes, X, Y, Z) into (1, X', Y', Z') output values on the grid of the file that `image` came from.

    The type is the smallest unsigned one that holds the spec's labels.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(PRED)
        values = list(spec.labels.values())
        self.values = np.array(values, dtype=np.min_scalar_type(max(values)))
        self.spec = spec

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        image: MetaTensor = case[IMAGE]
        affine = np.asarray(image.meta["file_affine"], dtype=np.float64)
        shape = [int(n) for n in image.meta["file_shape"]]
        scores = torch.softmax(torch.as_tensor(case[PRED].as_tensor()).float(), dim=0)
        own = np.asarray(image.affine, dtype=np.float64)
        index = labels_on_grid(scores, own, affine, shape)
        if self.spec.fit is not None:
            index[outside(scores.shape[1:], own, affine, shape).to(index.device)] = 0
        if self.spec.largest_component:
            index = largest_components(index)
        labels = torch.from_numpy(self.values[index.cpu().numpy()][None])
        case[PRED] = MetaTensor(labels, meta={**image.meta, "affine": torch.as_tensor(affine)})
        return case


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


def labels_on_grid(scores: Logits, affine: Affine, target_affine: Affine, target_shape: Sequence[int]) -> torch.Tensor:
    """The class with the highest linearly interpolated score at each voxel of another grid; the first of equals.

    Args:
        scores: (C, X, Y, Z) on the grid of `affine`; beyond its edge the nearest voxel's scores hold.
        affine: voxel → world of the scores, mm.
        target_affine: voxel → world of the grid asked for.
        target_shape: its size, voxels.

    Returns:
        (X', Y', Z') class numbers, uint8 for up to 256 classes, else int32.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    axes = _parallel_axes(matrix, target_shape)
    sample = _sample_any if axes is None else _sample_parallel
    best = sample(scores[0], matrix, target_shape)
    index = torch.zeros(best.shape, dtype=torch.uint8 if len(scores) <= 256 else torch.int32, device=scores.device)
    for number in range(1, len(scores)):
        field = sample(scores[number], matrix, target_shape)
        index.masked_fill_(field > best, number)
        torch.maximum(best, field, out=best)
    return index


def _parallel_axes(matrix: Affine, shape: Sequence[int]) -> list[int] | None:
    """Which source axis each target axis runs along; None where the grids are turned against each other."""
    linear = np.abs(matrix[:3, :3])
    axes = [int(i) for i in linear.argmax(axis=0)]
    along = np.zeros_like(linear)
    along[axes, range(3)] = 1
    drift = (linear * (1 - along) * (np.array(shape) - 1)).sum(axis=1).max()
    return axes if sorted(axes) == [0, 1, 2] and drift < OFF_GRID else None


def _sample_parallel(field: torch.Tensor, matrix: Affine, shape: Sequence[int]) -> torch.Tensor:
    """Linear interpolation one axis at a time: what is left of it where axes are parallel."""
    axes = _parallel_axes(matrix, shape)
    assert axes is not None
    field = field.permute(axes)
    for dim, source in enumerate(axes):
        position = matrix[source, dim] * np.arange(shape[dim]) + matrix[source, 3]
        field = _interpolate(field, dim, position)
    return field.clone(memory_format=torch.contiguous_format)


def _interpolate(field: torch.Tensor, dim: int, position: np.ndarray[Any, np.dtype[np.float64]]) -> torch.Tensor:
    """(…, n, …) at fractional positions along one axis, clamped to its ends."""
    nearest = np.rint(position)
    position = np.where(np.abs(position - nearest) < OFF_GRID / 10, nearest, position).clip(0, field.shape[dim] - 1)
    low = torch.as_tensor(np.floor(position).astype(np.int64), device=field.device)
    lower = field if torch.equal(low, torch.arange(field.shape[dim], device=low.device)) else field.index_select(dim, low)
    weight = torch.as_tensor(position, dtype=field.dtype, device=field.device) - low
    if not weight.any():
        return lower
    upper = field.index_select(dim, (low + 1).clamp(max=field.shape[dim] - 1))
    return torch.lerp(lower, upper, weight.view([-1 if i == dim else 1 for i in range(3)]))


def _sample_any(field: torch.Tensor, matrix: Affine, shape: Sequence[int]) -> torch.Tensor:
    """Trilinear interpolation at any affine map, in slabs along the first axis."""
    sizes = torch.tensor(field.shape, dtype=torch.float64)
    linear, offset = torch.as_tensor(matrix[:3, :3]), torch.as_tensor(matrix[:3, 3])
    rest = [torch.arange(n, dtype=torch.float64) for n in shape[1:]]
    thickness = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    slabs = []
    for start in range(0, shape[0], thickness):
        first = torch.arange(start, min(start + thickness, shape[0]), dtype=torch.float64)
        voxels = torch.stack(torch.meshgrid(first, *rest, indexing="ij"), dim=-1)
        position = voxels @ linear.T + offset
        grid = (2 * position / (sizes - 1).clamp(min=1) - 1).flip(-1).to(field)
        slabs.append(functional.grid_sample(field[None, None], grid[None], padding_mode="border", align_corners=True)[0, 0])
    return torch.cat(slabs)
