"""Label maps as DICOM segmentations on the frames of their source series.

highdicom writes them. They copy what the source says of the patient and the study, as the standard
requires. Each object gets new UIDs below 2.25 (PS3.5, B.2), also when a case is done again: two
objects with one UID would have to be the same, down to the time of their making.

References:
    DICOM PS3.3, A.51 Segmentation
    Bridge, Gorman, Pieper et al., Highdicom, Journal of Digital Imaging 35, 2022,
    doi:10.1007/s10278-022-00683-y
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numpy as np

from pipeline.errors import GeometryError, WriteError
from pipeline.io.dicom import SeriesLayout, series_layout
from pipeline.io.dicom_codes import StructureCode, concept, structure_code
from pipeline.io.dicom_geometry import normal
from pipeline.io.dicom_report import volume_report
from pipeline.io.dicom_series import MANUFACTURER, DicomSeries, quiet_pydicom
from pipeline.io.label_table import LabelColor, label_table
from pipeline.types import Array, LabelMap

if TYPE_CHECKING:
    from pydicom import Dataset

SegmentationKind = Literal["binary", "labelmap"]
NOTICE = "Research use only"
MAX_TEXT = 64  # characters of the type LO
SEGMENTATION_NUMBER, REPORT_NUMBER = 1001, 1002  # of the series that are made, in their study


@dataclass(frozen=True, kw_only=True, slots=True)
class Algorithm:
    """What made a segmentation.

    Attributes:
        name: of the bundle.
        version: of volseg.
        weights: hash of the weights, hexadecimal; it tells two models of one name apart.
    """

    name: str
    version: str
    weights: str

    @property
    def series_description(self) -> str:
        """What viewers list a series as."""
        return f"{NOTICE}: {MANUFACTURER} {self.name}"[:MAX_TEXT]


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomObjects:
    """DICOM objects of one case.

    Attributes:
        segmentation: the bytes of the file.
        report: the bytes of the file; None if it was not asked for.
        warnings: what is doubtful about them, one sentence each.
    """

    segmentation: bytes
    report: bytes | None
    warnings: tuple[str, ...]


def dicom_objects(
    series: DicomSeries,
    labels: LabelMap,
    names: Mapping[str, int],
    algorithm: Algorithm,
    *,
    volume: int | None = None,
    kind: SegmentationKind = "binary",
    volumes_mm3: Mapping[str, float] | None = None,
    own_codes: Mapping[str, StructureCode] | None = None,
) -> DicomObjects:
    """Return a label map as a DICOM segmentation, with a report of volumes if they are given.

    Args:
        series: the source.
        labels: (X, Y, Z) on the grid of the source as `read` returns it, or (N, X, Y, Z) masks, one
            for each label but the background.
        names: name → value of the labels; 0 is the background.
        algorithm: what made the labels.
        volume: number of the volume in the series; None for the only one.
        kind: `binary`: one frame per segment and slice; `labelmap`: one frame per slice.
        volumes_mm3: name → volume, mm³; those of labels are reported.
        own_codes: name of a label → its code, where it is not to be the one that volseg knows.

    Raises:
        GeometryError: the labels are on another grid.
        WriteError: the objects cannot be made.
    """
    source = _source(series_layout(series), volume or 0)
    table = [row for row in label_table(names) if row.value]
    codes = [structure_code(row.name, row.value, own_codes) for row in table]
    frames = _segment_frames(source, labels, table, kind)
    try:
        with quiet_pydicom():
            images = source.headers()
            segments = [
                _segment(number, row, code, algorithm)
                for number, (row, code) in enumerate(zip(table, codes, strict=True), start=1)
            ]
            segmentation = _segmentation(source, images, frames, segments, algorithm, kind)
            report = None
            if volumes_mm3 is not None:
                volumes = [volumes_mm3.get(row.name) for row in table]
                report = volume_report(
                    images,
                    segmentation,
                    volumes,
                    codes,
                    manufacturer=MANUFACTURER,
                    model=algorithm.name,
                    version=algorithm.version,
                    description=algorithm.series_description,
                    uids=(_new_uid(), _new_uid()),
                    series_number=REPORT_NUMBER,
                )
            return DicomObjects(
                segmentation=_content(segmentation),
                report=None if report is None else _content(report),
                warnings=_warnings(table, codes),
            )
    except MemoryError:
        raise
    except Exception as error:  # highdicom raises errors of many types, with values of the header
        raise WriteError(
            f"{series}: a DICOM segmentation cannot be made of its headers "
            f"({type(error).__name__}); is an attribute of the patient, the study or the frame of "
            "reference missing?"
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The frames of one volume of a series, in the order in which a segmentation takes them.

    Attributes:
        layout: of the series.
        volume: its number.
        order: of the slices of the volume.
        whole: whether the frames are all frames of the files, in the files' own order.
    """

    layout: SeriesLayout
    volume: int
    order: tuple[int, ...]
    whole: bool

    def headers(self) -> list[Dataset]:
        """Return the headers of the files, in the order of the frames."""
        from pydicom import dcmread

        frames = self.layout.arrangement.volumes[self.volume]
        files = dict.fromkeys(frames[place].file for place in self.order)
        paths = [self.layout.files[number].path for number in files]
        return [dcmread(path, stop_before_pixels=True, force=True) for path in paths]


def _source(layout: SeriesLayout, volume: int) -> _Source:
    frames = layout.arrangement.volumes[volume]
    ascending = tuple(range(len(frames)))
    files = {frame.file for frame in frames}
    if all(len(layout.files[number].frames) == 1 for number in files):
        return _Source(layout=layout, volume=volume, order=ascending, whole=True)
    order = tuple(sorted(ascending, key=lambda place: frames[place].number))
    whole = len(files) == 1 and len(layout.files[frames[0].file].frames) == len(frames)
    return _Source(layout=layout, volume=volume, order=order if whole else ascending, whole=whole)


def _segment_frames(
    source: _Source, labels: LabelMap, table: Sequence[LabelColor], kind: SegmentationKind
) -> Array:
    """Return (frames, rows, columns) segment numbers, or (frames, rows, columns, N) masks.

    Raises:
        GeometryError: the labels are on another grid.
        WriteError: overlapping labels do not fit into a label map.
    """
    name, shape = source.layout.series, source.layout.arrangement.shape
    if labels.shape[-3:] != shape:
        raise GeometryError(
            f"{name}: the labels have shape {labels.shape[-3:]}, the series {shape}; a DICOM "
            "segmentation is on the frames of its source"
        )
    order = list(source.order)
    if labels.ndim == 3:
        numbers = np.zeros(max(row.value for row in table) + 1, np.min_scalar_type(len(table)))
        numbers[[row.value for row in table]] = np.arange(1, len(table) + 1)
        frames: Array = numbers[labels[:, ::-1].transpose(2, 1, 0)[order]]
        return frames
    if kind == "labelmap":
        raise WriteError(
            f"{name}: overlapping labels do not fit into a DICOM label map; use binary"
        )
    masks: Array = labels[:, :, ::-1].transpose(3, 2, 1, 0)[order].astype(np.uint8)
    return masks


def _segmentation(
    source: _Source,
    images: Sequence[Dataset],
    frames: Array,
    segments: Sequence[Any],
    algorithm: Algorithm,
    kind: SegmentationKind,
) -> Dataset:
    import highdicom as hd
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless

    segmentation: Dataset = hd.seg.Segmentation(
        source_images=images,
        pixel_array=frames if source.whole else _placed(source, images[0], frames),
        segmentation_type=kind.upper(),
        segment_descriptions=segments,
        series_instance_uid=_new_uid(),
        series_number=SEGMENTATION_NUMBER,
        sop_instance_uid=_new_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=algorithm.name[:MAX_TEXT],
        software_versions=algorithm.version[:MAX_TEXT],
        device_serial_number=algorithm.weights[:MAX_TEXT],
        # a viewer takes slices that are missing for a smaller volume
        omit_empty_frames=False,
        # few viewers read compressed single bits
        transfer_syntax_uid=RLELossless if kind == "labelmap" else ExplicitVRLittleEndian,
        content_label="SEGMENTATION",
        content_description=NOTICE,
        series_description=algorithm.series_description,
    )
    return segmentation


def _placed(source: _Source, image: Dataset, frames: Array) -> Any:
    """Return frames that are some of an image's, with their place in space."""
    import highdicom as hd

    slices = source.layout.arrangement.volumes[source.volume]
    first, last = slices[0], slices[-1]
    across = float((np.array(last.position) - np.array(first.position)) @ normal(first))
    channels = {}
    if frames.ndim == 4:
        channels = {"SegmentNumber": list(range(1, frames.shape[-1] + 1))}
    return hd.Volume.from_attributes(
        array=frames,
        image_position=first.position,
        image_orientation=(*first.row, *first.column),
        pixel_spacing=first.spacing,
        spacing_between_slices=across / (len(slices) - 1) if across else first.thickness,
        coordinate_system="PATIENT",
        frame_of_reference_uid=image.FrameOfReferenceUID,
        channels=channels or None,
    )


def _segment(number: int, row: LabelColor, code: StructureCode, algorithm: Algorithm) -> Any:
    """Return the description of one segment."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=row.name[:MAX_TEXT],
        segmented_property_category=concept(code.category),
        segmented_property_type=concept(code.structure),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=f"{MANUFACTURER} {algorithm.name}"[:MAX_TEXT],
            family=codes.cid7162.ArtificialIntelligence,
            version=algorithm.version[:MAX_TEXT],
            parameters={"weights_sha256": algorithm.weights},
        ),
        tracking_id=row.name[:MAX_TEXT],
        tracking_uid=_new_uid(),
        display_color=hd.color.CIELabColor.from_rgb(*row.color),
    )
    if code.laterality is not None:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [concept(code.laterality)]
    return segment


def _new_uid() -> str:
    """Return a new UID made of a random UUID (PS3.5, B.2)."""
    return f"2.25.{uuid4().int}"


def _warnings(table: Sequence[LabelColor], codes: Sequence[StructureCode]) -> tuple[str, ...]:
    own = [row.name for row, code in zip(table, codes, strict=True) if code.is_private]
    if not own:
        return ()
    listed = ", ".join(own[:3]) + (", …" if len(own) > 3 else "")
    return (
        f"the DICOM segmentation has codes of its own for {len(own)} labels ({listed}): "
        "--dicom-codes gives them others",
    )


def _content(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()
