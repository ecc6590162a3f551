"""Which DICOM series are no volumes: localisers, single slices, derived pictures.

An exam holds such series beside its volumes. They are left out, with the reason. A series that
should be a volume and is broken is none of them: reading it raises an error.

References:
    DICOM PS3.3, C.7.6.1.1.2 and C.8.16.1: Image Type
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import PipelineError
from pipeline.io.dicom_frames import Vector, read_frames
from pipeline.io.dicom_geometry import SAME_DIRECTION, SAME_PLACE_MM

if TYPE_CHECKING:
    from pydicom import Dataset

FACT_TAGS = (
    "ImageType",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "InstanceNumber",
    "NumberOfFrames",
    "SamplesPerPixel",
)
# A head of 150 mm takes more slices than these, whatever their thickness
FEW_SLICES = 5
# Of one orientation among several. Localisers have fewer, and scans of a head have more: where any
# orientation has more, a volume is there that must not get lost
VIEW_SLICES = 15


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the header of one image file says of its kind.

    Attributes:
        path: the file.
        kinds: values of ImageType.
        orientation: along a row and along a column, LPS; None where it is not stated, and for files
            of many frames.
        position: of the first pixel, LPS, mm; None where it is not stated.
        number: InstanceNumber; 0 where it is not stated, or no number.
        multiframe: whether it is a file of many frames.
        colors: whether its pixels are colours.
    """

    path: Path
    kinds: tuple[str, ...]
    orientation: Vector | None
    position: Vector | None
    number: int
    multiframe: bool
    colors: bool


def file_facts(path: Path, dataset: Dataset) -> FileFacts:
    """Return what a header says of the kind of its image.

    Args:
        path: the file.
        dataset: its header, with `FACT_TAGS`.
    """
    kinds = dataset.get("ImageType") or ()
    return FileFacts(
        path=path,
        kinds=tuple(map(str, [kinds] if isinstance(kinds, str) else kinds)),
        orientation=_numbers(dataset, "ImageOrientationPatient", 6),
        position=_numbers(dataset, "ImagePositionPatient", 3),
        number=_whole_number(dataset, "InstanceNumber"),
        multiframe="NumberOfFrames" in dataset,
        colors=_whole_number(dataset, "SamplesPerPixel") > 1,
    )


def no_volume_reason(files: Sequence[FileFacts]) -> str:
    """Return why the files of a series are no volume; empty if they may be one.

    Args:
        files: all files of one series.
    """
    if all("LOCALIZER" in file.kinds for file in files):
        return "a localiser (ImageType LOCALIZER)"
    if any("MOSAIC" in file.kinds for file in files):
        return ""
    derived = all({"DERIVED", "SECONDARY"} & set(file.kinds) for file in files)
    if derived and all(file.colors for file in files):
        return "derived pictures in colours"
    if derived and not any(file.position or file.multiframe for file in files):
        return "derived pictures without a place in the patient"
    slices = _slices(files)
    return _reason_by_places(slices, files) if slices else ""


def _reason_by_places(slices: Sequence[tuple[Vector, Vector]], files: Sequence[FileFacts]) -> str:
    counts = _places_by_orientation(slices)
    most = max(counts)
    if len(counts) > 1:
        listed = f"slices of {len(counts)} orientations, at most {most} of each"
        return f"{listed}, as those of a localiser" if most <= VIEW_SLICES else ""
    if most > FEW_SLICES or _some_are_missing(files, len(slices)):
        return ""
    return "one slice" if most == 1 else f"{most} slices, too few for a volume"


def _some_are_missing(files: Sequence[FileFacts], count: int) -> bool:
    """Return whether original images are numbered beyond the number of images that are there."""
    original = any("ORIGINAL" in file.kinds for file in files)
    return original and max(file.number for file in files) > count


def _slices(files: Sequence[FileFacts]) -> list[tuple[Vector, Vector]]:
    """Return orientation and position of all slices; empty where any of them is not known."""
    slices: list[tuple[Vector, Vector]] = []
    for file in files:
        if file.multiframe:
            slices += _frames(file.path)
        elif file.orientation and file.position:
            slices.append((file.orientation, file.position))
        else:
            return []
    return slices


def _frames(path: Path) -> list[tuple[Vector, Vector]]:
    try:
        frames = read_frames(path, 0).frames
    except PipelineError:  # of a case that fails with this error when it is read
        return []
    return [((*frame.row, *frame.column), frame.position) for frame in frames]


def _places_by_orientation(slices: Sequence[tuple[Vector, Vector]]) -> list[int]:
    """Return the number of different places of the slices of each orientation."""
    positions: dict[Vector, list[Vector]] = {}
    same: dict[Vector, Vector] = {}  # orientation → the first one that is equal but for rounding
    for orientation, position in slices:
        if orientation not in same:
            near = (kind for kind in positions if _are_near(kind, orientation))
            same[orientation] = next(near, orientation)
        positions.setdefault(same[orientation], []).append(position)
    return [_place_count(kind, found) for kind, found in positions.items()]


def _are_near(first: Vector, second: Vector) -> bool:
    return bool(np.abs(np.subtract(first, second)).max() <= SAME_DIRECTION)


def _place_count(orientation: Vector, positions: Sequence[Vector]) -> int:
    across = np.cross(orientation[:3], orientation[3:])
    depth = np.sort(np.array(positions) @ across)
    return 1 + int((np.diff(depth) > SAME_PLACE_MM).sum())


def _numbers(dataset: Dataset, name: str, count: int) -> Vector | None:
    """Return the numbers of an attribute; None where there are not as many."""
    try:
        values = tuple(float(value) for value in dataset.get(name) or ())
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def _whole_number(dataset: Dataset, name: str) -> int:
    """Return the number of an attribute; 0 where there is none."""
    try:
        return int(dataset.get(name) or 0)
    except (TypeError, ValueError):
        return 0
