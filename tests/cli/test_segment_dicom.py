"""DICOM series from the command to the output folder; nothing of a patient gets into any text."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from dicom_files import PATIENT, Series, make_series
from pydicom import dcmread

from pipeline.cli import main

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
