"""Soft volumes, probability maps and entropy: what class probabilities give besides labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log

import torch
from torch.nn import functional

from pipeline.inference.aggregator import HALO, ScoreBlock


class ProbabilityCollector:
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

    def pass_through(self, blocks: Iterator[ScoreBlock]) -> Iterator[ScoreBlock]:
        """Yield the given blocks of logits unchanged, after accumulating their probabilities."""
        for block in blocks:
            self._add(block)
            yield block
            del block  # or it would be held while the next one is computed

    @property
    def voxels(self) -> torch.Tensor:
        """Soft volume of each class over all blocks so far, (C,) float64, in voxels."""
        return torch.stack(self.sums).sum(dim=0)

    def _add(self, block: ScoreBlock) -> None:
        probabilities = class_probabilities(block.scores, regions=self.regions)
        # a block repeats the last voxels of the one before it, which must not be counted twice
        new = (slice(None), *(slice(HALO if start else 0, None) for start in block.start))
        self.sums.append(probabilities[new].sum((1, 2, 3), dtype=torch.float64).cpu())
        if not self.kept_classes:
            return
        if self.maps is None:
            self.maps = torch.zeros((len(self.kept_classes), *block.shape), dtype=torch.float16)
        sizes = block.scores.shape[1:]
        x, y, z = (slice(s, s + n) for s, n in zip(block.start, sizes, strict=True))
        self.maps[:, x, y, z] = probabilities[self.kept_classes].half().cpu()


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
