"""Volumes of structures, mm³."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.config import ALL
from pipeline.types import Affine, LabelMap


def volumes_mm3(
    labels: LabelMap,
    affine: Affine,
    names: Mapping[str, int],
    soft_mm3: Sequence[float] | None = None,
) -> dict[str, float]:
    """Return name → volume of each structure, mm³, without the background.

    A volume is the number of voxels times the volume of a voxel, or, with `soft_mm3`, the soft
    volume: the sum of the probabilities times the volume of a voxel. A structure without any voxel
    in the label map has the volume 0 in both cases.

    Args:
        labels: (X, Y, Z) label map.
        affine: affine of the label map, voxel → world, mm.
        names: name → value in the label map, as in the spec.
        soft_mm3: soft volumes in the order of `names`, mm³; None counts voxels.
    """
    counts = _voxel_counts(labels)
    volumes = {}
    if soft_mm3 is None:
        voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
        for name, value in names.items():
            volumes[name] = counts.get(value, 0) * voxel_mm3
    else:
        for (name, value), mm3 in zip(names.items(), soft_mm3, strict=True):
            volumes[name] = mm3 if value in counts else 0.0
    return {name: volumes[name] for name, value in names.items() if value != 0}


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
        counts = np.bincount(labels.ravel())
        return {value: int(count) for value, count in enumerate(counts) if count}
    values, found = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), found.tolist(), strict=True))
