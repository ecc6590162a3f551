from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from nibabel.affines import apply_affine, voxel_sizes
from phantom import ORIENTATIONS, SHAPE, dice, nifti, oblique, save, smooth, turn

import pipeline
from pipeline.bundle.opening import open_bundle
from pipeline.cli.app import main
from pipeline.errors import VolumeError
from pipeline.inference.memory_plan import estimate_memory
from pipeline.inference.predictor import Model, predict_case
from pipeline.io.grid import header_on_grid, isotropic_grid
from pipeline.io.header import read_header
from pipeline.io.tables import read_csv
from pipeline.types import Affine

FINE = 0.8


@pytest.fixture(scope="module")
def fine(tiny_bundle_3d: Path) -> Model:
    """A model whose labels have voxels of 0.8 mm."""
    return open_bundle(tiny_bundle_3d, device="cpu", runtime="torch", labels_spacing=FINE)


def corners(affine: Affine, shape: tuple[int, ...]) -> Any:
    """Of a field of view, out to the faces of its voxels, mm."""
    ends = np.array([[-0.5, n - 0.5] for n in shape])
    return np.array([apply_affine(affine, ends[range(3), bits]) for bits in np.ndindex(2, 2, 2)])


@pytest.mark.parametrize("spacing", [0.4, 1.0, 1.7, 5.0, 100.0])
@pytest.mark.parametrize("axcodes", ["RAS", "PIR", "LSA"])
def test_the_field_of_view_stays(axcodes: str, spacing: float) -> None:
    """Its middle and directions are the same, and its faces lie less than half a new voxel further out."""
    affine = turn(nifti(), axcodes).affine
    shape = turn(nifti(), axcodes).shape
    new, size = isotropic_grid(affine, shape, spacing)
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


def test_voxels_that_are_so_already_stay() -> None:
    """To the last digit of the affine and the size."""
    new, size = isotropic_grid(oblique((1.1, 1.1, 1.1)), SHAPE, 1.1)
    assert size == SHAPE
    np.testing.assert_allclose(new, oblique((1.1, 1.1, 1.1)), atol=1e-12)


@pytest.mark.parametrize("codes", [(1, 1), (4, 1), (2, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_says_the_new_grid_and_keeps_its_codes(
    codes: tuple[int, int], version: int
) -> None:
    """Where it had none it gets the scanner's."""
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    header = kind()
    header.set_sform(oblique(), code=codes[0])
    header.set_qform(oblique(), code=codes[1])
    moved, affine = header_on_grid(header.binaryblock, oblique((FINE, FINE, FINE)))
    found = kind(moved)
    np.testing.assert_allclose(affine, oblique((FINE, FINE, FINE)), atol=1e-4)
    np.testing.assert_array_equal(found.get_best_affine(), affine)
    np.testing.assert_allclose(found["pixdim"][1:4], FINE, rtol=1e-6)
    assert (int(found["sform_code"]), int(found["qform_code"])) == (codes if any(codes) else (1, 0))


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_every_orientation_gives_the_same_labels_in_finer_voxels(
    axcodes: str, fine: Model, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """As files too, and where they lie they agree with the labels on the file's own grid."""
    image = turn(nifti(), axcodes)
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
    """With the grid in sform and qform, volumes of the new voxels, and not beside labels of another size."""
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
    affine, size = isotropic_grid(nib.load(path).affine, SHAPE, FINE)
    assert written.shape == size == nib.load(tmp_path / "out" / "scan_uncertainty.nii.gz").shape
    for found in (written.affine, written.get_sform(), written.get_qform()):
        np.testing.assert_allclose(found, affine, atol=1e-4)
    (row,) = read_csv(tmp_path / "out" / "volumes.csv")
    assert float(row["front"]) == pytest.approx(
        (np.asarray(written.dataobj) == 7).sum() * FINE**3, rel=1e-4
    )
    other = CliRunner().invoke(main, [*arguments, "--labels-spacing", "1"])
    assert other.exit_code == 2
    assert "labels_spacing 0.8" in other.output
    assert CliRunner().invoke(main, [*arguments, "--labels-spacing", "0"]).exit_code == 2


def test_an_image_of_simpleitk_comes_back_in_finer_voxels(fine: Model, volume_file: Path) -> None:
    """At the same places as nibabel's."""
    ours, theirs = (
        pipeline.segment(fine, read(str(volume_file))) for read in (sitk.ReadImage, nib.load)
    )
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(ours.image).transpose(), np.asarray(theirs.image.dataobj)
    )
    voxel = (3, 11, 7)
    place = np.array(ours.image.TransformIndexToPhysicalPoint(voxel)) * (-1, -1, 1)
    np.testing.assert_allclose(place, apply_affine(theirs.image.affine, voxel), atol=1e-3)


def test_labels_that_nothing_could_hold_are_refused() -> None:
    """With their size and what to do."""
    with pytest.raises(
        VolumeError, match=r"label map of 0.001 mm has 15\d+ × 31\d+ × 44\d+ voxels; give a larger"
    ):
        isotropic_grid(oblique(), SHAPE, 0.001)


@pytest.mark.parametrize("fault", [0.0, np.nan, np.inf])
def test_a_header_that_says_no_grid_is_refused_as_ever(
    fault: float, fine: Model, tiny_bundle_3d: Path
) -> None:
    """By the check of volumes, with the same words."""
    image = nifti()
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = fault
    broken = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    said = []
    for model in (open_bundle(tiny_bundle_3d, device="cpu", runtime="torch"), fine):
        with pytest.raises(VolumeError) as error:
            predict_case(model, broken)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_finer_labels_are_counted_in_the_memory_that_a_case_takes(
    fine: Model, tiny_bundle_3d: Path
) -> None:
    """By two bytes a voxel more."""
    image = nifti(smooth((40, 50, 30)))
    plain = open_bundle(tiny_bundle_3d, device="cpu", runtime="torch")
    one, other = (
        estimate_memory(model, [read_header(image)], 0, float("inf")) for model in (plain, fine)
    )
    _, size = isotropic_grid(image.affine, image.shape, FINE)
    assert other.network - one.network == 2 * (np.prod(size) - np.prod(image.shape))
