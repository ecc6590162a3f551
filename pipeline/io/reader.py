"""Reading the channels of a case: files, or images in memory.

nibabel reads the headers of NIfTI, MGH and Analyze, SimpleITK reads NRRD and MetaImage, pydicom
reads DICOM. What a header declares is compared with its file before memory is taken for it.
Compressed files are read to their end, so that a truncated file or a wrong checksum is an error and
never an image with missing voxels.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import VolumeError
from pipeline.io.header import describe, read_header, readable, source_name
from pipeline.io.image import Header, Image, check_same_grid, volume_number
from pipeline.types import ImageSource


def read(source: ImageSource, volume: int | None = None, *, max_bytes: int | None = None) -> Image:
    """Read one channel of a case.

    Args:
        source: a path, a DICOM series, a nibabel image or a SimpleITK image.
        volume: which volume of a 4D file, from 0; None accepts files with a single volume only.
        max_bytes: of the voxels as they are stored, decompressed; None for no limit.

    Raises:
        ReadError: the file is missing, truncated, damaged or of an unknown format, or its size is
            not what its header declares.
        VolumeError: it holds colours or complex numbers, is not three-dimensional, or takes more
            than `max_bytes`.
    """
    name = source_name(source)
    with readable(source):
        file = describe(source)
        header = file.header
        apart = ", ".join(header.volumes_differ_in)
        shown = f"{name} (volumes with another {apart})" if apart else name
        number = volume_number((*header.shape, header.volumes), shown, volume)
        if max_bytes is not None and file.bytes_held > max_bytes:
            raise VolumeError(
                f"{name}: its header declares {file.bytes_held / 2**30:.2f} GB of voxels, "
                f"--max-memory allows {max_bytes / 2**30:.2f} GB; give more, or crop the volume"
            )
        array = file.voxels(number)
    return Image(array=array, affine=header.affine, header=header.nifti, warnings=header.warnings)


def source_list(sources: ImageSource | list[ImageSource]) -> list[ImageSource]:
    """Return the sources of a case's channels as a list, also where there is only one channel."""
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def read_channels(
    sources: ImageSource | list[ImageSource],
    channels: int | None = None,
    volume: int | None = None,
) -> list[Image]:
    """Read all channels of a case.

    A single file with as many volumes as the model has channels, as the Decathlon stores them, is
    read volume by volume.

    Args:
        sources: one source per channel, or one for all channels.
        channels: number of channels of the model; None for one per source.
        volume: which volume of 4D files, from 0; it counts for each source, and then no file is
            taken for several channels.

    Raises:
        ReadError: a file cannot be read.
        VolumeError: a file does not hold one grey volume.
        GeometryError: the channels are on different grids.
    """
    listed = source_list(sources)
    if volume is None and len(listed) == 1 and _volumes_are_channels(listed[0], channels):
        return [read(listed[0], number) for number in range(channels or 0)]
    images = [read(source, volume) for source in listed]
    for source, image in zip(listed[1:], images[1:], strict=True):
        check_same_grid(listed[0], images[0], source, image)
    return images


def channel_headers(
    sources: ImageSource | list[ImageSource], channels: int | None = None
) -> list[Header]:
    """Return the headers of a case's channels, as `read_channels` reads them.

    Args:
        sources: one source per channel, or one for all channels.
        channels: number of channels of the model; None for one per source.

    Raises:
        ReadError: a file is missing, too short for its header, damaged or of an unknown format.
        VolumeError: it holds colours or complex numbers, or is not three-dimensional.
    """
    headers = [read_header(source) for source in source_list(sources)]
    if len(headers) == 1 and channels is not None and headers[0].volumes == channels:
        return [replace(headers[0], volumes=1)] * channels
    return headers


def _volumes_are_channels(source: ImageSource, channels: int | None) -> bool:
    if channels is None or channels < 2:
        return False
    return read_header(source).volumes == channels
