from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.tmpdirs import InTemporaryDirectory
from phantom import nifti, oblique, save, smooth

from pipeline.errors import ReadError, VolumeError
from pipeline.io.formats import image_stem, image_suffix
from pipeline.io.image import Image
from pipeline.io.reader import read, source_list
from pipeline.types import Affine, Array

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def by_sitk(path: Path) -> tuple[Array, Affine]:
    """Return array and RAS+ affine from SimpleITK's own index → world function: an oracle."""
    image = sitk.ReadImage(str(path))
    corners = [
        image.TransformIndexToPhysicalPoint(index)
        for index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    affine = np.eye(4)
    affine[:3, 3] = corners[0]
    affine[:3, :3] = (np.array(corners[1:]) - corners[0]).T
    return sitk.GetArrayFromImage(image).transpose(), LPS @ affine


def as_sitk(array: Array, affine: Affine) -> Any:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
    world = LPS @ affine
    spacing = np.linalg.norm(world[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((world[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(world[:3, 3].tolist())
    return image


def same(image: Image, array: Array, affine: Affine) -> None:
    np.testing.assert_array_equal(image.array, array)
    np.testing.assert_allclose(image.affine, affine, atol=2e-5)


NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")


@pytest.mark.parametrize(
    "ending", [*NIFTI_SUFFIXES, ".nrrd", ".mha", ".mhd", ".NII", ".NII.GZ", ".NRRD", ".MHA", ".MHD"]
)
@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8"])
def test_every_format_reads_as_simpleitk_reads_it(tmp_path: Path, ending: str, dtype: str) -> None:
    """All formats give the same voxels at the same place in RAS+ world."""
    array = smooth().clip(0, 255).astype(dtype)
    path = tmp_path / f"scan{ending.lower()}"
    if ending.lower() in NIFTI_SUFFIXES:
        kind = nib.Nifti1Pair if ending.startswith((".hdr", ".img")) else nib.Nifti1Image
        nib.save(kind(array, oblique()), path)
    else:
        sitk.WriteImage(as_sitk(array, oblique()), str(path))
    expected = by_sitk(path)
    path = path.rename(tmp_path / f"scan{ending}")
    same(read(path), *expected)
    same(read(path), array, oblique())


@pytest.mark.parametrize("ending", [".mgz", ".mgh", ".MGZ"])
def test_freesurfers_format_reads_as_the_nifti_of_the_same_volume(
    tmp_path: Path, ending: str
) -> None:
    """SimpleITK cannot read MGH, so the NIfTI of the same volume is the oracle."""
    source = nifti()
    with InTemporaryDirectory():
        nib.save(
            nib.MGHImage(source.get_fdata(dtype=np.float32), source.affine), f"scan{ending.lower()}"
        )
        shutil.move(f"scan{ending.lower()}", tmp_path / f"scan{ending}")
    nib.save(source, tmp_path / "scan.nii")
    same(read(tmp_path / f"scan{ending}"), *by_sitk(tmp_path / "scan.nii"))


def test_nifti2_and_its_header(tmp_path: Path) -> None:
    """A NIfTI-2 file keeps its header of 540 bytes."""
    path = save(tmp_path / "scan.nii.gz", nib.Nifti2Image(smooth(), oblique()))
    same(read(path), smooth(), oblique())
    assert len(read(path).header) == 540


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_big_endian(tmp_path: Path, kind: Any) -> None:
    """Files of the other byte order give the same image."""
    header = kind.header_class(endianness=">")
    header.set_data_dtype(">f4")
    path = save(tmp_path / "scan.nii", kind(smooth(), oblique(), header))
    assert path.read_bytes()[:4] in (b"\x00\x00\x01\x5c", b"\x00\x00\x02\x1c")
    same(read(path), smooth(), oblique())


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    """Values are scaled as the header defines."""
    image = nifti(smooth().astype(np.int16))
    image.header.set_slope_inter(0.25, -7)
    content = bytearray(nib.Nifti1Image(smooth().astype(np.int16), oblique()).to_bytes())
    content[112:120] = np.array([0.25, -7], "<f4").tobytes()
    path = tmp_path / "scan.nii"
    path.write_bytes(bytes(content))
    np.testing.assert_allclose(read(path).array, smooth().astype(np.int16) * 0.25 - 7)
    np.testing.assert_allclose(read(path).array, by_sitk(path)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "packed"), [("plain.nii.gz", False), ("packed.nii", True), ("plain.mgz", False)]
)
def test_compression_is_detected_by_content(tmp_path: Path, name: str, packed: bool) -> None:
    """Files with a wrong .gz suffix, or without one they need, are read."""
    kind = nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image
    content = kind(smooth(), oblique()).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    same(read(tmp_path / name), smooth(), oblique())


def test_a_header_extension_is_skipped(tmp_path: Path) -> None:
    """Bytes between header and data are not read as voxels."""
    image = nifti()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    same(read(save(tmp_path / "scan.nii", image)), smooth(), oblique())


@pytest.mark.parametrize(
    ("ending", "extra"),
    [
        (".nii.gz", (1,)),
        (".nii.gz", (1, 1)),
        (".nii.gz", (3,)),
        (".nii.gz", (1, 3)),
        (".mha", (1,)),
        (".mha", (3,)),
    ],
)
def test_volumes_of_a_series(tmp_path: Path, ending: str, extra: tuple[int, ...]) -> None:
    """A single volume is squeezed; one of several has to be picked by its number."""
    count = int(np.prod(extra))
    volumes = [smooth(seed=i) for i in range(count)]
    path = tmp_path / f"scan{ending}"
    if ending == ".mha":
        sitk.WriteImage(
            sitk.JoinSeries([as_sitk(volume, oblique()) for volume in volumes]), str(path)
        )
    else:
        save(path, nifti(np.stack(volumes, axis=-1).reshape(*volumes[0].shape, *extra)))
    for i, volume in enumerate(volumes):
        same(read(path, volume=i), volume, oblique())
    if count == 1:
        same(read(path), volumes[0], oblique())
    else:
        with pytest.raises(
            VolumeError,
            match=rf"{path}: holds 3 volumes, expected one; pick one with --volume T \(0 to 2\)",
        ):
            read(path)
    for wrong in (-1, count):
        with pytest.raises(
            VolumeError,
            match=f"--volume {wrong} asked for, the file holds volumes 0 to {count - 1}",
        ):
            read(path, volume=wrong)


def test_images_in_memory() -> None:
    """nibabel and SimpleITK images give the same result as their files."""
    same(read(nifti()), smooth(), oblique())
    same(read(as_sitk(smooth(), oblique())), smooth(), oblique())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("scan.nii", None, "no such file"),
        ("scan.txt", b"x", "unknown format; expected a name ending in .nii, .nii.gz"),
        ("scan.nii", b"", "the file is empty"),
        ("scan.nii.gz", b"", "the file is empty"),
        ("scan.nii", b"nonsense" * 100, "cannot be read"),
        ("scan.mgz", b"nonsense" * 100, "cannot be read"),
        ("scan.nrrd", b"nonsense" * 100, "cannot be read"),
        ("scan.mha", b"nonsense" * 100, "cannot be read"),
        ("scan.img", b"nonsense" * 100, "cannot be read"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    """The message holds the path and the reason."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReadError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert says in str(raised.value)


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz", ".img", ".img.gz", ".nrrd", ".mha"])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str, kept: float) -> None:
    """An incomplete download is an error, never an image with missing voxels."""
    path = tmp_path / f"scan{ending}"
    if ending in (".nrrd", ".mha"):
        sitk.WriteImage(as_sitk(smooth(), oblique()), str(path), useCompression=ending == ".nrrd")
    elif ending == ".mgz":
        nib.save(nib.MGHImage(smooth(), oblique()), path)
    else:
        nib.save(
            (nib.Nifti1Pair if "img" in ending else nib.Nifti1Image)(smooth(), oblique()), path
        )
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ReadError, match=f"{path}: .*is the file whole"):
        read(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".img.gz"])
def test_a_wrong_checksum_is_refused(tmp_path: Path, ending: str) -> None:
    """Damage that can be decompressed is found by the checksum."""
    path = tmp_path / f"scan{ending}"
    nib.save(
        {".nii.gz": nib.Nifti1Image, ".mgz": nib.MGHImage, ".img.gz": nib.Nifti1Pair}[ending](
            smooth(), oblique()
        ),
        path,
    )
    content = bytearray(path.read_bytes())
    content[-8] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(
        ReadError, match=f"{path}: cannot be read: its checksum is wrong, so its content is damaged"
    ):
        read(path)


def test_a_header_without_its_data_is_refused(tmp_path: Path) -> None:
    """The .hdr of a pair cannot be read without its .img."""
    nib.save(nib.Nifti1Pair(smooth(), oblique()), tmp_path / "scan.img")
    (tmp_path / "scan.img").unlink()
    with pytest.raises(ReadError, match=r"scan.hdr: cannot be read"):
        read(tmp_path / "scan.hdr")


RGB = np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("array", "says"),
    [
        (RGB, "holds colours"),
        (smooth((5, 6, 7)).astype(np.complex64), "holds complex numbers, expected magnitudes"),
        (smooth((5, 6)), "has shape .5, 6., expected three dimensions"),
    ],
)
def test_colours_complex_numbers_and_slices_are_refused(
    tmp_path: Path, array: Array, says: str, in_memory: bool
) -> None:
    """Each has its own message, for files and images in memory."""
    image = nib.Nifti1Image(array, oblique())
    with pytest.raises(VolumeError, match=says):
        read(image if in_memory else save(tmp_path / "scan.nii.gz", image))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (sitk.Image([5, 6, 7], sitk.sitkVectorUInt8, 3), "holds 3 values per voxel"),
        (sitk.Image([5, 6, 7], sitk.sitkComplexFloat32), "holds complex numbers"),
        (sitk.Image([5, 6], sitk.sitkFloat32), "expected three dimensions"),
    ],
)
def test_simpleitk_images_are_refused_for_the_same_reasons(
    tmp_path: Path, image: Any, says: str
) -> None:
    """For NRRD files and for images in memory."""
    sitk.WriteImage(image, str(tmp_path / "scan.nrrd"))
    for source in (image, tmp_path / "scan.nrrd"):
        with pytest.raises(VolumeError, match=says):
            read(source)


def test_anything_else_is_refused() -> None:
    """An array has no affine."""
    with pytest.raises(
        ReadError,
        match="expected a path, a DICOM series, a nibabel image or a SimpleITK image, got ndarray",
    ):
        read(smooth())


@pytest.mark.parametrize(
    ("codes", "shift", "says"),
    [
        ((1, 1), 0.0, ""),
        ((2, 0), 9.0, ""),
        ((0, 2), 9.0, ""),
        (
            (4, 1),
            9.0,
            "sform (code 4) and qform (code 1) disagree by up to 9.0 mm: the sform was used",
        ),
        (
            (0, 0),
            0.0,
            "neither sform nor qform is set: left and right are a guess "
            "(x taken to run from right to left)",
        ),
    ],
)
def test_two_affines_that_disagree_give_a_warning(
    tmp_path: Path, codes: tuple[int, int], shift: float, says: str
) -> None:
    """The sform comes before the qform; the warning holds the distance and which one was used."""
    header, moved = nifti().header, oblique()
    moved[0, 3] += shift
    header.set_sform(oblique(), code=codes[0])
    header.set_qform(moved, code=codes[1])
    got = read(save(tmp_path / "scan.nii.gz", nib.Nifti1Image(smooth(), None, header)))
    assert "".join(got.warnings) == says
    if codes[0]:
        np.testing.assert_allclose(got.affine, oblique(), atol=1e-5)
    elif codes[1]:
        np.testing.assert_allclose(got.affine, moved, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.nii.gz", ".nii.gz"),
        ("a.b.NII", ".nii"),
        ("x.img.gz", ".img.gz"),
        ("a.gz", None),
        ("nii", None),
        ("a.mhd", ".mhd"),
    ],
)
def test_suffix(name: str, expected: str | None) -> None:
    """The longest known suffix counts, in any case."""
    assert image_suffix(Path(name)) == expected


def test_the_stem_keeps_other_dots() -> None:
    """Only the image suffix is cut off."""
    assert image_stem(Path("in/a.b.NII.gz")) == "a.b"
    assert image_stem(Path("in/a.b.txt")) == "a.b"
    assert image_stem(Path("nii")) == "nii"


def test_sources_are_a_list() -> None:
    """Also where there is only one channel."""
    assert source_list("a.nii") == ["a.nii"]
    assert source_list(("a.nii", Path("b.nii"))) == ["a.nii", Path("b.nii")]


def test_real_volumes_read_as_simpleitk_reads_them(data: Path) -> None:
    """Real scans agree with SimpleITK."""
    for path in sorted((data / "real").glob("*T1w*.nii.gz"))[:3]:
        array, affine = by_sitk(path)
        image = read(path)
        np.testing.assert_array_equal(image.array, array)
        np.testing.assert_allclose(image.affine, affine, atol=1e-3)
