"""How much memory a case will take, told before it starts, and the plan that keeps a limit."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import AXES, Spec
from pipeline.errors import ConfigError, VolumeError
from pipeline.inference.aggregator import FLOAT32, buffer_bytes
from pipeline.inference.invert import PIECE_VALUES
from pipeline.inference.predictor import Model, Prediction, predict_case
from pipeline.inference.sliding_window import WindowInferer
from pipeline.io import Header, isotropic_grid, read_header

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Bytes that a step holds a voxel at its highest, the volume itself included, as measured on volumes of 4e7 voxels
READ, CHECK, RESAMPLE, NORMALISE = 8, 13, 17, 13
REFINE = 6  # bytes a voxel of the label map, as measured on a head
PIECES = 3.5  # copies of one piece that inversion holds


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The memory that a case will take, bytes.

    Attributes:
        base: of the process before it, with the network ready to run.
        prepare: reading, checking, resampling and normalising hold so much above that at their highest.
        network: likewise the network, its windows and the inversion.
    """

    base: int
    prepare: int
    network: int

    @property
    def peak(self) -> int:
        """Of the process, at its highest."""
        return self.base + max(self.prepare, self.network)


def parse_size(text: str) -> int:
    """Bytes of `4G`, `1500M` or `2.5GB` (powers of 1024).

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--max-memory {text}: expected a size such as 4G or 1500M")
    return int(float(match[1]) * UNITS[match[2].upper()])


def predict_within(model: Model, image: Any, limit: int | None) -> Prediction:
    """`predict_case` in windows' cells so small that the process stays below a limit; the labels do not depend on it.

    Args:
        model: an opened bundle.
        image: a path, an image in memory, or a list of them, one a channel.
        limit: bytes of resident memory, the process's own included; None for no limit.

    Raises:
        VolumeError: the case needs more; the message says how much.
        PipelineError: the case cannot be read or segmented.
    """
    inferer = model.evaluator.inferer
    if limit is None:
        return predict_case(model, image)
    headers = [
        read_header(source) for source in (image if isinstance(image, list | tuple) else [image])
    ]
    found, held = plan_memory(model, headers, limit)
    if found.peak > limit:
        raise VolumeError(
            f"needs about {_gb(found.peak)} of memory, --max-memory allows {_gb(limit)}; "
            "give more, crop the volume, or resample it to larger voxels"
        )
    if not isinstance(inferer, WindowInferer):
        return predict_case(model, image)
    before, inferer.held_bytes = inferer.held_bytes, held
    try:
        return predict_case(model, image)
    finally:
        inferer.held_bytes = before


def plan_memory(model: Model, headers: list[Header], limit: float) -> tuple[MemoryEstimate, float]:
    """What a case will take under a limit, and the bytes of windows' sums that are then left to be held."""
    base = ready_bytes(model)
    held = float("inf")
    if isinstance(model.evaluator.inferer, WindowInferer):
        held = limit - base - _around(model, headers)
    return estimate_memory(model, headers, base, held), held


def estimate_memory(model: Model, headers: list[Header], base: int, held: float) -> MemoryEstimate:
    """The memory that a case will take.

    Args:
        model: an opened bundle.
        headers: of the case's files, one a channel.
        base: bytes that the process has, from `ready_bytes`.
        held: bytes of windows' sums that may be held, where the inferer can keep to that.
    """
    file_voxels = sum(prod(header.shape) for header in headers)
    grid = grid_shape(model.spec, headers[0])
    channels, voxels = len(model.spec.labels), prod(grid) * len(headers)
    raw = max(prod(header.shape) * header.bytes_per_voxel for header in headers)
    prepare = [READ * file_voxels + raw, CHECK * file_voxels, NORMALISE * voxels]
    if grid != tuple(headers[0].shape):
        prepare.append(RESAMPLE * max(file_voxels, voxels))
    inferer = model.evaluator.inferer
    if isinstance(inferer, WindowInferer):
        limited = WindowInferer(
            inferer.roi_size,
            inferer.overlap,
            slice_dim=inferer.slice_dim,
            placement=inferer.placement,
            held_bytes=held,
        )
        sums = buffer_bytes(limited.windows(grid, channels), channels)
    else:
        sums = 2 * FLOAT32 * channels * prod(grid)  # whole logits, and their softmax
    return MemoryEstimate(
        base=base, prepare=int(max(prepare)), network=int(sums + _around(model, headers))
    )


def _around(model: Model, headers: list[Header]) -> int:
    """Bytes that the network's stage holds beside the sums: image, window, labels, and the piece that is inverted."""
    spec, shape = model.spec, headers[0].shape
    spacing = getattr(model.preprocessing.transforms[0], "labels_spacing", None)
    if spacing is not None:
        _, shape = isotropic_grid(headers[0].affine, shape, spacing)
    grid = prod(grid_shape(spec, headers[0]))
    channels = len(spec.labels)
    window = FLOAT32 * channels * prod(spec.roi_size) * 2 * (16 if spec.spatial_dims == 2 else 1)
    piece = FLOAT32 * min(PIECE_VALUES, channels * grid)
    labels = 2 * prod(shape) * (1 if channels <= 256 else 4)
    refined = 0.0
    if spec.refine:  # the scan as read, probabilities in float16, and the voxels that are contested
        scan = sum(prod(header.shape) for header in headers)
        refined = FLOAT32 * scan + 2 * len(spec.contested) * grid + REFINE * prod(shape)
    return int(FLOAT32 * grid * len(headers) + window + PIECES * piece + labels + refined)


def grid_shape(spec: Spec, header: Header) -> tuple[int, ...]:
    """The size of a file on the network's grid, voxels: its axes turned to the spec's orientation, at the spec's spacing."""
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    world = np.abs(header.affine[:3, :3] / np.where(spacing, spacing, 1)).argmax(axis=0).tolist()
    sizes = []
    for code, mm in zip(spec.orientation, spec.spacing, strict=True):
        axis = world.index(AXES[code]) if AXES[code] in world else AXES[code]
        size = header.shape[axis]
        sizes.append(size if mm is None else round((size - 1) * spacing[axis] / mm + 1))
    return tuple(sizes)


@torch.no_grad()
def ready_bytes(model: Model) -> int:
    """The process's resident memory, bytes, when the network has run once."""
    spec = model.spec
    network = model.evaluator.network
    network.eval()
    network(torch.zeros(1, len(spec.channels), *spec.roi_size, device=model.evaluator.state.device))
    return resident_bytes()


def resident_bytes() -> int:
    """The process's resident memory, bytes."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The process's largest resident memory, bytes, since `reset_peak` (since its start where the kernel cannot say)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    """Starts the peak anew, where the kernel lets it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(key: str) -> int:
    """A size in the kernel's account of this process, bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def _gb(size: float) -> str:
    return f"{size / 2**30:.2f} GB"
