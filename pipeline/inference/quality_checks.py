"""Checks of a finished segmentation: structures at the scan's edge, implausible volumes."""

from __future__ import annotations

from collections.abc import Mapping

import nibabel as nib

from pipeline.config import Spec
from pipeline.types import Affine, LabelMap

FACE_NAMES = {
    "R": "right",
    "L": "left",
    "A": "anterior",
    "P": "posterior",
    "S": "superior",
    "I": "inferior",
}
OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
MM3_PER_ML = 1000.0
# up to this number of implausible volumes, each has a warning of its own; more are merged into one,
# so that the warnings still fit into a cell of a table
MAX_SEPARATE_WARNINGS = 4


def quality_warnings(
    labels: LabelMap, affine: Affine, volumes_mm3: Mapping[str, float], spec: Spec
) -> list[str]:
    """Return warnings for the checks that the spec enables.

    They are for structures that touch the scan's edge, and for implausible volumes (merged into one
    warning if there are more than `MAX_SEPARATE_WARNINGS`).

    Args:
        labels: (X, Y, Z) label map on the file's grid.
        affine: affine of the label map, voxel → RAS+ world, mm.
        volumes_mm3: name of each structure and of each sum in the spec → volume, mm³.
        spec: gives `warn_at_edge` and `plausible_ml`.
    """
    warnings = []
    faces = touched_faces(labels, affine) if spec.warn_at_edge else []
    if faces:
        warnings.append(
            f"structures reach the scan's edge ({', '.join(faces)}): part of them may be missing"
        )
    implausible = []
    for name, (low, high) in spec.plausible_ml.items():
        volume_ml = volumes_mm3[name] / MM3_PER_ML
        if not low <= volume_ml <= high:
            implausible.append(f"{name}: {volume_ml:.3g} mL, expected {low:g} to {high:g}")
    if len(implausible) > MAX_SEPARATE_WARNINGS:
        listed = ", ".join(implausible[:MAX_SEPARATE_WARNINGS])
        warnings.append(
            f"{len(implausible)} of {len(spec.plausible_ml)} volumes are out of range "
            f"({listed}, …): look at it"
        )
    else:
        warnings += [f"{line}: look at it" for line in implausible]
    return warnings


def touched_faces(labels: LabelMap, affine: Affine) -> list[str]:
    """Return the faces of a volume that labels touch, named by their side of the body, sorted.

    Args:
        labels: (X, Y, Z) label map, 0 for background.
        affine: affine of the label map, voxel → RAS+ world, mm.
    """
    faces = []
    for axis, code in enumerate(nib.aff2axcodes(affine)):
        if labels.take(0, axis=axis).any():
            faces.append(FACE_NAMES[OPPOSITE[code]])
        if labels.take(-1, axis=axis).any():
            faces.append(FACE_NAMES[code])
    return sorted(faces)
