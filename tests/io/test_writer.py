from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from phantom import SHAPE, nifti, oblique, save, smooth

from pipeline.errors import WriteError
from pipeline.io.itk import as_sitk
from pipeline.io.reader import read
from pipeline.io.writer import DESCRIPTION, as_nibabel, write_atomically, write_labels
from pipeline.types import LabelMap

CHANGED = {
    "dim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "cal_max", "cal_min",
    "descrip", "intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3",
}  # fmt: skip


def labels(dtype: Any = np.uint8) -> LabelMap:
    found: LabelMap = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    return found


def full_header(kind: Any, endianness: str = "<") -> Any:
    """Return a header with a value in every field that a label map must keep."""
    header = kind.header_class(endianness=endianness)
    header.set_data_shape(SHAPE)
    header.set_data_dtype(np.int16)
    header.set_sform(oblique(), code=4)
    header.set_qform(oblique((0.9, 1.3, 2.2)), code=2)
    header.set_xyzt_units("micron", "msec")
    header.set_dim_info(0, 2, 1)
    header.set_slope_inter(0.5, 3)
    header["aux_file"], header["cal_max"], header["toffset"], header["slice_duration"] = (
        b"aux",
        99,
        1.5,
        0.25,
    )
    return header


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("endianness", "<>")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_header_is_the_inputs_to_the_bit(
    tmp_path: Path, kind: Any, endianness: str, dtype: Any
) -> None:
    """All fields but those about the values are kept: grid, codes, units, slice and byte order."""
    header = full_header(kind, endianness)
    write_labels(
        tmp_path / "out.nii.gz",
        as_nibabel(labels(dtype), header.get_best_affine(), header.binaryblock),
    )
    result = nib.load(tmp_path / "out.nii.gz")
    changed = {
        key
        for key in header
        if not np.array_equal(
            header[key], result.header[key], equal_nan=header[key].dtype.kind == "f"
        )
    }
    assert changed <= CHANGED | {"magic"}
    assert result.header.endianness == endianness
    assert result.get_data_dtype() == np.dtype(dtype).newbyteorder(endianness)
    assert (result.dataobj.slope, result.dataobj.inter) == (1, 0)
    assert result.header["descrip"] == DESCRIPTION
    np.testing.assert_array_equal(np.asarray(result.dataobj), labels(dtype))


def test_a_series_header_gives_a_volume(tmp_path: Path) -> None:
    """The label map of a 4D file with a header extension is a valid 3D file."""
    source = nifti(np.stack([smooth()] * 3, axis=-1))
    source.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 1000))
    image = read(save(tmp_path / "in.nii.gz", source), volume=1)
    write_labels(tmp_path / "out.nii.gz", as_nibabel(labels(), image.affine, image.header))
    result = nib.load(tmp_path / "out.nii.gz")
    assert result.shape == SHAPE
    np.testing.assert_array_equal(np.asarray(result.dataobj), labels())
    np.testing.assert_array_equal(result.affine, image.affine)


def test_without_a_header_the_affine_is_scanner_space_in_mm(tmp_path: Path) -> None:
    """For inputs that are not NIfTI both codes are 1 and the unit is mm."""
    write_labels(tmp_path / "out.nii.gz", as_nibabel(labels(), oblique()))
    header = nib.load(tmp_path / "out.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"]), header.get_xyzt_units()[0]) == (
        1,
        1,
        "mm",
    )
    np.testing.assert_allclose(header.get_sform(), oblique(), atol=1e-6)
    np.testing.assert_allclose(header.get_qform(), oblique(), atol=1e-4)


def test_simpleitk_reads_what_is_written(tmp_path: Path) -> None:
    """SimpleITK finds the same labels at the same place."""
    write_labels(
        tmp_path / "out.nii.gz",
        as_nibabel(labels(np.uint16), oblique(), nifti().header.binaryblock),
    )
    image = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    assert image.GetPixelID() == sitk.sitkUInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(), labels())
    corner = np.array(image.TransformIndexToPhysicalPoint((16, 0, 20))) * (-1, -1, 1)
    np.testing.assert_allclose(corner, (oblique() @ (16, 0, 20, 1))[:3], atol=1e-4)


def test_the_same_labels_are_the_same_bytes(tmp_path: Path) -> None:
    """The file holds no time and no name."""
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, as_nibabel(labels(), oblique()))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"the last result"])
def test_a_file_is_whole_or_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    step: str,
    before: bytes | None,
) -> None:
    """Whatever stops the writing, the folder holds the old file or none."""
    path = tmp_path / "deep" / "out.nii.gz"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(os, step, fail)
    expected = WriteError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected) as raised:
        write_atomically(path, b"new" * 1000)
    if expected is WriteError:
        assert (
            str(raised.value)
            == f"{path}: cannot be written: No space left on device; is the disk full or read-only?"
        )
    assert [p.read_bytes() for p in path.parent.iterdir()] == ([] if before is None else [before])


def test_a_file_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file in the same folder is complete before it gets the final name."""
    seen = []

    def replace(source: Path, target: Path) -> None:
        seen.append(
            (
                Path(source).read_bytes(),
                Path(source).parent == Path(target).parent,
                Path(target).exists(),
            )
        )
        Path(source).rename(target)

    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "out", b"content")
    assert seen == [(b"content", True, False)]
    assert (tmp_path / "out").read_bytes() == b"content"


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """The message holds the path and the reason."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match=f"{tmp_path}/file/sub/out.nii.gz: cannot be written: "):
        write_atomically(tmp_path / "file" / "sub" / "out.nii.gz", b"")


@pytest.mark.parametrize("series", [False, True])
def test_a_simpleitk_image_has_the_grid_of_its_like(series: bool) -> None:
    """Origin, spacing and direction are equal to the last bit, also for a 4D image."""
    like = sitk.Image([*SHAPE], sitk.sitkFloat32)
    like.SetSpacing((0.9, 1.3, 2.1))
    like.SetOrigin((3.5, -2.25, 7.125))
    like.SetDirection((oblique((1, 1, 1))[:3, :3]).ravel().tolist())
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.block(
        [[oblique()[:3, :3], np.array(like.GetOrigin())[:, None]], [0, 0, 0, 1]]
    )
    image = as_sitk(labels(), affine, sitk.JoinSeries([like]) if series else like)
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(image, fact)() == getattr(like, fact)()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(), labels())


def test_a_folder_that_was_removed_with_its_staging_is_not_made_again(tmp_path: Path) -> None:
    """A write that is under way when the output folder is moved leaves nothing in its place."""
    out = tmp_path / "out"
    staging = out / "state" / "tmp"
    staging.mkdir(parents=True)
    write_atomically(out / "records" / "a" / "1.json", b"1", staging=staging)
    assert (out / "records" / "a" / "1.json").read_bytes() == b"1"
    out.rename(tmp_path / "moved")
    with pytest.raises(WriteError, match="cannot be written"):
        write_atomically(out / "records" / "b" / "2.json", b"2", staging=staging)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]
