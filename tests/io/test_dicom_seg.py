"""DICOM segmentations lie on the frames of their source and read back equal."""

from __future__ import annotations

import subprocess
from io import BytesIO
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import yaml
from dicom_files import PATIENT, SLICES, Series, enhanced, make_series
from pydicom import dcmread
from pydicom.sr.codedict import codes

from pipeline.errors import ConfigError, GeometryError, PipelineError, WriteError
from pipeline.io.dicom_codes import (
    CATEGORIES,
    LATERALITY,
    StructureCode,
    is_snomed_identifier,
    read_structure_codes,
    structure_code,
)
from pipeline.io.dicom_seg import Algorithm, DicomObjects, dicom_objects
from pipeline.io.header import series_of
from pipeline.io.label_table import label_table
from pipeline.io.reader import read
from pipeline.io.tables import read_csv
from pipeline.types import Array

hd = pytest.importorskip("highdicom")

NAMES = {
    "background": 0,
    "left hippocampus": 17,
    "right hippocampus": 53,
    "brain-stem": 16,
    "a thing of ours": 300,
}
ALGORITHM = Algorithm(name="tiny", version="0.2.0", weights="ab" * 32)
ROOT = Path(__file__).parents[2]


def made(folder: Path, labels: Array, **options: Any) -> DicomObjects:
    """Return the DICOM objects for labels of a series in a folder."""
    series = series_of(folder)
    assert series is not None
    return dicom_objects(series, labels, NAMES, ALGORITHM, **options)


def random_labels(folder: Path, volume: int | None = None) -> Array:
    """Return labels on the grid of a series; some slices are empty."""
    shape = read(folder, volume).array.shape
    values = np.array(list(NAMES.values()), np.uint16)
    labels = values[np.random.default_rng(3).integers(0, len(values), shape)]
    labels[:, :, :2] = 0
    labels[:, :, -1] = 0
    return labels


def read_back(content: bytes, folder: Path, volume: int | None = None) -> Array:
    """Return label values on the grid of the series, from the places that the frames state."""
    segmentation = hd.seg.segread(BytesIO(content))
    stored = segmentation.get_volume(combine_segments=True)
    image = read(folder, volume)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    indices = np.indices(stored.array.shape).reshape(3, -1)
    world = lps @ stored.affine @ np.vstack([indices, np.ones(indices.shape[1])])
    places = (np.linalg.inv(image.affine) @ world)[:3]
    voxels = np.rint(places).astype(int)
    np.testing.assert_allclose(places, voxels, atol=1e-3)
    values = [0, *(row.value for row in label_table(NAMES) if row.value)]
    labels = np.zeros(image.array.shape, int)
    labels[tuple(voxels)] = np.array(values)[stored.array.ravel()]
    return labels


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("form", ["single", "enhanced"])
def test_segmentations_read_back_equal(tmp_path: Path, kind: Any, form: str) -> None:
    series = make_series()
    folder = tmp_path / "in"
    if form == "single":
        series.write(folder)
    else:
        folder.mkdir()
        enhanced(series).save_as(folder / "all.dcm")
    labels = random_labels(folder)
    result = made(folder, labels, kind=kind)
    np.testing.assert_array_equal(read_back(result.segmentation, folder), labels)
    dataset = dcmread(BytesIO(result.segmentation))
    segments = len(NAMES) - 1 if kind == "binary" else 1
    assert dataset.NumberOfFrames == SLICES * segments  # empty ones too
    assert dataset.FrameOfReferenceUID == series.slices[0].dataset.FrameOfReferenceUID
    assert dataset.PatientID == PATIENT["PatientID"]
    assert dataset.SeriesInstanceUID.startswith("2.25.")
    assert "Research use only" in dataset.ContentDescription
    assert "Research use only" in dataset.SeriesDescription
    if form == "single":
        referenced = dataset.ReferencedSeriesSequence[0]
        assert referenced.SeriesInstanceUID == series.uid
        uids = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
        assert uids == {item.dataset.SOPInstanceUID for item in series.slices}


def test_frames_of_one_of_several_volumes(tmp_path: Path) -> None:
    first, second = make_series(1), make_series(2)
    for item in second.slices:
        item.name += "-second"
        item.dataset.EchoTime = "2.3"
        item.dataset.SeriesInstanceUID = first.uid
        for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
            setattr(item.dataset, name, getattr(first.slices[0].dataset, name))
    folder = Series([*first.slices, *second.slices]).write(tmp_path)
    labels = random_labels(folder, 0)
    result = made(folder, labels, volume=0)
    np.testing.assert_array_equal(read_back(result.segmentation, folder, 0), labels)
    dataset = dcmread(BytesIO(result.segmentation))
    found = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    uids = {item.ReferencedSOPInstanceUID for item in found}
    assert uids == {item.dataset.SOPInstanceUID for item in second.slices}


def test_overlapping_masks_are_segments_of_their_own(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path)
    shape = (len(NAMES) - 1, *read(folder).array.shape)
    masks = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    result = made(folder, masks)
    stored = hd.seg.segread(BytesIO(result.segmentation)).get_volume().array
    expected = masks[:, :, ::-1].transpose(3, 2, 1, 0)
    matches = [np.array_equal(stored, expected), np.array_equal(stored, expected[::-1])]
    assert any(matches)
    with pytest.raises(WriteError, match="overlapping labels"):
        made(folder, masks, kind="labelmap")


def test_codes_sides_and_colours(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path)
    result = made(folder, random_labels(folder))
    segments = dcmread(BytesIO(result.segmentation)).SegmentSequence
    left, right, stem, own = segments
    for segment, side in ((left, codes.SCT.Left), (right, codes.SCT.Right)):
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        assert kind.CodeValue == codes.cid7140.Hippocampus.value
        modifier = kind.SegmentedPropertyTypeModifierCodeSequence[0]
        assert (modifier.CodeValue, modifier.CodeMeaning) == (side.value, side.meaning)
    assert stem.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.cid7140.BrainStem.value
    assert own.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99VOLSEG"
    assert own.SegmentLabel == "a thing of ours"
    assert result.warnings == (
        "the DICOM segmentation has codes of its own for 1 labels (a thing of ours): "
        "--dicom-codes gives them others",
    )
    assert left.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0.2.0"
    color = hd.color.CIELabColor.from_dicom_value(tuple(left.RecommendedDisplayCIELabValue))
    np.testing.assert_allclose(color.to_rgb(), (220, 216, 20), atol=2)


CODES = """structure,category,scheme,code,meaning,laterality
a thing of ours,Tissue,99LAB,T-1,Lab's thing,
hippocampus,,SCT,5366008,Hippocampus again,
Right-Hippocampus,,SCT,4958002,Amygdala,left
"""


def codes_of(folder: Path, text: str) -> dict[str, StructureCode]:
    """Return the codes in a table."""
    (folder / "codes.csv").write_text(text, encoding="utf-8")
    return read_structure_codes(folder / "codes.csv", list(NAMES)[1:])


def test_codes_of_a_table_replace_those_that_are_known(tmp_path: Path) -> None:
    """A row with a side is of that label, one without of both sides; others stay as they are."""
    own = codes_of(tmp_path, CODES)
    assert set(own) == {"left hippocampus", "right hippocampus", "a thing of ours"}
    folder = make_series().write(tmp_path / "in")
    labels = random_labels(folder)
    volumes = dict.fromkeys(NAMES, 12.0)
    result = made(folder, labels, own_codes=own, volumes_mm3=volumes)
    assert result.warnings == ()
    np.testing.assert_array_equal(read_back(result.segmentation, folder), labels)
    found = []
    for segment in dcmread(BytesIO(result.segmentation)).SegmentSequence:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        sides = kind.get("SegmentedPropertyTypeModifierCodeSequence", [])
        category = segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning
        found.append(
            (
                segment.SegmentLabel,
                kind.CodingSchemeDesignator,
                kind.CodeValue,
                [side.CodeMeaning for side in sides],
                category,
            )
        )
    assert found == [
        ("left hippocampus", "SCT", "5366008", ["Left"], "Anatomical Structure"),
        ("right hippocampus", "SCT", "4958002", ["Left"], "Anatomical Structure"),
        ("brain-stem", "SCT", "119238007", [], "Anatomical Structure"),
        ("a thing of ours", "99LAB", "T-1", [], "Tissue"),
    ]
    report = hd.sr.srread(BytesIO(result.report or b""))
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert groups[0].finding_type.meaning == "Hippocampus again"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("structure,code\nx,1\n", "found the columns structure, code, expected structure, scheme"),
        ("", "found the columns none"),
        ("structure,scheme,code,meaning\nliver,SCT,10200004,Liver\n",
         "line 2: liver is no label of the model; expected one of left hippocampus"),
        ("structure,scheme,code,meaning\nbrain stem,SCT,119238008,Stem\n",
         "line 2: 119238008 is no identifier of SNOMED CT.*typing error"),
        ("structure,scheme,code,meaning\nbrain stem,99X,,Stem\n", "code has 0 characters"),
        (f"structure,scheme,code,meaning\nbrain stem,99X,1,{'x' * 65}\n", "expected 1 to 64"),
        ("structure,scheme,code,meaning,category\nbrain stem,99X,1,Stem,Organ\n",
         "category Organ, expected one of AnatomicalStructure"),
        ("structure,scheme,code,meaning,laterality\nbrain stem,99X,1,Stem,middle\n",
         "laterality middle, expected left"),
        ("structure,scheme,code,meaning\nbrain stem,99X,1,A\n\nBrain-Stem,99X,2,B\n",
         "line 4: Brain-Stem has two rows; keep one"),
    ],
)  # fmt: skip
def test_a_wrong_table_of_codes_is_explained(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        codes_of(tmp_path, text)


def test_a_missing_table_of_codes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_structure_codes(tmp_path / "none.csv", NAMES)
    (tmp_path / "latin.csv").write_bytes(b"structure\xe4")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_structure_codes(tmp_path / "latin.csv", NAMES)


def test_check_digits_find_typing_errors() -> None:
    """Every change of one digit and every exchange of neighbours, in all codes that are known."""
    known = [
        row["code"]
        for row in read_csv(ROOT / "pipeline" / "io" / "dicom_codes.csv")
        if row["scheme"] == "SCT"
    ]
    known += [code for _, code, _ in (*CATEGORIES.values(), *LATERALITY.values())]
    assert all(map(is_snomed_identifier, known))
    for code in known:
        for place, digit in enumerate(code):
            for other in set("0123456789") - {digit}:
                assert not is_snomed_identifier(code[:place] + other + code[place + 1 :])
            swapped = code[:place] + code[place : place + 2][::-1] + code[place + 2 :]
            assert swapped == code or not is_snomed_identifier(swapped)


def test_categories_are_those_of_the_standard() -> None:
    group = codes.cid7150
    found = {name: getattr(group, name) for name in group.dir()}
    assert {
        name: (code.scheme_designator, code.value, code.meaning) for name, code in found.items()
    } == CATEGORIES


def test_every_code_is_one_of_the_standard() -> None:
    scheme = {"SCT": codes.SCT, "DCM": codes.DCM}
    for row in read_csv(ROOT / "pipeline" / "io" / "dicom_codes.csv"):
        group = getattr(codes, row["source"].replace("CID ", "cid"))
        known = {getattr(group, name) for name in group.dir()}
        found = [code for code in known if code.value == row["code"]]
        assert [code.meaning for code in found] == [row["meaning"]]
        assert found[0].scheme_designator == row["scheme"]
        assert row["scheme"] in scheme


def test_every_structure_of_the_brain_bundle_has_a_code() -> None:
    spec = yaml.safe_load((ROOT / "bundles/brain_mr_structures/configs/spec.yaml").read_text())
    found = {name: structure_code(name, value) for name, value in spec["labels"].items() if value}
    assert not [name for name, code in found.items() if code.is_private]
    for name, code in found.items():
        side = name.split()[0]
        assert (code.laterality or ("", "", "none"))[2].lower() == (
            side if side in ("left", "right") else "none"
        )
    assert len({(code.structure, code.laterality) for code in found.values()}) == len(found)


def test_the_report_holds_the_volumes(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path)
    volumes = {"left hippocampus": 3456.789, "brain-stem": 20000.0, "a sum": 1.0}
    result = made(folder, random_labels(folder), volumes_mm3=volumes)
    assert result.report is not None
    report = hd.sr.srread(BytesIO(result.report))
    groups = report.content.get_volumetric_roi_measurement_groups()
    values = [group.get_measurements(codes.SCT.Volume)[0].value for group in groups]
    assert values == [3456.789, 20000.0]
    assert "Research use only" in report.SeriesDescription
    segmentation = dcmread(BytesIO(result.segmentation))
    assert groups[0].referenced_segment is not None
    evidence = str(report.CurrentRequestedProcedureEvidenceSequence)
    assert segmentation.SOPInstanceUID in evidence


def test_each_object_has_new_uids(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path)
    labels = random_labels(folder)
    uids = {dcmread(BytesIO(made(folder, labels).segmentation)).SOPInstanceUID for _ in range(2)}
    assert len(uids) == 2


def test_labels_on_another_grid_are_refused(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path)
    with pytest.raises(GeometryError, match="on the frames of its source"):
        made(folder, random_labels(folder)[1:])


def test_headers_without_a_frame_of_reference_are_refused(tmp_path: Path) -> None:
    series = make_series().change(lambda number, dataset: delattr(dataset, "FrameOfReferenceUID"))
    folder = series.write(tmp_path)
    with pytest.raises(PipelineError, match="cannot be made of its headers") as caught:
        made(folder, random_labels(folder))
    assert not any(value in str(caught.value) for value in PATIENT.values())


@pytest.mark.system
@pytest.mark.parametrize("form", ["single", "enhanced"])
def test_dciodvfy_finds_no_error(tmp_path: Path, form: str) -> None:
    if which("dciodvfy") is None:
        pytest.skip("dciodvfy of the Debian package dicom3tools is not installed")
    folder = tmp_path / "in"
    folder.mkdir()
    if form == "single":
        make_series().write(folder)
    else:
        enhanced(make_series()).save_as(folder / "all.dcm")
    own = codes_of(tmp_path, CODES)
    volumes = dict.fromkeys(NAMES, 12.0)
    result = made(folder, random_labels(folder), volumes_mm3=volumes, own_codes=own)
    for name, content in (("seg", result.segmentation), ("sr", result.report)):
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(content or b"")
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        assert not [line for line in lines if line.startswith("Error")]
