"""What soft scores say beside the label that wins: how much of each structure there is, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch

from pipeline.stitch import HALO, Block


def summed(blocks: Iterator[Block], totals: list[torch.Tensor]) -> Iterator[Block]:
    """The same blocks; `totals` gets each one's sum of probabilities, (C,) float64, voxels, without what blocks repeat."""
    for block in blocks:
        new = (slice(None), *(slice(HALO if start else 0, None) for start in block.start))
        totals.append(torch.softmax(block.scores[new], dim=0).sum((1, 2, 3), dtype=torch.float64).cpu())
        yield block
        del block


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """How unsure scores (C, x, y, z) are, (x, y, z) from 0 (one class only) to 1 (all alike).

    References:
        Shannon: A mathematical theory of communication. Bell System Technical Journal 27 (1948): the entropy of the softmax,
        here as a fraction of log C.
    """
    logs = torch.log_softmax(scores, dim=0)
    return -(logs.exp() * logs).sum(dim=0) / log(max(2, len(scores)))
