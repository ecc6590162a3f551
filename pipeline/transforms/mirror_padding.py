"""Mirror padding: volumes extended beyond their edges by reflection."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mirror_indices(start: int, length: int, size: int) -> torch.Tensor:
    """Return the indices of the voxels along an axis that is extended by reflection at both ends.

    The voxels at the ends are not repeated. The axis is reflected as often as necessary; torch's
    own `reflect` padding allows only one reflection, so that it needs volumes larger than the
    padding.

    Args:
        start: position of the first voxel to return; negative positions are before the axis.
        length: number of voxels to return.
        size: length of the axis, voxels.

    Returns:
        (length,) int64 indices, from 0 to size - 1.

    >>> mirror_indices(-2, 7, 4).tolist()
    [2, 1, 0, 1, 2, 3, 2]
    """
    if size == 1:
        return torch.zeros(length, dtype=torch.long)
    period = 2 * (size - 1)
    place = torch.arange(start, start + length) % period
    return torch.minimum(place, period - place)


def mirror_padded_box(x: torch.Tensor, start: Sequence[int], length: Sequence[int]) -> torch.Tensor:
    """Return a box of a volume; parts of the box outside the volume are filled by reflection.

    Args:
        x: (…, *spatial) volume.
        start: first voxel of the box along each spatial axis, negative before the volume.
        length: size of the box along each spatial axis, voxels.

    Returns:
        (…, *length) values; a view of x if the box is inside the volume.
    """
    first_axis = x.ndim - len(start)
    for axis, (begin, size) in enumerate(zip(start, length, strict=True), start=first_axis):
        if begin >= 0 and begin + size <= x.shape[axis]:
            x = x.narrow(axis, begin, size)
        else:
            x = x.index_select(axis, mirror_indices(begin, size, x.shape[axis]).to(x.device))
    return x
