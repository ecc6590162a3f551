"""The foreground of a scan: air around a head needs no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.transforms.utils import generate_spatial_bounding_box
from torch.nn import functional

from pipeline.inference.boxes import crop_box
from pipeline.types import Box

# voxels per side of a cell, whose mean is compared with the level: noise averages out, and
# structures that matter are larger
CELL = 4
# quantile of the values that counts as the brightest: a few voxels of vessels or artefacts do not
BRIGHTEST_QUANTILE = 0.995
# voxels that this quantile is taken of, about; torch.quantile refuses more than 16 million values
MAX_SAMPLES = 10**6


def foreground_level(image: torch.Tensor, fraction: float) -> float:
    """Return the value that separates background and foreground of an image.

    Args:
        image: (C, *spatial).
        fraction: of the way from the lowest value to the brightest.
    """
    values = image.flatten()
    samples = values[:: max(1, len(values) // MAX_SAMPLES)].float()
    brightest = float(torch.quantile(samples, BRIGHTEST_QUANTILE))
    lowest = float(values.min())
    return lowest + fraction * (brightest - lowest)


def foreground_cells(image: torch.Tensor, level: float) -> torch.Tensor:
    """Return which cells of `CELL` voxels per side belong to the foreground.

    In a cell of the foreground the mean of at least one channel is above the level.

    Args:
        image: (C, *spatial), 2D or 3D.
        level: in the image's values.

    Returns:
        (*cells) bool; the last cell along an axis may be cut off by the image's edge.
    """
    pool = functional.avg_pool3d if image.ndim == 4 else functional.avg_pool2d
    size = [min(CELL, n) for n in image.shape[1:]]
    means: torch.Tensor = pool(image[None], size, CELL, ceil_mode=True)
    return (means[0] > level).any(dim=0)


def foreground_box(image: torch.Tensor, level: float, min_size: Sequence[int]) -> Box:
    """Return the box around the foreground, or the box of the whole image where there is none.

    The box is exact to the voxel: it contains all voxels above the level that lie in cells of the
    foreground or next to them.

    Args:
        image: (C, *spatial).
        level: in the image's values.
        min_size: of the box along each axis, voxels, where the image is as large.
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
    """Return a slice of at least `min_length`, lengthened at both ends, within 0 to `size`."""
    length = stop - start
    missing = max(0, min(min_length, size) - length)
    start = max(0, min(start - missing // 2, size - length - missing))
    return slice(start, max(stop, start + min(min_length, size)))


def touches_foreground(cells: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> bool:
    """Return whether a window touches a cell of the foreground.

    Args:
        cells: (*cells) as from `foreground_cells`.
        start: the window's first voxel.
        size: of the window, voxels.
    """
    touched = []
    for i, n in zip(start, size, strict=True):
        touched.append(slice(i // CELL, (i + n + CELL - 1) // CELL))
    return bool(cells[tuple(touched)].any())
