"""Volumes extended beyond their edges by mirroring."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mirror_indices(start: int, length: int, size: int) -> torch.Tensor:
    """Voxel numbers 0 to size - 1 along a line that is mirrored at both ends, again and again, the end voxels not doubled.

    Args:
        start: where the piece begins, negative before the volume.
        length: its voxels.
        size: of the volume.

    >>> mirrored(-2, 7, 4).tolist()
    [2, 1, 0, 1, 2, 3, 2]
    """
    period = max(1, 2 * (size - 1))
    place = torch.arange(start, start + length) % period
    return (
        torch.minimum(place, period - place) if size > 1 else torch.zeros(length, dtype=torch.long)
    )


def mirror_padded_box(x: torch.Tensor, start: Sequence[int], length: Sequence[int]) -> torch.Tensor:
    """A box of (…, *spatial) that may reach beyond the volume, where the volume is mirrored."""
    first = x.ndim - len(start)
    for axis, (begin, size) in enumerate(zip(start, length, strict=True), start=first):
        if begin >= 0 and begin + size <= x.shape[axis]:
            x = x.narrow(axis, begin, size)
        else:
            x = x.index_select(axis, mirror_indices(begin, size, x.shape[axis]).to(x.device))
    return x
