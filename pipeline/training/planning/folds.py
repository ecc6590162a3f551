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
    """Return folds of about equal size, with all scans of a subject in one part of each fold.

    Args:
        cases: names of the cases. The subject of a name is its BIDS entity `sub-…`; without one it
            is the name without a side (`_left`, `_R`) at its end.
        count: number of folds; fewer if there are fewer subjects.
        seed: of the assignment of subjects to folds.

    Returns:
        For each fold the names in `train` and in `val`; each case is in `val` once.
    """
    subjects: dict[str, list[str]] = {}
    for name in sorted(cases):
        subjects.setdefault(_subject(name), []).append(name)
    scans = list(subjects.values())
    parts: list[list[str]] = [[] for _ in range(min(count, len(scans)))]
    for number in np.random.default_rng(seed).permutation(len(scans)):
        min(parts, key=len).extend(scans[number])
    folds = []
    for held_out in parts:
        left_out = set(held_out)
        training = sorted(name for name in cases if name not in left_out)
        folds.append({"train": training, "val": sorted(held_out)})
    return folds


def _subject(name: str) -> str:
    match = SUBJECT.search(name)
    return match[1] if match else SIDE.sub("", name)
