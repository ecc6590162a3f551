"""A look at every labelled case before anything is trained on it: what is wrong, and what the data are like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch

from pipeline.errors import PipelineError
from pipeline.io import SAME_GRID_MM, Image, corner_distance, read
from pipeline.transforms import check_affine, check_values
from pipeline.types import Array, Case

FEW_VALUES = 256  # a label map with more is an image


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What one case is like, its axes turned to right, anterior, superior.

    Attributes:
        case: its name.
        shape: voxels.
        spacing: mm.
        foreground: size of the box around all labels, voxels.
        voxels: label value → how many voxels have it.
        zeros: fraction of the first channel's voxels that are exactly 0.
        inside: mean and standard deviation of the first channel within the labels.
    """

    case: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    foreground: tuple[int, int, int]
    voxels: dict[int, int]
    zeros: float
    inside: tuple[float, float]


Problem = tuple[str, str]  # the case, and what is wrong with it


def take_fingerprints(
    cases: Sequence[Case],
    labels: dict[str, int] | None,
    done: Callable[[str], None] = lambda _: None,
) -> tuple[list[Fingerprint], list[Problem]]:
    """Every case's fingerprint, and everything that is wrong, not only the first thing.

    Args:
        cases: with `case`, `image` and `label`.
        labels: name → value, where they are known; other values are then problems.
        done: called with each case's name.
    """
    found: list[Fingerprint] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for case in cases:
        try:
            one, digest = _fingerprint(case, labels)
        except PipelineError as error:
            problems.append((case["case"], str(error)))
        else:
            if digest in seen:
                problems.append(
                    (case["case"], f"its image is that of {seen[digest]}, voxel for voxel")
                )
            else:
                found.append(one)
            seen.setdefault(digest, case["case"])
        done(case["case"])
    return found, problems


def _fingerprint(case: Case, labels: dict[str, int] | None) -> tuple[Fingerprint, str]:
    sources = case["image"] if isinstance(case["image"], list) else [case["image"]]
    images = [read(source) for source in sources]
    label = read(case["label"])
    for image, name in [
        (image, source) for image, source in zip(images[1:], sources[1:], strict=True)
    ] + [(label, case["label"])]:
        _same_grid(images[0], image, str(name))
    for image, source in zip(images, sources, strict=True):
        _check_image(image, str(source))
    voxels = _values(label.array, case["label"], labels)
    grey, mask = (
        _upright(array, label)
        for array in (np.asarray(images[0].array), np.asarray(label.array) > 0)
    )
    places = np.argwhere(mask)
    spacing = np.linalg.norm(label.affine[:3, :3], axis=0)
    order = nib.io_orientation(label.affine)[:, 0].astype(int)
    turned = [float(spacing[list(order).index(axis)]) for axis in range(3)]
    digest = hashlib.sha256(np.ascontiguousarray(images[0].array).tobytes()).hexdigest()
    size = places.max(axis=0) - places.min(axis=0) + 1
    one = Fingerprint(
        case=case["case"],
        shape=(grey.shape[0], grey.shape[1], grey.shape[2]),
        spacing=(turned[0], turned[1], turned[2]),
        foreground=(int(size[0]), int(size[1]), int(size[2])),
        voxels=voxels,
        zeros=float((grey == 0).mean()),
        inside=(float(grey[mask].mean()), float(grey[mask].std())),
    )
    return one, digest


def _check_image(image: Image, name: str) -> None:
    try:
        check_affine(image.affine)
        check_values(torch.from_numpy(np.array(image.array, dtype=np.float32)))
    except PipelineError as error:
        raise PipelineError(f"{name}: {error}") from error


def _same_grid(first: Image, other: Image, name: str) -> None:
    if first.array.shape != other.array.shape:
        raise PipelineError(f"{name}: has shape {other.array.shape}, its image {first.array.shape}")
    apart = corner_distance(first.affine, other.affine, first.array.shape)
    if apart > SAME_GRID_MM:
        raise PipelineError(
            f"{name}: lies up to {apart:.2f} mm from its image, expected the same grid"
        )


def _values(array: Array, name: str, labels: dict[str, int] | None) -> dict[int, int]:
    values, counts = np.unique(np.asarray(array), return_counts=True)
    whole = [value for value in values.tolist() if value == int(value)]
    if len(whole) < len(values) or len(values) > FEW_VALUES:
        raise PipelineError(
            f"{name}: expected whole numbers for labels, got {len(values)} values such as {values[-1]:g}"
        )
    if labels is not None:
        unknown = [f"{value:g}" for value in whole if value not in labels.values()]
        if unknown:
            raise PipelineError(
                f"{name}: has the values {', '.join(unknown)}, expected only {list(labels.values())}"
            )
    found = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value}
    if not found:
        raise PipelineError(f"{name}: is empty")
    return found


def _upright(array: Array, like: Image) -> Array:
    turned: Array = nib.apply_orientation(array, nib.io_orientation(like.affine))
    return turned
