"""Sliding-window inference on volumes of any size, with Gaussian blending, in little memory."""

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
from pipeline.inference.decision_agreement import DecisionAgreement
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
from pipeline.transforms import SCAN
from pipeline.types import Box, NetworkFunction

T = TypeVar("T")

# number of slices that a 2D network computes together: a single one leaves cores idle
SLICES_PER_BATCH = 16
# largest size of the windows' sums that are held at a time; more was measured to save no time
BUFFER_BYTES = 2**30
# standard deviation of the Gaussian, as a fraction of the window's size: MONAI's default
GAUSSIAN_SIGMA = 0.125


def build_inferer(
    spec: Spec, overlap: float | None = None, sw_batch_size: int | None = None
) -> Inferer:
    """Return the MONAI inferer that applies a spec's network to a whole volume.

    It is a sliding window, in 3D or slice by slice, or the overlap-tile strategy for a network
    without padding. The output has a background channel also for a network with sigmoid outputs.
    Mirror images and rotations are averaged if the spec asks for them.

    Args:
        spec: gives the size of windows and all other settings of inference.
        overlap: overlap of neighbouring windows, as a fraction of a window; None takes the spec's.
        sw_batch_size: number of windows that go through the network together; None takes 1 in 3D
            and 16 in 2D (4 for the overlap-tile strategy).

    Shapes:
        (B, C, X, Y, Z) of any size → logits (B, labels, X, Y, Z).

    Raises:
        ConfigError: the overlap is not in 0 ≤ overlap < 1, or not 0 for a network without padding.
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
        return tiles if spec.output == "softmax" else BackgroundInferer(tiles)
    return WindowInferer(
        spec.roi_size,
        overlap,
        slice_dim=spec.slice_dim,
        sw_batch_size=sw_batch_size or (1 if spec.slice_dim is None else SLICES_PER_BATCH),
        mirroring=mirroring_of(spec),
        foreground_threshold=spec.foreground_threshold,
        head_top=head_top(spec) if spec.localise else None,
        add_background=spec.output != "softmax",
    )


@dataclass(frozen=True, kw_only=True)
class _WindowPass:
    """One image for which the windows have been placed.

    Attributes:
        scores: computes the network's scores in windows of the padded region.
        size: size of the padded region, voxels.
        margins: number of voxels that the region was padded by along each axis, both ends together.
        region: part of the image that windows are spread over.
        shape: size of the whole image, voxels.
        device: device that holds the sums of the windows.
    """

    scores: WindowScores
    size: tuple[int, ...]
    margins: Sequence[int]
    region: Box
    shape: tuple[int, ...]
    device: torch.device


class WindowInferer(Inferer):
    """A sliding-window inferer that can yield finished blocks of logits, to save memory.

    Called like any MONAI inferer, it returns the logits of the whole image. `blocks` yields them as
    blocks, and then only the sums of voxels that later windows overlap are held.

    Args:
        roi_size: size of a window, the network's input, voxels.
        overlap: overlap of neighbouring windows, as a fraction of a window.
        slice_dim: spatial axis along which windows are one slice thick, for a 2D network on a
            volume; None if the network has as many spatial axes as the image.
        sw_batch_size: number of windows that go through the network together.
        placement: `even` spaces the windows evenly; `monai` shifts the last one back into the
            image. Both need the same number of windows.
        mode: weights of a window's voxels, `gaussian` or `constant`.
        mirroring: mirror images of each window whose outputs are averaged; None for no mirroring.
        foreground_threshold: threshold between background and foreground, as its position between
            the lowest value of the image (0) and the brightest (1). Windows are spread over the
            bounding box of the foreground, and those without foreground are skipped; everything
            else becomes background. None computes windows over the whole image.
        head_top: direction of the top of the head, for images of heads: windows are spread only
            over the box that contains all structures (`localise`), often a single window. Needs
            `foreground_threshold`. None spreads windows over the whole foreground.
        padding_mode: how images smaller than a window are padded, a mode of torch; `constant` pads
            with zeros.
        add_background: whether a background channel with the logit 0 is put before the network's
            channels, for networks with sigmoid outputs.
        buffer_bytes: largest size of the windows' sums that are held at a time, bytes. The logits
            do not depend on it.

    Shapes:
        (B, C, *spatial) of any size → (B, classes, *spatial) float32; images smaller than a window
        are padded. For a network of several outputs (a sequence or a mapping), the result
        has the same structure, and each output keeps its resolution.

    Raises:
        ConfigError: `overlap` or `sw_batch_size` is out of range.
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
        padding_mode: str = "constant",
        add_background: bool = False,
        buffer_bytes: float = BUFFER_BYTES,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap: expected a fraction, 0 ≤ overlap < 1, got {overlap}")
        if sw_batch_size < 1:
            raise ConfigError(f"sw_batch_size: expected 1 or more, got {sw_batch_size}")
        self.roi_size, self.overlap, self.slice_dim = tuple(roi_size), overlap, slice_dim
        self.sw_batch_size, self.placement, self.mode = sw_batch_size, placement, mode
        self.mirroring, self.padding_mode = mirroring, padding_mode
        self.foreground_threshold, self.head_top = foreground_threshold, head_top
        self.add_background, self.buffer_bytes = add_background, buffer_bytes
        # what runs the network that a caller gives: the network itself, or a runtime of it
        self.runtime_of: Callable[[Any], Any] = _itself
        self.window = self.roi_size  # size of a window along the image's axes: slices are 1 thick
        if slice_dim is not None:
            self.window = (*self.roi_size[:slice_dim], 1, *self.roi_size[slice_dim:])

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return the logits of a batch of images; see the shapes of the class.

        Args:
            inputs: (B, C, *spatial) images.
            network: network, (B, C, *roi_size) → logits.
            args: further arguments of the network.
            kwargs: further arguments of the network; `scan` is left out.

        Raises:
            ShapeError: the inputs do not have the spatial axes of a window.
            VolumeError: the network gave logits that are NaN or infinite.
        """
        if inputs.ndim != len(self.window) + 2:
            raise ShapeError(
                f"input has shape {tuple(inputs.shape)}, expected (B, C, *spatial) with "
                f"{len(self.window)} spatial axes"
            )
        # MONAI Deploy passes every tensor that preprocessing leaves in a case to the network
        kwargs.pop(SCAN, None)
        network = self.runtime_of(network)
        is_batch = isinstance(inputs, MetaTensor) and inputs.is_batch
        # meta that was not collated is that of every image
        images = decollate_batch(inputs, detach=False) if is_batch else list(inputs)

        def bound(patch: torch.Tensor) -> Any:
            return network(patch, *args, **kwargs)

        results = []
        for image in images:
            results.append(with_host_fallback(partial(self._whole, image, bound), image))
        return _collated(results, is_batch=is_batch)

    def blocks(
        self,
        image: torch.Tensor,
        network: NetworkFunction,
        *,
        device: torch.device | None = None,
        buffer_bytes: float | None = None,
        agreement: DecisionAgreement | None = None,
    ) -> Iterator[ScoreBlock]:
        """Yield the logits of one image as finished blocks; each is computed when it is requested.

        Args:
            image: (C, *spatial) image, on the device of the network.
            network: network, (B, C, *roi_size) → logits.
            device: device that holds the sums of the windows; None takes the image's.
            buffer_bytes: largest size of the sums that are held at a time, bytes; None takes the
                inferer's own limit.
            agreement: counts how well mirror images agree; None counts nothing.

        Raises:
            VolumeError: the network gave logits that are NaN or infinite.
        """
        # in the generator, so that a caller's stopwatch counts placing as part of the first block
        started = self._start(image, network, device or image.device, agreement)
        yield from self._placed_blocks(started, buffer_bytes)

    def windows(
        self, shape: Sequence[int], channels: int, buffer_bytes: float | None = None
    ) -> WindowGrid:
        """Return the positions of the windows over a volume, grouped to keep the memory limit.

        Args:
            shape: size of the volume, voxels.
            channels: number of channels of the network's output.
            buffer_bytes: largest size of the sums that are held at a time, bytes; None takes the
                inferer's own limit.
        """
        least = [max(n, r) for n, r in zip(shape, self.window, strict=True)]
        grid = window_grid(least, self.window, self.overlap, self.placement)
        limit = self.buffer_bytes if buffer_bytes is None else buffer_bytes
        return group_windows(grid, channels, limit)

    def _start(
        self,
        image: torch.Tensor,
        network: NetworkFunction,
        device: torch.device,
        agreement: DecisionAgreement | None = None,
    ) -> _WindowPass:
        """Place the windows over an image (C, *spatial); the first one is computed."""
        plain = _replace_nonfinite(_plain(image).to(device, torch.float32))
        shape = tuple(plain.shape[1:])
        threshold = self.foreground_threshold
        level = None if threshold is None else foreground_level(plain, threshold)
        search = _LastWindow(network)
        region = self._region(plain, level, self._complete(search), image.device)
        padded, margins = pad_to_window(crop_box(plain, region), self.window, self.padding_mode)
        scores = WindowScores(
            padded,
            self._complete(average_mirrored(search, self.mirroring, agreement)),
            self.window,
            slice_dim=self.slice_dim,
            batch=self.sw_batch_size,
            device=image.device,
            cells=None if level is None else foreground_cells(padded, level),
        )
        search.forget()  # its first window has been computed
        return _WindowPass(
            scores=scores,
            size=tuple(padded.shape[1:]),
            margins=margins,
            region=region,
            shape=shape,
            device=device,
        )

    def _complete(self, network: NetworkFunction) -> NetworkFunction:
        """Return the network, with a background channel if the inferer adds one."""
        if not self.add_background:
            return network
        return lambda patch: with_background(network(patch))

    def _whole(self, image: torch.Tensor, network: NetworkFunction, device: torch.device) -> Any:
        """Return the logits of a whole image (C, *spatial), from one or from several outputs."""
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
        """Yield the blocks of the region, moved to their place in the whole image."""
        first = _single_output(started.scores.first)
        channels, channels_last = len(first), first.stride(0) == 1
        del first  # or it would be held until the last block
        grid = self.windows(started.size, channels, buffer_bytes)
        weights = importance_map(self.window, self.mode).to(started.device)
        found = aggregate(
            grid,
            started.scores,
            weights,
            channels,
            batch=self.sw_batch_size,
            channels_last=channels_last,
        )
        for block in found:
            start = tuple(s.start + i for s, i in zip(started.region, block.start, strict=True))
            # along a padded axis there is only one window, so that each block has all the padding
            scores = crop_padding(block.scores, started.margins)
            yield ScoreBlock(start=start, scores=scores, shape=started.shape)
            del block, scores  # or they would be held while the next one is computed

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
    """Return `compute(device of the image)`; if the GPU runs out of memory, `compute(CPU)`.

    Args:
        compute: function of the device that holds the sums of windows; the network itself stays on
            the image's device.
        image: image that is segmented. If it is a MetaTensor, it gets a warning in its `meta` when
            the GPU has run out of memory.
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


class _LastWindow:
    """A network that keeps its last output, and returns it when the same input comes again.

    The last window of the search for a brain is often the first window that is segmented then.

    Args:
        network: network, (B, C, *roi_size) → scores.
    """

    def __init__(self, network: NetworkFunction) -> None:
        self.network, self._keeps = network, True
        self._last: tuple[torch.Tensor, Any] | None = None

    def __call__(self, x: torch.Tensor) -> Any:
        if self._last is not None and torch.equal(self._last[0], x):
            return self._last[1]
        self._last = None  # frees its memory first
        output = self.network(x)
        if self._keeps:
            self._last = x, output
        return output

    def forget(self) -> None:
        """Free the memory of the last output, and keep no other."""
        self._last, self._keeps = None, False


def _itself(network: Any) -> Any:
    return network


def _single_output(scores: Any) -> torch.Tensor:
    if not isinstance(scores, torch.Tensor):
        raise ConfigError(
            "foreground_threshold: expected None for a network of several outputs, which have no "
            "common background"
        )
    return scores


@lru_cache(maxsize=4)
def importance_map(size: tuple[int, ...], mode: str) -> torch.Tensor:
    """Return MONAI's importance map: the weight of each voxel of a window, (*size) float32.

    Axes of length 1 are left out: a slice has the weights of a 2D window.

    Args:
        size: size of the window, voxels.
        mode: `gaussian` or `constant`.
    """
    kept = tuple(n for n in size if n > 1) or (1,)
    weights: torch.Tensor = compute_importance_map(
        kept, mode=mode, sigma_scale=GAUSSIAN_SIGMA, device="cpu"
    )
    return weights.reshape(size)


def _replace_nonfinite(image: torch.Tensor) -> torch.Tensor:
    """Return the image with the lowest finite value in place of NaN and infinities.

    A single NaN would make all scores of the windows that contain it NaN.
    """
    if torch.isfinite(image.sum()):
        return image
    finite = torch.isfinite(image)
    return torch.where(finite, image, image[finite].min() if finite.any() else torch.zeros(()))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    plain: torch.Tensor = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain


def _collated(results: list[Any], *, is_batch: bool) -> Any:
    """Return the results of several images as a batch: tensors with a first axis B.

    Args:
        results: one for each image.
        is_batch: whether their `meta` is collated, as that of the inputs was.
    """
    if not isinstance(results[0], torch.Tensor):
        return map_tensors(lambda *parts: torch.stack(parts), *results)
    if len({tuple(result.shape) for result in results}) > 1:
        raise ShapeError(
            "the images of one batch come from grids of different sizes: use a batch size of 1"
        )
    if is_batch:
        batch: torch.Tensor = collate_meta_tensor(results)
        return batch
    return torch.stack(results)
