"""One channel of a case, its header, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from pipeline.errors import GeometryError, VolumeError
from pipeline.io.formats import printable
from pipeline.types import Affine, Array, ImageSource

SAME_GRID_MM = 0.01  # float32 headers round: corners of images on one grid may differ by this much


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What is known of a volume before its voxels are read.

    Attributes:
        shape: (X, Y, Z) voxels, without further axes.
        affine: voxel index → RAS+ world, mm.
        bytes_per_voxel: of the type that the file stores.
        volumes: number of volumes along all further axes.
        warnings: what is doubtful about the header, one sentence each.
        file_bytes: size of all files of the volume on disk, compressed or not; 0 for an image in
            memory.
        nifti: see `Image.header`.
        volumes_differ_in: attributes that tell the volumes apart, where that is known.
    """

    shape: tuple[int, ...]
    affine: Affine
    bytes_per_voxel: int
    volumes: int = 1
    warnings: tuple[str, ...] = ()
    file_bytes: int = 0
    nifti: bytes = b""
    volumes_differ_in: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along the three axes, mm."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())

    @property
    def declared_bytes(self) -> int:
        """Bytes of the voxels of all volumes, as the header declares them, decompressed."""
        return prod(self.shape) * self.volumes * self.bytes_per_voxel


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """A file whose header has been read and checked.

    Attributes:
        header: what it says.
        files: all files that it consists of, the given one first.
        bytes_held: bytes of voxels that `voxels` holds at a time.
        voxels: returns (X, Y, Z) of one volume, by its number.
    """

    header: Header
    files: tuple[Path, ...]
    bytes_held: int
    voxels: Callable[[int], Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One channel, as read.

    Attributes:
        array: (X, Y, Z), scaled by the header's slope and intercept.
        affine: voxel index → RAS+ world, mm.
        header: the bytes of a NIfTI header (348 or 540) for label maps on the same grid, in the
            file's own unit: a NIfTI file's own, or one whose codes claim no scanner coordinates for
            other formats without an orientation. Empty for all others.
        warnings: what is doubtful about the file, one sentence each.
    """

    array: Array
    affine: Affine
    header: bytes = b""
    warnings: tuple[str, ...] = ()


def corner_distance(first: Affine, second: Affine, shape: tuple[int, ...]) -> float:
    """Return the largest distance between a volume's corner voxels under two affines, mm.

    Returns:
        infinity where one of the affines is not finite.
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("inf")
    last = np.array(shape[:3]) - 1
    corners = [[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)]
    offsets = (np.array(corners) @ (first - second).T)[:, :3]
    return float(np.linalg.norm(offsets, axis=1).max())


def check_same_grid(
    first_name: ImageSource, first: Image, other_name: ImageSource, other: Image
) -> None:
    """Check that two channels have one shape and one affine.

    Args:
        first_name: source of the first channel, for the message.
        first: the first channel.
        other_name: source of the other channel, for the message.
        other: the other channel.

    Raises:
        GeometryError: they differ; the message names both.
    """
    first_name, other_name = _shown(first_name), _shown(other_name)
    if first.array.shape != other.array.shape:
        raise GeometryError(
            f"{other_name} has shape {other.array.shape}, {first_name} {first.array.shape}: "
            "channels must share one grid"
        )
    distance = corner_distance(first.affine, other.affine, first.array.shape)
    if distance > SAME_GRID_MM:
        raise GeometryError(
            f"{other_name} and {first_name} lie up to {distance:.2f} mm apart: "
            "resample the channels to one grid first"
        )


def _shown(source: ImageSource) -> str:
    return printable(source) if isinstance(source, str | Path) else str(source)


def select_volume(array: Array, name: str, volume: int | None) -> Array:
    """Return one three-dimensional volume of an array.

    Args:
        array: (X, Y, Z) or (X, Y, Z, ...) with the volumes along all further axes.
        name: of the file, for the message.
        volume: see `volume_number`.

    Raises:
        VolumeError: see `volume_number`.
    """
    spatial = array.shape[:3]
    number = volume_number(array.shape, name, volume)
    count = prod(array.shape[3:])
    if count == 1:
        return array.reshape(spatial)
    # volumes are numbered as they are stored: the first of the further axes runs fastest
    return array.reshape(*spatial, count, order="F")[..., number]


def volume_number(shape: tuple[int, ...], name: str, volume: int | None) -> int:
    """Return the number of the volume to read.

    Args:
        shape: (X, Y, Z) or (X, Y, Z, ...) with the volumes along all further axes.
        name: of the file, for the message.
        volume: number of the volume, from 0; None accepts files with a single volume only.

    Raises:
        VolumeError: too few dimensions, several volumes and no number, or no volume of that number.
    """
    check_dimensions(shape, name)
    count = prod(shape[3:])
    if volume is None and count != 1:
        raise VolumeError(
            f"{name}: holds {count} volumes, expected one; "
            f"pick one with --volume T (0 to {count - 1})"
        )
    number = volume or 0
    if not 0 <= number < count:
        raise VolumeError(
            f"{name}: --volume {number} asked for, the file holds volumes 0 to {count - 1}"
        )
    return number


def check_dimensions(shape: tuple[int, ...], name: str) -> None:
    """Check that a shape has three spatial axes.

    Raises:
        VolumeError: it has fewer.
    """
    if len(shape) < 3:
        raise VolumeError(
            f"{name}: has shape {shape}, expected three dimensions; "
            "a single slice needs a third axis of 1"
        )
