"""Mirror images of what the network sees, segmented and averaged: sides change places in a mirror."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from pipeline.config import AXES, Spec
from pipeline.errors import ConfigError
from pipeline.inference.multi_output import map_tensors

OTHER = {
    "left": "right",
    "Left": "Right",
    "LEFT": "RIGHT",
    "right": "left",
    "Right": "Left",
    "RIGHT": "LEFT",
}
SIDE = re.compile(rf"(?<![A-Za-z])({'|'.join(OTHER)})(?![A-Za-z])")
NetworkFunction = Callable[[torch.Tensor], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirroring:
    """Which mirror images of a window are averaged in.

    Attributes:
        axes: spatial axes of the window; each combination of them is flipped.
        sides: which of them goes from left to right; None where it is not among them.
        order: the channel that says of a mirror image along `sides` what each channel says of the original.
    """

    axes: tuple[int, ...]
    sides: int | None = None
    order: tuple[int, ...] = ()


def mirroring_of(spec: Spec) -> Mirroring | None:
    """The mirror images that a spec asks for; None without any.

    Raises:
        ConfigError: a label with a side whose counterpart is missing.
    """
    if not spec.tta_mirror:
        return None
    window = [AXES[code] for i, code in enumerate(spec.orientation) if i != spec.slice_dim]
    axes = tuple(window.index(AXES[direction]) for direction in spec.tta_mirror)
    if "R" not in spec.tta_mirror:
        return Mirroring(axes=axes)
    return Mirroring(axes=axes, sides=window.index(AXES["R"]), order=counterparts(spec.outputs))


def counterparts(names: Sequence[str]) -> tuple[int, ...]:
    """For each name the number of the one that a mirror makes of it: `left x` and `right x` change places, others stay.

    Raises:
        ConfigError: a name whose counterpart is missing.
    """
    others = [SIDE.sub(lambda found: OTHER[found[0]], name) for name in names]
    alone = [name for name, other in zip(names, others, strict=True) if other not in names]
    if alone:
        raise ConfigError(
            f"spec.tta_mirror: expected each side's labels on the other side too, got only {', '.join(alone)}"
        )
    return tuple(names.index(other) for other in others)


def average_mirrored(network: NetworkFunction, mirror: Mirroring | None) -> NetworkFunction:
    """A network whose output, (B, C, *spatial) or several, is the mean over its input and the mirror images of that."""
    if mirror is None:
        return network

    def mean(patch: torch.Tensor) -> Any:
        total, count = None, 2 ** len(mirror.axes)
        for flips in product((False, True), repeat=len(mirror.axes)):
            flipped = [axis for axis, flip in zip(mirror.axes, flips, strict=True) if flip]
            found = network(patch.flip([axis + 2 for axis in flipped]))
            one = map_tensors(lambda x, flipped=flipped: _back(x, flipped, mirror) / count, found)
            total = one if total is None else map_tensors(torch.add, total, one)
        return total

    return mean


def _back(scores: torch.Tensor, flipped: Sequence[int], mirror: Mirroring) -> torch.Tensor:
    """Scores of a mirror image as those of the original."""
    scores = scores.flip([axis + 2 for axis in flipped])
    return scores[:, list(mirror.order)] if mirror.sides in flipped else scores
