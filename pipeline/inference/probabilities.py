"""Soft volumes, probability maps and entropy: what class probabilities give besides labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch.nn import functional

from pipeline.inference.aggregator import HALO, ScoreBlock
from pipeline.inference.block_observer import BlockObserver
from pipeline.inference.boxes import box_at, crop_box

# logits whose probabilities are held at a time: 4 MB
SLAB_VALUES = 2**20


class ProbabilityCollector(BlockObserver):
    """Accumulates per-class probabilities block by block.

    It also stores full probability maps for `kept_classes`.

    Args:
        kept_classes: numbers of the classes whose probability maps are stored.
        regions: whether the structures are regions, which may overlap.

    Attributes:
        sums: list with one (C,) float64 tensor per block: the soft volume of each class in voxels.
            Voxels that a block repeats of the block before it (the halo) are counted once.
        maps: (len(kept_classes), X, Y, Z) float16 probabilities on the CPU; None before the first
            block, or without `kept_classes`.
    """

    def __init__(self, kept_classes: Sequence[int] = (), *, regions: bool = False) -> None:
        self.kept_classes, self.regions = list(kept_classes), regions
        self.sums: list[torch.Tensor] = []
        self.maps: torch.Tensor | None = None

    @property
    def voxels(self) -> torch.Tensor:
        """Soft volume of each class over all blocks so far, (C,) float64, in voxels."""
        return torch.stack(self.sums).sum(dim=0)

    def add(self, block: ScoreBlock) -> None:
        total = torch.zeros(len(block.scores), dtype=torch.float64)
        rows = block.scores.shape[1]
        step = max(1, SLAB_VALUES // max(1, block.scores[:, 0].numel()))
        for first in range(0, rows, step):
            scores = block.scores[:, first : first + step]
            probabilities = class_probabilities(scores, regions=self.regions)
            start = (block.start[0] + first, *block.start[1:])
            # a block repeats the last voxels of the one before it, which must not be counted twice
            halo = [HALO if begin else 0 for begin in block.start]
            halo[0] = max(0, halo[0] - first)
            new = crop_box(probabilities, [slice(size, None) for size in halo])
            total += new.sum((1, 2, 3), dtype=torch.float64).cpu()
            self._keep(probabilities, start, block.shape)
        self.sums.append(total)

    def _keep(
        self, probabilities: torch.Tensor, start: Sequence[int], shape: Sequence[int]
    ) -> None:
        """Copy the probabilities (C, x, y, z) from voxel `start` on to the maps."""
        if not self.kept_classes:
            return
        if self.maps is None:
            self.maps = torch.zeros((len(self.kept_classes), *shape), dtype=torch.float16)
        place = crop_box(self.maps, box_at(start, probabilities.shape[1:]))
        for kept, number in zip(place, self.kept_classes, strict=True):
            kept.copy_(probabilities[number])


def class_probabilities(scores: torch.Tensor, *, regions: bool) -> torch.Tensor:
    """Return the probability of each class.

    Args:
        scores: (C, x, y, z) logits, the background first.
        regions: whether the structures are regions, which may overlap.

    Returns:
        (C, x, y, z): the softmax of the logits; with `regions`, `structure_probabilities` after
        that of the background, which is 1 minus the highest of them.
    """
    if not regions:
        return torch.softmax(scores, dim=0)
    structures = structure_probabilities(scores)
    return torch.cat([1 - structures.amax(dim=0, keepdim=True), structures])


def structure_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Return the probability of each structure of a network with sigmoid outputs.

    Args:
        scores: (C, x, y, z) logits, the first of them that of the background: 0 where the network
            was computed, and high where it was not (see `aggregate`).

    Returns:
        (C - 1, x, y, z) probabilities, each from 0 to 1; structures that overlap can have a sum
        above 1.
    """
    return torch.sigmoid(scores[1:] - scores[:1])


def entropy(scores: torch.Tensor, *, regions: bool = False) -> torch.Tensor:
    """Return the entropy of the class probabilities, divided by its largest possible value.

    Args:
        scores: (C, x, y, z) logits.
        regions: whether the structures are regions: each is then present or not, independently of
            the others, and the result is the mean over them.

    Returns:
        (x, y, z) entropy, from 0 (one class is certain) to 1 (all classes have the same
        probability).

    References:
        Shannon: A mathematical theory of communication. Bell System Technical Journal 27 (1948).
    """
    if regions:
        logit = scores[1:] - scores[:1]
        present, absent = functional.logsigmoid(logit), functional.logsigmoid(-logit)
        bits = -(present.exp() * present + absent.exp() * absent) / log(2)
        return bits.mean(dim=0)
    logs = torch.log_softmax(scores, dim=0)
    return -(logs.exp() * logs).sum(dim=0) / log(max(2, len(scores)))
