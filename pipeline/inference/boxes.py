"""Boxes of voxels: tuples with one slice per spatial axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.types import Box


def box_at(start: Sequence[int], size: Sequence[int]) -> Box:
    """Return the box with the given first voxel and size (voxels along each axis)."""
    return tuple(slice(i, i + n) for i, n in zip(start, size, strict=True))


def crop_box(image: torch.Tensor, box: Sequence[slice]) -> torch.Tensor:
    """Return the part of an image (C, *spatial) inside a box, as a view."""
    return image[(slice(None), *box)]


def widen_box(box: Sequence[slice], shape: Sequence[int]) -> Box:
    """Return a box lengthened by one voxel at each end, but not beyond a volume of size `shape`."""
    return tuple(
        slice(max(0, s.start - 1), min(n, s.stop + 1)) for s, n in zip(box, shape, strict=True)
    )
