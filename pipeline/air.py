"""Where a scan holds something: air around a head needs no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

Box = tuple[slice, ...]
CELL = 4  # voxels along each axis that are averaged: noise is no tissue
MARGIN = 2  # cells around what was found


def occupied(image: torch.Tensor, level: float) -> torch.Tensor:
    """Which cells of `CELL` voxels a side hold tissue: the mean of some channel is above a level there.

    Args:
        image: (C, *spatial), 2D or 3D.
        level: in the image's values.

    Returns:
        (*cells) bool; the last cells may be cut off by the volume's edge.
    """
    pool = functional.avg_pool3d if image.ndim == 4 else functional.avg_pool2d
    means: torch.Tensor = pool(image[None], [min(CELL, n) for n in image.shape[1:]], CELL, ceil_mode=True)
    return (means[0] > level).any(dim=0)


def box(cells: torch.Tensor, shape: Sequence[int], least: Sequence[int]) -> Box:
    """The box of voxels around all occupied cells, with a margin, as far as the volume goes; all of it where none is occupied.

    Args:
        cells: from `occupied`.
        shape: of the volume, voxels.
        least: voxels that the box has at least along each axis, where the volume has as many.
    """
    places = cells.nonzero()
    if not len(places):
        return tuple(slice(0, n) for n in shape)
    found = []
    for low, high, size, wanted in zip(places.amin(0).tolist(), places.amax(0).tolist(), shape, least, strict=True):
        start, stop = max(0, (low - MARGIN) * CELL), min(size, (high + 1 + MARGIN) * CELL)
        lack = max(0, min(wanted, size) - (stop - start))
        start = max(0, min(start - lack // 2, size - (stop - start) - lack))
        found.append(slice(start, min(size, max(stop, start + min(wanted, size)))))
    return tuple(found)


def holds(cells: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a window's box of voxels touches an occupied cell."""
    part = tuple(slice(i // CELL, (i + n + CELL - 1) // CELL) for i, n in zip(start, size, strict=True))
    return bool(cells[part].any())
