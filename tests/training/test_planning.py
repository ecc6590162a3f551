"""Planning: fingerprints, problems and folds."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dataset_folders import decathlon, image, label
from phantom import SPACING, oblique, reorient, save, smooth

from pipeline.io.layouts import find_pairs
from pipeline.training.planning.fingerprint import take_fingerprints
from pipeline.training.planning.folds import make_folds


def test_every_broken_case_is_named(tmp_path: Path) -> None:
    """Another grid, unknown values, fractions, a damaged file, a duplicate.

    A case without any label is none of them.
    """
    (root,) = decathlon(tmp_path, count=9)

    def image_of(i: int) -> Path:
        return root / "imagesTr" / f"case_{i}.nii.gz"

    def label_of(i: int) -> Path:
        return root / "labelsTr" / f"case_{i}.nii.gz"

    values = np.asarray(label(0).dataobj)
    shifted = oblique()
    shifted[0, 3] += 1
    save(label_of(1), nib.Nifti1Image(np.asarray(label(1).dataobj), shifted))
    save(label_of(2), nib.Nifti1Image(values[:-1], oblique()))
    save(label_of(3), nib.Nifti1Image(np.where(values == 2, 5, values).astype(np.uint8), oblique()))
    save(label_of(4), nib.Nifti1Image(values * np.float32(0.7), oblique()))
    save(label_of(5), nib.Nifti1Image(values * np.uint8(0), oblique()))
    image_of(6).write_bytes(image_of(6).read_bytes()[:200])
    save(image_of(7), image(0))
    layout = find_pairs([root])
    prints, problems = take_fingerprints(layout)
    assert [p.case for p in prints] == ["case_0", "case_5", "case_8"]
    assert [p.has_foreground for p in prints] == [True, False, True]
    messages = {problem.case: problem.message for problem in problems}
    expected = {
        "case_1": "1.00 mm from its image",
        "case_2": "has shape",
        "case_3": "has the values 5",
        "case_4": "whole numbers",
        "case_6": "truncated",
        "case_7": "is that of case_0",
    }
    assert set(messages) == set(expected)
    assert all(text in messages[case] for case, text in expected.items())


@pytest.mark.parametrize("axcodes", ["RAS", "LIA", "SPR"])
def test_fingerprints_are_of_the_body_not_of_the_file(axcodes: str, tmp_path: Path) -> None:
    """Shape, spacing and box are along right, anterior, superior in every orientation."""
    save(tmp_path / "images" / "a.nii.gz", reorient(image(), axcodes))
    save(tmp_path / "labels" / "a.nii.gz", reorient(label(), axcodes))
    (one,), problems = take_fingerprints(find_pairs([tmp_path]))
    assert problems == []
    assert one.shape == (17, 24, 21)
    assert one.spacing == pytest.approx(SPACING)
    values = np.asarray(label().dataobj)
    places = np.argwhere(values > 0)
    assert one.foreground_shape == tuple(np.ptp(places, axis=0) + 1)
    assert one.label_voxels == {1: int((values == 1).sum()), 2: int((values == 2).sum())}
    inside = smooth()[values > 0]
    assert one.foreground_mean == pytest.approx(inside.mean(), rel=1e-4)
    assert one.foreground_std == pytest.approx(inside.std(), rel=1e-4)


def test_folds_keep_subjects_together() -> None:
    """Each case is held out once, subjects are never split, and the folds are repeatable."""
    names = [f"sub-{i:02}_ses-{s}_T1w" for i in range(13) for s in "ab"] + [
        f"p{i}_{side}" for i in range(9) for side in ("L", "R")
    ]
    found = make_folds(names)
    assert len(found) == 5
    assert sorted(name for fold in found for name in fold["val"]) == sorted(names)
    for fold in found:
        assert sorted(fold["train"] + fold["val"]) == sorted(names)
        subjects = [
            {name.rpartition("_")[0].partition("_ses")[0] for name in fold[part]}
            for part in ("train", "val")
        ]
        assert not subjects[0] & subjects[1]
        assert abs(len(fold["val"]) - len(names) / 5) <= 3
    assert make_folds(list(reversed(names))) == found
    assert len(make_folds(["a", "b", "c"])) == 3
