"""What soft scores say beside the label that wins: how much of each structure there is, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log

import torch

from pipeline.inference.aggregator import HALO, ScoreBlock


def collect_probabilities(
    blocks: Iterator[ScoreBlock],
    numbers: Sequence[int],
    totals: list[torch.Tensor],
    store: list[torch.Tensor],
) -> Iterator[ScoreBlock]:
    """The same blocks, and what their probabilities say.

    Args:
        blocks: of logits (C, x, y, z).
        numbers: of the classes whose probabilities are kept.
        totals: gets each block's sum of probabilities, (C,) float64, voxels, without what blocks repeat.
        store: gets the probabilities kept, (len(numbers), X, Y, Z) float16 on the CPU, with the first block.
    """
    for block in blocks:
        probabilities = torch.softmax(block.scores, dim=0)
        new = (slice(None), *(slice(HALO if start else 0, None) for start in block.start))
        totals.append(probabilities[new].sum((1, 2, 3), dtype=torch.float64).cpu())
        if numbers:
            if not store:
                store.append(torch.zeros((len(numbers), *block.shape), dtype=torch.float16))
            x, y, z = (
                slice(s, s + n) for s, n in zip(block.start, block.scores.shape[1:], strict=True)
            )
            store[0][:, x, y, z] = probabilities[list(numbers)].half().cpu()
        del probabilities
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
