"""Units other than millimetres, and files that store no orientation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine, voxel_sizes
from phantom import SHAPE, nifti, oblique, save, smooth

import pipeline
from pipeline.inference.model import Model
from pipeline.io import Grid, as_nibabel, read, read_header
from pipeline.io.writer import fractions_as_nibabel
from pipeline.transforms.loading import LoadVolumed
from pipeline.types import Affine

GUESS = "left and right are a guess (x taken to run from right to left)"
LABELS = np.zeros(SHAPE, dtype=np.uint8)


def in_unit(
    unit: str, mm: float, kind: Any = nib.Nifti1Image, codes: tuple[int, int] = (1, 1)
) -> Any:
    """Return the image of `phantom` with its affine in another unit."""
    affine = oblique()
    affine[:3] /= mm
    image = kind(smooth(), affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    image.header.set_xyzt_units(unit, "sec")
    return image


def label_map(path: Path, labels_spacing: float | None = None) -> tuple[Grid, Any]:
    """Return the grid of a file's label map, and the label map as it is written."""
    loaded = LoadVolumed("image", labels_spacing=labels_spacing).load(str(path))
    grid = Grid.from_meta(loaded.meta)
    image = as_nibabel(np.zeros(grid.shape, np.uint8), grid.affine, grid.header)
    return grid, nib.Nifti1Image.from_bytes(image.to_bytes())


@pytest.mark.parametrize(("unit", "mm"), [("micron", 0.001), ("meter", 1000.0), ("mm", 1.0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (4, 0)])
def test_the_unit_of_a_header_is_honoured(
    tmp_path: Path, unit: str, mm: float, kind: Any, codes: tuple[int, int]
) -> None:
    """Everything is computed in mm, and the label map keeps the header's numbers to the bit."""
    path = save(
        tmp_path / ("a.img" if kind is nib.Nifti1Pair else "a.nii"), in_unit(unit, mm, kind, codes)
    )
    for found in (read_header(path).affine, read(path).affine, read(nib.load(path)).affine):
        np.testing.assert_allclose(found, oblique(), atol=1e-3)
    assert read(path).warnings == ()
    grid, written = label_map(path) if kind is not nib.Nifti2Image else (None, None)
    if written is None or grid is None:
        return
    np.testing.assert_allclose(grid.affine, oblique(), atol=1e-3)
    source = nib.load(path).header
    places = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_z")
    for field in (*places, "xyzt_units", "pixdim"):
        np.testing.assert_array_equal(written.header[field], source[field], err_msg=field)
    fractions = fractions_as_nibabel(LABELS.astype(np.float32), grid.affine, grid.header)
    np.testing.assert_array_equal(fractions.affine, written.affine)


@pytest.mark.parametrize("code", [0, 4, 7])
def test_an_unknown_unit_is_taken_for_mm(tmp_path: Path, code: int) -> None:
    """As all readers do."""
    image = nifti()
    image.header["xyzt_units"] = code
    np.testing.assert_allclose(read(save(tmp_path / "a.nii", image)).affine, oblique(), atol=1e-5)


def test_two_affines_are_compared_in_mm(tmp_path: Path) -> None:
    """Those of a header in micrometres differ by micrometres."""
    image = in_unit("micron", 0.001)
    moved = image.affine.copy()
    moved[0, 3] += 100
    image.set_qform(moved, code=1)
    assert read(save(tmp_path / "a.nii", image)).warnings == ()
    moved[0, 3] += 8900
    image.set_qform(moved, code=1)
    (line,) = read(save(tmp_path / "a.nii", image)).warnings
    assert "disagree by up to 9.0 mm" in line


@pytest.mark.parametrize(("unit", "mm"), [("micron", 0.001), ("meter", 1000.0)])
def test_finer_labels_are_written_in_the_unit_of_the_file(
    tmp_path: Path, unit: str, mm: float
) -> None:
    """0.8 mm are 800 µm in its header."""
    path = save(tmp_path / "a.nii", in_unit(unit, mm))
    grid, written = label_map(path, labels_spacing=0.8)
    expected = Grid(affine=oblique(), shape=SHAPE).with_spacing(0.8)
    assert grid.shape == expected.shape
    np.testing.assert_allclose(grid.affine, expected.affine, atol=1e-3)
    np.testing.assert_allclose(voxel_sizes(written.affine), 0.8 / mm, rtol=1e-5)
    assert written.header.get_xyzt_units()[0] == unit


UNITS = [("um", 0.001), ("µm", 0.001), ("m", 1000.0), ("cm", 10.0), ("mm", 1.0), ("furlong", 1.0)]


@pytest.mark.parametrize(("unit", "mm"), UNITS)
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_units_of_other_formats(tmp_path: Path, ending: str, unit: str, mm: float) -> None:
    """`space units` of NRRD and `DistanceUnits` of MetaImage, which SimpleITK passes over."""
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(_oriented(oblique()), str(path))
    content = path.read_bytes()
    if ending == ".nrrd":
        quoted = " ".join([f'"{unit}"'] * 3)
        content = content.replace(b"sizes:", f"space units: {quoted}\nsizes:".encode(), 1)
    else:
        content = content.replace(b"DimSize", f"DistanceUnits = {unit}\nDimSize".encode(), 1)
    path.write_bytes(content)
    expected = oblique()
    expected[:3] *= mm
    np.testing.assert_allclose(read(path).affine, expected, rtol=1e-5, atol=1e-4 * mm)
    np.testing.assert_array_equal(read_header(path).affine, read(path).affine)


def _oriented(affine: Affine) -> Any:
    image = sitk.GetImageFromArray(np.ascontiguousarray(smooth().transpose()))
    world = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(world[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((world[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(world[:3, 3].tolist())
    return image


def _analyze(path: Path) -> Path:
    nib.save(nib.AnalyzeImage(smooth(), np.diag([-0.9, 1.3, 2.1, 1.0])), path.with_suffix(".img"))
    path.with_suffix(".mat").unlink(missing_ok=True)
    return path.with_suffix(".hdr")


def _spm(path: Path) -> Path:
    """An Analyze file of SPM, whose origin is not the centre."""
    nib.save(
        nib.Spm99AnalyzeImage(smooth(), np.diag([-0.9, 1.3, 2.1, 1.0])), path.with_suffix(".img")
    )
    path.with_suffix(".mat").unlink()
    content = bytearray(path.with_suffix(".hdr").read_bytes())
    content[253:263] = np.array([3, 4, 5, 0, 0], "<i2").tobytes()
    path.with_suffix(".hdr").write_bytes(bytes(content))
    return path.with_suffix(".hdr")


def _mgh(path: Path) -> Path:
    content = bytearray(nib.MGHImage(smooth(), oblique()).to_bytes())
    content[28:30] = bytes(2)
    path.with_suffix(".mgh").write_bytes(bytes(content))
    return path.with_suffix(".mgh")


def _without(ending: str, *fields: bytes, extra: bytes = b"") -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        target = path.with_suffix(ending)
        image = sitk.GetImageFromArray(np.ascontiguousarray(smooth().transpose()))
        image.SetSpacing((0.9, 1.3, 2.1))
        image.SetOrigin((5.0, -6.0, 7.0))
        sitk.WriteImage(image, str(target))
        lines = target.read_bytes().split(b"\n")
        kept = [line for line in lines if not line.startswith(fields)]
        sizes = next(i for i, line in enumerate(kept) if line.startswith((b"sizes", b"DimSize")))
        target.write_bytes(b"\n".join([*kept[:sizes], *([extra] if extra else []), *kept[sizes:]]))
        return target

    return write


GUESSES: dict[str, tuple[Callable[[Path], Path], int]] = {  # and the code of the sform
    "analyze": (_analyze, 0),
    "spm": (_spm, 0),
    "mgh": (_mgh, 2),
    "nrrd_without_space": (
        _without(".nrrd", b"space:", extra=b"space dimension: 3"), 2,
    ),
    "nrrd_without_directions": (
        _without(".nrrd", b"space", extra=b"spacings: 0.9 1.3 2.1"), 2,
    ),
    "nrrd_scanner_xyz": (_without(".nrrd", b"space:", extra=b"space: scanner-xyz"), 2),
    "metaimage": (_without(".mha", b"TransformMatrix", b"AnatomicalOrientation"), 2),
    "metaimage_other_axes": (
        _without(".mha", b"TransformMatrix", b"AnatomicalOrientation",
                 extra=b"AnatomicalOrientation = LAS"), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSES)
def test_a_guessed_orientation_is_a_warning_and_no_claim(tmp_path: Path, name: str) -> None:
    """The label map lies where the file was taken to lie, and claims no scanner coordinates."""
    make, code = GUESSES[name]
    path = make(tmp_path / "scan")
    image, header = read(path), read_header(path)
    assert header.warnings == image.warnings
    assert [line.endswith(GUESS) for line in image.warnings] == [True]
    assert nib.aff2axcodes(image.affine)[0] == "L"
    grid, written = label_map(path)
    np.testing.assert_array_equal(grid.affine, image.affine)
    found = int(written.header["sform_code"]), int(written.header["qform_code"])
    # nibabel assumes the file's own affine where both are 0, and uses the sform where it is 2
    if name != "spm":
        assert found == (code, 0)
    assert 1 not in found
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize("spacing", [0.8, 1.7])
def test_codes_are_not_raised_for_finer_labels(tmp_path: Path, spacing: float) -> None:
    """A NIfTI file without codes, and an Analyze file: the affine that readers assume is right."""
    paths = [save(tmp_path / "a.nii", nifti(codes=(0, 0))), _analyze(tmp_path / "b")]
    for path in paths:
        grid, written = label_map(path, labels_spacing=spacing)
        assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)
        np.testing.assert_allclose(written.affine, grid.affine, atol=1e-4)
        np.testing.assert_allclose(voxel_sizes(written.affine), spacing, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        _without(".nrrd"),
        _without(".mha"),
        _without(".mha", b"TransformMatrix"),
        _without(".mha", b"AnatomicalOrientation"),
    ],
)
def test_a_stored_orientation_is_no_guess(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """No warning, and the label map is in scanner coordinates."""
    path = make(tmp_path / "scan")
    assert read(path).warnings == ()
    assert int(label_map(path)[1].header["sform_code"]) == 1


def test_the_mat_of_spm_is_an_orientation(tmp_path: Path) -> None:
    """Analyze with a .mat file has an affine."""
    nib.save(nib.Spm99AnalyzeImage(smooth(), oblique()), tmp_path / "a.img")
    image = read(tmp_path / "a.hdr")
    assert image.warnings == ()
    np.testing.assert_allclose(image.affine, oblique(), atol=1e-4)
    corner = apply_affine(nib.load(tmp_path / "a.img").affine, (3, 4, 5))
    np.testing.assert_allclose(apply_affine(image.affine, (3, 4, 5)), corner)


def test_the_whole_path_is_in_mm(model_3d: Model, tmp_path: Path) -> None:
    """The same labels and volumes as for the same file in mm; the image is in the file's unit."""
    expected = pipeline.segment(model_3d, str(save(tmp_path / "mm.nii", in_unit("mm", 1.0))))
    path = save(tmp_path / "other.nii", in_unit("micron", 0.001))
    found = pipeline.segment(model_3d, str(path))
    assert (found.labels == expected.labels).mean() > 0.999
    for name, volume in expected.volumes_mm3.items():
        assert found.volumes_mm3[name] == pytest.approx(volume, rel=0.01)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)
    np.testing.assert_array_equal(found.image.affine, nib.load(path).affine)
    assert found.image.header.get_xyzt_units()[0] == "micron"
    nib.save(found.image, tmp_path / "labels.nii")
    np.testing.assert_array_equal(read(tmp_path / "labels.nii").affine, read(path).affine)


def test_an_axis_of_more_voxels_than_nifti1_can_hold() -> None:
    """The label map is NIfTI-2 then."""
    labels = np.zeros((40_000, 2, 3), dtype=np.uint8)
    assert as_nibabel(labels, oblique()).shape == labels.shape
