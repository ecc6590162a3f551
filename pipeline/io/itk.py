"""Conversion between SimpleITK images and arrays with an affine.

ITK's world axes are LPS (left, posterior, superior), the affines of this package are RAS+.
SimpleITK is imported inside the functions: it is slow to load, and NIfTI files do not need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ReadError, VolumeError
from pipeline.io.image import Image, select_volume
from pipeline.types import Affine, LabelMap

if TYPE_CHECKING:
    import SimpleITK as sitk

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
SAME_GRID_ATOL = 1e-4  # mm: a difference in rounding, not of grids


def sitk_affine(image: Any) -> Affine:
    """Return the affine of a SimpleITK image or ImageFileReader: voxel index → RAS+ world, mm."""
    dims = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dims, dims)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    ras: Affine = RAS_FROM_LPS @ affine
    return ras


def read_sitk(path: Path, reader: str) -> sitk.Image:
    """Read a file with the named reader of SimpleITK.

    Args:
        path: the file.
        reader: the name of an ImageIO, because SimpleITK does not know suffixes in upper case.

    Raises:
        ReadError: the file is damaged or of another format.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return sitk.ReadImage(str(path), imageIO=reader)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ReadError(
            f"{path}: cannot be read: {reason}; is the file whole? Copy or convert it again"
        ) from error


def from_sitk(image: sitk.Image, name: str, volume: int | None) -> Image:
    """Return a SimpleITK image as an array with its affine.

    Args:
        image: the image.
        name: of the image, for the message.
        volume: which volume of a 4D image, from 0.

    Raises:
        VolumeError: complex numbers, several values per voxel, or not one 3D volume.
    """
    import SimpleITK as sitk

    components = image.GetNumberOfComponentsPerPixel()
    if "complex" in image.GetPixelIDTypeAsString():
        raise VolumeError(
            f"{name}: holds complex numbers, expected magnitudes; save the magnitude image instead"
        )
    if components > 1:
        raise VolumeError(
            f"{name}: holds {components} values per voxel (colours or vectors), "
            "expected one grey value"
        )
    # a copy, because the view is only valid as long as the SimpleITK image lives
    voxels = sitk.GetArrayViewFromImage(image).transpose().copy(order="F")
    return Image(array=select_volume(voxels, name, volume), affine=sitk_affine(image))


def as_sitk(labels: LabelMap, affine: Affine, like: sitk.Image) -> sitk.Image:
    """Return a label map as a SimpleITK image.

    Args:
        labels: (X, Y, Z).
        affine: voxel index → RAS+ world, mm.
        like: the input image. Where it lies on the same grid, its origin, spacing and direction are
            copied, so that the two images agree to the last bit.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.transpose()))
    dims, like_dims = image.GetDimension(), like.GetDimension()
    origin, spacing = np.array(like.GetOrigin()[:dims]), np.array(like.GetSpacing()[:dims])
    direction = np.array(like.GetDirection()).reshape(like_dims, like_dims)[:dims, :dims]
    if not np.allclose(affine, sitk_affine(like), atol=SAME_GRID_ATOL):
        grid = RAS_FROM_LPS @ affine
        origin, spacing = grid[:3, 3], np.linalg.norm(grid[:3, :3], axis=0)
        direction = grid[:3, :3] / spacing
    image.SetOrigin(origin.tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    return image
