"""Normalisation of intensities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    MapTransform,
    NormalizeIntensityd,
    ScaleIntensityRangePercentilesd,
)
from scipy import ndimage

from pipeline.config import Intensity, Spec
from pipeline.errors import ConfigError
from pipeline.types import Array

MIN_DEVIATION = 1e-8  # lower bound of a standard deviation that is divided by, as in nnU-Net


def normalisation(
    spec: Spec, keys: KeysCollection, device: torch.device | None = None
) -> MapTransform:
    """Return the transform that normalises each channel as the spec says.

    Args:
        spec: gives `intensity`, `channel_intensity` and the names of the channels.
        keys: (C, X, Y, Z) images.
        device: device that the images are on; None is the CPU.
    """
    if not spec.channel_intensity:
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu and spec.intensity.method == "percentiles" and not spec.intensity.foreground:
            return ScalePercentilesOnGpud(keys, spec.intensity.lower, spec.intensity.upper)
        return _transform(spec.intensity, keys)
    return NormalizeEachChanneld(keys, _intensities(spec))


def clips_outliers(spec: Spec) -> bool:
    """Return whether a few voxels with extreme values leave the normalisation as it is."""
    return all(_clips(intensity) for intensity in _intensities(spec))


def _intensities(spec: Spec) -> list[Intensity]:
    """Return the normalisation of each channel, in the order of the channels."""
    return [spec.channel_intensity.get(name, spec.intensity) for name in spec.channels]


def _clips(intensity: Intensity) -> bool:
    if intensity.method in ("fixed", "none"):
        return True
    return intensity.method != "zscore" and intensity.lower > 0 and intensity.upper < 100


def _transform(intensity: Intensity, keys: KeysCollection) -> MapTransform:
    """Return the transform that normalises all channels in the same way."""
    if intensity.foreground or intensity.method in ("robust_zscore", "fixed", "none"):
        return NormalizeEachChanneld(keys, intensity)
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


class NormalizeEachChanneld(MapTransform):
    """Normalise each channel of a volume by a method of its own.

    Args:
        keys: (C, X, Y, Z) images.
        intensities: normalisation of each channel, or one for all of them.
    """

    def __init__(self, keys: KeysCollection, intensities: Intensity | Sequence[Intensity]) -> None:
        super().__init__(keys)
        self.intensities = intensities

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            image = case[key]
            normalised = image.clone()
            needs_mask = any(self._intensity_of(i).foreground for i in range(len(image)))
            mask = foreground_mask(image.numpy()) if needs_mask else None
            for channel in range(len(image)):
                _normalise_channel(image, normalised, channel, self._intensity_of(channel), mask)
            case[key] = normalised
        return case

    def _intensity_of(self, channel: int) -> Intensity:
        if isinstance(self.intensities, Intensity):
            return self.intensities
        return self.intensities[channel]


def _normalise_channel(
    image: torch.Tensor,
    normalised: torch.Tensor,
    channel: int,
    intensity: Intensity,
    mask: Array | None,
) -> None:
    """Write one channel of an image, normalised, into another image of the same shape."""
    part = image[channel : channel + 1]
    if intensity.method == "none":
        return
    if intensity.foreground and mask is not None:
        values = torch.as_tensor(foreground_zscore(part[0].cpu().numpy(), mask))[None]
    elif intensity.method == "robust_zscore":
        values = torch.as_tensor(robust_zscore(part[0].cpu().numpy(), intensity))[None]
    elif intensity.method == "fixed":
        values = fixed_zscore(part, intensity)
    else:
        values = _transform(intensity, "image")({"image": part})["image"]
    normalised[channel : channel + 1].copy_(values)


def foreground_mask(image: Array) -> Array:
    """Return which voxels of (C, X, Y, Z) are not 0 in some channel, and what these enclose.

    Background is enclosed if no path of voxels that share a face leads to the edge of the volume.
    """
    mask: Array = (image != 0).any(axis=0)
    parts, _ = ndimage.label(~mask)
    faces = [np.take(parts, end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    is_open = np.zeros(parts.max() + 1, dtype=bool)
    is_open[np.unique(np.concatenate(faces))] = True
    is_open[0] = False  # the foreground itself
    closed: Array = ~is_open[parts]
    return closed


def foreground_zscore(values: Array, mask: Array) -> Array:
    """Return values with mean 0 and standard deviation 1 within a mask; all others stay.

    Args:
        values: (X, Y, Z) intensities of one channel.
        mask: (X, Y, Z) which voxels count.
    """
    counted = values[mask].astype(np.float64)
    scaled = values.astype(np.float32)
    if counted.size:
        scaled[mask] = (counted - counted.mean()) / max(counted.std(), MIN_DEVIATION)
    return scaled


def robust_zscore(values: Array, intensity: Intensity) -> Array:
    """Return values clipped at two of their percentiles, with mean 0 and standard deviation 1.

    Extreme values of a few voxels, such as spikes or marks, therefore change nothing else. Values
    that are all the same become 0.

    Args:
        values: (X, Y, Z) intensities of one channel.
        intensity: gives the percentiles `lower` and `upper`. With `nonzero`, only voxels other than
            0 count, and the others stay 0.
    """
    mask = values != 0 if intensity.nonzero else np.ones(values.shape, dtype=bool)
    counted = values[mask]
    if not counted.size:
        return np.zeros_like(values)
    low, high = np.percentile(counted, [intensity.lower, intensity.upper])
    counted = np.clip(counted.astype(np.float32), low, high)
    mean, deviation = counted.mean(dtype=np.float64), counted.std(dtype=np.float64)
    scaled = np.zeros(values.shape, dtype=np.float32)
    scaled[mask] = (counted - mean) / (deviation if deviation > 0 else 1.0)
    return scaled


def fixed_zscore(values: torch.Tensor, intensity: Intensity) -> torch.Tensor:
    """Return values clipped to `clip`, minus `mean`, divided by `std`.

    Raises:
        ConfigError: the intensity lacks one of these values; its constructor prevents that.
    """
    if intensity.clip is None or intensity.mean is None or intensity.std is None:
        raise ConfigError(f"spec.intensity: expected clip, mean and std, got {intensity}")
    return (values.clamp(*intensity.clip) - intensity.mean) / intensity.std


class ScalePercentilesOnGpud(MapTransform):
    """Scale each channel so that two of its percentiles become 0 and 1, and clip it to 0 to 1.

    These are the values of MONAI's `ScaleIntensityRangePercentilesd`, which would move volumes of
    more than a million voxels to the CPU to find their percentiles.

    Args:
        keys: (C, X, Y, Z) images of at most 16 million voxels.
        lower, upper: percentiles of each channel, 0 to 100.
    """

    def __init__(self, keys: KeysCollection, lower: float, upper: float) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            values = case[key].flatten(start_dim=1)
            low, high = (
                values.quantile(percentile / 100, dim=1).view(-1, 1, 1, 1)
                for percentile in (self.lower, self.upper)
            )
            width = torch.where(high > low, high - low, 1)  # 1 in a constant channel, as in MONAI
            case[key] = ((case[key] - low) / width).clamp_(0, 1)
        return case


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
