"""How much memory a case needs, estimated before it starts, and the plan that keeps a limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from pipeline.config import AXES, Spec
from pipeline.errors import ConfigError, VolumeError
from pipeline.inference.aggregator import FLOAT32_BYTES, buffer_bytes
from pipeline.inference.label_resampling import PIECE_VALUES
from pipeline.inference.model import Model
from pipeline.inference.process_memory import resident_bytes
from pipeline.inference.sliding_window import SLICES_PER_BATCH, WindowInferer
from pipeline.io import Grid, Header

SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Bytes per voxel that each step holds at its highest, the volume itself included, as measured on
# volumes of 4e7 voxels
READ, CHECK, RESAMPLE, NORMALISE = 8, 13, 17, 13

REFINE = 6  # bytes per voxel of the label map, as measured on a head
PIECE_COPIES = 3.5  # copies of one piece of scores that inversion holds


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The memory that a case needs, bytes.

    Attributes:
        base: of the process before the case, with the network ready to run.
        prepare: what reading, checking, resampling and normalising hold at their highest.
        network: what the network, its windows and the inversion hold at their highest.
    """

    base: int
    prepare: int
    network: int

    @property
    def peak(self) -> int:
        """The process's memory at its highest."""
        return self.base + max(self.prepare, self.network)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `4G`, `1500M` or `2.5GB` (powers of 1024).

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--max-memory {text}: expected a size such as 4G or 1500M")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def plan_memory(model: Model, headers: Sequence[Header]) -> float | None:
    """Return the bytes of windows' sums that a case may hold under the model's memory limit.

    Args:
        model: an opened bundle with `max_memory`.
        headers: of the case's files, one per channel.

    Returns:
        the argument `buffer_bytes` of the prediction; None for inferers without one.

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
        allowed = max(1.0, allowed)  # the smallest groups of windows, and the estimate decides
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
    """Return the memory that a case needs.

    Args:
        model: an opened bundle.
        headers: of the case's files, one per channel.
        base: bytes that the process holds before, from `ready_bytes`.
        allowed: bytes of windows' sums that may be held; the inferer's own by default.
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
    """Return what inference holds besides sums: image, window, labels, the piece being inverted."""
    spec, label_shape = model.spec, headers[0].shape
    spacing = model.preprocessing.reader.labels_spacing
    if spacing is not None:
        file_grid = Grid(affine=headers[0].affine, shape=headers[0].shape)
        label_shape = file_grid.with_spacing(spacing).shape
    grid = prod(network_grid_shape(spec, headers[0]))
    channels = len(spec.labels)
    windows = 2 * (SLICES_PER_BATCH if spec.spatial_dims == 2 else 1)  # input and output
    window = FLOAT32_BYTES * channels * prod(spec.roi_size) * windows
    piece = FLOAT32_BYTES * min(PIECE_VALUES, channels * grid)
    labels = 2 * prod(label_shape) * (1 if channels <= 256 else 4)
    refine = 0
    if spec.refine:  # the scan as read, probabilities in float16, and the contested voxels
        scan = sum(prod(header.shape) for header in headers)
        refine = FLOAT32_BYTES * scan + 2 * len(spec.contested) * grid + REFINE * prod(label_shape)
    image = FLOAT32_BYTES * grid * len(headers)
    return int(image + window + PIECE_COPIES * piece + labels + refine)


def network_grid_shape(spec: Spec, header: Header) -> tuple[int, ...]:
    """Return the size of a file on the network's grid, voxels.

    The file's axes are turned to the spec's orientation and resampled to its spacing.
    """
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    directions = header.affine[:3, :3] / np.where(spacing, spacing, 1)
    world = np.abs(directions).argmax(axis=0).tolist()  # the world axis of each file axis
    sizes = []
    for code, mm in zip(spec.orientation, spec.spacing, strict=True):
        axis = world.index(AXES[code]) if AXES[code] in world else AXES[code]
        size = header.shape[axis]
        sizes.append(size if mm is None else round((size - 1) * spacing[axis] / mm + 1))
    return tuple(sizes)


@torch.no_grad()
def ready_bytes(model: Model) -> int:
    """Return the process's resident memory, bytes, after the network has run once."""
    spec = model.spec
    model.network.eval()
    model.network(torch.zeros(1, len(spec.channels), *spec.roi_size, device=model.device))
    return resident_bytes()


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GB"
