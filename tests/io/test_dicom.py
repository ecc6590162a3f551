"""DICOM series are found by their UID and read as dcm2niix converts them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_files import (
    COLUMNS,
    DISTANCE,
    PATIENT,
    ROWS,
    SLICES,
    Series,
    compress_with_gdcm,
    enhanced,
    make_series,
    pixels,
    rotation,
)
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.uid import RLELossless, generate_uid

from pipeline.errors import PipelineError, ReadError, VolumeError
from pipeline.io import dicom_frames
from pipeline.io.dicom_discovery import find_series
from pipeline.io.dicom_series import is_dicom
from pipeline.io.discovery import named_files
from pipeline.io.header import read_header, source_files
from pipeline.io.image import Image
from pipeline.io.reader import read

GEOMETRY_MM = 1e-3


def by_dcm2niix(folder: Path, out: Path) -> list[nib.Nifti1Image]:
    """Return what dcm2niix makes of a folder."""
    dcm2niix = pytest.importorskip("dcm2niix")
    out.mkdir()
    command = [dcm2niix.bin, "-b", "n", "-z", "n", "-f", "%s", "-o", str(out), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return [nib.load(path) for path in sorted(out.glob("*.nii"))]


def assert_same(image: Image, converted: nib.Nifti1Image) -> None:
    """Check that an image has the voxels and the geometry of dcm2niix's, however stored."""
    ours = nib.as_closest_canonical(nib.Nifti1Image(image.array.astype(np.float64), image.affine))
    other = nib.as_closest_canonical(converted)
    assert ours.shape == other.shape
    np.testing.assert_allclose(ours.affine, other.affine, atol=GEOMETRY_MM)
    np.testing.assert_allclose(ours.get_fdata(), other.get_fdata(), rtol=1e-6)


def refused(folder: Path, words: str) -> None:
    """Check that header and voxels of a folder are refused alike, without a word of the patient."""
    for function in (read_header, read):
        with pytest.raises(PipelineError, match=words) as caught:
            function(folder)
        text = str(caught.value)
        assert not any(value in text for value in PATIENT.values())


def test_affine_and_voxels_follow_from_the_headers(tmp_path: Path) -> None:
    image = read(make_series().write(tmp_path))
    assert image.array.shape == (COLUMNS, ROWS, SLICES)
    assert image.array.dtype == np.uint16
    np.testing.assert_array_equal(image.array[:, ::-1].transpose(2, 1, 0), pixels())
    lps = np.array([-5.0 + 0.9 * 4, -9.0 + 1.3 * 6, -12.0 + DISTANCE * 2])
    world = np.diag([-1, -1, 1]) @ (rotation() @ lps + [3.0, 14.0, -8.0])
    voxel = [4, ROWS - 1 - 6, 2, 1]
    np.testing.assert_allclose((image.affine @ voxel)[:3], world, atol=1e-5)


@pytest.mark.parametrize(
    "angles", [(0, 0, 0), (11, -7, 23), (90, 0, 0), (0, 90, 3), (-80, 5, 170), (35, 50, -20)]
)
def test_series_are_as_dcm2niix_converts_them(tmp_path: Path, angles: tuple[int, ...]) -> None:
    folder = make_series(angles=angles).write(tmp_path / "in")
    assert_same(read(folder), *by_dcm2niix(folder, tmp_path / "out"))


@pytest.mark.parametrize("name", ["HFS_t1_sagittal", "HFDR_t1_sagittal"])
def test_real_series_are_stored_as_dcm2niix_stores_them(
    tmp_path: Path, data: Path, name: str
) -> None:
    folder = data / "dicom" / name
    image, (converted,) = read(folder), by_dcm2niix(folder, tmp_path / "out")
    np.testing.assert_allclose(image.affine, converted.affine, atol=GEOMETRY_MM)
    np.testing.assert_array_equal(image.array, np.asarray(converted.dataobj))


@pytest.mark.parametrize("scaling", [[(2.0, -10.0)], [(1.0, 0.0), (2.5, 3.0), (0.5, -1.0)]])
def test_slope_and_intercept_count_per_slice(
    tmp_path: Path, scaling: list[tuple[float, float]]
) -> None:
    def scale(number: int, dataset: Any) -> None:
        slope, intercept = scaling[number % len(scaling)]
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)

    image = read(make_series().change(scale).write(tmp_path / "in"))
    expected = [
        scaling[number % len(scaling)][0] * slice_ + scaling[number % len(scaling)][1]
        for number, slice_ in enumerate(pixels().astype(np.float64))
    ]
    assert image.array.dtype == np.float32
    np.testing.assert_allclose(image.array[:, ::-1].transpose(2, 1, 0), expected, rtol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_enhanced_files_are_read_frame_by_frame(tmp_path: Path, scaled: bool) -> None:
    series = make_series()
    if scaled:

        def scale(number: int, dataset: Any) -> None:
            dataset.RescaleSlope, dataset.RescaleIntercept = str(1 + number), "-3"
            dataset.RescaleType = "US"

        series.change(scale)
    expected = read(series.write(tmp_path / "single"))
    folder = tmp_path / "enhanced"
    folder.mkdir()
    enhanced(series).save_as(folder / "a file of no known name.txt")
    image = read(folder)
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-6)
    np.testing.assert_array_equal(image.array, expected.array)
    if not scaled:
        assert_same(image, *by_dcm2niix(folder, tmp_path / "out"))


@pytest.mark.parametrize(
    "syntax", ["JPEGLSLossless", "JPEG2000Lossless", "JPEGLosslessProcess14_1"]
)
def test_compressed_files_have_the_same_voxels(tmp_path: Path, syntax: str) -> None:
    folder = make_series().write(tmp_path / "in")
    for path in folder.iterdir():
        compress_with_gdcm(path, syntax)
    image = read(folder)
    np.testing.assert_array_equal(image.array[:, ::-1].transpose(2, 1, 0), pixels())
    assert_same(image, *by_dcm2niix(folder, tmp_path / "out"))


def test_run_length_encoded_files_have_the_same_voxels(tmp_path: Path) -> None:
    series = make_series().change(lambda number, dataset: dataset.compress(RLELossless))
    folder = series.write(tmp_path / "in")
    np.testing.assert_array_equal(read(folder).array[:, ::-1].transpose(2, 1, 0), pixels())
    assert_same(read(folder), *by_dcm2niix(folder, tmp_path / "out"))


def test_without_a_decoder_the_message_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_series().write(tmp_path)
    for path in folder.iterdir():
        compress_with_gdcm(path, "JPEGLosslessProcess14_1")

    class Unavailable:
        is_available = False

    monkeypatch.setattr("pydicom.pixels.decoders.base.get_decoder", lambda syntax: Unavailable())
    refused(folder, f"JPEG Lossless.*pip install {dicom_frames.DECODER_PACKAGE}")


def test_names_and_folders_of_files_do_not_matter(tmp_path: Path) -> None:
    first, second = make_series(1), make_series(2)
    for number, item in enumerate(first.slices):
        item.name = f"a/{number % 3}/{number}" + [".nii", ".txt", ".hdr", ".ima", ""][number % 5]
    for number, item in enumerate(second.slices):
        item.name = f"a/{number % 2}/{number + 100}.jpeg"
    first.write(tmp_path)
    second.write(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("no DICOM " * 50)
    files = named_files(tmp_path)
    assert all(file.dicom for file in files)
    found = find_series(file.path for file in files)
    assert {series.uid for series in found.series} == {first.uid, second.uid}
    by_uid = {series.uid: series for series in found.series}
    for seed, series in ((1, first), (2, second)):
        array = read(by_uid[series.uid]).array
        np.testing.assert_array_equal(array[:, ::-1].transpose(2, 1, 0), pixels(seed))
        assert len(source_files(by_uid[series.uid])) == SLICES


def test_folder_and_glob_find_the_same_files(tmp_path: Path) -> None:
    make_series().write(tmp_path / "x" / "y")
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4)), np.eye(4)), tmp_path / "x" / "z.nii.gz")
    folder, pattern = named_files(tmp_path), named_files(tmp_path / "*" / "**")
    assert sorted(file.path for file in folder) == sorted(file.path for file in pattern)
    assert len(folder) == SLICES + 1


def test_files_without_a_preamble_are_dicom(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[132:])
        assert is_dicom(path)
    np.testing.assert_array_equal(read(folder).array[:, ::-1].transpose(2, 1, 0), pixels())
    (tmp_path / "text").write_bytes(b"\x08\x00 this is no DICOM")
    assert not is_dicom(tmp_path / "text")


def test_other_objects_and_modalities_are_skipped_with_a_count(tmp_path: Path) -> None:
    make_series().write(tmp_path / "mr")
    make_series(1).change(lambda number, dataset: setattr(dataset, "Modality", "CT")).write(
        tmp_path / "ct"
    )

    def secondary(number: int, dataset: Any) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7" if number else "1.2.3.4.5"

    make_series(2).change(secondary).write(tmp_path / "sc")
    found = find_series(file.path for file in named_files(tmp_path))
    assert len(found.series) == 1
    assert found.skipped == {
        "CT image": SLICES,
        "Secondary Capture Image Storage": SLICES - 1,
        "object of a private kind": 1,
    }
    both = find_series((file.path for file in named_files(tmp_path)), ["MR", "CT"])
    assert len(both.series) == 2
    refused(tmp_path / "ct", "holds 0 DICOM series of MR images, expected one; skipped: 9 × CT")


def test_copies_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = make_series().write(tmp_path / "in")
    shutil.copytree(folder, folder / "copy")
    image = read(folder)
    np.testing.assert_array_equal(image.array[:, ::-1].transpose(2, 1, 0), pixels())
    assert image.warnings == (
        f"{SLICES} files are copies of others in the series and were left out",
    )


def test_slices_sent_twice_are_left_out_with_a_warning(tmp_path: Path) -> None:
    series = make_series()
    again = make_series(uid=series.uid)
    for item in again.slices[2:4]:
        item.name += "-again"
        series.slices.append(item)
    image = read(series.write(tmp_path))
    np.testing.assert_array_equal(image.array[:, ::-1].transpose(2, 1, 0), pixels())
    assert image.warnings == ("2 slices were there twice, with the same pixels",)


def test_conflicting_files_are_refused(tmp_path: Path) -> None:
    series = make_series()
    folder = series.write(tmp_path)
    first = series.slices[0].dataset
    first.PixelData = pixels(5)[0].tobytes()
    first.save_as(folder / "other")
    refused(folder, "claim to be the same image")
    first.SOPInstanceUID = generate_uid()
    first.save_as(folder / "other")
    refused(folder, "1 to 2 times, with different pixels")


def test_a_gap_is_refused(tmp_path: Path) -> None:
    series = make_series()
    del series.slices[4]
    refused(series.write(tmp_path), "about 1 slices are missing.*2.7 mm.*5.4 mm")


@pytest.mark.parametrize(("shift", "outcome"), [(0.001, ""), (0.1, "warning"), (0.5, "error")])
def test_unequal_distances(tmp_path: Path, shift: float, outcome: str) -> None:
    def move(number: int, dataset: Any) -> None:
        if number == 3:
            place = np.array(dataset.ImagePositionPatient, dtype=float) + rotation()[:, 2] * shift
            dataset.ImagePositionPatient = [f"{value:.8g}" for value in place]

    folder = make_series().change(move).write(tmp_path)
    if outcome == "error":
        refused(folder, "unequal distances: one lies 0.5 mm off its place")
    else:
        warned = [text for text in read(folder).warnings if "unequal distances" in text]
        assert len(warned) == (outcome == "warning")


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    def shear(number: int, dataset: Any) -> None:
        place = np.array(dataset.ImagePositionPatient, dtype=float) + rotation()[:, 1] * number / 2
        dataset.ImagePositionPatient = [f"{value:.8g}" for value in place]

    refused(make_series().change(shear).write(tmp_path), r"shifted against each other \(10\.5°\)")


def test_two_orientations_in_one_series_are_refused(tmp_path: Path) -> None:
    series = make_series()
    other = make_series(1, angles=(90, 0, 0), uid=series.uid, count=5)
    for item in other.slices:
        item.name += "-other"
    both = Series([*series.slices, *other.slices])
    refused(both.write(tmp_path), "2 orientations .*9, 5 slices.*localiser")


def echoes(uid: str | None = None, *, stated: bool = True) -> Series:
    """Return a series of two echoes, the second one first."""
    first = make_series(1)
    second = make_series(2, uid=first.uid)
    for item in second.slices:
        item.name += "-second"
        if stated:
            item.dataset.EchoTime = "2.3"
    return Series([*first.slices, *second.slices])


def test_several_echoes_are_volumes_to_choose_from(tmp_path: Path) -> None:
    folder = echoes().write(tmp_path / "in")
    assert read_header(folder).volumes == 2
    with pytest.raises(VolumeError, match=r"another EchoTime\): holds 2 volumes.*--volume T"):
        read(folder)
    for number, seed in ((0, 2), (1, 1)):  # the shorter time first
        array = read(folder, number).array
        np.testing.assert_array_equal(array[:, ::-1].transpose(2, 1, 0), pixels(seed))


def test_volumes_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    refused(echoes(stated=False).write(tmp_path), "2 times with different pixels, and nothing")


def _without(name: str) -> Any:
    return lambda number, dataset: delattr(dataset, name)


def _with(name: str, value: Any) -> Any:
    return lambda number, dataset: setattr(dataset, name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("ImagePositionPatient"), "has no ImagePositionPatient"),
        (_without("ImageOrientationPatient"), "has no ImageOrientationPatient"),
        (_without("PixelSpacing"), "has no PixelSpacing"),
        (_without("Rows"), "an attribute that an image needs is missing"),
        (_with("PixelSpacing", ["0", "1"]), "PixelSpacing .* is not above 0"),
        (_with("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"]), "no pair of perp"),
        (_with("ImageType", ["DERIVED", "PRIMARY", "M", "MOSAIC"]), "Siemens mosaic.*dcm2niix"),
        (_with("PhotometricInterpretation", "MONOCHROME1"), "not MONOCHROME2"),
        (_with("SamplesPerPixel", 3), "colours"),
        (_with("NumberOfFrames", "4"), "several frames without a place"),
    ],
)
def test_unknown_kinds_are_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    refused(make_series().change(change).write(tmp_path), words)


@pytest.mark.parametrize("size", [140, 600, -30])
def test_truncated_files_are_refused(tmp_path: Path, size: int) -> None:
    folder = make_series().write(tmp_path)
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ReadError):
        read_header(folder)
    with pytest.raises(ReadError):
        read(folder)


def test_one_slice_is_read_with_a_warning(tmp_path: Path) -> None:
    folder = make_series(count=1).write(tmp_path)
    image = read(folder)
    assert image.array.shape == (COLUMNS, ROWS, 1)
    assert np.isclose(np.linalg.norm(image.affine[:3, 2]), DISTANCE)
    assert "one slice" in image.warnings[0]


def test_implicit_and_big_endian_files(tmp_path: Path) -> None:
    def implicit(number: int, dataset: Any) -> None:
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"

    def big(number: int, dataset: Any) -> None:
        values: NDArray[np.uint16] = np.frombuffer(dataset.PixelData, np.uint16)
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.2"
        dataset.PixelData = values.astype(">u2").tobytes()

    folder = make_series().change(implicit).write(tmp_path / "implicit")
    np.testing.assert_array_equal(read(folder).array[:, ::-1].transpose(2, 1, 0), pixels())
    for item in make_series().change(big).slices:
        path = tmp_path / "big" / item.name
        path.parent.mkdir(exist_ok=True)
        dcmwrite(path, item.dataset, implicit_vr=False, little_endian=False, force_encoding=True)
    array = read(tmp_path / "big").array
    np.testing.assert_array_equal(array[:, ::-1].transpose(2, 1, 0), pixels())


def test_without_the_extra_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.dicom_series.has_pydicom", lambda: False)
    refused(make_series().write(tmp_path), r"pip install 'volseg\[dicom\]'")
