"""DICOM series for tests: oblique slices of noise, with a made-up patient in their headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
pytest.importorskip("highdicom", reason="the extra dicom is not installed")

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid  # noqa: E402

# All sizes and spacings differ, so that no test passes with two axes exchanged.
SLICES, ROWS, COLUMNS = 9, 14, 11
PIXEL_SPACING, DISTANCE = (1.3, 0.9), 2.7  # mm: of rows, of columns, of slices
PATIENT = {
    "PatientName": "Zweistein^Alberta",
    "PatientID": "MRN-4711-0815",
    "PatientBirthDate": "19371102",
    "OtherPatientIDs": "ALIAS-99",
    "InstitutionName": "Klinik am Nordpol",
    "ReferringPhysicianName": "Doktor^Eisenbart",
    "AccessionNumber": "ACC-31337",
    "StudyDescription": "Zweistein follow-up",
    "SeriesDescription": "t1 of Zweistein",
}


@dataclass
class Slice:
    """A dataset to write, under a file name."""

    name: str
    dataset: Any


@dataclass
class Series:
    """Slices of one series, before they are written; tests change them."""

    slices: list[Slice] = field(default_factory=list)

    def change(self, change: Callable[[int, Any], None]) -> Series:
        """Change each dataset in place, with its number."""
        for number, item in enumerate(self.slices):
            change(number, item.dataset)
        return self

    def write(self, folder: Path) -> Path:
        """Write all slices below a folder, and return it."""
        for item in self.slices:
            path = folder / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            item.dataset.save_as(path, enforce_file_format=True)
        return folder

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.slices[0].dataset.SeriesInstanceUID)


def pixels(seed: int = 0, count: int = SLICES) -> NDArray[np.uint16]:
    """Return (slices, rows, columns) of smooth noise."""
    noise = np.random.default_rng(seed).normal(size=(count, ROWS, COLUMNS))
    smooth = gaussian_filter(noise, 1)
    scaled: NDArray[np.uint16] = np.rint(2000 + 5000 * smooth).clip(1, 4095).astype(np.uint16)
    return scaled


def rotation(angles: Sequence[float] = (11.0, -7.0, 23.0)) -> NDArray[np.float64]:
    """Return a rotation about all three axes by angles in degrees."""
    matrix: NDArray[np.float64] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return matrix


def make_series(
    seed: int = 0,
    *,
    angles: Sequence[float] = (11.0, -7.0, 23.0),
    distance: float = DISTANCE,
    count: int = SLICES,
    uid: str | None = None,
) -> Series:
    """Return a series of MR images; the slices are numbered against their place."""
    turned, array = rotation(angles), pixels(seed, count)
    series, study, frame = uid or generate_uid(), generate_uid(), generate_uid()
    made = Series()
    for number in range(count):
        dataset = _dataset(array[number])
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.FrameOfReferenceUID = frame
        dataset.InstanceNumber = count - number
        corner = turned @ np.array([-5.0, -9.0, -12.0 + number * distance]) + [3.0, 14.0, -8.0]
        dataset.ImagePositionPatient = [f"{value:.8g}" for value in corner]
        dataset.ImageOrientationPatient = [
            f"{value:.10f}" for value in (*turned[:, 0], *turned[:, 1])
        ]
        made.slices.append(Slice(f"IM{(number * 7 + 3) % 997:04d}", dataset))
    return made


def make_localiser(uid: str | None = None, *, count: int = 3, stated: bool = False) -> Series:
    """Return a localiser: some slices of three orientations in one series.

    Args:
        uid: SeriesInstanceUID.
        count: slices of each orientation.
        stated: whether ImageType says that it is a localiser.
    """
    uid = uid or generate_uid()
    made = Series()
    for seed, angles in enumerate([(0.0, 0.0, 0.0), (90.0, 0.0, 0.0), (90.0, 90.0, 0.0)]):
        part = make_series(seed, angles=angles, count=count, distance=20.0, uid=uid)
        for item in part.slices:
            item.name = f"scout-{seed}-{item.name}"
            item.dataset.InstanceNumber += seed * count
            if stated:
                item.dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            made.slices.append(item)
    for item in made.slices[1:]:
        for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
            setattr(item.dataset, name, getattr(made.slices[0].dataset, name))
    return made


def _dataset(array: NDArray[np.uint16]) -> Any:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    uid = generate_uid()
    meta.MediaStorageSOPInstanceUID = uid
    dataset = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, uid
    for name, value in PATIENT.items():
        setattr(dataset, name, value)
    dataset.PatientSex, dataset.StudyID, dataset.PositionReferenceIndicator = "F", "1", ""
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20240203"
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "101112"
    dataset.Modality, dataset.Manufacturer, dataset.PatientPosition = "MR", "TestScan", "HFS"
    dataset.ManufacturerModelName, dataset.SoftwareVersions = "One", "1"
    dataset.DeviceSerialNumber, dataset.SeriesNumber, dataset.AcquisitionNumber = "1", 3, 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "SP", ""
    dataset.MRAcquisitionType, dataset.EchoTrainLength = "2D", 1
    dataset.RepetitionTime, dataset.EchoTime, dataset.FlipAngle = "300", "4.6", "80"
    dataset.SliceThickness, dataset.PixelSpacing = str(DISTANCE), [str(mm) for mm in PIXEL_SPACING]
    dataset.Rows, dataset.Columns = array.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = array.tobytes()
    return dataset


def enhanced(series: Series) -> Any:
    """Return the slices of a series as one enhanced file of many frames, as highdicom converts."""
    from highdicom.legacy import LegacyConvertedEnhancedMRImage

    return LegacyConvertedEnhancedMRImage(
        [item.dataset for item in series.slices],
        series_instance_uid=series.uid,
        series_number=4,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )


def compress_with_gdcm(path: Path, syntax: str) -> None:
    """Compress a DICOM file in place, losslessly, as gdcm does.

    Args:
        path: the file.
        syntax: name of a constant of gdcm's TransferSyntax.
    """
    gdcm = pytest.importorskip("gdcm")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
