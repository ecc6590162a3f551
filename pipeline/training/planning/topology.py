"""Poolings and kernels of a U-Net that fit the size and the spacing of its patches.

References:
    Isensee et al.: nnU-Net. Nature Methods 18, 203-211 (2021), doi:10.1038/s41592-020-01008-z,
    supplementary note on the network topology.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

MIN_BOTTLENECK = 4  # smallest size of the bottleneck along each axis, voxels
# an axis whose voxels are this many times longer than the finest is neither pooled nor convolved
COMPARABLE = 2.0
# an axis that is pooled alone needs this many times `MIN_BOTTLENECK`, so that a last pooling of one
# axis does not only make the network slower
ALONE_FACTOR = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Strides and kernel sizes of a U-Net, one number per axis of the network.

    Attributes:
        strides: strides of each pooling, top first; one fewer than `kernels`.
        kernels: kernel size of the convolutions of each level, top first, the bottleneck last.
    """

    strides: list[list[int]]
    kernels: list[list[int]]

    def multiple(self, axis: int) -> int:
        """Return the number that sizes along an axis have to be a multiple of."""
        return prod(stride[axis] for stride in self.strides)


def fit_topology(
    size: Sequence[float], spacing: Sequence[float], max_poolings: int | None = None
) -> Topology:
    """Return the poolings and kernels for a patch, by the rule of nnU-Net.

    Each level halves all axes that can still be halved and whose voxels are less than twice as long
    as the finest among these. Axes that are too short to be halved do not count there: otherwise
    the voxels of thin slabs would soon be the finest, and no other axis would be pooled any more.
    A kernel has one voxel along an axis until its voxels are comparable to the finest of all axes.
    There is one pooling at least.

    Args:
        size: size of the patch along the network's axes, voxels.
        spacing: voxel size along the same axes, mm.
        max_poolings: largest number of poolings; None sets no limit.
    """
    size, spacing = list(size), list(spacing)
    kernel = [1] * len(size)
    strides: list[list[int]] = []
    kernels: list[list[int]] = []
    while max_poolings is None or len(strides) < max_poolings:
        pooled = _pooled_axes(size, spacing)
        if not pooled:
            break
        finest = min(spacing)
        kernel = [
            3 if mm < COMPARABLE * finest else before
            for mm, before in zip(spacing, kernel, strict=True)
        ]
        kernels.append(kernel)
        strides.append([2 if axis in pooled else 1 for axis in range(len(size))])
        for axis in pooled:
            spacing[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    if not strides:  # a U-Net has one pooling at least; smaller volumes are padded
        return Topology(strides=[[2] * len(size)], kernels=[[3] * len(size)] * 2)
    kernels.append([3] * len(size))
    return Topology(strides=strides, kernels=kernels)


def _pooled_axes(size: Sequence[float], spacing: Sequence[float]) -> list[int]:
    """Return the axes that the next pooling halves."""
    long_enough = [axis for axis, voxels in enumerate(size) if voxels >= 2 * MIN_BOTTLENECK]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    pooled = [axis for axis in long_enough if spacing[axis] < COMPARABLE * finest]
    if len(pooled) == 1 and size[pooled[0]] < ALONE_FACTOR * MIN_BOTTLENECK:
        return []
    return pooled
