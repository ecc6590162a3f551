"""Reading a DICOM series as an image: one function for its header alone and for its voxels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from pipeline.errors import ReadError, VolumeError
from pipeline.io.dicom_frames import Frame, FrameFile, read_frames, read_pixels
from pipeline.io.dicom_geometry import Arrangement, arrange
from pipeline.io.dicom_series import DicomSeries, require_pydicom
from pipeline.io.formats import printable
from pipeline.io.image import Header, ImageFile
from pipeline.types import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesLayout:
    """The files of a series and how their frames form volumes.

    Attributes:
        series: the series.
        files: its files without copies; the numbers of the frames' files count these.
        arrangement: the frames of each volume, and the grid.
    """

    series: DicomSeries
    files: tuple[FrameFile, ...]
    arrangement: Arrangement


def describe_series(series: DicomSeries) -> ImageFile:
    """Return the header of a DICOM series; files that belong together are checked together.

    Raises:
        ReadError: a file is missing, damaged, or compressed so that a further package is needed.
        VolumeError: the files do not form volumes on one grid.
    """
    layout = series_layout(series)
    files, arrangement = layout.files, layout.arrangement
    itemsize = np.dtype(_output_type(layout)).itemsize
    header = Header(
        shape=arrangement.shape,
        affine=arrangement.affine,
        bytes_per_voxel=files[0].dtype.itemsize,
        volumes=len(arrangement.volumes),
        warnings=arrangement.warnings,
        file_bytes=sum(path.stat().st_size for path in series.files),
        volumes_differ_in=arrangement.differ_in,
    )
    return ImageFile(
        header=header,
        files=series.files,
        bytes_held=prod(arrangement.shape) * itemsize,
        voxels=partial(_voxels, layout),
    )


def series_layout(series: DicomSeries) -> SeriesLayout:
    """Return how the files of a series form volumes.

    Raises:
        ReadError: see `describe_series`.
        VolumeError: see `describe_series`.
    """
    require_pydicom(str(series))
    files, copies = _without_copies(series)
    shapes = {file.shape for file in files}
    kinds = {file.dtype for file in files}
    if len(shapes) > 1 or len(kinds) > 1:
        raise VolumeError(
            f"{series}: its images have {len(shapes)} different sizes and {len(kinds)} types of "
            "values, expected one of each"
        )
    frames = [frame for file in files for frame in file.frames]
    same_pixels = partial(_same_pixels, files)
    arrangement = arrange(frames, files[0].shape, str(series), same_pixels)
    if copies:
        text = f"{copies} files are copies of others in the series and were left out"
        arrangement = _with_warning(arrangement, text)
    return SeriesLayout(series=series, files=files, arrangement=arrangement)


def _with_warning(arrangement: Arrangement, text: str) -> Arrangement:
    return Arrangement(
        volumes=arrangement.volumes,
        affine=arrangement.affine,
        shape=arrangement.shape,
        differ_in=arrangement.differ_in,
        warnings=(text, *arrangement.warnings),
    )


def _without_copies(series: DicomSeries) -> tuple[tuple[FrameFile, ...], int]:
    """Return the headers of a series' files, each instance once, and the number of copies.

    Raises:
        VolumeError: two files claim to be the same instance and differ.
    """
    kept: dict[str, FrameFile] = {}
    copies = 0
    for path in series.files:
        if not path.is_file():
            raise ReadError(f"{printable(path)}: no such file")
        file = read_frames(path, len(kept))
        other = kept.get(file.instance)
        if other is None:
            kept[file.instance] = file
            continue
        if not _are_copies(file, other):
            raise VolumeError(
                f"{series}: {printable(path)} and {printable(other.path)} claim to be the same "
                "image (SOPInstanceUID) and differ; keep one"
            )
        copies += 1
    return tuple(kept.values()), copies


def _are_copies(first: FrameFile, second: FrameFile) -> bool:
    if _digest(first.path) == _digest(second.path):
        return True
    if first.shape != second.shape or len(first.frames) != len(second.frames):
        return False
    for one, other in zip(first.frames, second.frames, strict=True):
        if (one.position, one.row, one.column) != (other.position, other.row, other.column):
            return False
        if (one.slope, one.intercept) != (other.slope, other.intercept):
            return False
    numbers = range(len(first.frames))
    pairs = zip(read_pixels(first, numbers), read_pixels(second, numbers), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_pixels(files: Sequence[FrameFile], first: Frame, second: Frame) -> bool:
    one = next(read_pixels(files[first.file], [first.number]))
    other = next(read_pixels(files[second.file], [second.number]))
    return np.array_equal(one, other)


def _output_type(layout: SeriesLayout) -> type | np.dtype[np.generic]:
    """Return the type of the voxels: the stored one, unless they are scaled."""
    frames = [frame for volume in layout.arrangement.volumes for frame in volume]
    if all((frame.slope, frame.intercept) == (1, 0) for frame in frames):
        return layout.files[0].dtype
    return np.float32


def _voxels(layout: SeriesLayout, number: int) -> Array:
    """Return one volume of a series, (columns, rows from the last, slices), scaled."""
    arrangement = layout.arrangement
    slices = arrangement.volumes[number]
    array = np.empty(arrangement.shape, _output_type(layout), order="F")
    places: dict[int, list[int]] = {}
    for place, frame in enumerate(slices):
        places.setdefault(frame.file, []).append(place)
    scaled = array.dtype != layout.files[0].dtype
    for index, held in places.items():
        pixels = read_pixels(layout.files[index], [slices[place].number for place in held])
        for place, stored in zip(held, pixels, strict=True):
            frame = slices[place]
            values = stored * frame.slope + frame.intercept if scaled else stored
            array[:, :, place] = values[::-1].T
    return array
