"""NIfTI, Analyze and MGH files: their headers by nibabel, their voxels within limits."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import SpatialImage
from nibabel.volumeutils import apply_read_scaling

from pipeline.errors import ReadError, VolumeError
from pipeline.io.formats import image_suffix, printable
from pipeline.io.image import Header, ImageFile, check_dimensions, select_volume
from pipeline.io.nifti import (
    NIFTI2_BYTES,
    header_of_a_guess,
    in_mm,
    mm_per_unit,
    orientation_warnings,
    sides_are_guessed,
)
from pipeline.io.streams import check_room, read_range, read_start, unreadable
from pipeline.types import Affine, Array

SLACK = 2**16  # bytes after the voxels: some writers fill the last block
MGH_SLACK = 2**24  # FreeSurfer appends parameters, command lines and colour tables
MGH_BYTES, MGH_RAS_FLAG = 90, 28
MAX_MAT_BYTES = 2**16  # of SPM's .mat files, which hold one matrix of 4 × 4 per volume
SCALED_AT_A_TIME = 2**20  # voxels
PAIR_CLASSES = (nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm2AnalyzeImage)


def describe_nibabel_file(path: Path) -> ImageFile:
    """Return the header of a NIfTI, Analyze or MGH file, checked against the size of its data file.

    Raises:
        ReadError: a file is missing, too short or too long.
        VolumeError: it holds colours, complex numbers, fewer than three dimensions or no spacing.
        Exception: of many types, by nibabel, for damaged headers.
    """
    suffix = image_suffix(path) or ""
    if suffix in (".mgh", ".mgz"):
        return _describe_mgh(path)
    if suffix.startswith((".hdr", ".img")):
        return _describe_pair(path)
    content = read_start(path, NIFTI2_BYTES)
    # a NIfTI header begins with its own size, in the file's byte order
    sizes = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    kind = nib.Nifti2Image if NIFTI2_BYTES in sizes else nib.Nifti1Image
    return _describe_nifti(kind, content, (path,), path)


def describe_nibabel_image(image: SpatialImage, name: str) -> ImageFile:
    """Return the header of a nibabel image.

    Raises:
        VolumeError: it holds colours, complex numbers or fewer than three dimensions.
    """
    header = _nibabel_header(image, name)
    return ImageFile(
        header=header,
        files=(),
        bytes_held=header.declared_bytes,
        voxels=lambda number: select_volume(np.asanyarray(image.dataobj), name, number),
    )


def _nibabel_header(image: SpatialImage, name: str) -> Header:
    """Return the header of a nibabel image.

    Raises:
        VolumeError: it holds colours, complex numbers or fewer than three dimensions.
    """
    dtype, shape = np.dtype(image.get_data_dtype()), tuple(int(size) for size in image.shape)
    _check_type(dtype, name)
    check_dimensions(shape, name)
    affine = np.asarray(image.affine, dtype=np.float64)
    nifti, warnings = b"", tuple[str, ...]()
    if isinstance(image, nib.Nifti1Image | nib.Nifti1Pair):
        affine = in_mm(affine, mm_per_unit(image.header))
        nifti = image.header.binaryblock
        warnings = orientation_warnings(image.header, shape)
    elif isinstance(image, nib.AnalyzeImage) and _is_assumed(affine, image.header):
        nifti = header_of_a_guess(affine, shape[:3])
        warnings = (sides_are_guessed("Analyze files store no orientation without a .mat file"),)
    return Header(
        shape=shape[:3],
        volumes=prod(shape[3:]),
        affine=affine,
        bytes_per_voxel=dtype.itemsize,
        warnings=warnings,
        nifti=nifti,
    )


def pair_files(path: Path) -> dict[str, Path]:
    """Return the header, the image and SPM's .mat of a pair, named by either of the first two.

    A file that is missing is looked for with and without .gz.
    """
    named = nib.Spm2AnalyzeImage.filespec_to_file_map(str(path))
    return {role: _compressed_or_not(Path(holder.filename)) for role, holder in named.items()}


def _compressed_or_not(path: Path) -> Path:
    other = path.with_suffix("") if path.suffix.lower() == ".gz" else Path(f"{path}.gz")
    return other if other.is_file() and not path.is_file() else path


def _describe_pair(path: Path) -> ImageFile:
    files = pair_files(path)
    for role in ("header", "image"):
        if not files[role].is_file():
            raise ReadError(
                f"{printable(path)}: cannot be read: its other file {printable(files[role])} is "
                "missing; keep the .hdr and the .img of a pair in one folder"
            )
    content = read_start(files["header"], NIFTI2_BYTES)
    kind = next((x for x in PAIR_CLASSES if x.header_class.may_contain_header(content)), None)
    if kind is None:
        raise unreadable(path, "its header is neither of NIfTI nor of Analyze")
    if kind is nib.Spm2AnalyzeImage:
        return _describe_analyze(content, files, path)
    return _describe_nifti(kind, content, (files["header"], files["image"]), path)


def _describe_nifti(kind: Any, content: bytes, files: tuple[Path, ...], path: Path) -> ImageFile:
    """Return the header of a NIfTI file; the voxels are in the last of `files`."""
    block = _whole(content, kind.header_class.sizeof_hdr, path)
    stored = kind.header_class(block, check=False)
    _check_spacing(stored, path)
    stored.check_fix()
    check_dimensions(tuple(int(size) for size in stored.get_data_shape()), printable(path))
    # as nibabel's images keep it: where and how the voxels were stored is of no further use
    kept = stored.copy()
    kept.set_data_offset(0)
    kept.set_slope_inter(None, None)
    kept["magic"] = kept.single_magic if kept.is_single else kept.pair_magic
    return _image_file(
        stored,
        files,
        path,
        affine=in_mm(stored.get_best_affine(), mm_per_unit(stored)),
        warnings=orientation_warnings(stored, stored.get_data_shape()),
        nifti=kept.binaryblock,
    )


def _describe_analyze(content: bytes, files: dict[str, Path], path: Path) -> ImageFile:
    """Return the header of an Analyze file, with the affine of SPM's .mat where there is one."""
    kind = nib.Spm2AnalyzeImage
    block = _whole(content, kind.header_class.sizeof_hdr, path)
    mat = _mat_content(files["mat"], path)
    holders = {
        "header": FileHolder(fileobj=BytesIO(block)),
        "image": FileHolder(filename=str(files["image"])),
        "mat": FileHolder(fileobj=BytesIO(mat)),
    }
    described = _nibabel_header(kind.from_file_map(holders), printable(path))
    names = (files["header"], *([files["mat"]] if mat else []), files["image"])
    return _image_file(
        kind.header_class(block),
        names,
        path,
        affine=described.affine,
        # with a .mat, the affine is stored even where it is the one that is assumed without
        warnings=() if mat else described.warnings,
        nifti=b"" if mat else described.nifti,
    )


def _mat_content(mat: Path, path: Path) -> bytes:
    if not mat.is_file():
        return b""
    content = read_start(mat, MAX_MAT_BYTES + 1) if mat.stat().st_size else b""
    if len(content) > MAX_MAT_BYTES:
        raise unreadable(path, f"{printable(mat)} has over {MAX_MAT_BYTES} bytes, expected a few")
    return content


def _describe_mgh(path: Path) -> ImageFile:
    block = _whole(read_start(path, MGH_BYTES), MGH_BYTES, path)
    header = MGHHeader(block)
    shape = tuple(int(size) for size in header.get_data_shape())
    nifti, warnings = b"", tuple[str, ...]()
    # from the bytes, because nibabel replaces the flag together with the affine
    if not any(block[MGH_RAS_FLAG : MGH_RAS_FLAG + 2]):
        nifti = header_of_a_guess(header.get_affine(), shape[:3])
        warnings = (sides_are_guessed("no orientation is stored (goodRASFlag is 0)"),)
    return _image_file(
        header,
        (path,),
        path,
        affine=np.asarray(header.get_affine(), dtype=np.float64),
        warnings=warnings,
        nifti=nifti,
    )


def _image_file(
    stored: Any,
    files: tuple[Path, ...],
    path: Path,
    *,
    affine: Affine,
    warnings: tuple[str, ...],
    nifti: bytes,
) -> ImageFile:
    """Return the description of a file whose voxels are in the last of `files`."""
    name, dtype = printable(path), np.dtype(stored.get_data_dtype())
    shape = tuple(int(size) for size in stored.get_data_shape())
    _check_type(dtype, name)
    check_dimensions(shape, name)
    offset = int(stored.get_data_offset())
    if getattr(stored, "is_single", False):
        offset = offset or int(stored.single_vox_offset)  # 0 for "not set"
    if min(*shape, offset) < 0:
        raise unreadable(path, f"its header has shape {shape} and data from byte {offset}")
    end = offset + prod(shape) * dtype.itemsize
    slack = MGH_SLACK if isinstance(stored, MGHHeader) else SLACK
    check_room(files[-1], end, slack)
    voxels = partial(
        _voxels, files[-1], shape[:3], dtype, offset, end, slack, stored.get_slope_inter()
    )
    return ImageFile(
        header=Header(
            shape=shape[:3],
            volumes=prod(shape[3:]),
            affine=affine,
            bytes_per_voxel=dtype.itemsize,
            warnings=warnings,
            file_bytes=sum(file.stat().st_size for file in files),
            nifti=nifti,
        ),
        files=files,
        bytes_held=prod(shape[:3]) * dtype.itemsize,
        voxels=voxels,
    )


def _voxels(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    offset: int,
    end: int,
    slack: int,
    scaling: tuple[float | None, float | None],
    number: int,
) -> Array:
    """Return one volume of a file, (X, Y, Z), scaled."""
    count = prod(shape) * dtype.itemsize
    content = read_range(path, offset + number * count, count, end=end, slack=slack)
    stored: Array = np.ndarray(shape, dtype, buffer=content.data, order="F")
    slope, inter = scaling
    if (slope or 1, inter or 0) == (1, 0):
        return stored
    # piece by piece, because nibabel computes in double precision
    scaled = np.empty(shape, np.float64 if dtype.itemsize >= 8 else np.float32, order="F")
    values, results = stored.reshape(-1, order="F"), scaled.reshape(-1, order="F")
    for start in range(0, len(values), SCALED_AT_A_TIME):
        piece = slice(start, start + SCALED_AT_A_TIME)
        results[piece] = apply_read_scaling(values[piece], slope, inter)
    return scaled


def _whole(content: bytes, count: int, path: Path) -> bytes:
    """Return the first `count` bytes of what was read of a header."""
    if len(content) < count:
        raise unreadable(
            path, f"it is truncated ({len(content)} bytes, its header alone has {count})"
        )
    return content[:count]


def _check_type(dtype: np.dtype[Any], name: str) -> None:
    if dtype.fields:
        raise VolumeError(
            f"{name}: holds colours (RGB), expected one grey value per voxel; "
            "a colour map cannot be segmented"
        )
    if dtype.kind == "c":
        raise VolumeError(
            f"{name}: holds complex numbers, expected magnitudes; save the magnitude image instead"
        )


def _check_spacing(header: Any, path: Path) -> None:
    """Check the spacing as it is stored, because nibabel silently replaces a spacing of 0 by 1."""
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and (spacing == 0).any():
        text = " × ".join(f"{mm:.4g}" for mm in spacing)
        raise VolumeError(
            f"{printable(path)}: the spacing is {text} mm, expected above 0; "
            "set the file's sform or qform"
        )


def _is_assumed(affine: Affine, header: Any) -> bool:
    """Return whether an affine is the one that nibabel assumes for an Analyze header."""
    return bool(np.allclose(affine, header.get_best_affine(), equal_nan=True))
