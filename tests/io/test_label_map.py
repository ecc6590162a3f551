"""Label maps of datasets: whole numbers on the grid of their image."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantom import oblique, save

from pipeline.errors import GeometryError, ReadError, VolumeError
from pipeline.io import Image, check_label_grid, read_label_map
from pipeline.types import Array

SHAPE = (7, 8, 9)


def write(folder: Path, array: Array) -> str:
    return str(save(folder / "label.nii.gz", nib.Nifti1Image(array, oblique())))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_values_are_counted_as_numpy_counts_them(dtype: type, tmp_path: Path) -> None:
    """In every type that files have, negative and large values among them."""
    values = np.array([0, 3, 200] if dtype == np.uint8 else [-1, 0, 300])
    if dtype in (np.int32, np.float64):
        values = np.append(values, 2**30)
    array: Array = np.random.default_rng(1).choice(values, SHAPE).astype(dtype)
    found = read_label_map(write(tmp_path, array), set(values.tolist()))
    np.testing.assert_array_equal(found.array, array)
    assert found.array.dtype.kind == "i"
    expected = dict(zip(*np.unique(array, return_counts=True), strict=True))
    assert found.voxels == expected


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full(SHAPE, np.nan, np.float32), "504 voxels are not a number"),
        (np.full(SHAPE, np.inf, np.float32), "504 voxels are not a number"),
        (np.full(SHAPE, 0.7, np.float32), "expected whole numbers for labels, got 1 values such"),
        (np.full(SHAPE, 9, np.uint8), r"has the values 9, expected only \[0, 1\]"),
        (np.arange(504, dtype=np.int16).reshape(SHAPE), "values 2, 3, 4, 5, 6 and 497 more"),
        (np.arange(18 * 19 * 20, dtype=np.int16).reshape(18, 19, 20), "6840 different values"),
    ],
)
def test_what_is_no_label_map(array: Array, says: str, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=says):
        read_label_map(write(tmp_path, array), {0, 1})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(ReadError, match="the file is empty"):
        read_label_map(tmp_path / "a.nii.gz")


def test_another_grid_is_refused(tmp_path: Path) -> None:
    """A rounding of the affine is no other grid."""
    path = write(tmp_path, np.zeros(SHAPE, np.uint8))
    label = read_label_map(path)
    check_label_grid(path, label, Image(array=np.zeros(SHAPE), affine=oblique() + 1e-5))
    shifted = oblique()
    shifted[1, 3] += 0.5
    with pytest.raises(GeometryError, match=r"lies up to 0\.50 mm from its image"):
        check_label_grid(path, label, Image(array=np.zeros(SHAPE), affine=shifted))
    with pytest.raises(GeometryError, match=r"has shape \(7, 8, 9\), its image \(7, 8, 8\)"):
        check_label_grid(path, label, Image(array=np.zeros((7, 8, 8)), affine=oblique()))
