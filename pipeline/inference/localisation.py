"""One window over all the structures of a scan: where it goes is found by looking.

A head is larger than its brain, and windows that are spread over all of it hold parts of the brain. Where one window holds it
whole, that window is enough; where it is longer than a window along an axis, those along that axis are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.config import Spec
from pipeline.inference.foreground import Box, crop_box, foreground_box, foreground_cells

Top = tuple[
    int, int
]  # an axis, and 1 where a head's top is at its end, -1 where it is at its start

LOOKS = 4  # at most, before windows are spread over all
EDGE = 2  # voxels from a window's face within which structures count as cut by it
ROOM = 6  # voxels that a window keeps before what it holds when it is moved
HALF = 0.5  # of a cell
BELOW = 16  # the first window begins a 16th of its height below the top of the head


def head_top(spec: Spec) -> Top:
    """Where the top of a head is on a spec's grid."""
    axis = next(i for i, code in enumerate(spec.orientation) if code in "SI")
    return axis, 1 if spec.orientation[axis] == "S" else -1


def localise(
    image: torch.Tensor,
    inside: Box,
    roi: Sequence[int],
    top: Top,
    above: float,
    look: Callable[[Box], torch.Tensor],
) -> Box:
    """The box that windows have to be spread over: of one window, centred on all structures, where they fit in.

    Along an axis where they are longer than a window the box is as long as they are; it is `inside` where none are found, or
    not all of them after a few looks.

    Args:
        image: (C, *spatial).
        inside: the box of what is no air.
        roi: a window's size, voxels.
        top: where a head's top is.
        above: the level above which there is no air.
        look: a box → the network's scores there, (classes, *box), background first.
    """
    at = _first(image, inside, roi, top, above)
    for _ in range(LOOKS):
        scores = look(at)
        found = (scores[1:].amax(dim=0) > scores[0]).float()[None]
        if not foreground_cells(found, HALF).any():
            return inside
        extent = foreground_box(found, HALF, [1] * len(roi))
        axes = list(zip(extent, at, inside, strict=True))
        cut = [_cut(*axis) for axis in axes]
        if not any(before or after for before, after in cut):
            return tuple(
                _over(part, here, whole, size)
                for (part, here, whole), size in zip(axes, roi, strict=True)
            )
        at = tuple(_moved(*axis, *sides) for axis, sides in zip(axes, cut, strict=True))
    return inside


def _first(image: torch.Tensor, inside: Box, roi: Sequence[int], top: Top, above: float) -> Box:
    """The window to begin with: near the top, in the middle of what is there: a face and a neck lie lower."""
    axis, way = top
    size, whole = roi[axis], inside[axis]
    end = whole.stop if way > 0 else whole.start
    high = _around(end - way * (size // BELOW + size / 2), size, whole)
    half = (
        slice((high.start + end) // 2, end) if way > 0 else slice(end, (end + high.stop + 1) // 2)
    )
    upper = [half if i == axis else part for i, part in enumerate(inside)]
    head = foreground_box(crop_box(image, upper), above, [1] * len(roi))
    middles = [
        part.start + (found.start + found.stop) / 2 for part, found in zip(upper, head, strict=True)
    ]
    at = [_around(middle, n, part) for middle, n, part in zip(middles, roi, inside, strict=True)]
    at[axis] = high
    return tuple(at)


def _around(middle: float, size: int, whole: slice) -> slice:
    """A slice of a size around a middle, within a whole; all of it where it is no larger."""
    size = min(size, whole.stop - whole.start)
    start = min(max(round(middle - size / 2), whole.start), whole.stop - size)
    return slice(start, start + size)


def _cut(part: slice, at: slice, whole: slice) -> tuple[bool, bool]:
    """Whether what was found in a window reaches its first and its last voxels, beyond which there is more to see.

    Both are, where the window has no room to be moved away from one.
    """
    size = at.stop - at.start
    before, after = (
        part.start < EDGE and at.start > whole.start,
        part.stop > size - EDGE and at.stop < whole.stop,
    )
    tight = (before and size - part.stop < ROOM) or (after and part.start < ROOM)
    return before or tight, after or tight


def _moved(part: slice, at: slice, whole: slice, before: bool, after: bool) -> slice:
    """A window moved towards where it cuts something, keeping what else it holds; all there is, where it cuts both."""
    size, way = at.stop - at.start, 0
    if before and after:
        return whole
    if before:
        way = -max(EDGE, size - part.stop - ROOM)
    elif after:
        way = max(EDGE, part.start - ROOM)
    return _around(at.start + size / 2 + way, size, whole)


def _over(part: slice, at: slice, whole: slice, size: int) -> slice:
    """A window's slice around what was found in `at`, or a longer one where that does not fit in."""
    found = part.stop - part.start
    longer = size if found <= size - EDGE else found + 2 * EDGE
    return _around(at.start + (part.start + part.stop) / 2, longer, whole)
