"""Linear interpolation between two grids whose axes run parallel: one axis at a time, in float32; an average on coarser ones.

MONAI's own resampling takes 64 bytes a voxel for positions in float64; on parallel axes the same values come from two
neighbours along one axis after the other. Where an axis gets coarser, those two are not all that a voxel should see: the
triangle that weighs what it sees is then as wide as the new voxels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd, SpatialResample
from monai.transforms.inverse import TraceableTransform
from numpy.typing import NDArray

from pipeline.config import Spec
from pipeline.types import Affine

OFF_GRID = 0.01  # voxels that axes may run apart over a whole volume and still count as parallel
EXACT = 1e-6  # voxels
BORDER, BILINEAR = "border", "bilinear"


def spacing_transform(spec: Spec, keys: Sequence[str]) -> Spacingd:
    """MONAI's transform to the spec's spacing, for an image and its label, with our own resampling of the image in it."""
    pixdim = [-1.0 if mm is None else mm for mm in spec.spacing]
    transform = Spacingd(keys, pixdim=pixdim, mode=(BILINEAR, "nearest"), allow_missing_keys=True)
    transform.spacing_transform.sp_resample = Resample(
        mode=BILINEAR, padding_mode=BORDER, dtype=np.float64
    )
    return transform


class Resample(SpatialResample):
    """MONAI's `SpatialResample`, its inverse too, but for linear interpolation between parallel axes.

    There it is faster, and averages along axes that get coarser, where MONAI's passes voxels over.
    """

    def __call__(
        self,
        img: torch.Tensor,
        dst_affine: Any = None,
        spatial_size: Any = None,
        mode: Any = None,
        *args: Any,
        **kwargs: Any,
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
            matrix: Affine = np.linalg.inv(np.asarray(img.affine, dtype=np.float64)) @ np.asarray(
                dst_affine, dtype=np.float64
            )
            size = [int(n) for n in spatial_size]
            axes = parallel_axes(matrix, size)
            if axes is not None and not (
                np.allclose(matrix, np.eye(4), atol=1e-5) and size == list(img.shape[1:])
            ):
                moved: torch.Tensor = self._parallel(img, matrix, axes, size)
                return moved
        result: torch.Tensor = super().__call__(
            img, dst_affine, spatial_size, mode, *args, **kwargs
        )
        return result

    def _parallel(
        self, img: MetaTensor, matrix: Affine, axes: Sequence[int], size: Sequence[int]
    ) -> MetaTensor:
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
        whole = axis_samplings(matrix, axes, size, img.shape[1:], snap=EXACT)
        along = [
            with_averaging(line, abs(matrix[line.source, dim])) for dim, line in enumerate(whole)
        ]
        channels = [sample_axes(channel, along) for channel in img.as_tensor().float()]
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
class AxisSampling:
    """Where the voxels of one target axis lie along a source axis: between voxel `low` and the next, at `weight`.

    `reach`: how many source voxels away the triangle ends that weighs what they see; with 1 they see those two.
    """

    source: int
    low: NDArray[np.int64]
    weight: NDArray[np.float64]
    reach: float = 1.0

    def inside(self, start: int, size: int, whole: int) -> tuple[slice, AxisSampling]:
        """The part of the axis that a block decides, with its positions in the block."""
        last = start + size - 1 if start + size == whole else start + size - 2
        mine = np.flatnonzero((self.low >= start) & (self.low <= last))
        part = slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)
        return part, replace(self, low=self.low[part] - start, weight=self.weight[part])


def axis_samplings(
    matrix: Affine,
    axes: Sequence[int],
    target_shape: Sequence[int],
    shape: Sequence[int],
    *,
    snap: float,
) -> list[AxisSampling]:
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
        position = np.where(np.abs(position - nearest) < snap, nearest, position).clip(
            0, shape[source] - 1
        )
        low = np.floor(position).astype(np.int64)
        found.append(AxisSampling(source, low, position - low))
    return found


def with_averaging(line: AxisSampling, ratio: float) -> AxisSampling:
    """A line whose voxels, `ratio` source voxels apart, see all that lies between them."""
    return replace(line, reach=ratio) if ratio > 1 + EXACT else line


def sample_axes(field: torch.Tensor, along: Sequence[AxisSampling]) -> torch.Tensor:
    """A field (x, y, z), linearly interpolated, or averaged, at the crossings of three lines."""
    field = field.permute([line.source for line in along])
    for dim, line in enumerate(along):
        field = _averaged(field, dim, line) if line.reach > 1 else _interpolated(field, dim, line)
    return field


def _interpolated(field: torch.Tensor, dim: int, line: AxisSampling) -> torch.Tensor:
    low = torch.as_tensor(line.low, device=field.device)
    same = torch.equal(low, torch.arange(field.shape[dim], device=low.device))
    lower = field if same else field.index_select(dim, low)
    if not line.weight.any():
        return lower
    upper = field.index_select(dim, (low + 1).clamp(max=field.shape[dim] - 1))
    weight = torch.as_tensor(line.weight, dtype=field.dtype, device=field.device)
    return torch.lerp(lower, upper, weight.view([-1 if i == dim else 1 for i in range(3)]))


def _averaged(field: torch.Tensor, dim: int, line: AxisSampling) -> torch.Tensor:
    """Means under triangles; at the volume's edge they are cut off."""
    apart = (line.low + line.weight)[:, None] - np.arange(field.shape[dim])
    weights = np.maximum(0, 1 - np.abs(apart) / line.reach)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = torch.as_tensor(weights, dtype=field.dtype, device=field.device)
    found: torch.Tensor = torch.tensordot(field, matrix, dims=([dim], [1])).movedim(-1, dim)
    return found
