"""From a case on the network's grid to random training patches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import radians
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    EnsureTyped,
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    SpatialPadd,
    SqueezeDimd,
)

from pipeline.errors import VolumeError
from pipeline.preprocess import IMAGE, KEYS, LABEL
from pipeline.run import Augment, Run
from pipeline.spec import AXES, Spec


class ClassIndexd(MapTransform):
    """Turns a label map's output values into the network's channel numbers.

    Raises:
        VolumeError: a value that the spec's labels do not name.
    """

    def __init__(self, keys: KeysCollection, labels: Mapping[str, int]) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.values = list(labels.values())

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            found, inverse = torch.unique(case[key].as_tensor(), return_inverse=True)
            unknown = [f"{value:g}" for value in found.tolist() if value not in self.values]
            if unknown:
                raise VolumeError(f"{case.get('case')}: label values {', '.join(unknown)}, expected only {self.values}")
            index = torch.tensor([self.values.index(int(value)) for value in found.tolist()], dtype=torch.float32)
            case[key] = case[key].clone().copy_(index[inverse])
        return case


def training_transform(preprocessing: Compose, spec: Spec, run: Run) -> Compose:
    """Preprocessing, then random patches: all before the first random step can be cached.

    Shapes: a labelled case → `patches_per_case` dicts of `image` (C, *roi_size) float32 and `label` (1, *roi_size) channel
    numbers.
    """
    roi = crop_size(spec)
    return Compose(
        [
            *preprocessing.transforms,
            ClassIndexd(LABEL, spec.labels),
            SpatialPadd(KEYS, spatial_size=roi),
            EnsureTyped(KEYS, track_meta=False),
            RandCropByPosNegLabeld(
                KEYS, label_key=LABEL, spatial_size=roi, pos=2, neg=1, num_samples=run.patches_per_case, allow_smaller=True
            ),
            *([SqueezeDimd(KEYS, dim=spec.slice_dim + 1)] if spec.slice_dim is not None else []),
            *augmentation(run.augment, spec),
        ]
    )


def crop_size(spec: Spec) -> list[int]:
    """The patch, (X, Y, Z) voxels: roi_size, one voxel thick across the slices of a 2D network."""
    size = list(spec.roi_size)
    if spec.slice_dim is not None:
        size.insert(spec.slice_dim, 1)
    return size


def augmentation(augment: Augment, spec: Spec) -> list[MapTransform]:
    """Random steps on patches, 2D or 3D as the spec has it; intensities are normalised ones."""
    angle = radians(augment.rotation)
    dims = spec.spatial_dims
    axes = [i for i in range(3) if i != spec.slice_dim]
    mirrored = [axes.index(i) for i in _axes_of(augment.mirror, spec.orientation) if i in axes]
    a = augment
    return [
        RandAffined(
            KEYS,
            prob=a.affine_chance,
            rotate_range=[angle] * (3 if dims == 3 else 1),
            scale_range=[a.scaling] * dims,
            translate_range=[a.shift] * dims,
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        *[RandFlipd(KEYS, prob=a.mirror_chance, spatial_axis=axis) for axis in mirrored],
        RandGaussianSmoothd(IMAGE, prob=a.blur_chance, **{f"sigma_{x}": (0.3, a.blur) for x in "xyz"}),
        RandGaussianNoised(IMAGE, prob=a.noise_chance, std=a.noise),
        RandScaleIntensityd(IMAGE, prob=a.intensity_chance, factors=a.brightness),
        RandScaleIntensityFixedMeand(IMAGE, prob=a.intensity_chance, factors=a.contrast),
        RandAdjustContrastd(IMAGE, prob=a.intensity_chance, gamma=(1 - a.gamma, 1 + a.gamma), retain_stats=True),
    ]


def _axes_of(directions: tuple[str, ...], orientation: str) -> list[int]:
    codes = [AXES[code] for code in orientation]
    return [int(np.flatnonzero(np.array(codes) == AXES[direction])[0]) for direction in directions]
