"""The size of a file on the network's grid, before it is resampled."""

from __future__ import annotations

import numpy as np

from pipeline.config import AXES, Spec
from pipeline.io import Grid, Header
from pipeline.transforms.spline_resampling import filled_spacing, resampled_size
from pipeline.types import Affine


def network_grid_shape(spec: Spec, file: Header | Grid) -> tuple[int, ...]:
    """Return the size that an image gets on the network's grid, voxels.

    A volume that is cropped to its nonzero voxels may become smaller.

    Args:
        spec: gives orientation and spacing of the network's grid.
        file: header or grid of the image's file.
    """
    spacing = np.linalg.norm(file.affine[:3, :3], axis=0)
    axes = _file_axes(spec, file.affine)
    shape, own = [file.shape[axis] for axis in axes], [float(spacing[axis]) for axis in axes]
    if spec.resampling is not None and all(own):
        return resampled_size(shape, own, filled_spacing(spec.spacing, own))
    sizes = []
    for size, mine, mm in zip(shape, own, spec.spacing, strict=True):
        sizes.append(size if mm is None else round((size - 1) * mine / mm + 1))
    return tuple(sizes)


def _file_axes(spec: Spec, affine: Affine) -> list[int]:
    """Return the axis of the file along which each axis of the network's grid runs."""
    if spec.has_file_axes:
        return [AXES[code] for code in spec.orientation]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / np.where(spacing, spacing, 1)
    world = np.abs(directions).argmax(axis=0).tolist()  # the world axis of each file axis
    codes = [AXES[code] for code in spec.orientation]
    return [world.index(code) if code in world else code for code in codes]
