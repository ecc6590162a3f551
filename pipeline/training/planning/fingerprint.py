"""Fingerprints of labelled cases (their size, spacing and labels), and what is wrong with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan

import nibabel as nib
import numpy as np
import torch

from pipeline.errors import PipelineError, VolumeError
from pipeline.io import (
    Image,
    LabelImage,
    Layout,
    Problem,
    check_label_grid,
    read_channels,
    read_header,
    read_label_map,
    source_list,
)
from pipeline.transforms import check_affine, check_values
from pipeline.types import Affine, Array, Case, ImageSource, Spacing

PERCENTILES = (0.5, 50.0, 99.5)  # that clip CT, and its middle
# voxels below this fraction of the range from a channel's lowest value to its brightest are air, as
# for a spec's `foreground_threshold`; the brightest is this percentile
AIR, BRIGHTEST = 0.05, 99.5
AIR_SAMPLE = 2**17  # voxels, about, in which the fraction of air is counted


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelStatistics:
    """Intensities of one channel of one case.

    Attributes:
        zero_fraction: fraction of the voxels that are exactly 0.
        mean: mean over the labelled voxels; nan without any.
        std: standard deviation over the labelled voxels; nan without any.
        percentiles: `PERCENTILES` over the labelled voxels; nan without any.
    """

    zero_fraction: float
    mean: float
    std: float
    percentiles: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Properties of one case that a plan depends on; axes are in the order R, A, S.

    Statistics of labelled voxels are nan in a case without any, such as a healthy control.

    Attributes:
        case: name of the case.
        shape: size of the volume, voxels.
        spacing: voxel size, mm.
        foreground_shape: size of the bounding box of all labels, voxels; 0 without any.
        label_voxels: label value → number of its voxels, without background and ignored voxels.
        zero_fraction: fraction of the first channel's voxels that are exactly 0.
        foreground_mean: mean of the first channel over the labelled voxels.
        foreground_std: standard deviation of the first channel over the labelled voxels.
        nonzero_shape: size of the bounding box of all voxels that are not 0 in every channel.
        channels: intensities of each channel.
        foreground_start: first voxel of the bounding box of all labels; 0 without any.
        air_fraction: fraction of all voxels that are air: in each channel not above `AIR` of its
            range.
        labelled_air: fraction of the labelled voxels that are air; 0 without any.
    """

    case: str
    shape: tuple[int, int, int]
    spacing: Spacing
    foreground_shape: tuple[int, int, int]
    label_voxels: Mapping[int, int]
    zero_fraction: float
    foreground_mean: float
    foreground_std: float
    nonzero_shape: tuple[int, int, int] = (0, 0, 0)
    channels: tuple[ChannelStatistics, ...] = ()
    foreground_start: tuple[int, int, int] = (0, 0, 0)
    air_fraction: float = 0.0
    labelled_air: float = 0.0

    @property
    def has_foreground(self) -> bool:
        """Whether any voxel has a label."""
        return bool(self.label_voxels)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LabelledCase:
    """One case as read, after the check that all of its files are on one grid."""

    name: str
    channels: list[Image]
    label: LabelImage


def take_fingerprints(
    layout: Layout, case_done: Callable[[str], None] = lambda _: None
) -> tuple[list[Fingerprint], list[Problem]]:
    """Read all cases; return the fingerprints of the usable ones and the problems of the others.

    A case has a problem if a file cannot be read or segmented, if its files are on different grids,
    if its label map has unexpected values, or if its image equals that of an earlier case. A case
    without any label is usable: it shows what a healthy subject looks like.

    Args:
        layout: the labelled cases, and what the dataset states about their labels and channels.
        case_done: called with the name of each case after it has been read.
    """
    fingerprints: list[Fingerprint] = []
    problems: list[Problem] = []
    first_case_of: dict[str, str] = {}  # hash of the voxels → case
    for case in layout.cases:
        name = case["case"]
        try:
            labelled = _read_case(case, layout)
        except PipelineError as error:
            problems.append(Problem(case=name, message=str(error), kind="unusable"))
        else:
            first = first_case_of.setdefault(_voxel_hash(labelled.channels), name)
            if first == name:
                fingerprints.append(_fingerprint(labelled, layout.ignore_label))
            else:
                message = f"its image is that of {first}, voxel for voxel"
                problems.append(Problem(case=name, message=message, kind="duplicate"))
        case_done(name)
    return fingerprints, problems


def _read_case(case: Case, layout: Layout) -> _LabelledCase:
    """Read all files of a case.

    Raises:
        PipelineError: a file cannot be read or used, or the files are not on one grid.
    """
    sources = source_list(case["image"])
    count = len(layout.channels or ("",))
    _check_channel_count(sources, layout)
    channels = read_channels(sources, count)
    label = read_label_map(case["label"], layout.values)
    check_label_grid(case["label"], label, channels[0])
    for number, channel in enumerate(channels):
        name = sources[number] if len(sources) > 1 else sources[0]
        _check_image(channel, str(name))
    return _LabelledCase(name=case["case"], channels=channels, label=label)


def _check_channel_count(sources: Sequence[ImageSource], layout: Layout) -> None:
    """Raise VolumeError if a single file does not hold the channels that the dataset names."""
    names = layout.channels or ("one channel",)
    if len(sources) != 1:
        return
    volumes = read_header(sources[0]).volumes
    if volumes != len(names):
        raise VolumeError(
            f"{sources[0]}: holds {volumes} volumes, the dataset has {len(names)} channels "
            f"({', '.join(names)}); name each channel in the dataset.json, or split the file"
        )


def _check_image(image: Image, name: str) -> None:
    try:
        check_affine(image.affine)
        check_values(torch.from_numpy(np.array(image.array, dtype=np.float32)))
    except PipelineError as error:
        raise PipelineError(f"{name}: {error}") from error


def _voxel_hash(channels: Sequence[Image]) -> str:
    digest = hashlib.sha256()
    for image in channels:
        digest.update(np.ascontiguousarray(image.array).tobytes())
    return digest.hexdigest()


def _fingerprint(case: _LabelledCase, ignore_label: int | None) -> Fingerprint:
    # the affines of the files may differ by rounding errors; the label's is used for all
    affine = case.label.affine
    images = [_to_ras(np.asarray(image.array), affine) for image in case.channels]
    labels = _to_ras(case.label.array, affine)
    foreground = labels != 0
    if ignore_label is not None:
        foreground &= labels != ignore_label
    channels = tuple(_channel_statistics(image, foreground) for image in images)
    nonzero = np.any([image != 0 for image in images], axis=0)
    background = (0, ignore_label)
    start, size = _box(foreground)
    air, labelled_air = _air_fractions(images, foreground)
    x, y, z = labels.shape
    return Fingerprint(
        case=case.name,
        shape=(x, y, z),
        spacing=_ras_spacing(affine),
        foreground_shape=size,
        label_voxels={k: n for k, n in case.label.voxels.items() if k not in background},
        zero_fraction=channels[0].zero_fraction,
        foreground_mean=channels[0].mean,
        foreground_std=channels[0].std,
        nonzero_shape=_box(nonzero)[1],
        channels=channels,
        foreground_start=start,
        air_fraction=air,
        labelled_air=labelled_air,
    )


def _channel_statistics(image: Array, foreground: Array) -> ChannelStatistics:
    inside = image[foreground & np.isfinite(image)]
    low, middle, high = np.percentile(inside, PERCENTILES) if len(inside) else (nan, nan, nan)
    return ChannelStatistics(
        zero_fraction=float((image == 0).mean()),
        mean=float(inside.mean(dtype=float)) if len(inside) else nan,
        std=float(inside.std(dtype=float)) if len(inside) else nan,
        percentiles=(float(low), float(middle), float(high)),
    )


def _box(mask: Array) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return first voxel and size of the bounding box of a mask; both 0 if the mask is empty."""
    starts, sizes = [], []
    for axis in range(3):
        other_axes = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(mask.any(axis=other_axes))
        starts.append(int(places[0]) if len(places) else 0)
        sizes.append(int(places[-1] - places[0] + 1) if len(places) else 0)
    return (starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2])


def _air_fractions(images: Sequence[Array], foreground: Array) -> tuple[float, float]:
    """Return the fractions of all voxels, and of the labelled ones, that are air in every image."""
    step = max(1, round((foreground.size / AIR_SAMPLE) ** (1 / 3)))
    sampled = (slice(None, None, step),) * 3
    labelled = foreground[sampled]
    air = np.ones(labelled.shape, dtype=bool)
    for image in images:
        values = np.nan_to_num(np.asarray(image[sampled], dtype=np.float32))
        lowest, brightest = float(values.min()), float(np.percentile(values, BRIGHTEST))
        air &= values <= lowest + AIR * (brightest - lowest)
    return float(air.mean()), float(air[labelled].mean()) if labelled.any() else 0.0


def _to_ras(array: Array, affine: Affine) -> Array:
    """Return an array with its axes ordered and directed right, anterior, superior."""
    turned: Array = nib.apply_orientation(array, nib.io_orientation(affine))
    return turned


def _ras_spacing(affine: Affine) -> Spacing:
    """Return the spacing along right, anterior, superior, mm."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # io_orientation gives the world axis of each array axis; argsort inverts this permutation
    array_axes = np.argsort(nib.io_orientation(affine)[:, 0])
    right, anterior, superior = (float(spacing[axis]) for axis in array_axes)
    return right, anterior, superior
