"""Random augmentation of training patches."""

from __future__ import annotations

from math import radians

from monai.transforms import (
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
)

from pipeline.config import AXES, Augment, Spec
from pipeline.transforms.border_weights import WEIGHT
from pipeline.transforms.elastic_deformation import RandCoarseElasticd
from pipeline.transforms.preprocess import IMAGE, LABEL

SPATIAL_KEYS = (IMAGE, LABEL, WEIGHT)
INTERPOLATION = ("bilinear", "nearest", "bilinear")  # per spatial key
MIN_BLUR = 0.3  # voxels; a narrower Gaussian changes hardly anything


def augmentation(augment: Augment, spec: Spec) -> list[MapTransform]:
    """Return the random transforms of training patches, for 2D or 3D patches as the spec has.

    Spatial transforms apply to `image`, `label` and `weight` together, intensity transforms to
    `image` only.

    Args:
        augment: probabilities and ranges.
        spec: gives the number of spatial axes and the orientation.
    """
    return _spatial(augment, spec) + _intensity(augment)


def _spatial(augment: Augment, spec: Spec) -> list[MapTransform]:
    dims = spec.spatial_dims
    angle = radians(augment.rotation)
    transforms = [
        RandAffined(
            SPATIAL_KEYS,
            prob=augment.affine_chance,
            rotate_range=[angle] * (3 if dims == 3 else 1),
            scale_range=[augment.scaling] * dims,
            translate_range=[augment.shift] * dims,
            mode=INTERPOLATION,
            # without padding, the network never gets zeros at a border, but mirrored voxels
            padding_mode="zeros" if spec.network.padding else "reflection",
            allow_missing_keys=True,
        )
    ]
    if augment.elastic_chance:
        transforms.append(
            RandCoarseElasticd(
                SPATIAL_KEYS,
                augment.elastic_chance,
                grid=augment.elastic_grid,
                sigma=augment.elastic_sigma,
                mode=INTERPOLATION,
            )
        )
    for axis in _mirrored_axes(augment, spec):
        transforms.append(
            RandFlipd(
                SPATIAL_KEYS,
                prob=augment.mirror_chance,
                spatial_axis=axis,
                allow_missing_keys=True,
            )
        )
    return transforms


def _mirrored_axes(augment: Augment, spec: Spec) -> list[int]:
    """Return the axes of a patch that run along the directions in `augment.mirror`."""
    volume_axes = [AXES[code] for code in spec.orientation]
    patch_axes = [axis for i, axis in enumerate(volume_axes) if i != spec.slice_dim]
    directions = [AXES[direction] for direction in augment.mirror]
    return [patch_axes.index(direction) for direction in directions if direction in patch_axes]


def _intensity(augment: Augment) -> list[MapTransform]:
    blur = (MIN_BLUR, augment.blur)
    chance = augment.intensity_chance
    return [
        RandGaussianSmoothd(
            IMAGE, prob=augment.blur_chance, sigma_x=blur, sigma_y=blur, sigma_z=blur
        ),
        RandGaussianNoised(IMAGE, prob=augment.noise_chance, std=augment.noise),
        RandScaleIntensityd(IMAGE, prob=chance, factors=augment.brightness),
        RandScaleIntensityFixedMeand(IMAGE, prob=chance, factors=augment.contrast),
        RandAdjustContrastd(
            IMAGE, prob=chance, gamma=(1 - augment.gamma, 1 + augment.gamma), retain_stats=True
        ),
    ]
