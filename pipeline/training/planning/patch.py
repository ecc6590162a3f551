"""Patch size, poolings and batch size of a network, from the region that holds the structures.

References:
    Isensee et al.: nnU-Net. Nature Methods 18, 203-211 (2021), doi:10.1038/s41592-020-01008-z:
    the largest patch first, then the batch; coarser voxels where a patch sees too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from pipeline.training.planning.topology import COMPARABLE, Topology, fit_topology
from pipeline.types import Array

MAX_POOLINGS = 6  # more are worth nothing at the patch sizes that a step allows
PATCHES_PER_STEP, MIN_PATCHES_PER_STEP = 4, 2  # 2 is nnU-Net's smallest batch
MIN_SLICES_PER_STEP, MAX_SLICES_PER_STEP = 4, 32
# a step has `PATCHES_PER_STEP` patches if each of them sees this fraction of the region, and else
# fewer and larger ones
SEEN_WELL = 0.5
# nnU-Net's limit: a patch that sees less of the region than this lacks context, and the voxels
# become coarser by steps of 3 % until it sees as much
SEEN_ENOUGH = 0.25
COARSER = 1.03
# sizes are rounded to multiples of the strides, which may make a step larger by this factor
ROUNDING = 1.25
THIN_AXIS = 32  # voxels; a patch holds an axis that is no longer as a whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """The patch of a network.

    Attributes:
        size: size along the network's axes, voxels; multiples of the strides.
        topology: poolings and kernels of the network.
        seen: fraction of the region that a patch sees, 0 to 1.
        count: number of patches per training step.
    """

    size: list[int]
    topology: Topology
    seen: float
    count: int

    @property
    def is_whole(self) -> bool:
        """Whether a patch holds the whole region."""
        return self.seen == 1.0


def plan_patch(region: Sequence[float], spacing: Sequence[float], step_voxels: int) -> Patch:
    """Return the patch for a region, and how many of them a training step has.

    Args:
        region: size of the region along the network's axes, voxels; 2 or 3 numbers.
        spacing: voxel size along the same axes, mm.
        step_voxels: largest number of voxels of a training step, before sizes are rounded.
    """
    if len(region) == 2:
        size, topology, seen = fit_patch(region, spacing, step_voxels // MIN_SLICES_PER_STEP)
        count = step_voxels // prod(size) // MIN_SLICES_PER_STEP * MIN_SLICES_PER_STEP
        count = min(MAX_SLICES_PER_STEP, max(MIN_SLICES_PER_STEP, count))
        return Patch(size=size, topology=topology, seen=seen, count=count)
    size, topology, seen = fit_patch(region, spacing, step_voxels // PATCHES_PER_STEP)
    if seen >= SEEN_WELL and prod(size) * PATCHES_PER_STEP <= ROUNDING * step_voxels:
        return Patch(size=size, topology=topology, seen=seen, count=PATCHES_PER_STEP)
    size, topology, seen = fit_patch(region, spacing, step_voxels // MIN_PATCHES_PER_STEP)
    return Patch(size=size, topology=topology, seen=seen, count=MIN_PATCHES_PER_STEP)


def coarser_spacing(spacing: Sequence[float]) -> Array:
    """Return a spacing one step coarser: along the fine axes first, until all are comparable."""
    mm = np.array(spacing, dtype=float)
    fine = mm.max() / mm > COMPARABLE
    if not fine.any():
        fine[:] = True
    mm[fine] *= COARSER
    return mm


def fit_patch(
    region: Sequence[float], spacing: Sequence[float], max_voxels: int
) -> tuple[list[int], Topology, float]:
    """Return the largest patch of at most about `max_voxels` voxels.

    It has the proportions of the region and is at most as large, apart from rounding. Axes of at
    most `THIN_AXIS` voxels are held as a whole.

    Args:
        region: size of the region along the network's axes, voxels.
        spacing: voxel size along the same axes, mm.
        max_voxels: largest number of voxels, before sizes are rounded.

    Returns:
        Size of the patch (multiples of the strides), its topology, and the fraction of the region
        that it sees.
    """
    target = _scaled(region, max_voxels)
    topology = fit_topology(target, spacing, MAX_POOLINGS)
    size = []
    for axis, (voxels, whole) in enumerate(zip(target, region, strict=True)):
        step = topology.multiple(axis)
        # what holds the whole region is rounded up, so that it fits in; 0.2 accepts a size that is
        # a little smaller than the median, instead of a much larger one
        steps = ceil(voxels / step - 0.2) if voxels == whole else round(voxels / step)
        size.append(step * max(1, steps))
    _shrink(size, region, topology, ROUNDING * max_voxels)
    shares = [min(1.0, voxels / whole) for voxels, whole in zip(size, region, strict=True)]
    # rounding may have cut off a fifth of the last step of an axis that is held as a whole
    return size, topology, 1.0 if target == list(region) else prod(shares)


def _scaled(region: Sequence[float], max_voxels: int) -> list[float]:
    """Return the size of the region, scaled down to at most `max_voxels`, voxels."""
    thin = [size <= THIN_AXIS for size in region]
    if all(thin) or prod(region) <= max_voxels:
        return list(region)
    kept = prod(size for size, is_thin in zip(region, thin, strict=True) if is_thin)
    long = [size for size, is_thin in zip(region, thin, strict=True) if not is_thin]
    scale = min(1.0, (max_voxels / kept / prod(long)) ** (1 / len(long)))
    return [size if is_thin else size * scale for size, is_thin in zip(region, thin, strict=True)]


def _shrink(
    size: list[int], region: Sequence[float], topology: Topology, max_voxels: float
) -> None:
    """Shorten the relatively longest axis until the patch has at most `max_voxels`, in place."""
    steps = [topology.multiple(axis) for axis in range(len(size))]
    while prod(size) > max_voxels:
        longer = [axis for axis, step in enumerate(steps) if size[axis] > step]
        if not longer:
            return
        longest = max(longer, key=lambda axis: size[axis] / region[axis])
        size[longest] -= steps[longest]
