"""Votes of several copies of a scan, with a model that labels by the scan's grey values."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from monai.metrics import compute_dice
from phantom import load_script, save

from pipeline.types import Array

LEFT, RIGHT, BOTH = 17, 53, 16


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a model that knows a bright block by its side, not by its intensity."""
    script: ModuleType = load_script("pseudo_labels")
    monkeypatch.setattr(script.pipeline, "load", lambda bundle: None, raising=False)
    monkeypatch.setattr(script.pipeline, "segment", segment, raising=False)
    return script


def segment(model: None, image: nib.Nifti1Image) -> Any:
    voxels = image.get_fdata()
    x = np.indices(voxels.shape)[0]
    inside = np.argwhere(voxels > 0.02)
    middle = (inside[:, 0].min() + inside[:, 0].max()) / 2
    labels = np.where(x < middle, LEFT, RIGHT) * (voxels > 0.6) + BOTH * (
        (voxels > 0.02) & (voxels <= 0.6)
    )
    return SimpleNamespace(image=nib.Nifti1Image(labels.astype(np.uint8), image.affine))


def head() -> Array:
    """A grey head with a small bright block on its left and a large one on its right."""
    voxels = np.zeros((37, 30, 26), dtype=np.float32)
    voxels[4:33, 3:27, 5:22] = 400
    voxels[8:13, 8:14, 9:15] = 1000
    voxels[22:30, 8:20, 9:17] = 1000
    return voxels


def test_copies_vote_on_the_scans_own_voxels(script: ModuleType, tmp_path: Path) -> None:
    affine = np.array([[-1.0, 0, 0, 9], [0, 1, 0, -5], [0, 0, 1, 3], [0, 0, 0, 1]])  # LAS
    image = nib.Nifti1Image(head()[::-1], affine)
    save(tmp_path / "in" / "sub-1" / "anat" / "sub-1_T1w.nii.gz", image)
    result = CliRunner().invoke(
        script.main, [str(tmp_path / "in"), str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    scan = nib.load(tmp_path / "out" / "scans" / "sub-1_T1w.nii.gz")
    labels = nib.load(tmp_path / "out" / "label_maps" / "sub-1_T1w.nii.gz")
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(scan.affine, labels.affine)
    assert scan.shape == labels.shape == (37, 30, 25)  # 4 voxels around, where there are as many
    for value, block in ((LEFT, np.s_[8:13, 8:14, 9:15]), (RIGHT, np.s_[22:30, 8:20, 9:17])):
        expected = np.zeros(head().shape)
        expected[block] = 1
        mm = nib.affines.apply_affine(
            affine @ np.diag([-1, 1, 1, 1]) + np.outer([1, 0, 0, 0], [0, 0, 0, -36]),
            np.argwhere(expected),
        )
        found = nib.affines.apply_affine(labels.affine, np.argwhere(labels.get_fdata() == value))
        assert {tuple(p) for p in found.round()} == {tuple(p) for p in mm.round()}


def test_scans_that_are_empty_or_missing_are_named(script: ModuleType, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("in", "out")]
    (tmp_path / "in").mkdir()
    nothing = CliRunner().invoke(script.main, folders)
    assert nothing.exit_code == 1
    assert "expected scans *.nii.gz" in nothing.output
    save(tmp_path / "in" / "a.nii.gz", nib.Nifti1Image(np.zeros((9, 8, 7), np.int16), np.eye(4)))
    save(tmp_path / "in" / "b.nii.gz", nib.Nifti1Image(head(), np.eye(4)))
    result = CliRunner().invoke(script.main, folders, catch_exceptions=False)
    assert result.exit_code == 0
    assert "a.nii.gz: no voxel above 0; left out" in result.output
    assert [path.name for path in (tmp_path / "out" / "scans").iterdir()] == ["b.nii.gz"]


def test_values_of_the_other_side(script: ModuleType) -> None:
    other = script.mirrored_values({"left a": LEFT, "right a": RIGHT, "stem": BOTH})
    assert (other[LEFT], other[RIGHT], other[BOTH]) == (RIGHT, LEFT, BOTH)


def test_a_small_part_gets_the_next_label(script: ModuleType) -> None:
    votes = np.zeros((3, 12, 9, 7), dtype=np.uint8)
    votes[:, 1:6, 1:6, 1:6] = LEFT
    votes[:2, 9, 7, 5] = LEFT  # far from the structure
    votes[2, 9, 7, 5] = BOTH
    votes[0, 5, 5, 5] = BOTH  # one vote against two
    labels = script.voted(votes)
    assert labels[5, 5, 5] == LEFT
    assert labels[9, 7, 5] == BOTH
    assert (labels[1:6, 1:6, 1:6] == LEFT).all()


def test_the_mean_dice_is_that_of_monai(script: ModuleType) -> None:
    draw = np.random.default_rng(0)
    first, second = (draw.choice([0, BOTH, LEFT, RIGHT], size=(9, 8, 7)) for _ in range(2))
    one_hot = [
        np.stack([a == value for value in (BOTH, LEFT, RIGHT)])[None] for a in (first, second)
    ]
    expected = compute_dice(*(torch.as_tensor(a) for a in one_hot)).mean()
    assert script.mean_dice(first, second) == pytest.approx(float(expected))
