"""Writing label maps as NIfTI files on the input's grid, and any file atomically."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from pipeline.errors import WriteError
from pipeline.types import Affine, Array, LabelMap

COMPRESSION = 3  # igzip's levels are 0 to 3; 3 makes the smallest files and is still fast
NIFTI1_BYTES = 348
DESCRIPTION = b"volseg label map"  # in the header of every label map that volseg writes
BYTE = 255
SCANNER_CODE = 1  # NIFTI_XFORM_SCANNER_ANAT, for inputs that are not NIfTI


def as_nibabel(labels: LabelMap, affine: Affine, header: bytes = b"") -> nib.Nifti1Image:
    """Return a label map as a NIfTI image.

    Args:
        labels: (X, Y, Z), of an unsigned type.
        affine: voxel index → RAS+ world, mm; the header's own where there is a header.
        header: the bytes of the input's NIfTI header. Its qform and sform, their codes and its
            units are kept to the last bit.
    """
    if not header:
        image = nib.Nifti1Image(labels, affine)
        image.set_sform(affine, code=SCANNER_CODE)
        image.set_qform(affine, code=SCANNER_CODE, strip_shears=True)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = DESCRIPTION
        return image
    image_class = nib.Nifti1Image if len(header) == NIFTI1_BYTES else nib.Nifti2Image
    kept = image_class.header_class(header, check=False)
    zooms = kept.get_zooms()[:3]
    kept.set_data_dtype(labels.dtype)
    kept.set_data_shape(labels.shape)
    kept.set_zooms(zooms)
    kept.set_slope_inter(1, 0)
    kept.set_intent("label", (), "", allow_unknown=True)
    kept["cal_min"] = kept["cal_max"] = 0  # the input's display window fits no labels
    kept["descrip"] = DESCRIPTION
    return image_class(labels, affine, kept)


def fractions_as_nibabel(values: Array, affine: Affine, header: bytes = b"") -> nib.Nifti1Image:
    """Return a map of fractions as a NIfTI image with one byte per voxel and a slope of 1/255.

    Args:
        values: (X, Y, Z), 0 to 1.
        affine: see `as_nibabel`.
        header: see `as_nibabel`.
    """
    image = as_nibabel(np.rint(values.clip(0, 1) * BYTE).astype(np.uint8), affine, header)
    image.header.set_slope_inter(1 / BYTE, 0)
    image.header.set_intent("none")
    return image


def write_labels(path: Path, image: nib.Nifti1Image) -> None:
    """Write a label map as .nii.gz, atomically; the same labels give the same bytes.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    # without a time in the gzip header, so that results can be compared by their hash
    write_atomically(path, igzip.compress(image.to_bytes(), COMPRESSION, mtime=0))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, and make its folder.

    The content goes to a temporary file in the same folder, which is then renamed. Whatever stops
    the writing, the final name holds the old file or none.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            # before renaming, or a power cut could leave the final name on an empty file
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
