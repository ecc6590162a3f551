"""The size of a file on the network's grid, before it is resampled."""

from __future__ import annotations

import numpy as np

from pipeline.config import AXES, Spec
from pipeline.io import Grid, Header


def network_grid_shape(spec: Spec, file: Header | Grid) -> tuple[int, ...]:
    """Return the size that an image gets on the network's grid, voxels.

    Args:
        spec: gives orientation and spacing of the network's grid.
        file: header or grid of the image's file.
    """
    spacing = np.linalg.norm(file.affine[:3, :3], axis=0)
    directions = file.affine[:3, :3] / np.where(spacing, spacing, 1)
    world = np.abs(directions).argmax(axis=0).tolist()  # the world axis of each file axis
    sizes = []
    for code, mm in zip(spec.orientation, spec.spacing, strict=True):
        axis = world.index(AXES[code]) if AXES[code] in world else AXES[code]
        size = file.shape[axis]
        sizes.append(size if mm is None else round((size - 1) * spacing[axis] / mm + 1))
    return tuple(sizes)
