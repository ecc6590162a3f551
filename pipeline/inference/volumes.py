"""Volumes of structures, mm³."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.config import ALL, Spec
from pipeline.types import Affine, LabelMap


def volumes_mm3(
    labels: LabelMap,
    affine: Affine,
    names: Mapping[str, int | Sequence[int]],
    soft_mm3: Sequence[float] | None = None,
) -> dict[str, float]:
    """Return name → volume of each structure, mm³, without the background.

    A volume is the number of voxels times the volume of a voxel, or, with `soft_mm3`, the soft
    volume: the sum of the probabilities times the volume of a voxel. A structure without any voxel
    in the label map has the volume 0 in both cases.

    Args:
        labels: (X, Y, Z) label map.
        affine: affine of the label map, voxel → world, mm.
        names: name → value in the label map, as in the spec; several values for a region.
        soft_mm3: soft volumes in the order of `names`, mm³; None counts voxels.
    """
    counts = _voxel_counts(labels)
    voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
    volumes = {}
    for number, (name, value) in enumerate(names.items()):
        values = [value] if isinstance(value, int) else value
        if 0 in values:
            continue
        voxels = sum(counts.get(one, 0) for one in values)
        volumes[name] = voxels * voxel_mm3
        if soft_mm3 is not None:
            volumes[name] = soft_mm3[number] if voxels else 0.0
    return volumes


def structure_volumes(
    labels: LabelMap, affine: Affine, spec: Spec, soft_mm3: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the volumes of the spec's structures, mm³, and of their sums.

    Regions may overlap: a sum of them is the volume of their union.

    Args:
        labels: (X, Y, Z) label map.
        affine: affine of the label map, voxel → world, mm.
        spec: gives labels, regions and sums.
        soft_mm3: soft volume of each label, mm³; None counts voxels.
    """
    if spec.output != "regions":
        return with_sums(volumes_mm3(labels, affine, spec.labels, soft_mm3), spec.sums)
    values_of = dict(spec.values_of)
    volumes = volumes_mm3(labels, affine, {"": 0, **values_of}, soft_mm3)
    if not spec.sums:
        return volumes
    unions = {}
    for name, parts in spec.sums.items():
        members = values_of if ALL in parts else [part for part in parts if part in values_of]
        unions[name] = sorted({value for part in members for value in values_of[part]})
    return volumes | volumes_mm3(labels, affine, unions)


def with_sums(volumes: Mapping[str, float], sums: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the volumes of all structures, followed by sums over several structures.

    Args:
        volumes: name → volume of each structure, mm³.
        sums: name of the sum → names of its structures, or `all`.
    """
    extended = dict(volumes)
    for name, parts in sums.items():
        extended[name] = sum(volumes[part] for part in (volumes if ALL in parts else parts))
    return extended


def _voxel_counts(labels: LabelMap) -> dict[int, int]:
    """Return value → number of voxels, for the values that occur."""
    if labels.dtype == np.uint8:  # counted without sorting, which is much faster
        counts = np.zeros(256, dtype=np.int64)
        for plane in labels:  # `bincount` makes a copy in int64
            counts += np.bincount(plane.ravel(), minlength=256)
        return {value: int(count) for value, count in enumerate(counts) if count}
    values, found = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), found.tolist(), strict=True))
