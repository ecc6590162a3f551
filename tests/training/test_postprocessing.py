"""Postprocessing that out-of-fold predictions choose: what each rule gives, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import oblique, parse_spec, save

from pipeline.config import Spec
from pipeline.evaluation import dice
from pipeline.inference import clean_components
from pipeline.training.postprocessing import (
    RULES,
    HeldOutCase,
    Rule,
    _dice_with_rules,
    _rule_dice,
    choose_postprocessing,
    with_rules,
)
from pipeline.types import Array

SHAPE = (31, 26, 23)
AFFINE = oblique((1.1, 0.9, 1.7))
VALUES = {"front": 7, "back": 300}


def truth(seed: int) -> Array:
    """Two boxes whose size differs from case to case."""
    array = np.zeros(SHAPE, dtype=np.uint16)
    array[3 : 14 + seed % 3, 4:13, 5:15] = 7
    array[18:28, 4 : 15 + seed % 2, 5:14] = 300
    return array


def held_out(folder: Path, seed: int, prediction: Array, reference: Array) -> HeldOutCase:
    """Write a case's maps; cases alternate between three folds."""
    paths = {}
    for name, array in (("pred", prediction), ("true", reference)):
        paths[name] = save(folder / f"{seed}_{name}.nii.gz", nib.Nifti1Image(array, AFFINE))
    case: Any = {"case": f"case_{seed}", "image": paths["pred"], "label": paths["true"]}
    return HeldOutCase(case=case, prediction=paths["pred"], fold=seed % 3)


def noisy(seed: int, *, islands: bool, holes: bool) -> Array:
    """A perfect prediction but for islands of `front`, and holes in `back`."""
    array = truth(seed)
    random = np.random.default_rng(seed)
    if islands:
        for _ in range(4):
            x, y = random.integers(0, 29), random.integers(18, 24)
            array[x : x + 2, y : y + 2, 18:21] = 7
    if holes:
        for x, z in random.integers(0, (6, 5), size=(3, 2)):
            array[20 + x : 22 + x, 7:9, 7 + z : 9 + z] = 0
    return array


def cases(folder: Path, count: int = 9, **faults: bool) -> list[HeldOutCase]:
    return [held_out(folder, i, noisy(i, **faults), truth(i)) for i in range(count)]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_dice_of_a_rule_is_that_of_the_cleaned_map(
    regions: bool, ignored: bool, tmp_path: Path
) -> None:
    """Of each label by itself: the same as cleaning the map and scoring it."""
    changes: dict[str, Any] = {"ignore_label": 9} if ignored else {}
    if regions:
        changes |= {"output": "regions", "regions": {"front": [7, 300], "back": [300]}}
    spec = parse_spec(**changes)
    reference = truth(1)
    if ignored:
        reference[:, 20:, 19] = 9
    case = held_out(tmp_path, 1, noisy(1, islands=True, holes=True), reference)
    found = _rule_dice(spec, case)
    for label in VALUES:
        for number, rule in enumerate(RULES):
            alone = _dice_with_rules(spec, case, {label: rule} if rule != Rule() else {})
            assert found[label][number] == pytest.approx(alone[label], abs=1e-12), (label, rule)


def test_each_label_gets_the_rule_it_needs(tmp_path: Path) -> None:
    """Islands of one label, holes in the other: the cleaned maps are the references."""
    spec = parse_spec()
    found = choose_postprocessing(spec, cases(tmp_path, islands=True, holes=True))
    assert set(found.rules) == {"front", "back"}
    assert found.rules["front"].largest or found.rules["front"].min_ml
    assert not found.rules["front"].fill
    assert found.rules["back"] == Rule(fill=True)
    for label in VALUES:
        assert found.dice[label] < 0.999
        assert found.nested_gain[label] == pytest.approx(1 - found.dice[label])
    columns = found.columns()
    assert columns["back"]["fill_holes"] is True
    assert columns["back"]["nested_gain"] == found.nested_gain["back"]


def test_perfect_predictions_get_no_rule(tmp_path: Path) -> None:
    found = choose_postprocessing(parse_spec(), cases(tmp_path, islands=False, holes=False))
    assert found.rules == {}
    assert set(found.nested_gain.values()) == {0.0}


def test_a_rule_that_one_fold_alone_wants_is_not_kept(tmp_path: Path) -> None:
    """It raises the Dice over all cases, and the nested estimate shows that it is no gain.

    In two folds the smaller part of `front` is right, and a little more than that is wrong in the
    third one.
    """
    spec, found = parse_spec(), []
    for seed in range(9):
        array, reference = truth(0), truth(0)
        if seed % 3 == 0:  # false islands
            array[0:28, 20:25, 18:22] = 7
            array[:, 19, :] = 0
        else:  # a true second part, which the largest component would lose
            for one in (array, reference):
                one[0:6, 20:25, 18:22] = 7
        found.append(held_out(tmp_path, seed, array, reference))
    chosen = choose_postprocessing(spec, found)
    assert "front" not in chosen.rules
    assert chosen.nested_gain["front"] <= 0


@pytest.mark.parametrize(("count", "changes"), [(1, {}), (9, {"largest_component": ("each",)})])
def test_without_an_estimate_nothing_is_chosen(
    count: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """A single fold, or predictions that have been postprocessed already."""
    spec: Spec = parse_spec(**changes)
    found = choose_postprocessing(spec, cases(tmp_path, count, islands=True, holes=True))
    assert found.rules == {}
    assert set(found.nested_gain.values()) == {0.0}
    assert set(found.dice) == {"front", "back"}


def test_a_removed_false_finding_counts(tmp_path: Path) -> None:
    """A label that neither map has is a Dice of 1 here, although it is in no score."""
    prediction = np.zeros(SHAPE, dtype=np.uint16)
    prediction[3:5, 4:6, 5:6] = 7
    case = held_out(tmp_path, 0, prediction, np.zeros(SHAPE, dtype=np.uint16))
    table = _rule_dice(parse_spec(), case)["front"]
    assert table[RULES.index(Rule())] == 0
    assert table[RULES.index(Rule(min_ml=0.03))] == 1
    assert np.isnan(dice(np.zeros(2, dtype=bool), np.zeros(2, dtype=bool)))


def test_the_spec_of_rules_does_what_they_say() -> None:
    """Through the spec to the label map, as inference applies it."""
    spec = with_rules(parse_spec(), {"front": Rule(largest=True), "back": Rule(fill=True)})
    assert spec.largest_component == ("front",)
    assert spec.fill_holes == ("back",)
    assert spec.min_component_ml == {}
    numbers = np.zeros(SHAPE, dtype=np.int32)
    for number, value in enumerate(VALUES.values(), start=1):
        numbers[noisy(3, islands=True, holes=True) == value] = number
    cleaned = clean_components(torch.from_numpy(numbers), AFFINE, spec).numpy()
    expected = truth(3)
    np.testing.assert_array_equal(np.array([0, 7, 300])[cleaned], expected)
