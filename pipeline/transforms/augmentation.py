"""From a case on the network's grid to random training patches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
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
    ToDeviced,
    Transform,
)
from monai.transforms.traits import RandomizableTrait

from pipeline.config import AXES, Augment, Run, Spec
from pipeline.errors import ConfigError, VolumeError
from pipeline.transforms.border_weights import WEIGHT, BorderWeightd
from pipeline.transforms.elastic import RandCoarseElasticd
from pipeline.transforms.mirror_padding import mirror_padded_box
from pipeline.transforms.preprocess import IMAGE, LABEL
from pipeline.transforms.synthesis import synthesis_transform

MOVED = (IMAGE, LABEL, WEIGHT)
MODES = ("bilinear", "nearest", "bilinear")


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
                raise VolumeError(
                    f"{case.get('case')}: label values {', '.join(unknown)}, expected only {self.values}"
                )
            index = torch.tensor(
                [self.values.index(int(value)) for value in found.tolist()], dtype=torch.float32
            )
            case[key] = case[key].clone().copy_(index[inverse])
        return case


def training_transform(
    preprocessing: Compose, spec: Spec, run: Run, device: torch.device | None = None
) -> Compose:
    """Preprocessing, then random patches: all before the first random step can be cached. Or images drawn from label maps.

    Where convolutions are not padded, volumes are mirrored around, and the border of a patch is there for the middle's sake.

    Shapes: a labelled case → `patches_per_case` dicts of `image` (C, *roi_size) float32 and `label` (1, *roi_size) channel
    numbers, and `weight` (1, *roi_size) where the run's loss asks for it; of the run's patch_size where it has one.

    Args:
        preprocessing: that of inference.
        spec: of the network.
        run: what patches, and how they change.
        device: the one that trains. A GPU keeps the cases there, as far as they fit, and their patches are changed there.

    Raises:
        ConfigError: a patch_size that the network cannot have.
    """
    if run.patch_size is not None:
        if len(run.patch_size) != spec.spatial_dims:
            raise ConfigError(
                f"run.patch_size: expected {spec.spatial_dims} numbers, as roi_size has, got {run.patch_size}"
            )
        spec = replace(spec, roi_size=run.patch_size)
    if run.synthesis:
        return synthesis_transform(spec, run.synthesis, device)
    on_gpu = device if device is not None and device.type == "cuda" else None
    return Compose(
        [*preprocessing.transforms, *_cases(spec, run, on_gpu), *_patches(spec, run, on_gpu)]
    )


def _cases(spec: Spec, run: Run, gpu: torch.device | None) -> list[Transform]:
    """After preprocessing, what is done to a case once."""
    return [
        ClassIndexd(LABEL, spec.labels),
        *(
            [BorderWeightd(LABEL, run.border_weight, run.border_sigma_mm)]
            if run.loss == "border_ce"
            else []
        ),
        EnsureTyped(MOVED, track_meta=False, allow_missing_keys=True),
        *([ToGpud(MOVED, gpu)] if gpu else []),
        *(
            [SpatialPadd(MOVED, spatial_size=crop_size(spec), allow_missing_keys=True)]
            if spec.network.padding
            else []
        ),
    ]


def _patches(spec: Spec, run: Run, gpu: torch.device | None) -> list[Transform]:
    """What is done each time that a case comes up."""
    roi = crop_size(spec)
    return [
        *(
            []
            if spec.network.padding
            else [MirrorPadd(MOVED, roi, _volume_axes(spec, spec.margin, 0))]
        ),
        RandCropByPosNegLabeld(
            MOVED,
            label_key=LABEL,
            spatial_size=roi,
            pos=2,
            neg=1,
            num_samples=run.patches_per_case,
            allow_smaller=True,
            allow_missing_keys=True,
        ),
        *(
            [SqueezeDimd(MOVED, dim=spec.slice_dim + 1, allow_missing_keys=True)]
            if spec.slice_dim is not None
            else []
        ),
        *augmentation(run.augment, spec),
        *([ToDeviced(MOVED, gpu, allow_missing_keys=True)] if gpu else []),
    ]


class ToGpud(ToDeviced):
    """Moves a case to the GPU as long as that has more than half of its memory free; cases that come later stay on the host.

    Args:
        keys: of tensors; absent ones are allowed.
        device: the GPU.
    """

    def __init__(self, keys: KeysCollection, device: torch.device) -> None:
        super().__init__(keys, device, allow_missing_keys=True)
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        moved: dict[Hashable, Any] = (
            super().__call__(data) if fits_in_gpu_memory(self.device) else dict(data)
        )
        return moved


def fits_in_gpu_memory(device: torch.device) -> bool:
    """Whether more than half of a GPU's memory is free."""
    free, total = torch.cuda.mem_get_info(device)
    return free > total / 2


class MirrorPadd(MapTransform, RandomizableTrait):
    """Mirrors volumes around, so that a patch may have its output anywhere in them; at least one patch large.

    Called random so that it comes after what is cached: the result is many times larger than the volume.

    Args:
        keys: (C, X, Y, Z); absent ones are allowed.
        size: of a patch, voxels.
        margin: by how much the output of a patch is smaller, both ends together.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int], margin: Sequence[int]) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.size, self.margin = tuple(size), tuple(margin)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            wide = [
                max(roi, n + m)
                for roi, n, m in zip(self.size, case[key].shape[1:], self.margin, strict=True)
            ]
            case[key] = mirror_padded_box(case[key], [-(m // 2) for m in self.margin], wide)
        return case


def crop_size(spec: Spec) -> list[int]:
    """The patch, (X, Y, Z) voxels: roi_size, one voxel thick across the slices of a 2D network."""
    return _volume_axes(spec, spec.roi_size, 1)


def _volume_axes(spec: Spec, values: Sequence[int], across: int) -> list[int]:
    """A value for each axis of a volume: those of the window's axes, and one across the slices of a 2D network."""
    listed = list(values)
    if spec.slice_dim is not None:
        listed.insert(spec.slice_dim, across)
    return listed


def augmentation(augment: Augment, spec: Spec) -> list[MapTransform]:
    """Random steps on patches, 2D or 3D as the spec has it; intensities are normalised ones."""
    angle = radians(augment.rotation)
    dims = spec.spatial_dims
    axes = [i for i in range(3) if i != spec.slice_dim]
    mirrored = [axes.index(i) for i in _axes_of(augment.mirror, spec.orientation) if i in axes]
    a = augment
    return [
        RandAffined(
            MOVED,
            prob=a.affine_chance,
            rotate_range=[angle] * (3 if dims == 3 else 1),
            scale_range=[a.scaling] * dims,
            translate_range=[a.shift] * dims,
            mode=MODES,
            padding_mode="zeros" if spec.network.padding else "reflection",
            allow_missing_keys=True,
        ),
        *(
            [
                RandCoarseElasticd(
                    MOVED, a.elastic_chance, grid=a.elastic_grid, sigma=a.elastic_sigma, mode=MODES
                )
            ]
            if a.elastic_chance
            else []
        ),
        *[
            RandFlipd(MOVED, prob=a.mirror_chance, spatial_axis=axis, allow_missing_keys=True)
            for axis in mirrored
        ],
        RandGaussianSmoothd(
            IMAGE, prob=a.blur_chance, **{f"sigma_{x}": (0.3, a.blur) for x in "xyz"}
        ),
        RandGaussianNoised(IMAGE, prob=a.noise_chance, std=a.noise),
        RandScaleIntensityd(IMAGE, prob=a.intensity_chance, factors=a.brightness),
        RandScaleIntensityFixedMeand(IMAGE, prob=a.intensity_chance, factors=a.contrast),
        RandAdjustContrastd(
            IMAGE, prob=a.intensity_chance, gamma=(1 - a.gamma, 1 + a.gamma), retain_stats=True
        ),
    ]


def _axes_of(directions: tuple[str, ...], orientation: str) -> list[int]:
    codes = [AXES[code] for code in orientation]
    return [int(np.flatnonzero(np.array(codes) == AXES[direction])[0]) for direction in directions]
