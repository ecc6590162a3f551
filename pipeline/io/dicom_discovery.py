"""DICOM series among files of any names: found by their UID, whatever folders they lie in."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.io.dicom_series import DicomSeries, quiet_pydicom

# SOPClassUID of what holds slices of a patient: MR, CT and PET, of one frame and enhanced
IMAGE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.4",
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
    "1.2.840.10008.5.1.4.1.1.128",
    "1.2.840.10008.5.1.4.1.1.128.1",
    "1.2.840.10008.5.1.4.1.1.130",
}
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
TAGS = ("SOPClassUID", "SeriesInstanceUID", "Modality")
MODALITIES = ("MR",)
# anything else in their place could be what must not be shown
UID_PATTERN, MODALITY_PATTERN = re.compile(r"[0-9.]{1,64}"), re.compile(r"[A-Z]{2,8}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSeries:
    """What DICOM files hold.

    Attributes:
        series: in the order of their first files.
        skipped: kind of object → number of files, of what is no image that was asked for.
        damaged: files that cannot be read, with the reason.
    """

    series: list[DicomSeries] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def find_series(paths: Iterable[Path], modalities: Sequence[str] = MODALITIES) -> FoundSeries:
    """Return the DICOM series that files belong to.

    Args:
        paths: DICOM files.
        modalities: of the series that are wanted.
    """
    files: dict[str, dict[Path, Path]] = {}
    found = FoundSeries()
    for path in paths:
        try:
            kind, modality, uid = _kind(path)
        except Exception as error:  # pydicom raises errors of many types for damaged files
            found.damaged.append((path, f"this DICOM file is damaged ({type(error).__name__})"))
            continue
        if kind not in IMAGE_CLASSES:
            found.skipped[_kind_name(kind)] += 1
        elif modality not in modalities:
            known = modality if MODALITY_PATTERN.fullmatch(modality) else "other"
            found.skipped[f"{known} image"] += 1
        elif not UID_PATTERN.fullmatch(uid):
            found.damaged.append((path, "this DICOM file has no valid SeriesInstanceUID"))
        else:
            # one file may be found by several inputs, and by links
            files.setdefault(uid, {}).setdefault(path.resolve(), path)
    found.series.extend(_series(uid, list(paths.values())) for uid, paths in files.items())
    return found


def skipped_text(skipped: Counter[str]) -> str:
    """Return what was skipped, in words: `1 × DICOMDIR, 2 × CT image`."""
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(skipped.items()))


def _series(uid: str, paths: Sequence[Path]) -> DicomSeries:
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    names = sorted(os.path.relpath(path, folder) for path in paths)
    return DicomSeries(uid, folder, tuple(names))


def _kind(path: Path) -> tuple[str, str, str]:
    """Return SOPClassUID, Modality and SeriesInstanceUID of a file."""
    from pydicom import dcmread

    with quiet_pydicom():
        dataset = dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS), force=True)
        stored = dataset.file_meta.get("MediaStorageSOPClassUID", "")
        kind = str(dataset.get("SOPClassUID") or stored)
        if not kind:
            raise ValueError("no kind of object is stated")
        uid = str(dataset.get("SeriesInstanceUID") or "").strip()
        return kind, str(dataset.get("Modality") or ""), uid


def _kind_name(kind: str) -> str:
    """Return the standard's name of a kind of object; kinds of vendors have no name."""
    from pydicom.uid import UID

    if kind == DICOMDIR_CLASS:
        return "DICOMDIR"
    name = UID(kind).name
    return "object of a private kind" if name == kind else name
