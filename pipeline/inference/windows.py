"""The network's scores in windows of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from pipeline.inference.boxes import box_at, crop_box
from pipeline.inference.foreground import touches_foreground
from pipeline.inference.multi_output import split_batch
from pipeline.types import NetworkFunction


class WindowScores:
    """Computes the network's scores in windows of one image; called by `aggregate`.

    The window at the image's first voxel is computed by the constructor, because its scores give
    the number of classes. They are kept until this window is requested.

    Args:
        image: (C, *spatial) float32 image, at least as large as a window along every axis.
        network: network, (B, C, *roi_size) → scores.
        roi_size: size of a window along the image's axes, voxels.
        slice_dim: spatial axis along which windows are one slice thick, for a 2D network on a
            volume; the network gets windows without this axis. None if the network has as many
            spatial axes as the image.
        batch: number of windows that go through the network together; halved each time that the
            GPU runs out of memory.
        device: device that the network is on.
        cells: foreground cells, from `foreground_cells`; windows that overlap none are skipped.
            None computes every window.

    Attributes:
        first: scores of the window at the first voxel until they are used, then None.
    """

    def __init__(
        self,
        image: torch.Tensor,
        network: NetworkFunction,
        roi_size: Sequence[int],
        *,
        slice_dim: int | None,
        batch: int,
        device: torch.device,
        cells: torch.Tensor | None,
    ) -> None:
        self.image, self.network, self.roi_size = image, network, tuple(roi_size)
        self.slice_dim = slice_dim
        self.batch, self.device, self.cells = batch, device, cells
        origin = (0,) * (image.ndim - 1)
        self.first: Any = self._compute([origin])[0]

    def __call__(self, starts: Sequence[tuple[int, ...]]) -> list[Any]:
        """Return the scores (classes, *roi_size) of each window, None for a skipped one.

        Args:
            starts: first voxel of each window. The window at the image's first voxel, if it is
                among them, has to be the first.
        """
        computed = [start for start in starts if any(start) and not self._is_background(start)]
        scores: dict[tuple[int, ...], Any] = dict(
            zip(computed, self._compute(computed), strict=True)
        )
        if not any(starts[0]):
            scores[starts[0]], self.first = self.first, None
        return [scores.get(start) for start in starts]

    def _is_background(self, start: tuple[int, ...]) -> bool:
        return self.cells is not None and not touches_foreground(self.cells, start, self.roi_size)

    def _compute(self, starts: Sequence[tuple[int, ...]]) -> list[Any]:
        """Return the scores of each window; halve `batch` where the GPU runs out of memory."""
        results: list[Any] = []
        while len(results) < len(starts):
            batch = starts[len(results) : len(results) + self.batch]
            try:
                crops = [crop_box(self.image, box_at(start, self.roi_size)) for start in batch]
                windows = torch.stack(crops).to(self.device)
                if self.slice_dim is not None:
                    windows = windows.squeeze(self.slice_dim + 2)
                results += split_batch(self.network(windows), self.slice_dim)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
        return results


def pad_to_window(
    image: torch.Tensor, roi_size: Sequence[int], mode: str = "constant"
) -> tuple[torch.Tensor, list[int]]:
    """Return an image padded at both ends of each axis to at least a window's size.

    Args:
        image: (C, *spatial) image.
        roi_size: size of a window, voxels.
        mode: of torch's padding; `constant` pads with zeros.

    Returns:
        The padded image, and the number of voxels added along each spatial axis, both ends
        together.
    """
    margins = [max(0, r - n) for r, n in zip(roi_size, image.shape[1:], strict=True)]
    if any(margins):
        padding = []
        for margin in reversed(margins):  # torch pads the last axis first
            padding += [margin // 2, margin - margin // 2]
        image = functional.pad(image, padding, mode=mode)
    return image, margins


def crop_padding(scores: torch.Tensor, margins: Sequence[int]) -> torch.Tensor:
    """Return scores without the padding that `pad_to_window` added.

    Args:
        scores: (classes, *spatial) scores of the padded image, or a block of them that is as long
            as the padded image along each padded axis.
        margins: number of voxels added along each spatial axis, both ends together.
    """
    box = []
    for margin, size in zip(margins, scores.shape[1:], strict=True):
        before = margin // 2
        box.append(slice(before, size - (margin - before)))
    return crop_box(scores, box)
