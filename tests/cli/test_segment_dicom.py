"""DICOM series from the command to the output folder; nothing of a patient gets into any text."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from dicom_files import PATIENT, Series, make_localiser, make_series
from pydicom import dcmread

from pipeline.cli import main

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
COUNT = 24  # slices: as many as the tiny bundle's windows take


@pytest.fixture
def series() -> Series:
    """A series that is large enough to be segmented."""
    return make_series(count=COUNT)


def segment(*words: str | Path) -> Result:
    """Run `volseg segment` in this process."""
    return CliRunner().invoke(main, ["segment", *map(str, words), "--device", "cpu", "--jobs", "1"])


def texts(folder: Path, result: Result) -> str:
    """Return all text that a command left: what it printed, names, and every text file."""
    found = [result.output, *(str(path.relative_to(folder)) for path in folder.rglob("*"))]
    found += [path.read_text() for path in folder.rglob("*.*") if path.suffix in TEXT]
    return "\n".join(found)


TEXT = {".csv", ".json", ".log", ".txt", ".tsv"}


@pytest.mark.slow
def test_series_in_objects_out(tiny_bundle_3d: Path, series: Series, tmp_path: Path) -> None:
    folder, out = series.write(tmp_path / "in"), tmp_path / "out"
    broken = make_series(1)
    del broken.slices[3]
    broken.write(folder / "broken")
    make_series(2).change(lambda number, item: setattr(item, "Modality", "CT")).write(folder / "ct")
    nib.save(nib.load(_nifti(tmp_path)), folder / "other.nii.gz")
    words = (folder, "-o", out, "--bundle", tiny_bundle_3d, "--dicom-seg", "--dicom-sr")
    result = segment(*words)
    assert result.exit_code == 1, result.output  # one series has a gap
    assert "9 × CT image" in result.output
    names = {path.name for path in out.iterdir()}
    assert {f"{series.uid}_seg.nii.gz", f"{series.uid}_seg.dcm", f"{series.uid}_sr.dcm"} <= names
    assert "other_seg.nii.gz" in names and "other_seg.dcm" not in names
    assert f"{broken.uid}_seg.nii.gz" not in names
    text = texts(out, result)
    assert "slices are missing" in text
    assert not [value for value in PATIENT.values() if value in text]
    assert dcmread(out / f"{series.uid}_seg.dcm").PatientID == PATIENT["PatientID"]

    again = segment(*words)
    assert "3 cases" in again.output and "2 of them from an earlier run" in again.output
    (out / f"{series.uid}_seg.dcm").unlink()
    before = np.asarray(nib.load(out / f"{series.uid}_seg.nii.gz").dataobj)
    segment(*words)
    assert (out / f"{series.uid}_seg.dcm").exists()
    after = np.asarray(nib.load(out / f"{series.uid}_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(before, after)

    records = [json.loads(path.read_text()) for path in out.glob(".volseg/records/*/*.json")]
    record = next(item for item in records if item["case"] == series.uid)
    assert len(record["inputs"]) == COUNT
    assert len(record["outputs"]) == 3

    # a series that is broken now loses its outputs
    (folder / series.slices[5].name).unlink()
    assert segment(*words).exit_code == 1
    assert not list(out.glob(f"{series.uid}_*"))


@pytest.mark.slow
def test_what_is_no_volume_is_left_out_by_name(
    tiny_bundle_3d: Path, series: Series, tmp_path: Path
) -> None:
    """With a row, not as a failure; when it is found again it is left out again."""
    folder, out = series.write(tmp_path / "in"), tmp_path / "out"
    scout = make_localiser()
    scout.write(folder / "scout")
    pictures = make_series(2)
    pictures.change(lambda number, item: setattr(item, "SOPClassUID", SECONDARY_CAPTURE))
    pictures.write(folder / "pictures")
    words = (folder, "-o", out, "--bundle", tiny_bundle_3d, "--dicom-seg")
    for summary in ("1 of 1 cases are in", "1 of them from an earlier run, 2 DICOM series were"):
        result = segment(*words)
        assert result.exit_code == 0, result.output
        assert summary in result.output
        assert f"left out {scout.uid}: no volume: slices of 3 orientations" in result.output
        with open(out / "cases.csv", newline="") as file:
            rows = {row["case"]: row for row in csv.DictReader(file)}
        assert {name: row["status"] for name, row in rows.items()} == {
            series.uid: "done",
            scout.uid: "left out",
            pictures.uid: "left out",
        }
        assert "Secondary Capture" in rows[pictures.uid]["message"]
    text = texts(out, result)
    assert f"left out {scout.uid}" in (out / "volseg.log").read_text()
    assert json.loads((out / "run.json").read_text())["cases"] == {"done": 1, "left out": 2}
    assert not [value for value in PATIENT.values() if value in text]

    # files that arrive make a volume of it, and files that are gone leave no result
    full = make_series(3, uid=scout.uid, count=COUNT).write(tmp_path / "more")
    for path in (folder / "scout").iterdir():
        path.unlink()
    for path in full.iterdir():
        path.rename(folder / "scout" / path.name)
    assert segment(*words).exit_code == 0
    assert (out / f"{scout.uid}_seg.dcm").exists()
    for path in sorted((folder / "scout").iterdir())[1:]:
        path.unlink()
    left = dcmread(next((folder / "scout").iterdir()))
    left.InstanceNumber = 1
    left.save_as(next((folder / "scout").iterdir()))
    result = segment(*words)
    assert result.exit_code == 0, result.output
    assert f"left out {scout.uid}: no volume: one slice" in result.output
    assert not list(out.glob(f"{scout.uid}_*"))


@pytest.mark.slow
def test_codes_come_from_the_bundle_or_a_table(
    tiny_bundle_3d: Path, series: Series, tmp_path: Path
) -> None:
    """A case is done again when its codes change, and only then."""
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    shutil.copytree(tiny_bundle_3d, bundle)
    folder = series.write(tmp_path / "in")
    words = (folder, "-o", out, "--bundle", bundle)

    def code_after(*more: str | Path) -> tuple[str, str]:
        result = segment(*words, *more)
        assert result.exit_code == 0, result.output
        with open(out / "cases.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        (segment_one, *_) = dcmread(out / f"{series.uid}_seg.dcm").SegmentSequence
        kind = segment_one.SegmentedPropertyTypeCodeSequence[0]
        assert ("has codes of its own" in row["warnings"]) == (kind.CodeValue == "LABEL-7")
        return f"{kind.CodingSchemeDesignator} {kind.CodeValue}", row["reason"]

    assert code_after("--dicom-seg") == ("99VOLSEG LABEL-7", "")
    text = "structure,scheme,code,meaning\nfront,SCT,{},Front\nback,99LAB,2,Back\n"
    (bundle / "configs" / "dicom_codes.csv").write_text(text.format("5366008"))
    again = ("SCT 5366008", "its DICOM objects have other codes")
    assert code_after("--dicom-seg") == code_after("--dicom-seg") == again
    assert code_after() == again  # without a wish for DICOM nothing is done again
    table = tmp_path / "codes.csv"
    table.write_text(text.format("4958002"))
    assert code_after("--dicom-seg", "--dicom-codes", table)[0] == "SCT 4958002"
    for more, says in (
        (("--dicom-codes", table), "--dicom-codes is for --dicom-seg"),
        (("--dicom-seg", "--dicom-codes", tmp_path / "none.csv"), "cannot be read as UTF-8"),
    ):
        result = segment(*words, *more)
        assert (result.exit_code, says in " ".join(result.output.split())) == (2, True)


@pytest.mark.slow
def test_a_dry_run_names_what_is_left_out(
    tiny_bundle_3d: Path, series: Series, tmp_path: Path
) -> None:
    folder, scout = series.write(tmp_path / "in"), make_localiser(stated=True)
    scout.write(folder / "scout")
    words = (folder, "-o", tmp_path / "out", "--bundle", tiny_bundle_3d, "--dry-run", "--json")
    result = segment(*words)
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(result.stdout)}
    assert "LOCALIZER" in rows[scout.uid]["left_out"]
    assert (rows[series.uid]["left_out"], rows[scout.uid]["output"]) == ("", "")
    assert "1 cases, 0 of them will fail; 1 DICOM series are left out" in result.stderr


def test_a_localiser_alone_is_an_error(tiny_bundle_3d: Path, tmp_path: Path) -> None:
    scout = make_localiser()
    folder = scout.write(tmp_path / "in")
    result = segment(folder, "-o", tmp_path / "out", "--bundle", tiny_bundle_3d, "--dicom-seg")
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert f"nothing to segment: DICOM series {scout.uid}: no volume: slices of 3" in words
    assert not (tmp_path / "out").exists()


def _nifti(folder: Path) -> Path:
    path = folder / "noise.nii.gz"
    array = np.random.default_rng(0).normal(100, 20, (17, 24, 21)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([1.1, 1.3, 0.9, 1])), path)
    return path


@pytest.mark.slow
def test_a_dry_run_shows_each_series(tiny_bundle_3d: Path, series: Series, tmp_path: Path) -> None:
    folder = series.write(tmp_path / "in")
    result = segment(folder, "-o", tmp_path / "out", "--bundle", tiny_bundle_3d, "--dry-run")
    assert result.exit_code == 0, result.output
    assert series.uid in result.output
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_first(
    tiny_bundle_3d: Path, series: Series, tmp_path: Path
) -> None:
    folder = series.write(tmp_path / "in")
    given = (folder, "-o", tmp_path / "out", "--bundle", tiny_bundle_3d)
    for words, text in (
        (("--dicom-sr",), "refers to a segmentation"),
        (("--dicom-seg", "binary", "--labels-spacing", "1"), "no --labels-spacing"),
        (("--modality", "CT"), "24 × MR image"),
    ):
        result = segment(*given, *words)
        assert result.exit_code == 2
        assert text in result.output
    (tmp_path / "nifti").mkdir()
    _nifti(tmp_path / "nifti")
    result = segment(
        tmp_path / "nifti", "-o", tmp_path / "out", "--bundle", tiny_bundle_3d, "--dicom-seg"
    )
    assert result.exit_code == 2
    assert "none of the inputs is a DICOM series" in result.output


@pytest.mark.stress
def test_worker_processes_and_dask_give_the_same(
    tiny_bundle_3d: Path, series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series.write(tmp_path / "in" / "a")
    other = make_series(1, count=COUNT, angles=(90, 0, 0))
    other.write(tmp_path / "in" / "b")
    monkeypatch.chdir(tmp_path)  # a relative folder, which workers of Dask have to find
    found: list[list[bytes]] = []
    for words in (["--jobs", "2"], ["--dask", "local", "--jobs", "2"]):
        out = tmp_path / f"out{len(found)}"
        given = ["segment", "in", "-o", out, "--bundle", tiny_bundle_3d, "--device", "cpu"]
        result = CliRunner().invoke(main, [*map(str, given), "--dicom-seg", "labelmap", *words])
        assert result.exit_code == 0, result.output
        images = sorted(out.glob("*_seg.nii.gz"))
        assert {path.name.removesuffix("_seg.nii.gz") for path in images} == {series.uid, other.uid}
        assert len(list(out.glob("*_labelmap.dcm"))) == 2
        found.append([path.read_bytes() for path in images])
    assert found[0] == found[1]
    shards = [
        segment(
            "in", "-o", tmp_path / "sharded", "--bundle", tiny_bundle_3d, "--shard", f"{part}/2"
        )
        for part in (1, 2)
    ]
    assert [result.exit_code for result in shards] == [0, 0]
    assert len(list((tmp_path / "sharded").glob("*_seg.nii.gz"))) == 2


@pytest.mark.stress
def test_what_is_no_head_ends_in_warnings(tmp_path: Path) -> None:
    """A leg-like cylinder, segmented by the shipped bundle of the brain."""
    count, rows, columns = 40, 160, 150
    noise = np.random.default_rng(0).normal(0, 60, (count, rows, columns))
    place = np.mgrid[:rows, :columns] - np.array([rows, columns]).reshape(2, 1, 1) / 2
    radius = np.hypot(*place) * 1.2
    leg = np.select([radius < 22, radius < 26, radius < 55, radius < 65], [1300, 80, 600, 1500], 1)
    series = make_series(count=count, angles=(0, 0, 0), distance=4.5)
    for item, values in zip(series.slices, np.abs(leg + noise), strict=True):
        item.dataset.Rows, item.dataset.Columns = rows, columns
        item.dataset.PixelSpacing = ["1.2", "1.2"]
        item.dataset.PixelData = values.clip(0, 4095).astype(np.uint16).tobytes()
    out = tmp_path / "out"
    result = segment(series.write(tmp_path / "in"), "-o", out)
    assert result.exit_code == 0, result.output
    text = (out / "cases.csv").read_text()
    assert "volumes are out of range" in text


@pytest.mark.slow
def test_a_table_names_series_by_their_folders(
    tiny_bundle_3d: Path, series: Series, tmp_path: Path
) -> None:
    series.write(tmp_path / "in" / "good")
    make_series(1).write(tmp_path / "in" / "two" / "a")
    make_series(2).write(tmp_path / "in" / "two" / "b")
    table = tmp_path / "cases.csv"
    table.write_text("case,image\nmine,in/good\nbad,in/two\n")
    out = tmp_path / "out"
    result = segment(table, "-o", out, "--bundle", tiny_bundle_3d, "--dicom-seg")
    assert result.exit_code == 1
    assert "holds 2 DICOM series" in result.output
    assert sorted(path.name for path in out.glob("*_seg.*")) == ["mine_seg.dcm", "mine_seg.nii.gz"]
