"""Metrics of two masks."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from phantom import SPACING

from pipeline.errors import GeometryError
from pipeline.evaluation.metrics import LabelScore, score_masks
from pipeline.types import Array


def test_dice_is_monais_where_both_have_the_label(label_maps: tuple[Array, Array]) -> None:
    """Dice equals that of an independent implementation."""
    a, b = label_maps
    for value in (1, 2, 3):
        masks = (torch.from_numpy(m == value)[None, None].float() for m in (a, b))
        assert score_masks(a == value, b == value, SPACING).dice == pytest.approx(
            float(compute_dice(*masks, include_background=True))
        )


def test_edge_cases_do_not_flatter() -> None:
    """Dice is 1 for equal masks, 0 if one is empty, nan if both are."""
    none = np.zeros((7, 8, 9), dtype=bool)
    one = none.copy()
    one[2:4, 3:6, 4] = True
    assert astuple(score_masks(one, one, SPACING))[:4] == (1, 0, 0, 1)
    for missed in (score_masks(none, one, SPACING), score_masks(one, none, SPACING)):
        assert (missed.dice, missed.hd95_mm, missed.assd_mm, missed.nsd) == (0, np.inf, np.inf, 0)
    neither = score_masks(none, none, SPACING)
    assert all(np.isnan([neither.dice, neither.hd95_mm, neither.assd_mm, neither.nsd]))
    assert (neither.volume_ml, neither.reference_ml) == (0, 0)


def test_fractions_and_volumes_of_known_masks() -> None:
    """Sensitivity, precision and volumes of two boxes that share 6 of 12 and 24 voxels."""
    reference = np.zeros((7, 8, 9), dtype=bool)
    reference[2:4, 3:6, 4:6] = True
    prediction = np.zeros_like(reference)
    prediction[2:4, 3:6, 5:9] = True
    score = score_masks(prediction, reference, SPACING)
    voxel_ml = np.prod(SPACING) / 1000
    assert score.sensitivity == pytest.approx(6 / 12)
    assert score.precision == pytest.approx(6 / 24)
    assert score.difference_ml == pytest.approx(12 * voxel_ml)
    assert score.difference_percent == pytest.approx(100)


def test_fractions_where_a_mask_is_empty() -> None:
    """0 where only one mask is empty, nan where both are; a volume in percent of nothing is inf."""
    none = np.zeros((7, 8, 9), dtype=bool)
    one = none.copy()
    one[2:4, 3:6, 4] = True

    def fractions(score: LabelScore) -> tuple[float, float, float]:
        return score.sensitivity, score.precision, score.difference_percent

    assert fractions(score_masks(none, one, SPACING)) == (0, 0, -100)
    assert fractions(score_masks(one, none, SPACING)) == (0, 0, np.inf)
    assert np.isnan(fractions(score_masks(none, none, SPACING))).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_are_in_mm_along_each_axis(axis: int) -> None:
    """A box shifted by two voxels along an axis has an HD95 of two spacings of that axis."""
    box = np.zeros((12, 13, 14), dtype=bool)
    box[3:7, 3:8, 3:9] = True
    moved = score_masks(np.roll(box, 2, axis), box, SPACING)
    assert moved.hd95_mm == pytest.approx(2 * SPACING[axis], abs=1e-5)
    assert moved.volume_ml == pytest.approx(box.sum() * np.prod(SPACING) / 1000)
    assert moved.difference_ml == 0


def test_maps_of_two_grids_are_not_compared() -> None:
    """Masks of two shapes are refused; the error names the likely mistake."""
    with pytest.raises(GeometryError, match="compare them on one grid"):
        score_masks(np.zeros((7, 8, 9)), np.zeros((7, 8, 10)), SPACING)
