"""Writing label maps as NIfTI files on the input's grid, and any file atomically."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from pipeline.errors import WriteError
from pipeline.io.formats import printable
from pipeline.io.nifti import MAX_NIFTI1_SIZE, NIFTI1_BYTES, SCANNER_CODE
from pipeline.types import Affine, Array, LabelMap

COMPRESSION = 3  # igzip's levels are 0 to 3; 3 makes the smallest files and is still fast
DESCRIPTION = b"volseg label map"  # in the header of every label map that volseg writes
BYTE = 255
CARET_CODE = 30  # NIFTI_ECODE_CARET: an extension that holds XML of Caret and Workbench
# errors of network file systems and overloaded disks that may be gone a moment later
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY}
RETRY_SECONDS = (0.1, 0.5, 2.0)
TEMPORARY_SUFFIX = ".tmp"
T = TypeVar("T")
_NUMBERS = itertools.count()  # of temporary files: several threads of a process write at once


def as_nibabel(
    labels: LabelMap, affine: Affine, header: bytes = b"", label_xml: bytes = b""
) -> nib.Nifti1Image:
    """Return a label map as a NIfTI image.

    Args:
        labels: (X, Y, Z), of an unsigned type; (N, X, Y, Z) masks are stacked along a fourth axis.
        affine: voxel index → RAS+ world, mm; not used where there is a header.
        header: the bytes of the input's NIfTI header. Its qform and sform, their codes and its
            units are kept to the last bit, and the image's affine is in its unit.
        label_xml: names and colours of the labels, from `caret_xml`; they are written between the
            header and the voxels, and change nothing but where the voxels begin.
    """
    if labels.ndim == 4:
        return _stacked(labels, _plain_nibabel(labels[0], affine, header))
    image = _plain_nibabel(labels, affine, header)
    if label_xml:
        image.header["vox_offset"] = 0  # nibabel sets it to where the extension ends
        image.header.extensions.append(nib.nifti1.Nifti1Extension(CARET_CODE, label_xml))
    return image


def _plain_nibabel(labels: LabelMap, affine: Affine, header: bytes) -> nib.Nifti1Image:
    if not header:
        large = max(labels.shape) > MAX_NIFTI1_SIZE
        image = (nib.Nifti2Image if large else nib.Nifti1Image)(labels, affine)
        image.set_sform(affine, code=SCANNER_CODE)
        image.set_qform(affine, code=SCANNER_CODE, strip_shears=True)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = DESCRIPTION
        return image
    image_class = nib.Nifti1Image if len(header) == NIFTI1_BYTES else nib.Nifti2Image
    kept = image_class.header_class(header, check=False)
    zooms = kept.get_zooms()[:3]
    kept.set_data_dtype(labels.dtype)
    kept.set_data_shape(labels.shape)
    kept.set_zooms(zooms)
    kept.set_slope_inter(1, 0)
    kept.set_intent("label", (), "", allow_unknown=True)
    kept["cal_min"] = kept["cal_max"] = 0  # the input's display window fits no labels
    kept["descrip"] = DESCRIPTION
    # the header's own affine, in its own unit, so that nibabel leaves the header as it is
    return image_class(labels, kept.get_best_affine(), kept)


def fractions_as_nibabel(values: Array, affine: Affine, header: bytes = b"") -> nib.Nifti1Image:
    """Return a map of fractions as a NIfTI image with one byte per voxel and a slope of 1/255.

    Args:
        values: (X, Y, Z), 0 to 1.
        affine: see `as_nibabel`.
        header: see `as_nibabel`.
    """
    image = as_nibabel(np.rint(values.clip(0, 1) * BYTE).astype(np.uint8), affine, header)
    image.header.set_slope_inter(1 / BYTE, 0)
    image.header.set_intent("none")
    return image


def probabilities_as_nibabel(
    values: NDArray[np.uint8], affine: Affine, header: bytes = b""
) -> nib.Nifti1Image:
    """Return probabilities as a 4D NIfTI image with one byte per voxel and a slope of 1/255.

    Args:
        values: (N, X, Y, Z) probability of each of N outputs, 255 for 1; the image has them along
            its fourth axis.
        affine: see `as_nibabel`.
        header: see `as_nibabel`.
    """
    image = _stacked(values, as_nibabel(values[0], affine, header))
    image.header.set_slope_inter(1 / BYTE, 0)
    image.header.set_intent("none")
    return image


def _stacked(volumes: NDArray[Any], first: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return (N, X, Y, Z) volumes along the fourth axis of an image like the first one."""
    stacked = np.moveaxis(volumes, 0, -1)
    kept = first.header
    zooms = kept.get_zooms()[:3]
    kept.set_data_shape(stacked.shape)
    kept.set_zooms((*zooms, 1))
    return type(first)(stacked, kept.get_best_affine(), kept)


def write_labels(path: Path, image: nib.Nifti1Image, *, staging: Path | None = None) -> None:
    """Write a label map as .nii.gz, atomically; the same labels give the same bytes.

    Args:
        path: the file.
        image: from `as_nibabel`.
        staging: see `write_atomically`.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    # without a time in the gzip header, so that results can be compared by their hash
    content = igzip.compress(image.to_bytes(), COMPRESSION, mtime=0)
    write_atomically(path, content, staging=staging)


def write_atomically(path: Path, content: bytes, *, staging: Path | None = None) -> None:
    """Write a file completely or not at all, and make its folder.

    The content goes to a temporary file, which is then renamed. Whatever stops the writing, the
    final name holds the old file or none. Errors of a disk that may pass are tried again.

    Args:
        path: the file.
        content: all of it.
        staging: folder of the temporary file, which exists, on the same file system; the file's own
            by default.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    try:
        retry_io(lambda: _write_and_rename(path, content, staging))
    except OSError as error:
        raise WriteError(
            f"{printable(path)}: cannot be written: {error.strerror or error}; "
            "is the disk full or read-only?"
        ) from error


def retry_io(action: Callable[[], T]) -> T:
    """Return the result of an action on files, tried again after errors that may pass.

    Raises:
        OSError: the last one, or the first one that cannot pass.
    """
    for pause in RETRY_SECONDS:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
            time.sleep(pause)
    return action()


def _write_and_rename(path: Path, content: bytes, staging: Path | None) -> None:
    if staging is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent if staging is None else staging
    # short, because the final name may be as long as a name can be; the machine and the process
    # are in it, so that what a dead process left can be told from what a living one writes
    temporary = folder / temporary_name()
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            # before renaming, or a power cut could leave the final name on an empty file
            os.fsync(file.fileno())
        # only now: an output folder that was removed, with its staging, is not made again
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if staging is not None and isinstance(error, OSError) and error.errno == errno.EXDEV:
            _write_and_rename(path, content, None)  # another disk is mounted below the folder
            return
        raise


def temporary_folder(staging: Path | None = None) -> Path:
    """Make a folder for temporary files, and return it.

    Args:
        staging: where it lies, with a name by which a later run removes what a dead process left;
            None for the system's folder for temporary files.
    """
    if staging is None:
        return Path(tempfile.mkdtemp(prefix="volseg-"))
    folder = staging / temporary_name()
    folder.mkdir(mode=0o700, parents=True)
    return folder


def temporary_name() -> str:
    """Return a new file name, by which what is left of a process that was killed is known.

    No two calls return the same one: not in one process, and not on one machine.
    """
    return f".{host_code()}-{os.getpid()}-{next(_NUMBERS)}{TEMPORARY_SUFFIX}"


@cache
def host_code() -> str:
    """Return a short code for this machine's name, fit for file names."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
