"""Copies of images as NIfTI files, for programs that read nothing else, and parts of images."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np

from pipeline.io.grid import Grid
from pipeline.io.image import Image
from pipeline.types import PathOrStr


def write_copy(path: PathOrStr, image: Image) -> None:
    """Write an image as a NIfTI file in float32.

    Args:
        path: the file, with the suffix .nii or .nii.gz.
        image: as read.
    """
    nib.save(nib.Nifti1Image(np.asarray(image.array, dtype=np.float32), image.affine), path)


def write_part(source: PathOrStr, box: Sequence[slice], path: PathOrStr) -> Grid:
    """Write a box of a NIfTI file as a file of its own, and return its grid.

    Args:
        source: the file.
        box: voxels along each spatial axis.
        path: the new file.
    """
    part = nib.load(source).slicer[tuple(box)]
    nib.save(part, path)
    return Grid(affine=np.asarray(part.affine, dtype=np.float64), shape=tuple(part.shape[:3]))
