"""What probabilities hold besides the winning label: soft volumes, per-class maps and entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log

import torch

from pipeline.inference.aggregator import HALO, ScoreBlock


class ProbabilityCollector:
    """Sums the probabilities of blocks of logits, and keeps those of some classes.

    Args:
        kept_classes: the classes whose probability maps are kept.

    Attributes:
        sums: (C,) float64 per block, the sum of each class's probabilities, in voxels.
        maps: (len(kept_classes), X, Y, Z) float16 on the CPU; None without kept classes.
    """

    def __init__(self, kept_classes: Sequence[int] = ()) -> None:
        self.kept_classes = list(kept_classes)
        self.sums: list[torch.Tensor] = []
        self.maps: torch.Tensor | None = None

    def pass_through(self, blocks: Iterator[ScoreBlock]) -> Iterator[ScoreBlock]:
        """Yield the same blocks of logits, after adding up their probabilities."""
        for block in blocks:
            self._add(block)
            yield block
            del block  # or it would be held while the next one is computed

    @property
    def voxels(self) -> torch.Tensor:
        """(C,) float64: the sum of each class's probabilities over the volume, in voxels."""
        return torch.stack(self.sums).sum(dim=0)

    def _add(self, block: ScoreBlock) -> None:
        probabilities = torch.softmax(block.scores, dim=0)
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


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the softmax of scores as a fraction of its largest value.

    Args:
        scores: (C, x, y, z) logits.

    Returns:
        (x, y, z) from 0 (one class only) to 1 (all classes alike).

    References:
        Shannon: A mathematical theory of communication. Bell System Technical Journal 27 (1948).
    """
    logs = torch.log_softmax(scores, dim=0)
    return -(logs.exp() * logs).sum(dim=0) / log(max(2, len(scores)))
