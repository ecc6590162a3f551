"""DICOM series among files of any names: found by their UID, whatever folders they lie in."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.io.dicom_kinds import FACT_TAGS, FileFacts, file_facts, no_volume_reason
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
        no_volumes: SeriesInstanceUID → why that one of `series` is no volume (`no_volume_reason`).
        others: series of what is no image that was asked for, with its kind.
        skipped: kind of object → number of files, of `others` and of what belongs to no series.
        damaged: files that cannot be read, with the reason.
    """

    series: list[DicomSeries] = field(default_factory=list)
    no_volumes: dict[str, str] = field(default_factory=dict)
    others: list[tuple[DicomSeries, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def find_series(paths: Iterable[Path], modalities: Sequence[str] = MODALITIES) -> FoundSeries:
    """Return the DICOM series that files belong to.

    Args:
        paths: DICOM files.
        modalities: of the series that are wanted.
    """
    files: dict[str, dict[Path, FileFacts]] = {}
    others: dict[str, dict[Path, str]] = {}
    found = FoundSeries()
    for path in paths:
        try:
            kind, modality, uid, facts = _kind(path)
        except Exception as error:  # pydicom raises errors of many types for damaged files
            found.damaged.append((path, f"this DICOM file is damaged ({type(error).__name__})"))
            continue
        wanted = kind in IMAGE_CLASSES and modality in modalities
        if not wanted:
            name = _kind_name(kind, modality)
            found.skipped[name] += 1
            if UID_PATTERN.fullmatch(uid):
                others.setdefault(uid, {})[path] = name
        elif not UID_PATTERN.fullmatch(uid):
            found.damaged.append((path, "this DICOM file has no valid SeriesInstanceUID"))
        else:
            # one file may be found by several inputs, and by links
            files.setdefault(uid, {}).setdefault(path.resolve(), facts)
    for uid, held in files.items():
        found.series.append(_series(uid, [facts.path for facts in held.values()]))
        reason = no_volume_reason(list(held.values()))
        if reason:
            found.no_volumes[uid] = reason
    for uid, kinds in others.items():
        if uid not in files:
            found.others.append((_series(uid, list(kinds)), skipped_text(Counter(kinds.values()))))
    return found


def skipped_text(skipped: Counter[str]) -> str:
    """Return what was skipped, in words: `1 × DICOMDIR, 2 × CT image`."""
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(skipped.items()))


def _series(uid: str, paths: Sequence[Path]) -> DicomSeries:
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    names = sorted(os.path.relpath(path, folder) for path in paths)
    return DicomSeries(uid, folder, tuple(names))


def _kind(path: Path) -> tuple[str, str, str, FileFacts]:
    """Return SOPClassUID, Modality and SeriesInstanceUID of a file, and facts about its image."""
    from pydicom import dcmread

    tags = [*TAGS, *FACT_TAGS]
    with quiet_pydicom():
        dataset = dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
        stored = dataset.file_meta.get("MediaStorageSOPClassUID", "")
        kind = str(dataset.get("SOPClassUID") or stored)
        if not kind:
            raise ValueError("no kind of object is stated")
        uid = str(dataset.get("SeriesInstanceUID") or "").strip()
        return kind, str(dataset.get("Modality") or ""), uid, file_facts(path, dataset)


def _kind_name(kind: str, modality: str) -> str:
    """Return the modality of an image, or the standard's name of another kind of object.

    Kinds of vendors have no name.
    """
    from pydicom.uid import UID

    if kind in IMAGE_CLASSES:
        return f"{modality if MODALITY_PATTERN.fullmatch(modality) else 'other'} image"
    if kind == DICOMDIR_CLASS:
        return "DICOMDIR"
    name = UID(kind).name
    return "object of a private kind" if name == kind else name
