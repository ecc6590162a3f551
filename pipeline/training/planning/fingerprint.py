"""Fingerprints of labelled cases (their size, spacing and labels), and what is wrong with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch

from pipeline.errors import PipelineError
from pipeline.io import SAME_GRID_MM, Image, Problem, corner_distance, read, source_list
from pipeline.transforms import check_affine, check_values
from pipeline.types import Affine, Array, Case, Spacing

MAX_LABEL_VALUES = 256  # a file with more values is an image


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Properties of one case that a plan depends on; axes are in the order R, A, S.

    Attributes:
        case: name of the case.
        shape: size of the volume, voxels.
        spacing: voxel size, mm.
        foreground_shape: size of the bounding box of all labels, voxels.
        label_voxels: label value → number of its voxels.
        zero_fraction: fraction of the first channel's voxels that are exactly 0.
        foreground_mean: mean of the first channel over the labelled voxels.
        foreground_std: standard deviation of the first channel over the labelled voxels.
    """

    case: str
    shape: tuple[int, int, int]
    spacing: Spacing
    foreground_shape: tuple[int, int, int]
    label_voxels: Mapping[int, int]
    zero_fraction: float
    foreground_mean: float
    foreground_std: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _LabelledCase:
    """One case as read, after the check that all of its files are on one grid."""

    name: str
    channels: list[Image]
    label: Image
    label_voxels: dict[int, int]


def take_fingerprints(
    cases: Sequence[Case],
    labels: Mapping[str, int] | None,
    case_done: Callable[[str], None] = lambda _: None,
) -> tuple[list[Fingerprint], list[Problem]]:
    """Read all cases; return the fingerprints of the usable ones and the problems of the others.

    A case has a problem if a file cannot be read or segmented, if its files are on different grids,
    if its label map has unexpected values, or if its image equals that of an earlier case.

    Args:
        cases: labelled cases, each with `case`, `image` and `label`.
        labels: name → value; other values in a label map are a problem. None accepts all values.
        case_done: called with the name of each case after it has been read.
    """
    fingerprints: list[Fingerprint] = []
    problems: list[Problem] = []
    first_case_of: dict[str, str] = {}  # hash of the voxels → case
    for case in cases:
        name = case["case"]
        try:
            labelled = _read_case(case, labels)
        except PipelineError as error:
            problems.append(Problem(case=name, message=str(error), kind="unusable"))
        else:
            first = first_case_of.setdefault(_voxel_hash(labelled.channels[0]), name)
            if first == name:
                fingerprints.append(_fingerprint(labelled))
            else:
                message = f"its image is that of {first}, voxel for voxel"
                problems.append(Problem(case=name, message=message, kind="duplicate"))
        case_done(name)
    return fingerprints, problems


def _read_case(case: Case, labels: Mapping[str, int] | None) -> _LabelledCase:
    """Read all files of a case.

    Raises:
        PipelineError: a file cannot be read or used, or the files are not on one grid.
    """
    sources = source_list(case["image"])
    channels = [read(source) for source in sources]
    label = read(case["label"])
    for source, channel in zip(sources[1:], channels[1:], strict=True):
        _check_grid(channels[0], channel, str(source))
    _check_grid(channels[0], label, case["label"])
    for source, channel in zip(sources, channels, strict=True):
        _check_image(channel, str(source))
    return _LabelledCase(
        name=case["case"],
        channels=channels,
        label=label,
        label_voxels=_count_label_voxels(label.array, case["label"], labels),
    )


def _check_grid(image: Image, other: Image, other_name: str) -> None:
    if image.array.shape != other.array.shape:
        raise PipelineError(
            f"{other_name}: has shape {other.array.shape}, its image {image.array.shape}"
        )
    distance = corner_distance(image.affine, other.affine, image.array.shape)
    if distance > SAME_GRID_MM:
        raise PipelineError(
            f"{other_name}: lies up to {distance:.2f} mm from its image, expected the same grid"
        )


def _check_image(image: Image, name: str) -> None:
    try:
        check_affine(image.affine)
        check_values(torch.from_numpy(np.array(image.array, dtype=np.float32)))
    except PipelineError as error:
        raise PipelineError(f"{name}: {error}") from error


def _count_label_voxels(
    array: Array, name: str, labels: Mapping[str, int] | None
) -> dict[int, int]:
    """Return value → number of voxels of each label but the background, value 0.

    Raises:
        PipelineError: the array has fractions, too many values, unknown values or no label.
    """
    values, counts = np.unique(np.asarray(array), return_counts=True)
    whole = [value for value in values.tolist() if value == int(value)]
    if len(whole) < len(values) or len(values) > MAX_LABEL_VALUES:
        raise PipelineError(
            f"{name}: expected whole numbers for labels, "
            f"got {len(values)} values such as {values[-1]:g}"
        )
    if labels is not None:
        known = list(labels.values())
        unknown = [f"{value:g}" for value in whole if value not in known]
        if unknown:
            raise PipelineError(
                f"{name}: has the values {', '.join(unknown)}, expected only {known}"
            )
    voxels = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value}
    if not voxels:
        raise PipelineError(f"{name}: is empty")
    return voxels


def _voxel_hash(image: Image) -> str:
    return hashlib.sha256(np.ascontiguousarray(image.array).tobytes()).hexdigest()


def _fingerprint(case: _LabelledCase) -> Fingerprint:
    # the affines of the files may differ by rounding errors; the label's is used for all
    affine = case.label.affine
    image = _to_ras(np.asarray(case.channels[0].array), affine)
    foreground = _to_ras(np.asarray(case.label.array) > 0, affine)
    voxels = np.argwhere(foreground)
    box = voxels.max(axis=0) - voxels.min(axis=0) + 1
    inside = image[foreground]
    return Fingerprint(
        case=case.name,
        shape=(image.shape[0], image.shape[1], image.shape[2]),
        spacing=_ras_spacing(affine),
        foreground_shape=(int(box[0]), int(box[1]), int(box[2])),
        label_voxels=case.label_voxels,
        zero_fraction=float((image == 0).mean()),
        foreground_mean=float(inside.mean()),
        foreground_std=float(inside.std()),
    )


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
