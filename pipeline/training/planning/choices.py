"""Rules that choose the settings of spec and run from the dataset and the machine.

Each choice has a reason, which is written into the YAML files.

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

# nnU-Net's rule: along an axis whose voxels are this many times longer than along the others, the
# spacing is that of the finest cases (a percentile), because the median would blur them too much
ANISOTROPY = 3.0
FINE_PERCENTILE = 10
# slices of a 2D network are stacked along the axis of the longest voxels, if these are this many
# times longer than the shortest
SLICE_ANISOTROPY = 1.5
MIN_BOTTLENECK = 4  # smallest size of the bottleneck along each axis, voxels
MAX_POOLINGS = 5
# fraction of voxels that are exactly 0 above which a volume is taken to be skull-stripped
STRIPPED_ZEROS = 0.25
MAX_FEATURES = 320  # nnU-Net's limit of a 3D network
# channels of the network's first level: on a CPU, a network of this size takes enough steps in an
# hour
FIRST_FEATURES: dict[Processor, int] = {"cpu": 16, "gpu": 32}
# most voxels per step: on a CPU for the same reason, on a GPU because of its memory
MAX_STEP_VOXELS: dict[Processor, int] = {"cpu": 320_000, "gpu": 4_000_000}
PATCHES_PER_STEP = 4
SLICES_PER_STEP = 32
CASES_PER_STEP = 4  # number of cases that the slices of one step are taken from
# of AdamW; training with batch norm over 4 or more patches is stable at the higher one
LEARNING_RATE, LEARNING_RATE_SMALL_BATCH = 0.002, 0.001
# fraction of the time limit that is kept for reading the data and writing the bundle
RESERVED_TIME = 0.08
# The weights are averaged over about this fraction of the run's steps, but over at most
# MAX_AVERAGED_STEPS steps and at least MIN_AVERAGED_STEPS
AVERAGED_FRACTION = 0.1
MIN_AVERAGED_STEPS, MAX_AVERAGED_STEPS = 2, 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One setting of a spec or a run.

    Attributes:
        name: path of the setting, such as `spec.spacing` or `run.epochs`.
        value: the value, of a type that YAML can hold.
        reason: why the setting has this value, as text for the user.
    """

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Patch:
    """The patch size of a network and the strides of its poolings.

    Attributes:
        size: size of a patch along the network's axes, voxels.
        strides: strides of each pooling, one number per axis, from the top level.
        is_whole: whether a volume of the median size fits into one patch.
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
        fingerprints: fingerprints of all usable cases.
        labels: name → value in the label maps.
        channels: names of the channels.
        processor: kind of processor that trains.
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
    """Return the axis that slices are stacked along: the longest voxels, or the fewest."""
    if max(spacing) > SLICE_ANISOTROPY * min(spacing):
        return int(np.argmax(spacing))
    return int(np.argmin(shape))


def _choose_patch(
    shape: Sequence[float], spacing: Sequence[float], processor: Processor
) -> tuple[_Patch, int]:
    """Return the patch of a network, and the number of patches per step.

    Args:
        shape: median size of the cases along the network's axes, voxels.
        spacing: voxel size along the same axes, mm.
        processor: kind of processor that trains.
    """
    max_voxels = MAX_STEP_VOXELS[processor]
    if len(shape) == 2:
        return _fit_patch(shape, spacing, max_voxels), SLICES_PER_STEP
    batch_size = PATCHES_PER_STEP
    patch = _fit_patch(shape, spacing, max_voxels // batch_size)
    # sizes are rounded to multiples of the strides, which can make the patches of a step too large
    while batch_size > 2 and prod(patch.size) * batch_size > max_voxels:
        batch_size //= 2
    return patch, batch_size


def _fit_patch(shape: Sequence[float], spacing: Sequence[float], max_voxels: int) -> _Patch:
    """Return the largest patch of at most about `max_voxels` voxels, with its poolings.

    It has the proportions of `shape` and is at most as large. Each size is a multiple of the
    product of the strides along its axis.

    Args:
        shape: median size of the cases along the network's axes, voxels.
        spacing: voxel size along the same axes, mm.
        max_voxels: largest number of voxels, before sizes are rounded.
    """
    scale = min(1.0, (max_voxels / prod(shape)) ** (1 / len(shape)))
    target = [size * scale for size in shape]
    strides = _poolings(target, spacing)
    is_whole = scale == 1.0
    patch_size = []
    for axis, size in enumerate(target):
        step = prod(stride[axis] for stride in strides)
        # a patch that holds whole volumes is rounded up, so that they fit into it; 0.2 accepts one
        # that is a little smaller than the median, instead of a much larger one
        steps = ceil(size / step - 0.2) if is_whole else round(size / step)
        patch_size.append(step * max(1, steps))
    return _Patch(size=patch_size, strides=strides, is_whole=is_whole)


def _poolings(size: Sequence[float], spacing: Sequence[float]) -> list[list[int]]:
    """Return the strides of each pooling, for a patch of a size (voxels) at a spacing (mm)."""
    size, spacing = list(size), list(spacing)
    strides: list[list[int]] = []
    while len(strides) < MAX_POOLINGS:
        finest = min(spacing)
        stride = []
        for voxels, mm in zip(size, spacing, strict=True):
            # axes with longer voxels are pooled later: the voxels become closer to cubes
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
    """Return the run settings that depend on the time limit and on the measured times.

    These are precision, epochs, minutes, EMA decay and validation interval.

    Args:
        minutes: time limit of training, minutes.
        epochs: number of epochs, from `training_length`.
        steps_per_epoch: number of training steps in an epoch.
        times: times measured on this machine.
    """
    total_steps = epochs * steps_per_epoch
    averaged_steps = min(MAX_AVERAGED_STEPS, int(AVERAGED_FRACTION * total_steps))
    averaged_steps = max(MIN_AVERAGED_STEPS, averaged_steps)
    measured = ", ".join(f"{seconds:.2f} s in {name}" for name, seconds in times.steps.items())
    return [
        Choice(
            name="run.precision",
            value=times.precision,
            reason=f"the fastest on this machine: a step takes {measured}",
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
    """Return how many epochs fit into a time limit, and the expected seconds of the whole run.

    Args:
        minutes: time limit of the whole run, minutes.
        steps_per_epoch: number of training steps in an epoch.
        times: times measured on this machine.
    """
    epoch_seconds = steps_per_epoch * times.step
    other_seconds = times.around + times.validation
    seconds_for_epochs = 60 * minutes * (1 - RESERVED_TIME) - other_seconds
    epochs = max(1, int(seconds_for_epochs / epoch_seconds))
    return epochs, epochs * epoch_seconds + other_seconds


def nested_values(choices: Sequence[Choice], prefix: str) -> dict[str, Any]:
    """Return setting → value for the choices whose name starts with a prefix, such as `spec.`.

    The prefix is removed from the names.
    """
    values = {}
    for choice in choices:
        if choice.name.startswith(prefix):
            values[choice.name.removeprefix(prefix)] = choice.value
    return values
