"""The headers of all sources: one function reads a header alone and with the voxels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nibabel.spatialimages import SpatialImage

from pipeline.errors import PipelineError, ReadError, VolumeError
from pipeline.io.dicom import describe_series
from pipeline.io.dicom_discovery import find_series, skipped_text
from pipeline.io.dicom_series import DicomSeries, is_dicom, may_be_dicom, require_pydicom
from pipeline.io.formats import SITK_READERS, SUFFIXES, image_suffix, printable
from pipeline.io.image import Header, ImageFile
from pipeline.io.itk import describe_sitk_file, describe_sitk_image
from pipeline.io.nibabel_files import describe_nibabel_file, describe_nibabel_image
from pipeline.io.streams import unreadable
from pipeline.types import ImageSource


def read_header(source: ImageSource) -> Header:
    """Return the header of a path, a DICOM series, a nibabel image or a SimpleITK image.

    It is checked as `read` checks it: the size that it declares must fit into the file. Of a
    compressed file only the first bytes are read, so that damage behind them is not found.

    Raises:
        ReadError: the file is missing, too short for its header, damaged or of an unknown format.
        VolumeError: it holds colours or complex numbers, or is not three-dimensional.
    """
    with readable(source):
        return describe(source).header


def source_files(source: ImageSource) -> tuple[Path, ...]:
    """Return all files that an image on disk consists of: header and voxels, the given one first.

    These are the .hdr and .img of a pair, with SPM's .mat where it is used, the files that the
    header of a NRRD or MetaImage file names, and all files of a DICOM series.

    Raises:
        ReadError: a file is missing, or the header that names it is damaged.
    """
    series = series_of(source)
    if series is not None:
        return series.files
    with readable(source):
        return describe(source).files


def source_path(source: ImageSource) -> Path | None:
    """Return the path that a source was given as: a file, or the folder of a DICOM series.

    Returns:
        None for an image in memory.
    """
    if isinstance(source, DicomSeries):
        return source.folder
    return Path(source) if isinstance(source, str | Path) else None


def series_of(source: ImageSource) -> DicomSeries | None:
    """Return the DICOM series that a source is; None for any other.

    A folder is the one series of MR images in it; a DICOM file stands for itself, not for others of
    its series.

    Raises:
        ReadError: the extra `dicom` is not installed, or a file is damaged.
        VolumeError: the folder holds no or several series.
    """
    if isinstance(source, DicomSeries) or not isinstance(source, str | Path):
        return source if isinstance(source, DicomSeries) else None
    path = Path(source)
    if path.is_dir():
        return _only_series(path, sorted(file for file in path.rglob("*") if file.is_file()))
    if not may_be_dicom(path) or not is_dicom(path):
        return None
    return _only_series(path, [path])


def _only_series(path: Path, files: list[Path]) -> DicomSeries:
    require_pydicom(printable(path))
    found = find_series(file for file in files if may_be_dicom(file) and is_dicom(file))
    if found.damaged:
        file, reason = found.damaged[0]
        raise ReadError(f"{printable(file)}: {reason}")
    if len(found.series) != 1:
        listed = ", ".join(series.uid for series in found.series)
        holds = f"{len(found.series)} DICOM series of MR images{': ' if listed else ''}{listed}"
        skipped = f"; skipped: {skipped_text(found.skipped)}" if found.skipped else ""
        raise VolumeError(f"{printable(path)}: holds {holds}, expected one{skipped}")
    return found.series[0]


def describe(source: ImageSource) -> ImageFile:
    """Return the header of a source, checked, with a function that reads its voxels.

    Raises:
        PipelineError: it cannot be used.
        Exception: of many types, by the libraries that read damaged files; see `readable`.
    """
    series = series_of(source)
    if series is not None:
        return describe_series(series)
    if isinstance(source, str | Path):
        return _describe_file(Path(source))
    if isinstance(source, SpatialImage):
        return describe_nibabel_image(source, source_name(source))
    # by name, because importing SimpleITK only to compare the type would be slow
    if type(source).__module__.startswith("SimpleITK"):
        return describe_sitk_image(source, source_name(source))
    raise ReadError(
        "expected a path, a DICOM series, a nibabel image or a SimpleITK image, got "
        f"{type(source).__name__}"
    )


def source_name(source: ImageSource) -> str:
    """Return how messages name a source."""
    if isinstance(source, str | Path):
        return printable(source)
    if isinstance(source, DicomSeries):
        return str(source)
    if isinstance(source, SpatialImage):
        return "the nibabel image"
    return "the SimpleITK image"


@contextmanager
def readable(source: ImageSource) -> Iterator[None]:
    """Raise a ReadError that names the source in place of the libraries' own errors."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # they raise errors of many types for damaged files
        raise unreadable(source_name(source), _reason(error)) from error


def _describe_file(path: Path) -> ImageFile:
    suffix = image_suffix(path)
    if not path.is_file():
        raise ReadError(f"{printable(path)}: no such file")
    if suffix is None:
        raise ReadError(
            f"{printable(path)}: unknown format; expected a name ending in {', '.join(SUFFIXES)}"
        )
    if suffix in SITK_READERS:
        return describe_sitk_file(path, SITK_READERS[suffix])
    return describe_nibabel_file(path)


def _reason(error: Exception) -> str:
    """Return a short explanation of an error of nibabel or the decompression."""
    lines = str(error).strip().splitlines()
    text = printable(lines[0]) if lines else type(error).__name__
    if isinstance(error, KeyError):
        return f"its header holds {text}, which the format does not know"
    if isinstance(error, EOFError):
        return f"it is truncated ({text})"
    # the libraries have no error type for these, so that only their messages are left
    if any(words in text for words in ("CRC", "Incorrect length", "Incorrect checksum")):
        return f"its checksum is wrong, so its content is damaged ({text})"
    return text
