"""Fingerprints of labelled cases: which are usable, what a plan learns from them; the folds."""

from __future__ import annotations

from math import isnan
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dataset_folders import decathlon, decathlon_4d, image, label, nnunet_regions
from phantom import SPACING, oblique, reorient, save, smooth

from pipeline.errors import ConfigError
from pipeline.io import find_pairs
from pipeline.training.planning.fingerprint import PERCENTILES, take_fingerprints
from pipeline.training.planning.folds import make_folds


def test_a_label_map_with_nan_is_the_problem_of_its_case(tmp_path: Path) -> None:
    """The others are planned."""
    (root,) = decathlon(tmp_path)
    values = np.asarray(label(0).dataobj).astype(np.float32)
    holes = np.where(values == 0, np.nan, values)
    save(root / "labelsTr" / "case_0.nii.gz", nib.Nifti1Image(holes, oblique()))
    prints, (problem,) = take_fingerprints(find_pairs([root]))
    assert [one.case for one in prints] == ["case_1", "case_2"]
    count = int(np.isnan(holes).sum())
    assert f"{count} voxels are not a number (nan or infinite), expected" in problem.message


def test_a_case_without_foreground_has_a_fingerprint(tmp_path: Path) -> None:
    """A healthy control: size and grid, and no statistics of labelled voxels."""
    save(tmp_path / "images" / "a.nii.gz", image())
    empty = np.zeros((17, 24, 21), dtype=np.uint8)
    save(tmp_path / "labels" / "a.nii.gz", nib.Nifti1Image(empty, oblique()))
    (one,), problems = take_fingerprints(find_pairs([tmp_path]))
    assert problems == []
    assert not one.has_foreground
    assert (one.shape, one.foreground_shape, one.label_voxels) == ((17, 24, 21), (0, 0, 0), {})
    assert isnan(one.foreground_mean)
    assert isnan(one.channels[0].percentiles[0])


def test_ignored_voxels_are_in_no_statistics(tmp_path: Path) -> None:
    """Counts, box and intensities are those of the labelled voxels."""
    (root,) = nnunet_regions(tmp_path, count=1)
    (one,), problems = take_fingerprints(find_pairs([root]))
    assert problems == []
    values = np.asarray(nib.load(root / "labelsTr" / "case_0.nii.gz").dataobj)
    assert one.label_voxels == {v: int((values == v).sum()) for v in (1, 2)}
    inside = np.asarray(image(0).dataobj)[np.isin(values, (1, 2))]
    assert one.foreground_mean == pytest.approx(inside.mean(), rel=1e-5)
    places = np.argwhere(np.isin(values, (1, 2)))
    assert one.foreground_shape == tuple(np.ptp(places, axis=0) + 1)


def test_statistics_of_each_channel(tmp_path: Path) -> None:
    """Those of numpy over the labelled voxels, and the box of what is not zero in all channels."""
    (root,) = decathlon_4d(tmp_path, count=1)
    path = root / "imagesTr" / "case_0.nii.gz"
    stored = np.asarray(nib.load(path).dataobj).copy()
    stored[:5] = 0  # zero in both channels, and in the second one further on
    stored[5:8, ..., 1] = 0
    save(path, nib.Nifti1Image(stored, oblique()))
    (one,), _ = take_fingerprints(find_pairs([root]))
    foreground = np.asarray(label(0).dataobj) > 0
    for number, channel in enumerate(one.channels):
        inside = stored[..., number][foreground]
        expected = (inside.mean(), inside.std(), (stored[..., number] == 0).mean())
        found = (channel.mean, channel.std, channel.zero_fraction)
        assert found == pytest.approx(expected, rel=1e-5)
        assert channel.percentiles == pytest.approx(np.percentile(inside, PERCENTILES))
    assert one.nonzero_shape == (12, 24, 21)
    assert one.zero_fraction == one.channels[0].zero_fraction


def test_a_file_of_other_channels_than_the_dataset_names(tmp_path: Path) -> None:
    """The message says how many the file holds, and what the dataset names."""
    (root,) = decathlon_4d(tmp_path)
    save(root / "imagesTr" / "case_1.nii.gz", image(1))
    prints, (problem,) = take_fingerprints(find_pairs([root]))
    assert [one.case for one in prints] == ["case_0", "case_2"]
    assert "holds 1 volumes, the dataset has 2 channels (T1w, FLAIR)" in problem.message


def test_folds_that_a_dataset_states() -> None:
    """In the order of their numbers; each holds out its own cases."""
    folds = {"a": "10", "b": "9", "c": "9", "d": "10", "e": "1"}
    made = make_folds(sorted(folds), folds=folds)
    assert [fold["val"] for fold in made] == [["e"], ["b", "c"], ["a", "d"]]
    assert made[0]["train"] == ["a", "b", "c", "d"]
    with pytest.raises(ConfigError, match="states one fold"):
        make_folds(["a", "b"], folds={"a": "0", "b": "0"})


def test_subjects_that_a_dataset_states_stay_together() -> None:
    """They count more than the names of the cases."""
    subjects = {f"scan_{i}": f"person {i // 3}" for i in range(12)}
    made = make_folds(list(subjects), count=4, subjects=subjects)
    for fold in made:
        assert len({subjects[name] for name in fold["val"]}) == 1
        assert len(fold["val"]) == 3


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
