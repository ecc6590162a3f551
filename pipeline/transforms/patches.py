"""Random training patches of labelled cases."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    EnsureTyped,
    MapTransform,
    RandCropByPosNegLabeld,
    RandomizableTransform,
    SpatialPadd,
    SqueezeDimd,
    ToDeviced,
    Transform,
)
from monai.transforms.traits import RandomizableTrait
from numpy.typing import NDArray

from pipeline.config import Run, Spec
from pipeline.errors import ConfigError, VolumeError
from pipeline.transforms.augmentation import SPATIAL_KEYS, augmentation
from pipeline.transforms.border_weights import BorderWeightd
from pipeline.transforms.compose import Preprocessing, TrainingTransform
from pipeline.transforms.mirror_padding import mirror_padded_box
from pipeline.transforms.preprocess import LABEL
from pipeline.transforms.synthesis import synthesis_transform

CENTRES = "centres"  # key of the voxels that patches may be centred on
# so many voxels of a label are kept as centres of patches, evenly spread: more would only take
# memory (4 bytes per voxel, for each of up to hundreds of labels)
MAX_CENTRES = 10_000


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
        numbers (see `networks.losses`) and, for the loss `border_ce`, `weight` (1, *size). The size
        is the run's `patch_size` or, if that is None, the spec's `roi_size`.

    Raises:
        ConfigError: `patch_size` is not a valid input size of the network, or images are
            synthesised for regions or an ignored label.
    """
    if run.patch_size is not None:
        if len(run.patch_size) != spec.spatial_dims:
            raise ConfigError(
                f"run.patch_size: expected {spec.spatial_dims} numbers, as roi_size has, got "
                f"{run.patch_size}"
            )
        spec = replace(spec, roi_size=run.patch_size)  # raises ConfigError for an invalid size
    if run.synthesis:
        if spec.output == "regions" or spec.ignore_label is not None:
            raise ConfigError(
                "run.synthesis: expected a spec with output softmax or sigmoid and without "
                "ignore_label, because the table of tissues gives each value one structure"
            )
        return synthesis_transform(spec, run.synthesis, device)
    gpu = device if device is not None and device.type == "cuda" else None
    return TrainingTransform(
        deterministic=[*preprocessing.transforms, *_case_transforms(spec, run, gpu)],
        random=_patch_transforms(spec, run, gpu),
    )


def _case_transforms(spec: Spec, run: Run, gpu: torch.device | None) -> list[Transform]:
    """Return the deterministic transforms that follow the preprocessing."""
    transforms: list[Transform] = [ClassIndexd(LABEL, spec.target_values, spec.ignore_label)]
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
        if _draws_by_label(spec, run):
            transforms.append(CentreVoxelsd(LABEL))
    return transforms


def _draws_by_label(spec: Spec, run: Run) -> bool:
    """Return whether patches are cropped by `RandCropByLabel`; else by MONAI's transform."""
    return run.sampling == "balanced" or spec.ignore_label is not None


def _cropping(spec: Spec, run: Run, size: Sequence[int]) -> Transform:
    """Return the random crop of patches from a case."""
    if not _draws_by_label(spec, run):
        return RandCropByPosNegLabeld(
            SPATIAL_KEYS,
            label_key=LABEL,
            spatial_size=size,
            pos=run.foreground_share,
            neg=1 - run.foreground_share,
            num_samples=run.patches_per_case,
            allow_smaller=True,
            allow_missing_keys=True,
        )
    return RandCropByLabel(
        SPATIAL_KEYS,
        LABEL,
        size,
        count=run.patches_per_case,
        structure_share=run.foreground_share,
        balanced=run.sampling == "balanced",
    )


def _patch_transforms(spec: Spec, run: Run, gpu: torch.device | None) -> list[Transform]:
    """Return the random transforms: crops of a case, and the augmentation of each crop."""
    size = crop_size(spec)
    transforms: list[Transform] = []
    if not spec.network.padding:
        margin = _per_volume_axis(spec, spec.margin, across_slices=0)
        transforms.append(MirrorPadd(SPATIAL_KEYS, size, margin))
    transforms.append(_cropping(spec, run, size))
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
    """Replace the values of a label map by numbers: their positions in a list.

    Args:
        keys: keys of label maps; missing ones are allowed.
        values: value of each number, such as `Spec.target_values`.
        ignored: value that becomes -1, for voxels that do not count; None if there is none.

    Raises:
        VolumeError: a label map has a value that is not in `values`.
    """

    def __init__(
        self, keys: KeysCollection, values: Iterable[int], ignored: int | None = None
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.values = list(values)
        self.number_of = {value: number for number, value in enumerate(self.values)}
        if ignored is not None:
            self.number_of[ignored] = -1

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            found, inverse = torch.unique(case[key].as_tensor(), return_inverse=True)
            unknown = [f"{value:g}" for value in found.tolist() if value not in self.number_of]
            if unknown:
                raise VolumeError(
                    f"{case.get('case')}: label values {', '.join(unknown)}, expected only "
                    f"{self.values}"
                )
            numbers = [self.number_of[int(value)] for value in found.tolist()]
            index = torch.tensor(numbers, dtype=torch.float32)
            case[key] = case[key].clone().copy_(index[inverse])
        return case


@dataclass(frozen=True, kw_only=True, slots=True)
class CentreVoxels:
    """The voxels of a case that patches may be centred on, as positions in the flattened volume.

    Attributes:
        voxels: number of a label → up to `MAX_CENTRES` of its voxels; ignored voxels have none.
        counts: number of a label → how many voxels it has.
    """

    voxels: Mapping[int, NDArray[np.int32]]
    counts: Mapping[int, int]

    @classmethod
    def of(cls, label: torch.Tensor) -> CentreVoxels:
        """Return the voxels of a label map of numbers, (X, Y, Z), negative where ignored."""
        flat = label.cpu().numpy().ravel()
        order = np.argsort(flat, kind="stable").astype(np.int32)
        numbers, first, counts = np.unique(flat[order], return_index=True, return_counts=True)
        voxels, count_of = {}, {}
        for number, start, count in zip(numbers, first, counts, strict=True):
            if number >= 0:
                step = ceil(count / MAX_CENTRES)
                voxels[int(number)] = order[start : start + count : step].copy()
                count_of[int(number)] = int(count)
        return cls(voxels=voxels, counts=count_of)


class CentreVoxelsd(MapTransform):
    """Add `centres`, the `CentreVoxels` of a case, so that they are found once and then cached.

    Args:
        keys: key of the numbers, (1, X, Y, Z).
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, CENTRES: CentreVoxels.of(data[self.keys[0]][0])}


class RandCropByLabel(RandomizableTransform, MapTransform):
    """Crop patches around voxels that are drawn by their label; ignored voxels are never drawn.

    A case without a structure, or without labelled background, gives patches of the other kind; a
    case whose voxels are all ignored gives patches around any voxel.

    Args:
        keys: keys of tensors (C, X, Y, Z) to crop; missing ones are allowed.
        label_key: key of the numbers, (1, X, Y, Z): 0 for background, negative for ignored voxels.
        size: size of a patch, voxels; the volume's where that is smaller.
        count: number of patches.
        structure_share: probability that a patch is centred on a structure.
        balanced: whether each structure of the case is drawn with the same probability, instead of
            each voxel of all structures.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        size: Sequence[int],
        *,
        count: int,
        structure_share: float,
        balanced: bool,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys=True)
        RandomizableTransform.__init__(self)
        self.label_key, self.size, self.count = label_key, tuple(size), count
        self.structure_share, self.balanced = structure_share, balanced

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        label = data[self.label_key][0]
        # without padding, the volume was extended by mirroring after its voxels were cached
        centres = data.get(CENTRES) or CentreVoxels.of(label)
        patches = []
        for _ in range(self.count):
            voxel = self._draw(centres, tuple(label.shape))
            patch = {key: value for key, value in data.items() if key != CENTRES}
            for key in self.key_iterator(patch):
                patch[key] = _crop_around(data[key], voxel, self.size)
            patches.append(patch)
        return patches

    def _draw(self, centres: CentreVoxels, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a random voxel that a patch is centred on."""
        structures = [number for number in centres.voxels if number != 0]
        background = [0] if 0 in centres.voxels else []
        numbers = structures if self.R.random() < self.structure_share else background
        numbers = numbers or structures or background
        if not numbers:
            flat = self.R.randint(prod(shape))
        else:
            sizes = [1 if self.balanced else centres.counts[number] for number in numbers]
            chosen = numbers[self.R.choice(len(numbers), p=np.array(sizes) / sum(sizes))]
            voxels = centres.voxels[chosen]
            flat = int(voxels[self.R.randint(len(voxels))])
        return tuple(int(i) for i in np.unravel_index(flat, shape))


def _crop_around(x: torch.Tensor, voxel: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Return the patch of a tensor (C, X, Y, Z) around a voxel, moved to lie within the volume."""
    for axis, (centre, length) in enumerate(zip(voxel, size, strict=True), start=1):
        length = min(length, x.shape[axis])
        start = min(max(0, centre - length // 2), x.shape[axis] - length)
        x = x.narrow(axis, start, length)
    return x


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
