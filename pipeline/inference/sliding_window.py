"""The network over a volume of any size, window by window, blended by a Gaussian."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

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
from pipeline.inference.foreground import (
    Box,
    crop_box,
    foreground_box,
    foreground_cells,
    foreground_level,
)
from pipeline.inference.localisation import Top, head_top, localise
from pipeline.inference.multi_output import aggregate_outputs, map_tensors
from pipeline.inference.overlap_tile import BackgroundInferer, build_tile_inferer
from pipeline.inference.rotation import average_rotations
from pipeline.inference.test_time_augmentation import Mirroring, average_mirrored, mirroring_of
from pipeline.inference.windows import WindowScores, crop_padding, pad_to_window

Finish = Callable[[Iterator[ScoreBlock], MetaTensor], torch.Tensor]
SLICES = 16  # of a volume that a 2D network sees at once
HELD_BYTES = 2**30  # of sums that are held without a memory limit; more gains no time
NETWORK_SECONDS = "network_seconds"  # key of `meta`: how much of the inferer's time went to windows


def build_inferer(
    spec: Spec,
    overlap: float | None = None,
    sw_batch_size: int | None = None,
    *,
    finish: Finish | None = None,
) -> Inferer:
    """The inferer of a spec: volumes by 3D windows, or slice by slice where roi_size has two numbers.

    A network without padding gets mirror-extended tiles whose outputs abut; one with a sigmoid output gets a background before
    its structures; rotated versions are averaged where asked for.

    Args:
        spec: gives roi_size, overlap and the axis of slices.
        overlap: of neighbouring windows, a fraction of roi_size, instead of the spec's.
        sw_batch_size: windows that go through the network together; 1 in 3D and 16 in 2D by default.
        finish: what is made of each image's blocks while they come; whole logits by default.

    Shapes: (B, C, X, Y, Z) of any size, (padded where smaller than the window) → logits (B, labels, X, Y, Z).

    Raises:
        ConfigError: an overlap that is not 0 ≤ overlap < 1.
    """
    overlap = spec.overlap if overlap is None else overlap
    if spec.tta_rotations > 1:  # averages whole volumes
        finish = None
    plain = _windows_or_tiles(spec, overlap, sw_batch_size, finish)
    return average_rotations(spec, BackgroundInferer(plain) if spec.output == "sigmoid" else plain)


def _windows_or_tiles(
    spec: Spec, overlap: float, sw_batch_size: int | None, finish: Finish | None
) -> Inferer:
    if not spec.network.padding:
        if overlap:
            raise ConfigError(
                f"overlap: expected 0 for a network without padding, whose tiles abut, got {overlap}"
            )
        return build_tile_inferer(spec, sw_batch_size)
    return WindowInferer(
        spec.roi_size,
        overlap,
        slice_dim=spec.slice_dim,
        sw_batch_size=sw_batch_size or (1 if spec.slice_dim is None else SLICES),
        mirroring=mirroring_of(spec),
        foreground_threshold=spec.foreground_threshold,
        head_top=head_top(spec) if spec.localise else None,
        finish=finish,
    )


class WindowInferer(Inferer):
    """A MONAI inferer that holds only what later windows still touch.

    Args:
        roi_size: of a window, voxels; the network's input.
        overlap: of neighbouring windows, a fraction of roi_size.
        slice_dim: the spatial axis that 2D windows are stacked along in a volume; None where the network has the image's rank.
        sw_batch_size: windows that go through the network together.
        placement: `even` spaces windows evenly, `monai` shifts the last one back; both take equally many.
        mode: `gaussian` or `constant`, the weight of a window's voxels.
        mirroring: the mirror images of a window that are averaged in; None for none.
        foreground_threshold: fraction of the way from an image's lowest value to its brightest below which it is air (`pipeline.air`): windows
            are spread over the box of what is above, those that hold nothing of it are not looked at, and all else is
            background; None looks at all.
        head_top: where a head's top is, for images whose structures one window holds: it is placed over them, and only where they
            do not fit in are windows spread (`pipeline.focus`); needs `air`. None always spreads.
        held_bytes: of sums that may be held at a time; the result does not depend on it.
        finish: what is made of each image's blocks while they come; whole logits by default.

    Shapes: (B, C, *spatial) of any size, padded by 0 where smaller than the window → (B, classes, *spatial) float32, or what
        `finish` gives. A network of several outputs (a sequence or a mapping) gives the same structure of whole logits, those
        of a lower resolution at theirs.
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
        head_top: Top | None = None,
        held_bytes: float = HELD_BYTES,
        finish: Finish | None = None,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap: expected a fraction, 0 ≤ overlap < 1, got {overlap}")
        if sw_batch_size < 1:
            raise ConfigError(f"sw_batch_size: expected 1 or more, got {sw_batch_size}")
        self.roi_size, self.overlap, self.slice_dim = tuple(roi_size), overlap, slice_dim
        self.sw_batch_size, self.placement, self.mode = sw_batch_size, placement, mode
        self.mirroring, self.foreground_threshold, self.head_top = (
            mirroring,
            foreground_threshold,
            head_top,
        )
        self.held_bytes, self.finish = held_bytes, finish
        self.roi = (
            self.roi_size
            if slice_dim is None
            else (*self.roi_size[:slice_dim], 1, *self.roi_size[slice_dim:])
        )

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """See the class.

        Raises:
            ShapeError: an input whose rank does not fit roi_size.
            VolumeError: scores that are NaN or infinite.
        """
        if inputs.ndim != len(self.roi) + 2:
            raise ShapeError(
                f"input has shape {tuple(inputs.shape)}, expected (B, C, *spatial) with {len(self.roi)} spatial axes"
            )
        items = (
            decollate_batch(inputs, detach=False)
            if isinstance(inputs, MetaTensor)
            else list(inputs)
        )
        return _collated(
            [self._one(item, lambda patch: network(patch, *args, **kwargs)) for item in items]
        )

    def windows(self, shape: Sequence[int], channels: int) -> WindowGrid:
        """Where windows lie over a volume of (*spatial) voxels, and how they are grouped for so many classes."""
        least = [max(n, r) for n, r in zip(shape, self.roi, strict=True)]
        return group_windows(
            window_grid(least, self.roi, self.overlap, self.placement), channels, self.held_bytes
        )

    def _one(
        self,
        item: torch.Tensor,
        network: Callable[[torch.Tensor], Any],
        device: torch.device | None = None,
    ) -> Any:
        """One image; where a GPU's memory does not do, once more with image and sums on the host."""
        try:
            return self._attempt(item, network, device or item.device)
        except torch.OutOfMemoryError:
            if device is not None or item.device.type == "cpu":
                raise
        _warn(
            item,
            "the GPU's memory did not do for the whole image: windows were put together on the host",
        )
        return self._attempt(item, network, torch.device("cpu"))

    def _attempt(
        self, item: torch.Tensor, network: Callable[[torch.Tensor], Any], device: torch.device
    ) -> Any:
        image = _finite(_plain(item).to(device, torch.float32))
        shape = tuple(image.shape[1:])
        above = (
            None
            if self.foreground_threshold is None
            else foreground_level(image, self.foreground_threshold)
        )
        started = time.perf_counter()
        inside = self._inside(image, above, network, item.device)
        placing = time.perf_counter() - started
        image, margins = pad_to_window(crop_box(image, inside), self.roi)
        cells = None if above is None else foreground_cells(image, above)
        look = WindowScores(
            image,
            average_mirrored(network, self.mirroring),
            self.roi,
            slice_dim=self.slice_dim,
            batch=self.sw_batch_size,
            device=item.device,
            cells=cells,
        )
        look.seconds.append(placing)
        if self.foreground_threshold is None and not isinstance(look.first, torch.Tensor):
            return aggregate_outputs(
                self.windows(image.shape[1:], 1),
                look,
                look.first,
                lambda roi: importance_map(roi, self.mode),
            )
        channels = len(_one_output(look.first))
        windows = self.windows(image.shape[1:], channels)
        weights = importance_map(self.roi, self.mode).to(device)
        found = aggregate(windows, look, weights, channels, batch=self.sw_batch_size)
        result = (self.finish or assemble)(_each(found, margins, inside, shape, look.seconds), item)
        if isinstance(result, MetaTensor):
            result.meta[NETWORK_SECONDS] = sum(look.seconds)
        return result

    def _inside(
        self,
        image: torch.Tensor,
        above: float | None,
        network: Callable[[torch.Tensor], Any],
        device: torch.device,
    ) -> Box:
        """The part of an image that windows are spread over."""
        if above is None:
            return tuple(slice(0, n) for n in image.shape[1:])
        inside = foreground_box(image, above, self.roi)
        if self.head_top is None:
            return inside

        plain = WindowInferer(self.roi_size, self.overlap, sw_batch_size=self.sw_batch_size)

        def scores(at: Box) -> torch.Tensor:
            found = plain(crop_box(image, at)[None].to(device), network)
            return _one_output(found)[0]

        return localise(image, inside, self.roi, self.head_top, above, scores)


def _one_output(found: Any) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise ConfigError(
            "air: expected None for a network of several outputs, which have no background in common"
        )
    return found


@lru_cache(maxsize=4)
def importance_map(roi_size: tuple[int, ...], mode: str) -> torch.Tensor:
    """The weight of each voxel of a window, (*roi_size) float32, as MONAI has it; axes of 1 do not count."""
    kept = tuple(n for n in roi_size if n > 1) or (1,)
    weights: torch.Tensor = compute_importance_map(kept, mode=mode, sigma_scale=0.125, device="cpu")
    return weights.reshape(roi_size)


def _finite(image: torch.Tensor) -> torch.Tensor:
    """NaN and infinities become the smallest finite value, or one such voxel would spoil its windows."""
    if torch.isfinite(image.sum()):
        return image
    good = torch.isfinite(image)
    return torch.where(good, image, image[good].min() if good.any() else torch.zeros(()))


def _placed(
    block: ScoreBlock, margins: Sequence[int], inside: Sequence[slice], shape: tuple[int, ...]
) -> ScoreBlock:
    """A block in the whole volume, without the padding of a small image; along a padded axis there is one window."""
    start = tuple(s.start + i for s, i in zip(inside, block.start, strict=True))
    return ScoreBlock(start=start, scores=crop_padding(block.scores, margins), shape=shape)


def _each(
    pieces: Iterator[ScoreBlock],
    margins: Sequence[int],
    inside: Sequence[slice],
    shape: tuple[int, ...],
    seconds: list[float],
) -> Iterator[ScoreBlock]:
    """Blocks in their place, each let go before the next is made; notes how long that took."""
    while True:
        started = time.perf_counter()
        block = next(pieces, None)
        seconds.append(time.perf_counter() - started)
        if block is None:
            return
        block = _placed(block, margins, inside, shape)
        yield block
        del block


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    plain: torch.Tensor = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain


def _warn(item: torch.Tensor, line: str) -> None:
    if isinstance(item, MetaTensor):
        item.meta["warnings"] = "\n".join(filter(None, [str(item.meta.get("warnings", "")), line]))


def _collated(results: list[Any]) -> Any:
    """One result an image as a batch."""
    if not isinstance(results[0], torch.Tensor):
        return map_tensors(lambda *parts: torch.stack(parts), *results)
    if len({tuple(result.shape) for result in results}) > 1:
        raise ShapeError(
            "the images of one batch come from grids of different sizes: use a batch size of 1"
        )
    batch: torch.Tensor = (
        collate_meta_tensor(results) if isinstance(results[0], MetaTensor) else torch.stack(results)
    )
    return batch
