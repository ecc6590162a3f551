"""A label map as a file on its input's grid, whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from isal import igzip

from pipeline.errors import WriteError
from pipeline.types import Affine, Array, LabelMap

if TYPE_CHECKING:
    import SimpleITK as sitk

COMPRESSION = 3  # of 0 to 3
NIFTI1_BYTES = 348
DESCRIPTION = b"volseg label map"  # the header's mark of a file that we wrote and may replace
BYTE = 255
SCANNER_CODE = 1  # NIFTI_XFORM_SCANNER_ANAT, for inputs that are not NIfTI


def as_nibabel(labels: LabelMap, affine: Affine, header: bytes = b"") -> nib.Nifti1Image:
    """A NIfTI image of a label map.

    Args:
        labels: (X, Y, Z), of an unsigned type.
        affine: voxel → RAS+ world, mm; with a header, that header's own.
        header: the input's own NIfTI header: qform and sform with their codes and the units are kept to the bit.
    """
    if not header:
        image = nib.Nifti1Image(labels, affine)
        image.set_sform(affine, code=SCANNER_CODE)
        image.set_qform(affine, code=SCANNER_CODE, strip_shears=True)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = DESCRIPTION
        return image
    kind = nib.Nifti1Image if len(header) == NIFTI1_BYTES else nib.Nifti2Image
    own = kind.header_class(header, check=False)
    zooms = own.get_zooms()[:3]
    own.set_data_dtype(labels.dtype)
    own.set_data_shape(labels.shape)
    own.set_zooms(zooms)
    own.set_slope_inter(1, 0)
    own.set_intent("label", (), "", allow_unknown=True)
    own["cal_min"] = own["cal_max"] = 0
    own["descrip"] = DESCRIPTION
    return kind(labels, affine, own)


def fractions_as_nibabel(values: Array, affine: Affine, header: bytes = b"") -> nib.Nifti1Image:
    """A NIfTI image of values from 0 to 1, in steps of 1/255: one byte a voxel and a slope. The rest as `as_nibabel`."""
    image = as_nibabel(np.rint(values.clip(0, 1) * BYTE).astype(np.uint8), affine, header)
    image.header.set_slope_inter(1 / BYTE, 0)
    image.header.set_intent("none")
    return image


def write_labels(path: Path, image: nib.Nifti1Image) -> None:
    """Writes a label map as .nii.gz: under a temporary name in the same folder, then renamed.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    write_atomically(path, igzip.compress(image.to_bytes(), COMPRESSION, mtime=0))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and makes its folder.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise WriteError(
            f"{path}: cannot be written: {error.strerror or error}; is the disk full or read-only?"
        ) from error


def as_sitk(labels: LabelMap, affine: Affine, like: sitk.Image) -> sitk.Image:
    """A SimpleITK image of a label map: on the grid of another, to the bit, where its affine is that one's."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.transpose()))
    dims, all_dims = image.GetDimension(), like.GetDimension()
    direction = np.array(like.GetDirection()).reshape(all_dims, all_dims)[:dims, :dims]
    origin, spacing = np.array(like.GetOrigin()[:dims]), np.array(like.GetSpacing()[:dims])
    if not np.allclose(_lps(affine), np.column_stack([direction * spacing, origin]), atol=1e-4):
        grid = _lps(affine)
        origin, spacing = grid[:, 3], np.linalg.norm(grid[:, :3], axis=0)
        direction = grid[:, :3] / spacing
    image.SetOrigin(origin.tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    return image


def _lps(affine: Affine) -> Array:
    """The first three rows of an affine, in ITK's directions of the axes."""
    rows: Array = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    return rows
