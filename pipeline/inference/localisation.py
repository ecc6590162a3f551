"""One window over all structures of a scan: a search for the region of interest.

A head is larger than its brain. Windows that are spread over the whole head each contain a part of
the brain; if one window can contain all of it, that window alone is enough. The search predicts one
window near the top of the head, moves it towards structures that its faces cut, and repeats. Along
an axis where the structures are longer than a window, the region is as long as they are, and
windows are spread along that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.config import Spec
from pipeline.inference.boxes import crop_box
from pipeline.inference.foreground import foreground_box, foreground_cells
from pipeline.types import Box

# windows that the search predicts at most. More would cost as much as windows over the whole
# foreground, which are used where the search fails.
MAX_SEARCH_WINDOWS = 4
# voxels from a window's face within which a structure counts as cut by it; a network is least
# certain in its outermost voxels
CUT_MARGIN = 2
# voxels that stay between a face and the structures when a window is moved away from them
KEPT_MARGIN = 6
# fraction of a cell (`foreground.CELL`) that must be structures, so that a speck does not count
STRUCTURE_FRACTION = 0.5
# The first window begins 1/16 of its height below the top of the head: scalp and skull are there.
# Rounded down to whole voxels, hence the divisor.
TOP_GAP_DIVISOR = 16


@dataclass(frozen=True, slots=True)
class HeadTop:
    """The direction of the top of a head on a grid.

    Attributes:
        axis: the spatial axis from inferior to superior or back.
        at_end: whether the top lies at the end of that axis, not at its start.
    """

    axis: int
    at_end: bool


def head_top(spec: Spec) -> HeadTop:
    """Return where the top of a head lies on a spec's grid."""
    axis = next(i for i, code in enumerate(spec.orientation) if code in "SI")
    return HeadTop(axis, at_end=spec.orientation[axis] == "S")


def localise(
    image: torch.Tensor,
    foreground: Box,
    roi_size: Sequence[int],
    top: HeadTop,
    level: float,
    score_box: Callable[[Box], torch.Tensor],
) -> Box:
    """Return the box that windows have to be spread over to contain all structures.

    Along an axis where the structures fit in a window, the box is as long as a window and centred
    on them. Elsewhere it is as long as they are. The box is the whole foreground where no structure
    is found, or not all of them within `MAX_SEARCH_WINDOWS` windows.

    Args:
        image: (C, *spatial).
        foreground: the box of the foreground.
        roi_size: of a window, voxels.
        top: where the top of the head lies.
        level: the value above which a voxel belongs to the foreground.
        score_box: a box of the image → the network's scores there, (classes, *box), background
            first.
    """
    window = _first_window(image, foreground, roi_size, top, level)
    for _ in range(MAX_SEARCH_WINDOWS):
        scores = score_box(window)
        is_structure = (scores[1:].amax(dim=0) > scores[0]).float()[None]
        if not foreground_cells(is_structure, STRUCTURE_FRACTION).any():
            return foreground
        found = foreground_box(is_structure, STRUCTURE_FRACTION, [1] * len(roi_size))
        axes = list(zip(found, window, foreground, strict=True))
        cuts = [_cut_faces(*axis) for axis in axes]
        if not any(first or last for first, last in cuts):
            region = []
            for axis, size in zip(axes, roi_size, strict=True):
                region.append(_centre_on_structures(*axis, size))
            return tuple(region)
        window = tuple(_move_to_cut(*axis, *cut) for axis, cut in zip(axes, cuts, strict=True))
    return foreground


def _first_window(
    image: torch.Tensor, foreground: Box, roi_size: Sequence[int], top: HeadTop, level: float
) -> Box:
    """Return the window that the search begins with.

    It lies just below the top of the head. Along the other axes it is centred on the upper part of
    the foreground, because face and neck lie lower and off the brain's centre.
    """
    height, whole = roi_size[top.axis], foreground[top.axis]
    gap = height // TOP_GAP_DIVISOR
    if top.at_end:
        vertical = _centred_slice(whole.stop - (gap + height / 2), height, whole)
        upper = slice((vertical.start + whole.stop) // 2, whole.stop)
    else:
        vertical = _centred_slice(whole.start + (gap + height / 2), height, whole)
        upper = slice(whole.start, (whole.start + vertical.stop + 1) // 2)
    search = list(foreground)
    search[top.axis] = upper
    head = foreground_box(crop_box(image, search), level, [1] * len(roi_size))
    window = []
    for axis, size in enumerate(roi_size):
        middle = search[axis].start + (head[axis].start + head[axis].stop) / 2
        window.append(_centred_slice(middle, size, foreground[axis]))
    window[top.axis] = vertical
    return tuple(window)


def _centred_slice(middle: float, size: int, whole: slice) -> slice:
    """Return a slice of a size around a middle, shifted into `whole`, and no longer than that."""
    size = min(size, whole.stop - whole.start)
    start = min(max(round(middle - size / 2), whole.start), whole.stop - size)
    return slice(start, start + size)


def _cut_faces(found: slice, window: slice, foreground: slice) -> tuple[bool, bool]:
    """Return whether a window's first and its last face along one axis cut structures.

    A face at the end of the foreground cuts nothing. Where one face cuts structures and the window
    cannot be moved away from the other, both count as cut.

    Args:
        found: the extent of the structures, in the window's voxels.
        window: in the image's voxels.
        foreground: in the image's voxels.
    """
    size = window.stop - window.start
    first = found.start < CUT_MARGIN and window.start > foreground.start
    last = found.stop > size - CUT_MARGIN and window.stop < foreground.stop
    no_room = (first and size - found.stop < KEPT_MARGIN) or (last and found.start < KEPT_MARGIN)
    return first or no_room, last or no_room


def _move_to_cut(
    found: slice, window: slice, foreground: slice, first_cut: bool, last_cut: bool
) -> slice:
    """Return a window moved towards the face that cuts structures; all of them stay inside.

    Where both faces cut structures, the window becomes the whole foreground along this axis.
    """
    if first_cut and last_cut:
        return foreground
    size, shift = window.stop - window.start, 0
    if first_cut:
        shift = -max(CUT_MARGIN, size - found.stop - KEPT_MARGIN)
    elif last_cut:
        shift = max(CUT_MARGIN, found.start - KEPT_MARGIN)
    return _centred_slice(window.start + size / 2 + shift, size, foreground)


def _centre_on_structures(found: slice, window: slice, foreground: slice, size: int) -> slice:
    """Return a slice of a window's size around the structures, or longer where they do not fit."""
    length = found.stop - found.start
    if length > size - CUT_MARGIN:
        size = length + 2 * CUT_MARGIN
    return _centred_slice(window.start + (found.start + found.stop) / 2, size, foreground)
