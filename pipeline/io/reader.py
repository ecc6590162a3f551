"""Reading one channel of a case: a file, or an image in memory.

nibabel reads the headers of NIfTI, MGH and Analyze, SimpleITK reads NRRD and MetaImage. What a
header declares is compared with its file before memory is taken for it. Compressed files are read
to their end, so that a truncated file or a wrong checksum is an error and never an image with
missing voxels.
"""

from __future__ import annotations

from pipeline.errors import VolumeError
from pipeline.io.header import describe, readable, source_name
from pipeline.io.image import Image, volume_number
from pipeline.types import ImageSource


def read(source: ImageSource, volume: int | None = None, *, max_bytes: int | None = None) -> Image:
    """Read one channel of a case.

    Args:
        source: a path, a nibabel image or a SimpleITK image.
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
        number = volume_number((*header.shape, header.volumes), name, volume)
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
