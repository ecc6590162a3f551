"""Estimating the memory that a case needs, and limiting the windows' sums to what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ConfigError, VolumeError
from pipeline.inference.aggregator import FLOAT32_BYTES, buffer_bytes
from pipeline.inference.label_resampling import SLAB_VALUES
from pipeline.inference.process_memory import resident_bytes
from pipeline.inference.sliding_window import SLICES_PER_BATCH, WindowInferer
from pipeline.io import Grid, Header
from pipeline.transforms import network_grid_shape

if TYPE_CHECKING:
    from pipeline.inference.model import Model

SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Peak memory of each step, bytes per voxel, including the volume itself; measured on volumes of 4e7
# voxels
READ, CHECK, RESAMPLE, NORMALISE = 8, 13, 17, 13

REFINE = 6  # peak memory of the refinement, bytes per voxel of the label map; measured on a head
# number of copies of the box's scores that a cascade holds at its peak, its network included
CASCADE_COPIES = 6
PIECE_COPIES = 3.5  # number of copies of a piece of scores that the inversion holds at its peak


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Estimate of the memory that a case needs, bytes.

    Attributes:
        base: memory of the process before the case, after the network has run once.
        prepare: peak of reading, checking, resampling and normalising, in addition to `base`.
        network: peak of network, windows and inversion, in addition to `base`.
    """

    base: int
    prepare: int
    network: int

    @property
    def peak(self) -> int:
        """Peak memory of the process, bytes."""
        return self.base + max(self.prepare, self.network)


def parse_size(text: str) -> int:
    """Return the number of bytes in a size such as `4G`, `1500M` or `2.5GB` (powers of 1024).

    Raises:
        ConfigError: the text is not such a size, or the size is 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--max-memory {text}: expected a size such as 4G or 1500M")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def plan_memory(model: Model, headers: Sequence[Header]) -> float | None:
    """Return the size of windows' sums that a case may hold, so that `max_memory` is not exceeded.

    Args:
        model: opened bundle with `max_memory`.
        headers: headers of the case's files, one per channel.

    Returns:
        Largest size of the sums that are held at a time, bytes: the argument `buffer_bytes` of
        `predict_prepared`. None if the model has no limit or the inferer has no such sums.

    Raises:
        VolumeError: the case needs more than the limit; the message says how much.
    """
    limit = model.max_memory
    if limit is None:
        return None
    base = ready_bytes(model)
    allowed: float | None = None
    if isinstance(model.inferer, WindowInferer):
        allowed = limit - base - _bytes_besides_sums(model, headers)
        # 1 byte results in groups of a single window; the estimate decides whether that is enough
        allowed = max(1.0, allowed)
    needed = estimate_memory(model, headers, base, allowed).peak
    if needed > limit:
        raise VolumeError(
            f"needs about {_gib(needed)} of memory, --max-memory allows {_gib(limit)}; "
            "give more, crop the volume, or resample it to larger voxels"
        )
    return allowed


def estimate_memory(
    model: Model, headers: Sequence[Header], base: int, allowed: float | None = None
) -> MemoryEstimate:
    """Return an estimate of the memory that a case needs.

    Args:
        model: opened bundle.
        headers: headers of the case's files, one per channel.
        base: memory of the process before the case, bytes, from `ready_bytes`.
        allowed: limit of the buffer in which the logits of overlapping windows are
            summed, bytes; None for the inferer's own limit.
    """
    file_voxels = sum(prod(header.shape) for header in headers)
    grid = network_grid_shape(model.spec, headers[0])
    channels, voxels = len(model.spec.labels), prod(grid) * len(headers)
    raw = max(prod(header.shape) * header.bytes_per_voxel for header in headers)
    prepare = [READ * file_voxels + raw, CHECK * file_voxels, NORMALISE * voxels]
    if grid != tuple(headers[0].shape):
        prepare.append(RESAMPLE * max(file_voxels, voxels))
    if isinstance(model.inferer, WindowInferer):
        sums = buffer_bytes(model.inferer.windows(grid, channels, allowed), channels)
    else:
        sums = 2 * FLOAT32_BYTES * channels * prod(grid)  # whole logits, and their softmax
    network = sums + _bytes_besides_sums(model, headers)
    return MemoryEstimate(base=base, prepare=int(max(prepare)), network=int(network))


def _bytes_besides_sums(model: Model, headers: Sequence[Header]) -> int:
    """Return the memory of inference without the windows' sums, bytes.

    It consists of image, window, label map, the piece of scores that is inverted, and refinement.
    """
    spec, label_shape = model.spec, headers[0].shape
    spacing = model.preprocessing.reader.labels_spacing
    if spacing is not None:
        file_grid = Grid(affine=headers[0].affine, shape=headers[0].shape)
        label_shape = file_grid.with_spacing(spacing).shape
    grid = prod(network_grid_shape(spec, headers[0]))
    channels = len(spec.labels)
    windows = 2 * (SLICES_PER_BATCH if spec.spatial_dims == 2 else 1)  # input and output
    window = FLOAT32_BYTES * channels * prod(spec.roi_size) * windows
    piece = FLOAT32_BYTES * min(SLAB_VALUES, channels * grid)
    labels = 2 * prod(label_shape) * (1 if channels <= 256 else 4)
    if model.inversion.probabilities:
        labels += len(spec.outputs) * prod(label_shape)  # uint8
    refine = 0
    scan = FLOAT32_BYTES * sum(prod(header.shape) for header in headers) if spec.needs_scan else 0
    if spec.refine:  # the probability maps in float16, and the computation
        refine = 2 * len(spec.contested) * grid + REFINE * prod(label_shape)
    cascade = 0.0
    if model.inversion.cascade is not None:  # the first network's probabilities in float16
        box = FLOAT32_BYTES * channels * prod(model.inversion.cascade.spec.roi_size)
        cascade = CASCADE_COPIES * box + 2 * channels * grid
    image = FLOAT32_BYTES * grid * len(headers)
    return int(image + window + PIECE_COPIES * piece + labels + scan + refine + cascade)


@torch.no_grad()
def ready_bytes(model: Model) -> int:
    """Run the network once, on an empty window, and return the process's resident memory, bytes."""
    spec = model.spec
    model.network.eval()
    model.network(torch.zeros(1, len(spec.channels), *spec.roi_size, device=model.device))
    return resident_bytes()


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GB"
