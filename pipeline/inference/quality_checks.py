"""What makes a finished segmentation doubtful: structures cut off by the scan's edge, volumes that nobody has."""

from __future__ import annotations

from collections.abc import Mapping

import nibabel as nib

from pipeline.config import Spec
from pipeline.types import Affine, LabelMap

FACES = {
    "R": "right",
    "L": "left",
    "A": "anterior",
    "P": "posterior",
    "S": "superior",
    "I": "inferior",
}
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
ML = 1000.0  # mm³
NAMED = 4  # volumes out of their range that are told one by one; more than that are summed up


def quality_warnings(
    labels: LabelMap, affine: Affine, volumes_mm3: Mapping[str, float], spec: Spec
) -> list[str]:
    """One line a reason to look at a case, as its spec names them.

    Args:
        labels: (X, Y, Z) output values on the file's grid.
        affine: voxel → RAS+ world, mm.
        volumes_mm3: name → volume of each structure and sum.
        spec: `whole` and `plausible_ml`.
    """
    lines = []
    faces = touched_faces(labels, affine) if spec.warn_at_edge else []
    if faces:
        lines.append(
            f"structures reach the scan's edge ({', '.join(faces)}): part of them may be missing"
        )
    sizes = {name: (volumes_mm3[name] / ML, *ends) for name, ends in spec.plausible_ml.items()}
    odd = {
        name: (ml, low, high) for name, (ml, low, high) in sizes.items() if not low <= ml <= high
    }
    told = [
        f"{name}: {ml:.3g} mL, expected {low:g} to {high:g}"
        for name, (ml, low, high) in odd.items()
    ]
    if len(told) > NAMED:
        return [
            *lines,
            f"{len(told)} of {len(sizes)} volumes are out of range ({', '.join(told[:NAMED])}, …): look at it",
        ]
    return [*lines, *(f"{line}: look at it" for line in told)]


def touched_faces(labels: LabelMap, affine: Affine) -> list[str]:
    """The sides of the body on which a label lies in a volume's outermost voxels."""
    faces = []
    for axis, code in enumerate(nib.aff2axcodes(affine)):
        for end, side in ((0, OPPOSITE[code]), (-1, code)):
            if labels.take(end, axis=axis).any():
                faces.append(FACES[side])
    return sorted(faces)
