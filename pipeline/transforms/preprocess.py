"""The deterministic way in: from a case's files to the network's grid and intensities.

One `Compose` serves training, evaluation, inference and the bundle. Each step moves voxels invertibly or touches intensities
only; a case without a label is allowed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRangePercentilesd,
)

from pipeline.config import Intensity, Spec
from pipeline.io import ReadVolumed
from pipeline.transforms.checks import CheckVolumed
from pipeline.transforms.resampling import spacing_transform
from pipeline.transforms.slice_fitting import ClippedZscored, CropResizeSlicesd

IMAGE, LABEL, SCAN = "image", "label", "scan"
KEYS = (IMAGE, LABEL)
AXIS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def preprocessing(
    spec: Spec, volume: int | None = None, labels_spacing: float | None = None
) -> Compose:
    """Read, check, turn to the spec's orientation, resample to its spacing, fit to its slices if it says so, normalise.

    Args:
        spec: what the weights were trained to see.
        volume: which volume of 4D files, from 0.
        labels_spacing: of the voxels that labels go to, mm, instead of the file's own.

    Shapes:
        a case with `image` (and perhaps `label`) as paths → (C, X, Y, Z) MetaTensors on the network's grid.
    """
    return Compose(
        [
            ReadVolumed(KEYS, volume=volume, labels_spacing=labels_spacing),
            CheckVolumed(IMAGE),
            *([KeepScand(IMAGE)] if spec.refine else []),
            *([RepeatChannelsd(IMAGE, len(spec.channels))] if spec.fallback_channel else []),
            Orientationd(
                KEYS, axcodes=spec.orientation, labels=AXIS_LABELS, allow_missing_keys=True
            ),
            spacing_transform(spec, KEYS),
            *(
                [CropResizeSlicesd(KEYS, spec.crop_resize, spec.orientation)]
                if spec.crop_resize
                else []
            ),
            normalisation(spec.intensity),
        ]
    )


class KeepScand(MapTransform):
    """Keeps the grey values as read, as `scan`, for the borders that a spec has refined; not of labelled cases."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        if IMAGE in case and LABEL not in case:
            case[SCAN] = case[IMAGE].clone()
        return case


class RepeatChannelsd(MapTransform):
    """Repeats a single channel as often as the network has channels; volumes with several stay as they are."""

    def __init__(self, keys: KeysCollection, channels: int) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            if len(case[key]) == 1:
                case[key] = case[key].repeat(self.channels, 1, 1, 1)
        return case


def normalisation(intensity: Intensity) -> MapTransform:
    """The step that brings each channel's values to one scale."""
    if intensity.method == "zscore":
        return NormalizeIntensityd(IMAGE, nonzero=intensity.nonzero, channel_wise=True)
    if intensity.method == "percentiles_zscore":
        return ClippedZscored(IMAGE, intensity.lower, intensity.upper)
    return ScaleIntensityRangePercentilesd(
        IMAGE,
        lower=intensity.lower,
        upper=intensity.upper,
        b_min=0.0,
        b_max=1.0,
        clip=True,
        channel_wise=True,
    )
