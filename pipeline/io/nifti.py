"""NIfTI headers: units, what is doubtful about the orientation, and headers for label maps.

The codes of sform and qform say what an affine means: 1 is the scanner's coordinates, 2 those of
another file. 0 means that the affine is unknown, and readers then assume one: nibabel a volume
centred at 0 whose first axis runs from right to left.
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from pipeline.io.image import corner_distance
from pipeline.types import Affine

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
MAX_NIFTI1_SIZE = 2**15 - 1  # voxels along an axis
SCANNER_CODE, ALIGNED_CODE = 1, 2  # NIFTI_XFORM_SCANNER_ANAT, NIFTI_XFORM_ALIGNED_ANAT
# mm per unit, by the three lowest bits of xyzt_units; 0 and unknown codes are taken for mm
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
CODES_AGREE_MM = 0.5  # float32 headers round: corners under sform and qform may differ by this much


def parse_nifti(header: bytes) -> nib.Nifti1Header:
    """Return the header that these 348 (NIfTI-1) or 540 bytes (NIfTI-2) hold, without checks."""
    kind = nib.Nifti1Header if len(header) == NIFTI1_BYTES else nib.Nifti2Header
    return kind(header, check=False)


def mm_per_unit(header: nib.Nifti1Header) -> float:
    """Return the length of a header's spatial unit, mm."""
    return MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def in_mm(affine: Affine, factor: float) -> Affine:
    """Return an affine whose world unit is `factor` mm as one in mm."""
    converted = np.array(affine, dtype=np.float64)
    if factor != 1:
        converted[:3] *= factor
    return converted


def sides_are_guessed(reason: str) -> str:
    """Return the warning about a file that stores no orientation."""
    return f"{reason}: left and right are a guess (x taken to run from right to left)"


def orientation_warnings(header: nib.Nifti1Header, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return what is doubtful about the two affines of a header.

    nibabel uses the sform if its code is set, else the qform, else a default affine.
    """
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        return (sides_are_guessed("neither sform nor qform is set"),)
    if not sform or not qform:
        return ()
    distance = corner_distance(header.get_sform(), header.get_qform(), shape)
    distance *= mm_per_unit(header)
    if distance <= CODES_AGREE_MM:
        return ()
    return (
        f"sform (code {sform}) and qform (code {qform}) disagree by up to {distance:.1f} mm: "
        "the sform was used",
    )


def header_of_a_guess(affine: Affine, shape: tuple[int, ...]) -> bytes:
    """Return a header for the label map of a file of another format that stores no orientation.

    It does not claim scanner coordinates. Both codes are 0 where readers of NIfTI assume the same
    affine as we did; else the sform has the code 2 (the coordinates of another file), because with
    a code of 0 they would not use it.

    Args:
        affine: voxel index → RAS+ world, mm.
        shape: (X, Y, Z) voxels.

    Returns:
        nothing for an affine that no volume can have: `CheckVolumed` refuses it.
    """
    if not (np.isfinite(affine).all() and np.linalg.det(affine[:3, :3])):
        return b""
    header = nib.Nifti1Header() if max(shape) <= MAX_NIFTI1_SIZE else nib.Nifti2Header()
    header.set_xyzt_units("mm")
    _place(header, affine, shape, codes=(0, 0))
    block: bytes = header.binaryblock
    return block


def moved_header(header: bytes, affine: Affine, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """Return a header on another grid, with the same codes and unit.

    Args:
        header: the bytes of a NIfTI header.
        affine: voxel index → RAS+ world, mm, of the new grid.
        shape: (X, Y, Z) voxels of the new grid.
    """
    moved = parse_nifti(header)
    codes = int(moved["sform_code"]), int(moved["qform_code"])
    _place(moved, in_mm(affine, 1 / mm_per_unit(moved)), shape, codes)
    return moved


def _place(
    header: nib.Nifti1Header, affine: Affine, shape: tuple[int, ...], codes: tuple[int, int]
) -> None:
    """Set the affine, in the header's unit, and the shape of a header, in place."""
    header.set_data_shape(shape)
    header.set_qform(affine, code=codes[1], strip_shears=True)
    header.set_sform(affine, code=codes[0])
    if any(codes):
        return
    assumed: Any = header.get_base_affine()
    tolerance = 1e-3 * float(np.linalg.norm(affine[:3, :3], axis=0).min())
    if corner_distance(assumed, affine, shape) > tolerance:
        header["sform_code"] = ALIGNED_CODE
