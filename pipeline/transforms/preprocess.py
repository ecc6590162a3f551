"""The deterministic preprocessing, from a case's files to the network's grid and intensities.

The same transforms serve training, evaluation, inference and the bundle, so that a network always
gets what it was trained for. Each transform either moves voxels invertibly or changes intensities
only; a case without a label is allowed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientationd

from pipeline.config import Spec
from pipeline.transforms.checks import CheckProportiond, CheckVolumed
from pipeline.transforms.compose import Preprocessing
from pipeline.transforms.crop_resize import CropResizeSlicesd
from pipeline.transforms.intensity import clips_outliers, normalisation
from pipeline.transforms.loading import LoadVolumed
from pipeline.transforms.resampling import spacing_transform
from pipeline.transforms.spline_resampling import CropToNonzerod, FileAxesd, SplineResampled

IMAGE, LABEL, SCAN = "image", "label", "scan"
KEYS = (IMAGE, LABEL)
# Given explicitly, because MONAI otherwise takes them from the tensor's `space`
AXIS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def preprocessing(
    spec: Spec, volume: int | None = None, labels_spacing: float | None = None
) -> Preprocessing:
    """Return the preprocessing of a spec.

    It loads and checks a case, reorients it to the spec's axes, resamples it to the spec's spacing,
    crops and resizes its slices if the spec asks for it, and normalises the image. With
    `spec.resampling`, it crops and normalises before it resamples, as nnU-Net does. The case's
    `image` and, if it has one, its `label` are paths (or images in memory), and become
    (C, X, Y, Z) MetaTensors on the network's grid.

    Args:
        spec: the inputs that the weights were trained for.
        volume: index of the volume to load from 4D files, from 0; None accepts files with a single
            volume only.
        labels_spacing: spacing of the label map's isotropic voxels, mm; None keeps the file's grid.
    """
    steps: list[MapTransform] = [
        CheckVolumed(IMAGE, warn_outliers=not clips_outliers(spec)),
        CheckProportiond(IMAGE, spec),
    ]
    if spec.needs_scan:
        steps.append(KeepScand(IMAGE))
    if spec.fallback_channel:
        steps.append(RepeatChannelsd(IMAGE, len(spec.channels)))
    steps += [_axes_transform(spec), *_grid_transforms(spec)]
    reader = LoadVolumed(
        KEYS, volume=volume, labels_spacing=labels_spacing, channels=len(spec.channels)
    )
    return Preprocessing(reader, steps)


def _axes_transform(spec: Spec) -> MapTransform:
    """Return the transform that brings a case to the axes of the spec."""
    if spec.has_file_axes:
        return FileAxesd(KEYS, spec.orientation)
    return Orientationd(KEYS, axcodes=spec.orientation, labels=AXIS_LABELS, allow_missing_keys=True)


def _grid_transforms(spec: Spec) -> list[MapTransform]:
    """Return the transforms that resample and normalise a case that has the axes of the spec."""
    if spec.resampling is not None:
        crop = [CropToNonzerod(KEYS)] if spec.crop_to_nonzero else []
        return [*crop, normalisation(spec, IMAGE), SplineResampled(KEYS, spec)]
    steps: list[MapTransform] = [spacing_transform(spec, KEYS)]
    if spec.crop_resize:
        steps.append(CropResizeSlicesd(KEYS, spec.crop_resize, spec.orientation))
    return [*steps, normalisation(spec, IMAGE)]


class KeepScand(MapTransform):
    """Keep a copy of the image as loaded, under the key `scan`, as int16 if that is exact.

    The refinement of borders compares its grey values, and the second network of a cascade sees a
    box of it. Cases with a label are for training, which needs neither, and are left as they are.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        if IMAGE in case and LABEL not in case:
            case[SCAN] = _compact(case[IMAGE])
        return case


def _compact(image: MetaTensor) -> MetaTensor:
    """Return a copy of an image: int16, in half the memory, if all of its intensities are."""
    voxels = image.as_tensor()
    integers = voxels.to(torch.int16)
    is_exact = torch.equal(integers.to(voxels.dtype), voxels)
    kept: MetaTensor = image.to(torch.int16) if is_exact else image.clone()
    return kept


class RepeatChannelsd(MapTransform):
    """Repeat a single channel to the network's number of channels.

    Volumes with several channels are left as they are.

    Args:
        keys: (C, X, Y, Z) images.
        channels: number of channels of the network.
    """

    def __init__(self, keys: KeysCollection, channels: int) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            if len(case[key]) == 1:
                case[key] = case[key].repeat(self.channels, 1, 1, 1)
        return case
