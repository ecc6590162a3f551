"""Where a scan holds something: air around a head needs no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.transforms.utils import generate_spatial_bounding_box
from torch.nn import functional

Box = tuple[slice, ...]
CELL = 4  # voxels along each axis that are averaged: noise is no tissue
BRIGHT = 0.995  # quantile of the values that counts as the brightest
SAMPLES = 10**6  # voxels that it is taken of


def crop_box(image: torch.Tensor, box: Sequence[slice]) -> torch.Tensor:
    """A box of an image (C, *spatial)."""
    at = (slice(None), *box)
    return image[at]


def foreground_level(image: torch.Tensor, fraction: float) -> float:
    """The value that lies so far from the lowest of an image (C, *spatial) to its brightest, which are a quantile."""
    values = image.flatten()
    bright = float(torch.quantile(values[:: max(1, len(values) // SAMPLES)].float(), BRIGHT))
    low = float(values.min())
    return low + fraction * (bright - low)


def foreground_cells(image: torch.Tensor, above: float) -> torch.Tensor:
    """Which cells of `CELL` voxels a side hold tissue: the mean of some channel is above a level there.

    Args:
        image: (C, *spatial), 2D or 3D.
        above: the level, in the image's values.

    Returns:
        (*cells) bool; the last cells may be cut off by the volume's edge.
    """
    pool = functional.avg_pool3d if image.ndim == 4 else functional.avg_pool2d
    means: torch.Tensor = pool(
        image[None], [min(CELL, n) for n in image.shape[1:]], CELL, ceil_mode=True
    )
    return (means[0] > above).any(dim=0)


def foreground_box(image: torch.Tensor, above: float, least: Sequence[int]) -> Box:
    """The box around all voxels above a level in occupied cells or beside them; all of a volume where nothing is.

    Args:
        image: (C, *spatial).
        above: the level, in the image's values.
        least: voxels that the box has at least along each axis, where the volume has as many.
    """
    shape = image.shape[1:]
    places = foreground_cells(image, above).nonzero()
    if not len(places):
        return tuple(slice(0, n) for n in shape)
    near = tuple(
        slice(max(0, (low - 1) * CELL), (high + 2) * CELL)
        for low, high in zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True)
    )
    starts, stops = generate_spatial_bounding_box(
        crop_box(image, near), select_fn=lambda values: values > above, allow_smaller=True
    )
    return tuple(
        _at_least(here.start + start, here.start + stop, size, wanted)
        for here, start, stop, size, wanted in zip(near, starts, stops, shape, least, strict=True)
    )


def _at_least(start: int, stop: int, size: int, wanted: int) -> slice:
    """A slice, made longer on both sides where it is shorter than wanted, within a size."""
    lack = max(0, min(wanted, size) - (stop - start))
    start = max(0, min(start - lack // 2, size - (stop - start) - lack))
    return slice(start, max(stop, start + min(wanted, size)))


def touches_foreground(cells: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a window's box of voxels touches an occupied cell."""
    part = tuple(
        slice(i // CELL, (i + n + CELL - 1) // CELL) for i, n in zip(start, size, strict=True)
    )
    return bool(cells[part].any())
