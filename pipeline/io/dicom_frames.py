"""The frames of DICOM files: where each lies, and what may tell it from others at the same place.

Files of one slice and enhanced files of many frames give the same kind of `Frame`. No value of a
header gets into a message, because it may name a patient; messages name attributes and files.

References:
    DICOM PS3.3, C.7.6.2 Image Plane, C.7.6.16 Multi-frame Functional Groups, C.8.3.1 MR Image
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import PipelineError, ReadError, VolumeError
from pipeline.io.dicom_series import quiet_pydicom
from pipeline.io.formats import printable
from pipeline.types import Array

if TYPE_CHECKING:
    from pydicom import Dataset

Vector = tuple[float, ...]

# what frames at one place may differ in, in the order in which volumes are sorted by it
SEPARATING = (
    "EchoTime",
    "EffectiveEchoTime",
    "EchoNumbers",
    "InversionTime",
    "FlipAngle",
    "RepetitionTime",
    "DiffusionBValue",
    "TriggerTime",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "FrameAcquisitionNumber",
    "AcquisitionNumber",
    "StackID",
    "ImageType",
    "FrameType",
)
IMAGE_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "PixelRepresentation",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "SliceThickness",
    "InstanceNumber",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *(name for name in SEPARATING if name not in ("ImageType",)),
)
# compressed transfer syntaxes that pydicom decodes with a further package only
DECODER_PACKAGE = "python-gdcm"
DEFLATED = "1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One slice.

    Attributes:
        file: number of its file, in the order of the series' files.
        number: of the frame in the file, from 0.
        position: centre of the first pixel, LPS, mm.
        row: direction along a row of pixels, a unit vector, LPS.
        column: direction along a column of pixels, a unit vector, LPS.
        spacing: distance of rows and distance of columns, mm.
        thickness: of the slice, mm; nan where it is not stored.
        slope, intercept: value = stored value × slope + intercept.
        order: number of the image or frame in the series.
        separating: attribute → value, of those in `SEPARATING` that the header has.
    """

    file: int
    number: int
    position: Vector
    row: Vector
    column: Vector
    spacing: Vector
    thickness: float
    slope: float
    intercept: float
    order: float
    separating: Mapping[str, Hashable] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameFile:
    """What the header of one file of a series says.

    Attributes:
        path: the file.
        instance: SOPInstanceUID.
        shape: rows and columns of each frame.
        dtype: of the stored values.
        frames: of the file, in its order.
    """

    path: Path
    instance: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    frames: tuple[Frame, ...]


def read_frames(path: Path, number: int) -> FrameFile:
    """Return the header of one file of a series, checked.

    Args:
        path: the file.
        number: of the file in its series.

    Raises:
        ReadError: it is damaged, truncated, or compressed so that a further package is needed.
        VolumeError: it holds no grey image in the space of a patient.
    """
    with readable_dicom(path), quiet_pydicom():
        dataset, room = _header(path)
        _check_kind(dataset, path)
        shape = int(dataset.Rows), int(dataset.Columns)
        frames = tuple(_frames(dataset, path, number))
        dtype = _dtype(dataset, path)
        _check_room(dataset, path, room, len(frames) * shape[0] * shape[1] * dtype.itemsize)
        return FrameFile(
            path=path,
            instance=str(dataset.SOPInstanceUID),
            shape=shape,
            dtype=dtype,
            frames=frames,
        )


def read_pixels(file: FrameFile, numbers: Sequence[int]) -> Iterator[Array]:
    """Yield (rows, columns) stored values of frames of a file, by their numbers.

    Raises:
        ReadError: the pixels are damaged or truncated.
    """
    from pydicom import dcmread
    from pydicom.pixels.utils import iter_pixels

    with readable_dicom(file.path):
        with quiet_pydicom():
            dataset = dcmread(file.path, force=True)
            _state_syntax(dataset)
            frames = list(iter_pixels(dataset, indices=list(numbers), raw=True))
        if len(frames) != len(numbers) or any(frame.shape != file.shape for frame in frames):
            raise damaged(file.path, "its pixels are not as many as its header states")
    yield from frames


def _state_syntax(dataset: Dataset) -> None:
    """State the transfer syntax of a file that does not, as pydicom found it."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" in dataset.file_meta:
        return
    implicit, little = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


@contextmanager
def readable_dicom(path: Path) -> Iterator[None]:
    """Raise a ReadError that names the file, in place of pydicom's errors with values in them."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except OSError as error:
        raise damaged(path, error.strerror or "its end is missing") from None
    except AttributeError:
        raise damaged(path, "an attribute that an image needs is missing") from None
    except Exception as error:  # pydicom and the decoders raise errors of many types
        raise damaged(path, f"it is damaged ({type(error).__name__})") from None


def damaged(path: Path, reason: str) -> ReadError:
    """Return the error about a DICOM file that cannot be read."""
    return ReadError(f"{printable(path)}: this DICOM file cannot be read: {reason}")


def _header(path: Path) -> tuple[Dataset, int]:
    """Return the header of a file, and the bytes behind it, which are those of its pixels."""
    from pydicom import dcmread

    with open(path, "rb") as file:
        dataset = dcmread(file, stop_before_pixels=True, specific_tags=list(IMAGE_TAGS), force=True)
        room = path.stat().st_size - file.tell()
    return dataset, room


def _check_kind(dataset: Dataset, path: Path) -> None:
    """Check that a file holds grey slices of a patient.

    Raises:
        VolumeError: it holds something else, which the message names.
    """
    kinds = _texts(dataset.get("ImageType"))
    per_frame = "PerFrameFunctionalGroupsSequence" in dataset
    problem = ""
    if "MOSAIC" in kinds:
        problem = "a Siemens mosaic, many slices in one picture; convert the series with dcm2niix"
    elif int(dataset.get("SamplesPerPixel") or 1) != 1:
        problem = "colours, expected one grey value per pixel"
    elif str(dataset.get("PhotometricInterpretation", "")) != "MONOCHROME2":
        problem = "pixels that are not MONOCHROME2, such as inverted or coloured ones"
    elif "ModalityLUTSequence" in dataset:
        problem = "values that a table maps (Modality LUT), expected a slope and an intercept"
    elif int(dataset.get("NumberOfFrames") or 1) > 1 and not per_frame:
        problem = "several frames without a place for each (no PerFrameFunctionalGroupsSequence)"
    if problem:
        raise VolumeError(f"{printable(path)}: this DICOM file holds {problem}")


def _check_room(dataset: Dataset, path: Path, room: int, count: int) -> None:
    """Check that pixels fit into the file, and that they can be decoded.

    Args:
        dataset: the header.
        path: the file.
        room: bytes behind the header.
        count: bytes of all frames, decoded.

    Raises:
        ReadError: they do not, or cannot.
    """
    from pydicom.pixels.decoders.base import get_decoder

    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None or not syntax.is_encapsulated:
        if syntax != DEFLATED and room < count:
            raise damaged(path, f"it is truncated: {count} bytes of pixels, {max(0, room)} there")
        return
    if room <= 0:
        raise damaged(path, "it is truncated: its pixels are missing")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise damaged(path, f"its pixels are stored as {syntax.name}, which is no image") from None
    if not available:
        raise damaged(
            path,
            f"its pixels are compressed ({syntax.name}), which needs another package: "
            f"pip install {DECODER_PACKAGE}",
        )


def _dtype(dataset: Dataset, path: Path) -> np.dtype[Any]:
    bits = int(dataset.BitsAllocated)
    if bits not in (8, 16, 32):
        raise VolumeError(
            f"{printable(path)}: this DICOM file has {bits} bits per pixel, expected 8, 16 or 32"
        )
    return np.dtype(f"{'i' if int(dataset.get('PixelRepresentation') or 0) else 'u'}{bits // 8}")


def _frames(dataset: Dataset, path: Path, file: int) -> Iterator[Frame]:
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        yield _frame(_Groups(dataset), path, file, 0)
        return
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
    items = dataset.PerFrameFunctionalGroupsSequence
    if len(items) != int(dataset.get("NumberOfFrames") or 1):
        raise damaged(path, "the number of its frames is not that of their descriptions")
    for number, item in enumerate(items):
        yield _frame(_Groups(dataset, item, *shared), path, file, number)


class _Groups:
    """Attributes of a frame: its own, those shared by all frames, and those of the file."""

    def __init__(self, dataset: Dataset, *groups: Dataset) -> None:
        self.found: list[Dataset] = []
        for group in groups:
            for element in group:
                if element.VR == "SQ" and element.value:
                    self.found.append(element.value[0])
        self.found.append(dataset)

    def get(self, name: str) -> Any:
        """Return the value of an attribute; None where it is missing or empty."""
        for dataset in self.found:
            value = dataset.get(name)
            if value is not None and value != "":
                return value
        return None


def _frame(groups: _Groups, path: Path, file: int, number: int) -> Frame:
    directions = _numbers(groups, "ImageOrientationPatient", 6, path)
    spacing = _numbers(groups, "PixelSpacing", 2, path)
    if min(spacing) <= 0:
        raise VolumeError(
            f"{printable(path)}: PixelSpacing of this DICOM file is not above 0, expected mm"
        )
    row, column = _unit_vectors(directions, path)
    thickness = _number(groups.get("SliceThickness"), path, "SliceThickness", float("nan"))
    slope = _number(groups.get("RescaleSlope"), path, "RescaleSlope", 1.0)
    intercept = _number(groups.get("RescaleIntercept"), path, "RescaleIntercept", 0.0)
    order = _number(groups.get("InstanceNumber"), path, "InstanceNumber", 0.0)
    return Frame(
        file=file,
        number=number,
        position=_numbers(groups, "ImagePositionPatient", 3, path),
        row=row,
        column=column,
        spacing=spacing,
        thickness=thickness,
        slope=slope,
        intercept=intercept,
        order=order + number,
        separating=_separating(groups),
    )


def _unit_vectors(directions: Vector, path: Path) -> tuple[Vector, Vector]:
    """Return the directions of rows and columns as unit vectors.

    Raises:
        VolumeError: they are not perpendicular, or of another length.
    """
    row, column = np.array(directions[:3]), np.array(directions[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    # rounded to two decimals, which no scanner falls below, they still pass
    if (np.abs(lengths - 1) > 0.02).any() or abs(row @ column) > 0.02:
        raise VolumeError(
            f"{printable(path)}: ImageOrientationPatient of this DICOM file is no pair of "
            "perpendicular directions"
        )
    return tuple((row / lengths[0]).tolist()), tuple((column / lengths[1]).tolist())


def _numbers(groups: _Groups, name: str, count: int, path: Path) -> Vector:
    """Return the numbers of an attribute.

    Raises:
        VolumeError: it is missing.
        ReadError: it holds something else.
    """
    value = groups.get(name)
    if value is None:
        raise VolumeError(
            f"{printable(path)}: this DICOM file has no {name}, so that the place of its slice is "
            "not known"
        )
    numbers = tuple(float(item) for item in np.atleast_1d(np.asarray(value, dtype=object)))
    if len(numbers) != count or not all(map(isfinite, numbers)):
        raise damaged(path, f"{name} does not hold {count} numbers")
    return numbers


def _number(value: Any, path: Path, name: str, default: float) -> float:
    if value is None:
        return default
    number = float(value)
    if not isfinite(number):
        raise damaged(path, f"{name} is no number")
    return number


def _separating(groups: _Groups) -> dict[str, Hashable]:
    found: dict[str, Hashable] = {}
    for name in SEPARATING:
        value = groups.get(name)
        if value is None:
            continue
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            found[name] = tuple(_texts(value))
    return found


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]
