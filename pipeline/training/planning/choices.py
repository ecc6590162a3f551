"""Rules that choose the settings of spec and run from the dataset and the machine.

Each choice has a reason, and what nnU-Net would choose where that is comparable. Both are written
into the YAML files.

References:
    Isensee et al.: nnU-Net. Nature Methods 18, 203-211 (2021), doi:10.1038/s41592-020-01008-z:
    spacing, patch and poolings from the fingerprint of a dataset. Here the time that training may
    take decides as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from statistics import fmean, median, pstdev
from typing import Any, Literal

import numpy as np

from pipeline.io import Layout
from pipeline.training.planning.fingerprint import AIR, Fingerprint
from pipeline.training.planning.patch import (
    PATCHES_PER_STEP,
    SEEN_ENOUGH,
    Patch,
    coarser_spacing,
    plan_patch,
)
from pipeline.training.planning.presets import PRESETS, Preset, PresetName
from pipeline.training.planning.sides import mirror_problem
from pipeline.training.planning.timing import TrainingTimes
from pipeline.training.planning.topology import Topology

Processor = Literal["cpu", "gpu"]

# nnU-Net's rule: along an axis whose voxels are this many times longer than along the others, and
# that has as many times fewer of them, the spacing is that of the finest cases (a percentile),
# because the median would blur them too much
ANISOTROPY = 3.0
FINE_PERCENTILE = 10
# slices of a 2D network are stacked along the axis of the longest voxels, if these are this many
# times longer than the shortest
SLICE_ANISOTROPY = 1.5
# fraction of voxels that are exactly 0 above which a volume is taken to be skull-stripped
STRIPPED_ZEROS = 0.25
# percentiles at which a channel is clipped before its z-score: up to a thousandth of the voxels may
# be spikes or marks; bright lesions and vessels are larger
CLIPPED_BELOW, CLIPPED_ABOVE = 0.1, 99.9
# from this fraction of air, windows without anything else are not segmented, provided that at most
# this fraction of the labelled voxels is as dark
MOSTLY_AIR, LABELLED_AIR = 0.3, 0.02
# along R, mm: smaller volumes are crops, which may show one side of the body only
BODY_MM = 100.0
# the largest label has this many times the voxels of the smallest: patches are drawn by label
RARE = 20
# with more labels than this, a short run weighs them in the loss (`balance`)
MANY_LABELS, BALANCE = 8, 0.75
MAX_FEATURES = 320  # nnU-Net's limit of a 3D network
# channels of the network's first level: on a CPU, a network of this size takes enough steps in an
# hour
FIRST_FEATURES: dict[Processor, int] = {"cpu": 16, "gpu": 32}
# most voxels per step: on a CPU for the same reason, on a GPU because of its memory
MAX_STEP_VOXELS: dict[Processor, int] = {"cpu": 320_000, "gpu": 4_000_000}
CASES_PER_STEP = 4  # number of cases that the slices of one step are taken from
# an epoch has this many steps at least, because a checkpoint is written after each
MIN_STEPS_PER_EPOCH = 20
# of AdamW; training with batch norm over 4 or more patches is stable at the higher one
LEARNING_RATE, LEARNING_RATE_SMALL_BATCH = 0.002, 0.001
# fraction of the time limit that is kept for what the measured times do not hold, such as a busy
# machine
RESERVED_TIME = 0.05
# The weights are averaged over about this fraction of the run's steps, but over at most
# MAX_AVERAGED_STEPS steps and at least MIN_AVERAGED_STEPS
AVERAGED_FRACTION = 0.1
MIN_AVERAGED_STEPS, MAX_AVERAGED_STEPS = 2, 200
# Steps that a run has to have for its networks to be worth training: with fewer, a second network,
# outputs of lower levels and residual blocks cost more than they give
ENSEMBLE_STEPS, DEEP_STEPS, RESIDUAL_STEPS = 2500, 2500, 5000
MIN_STEPS = 250  # a run with fewer steps finds large structures only


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One setting of a spec or a run.

    Attributes:
        name: path of the setting, such as `spec.spacing` or `run.epochs`.
        value: the value, of a type that YAML can hold.
        reason: why the setting has this value, as text for the user.
        nnunet: what nnU-Net calls or chooses here; empty where it has no such choice.
    """

    name: str
    value: Any
    reason: str
    nnunet: str = ""

    @property
    def explanation(self) -> str:
        """Reason and equivalent in nnU-Net, as one line."""
        return f"{self.reason}; nnU-Net: {self.nnunet}" if self.nnunet else self.reason


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """The grid that a network is trained on.

    Attributes:
        spacing: voxel size along right, anterior, superior, mm.
        reason: why.
        shape: median size of the cases at that spacing, voxels.
        region: median size at that spacing of the part that holds the structures, voxels; the whole
            volume if a patch holds that.
        patch: patch of the network.
        finest: spacing before it was made coarser for the patch to see enough, mm.
    """

    spacing: list[float]
    reason: str
    shape: list[float]
    region: list[float]
    patch: Patch
    finest: list[float]

    @property
    def is_coarser(self) -> bool:
        """Whether the spacing is coarser than that of the data."""
        return self.spacing != self.finest


def choose_settings(
    fingerprints: Sequence[Fingerprint],
    labels: Mapping[str, int],
    layout: Layout,
    processor: Processor,
    dims: int = 3,
    *,
    preset: PresetName = "balanced",
    training_cases: int | None = None,
) -> list[Choice]:
    """Return the settings of spec and run that follow from the data and the machine.

    Precision and length of training are chosen later, by `choose_duration`, and a larger network by
    `choose_larger_network`.

    Args:
        fingerprints: fingerprints of all usable cases.
        labels: name → value in the label maps.
        layout: what the dataset states about its channels, regions and ignored voxels.
        processor: kind of processor that trains.
        dims: 2 for a network of slices, 3 for one of volumes.
        preset: how much of the time is spent on accuracy.
        training_cases: number of cases that a fold trains on; None for all.
    """
    options = PRESETS[preset]
    channels = layout.channels or ("MR",)
    slice_axis = _slice_axis(_median_spacing(fingerprints)) if dims == 2 else None
    grid = _choose_grid(fingerprints, processor, options, slice_axis)
    problem = mirror_problem(labels, fingerprints)
    choices = [
        *_choose_labels(labels, layout),
        Choice(name="spec.channels", value=list(channels), reason="one file per channel"),
        Choice(
            name="spec.spacing",
            value=grid.spacing,
            reason=grid.reason,
            nnunet="3d_lowres without its cascade" if grid.is_coarser else "3d_fullres",
        ),
        *_choose_intensities(fingerprints, channels, layout.modalities),
        _choose_roi_size(grid, processor),
        *_choose_foreground(fingerprints),
        _choose_network(grid.patch, processor, options),
        *_choose_batch(grid.patch, dims, training_cases or len(fingerprints)),
        *_choose_sampling(fingerprints, grid.patch),
        *_choose_balance(fingerprints, layout, processor),
        _choose_mirror(problem, grid),
    ]
    if slice_axis is not None:
        choices.append(_choose_slices(slice_axis))
    if options.tta_mirror and not problem and slice_axis != 0:
        reason = "the preset best segments the mirrored image too; no label has a side"
        choices.append(Choice(name="spec.tta_mirror", value=["R"], reason=reason))
    return choices


def _choose_labels(labels: Mapping[str, int], layout: Layout) -> list[Choice]:
    choices = [
        Choice(name="spec.labels", value=dict(labels), reason="as the dataset defines them"),
    ]
    if layout.regions:
        choices += [
            Choice(
                name="spec.output",
                value="regions",
                reason="the dataset's labels are regions, which overlap: one sigmoid for each",
                nnunet="region-based training; the order of the labels is regions_class_order",
            ),
            Choice(
                name="spec.regions",
                value={name: list(values) for name, values in layout.regions.items()},
                reason="the values in the label maps that make up each region",
            ),
        ]
    if layout.ignore_label is not None:
        reason = "voxels with this value count neither in training nor in scores"
        choices.append(
            Choice(
                name="spec.ignore_label",
                value=layout.ignore_label,
                reason=reason,
                nnunet="the label `ignore`",
            )
        )
    return choices


def _choose_grid(
    fingerprints: Sequence[Fingerprint],
    processor: Processor,
    options: Preset,
    slice_axis: int | None,
) -> _Grid:
    """Choose spacing and patch: coarser voxels where a patch would see too little."""
    spacing, reason = _choose_spacing(fingerprints)
    step_voxels = int(MAX_STEP_VOXELS[processor] * options.step_factor)
    finest = spacing
    grid = _grid_at(spacing, fingerprints, step_voxels, slice_axis)
    while grid.patch.seen < SEEN_ENOUGH:
        spacing = coarser_spacing(spacing).tolist()
        grid = _grid_at(spacing, fingerprints, step_voxels, slice_axis)
    finest = [round(mm, 3) for mm in finest]
    if spacing == finest or grid.spacing == finest:
        return replace(grid, reason=reason, finest=finest)
    at_finest = _grid_at(finest, fingerprints, step_voxels, slice_axis)
    fine = "×".join(f"{mm:g}" for mm in finest)
    return replace(
        grid,
        finest=finest,
        reason=f"coarser than the data ({fine} mm): there a patch would see "
        f"{at_finest.patch.seen:.0%} of the region of the structures, here {grid.patch.seen:.0%}. "
        "One network, because a second one at the finer spacing would share the same minutes",
    )


def _grid_at(
    spacing: Sequence[float],
    fingerprints: Sequence[Fingerprint],
    step_voxels: int,
    slice_axis: int | None,
) -> _Grid:
    """Return the grid of a spacing, with its patch."""
    mm = [round(float(value), 3) for value in spacing]
    axes = [axis for axis in range(3) if axis != slice_axis]
    shape = _median_shape(fingerprints, mm)
    own_spacing = [mm[axis] for axis in axes]
    region = shape
    patch = plan_patch([shape[axis] for axis in axes], own_spacing, step_voxels)
    if not patch.is_whole:
        region = _median_region(fingerprints, mm)
        room = step_voxels // PATCHES_PER_STEP / prod(region)
        if room > 1:  # small structures: a patch may as well have more of their surroundings
            region = np.minimum(np.multiply(region, room ** (1 / 3)), shape).tolist()
        patch = plan_patch([region[axis] for axis in axes], own_spacing, step_voxels)
    return _Grid(spacing=mm, reason="", shape=shape, region=region, patch=patch, finest=mm)


def _median_spacing(fingerprints: Sequence[Fingerprint]) -> list[float]:
    spacings = np.median([fingerprint.spacing for fingerprint in fingerprints], axis=0)
    return [float(mm) for mm in spacings]


def _choose_spacing(fingerprints: Sequence[Fingerprint]) -> tuple[list[float], str]:
    """Return the spacing along right, anterior and superior, mm, and its reason."""
    spacings = np.array([fingerprint.spacing for fingerprint in fingerprints])
    shape = np.median([fingerprint.shape for fingerprint in fingerprints], axis=0)
    chosen = np.median(spacings, axis=0)
    reason = "the cases' median"
    coarse_axis = int(np.argmax(chosen))
    in_plane = float(np.delete(chosen, coarse_axis).max())
    has_few = shape[coarse_axis] * ANISOTROPY < np.delete(shape, coarse_axis).min()
    if chosen[coarse_axis] > ANISOTROPY * in_plane and has_few:
        fine = float(np.percentile(spacings[:, coarse_axis], FINE_PERCENTILE))
        chosen[coarse_axis] = max(fine, in_plane)
        reason = "the cases' median; their tenth percentile along the axis of thick slices"
    elif np.allclose(spacings, chosen, rtol=0.01):
        reason = "that of all cases"
    return [round(float(mm), 3) for mm in chosen], reason


def _median_shape(fingerprints: Sequence[Fingerprint], spacing: Sequence[float]) -> list[float]:
    """Return the median size of the cases at a spacing, voxels along each axis."""
    sizes = [np.multiply(one.shape, one.spacing) / spacing for one in fingerprints]
    return [float(size) for size in np.median(sizes, axis=0)]


def _median_region(fingerprints: Sequence[Fingerprint], spacing: Sequence[float]) -> list[float]:
    """Return the median size of what holds the structures at a spacing, voxels along each axis.

    It is the box of all labels, or that of what is not 0 if it is smaller.
    """
    sizes = []
    for one in fingerprints:
        if one.has_foreground:
            within = one.nonzero_shape if all(one.nonzero_shape) else one.shape
            box = np.minimum(one.foreground_shape, within)
            sizes.append(box * np.array(one.spacing) / spacing)
    if not sizes:
        return _median_shape(fingerprints, spacing)
    return [max(1.0, float(size)) for size in np.median(sizes, axis=0)]


def _slice_axis(spacing: Sequence[float]) -> int:
    """Return the axis that slices are stacked along: the longest voxels, else axial slices.

    Never the shortest axis of the volume: across R, left and right look alike.
    """
    if max(spacing) > SLICE_ANISOTROPY * min(spacing):
        return int(np.argmax(spacing))
    return 2


def _choose_intensities(
    fingerprints: Sequence[Fingerprint], channels: Sequence[str], modalities: Sequence[str]
) -> list[Choice]:
    """Choose the normalisation of each channel: one for all, and others for those that differ."""
    found = []
    for number in range(len(channels)):
        is_ct = number < len(modalities) and modalities[number] == "CT"
        found.append(
            _ct_intensity(fingerprints, number) if is_ct else _mr_intensity(fingerprints, number)
        )
    first, reason, nnunet = found[0]
    choices = [Choice(name="spec.intensity", value=first, reason=reason, nnunet=nnunet)]
    others = {
        name: value for name, (value, _, _) in zip(channels, found, strict=True) if value != first
    }
    if others:
        reason = "the channels that differ from the first one in modality, scale or zeros"
        choices.append(Choice(name="spec.channel_intensity", value=others, reason=reason))
    return choices


def _mr_intensity(fingerprints: Sequence[Fingerprint], number: int) -> tuple[Any, str, str]:
    """Return the normalisation of an MR channel, its reason, and nnU-Net's name for it."""
    zeros = median(
        one.channels[number].zero_fraction if one.channels else one.zero_fraction
        for one in fingerprints
    )
    stripped = zeros > STRIPPED_ZEROS
    reason = (
        "MRI has no scale of its own: a z-score per volume, after clipping at two percentiles, so "
        "that single bright voxels change nothing"
    )
    if stripped:
        reason += f"; {zeros:.0%} of a volume's voxels are 0 and do not count"
    value = {
        "method": "robust_zscore",
        "nonzero": stripped,
        "lower": CLIPPED_BELOW,
        "upper": CLIPPED_ABOVE,
    }
    name = "ZScoreNormalization" + (" with use_mask_for_norm" if stripped else "")
    return value, reason, name + ", which does not clip"


def _ct_intensity(fingerprints: Sequence[Fingerprint], number: int) -> tuple[Any, str, str]:
    """Return the normalisation of a CT channel, its reason, and nnU-Net's name for it."""
    statistics = [one.channels[number] for one in fingerprints if one.has_foreground]
    low = float(np.median([one.percentiles[0] for one in statistics]))
    high = float(np.median([one.percentiles[2] for one in statistics]))
    means = [one.mean for one in statistics]
    # the variance of all labelled voxels: that within the cases and that between them
    std = (fmean(one.std**2 for one in statistics) + pstdev(means) ** 2) ** 0.5
    value = {
        "method": "fixed",
        "clip": [round(low, 1), round(max(high, low + 1), 1)],
        "mean": round(fmean(means), 2),
        "std": round(max(std, 1e-3), 2),
    }
    reason = "CT has a scale: the percentiles 0.5 and 99.5, mean and deviation of labelled voxels"
    return value, reason, "CTNormalization"


def _choose_roi_size(grid: _Grid, processor: Processor) -> Choice:
    sizes = "×".join(f"{size:.0f}" for size in grid.shape)
    reason = f"the median volume has {sizes} voxels at that spacing"
    if grid.patch.is_whole and grid.region == grid.shape:
        reason += " and fits in"
    else:
        region = "×".join(f"{size:.0f}" for size in grid.region)
        reason += (
            f", the structures {region}; a patch sees {grid.patch.seen:.0%} of that, "
            f"because a step may have about {MAX_STEP_VOXELS[processor]:,} on this {processor}"
        )
    return Choice(name="spec.roi_size", value=grid.patch.size, reason=reason, nnunet="patch_size")


def _choose_foreground(fingerprints: Sequence[Fingerprint]) -> list[Choice]:
    """Choose to skip windows of air at inference, where volumes are mostly air."""
    air = median(one.air_fraction for one in fingerprints)
    labelled = max(one.labelled_air for one in fingerprints)
    if air < MOSTLY_AIR or labelled > LABELLED_AIR:
        return []
    return [
        Choice(
            name="spec.foreground_threshold",
            value=AIR,
            reason=f"{air:.0%} of a volume is air, and at most {labelled:.1%} of the labelled "
            "voxels are as dark: windows that hold only air are skipped",
            nnunet="crop to nonzero, which leaves air that is not exactly 0",
        )
    ]


def _choose_network(patch: Patch, processor: Processor, options: Preset) -> Choice:
    first = int(FIRST_FEATURES[processor] * options.feature_factor)
    topology = patch.topology
    levels = len(topology.strides) + 1
    value: dict[str, Any] = {
        "features": [min(MAX_FEATURES, first * 2**level) for level in range(levels)],
        "strides": topology.strides,
    }
    if _has_thin_kernels(topology):
        value["kernels"] = topology.kernels
    # the statistics of batch norm are too noisy over one or two patches
    value["norm"] = "batch" if patch.count > 2 else "instance"
    return Choice(
        name="spec.network",
        value=value,
        reason="poolings down to 4 voxels or more, and none along an axis twice as coarse as the "
        f"finest that can be pooled; {value['norm']} norm for {patch.count} patches per step",
        nnunet="pool_op_kernel_sizes and conv_kernel_sizes; always instance norm",
    )


def _has_thin_kernels(topology: Topology) -> bool:
    return any(1 in kernel for kernel in topology.kernels)


def _choose_batch(patch: Patch, dims: int, training_cases: int) -> list[Choice]:
    """Choose the patches of a step, how many a case gives, and how often a case is used."""
    cases = patch.count if dims == 3 else CASES_PER_STEP
    cases = max(1, min(cases, training_cases))
    per_case = ceil(patch.count / cases)
    batch_size = cases * per_case
    rate = LEARNING_RATE if patch.count > 2 else LEARNING_RATE_SMALL_BATCH
    choices = [
        Choice(
            name="run.batch_size",
            value=batch_size,
            reason="patches per step" if dims == 3 else "slices per step",
            nnunet="batch_size, 2 or more: the patch first, then the batch",
        ),
        Choice(
            name="run.learning_rate",
            value=rate,
            reason=f"for AdamW with {batch_size} patches per step",
            nnunet="SGD with 0.01, falling over 250,000 steps",
        ),
    ]
    if per_case > 1:
        reason = f"a step takes its patches from {cases} of the {training_cases} training cases"
        choices.append(Choice(name="run.patches_per_case", value=per_case, reason=reason))
    repeats = ceil(MIN_STEPS_PER_EPOCH / max(1, training_cases // cases))
    if repeats > 1:
        reason = (
            f"an epoch has {MIN_STEPS_PER_EPOCH} steps or more, because it ends with a checkpoint"
        )
        choices.append(
            Choice(name="run.repeats", value=repeats, reason=reason, nnunet="250 steps per epoch")
        )
    return choices


def _choose_sampling(fingerprints: Sequence[Fingerprint], patch: Patch) -> list[Choice]:
    """Choose balanced sampling for rare labels."""
    sizes = [median(counts) for counts in _label_voxels(fingerprints).values()]
    if patch.is_whole or max(sizes, default=1) <= RARE * min(sizes, default=1):
        return []
    reason = (
        f"the largest label has {max(sizes) / min(sizes):.0f} times the voxels of the "
        "smallest: each is as often in the middle of a patch"
    )
    nnunet = "draws a label of the case first, too"
    return [Choice(name="run.sampling", value="balanced", reason=reason, nnunet=nnunet)]


def _choose_balance(
    fingerprints: Sequence[Fingerprint], layout: Layout, processor: Processor
) -> list[Choice]:
    """Choose a loss that weighs many labels, which a softmax has."""
    count = len(_label_voxels(fingerprints))
    if layout.regions or count <= MANY_LABELS or processor != "cpu":
        return []
    reason = f"with {count} labels and few steps, small ones would be learnt too late"
    return [Choice(name="run.balance", value=BALANCE, reason=reason)]


def _label_voxels(fingerprints: Sequence[Fingerprint]) -> dict[int, list[int]]:
    """Return label → its number of voxels in each case that has it."""
    voxels: dict[int, list[int]] = {}
    for one in fingerprints:
        for value, count in one.label_voxels.items():
            voxels.setdefault(value, []).append(count)
    return voxels


def _choose_mirror(problem: str, grid: _Grid) -> Choice:
    """Choose mirroring along R, where left and right have the same labels."""
    if problem:
        return Choice(
            name="run.augment",
            value={"mirror": []},
            reason=f"no mirrored images: {problem}",
            nnunet="mirrors every axis, whatever the labels mean",
        )
    # a crop may show one side of the body only: a few mirrored ones suffice to learn the other
    is_body = grid.shape[0] * grid.spacing[0] > BODY_MM
    return Choice(
        name="run.augment",
        value={"mirror": ["R"], "mirror_chance": 0.5 if is_body else 0.1},
        reason="no label has a side: mirrored images double the data"
        if is_body
        else "no label has a side; the volumes are crops, which may all show the same one",
        nnunet="mirrors every axis",
    )


def _choose_slices(axis: int) -> Choice:
    reason = "the axis of the longest voxels, or axial slices if they are about as long as wide"
    return Choice(
        name="spec.slice_axis",
        value="RAS"[axis],
        reason=reason,
        nnunet="the axis of the largest spacing",
    )


def choose_larger_network(
    choices: Sequence[Choice], steps: float, preset: PresetName
) -> list[Choice]:
    """Return the choices with a larger network, where a run has more steps than it needs.

    Args:
        choices: settings with the smallest network.
        steps: number of steps that fit into the time limit with that network.
        preset: how much of the time is spent on accuracy.
    """
    options = PRESETS[preset]
    members = 1
    while members * 2 <= options.max_networks and steps / (members * 2) >= ENSEMBLE_STEPS:
        members *= 2
    changes: dict[str, Any] = {"ensemble": members} if members > 1 else {}
    reasons = [f"{members} networks are averaged"] if members > 1 else []
    own_steps = steps / members
    changed = []
    for choice in choices:
        if choice.name != "spec.network":
            changed.append(choice)
            continue
        poolings = len(choice.value["strides"])
        if options.deep_supervision and own_steps >= DEEP_STEPS and poolings > 2:
            # nnU-Net supervises all levels of the decoder but the lowest
            changes["deep_supervision"] = poolings - 2
            reasons.append("lower levels have outputs of their own")
        if options.residual and own_steps >= RESIDUAL_STEPS:
            changes["residual"] = True
            reasons.append("blocks are residual")
        if reasons:
            reason = f"{choice.reason}; {', '.join(reasons)}: about {steps:.0f} steps fit into the "
            reason += "time with the smallest network"
            choice = replace(choice, value=choice.value | changes, reason=reason)
        changed.append(choice)
    return changed


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
            reason=f"the fastest on this machine: a step takes {measured}; auto lets each machine "
            "choose",
        ),
        Choice(
            name="run.epochs",
            value=epochs,
            reason=f"{steps_per_epoch} steps of {times.step:.2f} s each, measured here",
            nnunet="1000 epochs of 250 steps",
        ),
        Choice(
            name="run.minutes",
            value=minutes,
            reason="the most that a run may take, reading and validation included; the learning "
            "rate falls to 0 by then",
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


def steps_in_time(minutes: float, times: TrainingTimes) -> float:
    """Return how many training steps fit into a time limit.

    Args:
        minutes: time limit of the whole run, minutes.
        times: times measured on this machine.
    """
    for_steps = 60 * minutes * (1 - RESERVED_TIME) - times.around - times.validation
    return max(0.0, for_steps / times.step)


def training_length(
    minutes: float, steps_per_epoch: int, times: TrainingTimes
) -> tuple[int, float]:
    """Return how many epochs fit into a time limit, and the expected seconds of the whole run.

    A run of less than an epoch ends at its time limit.

    Args:
        minutes: time limit of the whole run, minutes.
        steps_per_epoch: number of training steps in an epoch.
        times: times measured on this machine.
    """
    epochs = max(1, int(steps_in_time(minutes, times) / steps_per_epoch))
    seconds = epochs * steps_per_epoch * times.step + times.around + times.validation
    return epochs, seconds


def time_warnings(minutes: float, times: TrainingTimes) -> list[str]:
    """Return a warning if a time limit leaves fewer than `MIN_STEPS` training steps.

    Args:
        minutes: time limit of the whole run, minutes.
        times: times measured on this machine.
    """
    steps = steps_in_time(minutes, times)
    if steps >= MIN_STEPS:
        return []
    other = times.around + times.validation
    needed = (MIN_STEPS * times.step + other) / (1 - RESERVED_TIME) / 60
    return [
        f"--minutes {minutes:g} is too short by about {max(0.1, needed - minutes):.1f} minutes: "
        f"reading takes {times.around:.0f} s, the final validation {times.validation:.0f} s and a "
        f"training step {times.step:.2f} s, so that {steps:.0f} steps fit in, expected {MIN_STEPS} "
        f"or more; give --minutes {ceil(needed)} or more, or --preset fast"
    ]


def nested_values(choices: Sequence[Choice], prefix: str) -> dict[str, Any]:
    """Return setting → value for the choices whose name starts with a prefix, such as `spec.`.

    The prefix is removed from the names.
    """
    values = {}
    for choice in choices:
        if choice.name.startswith(prefix):
            values[choice.name.removeprefix(prefix)] = choice.value
    return values
