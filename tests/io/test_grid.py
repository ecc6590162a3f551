from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from nibabel.affines import apply_affine, voxel_sizes
from phantom import ORIENTATIONS, SHAPE, dice, nifti, oblique, reorient, save, smooth

import pipeline
from pipeline.bundle.opening import open_bundle
from pipeline.cli.app import main
from pipeline.errors import VolumeError
from pipeline.inference.memory_plan import estimate_memory
from pipeline.inference.model import Model
from pipeline.inference.predictor import predict_case
from pipeline.io.grid import Grid
from pipeline.io.header import read_header
from pipeline.io.tables import read_csv
from pipeline.types import Affine

FINE = 0.8


@pytest.fixture(scope="module")
def fine(tiny_bundle_3d: Path) -> Model:
    """A model whose label maps have voxels of 0.8 mm."""
    return open_bundle(tiny_bundle_3d, device="cpu", runtime="torch", labels_spacing=FINE)


def corners(affine: Affine, shape: tuple[int, ...]) -> Any:
    """Return the corners of a field of view, at the outer faces of its voxels, mm."""
    ends = np.array([[-0.5, n - 0.5] for n in shape])
    return np.array([apply_affine(affine, ends[range(3), bits]) for bits in np.ndindex(2, 2, 2)])


@pytest.mark.parametrize("spacing", [0.4, 1.0, 1.7, 5.0, 100.0])
@pytest.mark.parametrize("axcodes", ["RAS", "PIR", "LSA"])
def test_the_field_of_view_stays(axcodes: str, spacing: float) -> None:
    """Centre and directions are the same, and the size is rounded up to less than a voxel more."""
    affine = reorient(nifti(), axcodes).affine
    shape = reorient(nifti(), axcodes).shape
    grid = Grid(affine=affine, shape=shape).with_spacing(spacing)
    new, size = grid.affine, grid.shape
    np.testing.assert_allclose(voxel_sizes(new), spacing, rtol=1e-6)
    np.testing.assert_allclose(
        corners(new, size).mean(axis=0), corners(affine, shape).mean(axis=0), atol=1e-4
    )
    np.testing.assert_allclose(
        new[:3, :3] / voxel_sizes(new), affine[:3, :3] / voxel_sizes(affine), atol=1e-6
    )
    more = np.array(size) - np.array(shape) * voxel_sizes(affine) / spacing
    assert (more > -0.011).all()
    assert (more < 1).all()


def test_a_grid_that_has_the_spacing_already_stays() -> None:
    """Affine and shape are the same."""
    new = Grid(affine=oblique((1.1, 1.1, 1.1)), shape=SHAPE).with_spacing(1.1)
    assert new.shape == SHAPE
    np.testing.assert_allclose(new.affine, oblique((1.1, 1.1, 1.1)), atol=1e-12)


@pytest.mark.parametrize("codes", [(1, 1), (4, 1), (2, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_has_the_new_affine_and_keeps_its_codes(
    codes: tuple[int, int], version: int
) -> None:
    """One without codes, whose affine is not the one that readers assume, gets that of a copy."""
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    header = kind()
    header.set_sform(oblique(), code=codes[0])
    header.set_qform(oblique(), code=codes[1])
    new = Grid(affine=oblique(), shape=SHAPE, header=header.binaryblock).with_spacing(FINE)
    without = Grid(affine=oblique(), shape=SHAPE).with_spacing(FINE)
    found = kind(new.header)
    assert new.shape == without.shape
    np.testing.assert_allclose(new.affine, without.affine, atol=1e-4)
    np.testing.assert_array_equal(found.get_best_affine(), new.affine)
    np.testing.assert_allclose(found["pixdim"][1:4], FINE, rtol=1e-6)
    assert (int(found["sform_code"]), int(found["qform_code"])) == (codes if any(codes) else (2, 0))


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_every_orientation_gives_the_same_labels_in_finer_voxels(
    axcodes: str, fine: Model, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """The labels agree with those on the file's own grid at the same places."""
    image = reorient(nifti(), axcodes)
    found = predict_case(fine, image)
    assert nib.aff2axcodes(found.affine) == tuple(axcodes)
    labels = nib.Nifti1Image(found.labels, found.affine)
    reference = predict_case(fine, nifti()).labels
    assert dice(np.asarray(nib.as_closest_canonical(labels).dataobj), reference) >= 0.999
    assert len(np.unique(reference)) == 3
    own = pipeline.segment(open_bundle(tiny_bundle_3d, device="cpu", runtime="torch"), image).image
    places = np.rint(
        apply_affine(np.linalg.inv(found.affine) @ own.affine, np.argwhere(np.ones(own.shape)))
    ).astype(int)
    there = found.labels[tuple(places.clip(0, np.array(found.labels.shape) - 1).T)].reshape(
        own.shape
    )
    assert (there == np.asarray(own.dataobj)).mean() > 0.9


def test_the_command_writes_finer_labels_and_counts_them(
    tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """sform and qform hold the grid; a folder with labels of another spacing is refused."""
    path = save(tmp_path / "scan.nii.gz")
    arguments = [
        "segment",
        str(path),
        "-o",
        str(tmp_path / "out"),
        "-b",
        str(tiny_bundle_3d),
        "--device",
        "cpu",
    ]
    assert (
        CliRunner().invoke(main, [*arguments, "--labels-spacing", "0.8", "--uncertainty"]).exit_code
        == 0
    )
    written = nib.load(tmp_path / "out" / "scan_seg.nii.gz")
    grid = Grid(affine=nib.load(path).affine, shape=SHAPE).with_spacing(FINE)
    assert (
        written.shape == grid.shape == nib.load(tmp_path / "out" / "scan_uncertainty.nii.gz").shape
    )
    for found in (written.affine, written.get_sform(), written.get_qform()):
        np.testing.assert_allclose(found, grid.affine, atol=1e-4)
    (row,) = read_csv(tmp_path / "out" / "volumes.csv")
    assert float(row["front"]) == pytest.approx(
        (np.asarray(written.dataobj) == 7).sum() * FINE**3, rel=1e-4
    )
    other = CliRunner().invoke(main, [*arguments, "--labels-spacing", "1"])
    assert other.exit_code == 2
    assert "labels_spacing 0.8" in other.output
    assert CliRunner().invoke(main, [*arguments, "--labels-spacing", "0"]).exit_code == 2


def test_an_image_of_simpleitk_comes_back_in_finer_voxels(fine: Model, volume_file: Path) -> None:
    """The labels lie at the same places as those of a nibabel image."""
    ours, theirs = (
        pipeline.segment(fine, read(str(volume_file))) for read in (sitk.ReadImage, nib.load)
    )
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(ours.image).transpose(), np.asarray(theirs.image.dataobj)
    )
    voxel = (3, 11, 7)
    place = np.array(ours.image.TransformIndexToPhysicalPoint(voxel)) * (-1, -1, 1)
    np.testing.assert_allclose(place, apply_affine(theirs.image.affine, voxel), atol=1e-3)


def test_a_grid_of_too_many_voxels_is_refused() -> None:
    """The message holds the size and what to do."""
    with pytest.raises(
        VolumeError,
        match=r"label map of 0.001 mm has 15\d+ × 31\d+ × 44\d+ voxels, .*; give a larger",
    ):
        Grid(affine=oblique(), shape=SHAPE).with_spacing(0.001)


@pytest.mark.parametrize("fault", [0.0, np.nan, np.inf])
def test_an_invalid_affine_is_refused_with_the_same_message(
    fault: float, fine: Model, tiny_bundle_3d: Path
) -> None:
    """With and without a spacing of the labels."""
    image = nifti()
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = fault
    broken = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    messages = []
    for model in (open_bundle(tiny_bundle_3d, device="cpu", runtime="torch"), fine):
        with pytest.raises(VolumeError) as error:
            predict_case(model, broken)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_finer_labels_are_counted_in_the_memory_that_a_case_takes(
    fine: Model, tiny_bundle_3d: Path
) -> None:
    """Two bytes per voxel more."""
    image = nifti(smooth((40, 50, 30)))
    plain = open_bundle(tiny_bundle_3d, device="cpu", runtime="torch")
    one, other = (
        estimate_memory(model, [read_header(image)], 0, float("inf")) for model in (plain, fine)
    )
    finer = Grid(affine=image.affine, shape=image.shape).with_spacing(FINE)
    assert other.network - one.network == 2 * (np.prod(finer.shape) - np.prod(image.shape))
