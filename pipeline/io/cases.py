"""The cases to segment, from files, folders, globs and manifests; the names of their outputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import ConfigError, PipelineError
from pipeline.io.dicom_discovery import MODALITIES, FoundSeries, find_series, skipped_text
from pipeline.io.dicom_series import INSTALL, DicomSeries, has_pydicom
from pipeline.io.discovery import NamedFile, named_files
from pipeline.io.formats import image_stem, printable
from pipeline.io.header import read_header
from pipeline.io.manifest_file import MANIFEST_SUFFIXES, read_manifest
from pipeline.io.reader import source_list
from pipeline.log import LOGGER
from pipeline.types import Case, ImageSource, PathOrStr

SHOWN_REASONS = 5  # in an error
CHANNEL_NUMBER = re.compile(r"_(\d{4})$")


class Channels(Protocol):
    """What a model says of the files of a case: its spec does, and so does the model itself."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the files, in the order of the case."""

    @property
    def fallback_channel(self) -> str | None:
        """Channel whose file is also used for channels without one; None requires all files."""


def find_cases(
    inputs: Sequence[PathOrStr], spec: Channels, modalities: Sequence[str] = MODALITIES
) -> list[Case]:
    """Find the cases in files, folders, globs and manifests.

    Folders are searched recursively, links are followed, and label maps that volseg wrote are left
    out. A model of several channels takes one file per channel. The end of a file's name, before
    the suffix, states its channel: by name (`sub-01_FLAIR.nii.gz`) or by number
    (`sub-01_0001.nii.gz`). Where the spec has a fallback channel, a file without such an ending
    belongs to that channel, and its file is used for channels without a file. A 4D file with as
    many volumes as the model has channels holds all of them.

    DICOM files of any names form series by their SeriesInstanceUID, which is the name of the case.
    Series of other modalities, series that are no volume (such as localisers), and DICOM files that
    are no images are cases with the reason as `left_out`; the log gives the number of files of each
    kind.

    What was given and cannot be used (a broken link, a folder that cannot be searched, a case
    without one of its channels) is a case with a `problem`, so that it is not lost.

    Args:
        inputs: paths, glob patterns, and manifests (see `read_manifest`).
        spec: the channels of the model: a spec, or a model.
        modalities: of the DICOM series to segment.

    Returns:
        cases with `case` (the output's relative path without suffix) and `image` (one path, or a
        list with one path per channel), in the order of the inputs, folders sorted by path.

    Raises:
        ConfigError: no input exists, a folder holds no image, all DICOM series there are left out,
            a manifest cannot be understood, or two inputs have the same output.
    """
    files: dict[NamedFile, None] = {}  # a dict keeps the order and drops repetitions
    listed: list[Case] = []
    for item in inputs:
        path = Path(item)
        if path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file():
            listed += read_manifest(path, spec.channels)
        else:
            files.update(dict.fromkeys(named_files(item)))
    dicom = [file.path for file in files if file.dicom]
    series, left_out = _series_cases(dicom, spec, modalities)
    images = [file for file in files if not file.dicom]
    _check_any_usable(images, [*series, *listed])
    if len(spec.channels) > 1:
        found = list(_group_channels(images, spec.channels, spec.fallback_channel))
    else:
        found = [_case(file.name, str(file.path), file.problem) for file in images]
    cases = [*found, *series, *listed]
    if all("left_out" in case for case in cases):
        raise ConfigError(_nothing_to_segment(inputs, cases, left_out))
    if left_out:
        LOGGER.warning("%s", left_out)
    _check_outputs_differ(cases)
    return cases


def case_name(case: Case) -> str:
    """Return the name for a case without one: its first file's name without the suffix.

    A DICOM series is named by its UID.
    """
    source = source_list(case["image"])[0]
    return source.uid if isinstance(source, DicomSeries) else image_stem(Path(source))


def _series_cases(
    paths: Sequence[Path], spec: Channels, modalities: Sequence[str]
) -> tuple[list[Case], str]:
    """Return one case for each DICOM series and each damaged file, and what was left out."""
    if not paths:
        return [], ""
    if not has_pydicom():
        return [], f"{len(paths)} DICOM files are left out, because they need {INSTALL}"
    found = find_series(paths, modalities)
    left_out = ""
    if found.skipped:
        left_out = (
            f"DICOM files that are no {' or '.join(modalities)} images are left out: "
            f"{skipped_text(found.skipped)}"
        )
    cases = [
        _left_out(series, f"no volume: {found.no_volumes[series.uid]}")
        if series.uid in found.no_volumes
        else _series_case(series, spec)
        for series in found.series
    ]
    wanted = " or ".join(modalities)
    cases += [_left_out(series, f"no {wanted} images: {kinds}") for series, kinds in found.others]
    return [*cases, *_damaged_cases(found)], left_out


def _left_out(series: DicomSeries, reason: str) -> Case:
    return Case(case=series.uid, image=series, left_out=reason)


def _nothing_to_segment(inputs: Sequence[PathOrStr], cases: Sequence[Case], left_out: str) -> str:
    """Return the message where everything that was found is left out."""
    names = ", ".join(map(printable, inputs))
    reasons = [f"DICOM series {case['case']}: {case['left_out']}" for case in cases]
    listed = "; ".join(reasons[:SHOWN_REASONS])
    more = f"; and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
    return f"{names}: nothing to segment: {listed}{more}" if reasons else f"{names}: {left_out}"


def _series_case(series: DicomSeries, spec: Channels) -> Case:
    if len(spec.channels) == 1:
        return Case(case=series.uid, image=series)
    if spec.fallback_channel is not None:
        return Case(case=series.uid, image=[series] * len(spec.channels))
    case = Case(case=series.uid, image=series)
    if not _has_volumes(series, len(spec.channels)):
        case["problem"] = (
            f"{series}: which channel is it? List the cases in a table with the columns case, "
            f"{', '.join(spec.channels)}, which may name folders that hold one series each"
        )
    return case


def _damaged_cases(found: FoundSeries) -> list[Case]:
    names: set[str] = set()
    cases = []
    for path, problem in found.damaged:
        name = path.name if path.name not in names else f"{path.name}-{len(names)}"
        names.add(name)
        cases.append(_case(name, str(path), problem))
    return cases


def _case(name: str, image: str | list[str], problem: str = "") -> Case:
    case = Case(case=name, image=image)
    if problem:
        case["problem"] = f"{printable(source_list(image)[0])}: {problem}"
    return case


def _check_any_usable(files: Sequence[NamedFile], listed: Sequence[Case]) -> None:
    """Raise an error if nothing that was given can be used: the command itself is wrong."""
    if listed or not files or not all(file.problem for file in files):
        return
    raise ConfigError("; ".join(f"{printable(file.path)}: {file.problem}" for file in files))


def _group_channels(
    files: Iterable[NamedFile], channels: Sequence[str], fallback: str | None
) -> Iterator[Case]:
    """Yield one case for all files whose names differ in the channel only."""
    groups: dict[str, list[tuple[str, NamedFile]]] = {}
    for file in files:
        name, channel = _split_channel(file.name, channels, fallback)
        groups.setdefault(name, []).append((channel, file))
    for name, group in groups.items():
        if len(group) == 1 and _holds_all(*group[0], channels):
            yield Case(case=name, image=str(group[0][1].path))
            continue
        problem = _group_problem(group, channels, fallback)
        paths = {channel: str(file.path) for channel, file in group}
        if problem:
            yield Case(
                case=name, image=list(paths.values()), problem=f"{printable(name)}: {problem}"
            )
            continue
        ordered = [paths.get(channel, paths.get(fallback or "", "")) for channel in channels]
        yield Case(case=name, image=ordered)


def _holds_all(channel: str, file: NamedFile, channels: Sequence[str]) -> bool:
    """Return whether a file of no stated channel has as many volumes as there are channels."""
    return not channel and not file.problem and _has_volumes(file.path, len(channels))


def _has_volumes(source: ImageSource, count: int) -> bool:
    try:
        return read_header(source).volumes == count
    except PipelineError:
        return False  # the name is the problem that is reported


def _group_problem(
    group: Sequence[tuple[str, NamedFile]], channels: Sequence[str], fallback: str | None
) -> str:
    """Return why the files of one name are no case; empty if they are."""
    names = [channel for channel, _ in group]
    for channel, file in group:
        if file.problem:
            return f"{printable(file.path)}: {file.problem}"
        if not channel:
            return (
                f"which channel is {printable(file.path)}? Expected a name that ends in one of "
                f"_{', _'.join(channels)}, or _0000, _0001, …, or a file of {len(channels)} volumes"
            )
        if names.count(channel) > 1:
            both = [printable(other.path) for name, other in group if name == channel]
            return f"two files for channel {channel}, {' and '.join(both)}; keep one"
    missing = [channel for channel in channels if channel not in names]
    if missing and fallback not in names:
        found = ", ".join(printable(file.path) for _, file in group)
        return f"no file for channel {', '.join(missing)}; found {found}"
    return ""


def _split_channel(name: str, channels: Sequence[str], fallback: str | None) -> tuple[str, str]:
    """Split a file's name into the name of the case and the channel, empty where none is stated."""
    for channel in channels:
        if name.endswith(f"_{channel}"):
            return name.removesuffix(f"_{channel}"), channel
    number = CHANNEL_NUMBER.search(name)
    if number and int(number[1]) < len(channels):
        return name[: number.start()], channels[int(number[1])]
    return name, fallback or ""


def _check_outputs_differ(cases: Sequence[Case]) -> None:
    images_of: dict[str, list[str]] = {}
    for case in cases:
        images_of.setdefault(case["case"], []).append(str(case["image"]))
    repeated = {name: images for name, images in images_of.items() if len(images) > 1}
    if repeated:
        name, images = next(iter(repeated.items()))
        raise ConfigError(
            f"{len(repeated)} outputs would be written more than once, for one "
            f"{printable(name)}_seg.nii.gz from {printable(' and '.join(images))}: rename the "
            "files, or give the folder that holds them all"
        )
