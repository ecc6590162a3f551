"""Networks that return several tensors, in a sequence, a mapping or nested ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from pipeline.inference.aggregator import WindowGrid
from pipeline.inference.boxes import box_at, crop_box


def aggregate_outputs(
    grid: WindowGrid,
    score_windows: Callable[[Sequence[tuple[int, ...]]], Sequence[Any]],
    example: Any,
    importance_map: Callable[[tuple[int, ...]], torch.Tensor],
) -> Any:
    """Return the scores of a volume, for a network of several outputs.

    Unlike `aggregate`, this function holds the sums of the whole volume.

    Args:
        grid: positions of the windows; groups do not matter.
        score_windows: function that takes the first voxels of windows and returns the outputs of
            each window, tensors (C, *size) in the network's structure.
        example: outputs of any window, which show the structure.
        importance_map: function that takes the size of a window, voxels, and returns the weights of
            its voxels.

    Returns:
        The scores of the volume, in the structure that the network returns. Each output keeps its
        resolution: one that has half of `roi_size` in a window has half of the volume's size.
    """
    # per output (C + 1, *spatial); the last channel is the sum of the weights
    sums: list[torch.Tensor] = []
    for start in product(*grid.starts):
        (outputs,) = score_windows([start])
        for number, scores in enumerate(leaves(outputs)):
            size = tuple(scores.shape[1:])
            if number == len(sums):
                whole = _at_resolution(grid.shape, size, grid.roi_size)
                sums.append(scores.new_zeros((len(scores) + 1, *whole), dtype=torch.float32))
            weights = importance_map(size).to(scores.device)
            place = box_at(_at_resolution(start, size, grid.roi_size), size)
            window_sums = crop_box(sums[number], place)
            window_sums[:-1] += scores * weights
            window_sums[-1] += weights
    smallest = torch.finfo().tiny
    means = iter([total[:-1] / total[-1].clamp(min=smallest) for total in sums])
    return map_tensors(lambda _: next(means), example)


def _at_resolution(
    voxels: Sequence[int], size: Sequence[int], roi_size: Sequence[int]
) -> list[int]:
    """Return a position or size in the volume, converted to voxels of an output.

    Args:
        voxels: position or size along each axis, voxels of the volume.
        size: size of the output in one window, voxels of the output.
        roi_size: size of the window, voxels of the volume.
    """
    return [n * s // r for n, s, r in zip(voxels, size, roi_size, strict=True)]


def leaves(structure: Any) -> list[torch.Tensor]:
    """Return all tensors of a structure as a list, in the order of the structure."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, structure)
    return found


def map_tensors(function: Callable[..., Any], *structures: Any) -> Any:
    """Apply a function to each tensor of a structure; return the results in the same structure.

    Args:
        function: function of one tensor from each structure.
        structures: tensors, or lists, tuples or mappings of structures; all alike.
    """
    first = structures[0]
    if isinstance(first, Mapping):
        mapped = {}
        for key in first:
            mapped[key] = map_tensors(function, *(structure[key] for structure in structures))
        return mapped
    if isinstance(first, list | tuple):
        return type(first)(map_tensors(function, *parts) for parts in zip(*structures, strict=True))
    return function(*structures)


def split_batch(output: Any, slice_dim: int | None) -> list[Any]:
    """Return the output of a network for each item of the batch, without the batch axis.

    Args:
        output: tensor (B, C, *spatial), or a structure of such tensors.
        slice_dim: position of a spatial axis of length 1 to insert, for a 2D network on a volume;
            None inserts no axis.
    """
    if slice_dim is not None:
        output = map_tensors(lambda tensor: tensor.unsqueeze(slice_dim + 2), output)
    count = len(leaves(output)[0])
    return [map_tensors(lambda tensor, i=i: tensor[i], output) for i in range(count)]
