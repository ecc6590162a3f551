"""Networks that return several tensors, as a sequence or a mapping."""

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
    """Return whole scores of a network of several outputs, in the structure that it returns.

    Unlike `aggregate`, this holds the sums of the whole volume.

    Args:
        grid: where windows lie.
        score_windows: the first voxels of windows → the outputs of each, tensors (C, *size).
        example: the outputs of any window, for their structure.
        importance_map: size of a window, voxels → the weights of its voxels.

    Returns:
        Each output at its own resolution: one of half as many voxels per window as `roi_size` has
        half as many as the volume.
    """
    sums: list[torch.Tensor] = []  # per output (C + 1, *spatial), the last channel of the weights
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
    """Return a position or size of the volume on the grid of an output.

    Args:
        voxels: per axis, in voxels of the volume.
        size: of the output in one window.
        roi_size: of the window itself.
    """
    return [n * s // r for n, s, r in zip(voxels, size, roi_size, strict=True)]


def leaves(structure: Any) -> list[torch.Tensor]:
    """Return the tensors of a structure, in its order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, structure)
    return found


def map_tensors(function: Callable[..., Any], *structures: Any) -> Any:
    """Return a structure of the results of a function for each tensor.

    Args:
        function: takes one tensor of each structure.
        structures: tensors, or sequences or mappings of structures, all with the same layout.
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
    """Return the output of a batch as one result per item.

    Args:
        output: tensors (B, C, *spatial), in any structure.
        slice_dim: the spatial axis of length 1 to insert, for a 2D network; None for none.
    """
    if slice_dim is not None:
        output = map_tensors(lambda tensor: tensor.unsqueeze(slice_dim + 2), output)
    count = len(leaves(output)[0])
    return [map_tensors(lambda tensor, i=i: tensor[i], output) for i in range(count)]
