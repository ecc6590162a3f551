"""The deterministic way in: from a case's files to the network's grid and intensities.

One `Compose` serves training, evaluation, inference and the bundle. Each step moves voxels invertibly or touches intensities
only; a case without a label is allowed.
"""

from __future__ import annotations

from monai.transforms import (
    Compose,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRangePercentilesd,
)

from pipeline.check import CheckVolumed
from pipeline.read import ReadVolumed
from pipeline.resample import spacing
from pipeline.spec import Intensity, Spec

IMAGE, LABEL = "image", "label"
KEYS = (IMAGE, LABEL)
AXIS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def preprocessing(spec: Spec, volume: int | None = None) -> Compose:
    """Read, check, turn to the spec's orientation, resample to its spacing, normalise.

    Args:
        spec: what the weights were trained to see.
        volume: which volume of 4D files, from 0.

    Shapes:
        a case with `image` (and perhaps `label`) as paths → (C, X, Y, Z) MetaTensors on the network's grid.
    """
    return Compose(
        [
            ReadVolumed(KEYS, volume=volume),
            CheckVolumed(IMAGE),
            Orientationd(KEYS, axcodes=spec.orientation, labels=AXIS_LABELS, allow_missing_keys=True),
            spacing(spec, KEYS),
            normalisation(spec.intensity),
        ]
    )


def normalisation(intensity: Intensity) -> MapTransform:
    """The step that brings each channel's values to one scale."""
    if intensity.method == "zscore":
        return NormalizeIntensityd(IMAGE, nonzero=intensity.nonzero, channel_wise=True)
    return ScaleIntensityRangePercentilesd(
        IMAGE, lower=intensity.lower, upper=intensity.upper, b_min=0.0, b_max=1.0, clip=True, channel_wise=True
    )
