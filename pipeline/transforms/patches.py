"""Random training patches of labelled cases."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import (
    EnsureTyped,
    MapTransform,
    RandCropByPosNegLabeld,
    SpatialPadd,
    SqueezeDimd,
    ToDeviced,
    Transform,
)
from monai.transforms.traits import RandomizableTrait

from pipeline.config import Run, Spec
from pipeline.errors import ConfigError, VolumeError
from pipeline.transforms.augmentation import SPATIAL_KEYS, augmentation
from pipeline.transforms.border_weights import BorderWeightd
from pipeline.transforms.compose import Preprocessing, TrainingTransform
from pipeline.transforms.mirror_padding import mirror_padded_box
from pipeline.transforms.preprocess import LABEL
from pipeline.transforms.synthesis import synthesis_transform

# Of three patches, two are centred on a structure and one on the background
STRUCTURE_PATCHES, BACKGROUND_PATCHES = 2, 1


def training_transform(
    preprocessing: Preprocessing, spec: Spec, run: Run, device: torch.device | None = None
) -> TrainingTransform:
    """Return the transform from a labelled case to augmented training patches.

    For a run with `synthesis` it is `synthesis_transform`, from a label map to a synthetic image.

    Args:
        preprocessing: preprocessing, the same as for inference.
        spec: spec of the network.
        run: gives `patch_size`, `patches_per_case`, `augment` and `loss`.
        device: device that trains; None is the CPU. On a GPU, cases are kept in its memory as long
            as they fit, and patches are augmented there.

    Shapes:
        a case → `patches_per_case` dicts with `image` (C, *size) float32, `label` (1, *size)
        channel numbers and, for the loss `border_ce`, `weight` (1, *size). The size is the run's
        `patch_size` or, if that is None, the spec's `roi_size`.

    Raises:
        ConfigError: `patch_size` is not a valid input size of the network.
    """
    if run.patch_size is not None:
        if len(run.patch_size) != spec.spatial_dims:
            raise ConfigError(
                f"run.patch_size: expected {spec.spatial_dims} numbers, as roi_size has, got "
                f"{run.patch_size}"
            )
        spec = replace(spec, roi_size=run.patch_size)  # raises ConfigError for an invalid size
    if run.synthesis:
        return synthesis_transform(spec, run.synthesis, device)
    gpu = device if device is not None and device.type == "cuda" else None
    return TrainingTransform(
        deterministic=[*preprocessing.transforms, *_case_transforms(spec, run, gpu)],
        random=_patch_transforms(spec, run, gpu),
    )


def _case_transforms(spec: Spec, run: Run, gpu: torch.device | None) -> list[Transform]:
    """Return the deterministic transforms that follow the preprocessing."""
    transforms: list[Transform] = [ClassIndexd(LABEL, spec.labels)]
    if run.loss == "border_ce":
        transforms.append(BorderWeightd(LABEL, run.border_weight, run.border_sigma_mm))
    # patches need no affine, and random transforms are faster on plain tensors
    transforms.append(EnsureTyped(SPATIAL_KEYS, track_meta=False, allow_missing_keys=True))
    if gpu:
        transforms.append(ToGpud(SPATIAL_KEYS, gpu))
    if spec.network.padding:
        transforms.append(
            SpatialPadd(SPATIAL_KEYS, spatial_size=crop_size(spec), allow_missing_keys=True)
        )
    return transforms


def _patch_transforms(spec: Spec, run: Run, gpu: torch.device | None) -> list[Transform]:
    """Return the random transforms: crops of a case, and the augmentation of each crop."""
    size = crop_size(spec)
    transforms: list[Transform] = []
    if not spec.network.padding:
        margin = _per_volume_axis(spec, spec.margin, across_slices=0)
        transforms.append(MirrorPadd(SPATIAL_KEYS, size, margin))
    transforms.append(
        RandCropByPosNegLabeld(
            SPATIAL_KEYS,
            label_key=LABEL,
            spatial_size=size,
            pos=STRUCTURE_PATCHES,
            neg=BACKGROUND_PATCHES,
            num_samples=run.patches_per_case,
            allow_smaller=True,
            allow_missing_keys=True,
        )
    )
    if spec.slice_dim is not None:
        transforms.append(
            SqueezeDimd(SPATIAL_KEYS, dim=spec.slice_dim + 1, allow_missing_keys=True)
        )
    transforms += augmentation(run.augment, spec)
    if gpu:
        # cases that did not fit into the GPU's memory: their patches are moved now
        transforms.append(ToDeviced(SPATIAL_KEYS, gpu, allow_missing_keys=True))
    return transforms


def crop_size(spec: Spec) -> list[int]:
    """Return the size (X, Y, Z) of the network's input in a volume, voxels.

    It is the spec's roi_size; for a 2D network, with 1 along the axis that slices are stacked on.
    """
    return _per_volume_axis(spec, spec.roi_size, across_slices=1)


def _per_volume_axis(spec: Spec, values: Sequence[int], *, across_slices: int) -> list[int]:
    """Return values per axis of the volume, from values per axis of the network.

    Args:
        spec: spec of the network.
        values: one value per spatial axis of the network.
        across_slices: value along the axis that the slices of a 2D network are stacked on.
    """
    volume_values = list(values)
    if spec.slice_dim is not None:
        volume_values.insert(spec.slice_dim, across_slices)
    return volume_values


class ClassIndexd(MapTransform):
    """Replace the values of a label map by the network's channel numbers.

    Args:
        keys: keys of label maps; missing ones are allowed.
        labels: name → value in the label map, in the order of the network's channels.

    Raises:
        VolumeError: a label map has a value that is not in `labels`.
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
                    f"{case.get('case')}: label values {', '.join(unknown)}, expected only "
                    f"{self.values}"
                )
            numbers = [self.values.index(int(value)) for value in found.tolist()]
            index = torch.tensor(numbers, dtype=torch.float32)
            case[key] = case[key].clone().copy_(index[inverse])
        return case


class ToGpud(ToDeviced):
    """Move a case to the GPU if more than half of the GPU's memory is free.

    Otherwise the case stays in the host's memory: the other half is for the network.

    Args:
        keys: keys of tensors; missing ones are allowed.
        device: the GPU.
    """

    def __init__(self, keys: KeysCollection, device: torch.device) -> None:
        super().__init__(keys, device, allow_missing_keys=True)
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if not fits_in_gpu_memory(self.device):
            return dict(data)
        moved: dict[Hashable, Any] = super().__call__(data)
        return moved


def fits_in_gpu_memory(device: torch.device) -> bool:
    """Return whether more than half of a GPU's memory is free."""
    free, total = torch.cuda.mem_get_info(device)
    return free > total / 2


class MirrorPadd(MapTransform, RandomizableTrait):
    """Pad volumes by mirroring, for networks whose output is smaller than their input.

    Patches can then be cropped so that the network's output lies anywhere in the original volume.
    The padded volume is at least as large as a patch.

    The transform is deterministic. It has MONAI's `RandomizableTrait` only to keep `CacheDataset`
    from caching its result, which can be many times larger than the volume.

    Args:
        keys: keys of tensors (C, X, Y, Z); missing ones are allowed.
        size: size of a patch, voxels.
        margin: number of voxels that the network's output is smaller than its input along each
            axis, both ends together.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int], margin: Sequence[int]) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.size, self.margin = tuple(size), tuple(margin)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        start = [-(margin // 2) for margin in self.margin]
        for key in self.key_iterator(case):
            shape = case[key].shape[1:]
            axes = zip(self.size, shape, self.margin, strict=True)
            padded_shape = [max(patch, voxels + margin) for patch, voxels, margin in axes]
            case[key] = mirror_padded_box(case[key], start, padded_shape)
        return case
