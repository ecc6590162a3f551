"""Volumes continued beyond their edges by mirroring."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mirror_indices(start: int, length: int, size: int) -> torch.Tensor:
    """Return the indices of a line of voxels that is mirrored at both ends, as often as needed.

    The voxels at the ends are not doubled. torch's own `reflect` padding allows one reflection
    only, which is too few for volumes smaller than the padding.

    Args:
        start: index of the first voxel to return, negative before the line.
        length: number of voxels to return.
        size: number of voxels of the line.

    Returns:
        (length,) int64, indices from 0 to size - 1.

    >>> mirror_indices(-2, 7, 4).tolist()
    [2, 1, 0, 1, 2, 3, 2]
    """
    if size == 1:
        return torch.zeros(length, dtype=torch.long)
    period = 2 * (size - 1)
    place = torch.arange(start, start + length) % period
    return torch.minimum(place, period - place)


def mirror_padded_box(x: torch.Tensor, start: Sequence[int], length: Sequence[int]) -> torch.Tensor:
    """Return a box of a volume that may extend beyond it, where the volume is mirrored.

    Args:
        x: (…, *spatial).
        start: first voxel along each spatial axis, negative before the volume.
        length: voxels along each spatial axis.

    Returns:
        (…, *length); a view of x if the box lies inside.
    """
    first_axis = x.ndim - len(start)
    for axis, (begin, size) in enumerate(zip(start, length, strict=True), start=first_axis):
        if begin >= 0 and begin + size <= x.shape[axis]:
            x = x.narrow(axis, begin, size)
        else:
            x = x.index_select(axis, mirror_indices(begin, size, x.shape[axis]).to(x.device))
    return x
