"""FIXME."""

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
    """The volume of each structure, mm³: its voxels times the volume of one; background is left out.

    Args:
        labels: (X, Y, Z) output values.
        affine: voxel → world, mm.
        names: name → output value, as in the spec.
        soft_mm3: each one's volume by its probabilities, in the order of `names`, which then counts instead; a structure that
            no voxel of the label map has is 0 either way.
    """
    if soft_mm3 is not None:
        there = _counts(labels)
        return {
            name: mm3 if value in there else 0.0
            for (name, value), mm3 in zip(names.items(), soft_mm3, strict=True)
            if value != 0
        }
    voxel = abs(float(np.linalg.det(affine[:3, :3])))
    counts = _counts(labels)
    return {name: counts.get(value, 0) * voxel for name, value in names.items() if value != 0}


def with_sums(volumes: Mapping[str, float], sums: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Volumes a structure, mm³, and after them those of several together: name → the structures that it sums, or `all`."""
    return {
        **volumes,
        **{
            name: sum(volumes[part] for part in (volumes if ALL in parts else parts))
            for name, parts in sums.items()
        },
    }


def _counts(labels: LabelMap) -> dict[int, int]:
    """How many voxels have each value; small types are counted without sorting."""
    if labels.dtype == np.uint8:
        counts = np.bincount(labels.ravel())
        return {value: int(count) for value, count in enumerate(counts) if count}
    values, found = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), found.tolist(), strict=True))
