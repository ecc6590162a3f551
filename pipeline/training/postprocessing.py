"""Postprocessing of each label, chosen on out-of-fold predictions.

Candidates are the rules of `RULES`: only the largest connected component, only components above a
volume, filled holes. For each label the rule with the highest mean Dice is chosen. That Dice is
optimistic, as the rule was chosen by it; the nested estimate is not: each fold is scored with the
rules that the other folds chose. Only a label that gains by this estimate gets its rule.

The idea is nnU-Net's (Isensee et al., Nature Methods 18, 203-211, 2021), which keeps the largest
component of all or of each label, by the Dice it is chosen by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.config import Spec
from pipeline.inference import clean_components
from pipeline.io import read
from pipeline.types import Affine, Array, Case

# a rule is chosen only where it raises the mean Dice by more than this: less is within the noise
MIN_GAIN = 0.0005
MM3_PER_ML = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule for the connected components of one label.

    Attributes:
        largest: whether only the largest component is kept.
        min_ml: volume below which a component is removed, mL.
        fill: whether holes are filled.
    """

    largest: bool = False
    min_ml: float = 0.0
    fill: bool = False


# the first one changes nothing; of equally good rules, the first one is taken. Volumes are fixed,
# not derived from the data, so that nothing of a held-out fold enters its own estimate
RULES = (
    Rule(),
    Rule(largest=True),
    Rule(fill=True),
    Rule(largest=True, fill=True),
    *(Rule(min_ml=volume) for volume in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutCase:
    """An out-of-fold prediction with its reference.

    Attributes:
        case: labelled case.
        prediction: path of its label map.
        fold: fold that held it out.
    """

    case: Case
    prediction: Path
    fold: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Postprocessing:
    """The rules that out-of-fold predictions chose, and their nested estimate.

    Attributes:
        rules: label → rule that the joined bundle gets; labels without one are left out.
        dice: label → mean Dice of the predictions as they are; a label that neither map of a case
            has counts as 1 there, so that a removed false finding counts as a gain.
        nested_gain: label → what the mean Dice gains when each fold follows the rules that the
            other folds chose; 0 with fewer than two folds, which give no estimate.
    """

    rules: Mapping[str, Rule]
    dice: Mapping[str, float]
    nested_gain: Mapping[str, float]

    def columns(self) -> dict[str, Any]:
        """Return label → its Dice, nested gain and rule, as plain values for summary.json."""
        labels = {}
        for label, dice in self.dice.items():
            rule = self.rules.get(label, Rule())
            labels[label] = {
                "dice": dice,
                "nested_gain": self.nested_gain[label],
                "largest_component": rule.largest,
                "min_component_ml": rule.min_ml,
                "fill_holes": rule.fill,
            }
        return labels


def choose_postprocessing(spec: Spec, cases: Sequence[HeldOutCase]) -> Postprocessing:
    """Return the rules that improve out-of-fold predictions, by a nested estimate.

    Args:
        spec: spec of the predictions; one that has rules already keeps them, and no others are
            chosen.
        cases: held-out cases of all trained folds.
    """
    labels = list(spec.values_of)
    tables = [_rule_dice(spec, case) for case in cases]
    folds = sorted({case.fold for case in cases})
    before = {label: _mean(table[label][0] for table in tables) for label in labels}
    nothing = dict.fromkeys(labels, 0.0)
    has_rules = spec.largest_component or spec.min_component_ml or spec.fill_holes
    if len(folds) < 2 or has_rules:
        return Postprocessing(rules={}, dice=before, nested_gain=nothing)
    gains: dict[str, list[float]] = {label: [] for label in labels}
    for fold in folds:
        others = [table for table, case in zip(tables, cases, strict=True) if case.fold != fold]
        rules = _best_rules(labels, others)
        for table, case in zip(tables, cases, strict=True):
            if case.fold == fold:
                after = _dice_with_rules(spec, case, rules)
                for label in labels:
                    gains[label].append(after[label] - table[label][0])
    nested = {label: _mean(found) for label, found in gains.items()}
    chosen = _best_rules(labels, tables)
    kept = {label: rule for label, rule in chosen.items() if nested[label] > 0}
    return Postprocessing(rules=kept, dice=before, nested_gain=nested)


def with_rules(spec: Spec, rules: Mapping[str, Rule]) -> Spec:
    """Return a spec with the rules of some labels in place of its own."""
    return replace(
        spec,
        largest_component=tuple(label for label, rule in rules.items() if rule.largest),
        min_component_ml={label: rule.min_ml for label, rule in rules.items() if rule.min_ml},
        fill_holes=tuple(label for label, rule in rules.items() if rule.fill),
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0


def _best_rules(
    labels: Sequence[str], tables: Sequence[Mapping[str, NDArray[np.float64]]]
) -> dict[str, Rule]:
    """Return label → rule with the highest mean Dice over cases, where it is above that without."""
    rules = {}
    for label in labels:
        means = np.mean([table[label] for table in tables], axis=0)
        best = int(means.argmax())
        if means[best] > means[0] + MIN_GAIN:
            rules[label] = RULES[best]
    return rules


def _rule_dice(spec: Spec, case: HeldOutCase) -> dict[str, NDArray[np.float64]]:
    """Return label → its Dice in one case under each of `RULES`, by its own voxels only."""
    predicted, reference, affine = _maps(case)
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / MM3_PER_ML
    counted = reference != spec.ignore_label
    table = {}
    for label, values in spec.values_of.items():
        mask, true = np.isin(predicted, values), np.isin(reference, values) & counted
        boxes = ndimage.find_objects((mask | true).astype(np.uint8))
        if not boxes:
            table[label] = np.ones(len(RULES))
            continue
        # where holes may be filled: see `clean_components`
        free = ~mask if spec.output == "regions" else predicted == 0
        box = boxes[0]
        found = _Components(mask[box], true[box], counted[box], voxel_ml)
        table[label] = np.array([found.dice(rule, free[box]) for rule in RULES])
    return table


class _Components:
    """The connected components of one label in one case, and the Dice of any choice of them.

    Args:
        mask: (X, Y, Z) bool prediction.
        true: (X, Y, Z) bool reference.
        counted: (X, Y, Z) bool, the voxels that count in scores.
        voxel_ml: volume of a voxel, mL.
    """

    def __init__(self, mask: Array, true: Array, counted: Array, voxel_ml: float) -> None:
        self.true, self.counted = true, counted
        self.numbers, count = ndimage.label(mask)
        flat = self.numbers.ravel()
        self.volumes = np.bincount(flat, minlength=count + 1) * voxel_ml
        self.sizes = np.bincount(flat, counted.ravel(), minlength=count + 1)
        self.overlaps = np.bincount(flat, true.ravel(), minlength=count + 1)
        self.reference_size = int(true.sum())

    def dice(self, rule: Rule, free: Array) -> float:
        """Return the Dice after a rule; 1 if neither prediction nor reference has a voxel."""
        kept = self.volumes >= rule.min_ml
        if rule.largest and len(kept) > 1:
            kept &= np.arange(len(kept)) == 1 + self.volumes[1:].argmax()
        kept[0] = False
        size, overlap = float(self.sizes[kept].sum()), float(self.overlaps[kept].sum())
        if rule.fill:
            whole = kept[self.numbers]
            filled = ndimage.binary_fill_holes(whole) & ~whole & free & self.counted
            size, overlap = size + float(filled.sum()), overlap + float((filled & self.true).sum())
        total = size + self.reference_size
        return 2 * overlap / total if total else 1.0


def _dice_with_rules(spec: Spec, case: HeldOutCase, rules: Mapping[str, Rule]) -> dict[str, float]:
    """Return label → its Dice in one case with the rules of all labels, as inference applies them.

    A voxel that one label loses may become another one's.
    """
    predicted, reference, affine = _maps(case)
    values = np.array(list(spec.labels.values()))
    if rules:
        numbers = np.zeros(predicted.shape, dtype=np.int32)
        for number, value in enumerate(values):
            numbers[predicted == value] = number
        cleaned = clean_components(torch.from_numpy(numbers), affine, with_rules(spec, rules))
        predicted = values[cleaned.numpy()]
    counted = reference != spec.ignore_label
    found = {}
    for label, of_label in spec.values_of.items():
        mask = np.isin(predicted, of_label) & counted
        true = np.isin(reference, of_label) & counted
        total = int(mask.sum()) + int(true.sum())
        found[label] = 2 * int((mask & true).sum()) / total if total else 1.0
    return found


def _maps(case: HeldOutCase) -> tuple[Array, Array, Affine]:
    """Return prediction and reference of a case, and the affine of their grid."""
    prediction = read(case.prediction)
    reference = np.rint(read(case.case["label"]).array)
    return np.rint(prediction.array), reference, np.asarray(prediction.affine, dtype=np.float64)
