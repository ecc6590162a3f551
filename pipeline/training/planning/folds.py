"""The folds of a cross-validation, which keep the scans of one subject together."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

FOLDS = 5
SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)")
SIDE = re.compile(r"[_-](?:left|right|lh|rh|l|r)$", re.IGNORECASE)


def make_folds(
    cases: Sequence[str], count: int = FOLDS, seed: int = 0
) -> list[dict[str, list[str]]]:
    """Return the folds of a cross-validation, of about equal size.

    All scans of one subject are held out in the same fold.

    Args:
        cases: names of the cases. Names with the same BIDS entity `sub-…` belong to one subject;
            without that entity, names that differ only in a side at their end (`_left`, `_R`).
        count: number of folds; with fewer subjects, the number of subjects.
        seed: seed of the random assignment of subjects to folds.

    Returns:
        One dict per fold: `train` → names of the cases to train on, `val` → names of the cases
        that are held out. Each case is held out in one fold.
    """
    subjects: dict[str, list[str]] = {}
    for name in sorted(cases):
        subjects.setdefault(_subject(name), []).append(name)
    scans = list(subjects.values())
    parts: list[list[str]] = [[] for _ in range(min(count, len(scans)))]
    for number in np.random.default_rng(seed).permutation(len(scans)):
        smallest = min(parts, key=len)
        smallest.extend(scans[number])
    folds = []
    for held_out in parts:
        left_out = set(held_out)
        training = sorted(name for name in cases if name not in left_out)
        folds.append({"train": training, "val": sorted(held_out)})
    return folds


def _subject(name: str) -> str:
    """Return what identifies the subject of a case: `sub-…`, or the name without a side."""
    match = SUBJECT.search(name)
    return match[1] if match else SIDE.sub("", name)
