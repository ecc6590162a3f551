"""The settings of spec and run that follow from the fingerprints and the machine, with reasons.

References:
    Isensee et al.: nnU-Net. Nature Methods 18, 203-211 (2021), doi:10.1038/s41592-020-01008-z:
    spacing, patch and poolings from the fingerprint of a dataset. Here the time that training may
    take decides as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from statistics import median
from typing import Any, Literal

import numpy as np

from pipeline.training.planning.fingerprint import Fingerprint
from pipeline.training.planning.timing import TrainingTimes

Processor = Literal["cpu", "gpu"]

# nnU-Net's rule: an axis with voxels this many times longer than the others' is resampled to the
# spacing of its finer cases, because the median would blur them most
ANISOTROPY = 3.0
# an axis is the one across slices if its voxels are this many times longer than the shortest
SLICE_ANISOTROPY = 1.5
FINE_PERCENTILE = 10
MIN_BOTTLENECK = 4  # voxels along each axis at the lowest level
MAX_POOLINGS = 5
# fraction of voxels that are exactly 0 above which a volume is taken to be skull-stripped
STRIPPED_ZEROS = 0.25
MAX_FEATURES = 320  # nnU-Net's limit of a 3D network
# features of the first level: what trains often enough in an hour on a CPU, and on a GPU
FIRST_FEATURES: dict[Processor, int] = {"cpu": 16, "gpu": 32}
# voxels per step: likewise on a CPU; what a GPU's memory holds
MAX_STEP_VOXELS: dict[Processor, int] = {"cpu": 320_000, "gpu": 4_000_000}
PATCHES_PER_STEP = 4
SLICES_PER_STEP = 32
CASES_PER_STEP = 4  # that the slices of a step are taken from
# of AdamW; batch norm with 4 or more patches bears the higher one
LEARNING_RATE, LEARNING_RATE_SMALL_BATCH = 0.002, 0.001
# of the time, for reading the data before training and writing the bundle after it
RESERVED_TIME = 0.08
# steps that the average of the weights reaches back over: a tenth of the run, at most these
MAX_AVERAGED_STEPS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One setting of a spec or a run.

    Attributes:
        name: path of the setting, such as `spec.spacing` or `run.epochs`.
        value: as YAML holds it.
        reason: why it has this value.
    """

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Patch:
    """The patch of a network and its poolings.

    Attributes:
        size: voxels along the network's axes.
        strides: per pooling, the factor along each axis.
        is_whole: whether the typical volume fits in.
    """

    size: list[int]
    strides: list[list[int]]
    is_whole: bool


def choose_settings(
    fingerprints: Sequence[Fingerprint],
    labels: Mapping[str, int],
    channels: Sequence[str],
    processor: Processor,
    dims: int = 3,
) -> list[Choice]:
    """Return the settings of spec and run that follow from the data and the machine.

    Precision and length of training are chosen later, by `choose_duration`.

    Args:
        fingerprints: of all usable cases.
        labels: name → value.
        channels: names of the channels.
        processor: the one that trains.
        dims: 2 for a network of slices, 3 for one of volumes.
    """
    spacing = _choose_spacing(fingerprints)
    shape = _median_shape(fingerprints, spacing.value)
    slice_axis = _slice_axis(shape, spacing.value) if dims == 2 else None
    axes = [axis for axis in range(3) if axis != slice_axis]
    patch, batch_size = _choose_patch(
        [shape[axis] for axis in axes], [spacing.value[axis] for axis in axes], processor
    )
    choices = [
        Choice(name="spec.labels", value=dict(labels), reason="as the dataset defines them"),
        Choice(name="spec.channels", value=list(channels), reason="one file per channel"),
        spacing,
        _choose_intensity(fingerprints),
        _choose_roi_size(patch, shape, processor),
        _choose_network(patch, batch_size, processor),
        *_choose_batch(batch_size, dims),
        Choice(
            name="run.augment",
            value={"mirror": []},
            reason="if no label belongs to one side, mirror images ([R]) double the data",
        ),
    ]
    if slice_axis is not None:
        choices += _choose_slices(slice_axis, batch_size)
    return choices


def _choose_spacing(fingerprints: Sequence[Fingerprint]) -> Choice:
    """Choose the spacing along right, anterior and superior, mm."""
    spacings = np.array([fingerprint.spacing for fingerprint in fingerprints])
    chosen = np.median(spacings, axis=0)
    reason = "the cases' median"
    coarse_axis = int(np.argmax(chosen))
    in_plane = float(np.delete(chosen, coarse_axis).max())
    if chosen[coarse_axis] > ANISOTROPY * in_plane:
        fine = float(np.percentile(spacings[:, coarse_axis], FINE_PERCENTILE))
        chosen[coarse_axis] = max(fine, in_plane)
        reason = "the cases' median; their tenth percentile along the axis of thick slices"
    elif np.allclose(spacings, chosen, rtol=0.01):
        reason = "that of all cases"
    return Choice(name="spec.spacing", value=[round(float(mm), 3) for mm in chosen], reason=reason)


def _median_shape(fingerprints: Sequence[Fingerprint], spacing: Sequence[float]) -> list[float]:
    """Return the median size of the cases at a spacing, voxels along each axis."""
    shapes = []
    for fingerprint in fingerprints:
        field_of_view = np.multiply(fingerprint.shape, fingerprint.spacing)
        shapes.append(field_of_view / spacing)
    return [float(size) for size in np.median(shapes, axis=0)]


def _slice_axis(shape: Sequence[float], spacing: Sequence[float]) -> int:
    """Return the axis across slices: that of the longest voxels, else of the fewest voxels."""
    if max(spacing) > SLICE_ANISOTROPY * min(spacing):
        return int(np.argmax(spacing))
    return int(np.argmin(shape))


def _choose_patch(
    shape: Sequence[float], spacing: Sequence[float], processor: Processor
) -> tuple[_Patch, int]:
    """Return the patch of a network, and how many of them make a step.

    Args:
        shape: median size of the cases along the network's axes, voxels.
        spacing: along the same axes, mm.
        processor: the one that trains.
    """
    most = MAX_STEP_VOXELS[processor]
    if len(shape) == 2:
        return _fit_patch(shape, spacing, most), SLICES_PER_STEP
    batch_size = PATCHES_PER_STEP
    patch = _fit_patch(shape, spacing, most // batch_size)
    # rounding up to whole poolings can make a patch too large for so many of them
    while batch_size > 2 and prod(patch.size) * batch_size > most:
        batch_size //= 2
    return patch, batch_size


def _fit_patch(shape: Sequence[float], spacing: Sequence[float], max_voxels: int) -> _Patch:
    """Return the largest patch with the proportions of the typical volume, and its poolings."""
    scale = min(1.0, (max_voxels / prod(shape)) ** (1 / len(shape)))
    target = [size * scale for size in shape]
    strides = _poolings(target, spacing)
    is_whole = scale == 1.0
    patch_size = []
    for axis, size in enumerate(target):
        step = prod(stride[axis] for stride in strides)
        # a whole volume is padded up to the next multiple, unless it is only just above one
        steps = ceil(size / step - 0.2) if is_whole else round(size / step)
        patch_size.append(step * max(1, steps))
    return _Patch(size=patch_size, strides=strides, is_whole=is_whole)


def _poolings(size: Sequence[float], spacing: Sequence[float]) -> list[list[int]]:
    """Return the strides of the poolings for a patch of a size (voxels) at a spacing (mm)."""
    size, spacing = list(size), list(spacing)
    strides: list[list[int]] = []
    while len(strides) < MAX_POOLINGS:
        finest = min(spacing)
        stride = []
        for voxels, mm in zip(size, spacing, strict=True):
            # pooling the finer axes first brings the voxels closer to cubes
            pooled = voxels / 2 >= MIN_BOTTLENECK and mm < 2 * finest
            stride.append(2 if pooled else 1)
        if max(stride) == 1:
            break
        strides.append(stride)
        size = [voxels / factor for voxels, factor in zip(size, stride, strict=True)]
        spacing = [mm * factor for mm, factor in zip(spacing, stride, strict=True)]
    return strides


def _choose_intensity(fingerprints: Sequence[Fingerprint]) -> Choice:
    zeros = median(fingerprint.zero_fraction for fingerprint in fingerprints)
    stripped = zeros > STRIPPED_ZEROS
    reason = f"MRI has no scale of its own; {zeros:.0%} of a volume's voxels are 0"
    return Choice(
        name="spec.intensity",
        value={"method": "zscore", "nonzero": stripped},
        reason=f"{reason}, so only the others count" if stripped else reason,
    )


def _choose_roi_size(patch: _Patch, shape: Sequence[float], processor: Processor) -> Choice:
    sizes = "×".join(f"{size:.0f}" for size in shape)
    reason = f"the median volume has {sizes} voxels at that spacing"
    if not patch.is_whole:
        reason += f"; a step may have {MAX_STEP_VOXELS[processor]:,} on this {processor}"
    return Choice(name="spec.roi_size", value=patch.size, reason=reason)


def _choose_network(patch: _Patch, batch_size: int, processor: Processor) -> Choice:
    features = []
    for level in range(len(patch.strides) + 1):
        features.append(min(MAX_FEATURES, FIRST_FEATURES[processor] * 2**level))
    # the statistics of batch norm are too noisy over one or two patches
    norm = "batch" if batch_size > 2 else "instance"
    return Choice(
        name="spec.network",
        value={"features": features, "strides": patch.strides, "norm": norm},
        reason=f"poolings down to {MIN_BOTTLENECK} voxels or more, "
        "and none along an axis twice as coarse as the finest",
    )


def _choose_batch(batch_size: int, dims: int) -> list[Choice]:
    rate = LEARNING_RATE if batch_size > 2 else LEARNING_RATE_SMALL_BATCH
    return [
        Choice(
            name="run.batch_size",
            value=batch_size,
            reason="patches per step" if dims == 3 else "slices per step",
        ),
        Choice(
            name="run.learning_rate",
            value=rate,
            reason=f"for AdamW with {batch_size} patches per step",
        ),
    ]


def _choose_slices(axis: int, batch_size: int) -> list[Choice]:
    return [
        Choice(
            name="spec.slice_axis",
            value="RAS"[axis],
            reason="the axis with the longest voxels, or the fewest",
        ),
        Choice(
            name="run.patches_per_case",
            value=batch_size // CASES_PER_STEP,
            reason="the slices of a step are taken from several cases",
        ),
    ]


def choose_duration(
    minutes: float, epochs: int, steps_per_epoch: int, times: TrainingTimes
) -> list[Choice]:
    """Return the settings of the run that follow from the measured times.

    Args:
        minutes: that training may take.
        epochs: from `training_length`.
        steps_per_epoch: of training.
        times: measured on this machine.
    """
    averaged_steps = max(2, min(MAX_AVERAGED_STEPS, epochs * steps_per_epoch // 10))
    steps = ", ".join(f"{seconds:.2f} s in {name}" for name, seconds in times.steps.items())
    return [
        Choice(
            name="run.precision",
            value=times.precision,
            reason=f"the fastest on this machine: a step takes {steps}",
        ),
        Choice(
            name="run.epochs",
            value=epochs,
            reason=f"{steps_per_epoch} steps of {times.step:.2f} s each, measured here",
        ),
        Choice(
            name="run.minutes",
            value=minutes,
            reason="the most that training may take; the learning rate falls to 0 by then",
        ),
        Choice(
            name="run.ema_decay",
            value=round(1 - 1 / averaged_steps, 4),
            reason="the weights that are kept are an average over the last steps",
        ),
        Choice(
            name="run.validate_every",
            value=epochs,
            reason=f"once, at the end; each validation takes {times.validation:.0f} s",
        ),
    ]


def training_length(
    minutes: float, steps_per_epoch: int, times: TrainingTimes
) -> tuple[int, float]:
    """Return how many epochs fit into a time, and the seconds that the whole run then takes.

    Args:
        minutes: that training may take in all.
        steps_per_epoch: of training.
        times: measured on this machine.
    """
    epoch = steps_per_epoch * times.step
    other = times.around + times.validation
    room = 60 * minutes * (1 - RESERVED_TIME) - other
    epochs = max(1, int(room / epoch))
    return epochs, epochs * epoch + other


def nested_values(choices: Sequence[Choice], prefix: str) -> dict[str, Any]:
    """Return the values of all choices whose name starts with a prefix, by the rest of the name."""
    values = {}
    for choice in choices:
        if choice.name.startswith(prefix):
            values[choice.name.removeprefix(prefix)] = choice.value
    return values
