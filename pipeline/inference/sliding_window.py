"""The network over a volume of any size, window by window, blended by a Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import collate_meta_tensor, compute_importance_map
from monai.inferers import Inferer

from pipeline.config import Spec
from pipeline.errors import ConfigError, ShapeError
from pipeline.inference.aggregator import (
    Placement,
    ScoreBlock,
    WindowGrid,
    aggregate,
    assemble,
    group_windows,
    window_grid,
)
from pipeline.inference.boxes import crop_box
from pipeline.inference.foreground import (
    foreground_box,
    foreground_cells,
    foreground_level,
)
from pipeline.inference.localisation import HeadTop, head_top, localise
from pipeline.inference.multi_output import aggregate_outputs, map_tensors
from pipeline.inference.overlap_tile import BackgroundInferer, build_tile_inferer, with_background
from pipeline.inference.test_time_augmentation import (
    Mirroring,
    average_mirrored,
    average_rotations,
    mirroring_of,
)
from pipeline.inference.windows import WindowScores, crop_padding, pad_to_window
from pipeline.io import add_warnings
from pipeline.types import Box, NetworkFunction

T = TypeVar("T")

# slices that a 2D network computes together: one alone leaves cores idle
SLICES_PER_BATCH = 16
# sums of windows that are held without a memory limit; more was measured to gain no time
BUFFER_BYTES = 2**30
# of a window's size: MONAI's default, whose weights ours equal
GAUSSIAN_SIGMA = 0.125


def build_inferer(
    spec: Spec, overlap: float | None = None, sw_batch_size: int | None = None
) -> Inferer:
    """Return the inferer of a spec: volumes by 3D windows, or slice by slice for a 2D network.

    A network without padding gets mirror-extended tiles whose outputs abut; one with a sigmoid
    output gets a background channel; rotated versions are averaged where the spec asks for them.

    Args:
        spec: gives roi_size, overlap and the axis of slices.
        overlap: of neighbouring windows, a fraction of roi_size; the spec's own by default.
        sw_batch_size: windows that go through the network together; by default 1 in 3D, 16 in 2D.

    Shapes:
        (B, C, X, Y, Z) of any size → logits (B, labels, X, Y, Z).

    Raises:
        ConfigError: an overlap that is not 0 ≤ overlap < 1.
    """
    overlap = spec.overlap if overlap is None else overlap
    return average_rotations(spec, _window_or_tile_inferer(spec, overlap, sw_batch_size))


def _window_or_tile_inferer(spec: Spec, overlap: float, sw_batch_size: int | None) -> Inferer:
    if not spec.network.padding:
        if overlap:
            raise ConfigError(
                "overlap: expected 0 for a network without padding, whose tiles abut, "
                f"got {overlap}"
            )
        tiles = build_tile_inferer(spec, sw_batch_size)
        return BackgroundInferer(tiles) if spec.output == "sigmoid" else tiles
    return WindowInferer(
        spec.roi_size,
        overlap,
        slice_dim=spec.slice_dim,
        sw_batch_size=sw_batch_size or (1 if spec.slice_dim is None else SLICES_PER_BATCH),
        mirroring=mirroring_of(spec),
        foreground_threshold=spec.foreground_threshold,
        head_top=head_top(spec) if spec.localise else None,
        add_background=spec.output == "sigmoid",
    )


@dataclass(frozen=True, kw_only=True)
class _WindowPass:
    """One image prepared for its windows.

    Attributes:
        scores: the network's scores in windows of the (padded) region.
        size: of that region, voxels.
        margins: voxels that the region was padded by along each axis.
        region: the part of the image that windows are spread over.
        shape: of the whole image, voxels.
        device: where sums are held.
    """

    scores: WindowScores
    size: tuple[int, ...]
    margins: Sequence[int]
    region: Box
    shape: tuple[int, ...]
    device: torch.device


class WindowInferer(Inferer):
    """A sliding-window inferer that holds only what later windows still overlap.

    Called like any MONAI inferer it returns whole logits; `blocks` yields finished parts of them.

    Args:
        roi_size: size of a window, voxels; the network's input.
        overlap: of neighbouring windows, a fraction of roi_size.
        slice_dim: the spatial axis that 2D windows are stacked along in a volume; None where the
            network has as many spatial axes as the image.
        sw_batch_size: windows that go through the network together.
        placement: `even` spaces windows evenly, `monai` shifts the last one back; both need
            equally many windows.
        mode: weight of a window's voxels, `gaussian` or `constant`.
        mirroring: mirror images of each window that are averaged in; None for none.
        foreground_threshold: fraction of the way from an image's lowest value to its brightest
            below which it is background. Windows are spread over the box of the foreground, those
            without any are skipped, and all else is background. None computes every window.
        head_top: where a head's top is, for images whose structures fit in one window: that window
            is placed over them, and windows are spread only where they do not fit. Needs
            `foreground_threshold`. None always spreads windows.
        add_background: whether a logit of 0, the background, is put before the network's: for
            networks with a sigmoid output.
        buffer_bytes: sums of windows that may be held at a time; no result depends on it.

    Shapes:
        (B, C, *spatial) of any size, padded by 0 where smaller than the window →
        (B, classes, *spatial) float32. A network of several outputs (a sequence or a mapping) gives
        the same structure of whole logits, those of a lower resolution at theirs.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.25,
        *,
        slice_dim: int | None = None,
        sw_batch_size: int = 1,
        placement: Placement = "even",
        mode: str = "gaussian",
        mirroring: Mirroring | None = None,
        foreground_threshold: float | None = None,
        head_top: HeadTop | None = None,
        add_background: bool = False,
        buffer_bytes: float = BUFFER_BYTES,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap: expected a fraction, 0 ≤ overlap < 1, got {overlap}")
        if sw_batch_size < 1:
            raise ConfigError(f"sw_batch_size: expected 1 or more, got {sw_batch_size}")
        self.roi_size, self.overlap, self.slice_dim = tuple(roi_size), overlap, slice_dim
        self.sw_batch_size, self.placement, self.mode = sw_batch_size, placement, mode
        self.mirroring = mirroring
        self.foreground_threshold, self.head_top = foreground_threshold, head_top
        self.add_background, self.buffer_bytes = add_background, buffer_bytes
        self.window = self.roi_size  # along the image's axes: a slice has a thickness of 1
        if slice_dim is not None:
            self.window = (*self.roi_size[:slice_dim], 1, *self.roi_size[slice_dim:])

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return whole logits of a batch of images.

        Raises:
            ShapeError: the inputs' number of axes does not fit roi_size.
            VolumeError: scores that are NaN or infinite.
        """
        if inputs.ndim != len(self.window) + 2:
            raise ShapeError(
                f"input has shape {tuple(inputs.shape)}, expected (B, C, *spatial) with "
                f"{len(self.window)} spatial axes"
            )
        is_meta = isinstance(inputs, MetaTensor)
        images = decollate_batch(inputs, detach=False) if is_meta else list(inputs)

        def bound(patch: torch.Tensor) -> Any:
            return network(patch, *args, **kwargs)

        results = []
        for image in images:
            results.append(with_host_fallback(partial(self._whole, image, bound), image))
        return _collated(results)

    def blocks(
        self,
        image: torch.Tensor,
        network: NetworkFunction,
        *,
        device: torch.device | None = None,
        buffer_bytes: float | None = None,
    ) -> Iterator[ScoreBlock]:
        """Yield the logits of one image as finished blocks, each computed when it is asked for.

        Args:
            image: (C, *spatial), on the device of the network.
            network: (B, C, *roi_size) → logits.
            device: where sums are held; that of the image by default.
            buffer_bytes: sums that may be held at a time, instead of the inferer's own.

        Raises:
            VolumeError: scores that are NaN or infinite.
        """
        # a generator, so that placing the windows counts as time of the first block
        started = self._start(image, network, device or image.device)
        yield from self._placed_blocks(started, buffer_bytes)

    def windows(
        self, shape: Sequence[int], channels: int, buffer_bytes: float | None = None
    ) -> WindowGrid:
        """Return where windows lie over a volume, and how they are grouped for so many classes.

        Args:
            shape: (*spatial) of the volume, voxels.
            channels: of the network's output.
            buffer_bytes: sums that may be held at a time, instead of the inferer's own.
        """
        least = [max(n, r) for n, r in zip(shape, self.window, strict=True)]
        grid = window_grid(least, self.window, self.overlap, self.placement)
        limit = self.buffer_bytes if buffer_bytes is None else buffer_bytes
        return group_windows(grid, channels, limit)

    def _start(
        self, image: torch.Tensor, network: NetworkFunction, device: torch.device
    ) -> _WindowPass:
        plain = _replace_nonfinite(_plain(image).to(device, torch.float32))
        shape = tuple(plain.shape[1:])
        threshold = self.foreground_threshold
        level = None if threshold is None else foreground_level(plain, threshold)
        region = self._region(plain, level, self._complete(network), image.device)
        padded, margins = pad_to_window(crop_box(plain, region), self.window)
        scores = WindowScores(
            padded,
            self._complete(average_mirrored(network, self.mirroring)),
            self.window,
            slice_dim=self.slice_dim,
            batch=self.sw_batch_size,
            device=image.device,
            cells=None if level is None else foreground_cells(padded, level),
        )
        return _WindowPass(
            scores=scores,
            size=tuple(padded.shape[1:]),
            margins=margins,
            region=region,
            shape=shape,
            device=device,
        )

    def _complete(self, network: NetworkFunction) -> NetworkFunction:
        """Return the network with a channel for the background, where it has none of its own."""
        if not self.add_background:
            return network
        return lambda patch: with_background(network(patch))

    def _whole(self, image: torch.Tensor, network: NetworkFunction, device: torch.device) -> Any:
        started = self._start(image, network, device)
        first = started.scores.first
        if self.foreground_threshold is None and not isinstance(first, torch.Tensor):
            grid = self.windows(started.size, 1)
            return aggregate_outputs(
                grid, started.scores, first, lambda size: importance_map(size, self.mode)
            )
        return assemble(self._placed_blocks(started, None), image)

    def _placed_blocks(
        self, started: _WindowPass, buffer_bytes: float | None
    ) -> Iterator[ScoreBlock]:
        """Yield blocks in the whole volume; each is released before the next is computed."""
        channels = len(_single_output(started.scores.first))
        grid = self.windows(started.size, channels, buffer_bytes)
        weights = importance_map(self.window, self.mode).to(started.device)
        found = aggregate(grid, started.scores, weights, channels, batch=self.sw_batch_size)
        for block in found:
            start = tuple(s.start + i for s, i in zip(started.region, block.start, strict=True))
            # along a padded axis there is one window, so its padding is cut off whole
            scores = crop_padding(block.scores, started.margins)
            yield ScoreBlock(start=start, scores=scores, shape=started.shape)
            del block, scores

    def _region(
        self,
        image: torch.Tensor,
        level: float | None,
        network: NetworkFunction,
        device: torch.device,
    ) -> Box:
        """Return the part of an image that windows are spread over."""
        if level is None:
            return tuple(slice(0, n) for n in image.shape[1:])
        inside = foreground_box(image, level, self.window)
        if self.head_top is None:
            return inside
        plain = WindowInferer(self.roi_size, self.overlap, sw_batch_size=self.sw_batch_size)

        def scores_in(box: Box) -> torch.Tensor:
            return _single_output(plain(crop_box(image, box)[None].to(device), network))[0]

        return localise(image, inside, self.window, self.head_top, level, scores_in)


def with_host_fallback(compute: Callable[[torch.device], T], image: torch.Tensor) -> T:
    """Return `compute(device)`; where a GPU's memory does not suffice, compute on the host's.

    Args:
        compute: takes the device on which the sums of windows are held.
        image: gets a warning in its `meta` in the second case.
    """
    try:
        return compute(image.device)
    except torch.OutOfMemoryError:
        if image.device.type == "cpu":
            raise
    if isinstance(image, MetaTensor):
        add_warnings(
            image.meta,
            "the GPU's memory did not suffice for the whole image: windows were put together on "
            "the host",
        )
    return compute(torch.device("cpu"))


def _single_output(scores: Any) -> torch.Tensor:
    if not isinstance(scores, torch.Tensor):
        raise ConfigError(
            "foreground_threshold: expected None for a network of several outputs, which have no "
            "common background"
        )
    return scores


@lru_cache(maxsize=4)
def importance_map(size: tuple[int, ...], mode: str) -> torch.Tensor:
    """Return the weight of each voxel of a window, (*size) float32, as MONAI computes it.

    Axes of length 1 do not count: a slice has the weights of a 2D window.
    """
    kept = tuple(n for n in size if n > 1) or (1,)
    weights: torch.Tensor = compute_importance_map(
        kept, mode=mode, sigma_scale=GAUSSIAN_SIGMA, device="cpu"
    )
    return weights.reshape(size)


def _replace_nonfinite(image: torch.Tensor) -> torch.Tensor:
    """Replace NaN and infinities by the smallest finite value: one would spoil its windows."""
    if torch.isfinite(image.sum()):
        return image
    finite = torch.isfinite(image)
    return torch.where(finite, image, image[finite].min() if finite.any() else torch.zeros(()))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    plain: torch.Tensor = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain


def _collated(results: list[Any]) -> Any:
    """Return one result per image as a batch."""
    if not isinstance(results[0], torch.Tensor):
        return map_tensors(lambda *parts: torch.stack(parts), *results)
    if len({tuple(result.shape) for result in results}) > 1:
        raise ShapeError(
            "the images of one batch come from grids of different sizes: use a batch size of 1"
        )
    if isinstance(results[0], MetaTensor):
        batch: torch.Tensor = collate_meta_tensor(results)
        return batch
    return torch.stack(results)
