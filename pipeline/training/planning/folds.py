"""The folds of a cross-validation, which keep the scans of one subject together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.errors import ConfigError

FOLDS = 5
SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)")
SIDE = re.compile(r"[_-](?:left|right|lh|rh|l|r)$", re.IGNORECASE)


def make_folds(
    cases: Sequence[str],
    count: int = FOLDS,
    seed: int = 0,
    *,
    subjects: Mapping[str, str] | None = None,
    folds: Mapping[str, str] | None = None,
) -> list[dict[str, list[str]]]:
    """Return the folds of a cross-validation, of about equal size.

    All scans of one subject are held out in the same fold.

    Args:
        cases: names of the cases. Names with the same BIDS entity `sub-…` belong to one subject;
            without that entity, names that differ only in a side at their end (`_left`, `_R`).
        count: number of folds; with fewer subjects, the number of subjects.
        seed: seed of the random assignment of subjects to folds.
        subjects: case → subject, where the dataset states it.
        folds: case → name of the fold that holds it out, where the dataset states it; the folds
            are then these, in the order of their names, whatever `count` and the subjects are.

    Returns:
        One dict per fold: `train` → names of the cases to train on, `val` → names of the cases
        that are held out. Each case is held out in one fold.

    Raises:
        ConfigError: the dataset states a single fold, which would leave no case to train on.
    """
    parts = _given_parts(cases, folds) if folds else _drawn_parts(cases, count, seed, subjects)
    made = []
    for held_out in parts:
        left_out = set(held_out)
        training = sorted(name for name in cases if name not in left_out)
        made.append({"train": training, "val": sorted(held_out)})
    return made


def _given_parts(cases: Sequence[str], folds: Mapping[str, str]) -> list[list[str]]:
    """Return the cases of each fold that the dataset states."""
    parts: dict[str, list[str]] = {}
    for name in cases:
        parts.setdefault(folds[name], []).append(name)
    if len(parts) < 2:
        raise ConfigError(
            f"the dataset states one fold ({', '.join(parts)}), expected two or more: each is held "
            "out while the others are trained on"
        )
    return [parts[fold] for fold in sorted(parts, key=_by_number)]


def _by_number(fold: str) -> tuple[int, str]:
    """Return what sorts folds, so that 10 comes after 9."""
    return (int(fold), "") if fold.isdigit() else (0, fold)


def _drawn_parts(
    cases: Sequence[str], count: int, seed: int, subjects: Mapping[str, str] | None
) -> list[list[str]]:
    """Return the cases of each fold, subjects being assigned to folds at random."""
    scans_of: dict[str, list[str]] = {}
    for name in sorted(cases):
        subject = (subjects or {}).get(name) or _subject(name)
        scans_of.setdefault(subject, []).append(name)
    scans = list(scans_of.values())
    parts: list[list[str]] = [[] for _ in range(min(count, len(scans)))]
    for number in np.random.default_rng(seed).permutation(len(scans)):
        smallest = min(parts, key=len)
        smallest.extend(scans[number])
    return parts


def _subject(name: str) -> str:
    """Return what identifies the subject of a case: `sub-…`, or the name without a side."""
    match = SUBJECT.search(name)
    return match[1] if match else SIDE.sub("", name)
