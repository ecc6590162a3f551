"""Volumes of segments as a DICOM structured report (TID 1500).

Reference:
    DICOM PS3.16, TID 1500 Measurement Report, TID 1411 Volumetric ROI Measurements
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.io.dicom_codes import StructureCode, concept

if TYPE_CHECKING:
    from pydicom import Dataset

# LOINC, by modality (CID 100)
PROCEDURES = {
    "MR": ("LN", "25056-3", "MRI unspecified body region"),
    "CT": ("LN", "25045-6", "CT unspecified body region"),
    "PT": ("SCT", "82918005", "Positron emission tomography"),
}


def volume_report(
    images: Sequence[Dataset],
    segmentation: Dataset,
    volumes_mm3: Sequence[float | None],
    codes: Sequence[StructureCode],
    *,
    manufacturer: str,
    model: str,
    version: str,
    description: str,
    uids: tuple[str, str],
    series_number: int,
) -> Dataset:
    """Return a report of the volume of each segment.

    Args:
        images: headers of the images that were segmented.
        segmentation: the DICOM segmentation.
        volumes_mm3: of the segments in their order, mm³; None for those that are left out.
        codes: of the segments.
        manufacturer: what made the report.
        model: name of the model.
        version: of the software.
        description: of the series.
        uids: of the series and of the report.
        series_number: of the series.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes as dictionary

    observer = hd.sr.ObserverContext(
        observer_type=dictionary.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=segmentation.SOPInstanceUID, name=f"{manufacturer} {model}", model_name=model
        ),
    )
    groups = [
        _group(images[0], segmentation, number, volume, code)
        for number, (volume, code) in enumerate(zip(volumes_mm3, codes, strict=True), start=1)
        if volume is not None
    ]
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=concept(PROCEDURES.get(str(images[0].Modality), PROCEDURES["MR"])),
        imaging_measurements=groups,
        title=dictionary.DCM.ImagingMeasurementReport,
    )
    document: Dataset = hd.sr.Comprehensive3DSR(
        evidence=[*images, segmentation],
        content=report,
        series_number=series_number,
        series_instance_uid=uids[0],
        sop_instance_uid=uids[1],
        instance_number=1,
        manufacturer=manufacturer,
        manufacturer_model_name=model,
        software_versions=version,
        series_description=description,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    return document


def _group(
    image: Dataset, segmentation: Dataset, number: int, volume: float, code: StructureCode
) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes as dictionary

    # label maps describe the background too, as segment 0
    segment = next(item for item in segmentation.SegmentSequence if item.SegmentNumber == number)
    side = None if code.laterality is None else concept(code.laterality)
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=segment.TrackingUID, identifier=segment.SegmentLabel
        ),
        # not `from_segmentation`, which knows no label maps
        referenced_segment=hd.sr.ReferencedSegment(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            segment_number=number,
            source_series=hd.sr.SourceSeriesForSegmentation.from_source_image(image),
        ),
        finding_type=concept(code.structure),
        finding_sites=[
            hd.sr.FindingSite(anatomic_location=concept(code.structure), laterality=side)
        ],
        measurements=[
            hd.sr.Measurement(
                name=dictionary.SCT.Volume,
                value=round(volume, 3),
                unit=dictionary.UCUM.CubicMillimeter,
            )
        ],
    )
