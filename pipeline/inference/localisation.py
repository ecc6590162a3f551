"""Localisation: a search for the part of a scan that contains all structures.

A head is larger than its brain. If one window can contain the whole brain, that window alone is
enough, instead of windows over the whole head. The search segments one window near the top of the
head, moves it towards structures that its faces cut, and repeats. Along an axis where the
structures are longer than a window, the result is as long as the foreground, so that several
windows are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.config import Spec
from pipeline.inference.boxes import crop_box
from pipeline.inference.foreground import foreground_box, foreground_cells
from pipeline.types import Box

# largest number of windows that the search segments. More would take as long as windows over the
# whole foreground, which are used if the search fails
MAX_SEARCH_WINDOWS = 4
# voxels; a face of a window cuts a structure if the structure comes closer to it than this
CUT_MARGIN = 1
# voxels; when a window is moved towards a structure at one face, structures stay at least this far
# from the opposite face
KEPT_MARGIN = 5
# voxels; a window that contains all structures is moved to their centre only if that is farther:
# its scores are computed already
MAX_OFF_CENTRE = 4
# fraction of a cell (`foreground.CELL`) that must be structures, so that single voxels do not count
STRUCTURE_FRACTION = 0.5
# the first window begins 1/16 of its height below the top of the head, because scalp and skull are
# above; an integer division rounds the gap down to whole voxels
TOP_GAP_DIVISOR = 16


@dataclass(frozen=True, slots=True)
class HeadTop:
    """The direction in which the top of a head lies on a grid.

    Attributes:
        axis: spatial axis that runs along the inferior-superior direction.
        at_end: whether the top is at the end of that axis; otherwise it is at its start.
    """

    axis: int
    at_end: bool


def head_top(spec: Spec) -> HeadTop:
    """Return the direction of the top of a head on the network's grid, from the orientation."""
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
    """Return a box that contains all structures; windows outside it are not needed.

    Along an axis where the structures fit into a window, the box is as long as a window and about
    centred on them; along other axes it is as long as the foreground. A window of the search that
    is such a box is returned itself, so that it need not be computed again. If the first window has
    no structure, or if the search does not find all of them with `MAX_SEARCH_WINDOWS` windows, the
    box is that of the whole foreground.

    Args:
        image: (C, *spatial) image.
        foreground: box of the foreground.
        roi_size: size of a window, voxels.
        top: direction of the top of the head.
        level: value above which a voxel is foreground.
        score_box: function that takes a box of the image and returns the network's scores in it,
            (classes, *box), with the background as first class.
    """
    window = _first_window(image, foreground, roi_size, top, level)
    is_long = [False] * len(roi_size)  # axes along which the structures are longer than a window
    for _ in range(MAX_SEARCH_WINDOWS):
        scores = score_box(window)
        is_structure = (scores[1:].amax(dim=0) > scores[0]).float()[None]
        if not foreground_cells(is_structure, STRUCTURE_FRACTION).any():
            return foreground
        found = foreground_box(is_structure, STRUCTURE_FRACTION, [1] * len(roi_size))
        axes = list(zip(found, window, foreground, strict=True))
        cuts = [_cut_faces(*axis) for axis in axes]
        is_long = [known or all(cut) for known, cut in zip(is_long, cuts, strict=True)]
        if all(known or not any(cut) for known, cut in zip(is_long, cuts, strict=True)):
            if any(is_long):  # a part of the structures has not been seen, and may be wider
                is_long = [
                    known or not _has_room(*axis) for known, axis in zip(is_long, axes, strict=True)
                ]
            region = tuple(
                axis[2] if known else _centre_on_structures(*axis, size)
                for known, axis, size in zip(is_long, axes, roi_size, strict=True)
            )
            return window if _is_near(window, region) else region
        window = tuple(
            axis[1] if known else _move_to_cut(*axis, *cut)
            for known, axis, cut in zip(is_long, axes, cuts, strict=True)
        )
    return foreground


def _first_window(
    image: torch.Tensor, foreground: Box, roi_size: Sequence[int], top: HeadTop, level: float
) -> Box:
    """Return the window that the search begins with.

    It begins just below the top of the head. Along the other axes it is centred on the upper part
    of the foreground, because face and neck, which are lower, are not centred on the brain.
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
    """Return a slice of the given size and middle, shifted and shortened to lie within `whole`."""
    size = min(size, whole.stop - whole.start)
    start = min(max(round(middle - size / 2), whole.start), whole.stop - size)
    return slice(start, start + size)


def _cut_faces(found: slice, window: slice, foreground: slice) -> tuple[bool, bool]:
    """Return whether the first and the last face of a window, along one axis, cut structures.

    A face at the end of the foreground cuts nothing. If one face cuts structures, and moving the
    window towards them would bring structures too close to the other face, both count as cut.

    Args:
        found: extent of the structures along the axis, voxels of the window.
        window: extent of the window, voxels of the image.
        foreground: extent of the foreground, voxels of the image.
    """
    size = window.stop - window.start
    first = found.start < CUT_MARGIN and window.start > foreground.start
    last = found.stop > size - CUT_MARGIN and window.stop < foreground.stop
    no_room = (first and size - found.stop < KEPT_MARGIN) or (last and found.start < KEPT_MARGIN)
    return first or no_room, last or no_room


def _move_to_cut(
    found: slice, window: slice, foreground: slice, first_cut: bool, last_cut: bool
) -> slice:
    """Return a window, along one axis, moved towards the structures that one of its faces cuts.

    The structures that are in the window stay in it.
    """
    size, shift = window.stop - window.start, 0
    if first_cut:
        shift = -max(CUT_MARGIN, size - found.stop - KEPT_MARGIN)
    elif last_cut:
        shift = max(CUT_MARGIN, found.start - KEPT_MARGIN)
    return _centred_slice(window.start + size / 2 + shift, size, foreground)


def _has_room(found: slice, window: slice, foreground: slice) -> bool:
    """Return whether structures stay `KEPT_MARGIN` from both faces; see `_cut_faces`.

    A face at the end of the foreground has room.
    """
    size = window.stop - window.start
    first: bool = found.start >= KEPT_MARGIN or window.start <= foreground.start
    last: bool = size - found.stop >= KEPT_MARGIN or window.stop >= foreground.stop
    return first and last


def _is_near(window: Box, region: Box) -> bool:
    """Return whether a window is as large as a region, and not far from it."""
    return all(
        w.stop - w.start == r.stop - r.start and abs(w.start - r.start) <= MAX_OFF_CENTRE
        for w, r in zip(window, region, strict=True)
    )


def _centre_on_structures(found: slice, window: slice, foreground: slice, size: int) -> slice:
    """Return a slice centred on the structures: as long as a window, longer if they do not fit."""
    length = found.stop - found.start
    if length > size - 2 * CUT_MARGIN:
        size = length + 4 * CUT_MARGIN  # at a face a network is least certain
    return _centred_slice(window.start + (found.start + found.stop) / 2, size, foreground)
