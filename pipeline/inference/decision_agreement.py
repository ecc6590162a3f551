"""How well several segmentations of the same voxels agree: of mirror images, of two networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import OutputKind

# every third plane across the first axis is compared: enough to measure how well they agree
STEP = 3


class DecisionAgreement:
    """Counts, per channel of a network's output, where several segmentations are alike.

    Windows that overlap count each on their own, so the counts do not depend on how windows are
    grouped. Nothing but counts is kept between windows.

    Args:
        output: kind of the network's output.

    Attributes:
        common: (C,) voxels that both of two segmentations have.
        total: (C,) sum of the voxels that each of the two has; (0,) before the first window.
    """

    def __init__(self, output: OutputKind) -> None:
        self.output = output
        self.common: NDArray[np.float64] = np.zeros(0)
        self.total: NDArray[np.float64] = np.zeros(0)

    def decision(self, scores: torch.Tensor) -> torch.Tensor:
        """Return which channels some scores choose.

        Args:
            scores: (B, C, *spatial) logits, or probabilities of a softmax; without a background
                channel unless it is a softmax.

        Returns:
            in every third plane: (B, C, *spatial) bool for regions, which may overlap;
            (B, *spatial) channel numbers for all others, -1 for the background of a sigmoid.
        """
        scores = scores[:, :, ::STEP]
        if self.output == "regions":
            return scores > 0
        highest, number = scores.max(dim=1)
        return number if self.output == "softmax" else number.masked_fill(highest <= 0, -1)

    def add(self, decisions: Sequence[torch.Tensor], channels: int) -> None:
        """Count the decisions on one batch of windows.

        Args:
            decisions: the first one is compared with each of the others: decisions on the windows
                themselves, then on each of their mirror images, or those of two networks.
            channels: C, number of channels of the network's output.
        """
        if not len(self.common):
            self.common, self.total = np.zeros(channels), np.zeros(channels)
        first = decisions[0]
        own = self._counts(first, channels)
        for other in decisions[1:]:
            self.total += own + self._counts(other, channels)
            if self.output == "regions":
                self.common += self._counts(first & other, channels)
            else:
                self.common += self._counts(first.masked_fill(first != other, -1), channels)

    def _counts(self, decision: torch.Tensor, channels: int) -> NDArray[np.float64]:
        if self.output == "regions":
            counts = decision.sum([0, *range(2, decision.ndim)])
        else:  # 0 counts what no channel has
            counts = torch.bincount(decision.flatten() + 1, minlength=channels + 1)[1:]
        return np.asarray(counts.cpu(), dtype=np.float64)

    @property
    def dice(self) -> NDArray[np.float64]:
        """Dice between the segmentations, (C,), nan where neither has a voxel."""
        with np.errstate(invalid="ignore"):
            agreement: NDArray[np.float64] = 2 * self.common / self.total
        return agreement
