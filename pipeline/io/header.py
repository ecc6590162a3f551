"""Shape, affine and type of a volume, read without its voxels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from pipeline.errors import ReadError
from pipeline.io.formats import SITK_READERS, image_suffix
from pipeline.io.itk import sitk_affine
from pipeline.types import Affine, ImageSource

SITK_BYTES = 8  # of the largest pixel type; an upper bound, for an estimate of memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What is known of a volume before its voxels are read.

    Attributes:
        shape: (X, Y, Z) voxels, without further axes.
        affine: voxel index → RAS+ world, mm.
        bytes_per_voxel: of the type that the file stores, an upper bound for NRRD and MetaImage.
    """

    shape: tuple[int, ...]
    affine: Affine
    bytes_per_voxel: int


def read_header(source: ImageSource) -> Header:
    """Read the header of a path, a nibabel image or a SimpleITK image.

    Raises:
        ReadError: the header is missing or damaged.
    """
    try:
        return _read_header(source)
    except Exception as error:  # nibabel and SimpleITK raise errors of many types
        raise ReadError(f"{source}: its header cannot be read: {error}") from error


def _read_header(source: ImageSource) -> Header:
    if isinstance(source, str | Path):
        if image_suffix(Path(source)) in SITK_READERS:
            return _read_sitk_header(Path(source))
        source = nib.load(source)
    if isinstance(source, SpatialImage):
        return Header(
            shape=tuple(source.shape[:3]),
            affine=np.asarray(source.affine),
            bytes_per_voxel=np.dtype(source.get_data_dtype()).itemsize,
        )
    return _sitk_header(source, source.GetNumberOfComponentsPerPixel())


def _read_sitk_header(path: Path) -> Header:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return _sitk_header(reader, reader.GetNumberOfComponents())


def _sitk_header(image: Any, components: int) -> Header:
    return Header(
        shape=tuple(image.GetSize()[:3]),
        affine=sitk_affine(image),
        bytes_per_voxel=SITK_BYTES * components,
    )
