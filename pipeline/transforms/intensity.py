"""Normalisation of intensities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    MapTransform,
    NormalizeIntensityd,
    ScaleIntensityRangePercentilesd,
)

from pipeline.config import Intensity


def normalisation(intensity: Intensity, keys: KeysCollection) -> MapTransform:
    """Return the transform that normalises each channel as the spec's `intensity` says."""
    if intensity.method == "zscore":
        return NormalizeIntensityd(keys, nonzero=intensity.nonzero, channel_wise=True)
    if intensity.method == "percentiles_zscore":
        return ClipNormalizeIntensityd(keys, intensity.lower, intensity.upper)
    return ScaleIntensityRangePercentilesd(
        keys,
        lower=intensity.lower,
        upper=intensity.upper,
        b_min=0.0,
        b_max=1.0,
        clip=True,
        channel_wise=True,
    )


def clips_outliers(intensity: Intensity) -> bool:
    """Return whether a few voxels with extreme values leave the normalisation as it is."""
    return intensity.method != "zscore" and intensity.lower > 0 and intensity.upper < 100


class ClipNormalizeIntensityd(MapTransform):
    """Clip a volume at two percentiles of all its channels, then normalise each channel.

    Each channel gets mean 0 and standard deviation 1; a constant channel becomes 0.

    Args:
        keys: (C, X, Y, Z) images.
        lower, upper: percentiles of all channels together, 0 to 100.
    """

    def __init__(self, keys: KeysCollection, lower: float, upper: float) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            values = case[key].as_tensor().numpy().astype(np.float64)
            low, high = np.percentile(values, [self.lower, self.upper])
            clipped = np.clip(values, low, high)
            mean = clipped.mean(axis=(1, 2, 3), keepdims=True)
            deviation = clipped.std(axis=(1, 2, 3), keepdims=True)
            scaled = (clipped - mean) / np.where(deviation > 0, deviation, 1)
            case[key] = case[key].clone().copy_(torch.from_numpy(scaled))
        return case
