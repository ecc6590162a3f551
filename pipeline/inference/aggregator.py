"""Overlapping windows as finished blocks of one volume, with no more in memory than later windows still touch.

Windows lie on a lattice and are visited in its order. Of the weighted sum only one cell (a group of neighbouring windows) and
the strips that the next cells overlap are held; what no later window touches is divided by its weights and handed on. Whatever
the size of a cell, each voxel sums the same windows in the same order, so the result does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import ceil, prod
from typing import Any, Literal

import torch
from monai.data import MetaTensor

from pipeline.errors import VolumeError

Placement = Literal["even", "monai"]
Box = tuple[slice, ...]
Predict = Callable[[Sequence[tuple[int, ...]]], Sequence[torch.Tensor | None]]
HALO = 1  # voxels that a block repeats of the one before it: linear interpolation between two blocks needs both sides
SURE_BACKGROUND = 20.0  # logit of the first class where no window was looked at
FLOAT32 = 4  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreBlock:
    """A finished part of a volume.

    Attributes:
        start: its first voxel; where that is not 0 the block repeats the last `HALO` voxels of the one before it.
        scores: (C, *spatial), the reader's to change.
        shape: the whole volume's size, voxels.
    """

    start: tuple[int, ...]
    scores: torch.Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowGrid:
    """Where windows lie over a volume, and how many of them make a cell.

    Attributes:
        shape: of the volume, voxels; nowhere smaller than the window.
        roi_size: of a window, voxels.
        starts: along each axis, the first voxel of each window, ascending.
        cell: along each axis, how many windows are held together.
        order: the axes, the outermost loop first.
    """

    shape: tuple[int, ...]
    roi_size: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    cell: tuple[int, ...]
    order: tuple[int, ...]

    def groups(self, axis: int) -> list[tuple[int, ...]]:
        """The starts of the windows of each cell along one axis."""
        starts, size = self.starts[axis], self.cell[axis]
        return [starts[i : i + size] for i in range(0, len(starts), size)]

    def held(self) -> int:
        """Voxels that are held at most: a cell and the strips between cells."""
        box = [_extent(self, axis) for axis in range(len(self.shape))]
        split = [axis for axis in self.order if self.cell[axis] < len(self.starts[axis])]
        return prod(box) + sum(prod(_strip_shape(self, axis, 1)) for axis in split)


def window_grid(
    shape: Sequence[int], roi_size: Sequence[int], overlap: float, placement: Placement = "even"
) -> WindowGrid:
    """The windows over a volume, all in one cell.

    Args:
        shape: of the volume, voxels; nowhere smaller than the window.
        roi_size: of a window, voxels.
        overlap: of neighbouring windows, a fraction of the window.
        placement: `even` spaces them evenly, `monai` as MONAI does (the last one is shifted back); both need equally many.
    """
    place = _even if placement == "even" else _shifted
    starts = tuple(
        place(n, roi, max(1, int(roi * (1 - overlap))))
        for n, roi in zip(shape, roi_size, strict=True)
    )
    order = sorted(range(len(shape)), key=lambda axis: -shape[axis] / roi_size[axis])
    counts = tuple(len(listed) for listed in starts)
    return WindowGrid(
        shape=tuple(shape), roi_size=tuple(roi_size), starts=starts, cell=counts, order=tuple(order)
    )


def _even(size: int, roi: int, step: int) -> tuple[int, ...]:
    count = ceil((size - roi) / step) + 1
    return tuple(round(i * (size - roi) / max(1, count - 1)) for i in range(count))


def _shifted(size: int, roi: int, step: int) -> tuple[int, ...]:
    count = ceil((size - roi) / step) + 1
    return tuple(min(i * step, size - roi) for i in range(count))


def group_windows(windows: WindowGrid, channels: int, limit: float) -> WindowGrid:
    """The same windows in the largest cells whose sums stay below a limit; in the smallest ones where none do.

    Args:
        windows: any lattice.
        channels: of the network's output.
        limit: bytes.
    """
    cell = [len(starts) for starts in windows.starts]
    for axis in windows.order:
        while True:
            plan = replace(windows, cell=tuple(cell))
            if buffer_bytes(plan, channels) <= limit:
                return plan
            if cell[axis] == 1:
                break
            cell[axis] = ceil(cell[axis] / 2)
    return plan


def buffer_bytes(windows: WindowGrid, channels: int) -> int:
    """Bytes that `blocks` holds at most, the window at hand left out."""
    return FLOAT32 * (channels + 1) * windows.held()


def aggregate(
    windows: WindowGrid, predict: Predict, weights: torch.Tensor, channels: int, *, batch: int = 1
) -> Iterator[ScoreBlock]:
    """The volume's scores, block by block, in the lattice's order.

    Args:
        windows: where windows lie.
        predict: the first voxels of up to `batch` windows → the scores (C, *roi_size) of each, None for one that was not
            looked at; voxels that no window speaks of are background.
        weights: (*roi_size), of each voxel of a window; the sums are held where they are.
        channels: C.
        batch: windows a call of `predict`, at most.

    Raises:
        VolumeError: scores that are NaN or infinite.
    """
    strips: dict[int, torch.Tensor] = {}
    for cell in product(*(range(len(windows.groups(axis))) for axis in windows.order)):
        place = dict(zip(windows.order, cell, strict=True))
        box = tuple(_reach(windows, axis, place[axis]) for axis in range(len(place)))
        total = weights.new_zeros((channels + 1, *(s.stop - s.start for s in box)))
        _load(windows, strips, place, box, total)
        for starts in _batches(windows, place, batch):
            _add(total, predict(starts), starts, weights, box)
        _store(windows, strips, place, box, total)
        block = _finish(windows, place, box, total)
        del total  # or it would still be held while the next one is filled
        yield block
        del block


def _batches(
    windows: WindowGrid, place: dict[int, int], size: int
) -> Iterator[list[tuple[int, ...]]]:
    """The windows of one cell, in the lattice's order, a few at a time."""
    members = [windows.groups(axis)[place[axis]] for axis in windows.order]
    back = [windows.order.index(axis) for axis in range(len(place))]
    starts = [tuple(start[i] for i in back) for start in product(*members)]
    return (starts[i : i + size] for i in range(0, len(starts), size))


def _reach(windows: WindowGrid, axis: int, number: int) -> slice:
    """All voxels along one axis that a cell's windows touch, and the halo."""
    group = windows.groups(axis)[number]
    return slice(max(0, group[0] - HALO) if number else 0, group[-1] + windows.roi_size[axis])


def _done(windows: WindowGrid, axis: int, number: int) -> int:
    """The voxel along one axis up to which a cell finishes the volume."""
    groups = windows.groups(axis)
    return groups[number + 1][0] if number + 1 < len(groups) else windows.shape[axis]


def _add(
    total: torch.Tensor,
    scores: Sequence[torch.Tensor | None],
    starts: Sequence[tuple[int, ...]],
    weights: torch.Tensor,
    box: Box,
) -> None:
    for start, one in zip(starts, scores, strict=True):
        if one is None:
            continue
        at = tuple(
            slice(i - s.start, i - s.start + n)
            for i, s, n in zip(start, box, weights.shape, strict=True)
        )
        scored: tuple[Any, ...] = (slice(0, -1), *at)
        counted: tuple[Any, ...] = (-1, *at)
        total[scored].addcmul_(one.to(total.device, torch.float32), weights)
        total[counted] += weights


def _load(
    windows: WindowGrid,
    strips: dict[int, torch.Tensor],
    place: dict[int, int],
    box: Box,
    total: torch.Tensor,
) -> None:
    """Fills in what earlier cells summed; the innermost axis is the last to have been there."""
    for axis in windows.order:
        if place[axis]:
            strip = strips[axis]
            size = _reach(windows, axis, place[axis] - 1).stop - box[axis].start
            total.narrow(axis + 1, 0, size).copy_(
                strip[_within(windows, axis, box)].narrow(axis + 1, 0, size)
            )


def _store(
    windows: WindowGrid,
    strips: dict[int, torch.Tensor],
    place: dict[int, int],
    box: Box,
    total: torch.Tensor,
) -> None:
    """Keeps, along each axis, what the next cell there touches again."""
    for axis in windows.order:
        groups = windows.groups(axis)
        if place[axis] + 1 == len(groups):
            continue
        first = _done(windows, axis, place[axis]) - HALO - box[axis].start
        kept = total.narrow(axis + 1, first, total.shape[axis + 1] - first)
        if axis not in strips:
            strips[axis] = total.new_zeros(_strip_shape(windows, axis, len(total)))
        strips[axis][_within(windows, axis, box)].narrow(axis + 1, 0, kept.shape[axis + 1]).copy_(
            kept
        )


def _strip_shape(windows: WindowGrid, axis: int, channels: int) -> list[int]:
    """Whole along the inner axes, as long as the largest cell along the outer ones."""
    rank = windows.order.index(axis)
    groups = windows.groups(axis)
    shape = [channels, *windows.shape]
    shape[axis + 1] = max(a[-1] + windows.roi_size[axis] - b[0] + HALO for a, b in pairwise(groups))
    for outer in windows.order[:rank]:
        shape[outer + 1] = _extent(windows, outer)
    return shape


def _extent(windows: WindowGrid, axis: int) -> int:
    """The largest size of a cell along one axis, voxels."""
    reaches = [_reach(windows, axis, number) for number in range(len(windows.groups(axis)))]
    return max(int(reach.stop) - int(reach.start) for reach in reaches)


def _within(windows: WindowGrid, axis: int, box: Box) -> Box:
    """A cell's place in the strip of one axis: its own voxels along inner axes, from the front along the others."""
    inner = windows.order[windows.order.index(axis) + 1 :]
    sizes = [slice(0, s.stop - s.start) for s in box]
    sizes[axis] = slice(None)
    return (slice(None), *(box[i] if i in inner else sizes[i] for i in range(len(box))))


def _finish(
    windows: WindowGrid, place: dict[int, int], box: Box, total: torch.Tensor
) -> ScoreBlock:
    """The part of a cell that no later window touches, divided by its weights."""
    stop = [_done(windows, axis, place[axis]) - box[axis].start for axis in range(len(box))]
    done = (slice(None), *(slice(0, n) for n in stop))
    part = total[done]
    scores, weight = part[:-1], part[-1]
    unseen = weight == 0
    if unseen.any():
        scores[0][unseen] = SURE_BACKGROUND
        weight[unseen] = 1
    scores /= weight
    start = tuple(s.start for s in box)
    if not torch.isfinite(scores.sum()):
        raise VolumeError(
            f"the network gave NaN or infinity in the block that starts at voxel {start} of its grid; "
            "try --precision float32, or check the bundle's weights with `volseg check`"
        )
    return ScoreBlock(start=start, scores=scores, shape=windows.shape)


def assemble(pieces: Iterator[ScoreBlock], image: torch.Tensor) -> torch.Tensor:
    """All blocks as one tensor (C, *spatial) float32, a MetaTensor like the image where that is one."""
    scores = None
    for block in pieces:
        if scores is None:
            scores = block.scores.new_zeros((len(block.scores), *block.shape))
            scores[0] = SURE_BACKGROUND  # where no block speaks
        at = (
            slice(None),
            *(slice(i, i + n) for i, n in zip(block.start, block.scores.shape[1:], strict=True)),
        )
        scores[at] = block.scores
        del block
    assert scores is not None
    return MetaTensor(scores, meta=image.meta.copy()) if isinstance(image, MetaTensor) else scores
