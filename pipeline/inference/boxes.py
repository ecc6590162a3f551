"""Boxes of voxels: tuples with one slice per spatial axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.types import Box


def box_at(start: Sequence[int], size: Sequence[int]) -> Box:
    """Return the box of a size (voxels) whose first voxel is `start`."""
    return tuple(slice(i, i + n) for i, n in zip(start, size, strict=True))


def crop_box(image: torch.Tensor, box: Sequence[slice]) -> torch.Tensor:
    """Return the part of an image (C, *spatial) within a box, as a view."""
    return image[(slice(None), *box)]


def widen_box(box: Sequence[slice], shape: Sequence[int]) -> Box:
    """Return a box with one voxel more at each end, within a volume of `shape` voxels."""
    return tuple(
        slice(max(0, s.start - 1), min(n, s.stop + 1)) for s, n in zip(box, shape, strict=True)
    )
