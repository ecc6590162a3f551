"""The base class of what collects something from the blocks of a volume's logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from pipeline.inference.aggregator import ScoreBlock


class BlockObserver(ABC):
    """Collects from each block of logits, before the receiver of the block changes it."""

    def pass_through(self, blocks: Iterator[ScoreBlock]) -> Iterator[ScoreBlock]:
        """Yield the given blocks of logits unchanged, after adding each of them."""
        for block in blocks:
            self.add(block)
            yield block
            del block  # or it would be held while the next one is computed

    @abstractmethod
    def add(self, block: ScoreBlock) -> None:
        """Collect from one block, which stays as it is."""
