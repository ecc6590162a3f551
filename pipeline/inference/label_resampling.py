"""Scores on the network's grid to class numbers on another grid, block by block.

Scores are interpolated one class at a time and only the running maximum is kept, so that no second
array of classes × volume is made. The result equals softmax → linear resampling → argmax. A class
that cannot win anywhere in a block is left out of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.probabilities import entropy
from pipeline.transforms import axis_samplings, parallel_axes, sample_axes
from pipeline.types import Affine, Logits

SNAP = 0.001  # voxels by which a position may miss a voxel centre and still count as on it
# scores that are resampled together: 64 MB, and as much again while they are
PIECE_VALUES = 2**24
# voxels; where a block ends at the volume's edge, the scores of the edge hold beyond it
FAR = 1e9
# a class whose probability stays below 1/classes in a block cannot win; less a margin for rounding
LEAST_WINNING = 0.999

FieldSampler = Callable[[torch.Tensor], torch.Tensor]  # (x, y, z) → its values on the target grid
Reduction = Callable[..., Any]  # scores, a FieldSampler, soft=… → values on the target grid


def labels_on_grid(
    scores: Logits, affine: Affine, target_affine: Affine, target_shape: Sequence[int]
) -> torch.Tensor:
    """Return the class with the highest linearly interpolated score at each voxel of another grid.

    Of equal scores the first class wins.

    Args:
        scores: (C, X, Y, Z) on the grid of `affine`; beyond its edge the edge's scores hold.
        affine: voxel → world of the scores, mm.
        target_affine: voxel → world of the target grid.
        target_shape: size of the target grid, voxels.

    Returns:
        (X', Y', Z') class numbers, uint8 for up to 256 classes, else int32.
    """
    block = ScoreBlock(start=(0, 0, 0), scores=scores, shape=tuple(scores.shape[1:]))
    return labels_of_blocks(iter([block]), affine, target_affine, target_shape, soft=True)


def labels_of_blocks(
    blocks: Iterator[ScoreBlock],
    affine: Affine,
    target_affine: Affine,
    target_shape: Sequence[int],
    *,
    soft: bool = False,
    uncertainty: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the class numbers that blocks of one volume give together on another grid.

    Args:
        blocks: of scores (C, x, y, z), in any order; changed in place.
        affine: voxel → world of the scores, mm.
        target_affine: voxel → world of the target grid.
        target_shape: size of the target grid, voxels.
        soft: whether scores are compared as they are, instead of after a softmax.
        uncertainty: (X', Y', Z') float32, filled with the entropy of the scores where given.

    Returns:
        (X', Y', Z') class numbers, uint8 for up to 256 classes, else int32.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    axes = parallel_axes(matrix, target_shape)
    resample: Callable[..., None] = _resample_by_grid_sample
    if axes is not None:
        resample = partial(_resample_by_axes, axes=axes)
    index = None
    for block in blocks:
        if index is None:
            dtype = _index_type(len(block.scores))
            index = torch.zeros(tuple(target_shape), dtype=dtype, device=block.scores.device)
        for piece in _pieces(block):
            if uncertainty is not None:
                field = ScoreBlock(
                    start=piece.start, scores=entropy(piece.scores)[None], shape=piece.shape
                )
                resample(uncertainty, field, matrix, soft=True, reduce=_first_field)
            resample(index, piece, matrix, soft=soft, reduce=_winning_class)
            del piece
        del block  # or it would be held while the next one is computed
    if index is None:
        raise ValueError("expected at least one block of scores, got none")
    return index


def _index_type(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int32


def _pieces(block: ScoreBlock) -> Iterator[ScoreBlock]:
    """Cut a block along its first axis; each piece repeats the last voxel of the one before."""
    rows = block.scores.shape[1]
    step = max(1, PIECE_VALUES // max(1, block.scores[:, 0].numel()))
    for first in range(0, max(1, rows - 1), step):
        last = min(rows, first + step + 1)
        start = (block.start[0] + first, *block.start[1:])
        yield ScoreBlock(start=start, scores=block.scores[:, first:last], shape=block.shape)


def _resample_by_axes(
    target: torch.Tensor,
    block: ScoreBlock,
    matrix: Affine,
    *,
    axes: Sequence[int],
    soft: bool,
    reduce: Reduction,
) -> None:
    """Fill a block's part of the target, whose axes are parallel to the block's."""
    samplings = axis_samplings(matrix, axes, target.shape, block.shape, snap=SNAP)
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
    # without interpolation the softmax changes no order, so the plain scores do
    target[tuple(part)] = reduce(
        block.scores, lambda field: sample_axes(field, along), soft=soft or on_voxels
    )


def _first_field(scores: torch.Tensor, sample: FieldSampler, *, soft: bool) -> torch.Tensor:
    """Return the first field itself, sampled."""
    return sample(scores[0]).cpu()


def _winning_class(scores: torch.Tensor, sample: FieldSampler, *, soft: bool) -> torch.Tensor | int:
    """Return the class with the highest sampled score; one number where it is the same everywhere.

    Args:
        scores: (C, x, y, z).
        sample: samples one field of the scores on the target grid.
        soft: whether scores are compared as they are, instead of after a softmax.
    """
    # a class that stays below another throughout the block cannot win
    possible = scores.amax((1, 2, 3)) >= scores.amin((1, 2, 3)).max()
    if not soft and possible.sum() > 1:
        if len(scores) == 2:
            return (sample(torch.sigmoid(scores[1] - scores[0])) > 0.5).to(torch.uint8)
        scores = torch.softmax(scores, dim=0)
        possible &= scores.amax((1, 2, 3)) >= LEAST_WINNING / len(scores)
    numbers = possible.nonzero().flatten().tolist()
    if len(numbers) == 1:
        return int(numbers[0])
    best = sample(scores[numbers[0]]).clone()
    dtype = _index_type(len(scores))
    index = torch.full(best.shape, numbers[0], dtype=dtype, device=best.device)
    for number in numbers[1:]:
        field = sample(scores[number])
        index.masked_fill_(field > best, number)
        torch.maximum(best, field, out=best)
    return index


def _resample_by_grid_sample(
    target: torch.Tensor, block: ScoreBlock, matrix: Affine, *, soft: bool, reduce: Reduction
) -> None:
    """Fill a block's part of the target by trilinear interpolation, for any affine between them."""
    if not soft:
        scores = torch.softmax(block.scores, dim=0)
        block = ScoreBlock(start=block.start, scores=scores, shape=block.shape)
    area = _target_box(target.shape, block, matrix)
    plane = (area[1].stop - area[1].start) * (area[2].stop - area[2].start)
    thickness = max(1, PIECE_VALUES // max(1, len(block.scores) * plane))
    for first in range(area[0].start, area[0].stop, thickness):
        part = (slice(first, min(first + thickness, area[0].stop)), *area[1:])
        grid, inside = _sample_positions(part, block, matrix)
        if not inside.any():
            continue
        values = reduce(block.scores, partial(_sample_field, grid=grid), soft=True)
        values = torch.as_tensor(values, dtype=target.dtype, device=target.device)
        target[part] = torch.where(inside.to(target.device), values, target[part])


def _sample_field(field: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Interpolate a field (x, y, z) linearly at positions (X, Y, Z, 3) in `grid_sample`'s units."""
    values = functional.grid_sample(
        field[None, None], grid.to(field)[None], padding_mode="border", align_corners=True
    )
    return values[0, 0]


def _target_box(
    target_shape: Sequence[int], block: ScoreBlock, matrix: Affine
) -> tuple[slice, ...]:
    """Return the box of target voxels in a block; the outermost blocks reach to infinity."""
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
    """Return where target voxels lie in a block, and which of them this block decides.

    Returns:
        positions (X, Y, Z, 3) in `grid_sample`'s units and order, and a mask (X, Y, Z).
    """
    ranges = [torch.arange(s.start, s.stop, dtype=torch.float64) for s in part]
    x, y, z = torch.meshgrid(*ranges, indexing="ij")
    grid, inside = [], torch.ones(x.shape, dtype=torch.bool)
    for axis in range(3):
        a, b, c, offset = (float(value) for value in matrix[axis])
        position = (x * a + y * b + z * c + offset).clamp(0, block.shape[axis] - 1)
        start, size = block.start[axis], block.scores.shape[axis + 1]
        # the voxel that two blocks share belongs to the later one
        if start:
            inside &= position >= start
        if start + size < block.shape[axis]:
            inside &= position < start + size - 1
        grid.append((2 * (position - start) / max(1, size - 1) - 1).float())
    return torch.stack(grid[::-1], dim=-1), inside
