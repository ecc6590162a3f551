"""DICOM series as sources of images, without reading them: what they are and which files they have.

pydicom is imported inside functions, because it comes with the extra `dicom`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import ReadError

PREAMBLE_BYTES = 128
MAGIC = b"DICM"
# Groups and elements with which files without a preamble begin, as little-endian bytes: file meta
# information, and the first tags of an image (character set, image type, SOP class)
FIRST_TAGS = (
    b"\x02\x00\x00\x00",
    b"\x08\x00\x00\x00",
    b"\x08\x00\x05\x00",
    b"\x08\x00\x08\x00",
    b"\x08\x00\x16\x00",
)
VALUE_REPRESENTATIONS = (b"UL", b"CS", b"UI")  # of these tags, in explicit syntaxes
MANUFACTURER = "volseg"  # of DICOM objects that volseg writes
INSTALL = "pip install 'volseg[dicom]'"
# the settings of pydicom and the filters of warnings belong to the process, not to a thread
_SETTINGS = threading.RLock()


@dataclass(frozen=True, slots=True)
class DicomSeries:
    """The files of one DICOM series, in no particular order; `read` takes it for one image.

    Attributes:
        uid: SeriesInstanceUID.
        folder: the folder that holds all files, at any depth.
        names: paths of the files below the folder, sorted.
    """

    uid: str
    folder: Path
    names: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of all files."""
        return tuple(self.folder / name for name in self.names)

    def below(self, start: Path) -> DicomSeries:
        """Return the series with a relative folder taken from another one than the present."""
        return replace(self, folder=start / self.folder)

    def __str__(self) -> str:
        """Return how messages name the series: by its UID, never by what its header says."""
        return f"DICOM series {self.uid}"


def is_dicom(path: Path) -> bool:
    """Return whether a file begins like DICOM, whatever its name; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(PREAMBLE_BYTES + len(MAGIC))
    except OSError:
        return False
    return start[PREAMBLE_BYTES:] == MAGIC or _begins_without_preamble(start)


def may_be_dicom(path: Path) -> bool:
    """Return whether a file of this name may be DICOM: files of any name may, unless compressed."""
    return not path.name.lower().endswith((".gz", ".mgz"))


def is_own_dicom(path: Path) -> bool:
    """Return whether volseg wrote a DICOM file, by its manufacturer."""
    from pydicom import dcmread

    try:
        with quiet_pydicom():
            dataset = dcmread(path, stop_before_pixels=True, specific_tags=["Manufacturer"])
            return bool(dataset.get("Manufacturer") == MANUFACTURER)
    except Exception:  # pydicom raises errors of many types for damaged files
        return False


def has_pydicom() -> bool:
    """Return whether the packages of the extra `dicom` are installed."""
    return find_spec("pydicom") is not None and find_spec("highdicom") is not None


def require_pydicom(name: str) -> None:
    """Check that the packages of the extra `dicom` are installed.

    Args:
        name: of the source, for the message.

    Raises:
        ReadError: they are not.
    """
    if not has_pydicom():
        raise ReadError(f"{name}: DICOM files need pydicom and highdicom: {INSTALL}")


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Have pydicom take values as they are and stay silent: its warnings quote the header."""
    from pydicom import config

    with _SETTINGS, warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _begins_without_preamble(start: bytes) -> bool:
    if start[:4] not in FIRST_TAGS:
        return False
    # implicit syntaxes have the length of the value here, which is short for these tags
    return start[4:6] in VALUE_REPRESENTATIONS or start[5:8] == b"\0\0\0"
