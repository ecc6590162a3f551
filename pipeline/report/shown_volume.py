"""A scan and its labels as they are shown: on one grid, in RAS, in eight bits, without the face."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform, distance_transform_edt

from pipeline.errors import VolumeError
from pipeline.io import SAME_GRID_MM, Image, corner_distance, printable, read
from pipeline.types import Affine, Array, Box

# The brain's surroundings within this distance are shown, so that tissue that the labels miss can
# be noticed. The skin of the face is farther away.
MARGIN_MM = 10.0
CELL_MM = 3.0  # distances are measured between cells of this size, which is much faster
# Percentiles of the scan inside the labels that are drawn black and white: a few bright voxels
# would darken all others
GREY_PERCENTILES = (0.5, 99.8)
PERCENTILE_VOXELS = 500_000  # as many voxels give the same percentiles, in a fraction of the time
WHITE = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownVolume:
    """What is shown of one case.

    Attributes:
        grey: (X, Y, Z) uint8; 0 where nothing is shown.
        labels: (X, Y, Z) values of the label map; all 0 where there is none.
        affine: voxel → world, mm; the axes run to about R, A and S.
    """

    grey: Array
    labels: Array
    affine: Affine

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along R, A and S, mm."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


def shown_volume(
    scan: Path, labels: Path | None, *, volume: int | None = None, whole_head: bool = False
) -> ShownVolume:
    """Read a scan with its labels, and return what is shown of them.

    The grid is the label map's, or the scan's where there is none. Only the box of the labels is
    kept, and in it what is within `MARGIN_MM` of a label.

    Args:
        scan: image file.
        labels: label map in the same world space; None for none, and then the whole scan is shown.
        volume: number of the volume in a 4D file, from 0; None for the first.
        whole_head: whether all is kept.

    Raises:
        ReadError: a file cannot be read.
        VolumeError: a file does not hold one grey volume, or there is no label whose surroundings
            could be shown.
    """
    image = _ras(read(scan, volume or 0))
    if labels is None:
        mapped = replace(image, array=np.zeros(image.array.shape, dtype=np.uint8))
    else:
        mapped = _ras(read(labels))
        mapped = replace(mapped, array=_whole_numbers(mapped.array))
        if not whole_head:
            _check_labels(labels, mapped.array)
            mapped = _cropped(mapped, label_box(mapped.array, _spacing(mapped)))
    grey = _on_grid(image, mapped)
    limits = _grey_limits(grey, mapped.array)
    shown = _eight_bits(grey, *limits)
    if labels is not None and not whole_head:
        shown = np.where(near_labels(mapped.array, _spacing(mapped)), shown, 0).astype(np.uint8)
    return ShownVolume(grey=shown, labels=mapped.array, affine=mapped.affine)


def label_box(labels: Array, spacing: tuple[float, ...], margin_mm: float = MARGIN_MM) -> Box:
    """Return the smallest box around all labels, of which there is at least one, with a margin."""
    box = []
    for axis, mm in enumerate(spacing):
        others = tuple(other for other in range(3) if other != axis)
        (indices,) = np.nonzero((labels != 0).any(axis=others))
        margin = int(np.ceil(margin_mm / mm))
        box.append(slice(max(0, int(indices[0]) - margin), int(indices[-1]) + margin + 1))
    return tuple(box)


def near_labels(labels: Array, spacing: tuple[float, ...], mm: float = MARGIN_MM) -> Array:
    """Return the (X, Y, Z) mask of all voxels within about a distance of a label.

    Args:
        labels: (X, Y, Z) label values.
        spacing: voxel size, mm.
        mm: the distance, met to the size of a cell.
    """
    if not (labels != 0).any():
        return np.zeros(labels.shape, dtype=bool)
    sizes = [max(1, round(CELL_MM / step)) for step in spacing]
    counts = [-(-length // size) for length, size in zip(labels.shape, sizes, strict=True)]
    padding = [
        (0, count * size - length)
        for length, size, count in zip(labels.shape, sizes, counts, strict=True)
    ]
    x, y, z = counts
    i, j, k = sizes
    cells = np.pad(labels != 0, padding).reshape(x, i, y, j, z, k).any(axis=(1, 3, 5))
    sampling = [size * step for size, step in zip(sizes, spacing, strict=True)]
    near = distance_transform_edt(~cells, sampling=sampling) <= mm
    for axis, size in enumerate(sizes):
        near = near.repeat(size, axis=axis)
    mask: Array = near[tuple(slice(length) for length in labels.shape)]
    return mask


def halved(shown: ShownVolume) -> ShownVolume:
    """Return a volume with larger voxels: means of grey values, every second label.

    Voxels become twice as long along the axes with the finest spacing, and stay along those with
    thick slices.
    """
    finest = min(shown.spacing)
    factors = [
        2 if mm < 1.5 * finest and length > 1 else 1
        for mm, length in zip(shown.spacing, shown.grey.shape, strict=True)
    ]
    lengths = [size // factor for size, factor in zip(shown.grey.shape, factors, strict=True)]
    even = tuple(slice(size * factor) for size, factor in zip(lengths, factors, strict=True))
    (x, y, z), (i, j, k) = lengths, factors
    mean = shown.grey[even].reshape(x, i, y, j, z, k).mean(axis=(1, 3, 5))
    affine = shown.affine.copy()
    # the centre of the first voxels that are averaged
    affine[:3, 3] += affine[:3, :3] @ [(factor - 1) / 2 for factor in factors]
    affine[:3, :3] *= factors
    labels = shown.labels[even][::i, ::j, ::k]
    return ShownVolume(grey=np.rint(mean).astype(np.uint8), labels=labels, affine=affine)


def _ras(image: Image) -> Image:
    """Return an image with its axes in the order and direction that is closest to RAS."""
    orientation = nib.io_orientation(image.affine)
    array = nib.apply_orientation(image.array, orientation)
    affine = image.affine @ nib.orientations.inv_ornt_aff(orientation, image.array.shape)
    return replace(image, array=array, affine=affine)


def _check_labels(path: Path, labels: Array) -> None:
    if not (labels != 0).any():
        raise VolumeError(
            f"{printable(path)}: holds no label, and only the surroundings of labels are shown; "
            "--whole-head shows the whole scan"
        )


def _whole_numbers(labels: Array) -> Array:
    if labels.dtype.kind in "ui":
        return labels
    whole: Array = np.rint(np.nan_to_num(labels)).astype(np.int64)
    return whole


def _spacing(image: Image) -> tuple[float, ...]:
    return tuple(np.linalg.norm(image.affine[:3, :3], axis=0).tolist())


def _cropped(image: Image, box: Box) -> Image:
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return replace(image, array=image.array[box], affine=affine)


def _on_grid(image: Image, grid: Image) -> Array:
    """Return the voxels of an image on the grid of another one, (X, Y, Z) float32."""
    to_image = np.linalg.inv(image.affine) @ grid.affine
    offset = np.rint(to_image[:3, 3]).astype(int)
    shifted = image.affine.copy()
    shifted[:3, 3] += shifted[:3, :3] @ offset
    shape = grid.array.shape
    inside = (offset >= 0).all() and (offset + shape <= image.array.shape).all()
    if inside and corner_distance(shifted, grid.affine, shape) <= SAME_GRID_MM:
        box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return np.asarray(image.array[box], dtype=np.float32)
    source = np.asarray(image.array, dtype=np.float32)
    moved: Array = affine_transform(
        source, to_image[:3, :3], to_image[:3, 3], output_shape=shape, order=1, mode="constant"
    )
    return moved


def _grey_limits(grey: Array, labels: Array) -> tuple[float, float]:
    """Return the grey values that are drawn black and white."""
    values = grey[labels != 0]
    if not values.size:
        values = grey[grey != 0]
    values = values[:: max(1, values.size // PERCENTILE_VOXELS)]
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    black, white = np.percentile(values, GREY_PERCENTILES)
    return float(min(black, 0.5 * white) if white > 0 else black), float(white)


def _eight_bits(grey: Array, black: float, white: float) -> Array:
    scale = WHITE / (white - black) if white > black else 0.0
    scaled = np.nan_to_num((grey - black) * scale)
    bits: Array = np.rint(scaled.clip(0, WHITE)).astype(np.uint8)
    return bits
