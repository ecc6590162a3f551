"""The label map of a volume that was cropped: what is outside the network's grid is background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.io import Grid
from pipeline.transforms import parallel_axes
from pipeline.types import Affine

ROUNDING = 1e-3  # voxels; a centre this far outside counts as inside
MAX_FRACTION = 255  # a probability of 1 in uint8


def clear_outside(
    affine: Affine,
    shape: Sequence[int],
    grid: Grid,
    index: torch.Tensor,
    uncertainty: torch.Tensor | None,
    probabilities: torch.Tensor | None,
    *,
    has_background: bool,
) -> None:
    """Make voxels background, in place, whose centres are outside the volume of the network.

    Args:
        affine: affine of the volume, voxel → world, mm; its axes are parallel to those of the grid.
        shape: size of the volume, voxels.
        grid: grid of the label map.
        index: (X', Y', Z') class numbers.
        uncertainty: (X', Y', Z') entropy; None if it was not computed.
        probabilities: (N, X', Y', Z') probabilities in uint8; None if they were not computed.
        has_background: whether the first of the probabilities is that of the background.
    """
    for dim, (first, stop) in enumerate(_inside(affine, shape, grid)):
        for start, length in ((0, first), (stop, grid.shape[dim] - stop)):
            index.narrow(dim, start, length).zero_()
            if uncertainty is not None:
                uncertainty.narrow(dim, start, length).zero_()
            if probabilities is not None:
                outside = probabilities.narrow(dim + 1, start, length)
                outside.zero_()
                if has_background:
                    outside[0] = MAX_FRACTION


def _inside(affine: Affine, shape: Sequence[int], grid: Grid) -> list[tuple[int, int]]:
    """Return the first voxel of the grid inside a volume and the first one after, along each axis.

    The whole grid counts as inside if the axes are not parallel.
    """
    matrix = np.linalg.inv(affine) @ grid.affine
    axes = parallel_axes(matrix, grid.shape)
    if axes is None:
        return [(0, size) for size in grid.shape]
    ranges = []
    for dim, axis in enumerate(axes):
        position = matrix[axis, dim] * np.arange(grid.shape[dim]) + matrix[axis, 3]
        is_inside = (position > -0.5 - ROUNDING) & (position < shape[axis] - 0.5 + ROUNDING)
        found = np.flatnonzero(is_inside)
        ranges.append((int(found[0]), int(found[-1]) + 1) if found.size else (0, 0))
    return ranges
