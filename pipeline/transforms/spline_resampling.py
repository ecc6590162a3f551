"""Resampling by splines, with the grid and the order of steps that nnU-Net has.

Splines of an order (1 linear, 3 cubic) are separable: a volume is resampled along one axis after
the other, by a matrix product. The values are those of `scipy.ndimage.zoom` with the arguments
`mode="nearest"` and `grid_mode=True`, clipped to the range of the volume.

Where voxels are over 3 times longer along one axis, slices are resampled on their own, and then
the stack of them along that axis, by another order: by default, each slice repeats the nearest one.

References:
    Isensee et al.: nnU-Net. Nature Methods 18 (2021), doi:10.1038/s41592-020-01008-z, supplementary
    note on resampling.
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

from pipeline.config import AXES, Spec
from pipeline.transforms.crop_resize import nonzero_box
from pipeline.types import Affine, Array

ANISOTROPY = 3  # the longest side of a voxel over the shortest, from which slices are separate
LABEL_ORDER = 0  # nearest voxel


class FileAxesd(MapTransform):
    """Order the axes of images as a spec says for the file's own axes, such as `kji`.

    Args:
        keys: (C, I, J, K) MetaTensors as loaded; missing ones are allowed.
        order: i, j and k in the order of the network's grid.
    """

    def __init__(self, keys: KeysCollection, order: str) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.axes = [AXES[letter] for letter in order]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            affine = np.asarray(image.affine, dtype=np.float64)[:, [*self.axes, 3]]
            ordered = image.as_tensor().permute(0, *(axis + 1 for axis in self.axes))
            case[key] = _with_affine(ordered.contiguous(), affine, image)
        return case


class CropToNonzerod(MapTransform):
    """Crop image and label to the box of voxels that are not 0 in some channel of the image.

    An image that is 0 everywhere is left as it is.

    Args:
        keys: keys of MetaTensors (C, X, Y, Z), the image first; missing labels are allowed.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        values = case[self.keys[0]].as_tensor().numpy()
        if not values.any():
            return case
        box = nonzero_box(values)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            affine: Affine = np.asarray(image.affine, dtype=np.float64).copy()
            affine[:3, 3] += affine[:3, :3] @ box.start
            cropped = np.ascontiguousarray(box.of(image.as_tensor().numpy()))
            case[key] = _with_affine(torch.from_numpy(cropped), affine, image)
        return case


class SplineResampled(MapTransform):
    """Resample image and label to a spec's spacing, as `spec.resampling` says.

    The outer edges of the volume keep their place. Labels get the value of the nearest voxel.

    Args:
        keys: keys of MetaTensors (C, X, Y, Z), the image first; missing ones are allowed.
        spec: gives `spacing` and `resampling`, which must not be None.
    """

    def __init__(self, keys: KeysCollection, spec: Spec) -> None:
        super().__init__(keys, allow_missing_keys=True)
        if spec.resampling is None:
            raise ValueError("expected a spec with resampling")
        self.spacing, self.resampling = spec.spacing, spec.resampling

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image: MetaTensor = case[key]
            values = image.as_tensor().numpy()
            affine = np.asarray(image.affine, dtype=np.float64)
            own = np.linalg.norm(affine[:3, :3], axis=0).tolist()
            wanted = filled_spacing(self.spacing, own)
            size = resampled_size(values.shape[1:], own, wanted)
            if key == self.keys[0]:
                across = separate_axis(own, wanted, self.resampling.separate)
                orders = axis_orders(self.resampling.order, self.resampling.order_across, across)
                resampled = resample_volume(values, size, orders, across)
            else:
                resampled = resample_volume(values, size, (LABEL_ORDER,) * 3, None)
            scale = np.array(values.shape[1:]) / np.array(size)
            # new voxel → old voxel: the outer edges stay, so the centre of the first voxel moves
            to_old: Affine = np.diag([*scale, 1.0])
            to_old[:3, 3] = (scale - 1) / 2
            case[key] = _with_affine(torch.from_numpy(resampled), affine @ to_old, image)
        return case


def filled_spacing(spacing: Sequence[float | None], own: Sequence[float]) -> list[float]:
    """Return a spec's spacing, with a volume's own along the axes where the spec has none, mm."""
    return [mine if mm is None else mm for mm, mine in zip(spacing, own, strict=True)]


def resampled_size(
    shape: Sequence[int], own: Sequence[float], wanted: Sequence[float]
) -> tuple[int, ...]:
    """Return the size of a volume at another spacing, voxels, at least 1 along each axis.

    Args:
        shape: size of the volume, voxels.
        own: its spacing, mm.
        wanted: the other spacing, mm.
    """
    sizes = zip(shape, own, wanted, strict=True)
    # in the order of nnU-Net, because the other one rounds differently
    return tuple(max(1, round(mine / mm * size)) for size, mine, mm in sizes)


def separate_axis(
    source: Sequence[float], target: Sequence[float], separate: bool | None
) -> int | None:
    """Return the axis across thick slices, None where all axes are resampled in the same way.

    Args:
        source: spacing of the volume, mm.
        target: spacing that it is resampled to, mm.
        separate: whether there is such an axis; None decides by the spacing of the source, and if
            that is not anisotropic, by that of the target.
    """
    if separate is False:
        return None
    spacing = source
    if separate is None:
        anisotropic = [mm for mm in (source, target) if max(mm) / min(mm) > ANISOTROPY]
        if not anisotropic:
            return None
        spacing = anisotropic[0]
    longest = [axis for axis, mm in enumerate(spacing) if mm == max(spacing)]
    # voxels that are short along one axis only are no slices
    return longest[0] if len(longest) == 1 else None


def axis_orders(order: int, order_across: int, across: int | None) -> tuple[int, ...]:
    """Return the order of the spline along each axis."""
    return tuple(order_across if axis == across else order for axis in range(3))


def resample_volume(
    values: Array, size: Sequence[int], orders: Sequence[int], across: int | None
) -> Array:
    """Return a volume resampled to another size; its outer edges keep their place.

    Splines overshoot: values are clipped to the range of the channel, or of each slice if slices
    are resampled on their own. An axis whose size does not change is left as it is.

    Args:
        values: (C, X, Y, Z) float32.
        size: new size, voxels.
        orders: order of the spline along each axis.
        across: axis across slices that are resampled on their own; None for none.
    """
    if tuple(values.shape[1:]) == tuple(size):
        return values
    within = [axis for axis in range(3) if axis != across]
    clipped_over = tuple(axis + 1 for axis in within)
    low = values.min(axis=clipped_over, keepdims=True)
    high = values.max(axis=clipped_over, keepdims=True)
    resampled = values
    for axis in within:
        resampled = _resample_axis(resampled, axis + 1, size[axis], orders[axis])
    if resampled is not values:
        resampled = np.clip(resampled, low, high)
    if across is not None:
        resampled = _resample_axis(resampled, across + 1, size[across], orders[across])
    return np.ascontiguousarray(resampled, dtype=np.float32)


def _resample_axis(values: Array, axis: int, size: int, order: int) -> Array:
    """Return an array resampled along one axis."""
    length = values.shape[axis]
    if length == size:
        return values
    # a spline is a linear function of the voxels along the axis: that of each single voxel is one
    # column of a matrix
    matrix = ndimage.zoom(
        np.eye(length), (size / length, 1), order=order, mode="nearest", grid_mode=True
    )
    resampled: torch.Tensor = torch.tensordot(
        torch.from_numpy(values), torch.from_numpy(matrix).float(), dims=([axis], [1])
    ).movedim(-1, axis)
    return resampled.numpy()


def _with_affine(values: torch.Tensor, affine: Affine, source: MetaTensor) -> MetaTensor:
    """Return values as a MetaTensor with an affine and the other metadata of another one."""
    meta = {key: value for key, value in source.meta.items() if key != "affine"}
    return MetaTensor(values, affine=torch.from_numpy(affine), meta=meta)
