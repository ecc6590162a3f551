from __future__ import annotations

from dataclasses import astuple
from math import nan
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from phantom import SPACING, oblique, save

from pipeline.errors import GeometryError
from pipeline.evaluation.metrics import score_masks
from pipeline.evaluation.scores import score_case, worst_cases


def maps() -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], ...]:
    random = np.random.default_rng(4)
    first, second = (random.integers(0, 4, (7, 8, 9)).astype(np.uint8) for _ in range(2))
    return first, np.where(random.random((7, 8, 9)) < 0.7, first, second)


def test_dice_is_monais_where_both_have_the_label() -> None:
    """An independent implementation gives the same numbers."""
    a, b = maps()
    for value in (1, 2, 3):
        masks = (torch.from_numpy(m == value)[None, None].float() for m in (a, b))
        assert score_masks(a == value, b == value, SPACING).dice == pytest.approx(
            float(compute_dice(*masks, include_background=True))
        )


def test_edge_cases_do_not_flatter() -> None:
    """1 where equal; 0 where one map alone has the label; nan, not scored, where neither has."""
    none = np.zeros((7, 8, 9), dtype=bool)
    one = none.copy()
    one[2:4, 3:6, 4] = True
    assert astuple(score_masks(one, one, SPACING))[:4] == (1, 0, 0, 1)
    for missed in (score_masks(none, one, SPACING), score_masks(one, none, SPACING)):
        assert (missed.dice, missed.hd95_mm, missed.assd_mm, missed.nsd) == (0, np.inf, np.inf, 0)
    neither = score_masks(none, none, SPACING)
    assert all(np.isnan([neither.dice, neither.hd95_mm, neither.assd_mm, neither.nsd]))
    assert (neither.volume_ml, neither.reference_ml) == (0, 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_are_in_mm_along_each_axis(axis: int) -> None:
    """A box moved by two voxels has surfaces at most two voxels' spacing away; its volume is that of its voxels."""
    box = np.zeros((12, 13, 14), dtype=bool)
    box[3:7, 3:8, 3:9] = True
    moved = score_masks(np.roll(box, 2, axis), box, SPACING)
    assert moved.hd95_mm == pytest.approx(2 * SPACING[axis], abs=1e-5)
    assert moved.volume_ml == pytest.approx(box.sum() * np.prod(SPACING) / 1000)
    assert moved.difference_ml == 0


def test_maps_of_two_grids_are_not_compared() -> None:
    """The error says where the mistake may lie."""
    with pytest.raises(GeometryError, match="compare them on one grid"):
        score_masks(np.zeros((7, 8, 9)), np.zeros((7, 8, 10)), SPACING)


def test_a_case_is_scored_against_its_label_file(tmp_path: Path) -> None:
    """One row a label, background left out; a missing prediction scores 0."""
    a, b = maps()
    label, prediction = (
        save(tmp_path / name, nib.Nifti1Image(m, oblique()))
        for name, m in (("l.nii.gz", a), ("p.nii.gz", b))
    )
    case, names = (
        {"case": "x", "label": str(label)},
        {"background": 0, "one": 1, "three": 3, "absent": 9},
    )
    rows = score_case(case, prediction, names)
    assert [(row["case"], row["label"]) for row in rows] == [
        ("x", "one"),
        ("x", "three"),
        ("x", "absent"),
    ]
    assert rows[0]["dice"] == score_masks(b == 1, a == 1, SPACING).dice
    assert [row["dice"] for row in score_case(case, tmp_path / "none.nii.gz", names)[:2]] == [0, 0]


def test_real_labels_against_themselves(data: Path) -> None:
    """Dice 1 for both structures of a real label file, read as any file is."""
    path = data / "hippocampus" / "labelsTr" / "hippocampus_001.nii.gz"
    rows = score_case(
        {"case": "x", "label": str(path)}, path, {"background": 0, "anterior": 1, "posterior": 2}
    )
    assert [row["dice"] for row in rows] == [1, 1]


def test_the_worst_cases_come_first() -> None:
    """By the mean over labels; cases in which nothing is scored are none."""
    rows = [{"case": case, "label": label, "dice": dice}
            for case, pair in {"a": (0.9, 0.5), "b": (0.6, 0.7), "c": (0.9, 0.9), "d": (nan, nan), "e": (nan, 0.1)}.items()
            for label, dice in zip("xy", pair, strict=True)]  # fmt: skip
    assert worst_cases(rows, 3) == ["e", "b", "a"]
    assert worst_cases(rows, 9)[-1] == "c"
