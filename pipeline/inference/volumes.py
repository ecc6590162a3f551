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
    """Return the volume of each structure by name, mm³, without the background.

    A structure's volume is the number of its voxels times the volume of a voxel, or its soft
    volume where these are given.

    Args:
        labels: (X, Y, Z) output values.
        affine: voxel → world, mm.
        names: name → output value, as in the spec.
        soft_mm3: the sum of each structure's probabilities, mm³, in the order of `names`. A
            structure without any voxel in the label map is 0 either way.
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
    """Return the volumes of structures, followed by the volumes of several structures together.

    Args:
        volumes: name → volume of each structure, mm³.
        sums: name → the structures that are summed, or `all`.
    """
    extended = dict(volumes)
    for name, parts in sums.items():
        extended[name] = sum(volumes[part] for part in (volumes if ALL in parts else parts))
    return extended


def _voxel_counts(labels: LabelMap) -> dict[int, int]:
    """Return how many voxels have each value that occurs."""
    if labels.dtype == np.uint8:  # counted without sorting, which is much faster
        counts = np.bincount(labels.ravel())
        return {value: int(count) for value, count in enumerate(counts) if count}
    values, found = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), found.tolist(), strict=True))
