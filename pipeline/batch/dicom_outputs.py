"""The DICOM objects of a case: a segmentation on the frames of its series, a report of volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from pipeline.errors import ConfigError, PipelineError
from pipeline.inference import Prediction
from pipeline.io import (
    DICOM_ENDINGS,
    Algorithm,
    DicomSeries,
    StructureCode,
    dicom_objects,
    series_of,
    source_list,
)
from pipeline.types import Case

REPORT = "report"


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomFiles:
    """The DICOM files of a case.

    Attributes:
        contents: ending → bytes.
        warnings: what is doubtful about them, one sentence each.
    """

    contents: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()


def with_dicom_outputs(
    cases: Sequence[Case],
    kind: str | None,
    *,
    report: bool = False,
    codes: Mapping[str, StructureCode] | None = None,
) -> list[Case]:
    """Return cases of which those of a DICOM series get DICOM objects besides.

    Args:
        cases: of a batch.
        kind: of the segmentation: `binary` or `labelmap`; None for none.
        report: whether each gets a report of volumes, which refers to the segmentation.
        codes: name of a label → its code, where it is not to be the one that volseg knows.

    Raises:
        ConfigError: no case is a DICOM series, or a report without a segmentation is asked for.
    """
    if kind is None and not report:
        return list(cases)
    if kind is None:
        raise ConfigError("a DICOM report refers to a segmentation: give --dicom-seg as well")
    wanted = (kind, REPORT) if report else (kind,)
    asked: Case = {"case": "", "dicom": wanted}
    if codes:
        asked["dicom_codes"] = codes
    found: list[Case] = []
    for case in cases:
        is_series = _series(case) is not None
        found.append({**case, **asked, "case": case["case"]} if is_series else case)
    if cases and not any("dicom" in case for case in found):
        raise ConfigError(
            "none of the inputs is a DICOM series: --dicom-seg writes on the frames of a series"
        )
    return found


def dicom_files(
    case: Case, prediction: Prediction, labels: Mapping[str, int], identity: Mapping[str, str]
) -> DicomFiles:
    """Return the DICOM files that a case asks for.

    Args:
        case: with a DICOM series for its first channel.
        prediction: of the case, on the grid of the series.
        labels: name → value.
        identity: of the results: names of the model and its settings.

    Raises:
        PipelineError: they cannot be made.
    """
    wanted = case.get("dicom", ())
    series = _series(case) if wanted else None
    if series is None:
        return DicomFiles(contents={})
    volume = identity.get("volume", "")
    algorithm = Algorithm(
        name=identity.get("bundle", ""),
        version=version("volseg"),
        weights=identity.get("weights_sha256", ""),
    )
    objects = dicom_objects(
        series,
        prediction.labels,
        labels,
        algorithm,
        volume=int(volume) if volume.isdecimal() else None,
        kind="labelmap" if "labelmap" in wanted else "binary",
        volumes_mm3=prediction.volumes_mm3 if REPORT in wanted else None,
        own_codes=case.get("dicom_codes"),
    )
    contents = {DICOM_ENDINGS[wanted[0]]: objects.segmentation}
    if objects.report is not None:
        contents[DICOM_ENDINGS[REPORT]] = objects.report
    return DicomFiles(contents=contents, warnings=objects.warnings)


def _series(case: Case) -> DicomSeries | None:
    """Return the DICOM series of a case's first channel, without raising an error."""
    if case.get("problem") or case.get("left_out"):
        return None
    try:
        return series_of(source_list(case["image"])[0])
    except PipelineError:  # the case fails when it is read, and the others go on
        return None
