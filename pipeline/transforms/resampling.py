"""Linear resampling between grids with parallel axes, one axis at a time.

MONAI's resampling computes all positions in float64, which takes 64 bytes per voxel. Between grids
with parallel axes, the same values result from linear interpolation along one axis after the other,
in float32.

Along an axis that becomes coarser, interpolation between two neighbours would skip voxels. There,
voxels are averaged with the weights of a triangle (a tent filter) that is as wide as two of the new
voxels, which avoids aliasing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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

MAX_DRIFT = 0.01  # voxels; axes that diverge less than this over a volume count as parallel
EXACT = 1e-6  # voxels; rounding errors of affines are smaller
# two grids are the same if the affine between them differs less than this from the identity, as in
# MONAI
SAME_GRID = 1e-5
BORDER, BILINEAR = "border", "bilinear"


def spacing_transform(spec: Spec, keys: Sequence[str]) -> Spacingd:
    """Return MONAI's `Spacingd` for the spec's spacing, which resamples with `Resample`.

    Args:
        spec: spec of the network.
        keys: keys of image and label, in this order; missing ones are allowed. The label is
            resampled by nearest neighbours.
    """
    # a negative number tells MONAI to keep the spacing of the axis
    pixdim = [-1.0 if mm is None else mm for mm in spec.spacing]
    transform = KeySpacingd(
        keys, pixdim=pixdim, mode=(BILINEAR, "nearest"), allow_missing_keys=True
    )
    # Spacingd has no argument for the transform that resamples
    transform.spacing_transform.sp_resample = Resample(
        mode=BILINEAR, padding_mode=BORDER, dtype=np.float64
    )
    return transform


class KeySpacingd(Spacingd):
    """MONAI's `Spacingd`, applied to its own keys only.

    MONAI's takes every item whose name starts with that of an image for a dictionary of metadata
    and fails where it is none, such as the `image_path` that MONAI Label adds to a case.
    """

    def __call__(
        self, data: Mapping[Hashable, Any], lazy: bool | None = None
    ) -> dict[Hashable, Any]:
        """Return the data with its images resampled, as MONAI's transform does."""
        own = {key: data[key] for key in self.key_iterator(dict(data))}
        return {**data, **super().__call__(own, lazy)}


class Resample(SpatialResample):
    """MONAI's `SpatialResample`, with our own linear resampling between grids with parallel axes.

    It takes less time and memory there and, unlike MONAI's, averages voxels along axes that become
    coarser. In all other cases MONAI's code runs. `inverse` works as MONAI's.
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
        """Resample an image as MONAI's transform does, with the same arguments."""
        resampled: torch.Tensor
        if isinstance(img, MetaTensor) and _is_plain_linear(img, mode, kwargs):
            source_affine: Affine = np.asarray(img.affine, dtype=np.float64)
            target_affine: Affine = np.asarray(dst_affine, dtype=np.float64)
            matrix: Affine = np.linalg.inv(source_affine) @ target_affine
            size = [int(n) for n in spatial_size]
            axes = parallel_axes(matrix, size)
            # an image that is on this grid already is returned unchanged, by MONAI's code below
            same_grid = np.allclose(matrix, np.eye(4), atol=SAME_GRID) and size == list(
                img.shape[1:]
            )
            if axes is not None and not same_grid:
                resampled = self._resample_parallel(img, matrix, axes, size)
                return resampled
        resampled = super().__call__(img, dst_affine, spatial_size, mode, *args, **kwargs)
        return resampled

    def _resample_parallel(
        self, img: MetaTensor, matrix: Affine, axes: Sequence[int], size: Sequence[int]
    ) -> MetaTensor:
        """Return the image on the new grid, with the trace that MONAI's inverse needs.

        Args:
            img: (C, X, Y, Z) image.
            matrix: voxel of the new grid → voxel of the image.
            axes: axis of the image along which each new axis runs.
            size: size of the new grid, voxels.
        """
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
        interpolated = axis_samplings(matrix, axes, size, img.shape[1:], snap=EXACT)
        samplings = [
            with_averaging(sampling, abs(matrix[sampling.source, dim]))
            for dim, sampling in enumerate(interpolated)
        ]
        channels = [sample_axes(channel, samplings) for channel in img.as_tensor().float()]
        resampled: MetaTensor = MetaTensor(torch.stack(channels)).copy_meta_from(trace)
        return resampled


def _is_plain_linear(img: MetaTensor, mode: Any, options: dict[str, Any]) -> bool:
    """Return whether our resampling supports the arguments of a call of `Resample`."""
    return (
        img.ndim == 4
        and not img.pending_operations
        and mode == BILINEAR
        and not options.get("lazy")
        and options.get("padding_mode") in (None, BORDER)
        and not options.get("align_corners")
    )


def parallel_axes(matrix: Affine, shape: Sequence[int]) -> list[int] | None:
    """Return the source axis along which each target axis runs.

    Returns:
        None if the axes of the two grids are not parallel, within `MAX_DRIFT`.

    Args:
        matrix: affine from target voxel to source voxel.
        shape: size of the target grid, voxels; the drift is measured over it.
    """
    linear = np.abs(matrix[:3, :3])
    axes = [int(i) for i in linear.argmax(axis=0)]
    is_along = np.zeros_like(linear)
    is_along[axes, range(3)] = 1
    drift = (linear * (1 - is_along) * (np.array(shape) - 1)).sum(axis=1).max()
    return axes if sorted(axes) == [0, 1, 2] and drift < MAX_DRIFT else None


@dataclass(frozen=True, slots=True)
class AxisSampling:
    """How to resample along one axis: the position of each target voxel along a source axis.

    The position is `low + weight`, in source voxels.

    Attributes:
        source: number of the source axis.
        low: (target voxels,) source voxel at or before each position.
        weight: (target voxels,) distance of each position from `low`, 0 to 1.
        reach: half the width of the triangle that weights the source voxels around a position, in
            source voxels: 1 is linear interpolation, a larger number averages more voxels.
    """

    source: int
    low: NDArray[np.int64]
    weight: NDArray[np.float64]
    reach: float = 1.0

    def to_nearest(self) -> AxisSampling:
        """Return the sampling of the nearest source voxel; halfway, of the one after."""
        nearest = np.floor(self.low + self.weight + 0.5).astype(np.int64)
        return replace(self, low=nearest, weight=np.zeros_like(self.weight))

    def inside(self, start: int, size: int, whole: int) -> tuple[slice, AxisSampling]:
        """Return the target voxels whose neighbours are both in a block of the source.

        Neighbouring blocks share one source voxel, so that each target voxel belongs to exactly one
        block.

        Args:
            start: first source voxel of the block.
            size: length of the block, source voxels.
            whole: length of the whole source axis, voxels.

        Returns:
            The range of target voxels, and their sampling with positions relative to `start`.
        """
        # positions at the last voxel of the axis need no second neighbour
        is_last = start + size == whole
        last = start + size - (1 if is_last else 2)
        inside = np.flatnonzero((self.low >= start) & (self.low <= last))
        part = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
        return part, replace(self, low=self.low[part] - start, weight=self.weight[part])


def axis_samplings(
    matrix: Affine,
    axes: Sequence[int],
    target_shape: Sequence[int],
    shape: Sequence[int],
    *,
    snap: float,
) -> list[AxisSampling]:
    """Return, for each target axis, its sampling by linear interpolation.

    Positions beyond the source's edge are moved to the edge.

    Args:
        matrix: affine from target voxel to source voxel.
        axes: source axis along which each target axis runs, from `parallel_axes`.
        target_shape: size of the target grid, voxels.
        shape: size of the source grid, voxels.
        snap: positions that are less than this away from a source voxel's centre are moved to it,
            source voxels.
    """
    samplings = []
    for dim, source in enumerate(axes):
        position = matrix[source, dim] * np.arange(target_shape[dim]) + matrix[source, 3]
        nearest = np.rint(position)
        position = np.where(np.abs(position - nearest) < snap, nearest, position)
        position = position.clip(0, shape[source] - 1)
        low = np.floor(position).astype(np.int64)
        samplings.append(AxisSampling(source, low, position - low))
    return samplings


def with_averaging(sampling: AxisSampling, ratio: float) -> AxisSampling:
    """Return the sampling with averaging, if the target axis is coarser than the source axis.

    Args:
        sampling: sampling by linear interpolation.
        ratio: size of a target voxel along the axis, in source voxels.
    """
    return replace(sampling, reach=ratio) if ratio > 1 + EXACT else sampling


def sample_axes(field: torch.Tensor, samplings: Sequence[AxisSampling]) -> torch.Tensor:
    """Return a field resampled to the target grid, one axis after the other.

    Args:
        field: (X, Y, Z) values on the source grid.
        samplings: sampling of each target axis.
    """
    field = field.permute([sampling.source for sampling in samplings])
    for dim, sampling in enumerate(samplings):
        sample = _average if sampling.reach > 1 else _interpolate
        field = sample(field, dim, sampling)
    return field


def _interpolate(field: torch.Tensor, dim: int, sampling: AxisSampling) -> torch.Tensor:
    """Return the field interpolated linearly along one axis."""
    low = torch.as_tensor(sampling.low, device=field.device)
    has_weights = bool(sampling.weight.any())
    # an axis that does not change, which is common, needs no copy
    if not has_weights and torch.equal(low, torch.arange(field.shape[dim], device=low.device)):
        return field
    # with the axis first, whole planes are copied, which is several times as fast as single voxels
    planes = field.movedim(dim, 0).contiguous()
    values = planes.index_select(0, low)
    if has_weights:
        upper = planes.index_select(0, (low + 1).clamp(max=len(planes) - 1))
        weight = torch.as_tensor(sampling.weight, dtype=field.dtype, device=field.device)
        values.lerp_(upper, weight.view(-1, 1, 1))
    return values.movedim(0, dim)


def _average(field: torch.Tensor, dim: int, sampling: AxisSampling) -> torch.Tensor:
    """Return the field averaged with triangular weights along one axis.

    The weights of the voxels inside the volume are normalised to a sum of 1.
    """
    distance = (sampling.low + sampling.weight)[:, None] - np.arange(field.shape[dim])
    weights = np.maximum(0, 1 - np.abs(distance) / sampling.reach)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = torch.as_tensor(weights, dtype=field.dtype, device=field.device)
    averaged: torch.Tensor = torch.tensordot(field, matrix, dims=([dim], [1]))
    return averaged.movedim(-1, dim)
