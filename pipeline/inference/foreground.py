"""The foreground of a scan: windows that contain only air need not be computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.transforms.utils import generate_spatial_bounding_box
from torch.nn import functional

from pipeline.inference.boxes import crop_box
from pipeline.types import Box

# voxels per side of a cell. The mean of a cell is compared with the threshold, so that noise
# averages out; structures of interest are larger than a cell
CELL = 4
# this quantile of the values is taken as the brightest value: the maximum may be a vessel or an
# artefact
BRIGHTEST_QUANTILE = 0.995
# number of voxels, about, that this quantile is computed from; torch.quantile refuses more than 16
# million values
MAX_SAMPLES = 10**6


def foreground_level(image: torch.Tensor, fraction: float) -> float:
    """Return the value above which a voxel of an image counts as foreground.

    Args:
        image: (C, *spatial) image.
        fraction: position of the result between the lowest value (0) and the brightest (1).
    """
    values = image.flatten()
    samples = values[:: max(1, len(values) // MAX_SAMPLES)].float()
    brightest = float(torch.quantile(samples, BRIGHTEST_QUANTILE))
    lowest = float(values.min())
    return lowest + fraction * (brightest - lowest)


def foreground_cells(image: torch.Tensor, level: float) -> torch.Tensor:
    """Return which cells of `CELL` voxels per side belong to the foreground.

    A cell does if the mean of at least one channel over it is above the level.

    Args:
        image: (C, *spatial) image, 2D or 3D.
        level: value that separates background and foreground, from `foreground_level`.

    Returns:
        (*cells) bool, the image's shape divided by `CELL` and rounded up; the last cell along an
        axis may be cut off by the image's edge.
    """
    pool = functional.avg_pool3d if image.ndim == 4 else functional.avg_pool2d
    # pooling refuses a kernel that is larger than the image
    size = [min(CELL, n) for n in image.shape[1:]]
    # a cell that is cut off is averaged over the voxels that it has
    means: torch.Tensor = pool(image[None], size, CELL, ceil_mode=True)
    return (means[0] > level).any(dim=0)


def foreground_box(image: torch.Tensor, level: float, min_size: Sequence[int]) -> Box:
    """Return the bounding box of the foreground; of the whole image if there is no foreground.

    It is the bounding box of all voxels above the level that lie in foreground cells or in the
    cells next to them.

    Args:
        image: (C, *spatial) image.
        level: value that separates background and foreground, from `foreground_level`.
        min_size: smallest size of the box along each axis, voxels; the image's size where that is
            smaller.
    """
    shape = image.shape[1:]
    cells = foreground_cells(image, level).nonzero()
    if not len(cells):
        return tuple(slice(0, n) for n in shape)
    search = []  # the cells of the foreground and one more at each end
    for low, high in zip(cells.amin(0).tolist(), cells.amax(0).tolist(), strict=True):
        search.append(slice(max(0, (low - 1) * CELL), (high + 2) * CELL))
    starts, stops = generate_spatial_bounding_box(
        crop_box(image, search), select_fn=lambda values: values > level, allow_smaller=True
    )
    box = []
    for axis, part in enumerate(search):
        start, stop = part.start + starts[axis], part.start + stops[axis]
        box.append(_lengthen(start, stop, shape[axis], min_size[axis]))
    return tuple(box)


def _lengthen(start: int, stop: int, size: int, min_length: int) -> slice:
    """Return a slice lengthened at both ends to `min_length` voxels, within an axis of `size`."""
    min_length = min(min_length, size)
    missing = max(0, min_length - (stop - start))
    length = stop - start + missing
    start = max(0, min(start - missing // 2, size - length))
    return slice(start, max(stop, start + min_length))


def touches_foreground(cells: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> bool:
    """Return whether a window overlaps any foreground cell.

    Args:
        cells: (*cells) bool, from `foreground_cells`.
        start: first voxel of the window.
        size: size of the window, voxels.
    """
    touched = []
    for i, n in zip(start, size, strict=True):
        touched.append(slice(i // CELL, (i + n + CELL - 1) // CELL))
    return bool(cells[tuple(touched)].any())
