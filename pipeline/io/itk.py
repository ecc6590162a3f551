"""Conversion between SimpleITK images and arrays with an affine.

ITK's world axes are LPS (left, posterior, superior), the affines of this package are RAS+.
SimpleITK is imported inside the functions: it is slow to load, and NIfTI files do not need it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import VolumeError
from pipeline.io.formats import printable
from pipeline.io.image import Header, ImageFile, check_dimensions, select_volume
from pipeline.io.nifti import header_of_a_guess
from pipeline.io.streams import unreadable
from pipeline.io.text_headers import VoxelData, metaimage_data, nrrd_data
from pipeline.types import Affine, Array, LabelMap

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


def describe_sitk_file(path: Path, reader_name: str) -> ImageFile:
    """Return the header of a NRRD or MetaImage file, checked against the size of its data files.

    Args:
        path: the file.
        reader_name: the name of an ImageIO, because SimpleITK does not know suffixes in upper case.

    Raises:
        ReadError: a file is missing, damaged, of another format, too short or too long.
        VolumeError: it holds complex numbers, several values per voxel, or fewer than three
            dimensions.
    """
    import SimpleITK as sitk

    data = nrrd_data(path) if reader_name == "NrrdImageIO" else metaimage_data(path)
    data.check_room()
    reader = sitk.ImageFileReader()
    reader.SetImageIO(reader_name)
    with _sitk_errors(path), _name_for_sitk(path, data.files) as name:
        reader.SetFileName(name)
        reader.ReadImageInformation()
    header = _header(
        reader,
        printable(path),
        reader.GetNumberOfComponents(),
        sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()),
    )
    if prod(header.shape) * header.volumes > data.values:
        raise unreadable(path, f"SimpleITK takes {header.shape} voxels, its header {data.values}")
    affine = header.affine.copy()
    affine[:3] *= np.array(data.mm_per_unit)[:, np.newaxis]
    files = tuple(dict.fromkeys((path, *data.files)))
    header = replace(
        header,
        affine=affine,
        bytes_per_voxel=data.bytes_per_value,
        warnings=data.doubts,
        file_bytes=sum(file.stat().st_size for file in files),
        nifti=header_of_a_guess(affine, header.shape) if data.doubts else b"",
    )
    return ImageFile(
        header=header,
        files=files,
        bytes_held=data.declared_bytes,
        voxels=partial(_file_voxels, data, reader_name),
    )


def describe_sitk_image(image: sitk.Image, name: str) -> ImageFile:
    """Return the header of a SimpleITK image.

    Raises:
        VolumeError: complex numbers, several values per voxel, or fewer than three dimensions.
    """
    components = image.GetNumberOfComponentsPerPixel()
    header = _header(image, name, components, image.GetPixelIDTypeAsString())
    header = replace(header, bytes_per_voxel=image.GetSizeOfPixelComponent())
    return ImageFile(
        header=header,
        files=(),
        bytes_held=header.declared_bytes,
        voxels=lambda number: select_volume(_array(image), name, number),
    )


def _file_voxels(data: VoxelData, reader_name: str, number: int) -> Array:
    import SimpleITK as sitk

    data.check_content()
    with _sitk_errors(data.path), _name_for_sitk(data.path, data.files) as name:
        image = sitk.ReadImage(name, imageIO=reader_name)
    return select_volume(_array(image), printable(data.path), number)


def _array(image: sitk.Image) -> Array:
    import SimpleITK as sitk

    # a copy, because the view is only valid as long as the SimpleITK image lives
    copy: Array = sitk.GetArrayViewFromImage(image).transpose().copy(order="F")
    return copy


def _header(image: Any, name: str, components: int, pixel_type: str) -> Header:
    """Return the header of a SimpleITK image or ImageFileReader; its type is 1 byte here."""
    if "complex" in pixel_type:
        raise VolumeError(
            f"{name}: holds complex numbers, expected magnitudes; save the magnitude image instead"
        )
    if components > 1:
        raise VolumeError(
            f"{name}: holds {components} values per voxel (colours or vectors), "
            "expected one grey value"
        )
    shape = tuple(image.GetSize())
    check_dimensions(shape, name)
    return Header(
        shape=shape[:3], volumes=prod(shape[3:]), affine=sitk_affine(image), bytes_per_voxel=1
    )


@contextmanager
def _sitk_errors(path: Path) -> Iterator[None]:
    """Raise a ReadError in place of SimpleITK's errors, with the last line of their text."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or ["SimpleITK gives no reason"]
        raise unreadable(path, printable(lines[-1])) from error


@contextmanager
def _name_for_sitk(path: Path, files: tuple[Path, ...]) -> Iterator[str]:
    """Give a name under which SimpleITK finds a file: it takes only names in UTF-8."""
    if os.fsencode(path).decode(errors="ignore") == str(path):
        yield str(path)
        return
    with TemporaryDirectory() as folder:
        for file in files:
            if file.parent == path.parent and file != path:
                (Path(folder) / file.name).symlink_to(file.absolute())
        link = Path(folder) / f"image{path.suffix}"
        link.symlink_to(path.absolute())
        yield str(link)


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
