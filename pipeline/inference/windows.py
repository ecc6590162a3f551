"""What the network says of the windows of one image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from pipeline.inference.foreground import crop_box, touches_foreground
from pipeline.inference.multi_output import split_batch


class WindowScores:
    """The network's scores in windows of one image, for `stitch.blocks`.

    Args:
        image: (C, *spatial) float32, nowhere smaller than a window.
        network: (B, C, *window) → scores.
        roi: a window's size along the image's axes, voxels.
        slice_dim: the axis along which a window is one slice that the network sees without that axis; None for volumes.
        batch: windows that go through the network together; half as many where the GPU's memory does not do.
        device: where the network is.
        cells: which cells hold something (`air.occupied`): windows without any are not looked at; None looks at all.

    Attributes:
        first: the scores of the first window, until they are asked for.
        seconds: how long looking took, in parts.
    """

    def __init__(
        self,
        image: torch.Tensor,
        network: Callable[[torch.Tensor], Any],
        roi: Sequence[int],
        *,
        slice_dim: int | None,
        batch: int,
        device: torch.device,
        cells: torch.Tensor | None,
    ) -> None:
        self.image, self.network, self.roi, self.slice_dim = image, network, tuple(roi), slice_dim
        self.batch, self.device, self.cells = batch, device, cells
        started = time.perf_counter()
        self.first: Any = self._scores([(0,) * (image.ndim - 1)])[
            0
        ]  # tells the number of classes, and is used again
        self.seconds = [time.perf_counter() - started]

    def __call__(self, starts: Sequence[tuple[int, ...]]) -> list[Any]:
        seen = [start for start in starts if any(start) and not self._is_air(start)]
        found: dict[tuple[int, ...], Any] = dict(zip(seen, self._scores(seen), strict=True))
        if not any(starts[0]):
            found[starts[0]], self.first = self.first, None
        return [found.get(start) for start in starts]

    def _is_air(self, start: tuple[int, ...]) -> bool:
        return self.cells is not None and not touches_foreground(self.cells, start, self.roi)

    def _scores(self, starts: Sequence[tuple[int, ...]]) -> list[Any]:
        """One result a window; half as many windows at once where the GPU's memory does not do."""
        results: list[Any] = []
        while len(results) < len(starts):
            some = starts[len(results) : len(results) + self.batch]
            try:
                windows = [
                    [slice(i, i + n) for i, n in zip(start, self.roi, strict=True)]
                    for start in some
                ]
                patch = torch.stack([crop_box(self.image, window) for window in windows]).to(
                    self.device
                )
                flat = patch if self.slice_dim is None else patch.squeeze(self.slice_dim + 2)
                results += split_batch(self.network(flat), self.slice_dim)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
        return results


def pad_to_window(image: torch.Tensor, roi: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """An image (C, *spatial) with zeros around it where it is smaller than a window, and how many there are along each axis."""
    margins = [max(0, r - n) for r, n in zip(roi, image.shape[1:], strict=True)]
    if any(margins):
        image = functional.pad(
            image, [side for m in reversed(margins) for side in (m // 2, m - m // 2)]
        )
    return image, margins


def crop_padding(scores: torch.Tensor, margins: Sequence[int]) -> torch.Tensor:
    """Scores (classes, *spatial) without what `padded` added."""
    return crop_box(
        scores,
        [slice(m // 2, n - (m - m // 2)) for m, n in zip(margins, scores.shape[1:], strict=True)],
    )
