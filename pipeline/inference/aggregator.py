"""Scores of overlapping windows, summed up to finished blocks of a volume.

A window is a box of roi_size voxels that the network computes at once. The windows of a volume lie
on a grid, and neighbouring windows overlap; the score of a voxel is the weighted mean over all
windows that contain it. To save memory, the sums of the whole volume are never held. Windows are
visited group by group, a group being a few neighbouring windows, and there is one buffer, as large
as a group, for their sums. Along one axis, with windows of 6 voxels, a step of 3 and two windows
per group:

    voxel        0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    window 0    [================]
    window 1             [================]
    window 2                      [================]
    window 3                               [================]

    group 0     |buffer====================|
                 finished: block 0 |shared  |                 6 to 8: window 2 is still missing
    group 1                     |h|buffer====================|
                                |  finished: block 1          |

1. The buffer of group 0 covers voxels 0 to 8, all that its windows touch. No later window touches
   voxels 0 to 5: their sums are divided by the sums of the weights and yielded as a `ScoreBlock`.
2. What group 1 needs of group 0 is kept: the sums of the voxels 6 to 8, which the windows of both
   groups touch, and of voxel 5, the halo (`h`). Each block repeats the last voxel of the block
   before it, so that linear interpolation between two blocks finds both neighbours in one block.
3. The buffer of group 1 covers voxels 5 to 14. It starts with the kept sums, not with zeros, and
   the windows of group 1 are added.

In 3D, this happens along each axis. The outermost loop runs along the first axis of
`WindowGrid.order`; the sums shared along an axis are kept as one array, which spans the whole
volume along the inner axes and one buffer along the outer axes.

In groups of any size chosen by `group_windows`, each voxel sums the same windows in the same
order: the result does not depend on the memory at hand, to the last bit.

MONAI shifts the last window back into the volume, where it may overlap the one before it almost
entirely. Such a pair is always in one group: a buffer a few voxels longer takes far less memory
than sums of almost a whole window that two groups share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from math import ceil, prod
from typing import Literal

import torch
from monai.data import MetaTensor

from pipeline.errors import VolumeError
from pipeline.inference.boxes import box_at, crop_box
from pipeline.types import Box

Placement = Literal["even", "monai"]
# first voxel of each window → scores (C, *roi_size) of each window, None for a skipped one
WindowScorer = Callable[[Sequence[tuple[int, ...]]], Sequence[torch.Tensor | None]]

# voxels that a block repeats of the block before it: linear interpolation needs both neighbours
HALO = 1
# logit of the first class in voxels without any scored window, where all others are 0: the softmax
# gives each of them a probability of 2e-9
BACKGROUND_LOGIT = 20.0
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreBlock:
    """A box of a volume in which the scores are final.

    Attributes:
        start: first voxel of the block in the volume. Along each axis where it is not 0, the block
            repeats the last `HALO` voxels of the block before it.
        scores: (C, *spatial) scores; the receiver of the block may change them in place.
        shape: size of the whole volume, voxels.
    """

    start: tuple[int, ...]
    scores: torch.Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowGrid:
    """Positions of the sliding windows in a volume, and how they are grouped.

    A group is a number of neighbouring windows that share one accumulation buffer; see the module's
    docstring.

    Attributes:
        shape: size of the volume in voxels, at least `roi_size` along every axis.
        roi_size: size of a window in voxels.
        starts: per axis, first voxel of each window, ascending. There is a window at each
            combination of them.
        paired: per axis, whether the last two windows count as one where groups are formed.
        group_size: number of windows in a group along each axis, a pair being one.
        order: axes in loop order, outermost first.
    """

    shape: tuple[int, ...]
    roi_size: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    paired: tuple[bool, ...]
    group_size: tuple[int, ...]
    order: tuple[int, ...]

    def members(self, axis: int) -> list[list[tuple[int, ...]]]:
        """Return the members of each group along one axis: first voxels of a window or a pair."""
        starts, size = self.starts[axis], self.group_size[axis]
        single = starts[:-2] if self.paired[axis] else starts
        members: list[tuple[int, ...]] = [(start,) for start in single]
        if self.paired[axis]:
            members.append(starts[-2:])
        return [members[i : i + size] for i in range(0, len(members), size)]

    def groups(self, axis: int) -> list[tuple[int, ...]]:
        """Return, for each group along one axis, the first voxels of its windows."""
        return [tuple(chain.from_iterable(members)) for members in self.members(axis)]

    def held_voxels(self) -> int:
        """Return the largest number of voxels whose sums are held at a time.

        They are those of the largest buffer and of the sums that groups share.
        """
        buffer = [_largest_buffer_length(self, axis) for axis in range(len(self.shape))]
        held = prod(buffer)
        for axis in self.order:
            if len(self.groups(axis)) > 1:
                held += prod(_shared_shape(self, axis))
        return held


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """One group of windows.

    Attributes:
        index: number of the group along each axis.
        box: box of the volume that the group's buffer covers: its windows and the halo.
        finished_stop: along each axis, first voxel of the volume that later windows contain too;
            the group's block ends before it.
    """

    index: tuple[int, ...]
    box: Box
    finished_stop: tuple[int, ...]


def window_grid(
    shape: Sequence[int], roi_size: Sequence[int], overlap: float, placement: Placement = "even"
) -> WindowGrid:
    """Return the sliding windows over a volume, all of them in one group.

    Args:
        shape: size of the volume in voxels, at least `roi_size` along every axis.
        roi_size: size of a window in voxels.
        overlap: overlap of neighbouring windows, as a fraction of the window.
        placement: `even` spaces the windows evenly. `monai` places them as MONAI does: at equal
            steps, with the last window shifted back into the volume. Both need the same number of
            windows.
    """
    starts, paired = [], []
    for size, roi in zip(shape, roi_size, strict=True):
        step = max(1, int(roi * (1 - overlap)))
        count = ceil((size - roi) / step) + 1
        paired.append(placement == "monai" and (size - roi) % step > 0)
        if placement == "even":
            starts.append(tuple(round(i * (size - roi) / max(1, count - 1)) for i in range(count)))
        else:
            starts.append(tuple(min(i * step, size - roi) for i in range(count)))
    # the longest axis (in windows) is the outermost: the shared sums span all inner axes
    order = sorted(range(len(shape)), key=lambda axis: -shape[axis] / roi_size[axis])
    return WindowGrid(
        shape=tuple(shape),
        roi_size=tuple(roi_size),
        starts=tuple(starts),
        paired=tuple(paired),
        group_size=tuple(
            len(along_axis) - is_paired
            for along_axis, is_paired in zip(starts, paired, strict=True)
        ),
        order=tuple(order),
    )


def group_windows(grid: WindowGrid, channels: int, limit: float) -> WindowGrid:
    """Return the same windows in the largest groups whose sums need at most `limit` bytes.

    If even groups of a single window need more, these are returned. Groups are made smaller along
    the outermost axis first, down to one window, then along the next axis: in this order, each
    voxel sums its windows in the same order as without groups.

    Args:
        grid: positions of the windows, in any groups.
        channels: number of channels of the network's output.
        limit: largest size of all sums together, bytes.
    """
    group_size = [
        len(starts) - paired for starts, paired in zip(grid.starts, grid.paired, strict=True)
    ]
    for axis in grid.order:
        while True:
            grouped = replace(grid, group_size=tuple(group_size))
            if buffer_bytes(grouped, channels) <= limit:
                return grouped
            if group_size[axis] == 1:
                break
            group_size[axis] = ceil(group_size[axis] / 2)
    return grouped


def buffer_bytes(grid: WindowGrid, channels: int) -> int:
    """Return the largest size of the sums that `aggregate` holds at a time, bytes.

    Args:
        grid: positions and groups of the windows.
        channels: number of channels of the network's output.
    """
    return FLOAT32_BYTES * (channels + 1) * grid.held_voxels()  # + 1 for the sums of the weights


def aggregate(
    grid: WindowGrid,
    score_windows: WindowScorer,
    weights: torch.Tensor,
    channels: int,
    *,
    batch: int = 1,
    channels_last: bool = False,
) -> Iterator[ScoreBlock]:
    """Yield the scores of a volume as blocks, one per group of windows.

    The score of a voxel is the weighted mean over all windows that contain it.

    Args:
        grid: positions and groups of the windows.
        score_windows: function that takes the first voxels of up to `batch` windows and returns the
            scores (C, *roi_size) of each, None for a skipped window. A voxel whose windows are all
            skipped becomes background.
        weights: (*roi_size) weight of each voxel of a window. The sums are on its device.
        channels: C, number of channels of the scores.
        batch: largest number of windows per call of `score_windows`.
        channels_last: whether the channels of a voxel lie next to each other in the memory of the
            scores, and are to lie so in that of the blocks: adding then takes a third of the time.

    Raises:
        VolumeError: the network gave scores that are NaN or infinite.
    """
    shared: dict[int, torch.Tensor] = {}
    for group in _groups(grid):
        buffer_size = [s.stop - s.start for s in group.box]
        # last channel: sums of the weights
        sums = _zeros(weights, channels + 1, buffer_size, channels_last=channels_last)
        _restore_shared_sums(grid, group, shared, sums)
        for starts in _batches(grid, group, batch):
            _add_windows(sums, score_windows(starts), starts, weights, group.box)
        _keep_shared_sums(grid, group, shared, sums)
        block = _finished_block(grid, group, sums)
        del sums  # or they would still be held while the next buffer is filled
        yield block
        del block  # likewise


def _zeros(
    like: torch.Tensor, channels: int, size: Sequence[int], *, channels_last: bool
) -> torch.Tensor:
    """Return zeros (channels, *size)."""
    if channels_last:
        return like.new_zeros((*size, channels)).movedim(-1, 0)
    return like.new_zeros((channels, *size))


def _groups(grid: WindowGrid) -> Iterator[_Group]:
    """Yield all groups; the last axis of `grid.order` varies fastest."""
    axes = range(len(grid.shape))
    counts = [range(len(grid.groups(axis))) for axis in grid.order]
    for numbers in product(*counts):
        number_of = dict(zip(grid.order, numbers, strict=True))
        index = tuple(number_of[axis] for axis in axes)
        yield _Group(
            index=index,
            box=tuple(_buffer_range(grid, axis, index[axis]) for axis in axes),
            finished_stop=tuple(_finished_stop(grid, axis, index[axis]) for axis in axes),
        )


def _batches(grid: WindowGrid, group: _Group, size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the first voxels of a group's windows, in the grid's order, up to `size` at a time."""
    members = [grid.members(axis)[group.index[axis]] for axis in grid.order]
    position_in_order = [grid.order.index(axis) for axis in range(len(grid.order))]
    starts: list[tuple[int, ...]] = []
    # all windows of a pair before the next member, as where the groups are smaller
    for cell in product(*members):
        for in_order in product(*cell):
            starts.append(tuple(in_order[i] for i in position_in_order))
    for first in range(0, len(starts), size):
        yield starts[first : first + size]


def _buffer_range(grid: WindowGrid, axis: int, number: int) -> slice:
    """Return the voxels along one axis that a group's windows touch, and the halo before them."""
    starts = grid.groups(axis)[number]
    first = max(0, starts[0] - HALO) if number else 0
    return slice(first, starts[-1] + grid.roi_size[axis])


def _finished_stop(grid: WindowGrid, axis: int, number: int) -> int:
    """Return the first voxel along one axis that windows of later groups touch as well."""
    groups = grid.groups(axis)
    return groups[number + 1][0] if number + 1 < len(groups) else grid.shape[axis]


def _largest_buffer_length(grid: WindowGrid, axis: int) -> int:
    """Return the length of the longest buffer along one axis, voxels."""
    ranges = [_buffer_range(grid, axis, number) for number in range(len(grid.groups(axis)))]
    return max(int(along.stop) - int(along.start) for along in ranges)


def _add_windows(
    sums: torch.Tensor,
    scores: Sequence[torch.Tensor | None],
    starts: Sequence[tuple[int, ...]],
    weights: torch.Tensor,
    box: Box,
) -> None:
    """Add the weighted scores of windows, and their weights, to the sums of the buffer."""
    for start, window_scores in zip(starts, scores, strict=True):
        if window_scores is None:
            continue
        start_in_buffer = [i - s.start for i, s in zip(start, box, strict=True)]
        window_sums = crop_box(sums, box_at(start_in_buffer, weights.shape))
        window_sums[:-1].addcmul_(window_scores.to(sums.device, torch.float32), weights)
        window_sums[-1] += weights


def _restore_shared_sums(
    grid: WindowGrid, group: _Group, shared: dict[int, torch.Tensor], sums: torch.Tensor
) -> None:
    """Copy into the buffer what earlier groups summed in voxels that this group touches too.

    The shared sums of different axes overlap in the buffer's corners. Those of inner axes were
    kept later, hence hold more windows, and are copied last.
    """
    for axis in grid.order:
        number = group.index[axis]
        if number == 0:
            continue
        length = _buffer_range(grid, axis, number - 1).stop - group.box[axis].start
        kept = shared[axis][_box_in_shared_sums(grid, axis, group.box)]
        sums.narrow(axis + 1, 0, length).copy_(kept.narrow(axis + 1, 0, length))


def _keep_shared_sums(
    grid: WindowGrid, group: _Group, shared: dict[int, torch.Tensor], sums: torch.Tensor
) -> None:
    """Keep, along each axis, the sums of the voxels that the next group touches too."""
    for axis in grid.order:
        if group.index[axis] + 1 == len(grid.groups(axis)):
            continue
        first = group.finished_stop[axis] - HALO - group.box[axis].start
        length = sums.shape[axis + 1] - first
        if axis not in shared:
            shape, last = _shared_shape(grid, axis), sums.stride(0) == 1
            shared[axis] = _zeros(sums, len(sums), shape, channels_last=last)
        kept = shared[axis][_box_in_shared_sums(grid, axis, group.box)]
        kept.narrow(axis + 1, 0, length).copy_(sums.narrow(axis + 1, first, length))


def _shared_shape(grid: WindowGrid, axis: int) -> list[int]:
    """Return the size (*spatial) of the sums that are kept between groups along one axis.

    Until the next group along this axis is visited, all groups along the inner axes are visited:
    the sums span the whole volume there. Along the outer axes they span one buffer.
    """
    shape = list(grid.shape)
    overlaps = []
    for group, next_group in pairwise(grid.groups(axis)):
        overlaps.append(group[-1] + grid.roi_size[axis] - next_group[0])
    shape[axis] = max(overlaps) + HALO
    for outer in grid.order[: grid.order.index(axis)]:
        shape[outer] = _largest_buffer_length(grid, outer)
    return shape


def _box_in_shared_sums(grid: WindowGrid, axis: int, box: Box) -> Box:
    """Return the box of one axis's shared sums (C, *spatial) that belongs to a group's buffer.

    Shared sums span the whole volume along the inner axes, so that the box is there the buffer's
    own. Along the outer axes they span a single buffer, and the box begins at 0.
    """
    inner = grid.order[grid.order.index(axis) + 1 :]
    shared_box = []
    for i, extent in enumerate(box):
        if i == axis:
            shared_box.append(slice(None))
        elif i in inner:
            shared_box.append(extent)
        else:
            shared_box.append(slice(0, extent.stop - extent.start))
    return (slice(None), *shared_box)


def _finished_block(grid: WindowGrid, group: _Group, sums: torch.Tensor) -> ScoreBlock:
    """Return the part of the buffer that no later window touches, divided by its weights."""
    start = tuple(s.start for s in group.box)
    size = [stop - first for stop, first in zip(group.finished_stop, start, strict=True)]
    finished = crop_box(sums, box_at([0] * len(size), size))
    scores, weight = finished[:-1], finished[-1]
    unscored = weight == 0
    if unscored.any():
        scores[0][unscored] = BACKGROUND_LOGIT
        weight[unscored] = 1
    scores /= weight
    if not torch.isfinite(scores.sum()):  # as all scores, and faster: a sum keeps NaN and infinity
        raise VolumeError(
            f"the network gave NaN or infinity in the block that starts at voxel {start} of its "
            "grid; try --precision float32, or check the bundle with `volseg bundle check`"
        )
    return ScoreBlock(start=start, scores=scores, shape=grid.shape)


def assemble(blocks: Iterator[ScoreBlock], image: torch.Tensor) -> torch.Tensor:
    """Return the scores of all blocks of a volume as one tensor (C, *spatial) float32.

    Voxels outside all blocks become background.

    Args:
        blocks: blocks of the volume, at least one.
        image: image that was segmented. If it is a MetaTensor, the result is a MetaTensor with the
            same metadata.
    """
    scores = None
    for block in blocks:
        if scores is None:
            scores = block.scores.new_zeros((len(block.scores), *block.shape))
            scores[0] = BACKGROUND_LOGIT
        crop_box(scores, box_at(block.start, block.scores.shape[1:])).copy_(block.scores)
        del block  # released before the next block is computed
    if scores is None:
        raise ValueError("expected at least one block of scores, got none")
    return MetaTensor(scores, meta=image.meta.copy()) if isinstance(image, MetaTensor) else scores
