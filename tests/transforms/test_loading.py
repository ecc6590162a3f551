from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from phantom import SHAPE, nifti, oblique, save, smooth

from pipeline.errors import GeometryError
from pipeline.io.case_warnings import warnings_of
from pipeline.io.grid import Grid
from pipeline.io.itk import as_sitk
from pipeline.transforms.loading import LoadVolumed

load = LoadVolumed("image").load


def test_an_image_in_memory_is_not_changed() -> None:
    """The tensor does not share its memory with the caller's array."""
    array = smooth()
    array[0, 0, 0] = np.nan
    tensor = load(nifti(array))
    tensor[:] = 0
    np.testing.assert_array_equal(array[1:], smooth()[1:])


def test_channels_of_one_grid_are_stacked(tmp_path: Path) -> None:
    """One file per channel, in any format, gives one tensor in the given order."""
    first = save(tmp_path / "a.nii.gz", nifti(smooth(seed=1)))
    second = tmp_path / "b.mha"
    like = sitk.Image([*SHAPE], sitk.sitkFloat32)
    image = sitk.GetImageFromArray(smooth(seed=2).transpose())
    image.CopyInformation(as_sitk(np.zeros(SHAPE, dtype=np.uint8), oblique(), like))
    sitk.WriteImage(image, str(second))
    tensor = load([str(first), str(second)])
    np.testing.assert_array_equal(np.asarray(tensor), np.stack([smooth(seed=1), smooth(seed=2)]))
    np.testing.assert_allclose(np.asarray(tensor.affine), oblique(), atol=1e-5)
    assert tensor.meta["sources"] == [str(first), str(second)]
    assert warnings_of(tensor.meta) == ()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            nifti(smooth((17, 24, 20))),
            r"b.nii.gz has shape \(17, 24, 20\), .*a.nii.gz \(17, 24, 21\)",
        ),
        (
            nifti(affine=oblique((0.9, 1.3, 2.15))),
            r"b.nii.gz and .*a.nii.gz lie up to 1\.\d\d mm apart: resample",
        ),
    ],
)
def test_channels_of_two_grids_are_refused(tmp_path: Path, other: Any, says: str) -> None:
    """The message names both files and how they differ."""
    paths = [save(tmp_path / "a.nii.gz"), save(tmp_path / "b.nii.gz", other)]
    with pytest.raises(GeometryError, match=says):
        load(paths)


def test_a_file_for_several_channels_gives_a_warning(tmp_path: Path) -> None:
    """Once, and the warnings of the file itself are not repeated."""
    path = str(save(tmp_path / "a.nii.gz", nifti(codes=(0, 0))))
    first, second = warnings_of(load([path, path, path]).meta)
    assert first.startswith("neither sform nor qform is set")
    assert second.startswith("one file serves for several channels")


@pytest.mark.parametrize("spacing", [None, 0.8])
def test_the_grid_of_the_label_map_is_in_the_meta(tmp_path: Path, spacing: float | None) -> None:
    """It is the file's own, or the one with the requested spacing."""
    path = save(tmp_path / "scan.nii.gz")
    file = nib.load(path)
    tensor = LoadVolumed("image", labels_spacing=spacing)({"image": str(path)})["image"]
    own = Grid(affine=file.affine, shape=file.shape, header=file.header.binaryblock)
    expected = own if spacing is None else own.with_spacing(spacing)
    found = Grid.from_meta(tensor.meta)
    np.testing.assert_array_equal(found.affine, expected.affine)
    assert (found.shape, found.header) == (expected.shape, expected.header)


def test_a_case_without_a_label_is_loaded(tmp_path: Path) -> None:
    """Missing keys are skipped, other entries are kept."""
    case: dict[Hashable, Any] = {"case": "a", "image": str(save(tmp_path / "a.nii.gz"))}
    loaded = LoadVolumed(("image", "label"))(case)
    assert set(loaded) == {"case", "image"}
    assert loaded["image"].shape == (1, *SHAPE)
