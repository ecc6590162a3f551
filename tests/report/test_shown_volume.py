"""What is shown of a scan: its grid, its grey values, and what is left out."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantom import oblique, save
from report_batch import CENTRES, LEFT, SPACING, head, voxels_of
from scipy.ndimage import center_of_mass, distance_transform_edt

from pipeline.errors import VolumeError
from pipeline.report.shown_volume import (
    CELL_MM,
    MARGIN_MM,
    halved,
    label_box,
    near_labels,
    shown_volume,
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    scan, labels = head()
    return save(tmp_path / "scan.nii.gz", scan), save(tmp_path / "labels.nii.gz", labels)


def middle_in_world(labels: np.ndarray, affine: np.ndarray, value: int) -> np.ndarray:
    voxel = center_of_mass(labels == value)
    return np.asarray(affine @ [*voxel, 1])[:3]


def test_labels_keep_their_place_in_the_world(files: tuple[Path, Path]) -> None:
    """Cropping moves the affine; every label is where it was."""
    shown = shown_volume(*files)
    whole = nib.load(files[1])
    assert shown.labels.size < voxels_of(whole).size
    for value in CENTRES:
        np.testing.assert_allclose(
            middle_in_world(shown.labels, shown.affine, value),
            middle_in_world(voxels_of(whole), whole.affine, value),
            atol=1e-3,
        )


def test_only_the_surroundings_of_labels_are_shown(files: tuple[Path, Path]) -> None:
    """Whatever is farther away than the margin and a cell is black; the box is no larger."""
    shown = shown_volume(*files)
    distance = distance_transform_edt(shown.labels == 0, sampling=shown.spacing)
    cell = np.sqrt(3) * (CELL_MM + max(SPACING))
    assert distance[shown.grey > 0].max() <= MARGIN_MM + cell
    assert (shown.grey[distance <= MARGIN_MM / 2] > 0).mean() > 0.9
    assert (shown.grey > 0).mean() < 0.8


def test_the_whole_head_on_request(files: tuple[Path, Path]) -> None:
    scan = voxels_of(nib.load(files[0]))
    shown = shown_volume(*files, whole_head=True)
    assert shown.grey.shape == scan.shape
    # eight bits keep the order of the intensities
    middle = np.s_[20:40, 20:40, 10:30]
    order = np.corrcoef(shown.grey[middle].ravel(), scan[middle].ravel())[0, 1]
    assert order > 0.98


def test_a_scan_alone_is_shown_whole(files: tuple[Path, Path]) -> None:
    shown = shown_volume(files[0], None)
    assert not shown.labels.any()
    assert shown.grey.shape == nib.load(files[0]).shape
    assert shown.grey.max() == 255


def test_without_a_label_nothing_is_shown(tmp_path: Path) -> None:
    scan, labels = head()
    empty = nib.Nifti1Image(np.zeros(labels.shape, dtype=np.uint8), labels.affine)
    paths = save(tmp_path / "scan.nii.gz", scan), save(tmp_path / "empty.nii.gz", empty)
    with pytest.raises(VolumeError, match=r"empty\.nii\.gz: holds no label.*--whole-head"):
        shown_volume(*paths)
    assert shown_volume(*paths, whole_head=True).grey.any()


def test_one_volume_of_a_4d_file(tmp_path: Path) -> None:
    scan, labels = head()
    both = np.stack([voxels_of(scan), voxels_of(scan)[::-1]], axis=-1)
    path = save(tmp_path / "both.nii.gz", nib.Nifti1Image(both, scan.affine))
    mapped = save(tmp_path / "labels.nii.gz", labels)
    first, second = (
        shown_volume(path, mapped, volume=number, whole_head=True) for number in (None, 1)
    )
    np.testing.assert_array_equal(first.labels, second.labels)
    assert (first.grey != second.grey).any()


def test_the_box_of_labels() -> None:
    labels = np.zeros((30, 20, 10), dtype=np.uint16)
    labels[12, 3, 8] = 300
    assert label_box(labels, (1.0, 2.0, 5.0), 4.0) == (
        slice(8, 17),
        slice(1, 6),
        slice(7, 10),
    )


@pytest.mark.parametrize("spacing", [(0.4, 0.7, 1.1), (1.0, 4.0, 9.0)])
def test_near_is_within_a_cell_of_the_distance(spacing: tuple[float, float, float]) -> None:
    """scipy's exact distance is the oracle."""
    labels = np.zeros((37, 23, 14), dtype=np.uint8)
    labels[18, 11, 6] = LEFT
    exact = distance_transform_edt(labels == 0, sampling=spacing)
    near = near_labels(labels, spacing, 6.0)
    cell = float(np.linalg.norm(np.maximum(np.array(spacing), CELL_MM) * 1.5))
    assert near[exact <= 6.0 - min(cell, 6.0)].all()
    assert near[labels > 0].all()
    assert not near[exact > 6.0 + cell].any()


def test_halved_voxels_stay_in_place(files: tuple[Path, Path]) -> None:
    """The centre of a label moves by less than half a voxel; thick slices stay as they are."""
    shown = shown_volume(*files)
    smaller = halved(shown)
    assert smaller.spacing == pytest.approx((3.0, 2.6, 2.2))
    for value in CENTRES:
        moved = middle_in_world(smaller.labels, smaller.affine, value) - middle_in_world(
            shown.labels, shown.affine, value
        )
        assert np.linalg.norm(moved) < 1.5
    assert np.linalg.det(smaller.affine) > 0
    assert np.linalg.norm(oblique(SPACING)[:3, 2]) == pytest.approx(smaller.spacing[2])
