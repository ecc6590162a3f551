"""Networks that give several tensors, as a sequence or a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from pipeline.inference.aggregator import WindowGrid

ScoreFunction = Callable[[Sequence[tuple[int, ...]]], Sequence[Any]]


def aggregate_outputs(
    windows: WindowGrid,
    look: ScoreFunction,
    first: Any,
    weight_map: Callable[[tuple[int, ...]], torch.Tensor],
) -> Any:
    """Whole scores of a network of several outputs, each at its own resolution, in the structure that the network gives."""
    totals: list[torch.Tensor] = []
    for start in product(*windows.starts):
        (scores,) = look([start])
        for number, one in enumerate(leaves(scores)):
            size = one.shape[1:]
            if number == len(totals):
                shape = [
                    n * s // r
                    for n, s, r in zip(windows.shape, size, windows.roi_size, strict=True)
                ]
                totals.append(one.new_zeros((len(one) + 1, *shape), dtype=torch.float32))
            at = tuple(
                slice(i * s // r, i * s // r + s)
                for i, s, r in zip(start, size, windows.roi_size, strict=True)
            )
            weights = weight_map(tuple(size)).to(one.device)
            scored = (slice(0, -1), *at)
            totals[number][scored] += one * weights
            totals[number][-1][at] += weights
    results = iter([total[:-1] / total[-1].clamp(min=torch.finfo().tiny) for total in totals])
    return map_tensors(lambda _: next(results), first)


def leaves(structure: Any) -> list[torch.Tensor]:
    """The tensors of a structure, in its order."""
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor), structure)
    return found


def map_tensors(function: Callable[..., Any], *structures: Any) -> Any:
    """A function of tensors, taken over tensors, sequences or mappings of them alike."""
    first = structures[0]
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(s[key] for s in structures)) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(map_tensors(function, *parts) for parts in zip(*structures, strict=True))
    return function(*structures)


def split_batch(output: Any, slice_dim: int | None) -> list[Any]:
    """A batch's output as one result an item, with the slices' axis put back."""
    if slice_dim is not None:
        output = map_tensors(lambda tensor: tensor.unsqueeze(slice_dim + 2), output)
    count = len(leaves(output)[0])
    return [map_tensors(lambda tensor, i=i: tensor[i], output) for i in range(count)]
