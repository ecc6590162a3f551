"""Whether images of a dataset may be mirrored: not where a label belongs to one side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.training.planning.fingerprint import Fingerprint

# parts of a label's name that name a side, anywhere in it …
SIDES = {"left", "right", "lh", "rh", "lt", "rt", "links", "rechts", "gauche", "droite"}
SIDE_LETTERS = {"l", "r"}  # … and at its start or end
UNNAMED = re.compile(r"^(?:label|class|region|structure|roi)?[\s_-]*\d+$", re.IGNORECASE)
# The box of all labels is off the middle by this fraction of the volume's width along R, to the
# same side in this fraction of the cases: only one side is labelled
OFF_CENTRE, SAME_SIDE = 0.1, 0.9


def mirror_problem(labels: Mapping[str, int], fingerprints: Sequence[Fingerprint]) -> str:
    """Return why images may not be mirrored along R, as text; empty if they may.

    Args:
        labels: name → value, the background first.
        fingerprints: fingerprints of all usable cases.
    """
    structures = list(labels)[1:]
    sided = [name for name in structures if has_side(name)]
    if sided:
        return f"labels have a side ({', '.join(sided[:2])}{', …' if len(sided) > 2 else ''})"
    unnamed = [name for name in structures if UNNAMED.match(name)]
    if unnamed and len(structures) > 1:
        return f"labels without a name ({unnamed[0]}, …) may have a side"
    if _one_side_labelled(fingerprints):
        return "the labels lie on one side of the volumes"
    return ""


def has_side(name: str) -> bool:
    """Return whether a label's name says left or right.

    >>> [has_side(name) for name in ("Left-Putamen", "hippocampus_R", "LeftLung", "liver")]
    [True, True, True, False]
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]
    if not words:
        return False
    return bool(SIDES & set(words)) or bool(SIDE_LETTERS & {words[0], words[-1]} and len(words) > 1)


def _one_side_labelled(fingerprints: Sequence[Fingerprint]) -> bool:
    """Return whether the labels are on the same side of most volumes."""
    offsets = []
    for one in fingerprints:
        if one.has_foreground:
            middle = one.foreground_start[0] + one.foreground_shape[0] / 2
            offsets.append(middle / one.shape[0] - 0.5)
    if not offsets:
        return False
    sides = np.sign(offsets) * (np.abs(offsets) > OFF_CENTRE)
    return bool(max((sides > 0).mean(), (sides < 0).mean()) >= SAME_SIDE)
