"""Reading one channel of a case: a file, or an image in memory.

nibabel reads NIfTI, MGH and Analyze, SimpleITK reads NRRD and MetaImage. Compressed files are
decompressed completely before they are parsed, so that a truncated file or a wrong checksum is an
error and never an image with missing voxels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.spatialimages import SpatialImage

from pipeline.errors import PipelineError, ReadError, VolumeError
from pipeline.io.formats import SITK_READERS, SUFFIXES, image_suffix
from pipeline.io.image import Image, corner_distance, select_volume
from pipeline.io.itk import from_sitk, read_sitk
from pipeline.types import ImageSource

CODES_AGREE_MM = 0.5  # float32 headers round: corners under sform and qform may differ by this much
GZIP_MAGIC = b"\x1f\x8b"
NIFTI2_BYTES = 540


def read(source: ImageSource, volume: int | None = None) -> Image:
    """Read one channel of a case.

    Args:
        source: a path, a nibabel image or a SimpleITK image.
        volume: which volume of a 4D file, from 0; None accepts files with a single volume only.

    Raises:
        ReadError: the file is missing, truncated, damaged or of an unknown format.
        VolumeError: it holds colours or complex numbers, or is not three-dimensional.
    """
    if isinstance(source, str | Path):
        return _read_file(Path(source), volume)
    if isinstance(source, SpatialImage):
        return _from_nibabel(source, "the nibabel image", volume)
    # by name, because importing SimpleITK only to compare the type would be slow
    if type(source).__module__.startswith("SimpleITK"):
        return from_sitk(source, "the SimpleITK image", volume)
    raise ReadError(
        f"expected a path, a nibabel image or a SimpleITK image, got {type(source).__name__}"
    )


def source_list(sources: ImageSource | list[ImageSource]) -> list[ImageSource]:
    """Return the sources of a case's channels as a list, also where there is only one channel."""
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def _read_file(path: Path, volume: int | None) -> Image:
    suffix = image_suffix(path)
    if not path.is_file():
        raise ReadError(f"{path}: no such file")
    if suffix is None:
        raise ReadError(f"{path}: unknown format; expected a name ending in {', '.join(SUFFIXES)}")
    if suffix in SITK_READERS:
        return from_sitk(read_sitk(path, SITK_READERS[suffix]), str(path), volume)
    try:
        return _from_nibabel(_load_nibabel(path, suffix), str(path), volume)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # nibabel raises errors of many types for damaged headers
        raise ReadError(
            f"{path}: cannot be read: {_reason(error)}; is the file whole? Copy or convert it again"
        ) from error


def _load_nibabel(path: Path, suffix: str) -> SpatialImage:
    if suffix.startswith((".hdr", ".img")):
        return _load_pair(path)
    content = path.read_bytes()
    if not content:
        raise ReadError(f"{path}: the file is empty")
    # by content, because files are found with a wrong .gz suffix, and without one that they need
    if content.startswith(GZIP_MAGIC):
        content = _decompressed(content)
    if suffix in (".mgz", ".mgh"):
        return nib.freesurfer.MGHImage.from_bytes(content)
    # a NIfTI header begins with its own size, in the file's byte order
    sizes = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    image_class = nib.Nifti2Image if NIFTI2_BYTES in sizes else nib.Nifti1Image
    header_class = image_class.header_class
    _check_spacing(header_class(content[: header_class.sizeof_hdr], check=False), path)
    return image_class.from_bytes(content)


def _load_pair(path: Path) -> SpatialImage:
    """Load a pair of .hdr and .img files, named by either of them."""
    image: SpatialImage = nib.load(path)
    for holder in image.file_map.values():
        if holder.filename and Path(holder.filename).name.lower().endswith(".gz"):
            # only for its errors: nibabel stops reading before the checksum
            _decompressed(Path(holder.filename).read_bytes())
    return image


def _decompressed(content: bytes) -> bytes:
    decompressed: bytes = igzip.decompress(content)  # type: ignore[no-untyped-call]
    return decompressed


def _check_spacing(header: Any, path: Path) -> None:
    """Check the spacing as it is stored, because nibabel silently replaces a spacing of 0 by 1."""
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and (spacing == 0).any():
        text = " × ".join(f"{mm:.4g}" for mm in spacing)
        raise VolumeError(
            f"{path}: the spacing is {text} mm, expected above 0; set the file's sform or qform"
        )


def _reason(error: Exception) -> str:
    """Return a short explanation of an error of nibabel or the decompression."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, KeyError):
        return f"its header holds {text}, which the format does not know"
    # the libraries have no error types for these, so that only their messages are left
    too_short = "buffer is smaller" in text or ("Expected" in text and "bytes" in text)
    if isinstance(error, EOFError) or too_short:
        return f"it is truncated ({text})"
    if "CRC" in text or "Incorrect length" in text:
        return f"its checksum is wrong, so its content is damaged ({text})"
    return text


def _from_nibabel(image: SpatialImage, name: str, volume: int | None) -> Image:
    dtype = np.dtype(image.get_data_dtype())
    if dtype.fields:
        raise VolumeError(
            f"{name}: holds colours (RGB), expected one grey value per voxel; "
            "a colour map cannot be segmented"
        )
    if dtype.kind == "c":
        raise VolumeError(
            f"{name}: holds complex numbers, expected magnitudes; save the magnitude image instead"
        )
    array = select_volume(np.asanyarray(image.dataobj), name, volume)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not isinstance(image, nib.Nifti1Image | nib.Nifti1Pair):
        return Image(array=array, affine=affine)
    return Image(
        array=array,
        affine=affine,
        header=image.header.binaryblock,
        warnings=_orientation_warnings(image.header, array.shape),
    )


def _orientation_warnings(header: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return what is doubtful about the two affines of a NIfTI header.

    nibabel uses the sform if its code is set, else the qform, else a default affine.
    """
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        return (
            "neither sform nor qform is set: left and right are a guess "
            "(x taken to run from right to left)",
        )
    if not sform or not qform:
        return ()
    distance = corner_distance(header.get_sform(), header.get_qform(), shape)
    if distance <= CODES_AGREE_MM:
        return ()
    return (
        f"sform (code {sform}) and qform (code {qform}) disagree by up to {distance:.1f} mm: "
        "the sform was used",
    )
