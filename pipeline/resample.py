"""Linear interpolation between two grids whose axes run parallel: one axis at a time, in float32; an average on coarser ones.

MONAI's own resampling takes 64 bytes a voxel for positions in float64; on parallel axes the same values come from two
neighbours along one axis after the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacingd, SpatialResample
from monai.transforms.inverse import TraceableTransform
from numpy.typing import NDArray

from pipeline.spec import Spec
from pipeline.types import Affine

OFF_GRID = 0.01  # voxels that axes may run apart over a whole volume and still count as parallel
EXACT = 1e-6  # voxels
BORDER, BILINEAR = "border", "bilinear"


def spacing(spec: Spec, keys: Sequence[str]) -> Spacingd:
    """MONAI's transform to the spec's spacing, for an image and its label, with the fast resampling in it."""
    pixdim = [-1.0 if mm is None else mm for mm in spec.spacing]
    transform = Spacingd(keys, pixdim=pixdim, mode=(BILINEAR, "nearest"), allow_missing_keys=True)
    transform.spacing_transform.sp_resample = Resample(mode=BILINEAR, padding_mode=BORDER, dtype=np.float64)
    return transform


class Antialiasd(MapTransform):
    """Averages over the neighbours of a voxel that no voxel of a coarser grid would see.

    Each axis is convolved with a triangle that reaches as far to either side as the spacing asked for; axes that get no
    coarser stay as they are. At the volume's edge the triangle is cut off.

    Args:
        keys: (C, X, Y, Z) MetaTensors.
        spacing: that they will be resampled to, mm; None for an axis that keeps its own.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float | None]) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.spacing = tuple(spacing)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            for axis, (mm, own) in enumerate(zip(self.spacing, case[key].pixdim.tolist(), strict=True)):
                if mm is not None and mm > own * (1 + EXACT):
                    case[key] = averaged(case[key], axis + 1, mm / own)
        return case


def averaged(volume: torch.Tensor, axis: int, ratio: float) -> torch.Tensor:
    """A volume convolved along one axis with a triangle that ends `ratio` > 1 voxels away; (C, X, Y, Z), as it came."""
    size = volume.shape[axis]
    places = torch.arange(size, dtype=torch.float32, device=volume.device)
    weights = (1 - (places[:, None] - places[None, :]).abs() / ratio).clamp(min=0)
    weights /= weights.sum(dim=1, keepdim=True)
    field = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    moved: torch.Tensor = torch.tensordot(field.float(), weights, dims=([axis], [1])).movedim(-1, axis).contiguous()
    if isinstance(volume, MetaTensor):
        moved = MetaTensor(moved).copy_meta_from(volume)
    return moved


class Resample(SpatialResample):
    """MONAI's `SpatialResample`, faster where it interpolates linearly between parallel axes; its inverse is MONAI's."""

    def __call__(
        self, img: torch.Tensor, dst_affine: Any = None, spatial_size: Any = None, mode: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """See MONAI."""
        plain = isinstance(img, MetaTensor) and img.ndim == 4 and not img.pending_operations
        if (
            isinstance(img, MetaTensor)
            and plain
            and mode == BILINEAR
            and not kwargs.get("lazy")
            and kwargs.get("padding_mode") in (None, BORDER)
            and not kwargs.get("align_corners")
        ):
            matrix: Affine = np.linalg.inv(np.asarray(img.affine, dtype=np.float64)) @ np.asarray(dst_affine, dtype=np.float64)
            size = [int(n) for n in spatial_size]
            axes = parallel_axes(matrix, size)
            if axes is not None and not (np.allclose(matrix, np.eye(4), atol=1e-5) and size == list(img.shape[1:])):
                moved: torch.Tensor = self._parallel(img, matrix, axes, size)
                return moved
        result: torch.Tensor = super().__call__(img, dst_affine, spatial_size, mode, *args, **kwargs)
        return result

    def _parallel(self, img: MetaTensor, matrix: Affine, axes: Sequence[int], size: Sequence[int]) -> MetaTensor:
        """The image on the new grid, with the trace that MONAI's inverse reads."""
        trace = TraceableTransform.track_transform_meta(
            img,
            sp_size=size,
            affine=torch.as_tensor(matrix),
            extra_info={
                "dtype": "float64",
                "mode": BILINEAR,
                "padding_mode": BORDER,
                "align_corners": False,
                "src_affine": img.affine.to(torch.float64),
            },
            orig_size=tuple(img.shape[1:]),
            transform_info=self.get_transform_info(),
            lazy=False,
        )
        along = lines(matrix, axes, size, img.shape[1:], snap=EXACT)
        channels = [sample(channel, along) for channel in img.as_tensor().float()]
        moved: MetaTensor = MetaTensor(torch.stack(channels)).copy_meta_from(trace)
        return moved


def parallel_axes(matrix: Affine, shape: Sequence[int]) -> list[int] | None:
    """Which source axis each target axis runs along; None where the grids are turned against each other."""
    linear = np.abs(matrix[:3, :3])
    axes = [int(i) for i in linear.argmax(axis=0)]
    along = np.zeros_like(linear)
    along[axes, range(3)] = 1
    drift = (linear * (1 - along) * (np.array(shape) - 1)).sum(axis=1).max()
    return axes if sorted(axes) == [0, 1, 2] and drift < OFF_GRID else None


@dataclass(frozen=True, slots=True)
class Line:
    """Where the voxels of one target axis lie along a source axis: between voxel `low` and the next, at `weight`."""

    source: int
    low: NDArray[np.int64]
    weight: NDArray[np.float64]

    def inside(self, start: int, size: int, whole: int) -> tuple[slice, Line]:
        """The part of the axis that a block decides, with its positions in the block."""
        last = start + size - 1 if start + size == whole else start + size - 2
        mine = np.flatnonzero((self.low >= start) & (self.low <= last))
        part = slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)
        return part, Line(self.source, self.low[part] - start, self.weight[part])


def lines(matrix: Affine, axes: Sequence[int], target_shape: Sequence[int], shape: Sequence[int], *, snap: float) -> list[Line]:
    """One line a target axis; positions beyond the volume's edge are moved onto it.

    Args:
        matrix: target voxel → source voxel.
        axes: from `parallel_axes`.
        target_shape, shape: of the target and of the source, voxels.
        snap: voxels by which a position may miss a source voxel and still count as on it.
    """
    found = []
    for dim, source in enumerate(axes):
        position = matrix[source, dim] * np.arange(target_shape[dim]) + matrix[source, 3]
        nearest = np.rint(position)
        position = np.where(np.abs(position - nearest) < snap, nearest, position).clip(0, shape[source] - 1)
        low = np.floor(position).astype(np.int64)
        found.append(Line(source, low, position - low))
    return found


def sample(field: torch.Tensor, along: Sequence[Line]) -> torch.Tensor:
    """A field (x, y, z), linearly interpolated at the crossings of three lines."""
    field = field.permute([line.source for line in along])
    for dim, line in enumerate(along):
        low = torch.as_tensor(line.low, device=field.device)
        same = torch.equal(low, torch.arange(field.shape[dim], device=low.device))
        lower = field if same else field.index_select(dim, low)
        if line.weight.any():
            upper = field.index_select(dim, (low + 1).clamp(max=field.shape[dim] - 1))
            weight = torch.as_tensor(line.weight, dtype=field.dtype, device=field.device)
            lower = torch.lerp(lower, upper, weight.view([-1 if i == dim else 1 for i in range(3)]))
        field = lower
    return field
