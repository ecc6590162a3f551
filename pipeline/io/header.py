"""What a file says of its volume before its voxels are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from pipeline.errors import ReadError
from pipeline.io.reader import SITK_READERS, image_suffix
from pipeline.types import Affine


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says of its volume before its voxels are read.

    Attributes:
        shape: voxels along three axes.
        affine: voxel index → RAS+ world, mm.
        bytes_per_voxel: of the file's own type.
    """

    shape: tuple[int, ...]
    affine: Affine
    bytes_per_voxel: int


def read_header(source: Any) -> Header:
    """What a path or an image in memory says of its volume, without its voxels.

    Raises:
        ReadError: there is no header to be read.
    """
    try:
        if isinstance(source, str | Path) and image_suffix(Path(source)) in SITK_READERS:
            import SimpleITK as sitk

            reader = sitk.ImageFileReader()
            reader.SetFileName(str(source))
            reader.ReadImageInformation()
            return _sitk_header(reader, reader.GetNumberOfComponents())
        image = nib.load(source) if isinstance(source, str | Path) else source
        if isinstance(image, SpatialImage):
            dtype = np.dtype(image.get_data_dtype())
            return Header(
                shape=tuple(image.shape[:3]),
                affine=np.asarray(image.affine),
                bytes_per_voxel=dtype.itemsize,
            )
        return _sitk_header(image, image.GetNumberOfComponentsPerPixel())
    except Exception as error:
        raise ReadError(f"{source}: its header cannot be read: {error}") from error


def _sitk_header(image: Any, components: int) -> Header:
    dims = image.GetDimension()
    matrix = (
        np.array(image.GetDirection()).reshape(dims, dims)[:3, :3]
        * np.array(image.GetSpacing())[:3]
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, image.GetOrigin()[:3]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS+
    return Header(shape=tuple(image.GetSize()[:3]), affine=affine, bytes_per_voxel=8 * components)
