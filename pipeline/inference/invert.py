"""From the network's logits to a label map on the file's own grid, block by block as they come.

Soft scores are interpolated one class at a time and the running maximum kept, so that no second C × volume array is made.
The result is that of softmax → linear resampling → argmax. Classes that cannot win anywhere in a block are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch.nn import functional

from pipeline.config import Spec
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.connected_components import keep_components
from pipeline.inference.probabilities import collect_probabilities, entropy
from pipeline.inference.refinement import refine_borders
from pipeline.transforms import IMAGE, SCAN, axis_samplings, parallel_axes, sample_axes
from pipeline.types import Affine, LabelMap, Logits

PRED = "pred"
ON_FILE_GRID = "on_file_grid"  # key of `meta`: the tensor holds class numbers on the file's grid
SNAP = 0.001  # voxels by which a position may miss a voxel and still count as on it
PIECE_VALUES = (
    2**24
)  # of scores that are looked at together: 64 MB, and as much again while they are
FAR = 1e9  # voxels; where a block ends at the volume's edge, the nearest voxel's scores hold beyond it
SOFT_MM3, UNCERTAINTY, PROBABILITIES = "soft_mm3", "uncertainty", "probabilities"  # keys of `meta`
Slices = tuple[slice, ...]
Finish = Callable[[Iterator[ScoreBlock], MetaTensor], MetaTensor]
Decide = Callable[
    ..., Any
]  # scores, a way to sample one field of them, soft=… → values on the target grid


def inversion(spec: Spec, finish: Finish | None = None) -> MapTransform:
    """The step after the network: `pred` from logits to output values on the file's grid.

    Args:
        spec: the output values.
        finish: `labels_of_blocks`, perhaps with some of its options, for inferers that give whole logits.
    """
    return InvertLabelsd(spec, finish or labels_of_blocks)


class InvertLabelsd(MapTransform):
    """Turns `pred` into (1, X', Y', Z') output values on the grid of the file that `image` came from.

    It takes logits (classes, X, Y, Z) on the network's grid, from any inferer, or what `labels_of_blocks` made of them. The
    type is the smallest unsigned one that holds the spec's labels.
    """

    def __init__(self, spec: Spec, finish: Finish) -> None:
        super().__init__(PRED)
        self.finish = finish
        values = list(spec.labels.values())
        self.spec = spec
        self.values: LabelMap = np.array(values, dtype=np.min_scalar_type(max(values)))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        image, pred = case[IMAGE], case[PRED]
        if not (isinstance(pred, MetaTensor) and pred.meta.get(ON_FILE_GRID)):
            logits = pred.as_tensor() if isinstance(pred, MetaTensor) else pred
            whole = ScoreBlock(
                start=(0, 0, 0), scores=logits.float(), shape=tuple(logits.shape[1:])
            )
            pred = self.finish(iter([whole]), image)
        index = keep_components(self._refined(pred, case), image, self.spec).cpu().numpy()
        plain = np.array_equal(self.values, np.arange(len(self.values)))
        labels = torch.from_numpy(
            index if plain and index.dtype == self.values.dtype else self.values[index]
        )
        case[PRED] = MetaTensor(labels, meta={**image.meta, **pred.meta, "affine": pred.affine})
        return case

    def _refined(self, pred: MetaTensor, case: Mapping[Hashable, Any]) -> torch.Tensor:
        """Class numbers, settled by the scan where that was kept."""
        index: torch.Tensor = pred.as_tensor()
        likely = pred.meta.pop(PROBABILITIES, None)
        if likely is None or SCAN not in case:
            return index
        own, target = (
            np.asarray(affine, dtype=np.float64) for affine in (case[IMAGE].affine, pred.affine)
        )
        return refine_borders(index[0], target, case[SCAN], likely, own, self.spec)[None]


def labels_of_blocks(
    blocks: Iterator[ScoreBlock],
    image: MetaTensor,
    *,
    soft_volumes: bool = False,
    uncertainty: bool = False,
    contested: Sequence[int] = (),
) -> MetaTensor:
    """Class numbers on the grid of the file that an image came from, made of logits while they come.

    Args:
        blocks: of logits (C, x, y, z), in any order; changed in place.
        image: (C, X, Y, Z) on the network's grid, with `labels_affine` and `labels_shape` in its `meta`.
        soft_volumes: whether its `meta` gets `soft_mm3`, each class's sum of probabilities times the volume of a voxel.
        contested: classes whose probabilities its `meta` gets as `probabilities`, (classes, X, Y, Z) on the image's grid.
        uncertainty: whether its `meta` gets `uncertainty`, (X', Y', Z') float32: the entropy of the scores, 0 to 1.

    Returns:
        (1, X', Y', Z'), uint8 for up to 256 classes, else int32.
    """
    own, affine = (
        np.asarray(a, dtype=np.float64) for a in (image.affine, image.meta["labels_affine"])
    )
    shape = [int(n) for n in image.meta["labels_shape"]]
    unsure = torch.zeros(shape) if uncertainty else None
    totals: list[torch.Tensor] = []
    store: list[torch.Tensor] = []
    if soft_volumes or contested:
        blocks = collect_probabilities(blocks, contested, totals, store)
    index = _fill(blocks, own, affine, shape, soft=False, unsure=unsure)
    keys = ("warnings", "filename_or_obj")
    meta: dict[str, Any] = {ON_FILE_GRID: True} | {
        key: image.meta[key] for key in keys if key in image.meta
    }
    if soft_volumes:
        meta[SOFT_MM3] = (
            torch.stack(totals).sum(dim=0) * abs(float(np.linalg.det(own[:3, :3])))
        ).tolist()
    if contested:
        meta[PROBABILITIES] = store[0]
    if unsure is not None:
        meta[UNCERTAINTY] = unsure.numpy()
    return MetaTensor(index[None], affine=torch.as_tensor(affine), meta=meta)


def labels_on_grid(
    scores: Logits, affine: Affine, target_affine: Affine, target_shape: Sequence[int]
) -> torch.Tensor:
    """The class with the highest linearly interpolated score at each voxel of another grid; the first of equals.

    Args:
        scores: (C, X, Y, Z) on the grid of `affine`; beyond its edge the nearest voxel's scores hold.
        affine: voxel → world of the scores, mm.
        target_affine: voxel → world of the grid asked for.
        target_shape: its size, voxels.

    Returns:
        (X', Y', Z') class numbers, uint8 for up to 256 classes, else int32.
    """
    whole = ScoreBlock(start=(0, 0, 0), scores=scores, shape=tuple(scores.shape[1:]))
    return _fill(iter([whole]), affine, target_affine, target_shape, soft=True)


def _fill(
    blocks: Iterator[ScoreBlock],
    affine: Affine,
    target_affine: Affine,
    target_shape: Sequence[int],
    *,
    soft: bool,
    unsure: torch.Tensor | None = None,
) -> torch.Tensor:
    """The label map that blocks give together; `soft` scores are compared as they are, others after a softmax.

    `unsure`, where it is given, is filled with the entropy of the scores.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    axes = parallel_axes(matrix, target_shape)
    index = None
    for block in blocks:
        if index is None:
            dtype = torch.uint8 if len(block.scores) <= 256 else torch.int32
            index = torch.zeros(tuple(target_shape), dtype=dtype, device=block.scores.device)
        for piece in _pieces(block):
            fill = _fill_any if axes is None else partial(_fill_parallel, axes=axes)
            if unsure is not None:
                field = ScoreBlock(
                    start=piece.start, scores=entropy(piece.scores)[None], shape=piece.shape
                )
                fill(unsure, field, matrix, soft=True, decide=_only)
            fill(index, piece, matrix, soft=soft, decide=_winner)
            del piece
        del block  # the next one is made meanwhile
    assert index is not None
    return index


def _pieces(block: ScoreBlock) -> Iterator[ScoreBlock]:
    """A block in thinner ones along its first axis, each repeating the last voxel of the one before."""
    rows = block.scores.shape[1]
    step = max(1, PIECE_VALUES // max(1, block.scores[:, 0].numel()))
    for first in range(0, max(1, rows - 1), step):
        last = min(rows, first + step + 1)
        start = (block.start[0] + first, *block.start[1:])
        yield ScoreBlock(start=start, scores=block.scores[:, first:last], shape=block.shape)


def _fill_parallel(
    index: torch.Tensor,
    block: ScoreBlock,
    matrix: Affine,
    *,
    axes: Sequence[int],
    soft: bool,
    decide: Decide,
) -> None:
    """A block's part of the result by interpolation one axis at a time: what is left of it where axes are parallel."""
    along = axis_samplings(matrix, axes, index.shape, block.shape, snap=SNAP)
    sizes = block.scores.shape[1:]
    parts = [
        line.inside(block.start[line.source], sizes[line.source], block.shape[line.source])
        for line in along
    ]
    part, own = tuple(p for p, _ in parts), [line for _, line in parts]
    if any(p.start == p.stop for p in part):
        return
    exact = not any(line.weight.any() for line in own)
    index[part] = decide(block.scores, lambda field: sample_axes(field, own), soft=soft or exact)


def _only(
    scores: torch.Tensor, sample: Callable[[torch.Tensor], torch.Tensor], *, soft: bool
) -> torch.Tensor:
    """The first field itself, sampled."""
    return sample(scores[0]).cpu()


def _winner(
    scores: torch.Tensor, sample: Callable[[torch.Tensor], torch.Tensor], *, soft: bool
) -> torch.Tensor | int:
    """The number of the class whose sampled score is highest, after a softmax unless `soft`; one number where it always is.

    A class that stays below another throughout the block cannot win, nor one whose probability stays below 1/classes.
    """
    able = scores.amax((1, 2, 3)) >= scores.amin((1, 2, 3)).max()
    if not soft and able.sum() > 1:
        if len(scores) == 2:
            return (sample(torch.sigmoid(scores[1] - scores[0])) > 0.5).to(torch.uint8)
        scores = torch.softmax(scores, dim=0)
        able &= scores.amax((1, 2, 3)) >= 0.999 / len(scores)
    numbers = able.nonzero().flatten().tolist()
    if len(numbers) == 1:
        return int(numbers[0])
    best = sample(scores[numbers[0]]).clone()
    index = torch.full(
        best.shape,
        numbers[0],
        dtype=torch.uint8 if len(scores) <= 256 else torch.int32,
        device=best.device,
    )
    for number in numbers[1:]:
        field = sample(scores[number])
        index.masked_fill_(field > best, number)
        torch.maximum(best, field, out=best)
    return index


def _fill_any(
    index: torch.Tensor, block: ScoreBlock, matrix: Affine, *, soft: bool, decide: Decide
) -> None:
    """A block's part of the result by trilinear interpolation at any affine map, some target planes at a time."""
    if not soft:
        block = ScoreBlock(
            start=block.start, scores=torch.softmax(block.scores, dim=0), shape=block.shape
        )
    area = _target_box(index.shape, block, matrix)
    thickness = max(
        1,
        PIECE_VALUES
        // max(
            1, len(block.scores) * (area[1].stop - area[1].start) * (area[2].stop - area[2].start)
        ),
    )
    for first in range(area[0].start, area[0].stop, thickness):
        part = (slice(first, min(first + thickness, area[0].stop)), *area[1:])
        grid, mine = _positions(part, block, matrix)
        if not mine.any():
            continue
        won = decide(block.scores, partial(_at, grid=grid), soft=True)
        index[part] = torch.where(
            mine.to(index.device),
            torch.as_tensor(won, dtype=index.dtype, device=index.device),
            index[part],
        )


def _at(field: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """A field (x, y, z), linearly interpolated at the places that a grid (X, Y, Z, 3) names as `grid_sample` wants them."""
    values = functional.grid_sample(
        field[None, None], grid.to(field)[None], padding_mode="border", align_corners=True
    )
    return values[0, 0]


def _target_box(target_shape: Sequence[int], block: ScoreBlock, matrix: Affine) -> Slices:
    """The box of target voxels that may lie in a block; beyond the volume's edge, its outermost blocks decide."""
    sizes = block.scores.shape[1:]
    low = [-FAR if s == 0 else s - 1 for s in block.start]
    high = [
        FAR if s + n == w else s + n
        for s, n, w in zip(block.start, sizes, block.shape, strict=True)
    ]
    corners = np.array(
        [
            [(low, high)[bit][axis] for axis, bit in enumerate(bits)] + [1.0]
            for bits in np.ndindex(2, 2, 2)
        ]
    )
    mapped = (corners @ np.linalg.inv(matrix).T)[:, :3]
    first, last = np.floor(mapped.min(axis=0)), np.ceil(mapped.max(axis=0)) + 1
    return tuple(
        slice(int(max(0, a)), int(max(0, min(b, n))))
        for a, b, n in zip(first, last, target_shape, strict=True)
    )


def _positions(
    part: Slices, block: ScoreBlock, matrix: Affine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of target voxels: their places in a block, as `grid_sample` wants them, and whether it is this block that decides."""
    voxels = torch.meshgrid(
        *(torch.arange(s.start, s.stop, dtype=torch.float64) for s in part), indexing="ij"
    )
    grid, mine = [], torch.ones(voxels[0].shape, dtype=torch.bool)
    for axis in range(3):
        row = [float(value) for value in matrix[axis]]
        position = (voxels[0] * row[0] + voxels[1] * row[1] + voxels[2] * row[2] + row[3]).clamp(
            0, block.shape[axis] - 1
        )
        start, size = block.start[axis], block.scores.shape[axis + 1]
        if start:
            mine &= position >= start
        if start + size < block.shape[axis]:
            mine &= position < start + size - 1
        grid.append((2 * (position - start) / max(1, size - 1) - 1).float())
    return torch.stack(grid[::-1], dim=-1), mine
