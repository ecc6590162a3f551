"""From scores on the network's grid to a map of class numbers on another grid, block by block.

The result equals softmax → linear resampling → argmax; if logits are interpolated, linear
resampling → argmax. Classes are resampled one at a time and only
the running maximum is kept, so that no second array of classes × volume is needed. This is done in
small pieces of the volume, whose arrays stay in the processor's cache. In each piece, a class is
resampled only in the box in which it can be the maximum.

Regions may overlap. For them the result equals sigmoid → linear resampling → painting each region
where its probability is above 0.5, in their order; the map painted so far is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from pipeline.config import OutputKind
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.boxes import crop_box, widen_box
from pipeline.inference.probabilities import (
    class_probabilities,
    entropy,
    structure_probabilities,
)
from pipeline.transforms import AxisSampling, axis_samplings, parallel_axes, sample_axes
from pipeline.types import Affine, Box

SNAP = 0.001  # voxels; positions that are closer to a voxel's centre are moved onto it
# scores that are resampled together between grids with parallel axes: 2 MB, and some temporary
# arrays; in larger pieces more classes can be the maximum, smaller ones have too many borders
PIECE_VALUES = 2**19
# the same between other grids, where the boxes around small pieces overlap: 64 MB
SLAB_VALUES = 2**24
# voxels: blocks at the volume's edge extend this far beyond it, with the scores of the edge
FAR = 1e9
# the highest of N probabilities with the sum s is at least s/N, so a class that stays below it
# cannot be the maximum; this factor on s/N is a margin for rounding errors
LEAST_WINNING = 0.999
MAX_FRACTION = 255  # what a probability of 1 is in uint8

# scores (C, x, y, z), FieldSampler, soft=… → one value per voxel of the target
Reduction = Callable[..., Any]


class FieldSampler(Protocol):
    """Interpolates fields (x, y, z) of a block at the target's voxels that the block covers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the target's box of voxels."""

    def __call__(self, field: torch.Tensor) -> torch.Tensor:
        """Return the values of a field at all voxels of the target's box."""

    def near(self, field: torch.Tensor, box: Box) -> tuple[Box, torch.Tensor]:
        """Return the values of a field where voxels of a box of it count, and where that is.

        Args:
            field: (x, y, z) field.
            box: box of the field.

        Returns:
            A part of the target's box of voxels, and the values there. It holds at least the voxels
            next to which there is a voxel of the given box.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpolation:
    """How scores are interpolated on another grid.

    Attributes:
        of_logits: whether the logits are interpolated, instead of their softmax or sigmoid.
        nearest: axes of the scores along which the nearest voxel is taken, where the axes of the
            two grids are parallel.
    """

    of_logits: bool = False
    nearest: frozenset[int] = frozenset()


DEFAULT_INTERPOLATION = Interpolation()


def labels_of_blocks(
    blocks: Iterator[ScoreBlock],
    affine: Affine,
    target_affine: Affine,
    target_shape: Sequence[int],
    *,
    output: OutputKind = "softmax",
    interpolation: Interpolation = DEFAULT_INTERPOLATION,
    uncertainty: torch.Tensor | None = None,
    probabilities: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the number of the class at each voxel of another grid.

    The softmax of the logits is interpolated linearly; beyond the edge of its grid, its values at
    the edge are used. The class is the most probable one; of classes with the same probability, the
    one with the lowest number. Regions are painted instead, each where its sigmoid is above 0.5,
    those with higher numbers over those with lower ones.

    Args:
        blocks: blocks of one volume of logits (C, x, y, z), in any order; changed in place. The
            first channel is the background.
        affine: affine of the logits, voxel → world, mm.
        target_affine: affine of the other grid, voxel → world, mm.
        target_shape: size of the other grid, voxels.
        output: kind of the network's output, as in the spec.
        interpolation: what is interpolated, and how along each axis.
        uncertainty: (X', Y', Z') float32 tensor that is filled with the entropy of the class
            probabilities; None computes no entropy.
        probabilities: (N, X', Y', Z') uint8 tensor that is filled with the probabilities of the
            network's outputs, 255 for 1; N = C for a softmax, else C - 1. None computes none.
        index: (X', Y', Z') class numbers from other blocks, which are overwritten where these
            blocks are; None for no others.

    Returns:
        (X', Y', Z') class numbers, uint8 for up to 256 classes, else int32.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    axes = parallel_axes(matrix, target_shape)
    regions = output == "regions"
    resample: Callable[..., None] = partial(_resample_by_grid_sample, regions=regions)
    pieces = _slabs
    if axes is not None:
        resample = partial(_resample_by_axes, axes=axes, nearest=interpolation.nearest)
        pieces = _pieces
    for block in blocks:
        if index is None:
            dtype = _index_type(len(block.scores))
            index = torch.zeros(tuple(target_shape), dtype=dtype, device=block.scores.device)
        for piece in pieces(block):
            if uncertainty is not None:
                field = replace(piece, scores=entropy(piece.scores, regions=regions)[None])
                resample(uncertainty, field, matrix, soft=True, reduce=_first_field)
            if probabilities is not None:
                _resample_probabilities(probabilities, piece, matrix, output, resample)
            reduce = _painted_regions if regions else _winning_class
            resample(index, piece, matrix, soft=interpolation.of_logits, reduce=reduce)
            del piece
        del block  # or it would be held while the next one is computed
    if index is None:
        raise ValueError("expected at least one block of scores, got none")
    return index


def _resample_probabilities(
    target: torch.Tensor,
    piece: ScoreBlock,
    matrix: Affine,
    output: OutputKind,
    resample: Callable[..., None],
) -> None:
    """Write a block's part of the probabilities, (N, X', Y', Z') uint8, in place."""
    if output == "softmax":
        fields = class_probabilities(piece.scores, regions=False)
    else:
        fields = structure_probabilities(piece.scores)
    for channel, field in zip(target, fields, strict=True):
        one = replace(piece, scores=field[None])
        resample(channel, one, matrix, soft=True, reduce=_first_fraction)


def _index_type(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int32


def _pieces(block: ScoreBlock) -> Iterator[ScoreBlock]:
    """Cut a block into cubes of about `PIECE_VALUES` scores.

    As blocks do, each piece repeats the last voxels of those before it.
    """
    # on a GPU, many small computations take longer than a few large ones
    values = PIECE_VALUES if block.scores.device.type == "cpu" else SLAB_VALUES
    edge = max(1, round((values / len(block.scores)) ** (1 / 3)))
    steps = []
    for size in block.scores.shape[1:]:
        count = max(1, round((size - 1) / edge))
        steps.append(max(1, -(-(size - 1) // count)))
    yield from _cut(block, steps)


def _slabs(block: ScoreBlock) -> Iterator[ScoreBlock]:
    """Cut a block along its first axis into pieces of at most about `SLAB_VALUES` scores."""
    step = max(1, SLAB_VALUES // max(1, block.scores[:, 0].numel()))
    yield from _cut(block, [step, *block.scores.shape[2:]])


def _cut(block: ScoreBlock, steps: Sequence[int]) -> Iterator[ScoreBlock]:
    """Cut a block into pieces of a size, and one voxel more at the end of each axis.

    Args:
        block: block of scores.
        steps: size of a piece along each axis, without the last voxel, voxels.
    """
    sizes = block.scores.shape[1:]
    firsts = [range(0, max(1, size - 1), step) for size, step in zip(sizes, steps, strict=True)]
    for first in product(*firsts):
        along = zip(first, sizes, steps, strict=True)
        box = [slice(i, min(n, i + step + 1)) for i, n, step in along]
        start = tuple(s + i for s, i in zip(block.start, first, strict=True))
        yield ScoreBlock(start=start, scores=crop_box(block.scores, box), shape=block.shape)


def _resample_by_axes(
    target: torch.Tensor,
    block: ScoreBlock,
    matrix: Affine,
    *,
    axes: Sequence[int],
    nearest: Container[int],
    soft: bool,
    reduce: Reduction,
) -> None:
    """Write a block's part of the target, one axis after the other, if the axes are parallel.

    Args:
        target: (X', Y', Z') values on the target grid, changed in place.
        block: block of scores.
        matrix: voxel of the target → voxel of the volume of scores.
        axes: axis of the scores along which each target axis runs, from `parallel_axes`.
        nearest: axes of the scores along which the nearest voxel is taken.
        soft: whether the scores are resampled as they are, instead of their softmax.
        reduce: function that gives the values from the scores.
    """
    samplings = [
        sampling.to_nearest() if sampling.source in nearest else sampling
        for sampling in axis_samplings(matrix, axes, target.shape, block.shape, snap=SNAP)
    ]
    sizes = block.scores.shape[1:]
    part, along = [], []
    for sampling in samplings:
        axis = sampling.source
        voxels, own = sampling.inside(block.start[axis], sizes[axis], block.shape[axis])
        part.append(voxels)
        along.append(own)
    if any(voxels.start == voxels.stop for voxels in part):
        return
    on_voxels = not any(sampling.weight.any() for sampling in along)
    # if all positions are on voxel centres, nothing is interpolated, and the maximum is the same
    # with and without a softmax
    target[tuple(part)] = reduce(block.scores, _AxesSampler(along), soft=soft or on_voxels)


@dataclass(frozen=True, slots=True)
class _AxesSampler:
    """A `FieldSampler` between grids with parallel axes.

    Attributes:
        along: sampling of each target axis, in voxels of the block.
    """

    along: Sequence[AxisSampling]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(sampling.low) for sampling in self.along)

    def __call__(self, field: torch.Tensor) -> torch.Tensor:
        return sample_axes(field, self.along)

    def near(self, field: torch.Tensor, box: Box) -> tuple[Box, torch.Tensor]:
        wide = list(widen_box(box, field.shape))
        part, along = [], []
        for sampling in self.along:
            axis = sampling.source
            extent = wide[axis]
            voxels, own = sampling.inside(
                extent.start, extent.stop - extent.start, field.shape[axis]
            )
            part.append(voxels)
            along.append(own)
        return tuple(part), sample_axes(field[tuple(wide)], along)


def _first_field(scores: torch.Tensor, sample: FieldSampler, *, soft: bool) -> torch.Tensor:
    """Return the first channel of the scores, resampled: a `Reduction` for a single field."""
    return sample(scores[0]).cpu()


def _first_fraction(scores: torch.Tensor, sample: FieldSampler, *, soft: bool) -> torch.Tensor:
    """Return the first channel of probabilities, resampled, as uint8: a `Reduction`."""
    fractions = sample(scores[0]).clamp_(0, 1) * MAX_FRACTION
    return fractions.round_().to(torch.uint8).cpu()


def _painted_regions(
    scores: torch.Tensor, sample: FieldSampler, *, soft: bool
) -> torch.Tensor | int:
    """Return the number of the last region whose probability is above 0.5, 0 without one.

    It is a `Reduction`; its arguments and result are those of `_winning_class`, but scores that are
    resampled as they are stand for a probability above 0.5 where they are above the first channel.
    """
    painted: torch.Tensor | int = 0
    dtype = _index_type(len(scores))
    for number in range(1, len(scores)):
        field = scores[number] - scores[0]
        low, high = (float(value) for value in field.aminmax())
        if high <= 0:  # nowhere
            continue
        if low > 0:  # everywhere, over all regions before it
            painted = number
            continue
        inside = sample(field if soft else torch.sigmoid(field) - 0.5) > 0
        if isinstance(painted, int):
            painted = torch.full(inside.shape, painted, dtype=dtype, device=inside.device)
        painted.masked_fill_(inside, number)
    return painted


def _winning_class(scores: torch.Tensor, sample: FieldSampler, *, soft: bool) -> torch.Tensor | int:
    """Return the number of the class with the highest resampled score: a `Reduction`.

    Args:
        scores: (C, x, y, z) scores of a block.
        sample: function that resamples one channel of the scores.
        soft: whether the scores are resampled as they are, instead of their softmax.

    Returns:
        Class numbers on the target grid, or a single number if they are all the same.
    """
    scores = scores.contiguous()
    low, high = scores.flatten(1).aminmax(dim=1)
    # a class whose highest score is below the lowest score of another cannot be the maximum
    numbers = (high >= low.max()).nonzero().flatten().tolist()
    if len(numbers) == 1:
        return int(numbers[0])
    if soft:
        whole = tuple(slice(0, n) for n in scores.shape[1:])
        return _running_maximum(scores, dict.fromkeys(numbers, whole), sample)
    if len(scores) == 2:
        return (sample(torch.sigmoid(scores[1] - scores[0])) > 0.5).to(torch.uint8)
    probabilities = torch.softmax(scores, dim=0)
    boxes = _possible_boxes(probabilities, numbers)
    if len(boxes) == 1:
        return next(iter(boxes))
    return _running_maximum(probabilities, boxes, sample)


def _possible_boxes(probabilities: torch.Tensor, numbers: Sequence[int]) -> dict[int, Box]:
    """Return the box in which each class can have the highest interpolated probability.

    Classes that can have it nowhere are left out. The lowest sum of the probabilities of N classes
    at a voxel is a lower bound of their sum wherever they are interpolated.

    Args:
        probabilities: (C, x, y, z) probabilities of all classes.
        numbers: numbers of the classes that may have it, ascending.
    """
    highest = probabilities.flatten(1).amax(dim=1)[numbers].tolist()
    higher = LEAST_WINNING / len(probabilities)
    threshold, possible = 0.0, list(numbers)
    while higher > threshold:
        threshold = higher
        of_all = zip(numbers, highest, strict=True)
        possible = [number for number, value in of_all if value >= threshold]
        total = float(probabilities[possible].sum(dim=0).min())
        higher = LEAST_WINNING * total / len(possible)
    boxes = {}
    for number in possible:
        is_likely = (probabilities[number] >= threshold).numpy(force=True)
        boxes[number] = ndimage.find_objects(is_likely.view(np.uint8))[0]
    return boxes


def _running_maximum(
    scores: torch.Tensor, boxes: Mapping[int, Box], sample: FieldSampler
) -> torch.Tensor:
    """Return the number of the class with the highest interpolated score.

    Args:
        scores: (C, x, y, z) scores.
        boxes: number of a class → box in which it can have the highest score, ascending.
        sample: interpolates one class.
    """
    best = scores.new_full(sample.shape, -torch.inf)
    index = torch.zeros(sample.shape, dtype=_index_type(len(scores)), device=scores.device)
    for number, box in boxes.items():
        part, values = sample.near(scores[number], box)
        so_far = best[part]
        index[part].masked_fill_(values > so_far, number)
        torch.maximum(so_far, values, out=so_far)
    return index


def _resample_by_grid_sample(
    target: torch.Tensor,
    block: ScoreBlock,
    matrix: Affine,
    *,
    soft: bool,
    reduce: Reduction,
    regions: bool = False,
) -> None:
    """Write a block's part of the target by trilinear interpolation, whatever the two affines.

    The arguments are those of `_resample_by_axes`, and whether the structures are regions.
    """
    if not soft:
        if regions:  # the background's is 0.5: a region is painted where it is above that
            scores = torch.sigmoid(block.scores - block.scores[:1])
        else:
            scores = torch.softmax(block.scores, dim=0)
        block = replace(block, scores=scores)
    area = _target_box(target.shape, block, matrix)
    plane = (area[1].stop - area[1].start) * (area[2].stop - area[2].start)
    thickness = max(1, SLAB_VALUES // max(1, len(block.scores) * plane))
    for first in range(area[0].start, area[0].stop, thickness):
        part = (slice(first, min(first + thickness, area[0].stop)), *area[1:])
        grid, inside = _sample_positions(part, block, matrix)
        if not inside.any():
            continue
        values = reduce(block.scores, _GridSampler(grid), soft=True)
        values = torch.as_tensor(values, dtype=target.dtype, device=target.device)
        target[part] = torch.where(inside.to(target.device), values, target[part])


@dataclass(frozen=True, slots=True)
class _GridSampler:
    """A `FieldSampler` for any two grids.

    Attributes:
        grid: (X, Y, Z, 3) positions in `grid_sample`'s format.
    """

    grid: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.grid.shape[:3])

    def __call__(self, field: torch.Tensor) -> torch.Tensor:
        return _sample_field(field, self.grid)

    def near(self, field: torch.Tensor, box: Box) -> tuple[Box, torch.Tensor]:
        return tuple(slice(0, n) for n in self.shape), self(field)


def _sample_field(field: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return a field (x, y, z) interpolated at positions (X, Y, Z, 3) in `grid_sample`'s format."""
    values = functional.grid_sample(
        field[None, None], grid.to(field)[None], padding_mode="border", align_corners=True
    )
    return values[0, 0]


def _target_box(
    target_shape: Sequence[int], block: ScoreBlock, matrix: Affine
) -> tuple[slice, ...]:
    """Return the box of target voxels that may lie in a block.

    Blocks at the edge of the volume of scores include all voxels beyond it.
    """
    sizes = block.scores.shape[1:]
    low = [-FAR if s == 0 else s - 1 for s in block.start]
    ends = zip(block.start, sizes, block.shape, strict=True)
    high = [FAR if s + n == whole else s + n for s, n, whole in ends]
    corners = np.ones((8, 4))
    for row, bits in enumerate(np.ndindex(2, 2, 2)):
        corners[row, :3] = [high[axis] if bit else low[axis] for axis, bit in enumerate(bits)]
    mapped = (corners @ np.linalg.inv(matrix).T)[:, :3]
    first, last = np.floor(mapped.min(axis=0)), np.ceil(mapped.max(axis=0)) + 1
    box = []
    for a, b, n in zip(first, last, target_shape, strict=True):
        box.append(slice(int(max(0, a)), int(max(0, min(b, n)))))
    return tuple(box)


def _sample_positions(
    part: tuple[slice, ...], block: ScoreBlock, matrix: Affine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of target voxels in a block, and which of them lie in it.

    Args:
        part: box of target voxels, (X, Y, Z).
        block: block of scores.
        matrix: voxel of the target → voxel of the volume of scores.

    Returns:
        Positions (X, Y, Z, 3) as `grid_sample` takes them (-1 to 1, last axis first), and a mask
        (X, Y, Z). A voxel that several blocks share is in the mask of the last one only.
    """
    ranges = [torch.arange(s.start, s.stop, dtype=torch.float64) for s in part]
    x, y, z = torch.meshgrid(*ranges, indexing="ij")
    grid, inside = [], torch.ones(x.shape, dtype=torch.bool)
    for axis in range(3):
        a, b, c, offset = (float(value) for value in matrix[axis])
        position = (x * a + y * b + z * c + offset).clamp(0, block.shape[axis] - 1)
        start, size = block.start[axis], block.scores.shape[axis + 1]
        # two blocks share one voxel, which belongs to the later block
        if start:
            inside &= position >= start
        if start + size < block.shape[axis]:
            inside &= position < start + size - 1
        grid.append((2 * (position - start) / max(1, size - 1) - 1).float())
    return torch.stack(grid[::-1], dim=-1), inside
