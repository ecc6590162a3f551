"""The grid that label maps are written on where they do not lie on their file's: the same field of view, other voxels."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import nibabel as nib
import numpy as np

from pipeline.errors import VolumeError
from pipeline.io.writer import NIFTI1_BYTES, SCANNER_CODE
from pipeline.types import Affine

MOST = 2**30  # voxels of a label map
SPARE = 0.01  # voxels by which the new field of view may fall short of the old one


def isotropic_grid(
    affine: Affine, shape: Sequence[int], spacing: float
) -> tuple[Affine, tuple[int, ...]]:
    """A grid of cubic voxels, turned as another and centred on it, that holds as much; a last voxel may reach beyond.

    Args:
        affine: voxel → RAS+ world, mm.
        shape: voxels along its axes.
        spacing: of the new voxels, mm.

    Returns:
        affine and shape; as they were where the affine is none that a volume can have, which is for `check` to say.

    Raises:
        VolumeError: the grid would be too large to be held.
    """
    if not _is_sound(affine):
        return affine, tuple(shape)
    ratio = spacing / np.linalg.norm(affine[:3, :3], axis=0)
    size = tuple(max(1, ceil(n / step - SPARE)) for n, step in zip(shape, ratio, strict=True))
    if prod(size) > MOST:
        raise VolumeError(
            f"a label map of {spacing:g} mm has {' × '.join(map(str, size))} voxels; give a larger --labels-spacing"
        )
    new = affine.copy()
    new[:3, :3] *= ratio
    new[:3, 3] += affine[:3, :3] @ ((np.array(shape) - 1) / 2) - new[:3, :3] @ (
        (np.array(size) - 1) / 2
    )
    return new, size


def header_on_grid(header: bytes, affine: Affine) -> tuple[bytes, Affine]:
    """A NIfTI header moved to another grid, with its codes, and that grid as the header can tell it (in single precision)."""
    if not header or not _is_sound(affine):
        return header, affine
    kind = nib.Nifti1Header if len(header) == NIFTI1_BYTES else nib.Nifti2Header
    own = kind(header, check=False)
    codes = [int(own[name]) for name in ("sform_code", "qform_code")]
    own.set_qform(affine, code=codes[1], strip_shears=True)
    own.set_sform(affine, code=codes[0] if any(codes) else SCANNER_CODE)
    return own.binaryblock, own.get_best_affine()


def _is_sound(affine: Affine) -> bool:
    return bool(np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]))
