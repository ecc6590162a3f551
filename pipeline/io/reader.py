"""A file, or an image in memory, as an array with its affine and all that a later file on the same grid needs.

NIfTI, MGH and Analyze go through nibabel; NRRD and MetaImage through SimpleITK, their LPS world turned to RAS+.
Compressed files are unpacked whole, so that a truncated file or a wrong checksum is an error and not an image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from isal import igzip
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from nibabel.spatialimages import SpatialImage

from pipeline.errors import GeometryError, PipelineError, ReadError, VolumeError
from pipeline.io.grid import header_on_grid, isotropic_grid
from pipeline.types import Affine, Array

if TYPE_CHECKING:
    import SimpleITK as sitk

SUFFIXES = (
    ".nii",
    ".nii.gz",
    ".mgz",
    ".mgh",
    ".hdr",
    ".hdr.gz",
    ".img",
    ".img.gz",
    ".nrrd",
    ".mha",
    ".mhd",
)
SITK_READERS = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
SAME_GRID_MM = 0.01  # corners of two channels may differ by this much
CODES_AGREE_MM = 0.5  # corners under sform and qform may differ by this much: float32 headers round


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One channel, as read.

    Attributes:
        array: (X, Y, Z), scaled by the header's slope and intercept.
        affine: voxel index → RAS+ world, mm.
        header: the NIfTI header's bytes (348 or 540), empty for other formats: what a result on this grid is written with.
        warnings: what was met on reading that a careful user would want to know.
    """

    array: Array
    affine: Affine
    header: bytes = b""
    warnings: tuple[str, ...] = ()


def image_suffix(path: Path) -> str | None:
    """The image suffix that a file name ends with, lower case, the longest first; None for any other file."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def image_stem(path: Path) -> str:
    """A file's name without its image suffix; other dots belong to the name."""
    return path.name[: len(path.name) - len(image_suffix(path) or path.suffix)]


def read(source: Any, volume: int | None = None) -> Image:
    """One channel of a case.

    Args:
        source: a path, a nibabel image or a SimpleITK image.
        volume: which volume of a 4D file, from 0; None accepts one volume only.

    Raises:
        ReadError: missing, truncated, damaged or of an unknown format.
        VolumeError: RGB, complex, or not three-dimensional.
    """
    if isinstance(source, str | Path):
        return _read_path(Path(source), volume)
    if isinstance(source, SpatialImage):
        return _from_nibabel(source, "the nibabel image", volume)
    if type(source).__module__.startswith("SimpleITK"):
        return _from_sitk(source, "the SimpleITK image", volume)
    raise ReadError(
        f"expected a path, a nibabel image or a SimpleITK image, got {type(source).__name__}"
    )


class ReadVolumed(MapTransform):
    """Reads each key's file (or files, one a channel) into a (C, X, Y, Z) MetaTensor.

    Beside MONAI's own keys its `meta` holds the grid that labels go to, `labels_affine` and `labels_shape`, which is the
    file's own, `header` (a NIfTI header's bytes on that grid as uint8, may be empty) and `warnings` (one a line).

    Args:
        keys: of the case; absent ones are allowed, since a case to segment has no label.
        volume: which volume of 4D files, from 0.
        labels_spacing: of the voxels that labels go to, mm, instead of the file's own.
    """

    def __init__(
        self, keys: KeysCollection, volume: int | None = None, labels_spacing: float | None = None
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.volume, self.labels_spacing = volume, labels_spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            case[key] = self.tensor(case[key])
        return case

    def tensor(self, sources: Any) -> MetaTensor:
        """(C, X, Y, Z) float32 of one source, or of several that share one grid."""
        listed = (
            list(sources)
            if isinstance(sources, Sequence) and not isinstance(sources, str)
            else [sources]
        )
        images = [read(source, self.volume) for source in listed]
        for source, image in zip(listed[1:], images[1:], strict=True):
            _check_same_grid(listed[0], images[0], source, image)
        first, lines = images[0], [line for image in images for line in image.warnings]
        if len(listed) > len({str(x) if isinstance(x, str | Path) else id(x) for x in listed}):
            lines.append(
                "one file serves for several channels: what the model says of it is less sure"
            )
        header, affine, shape = first.header, first.affine, first.array.shape
        if self.labels_spacing is not None:
            affine, shape = isotropic_grid(affine, shape, self.labels_spacing)
            header, affine = header_on_grid(header, affine)
        meta = {
            "affine": first.affine,
            "original_affine": first.affine.copy(),
            "labels_affine": affine.copy(),
            "labels_shape": np.array(shape),
            "spatial_shape": np.array(first.array.shape),
            "original_channel_dim": 0,
            "filename_or_obj": str(listed[0]) if isinstance(listed[0], str | Path) else "",
            "sources": [str(source) if isinstance(source, str | Path) else "" for source in listed],
            "space": "RAS",
            "header": np.frombuffer(header, dtype=np.uint8).copy(),
            "warnings": "\n".join(dict.fromkeys(lines)),
        }
        array = np.stack([np.asarray(image.array, dtype=np.float32) for image in images])
        tensor: MetaTensor = MetaTensor.ensure_torch_and_prune_meta(array, meta)
        return tensor


def _read_path(path: Path, volume: int | None) -> Image:
    kind = image_suffix(path)
    if not path.is_file():
        raise ReadError(f"{path}: no such file")
    if kind is None:
        raise ReadError(f"{path}: unknown format; expected a name ending in {', '.join(SUFFIXES)}")
    if kind in SITK_READERS:
        return _from_sitk(_load_sitk(path, SITK_READERS[kind]), str(path), volume)
    try:
        return _from_nibabel(_load_nibabel(path, kind), str(path), volume)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # nibabel meets damaged headers with errors of many kinds
        raise ReadError(
            f"{path}: cannot be read: {_reason(error)}; is the file whole? Copy or convert it again"
        ) from error


def _load_nibabel(path: Path, kind: str) -> SpatialImage:
    if kind.startswith((".hdr", ".img")):
        image: SpatialImage = nib.load(path)
        for part in (
            Path(holder.filename) for holder in image.file_map.values() if holder.filename
        ):
            if part.name.lower().endswith(".gz"):
                _unpacked(part.read_bytes())  # nibabel stops before the checksum
        return image
    content = path.read_bytes()
    if not content:
        raise ReadError(f"{path}: the file is empty")
    if content[:2] == b"\x1f\x8b":
        content = _unpacked(content)
    if kind in (".mgz", ".mgh"):
        return nib.freesurfer.MGHImage.from_bytes(content)
    nifti2 = (
        int.from_bytes(content[:4], "little") == 540 or int.from_bytes(content[:4], "big") == 540
    )
    form = nib.Nifti2Image if nifti2 else nib.Nifti1Image
    _check_spacing(form.header_class(content[: form.header_class.sizeof_hdr], check=False), path)
    return form.from_bytes(content)


def _unpacked(content: bytes) -> bytes:
    unpacked: bytes = igzip.decompress(content)  # type: ignore[no-untyped-call]
    return unpacked


def _check_spacing(header: Any, path: Path) -> None:
    """Looks at the header as stored: nibabel takes a spacing of 0 for 1, and says nothing."""
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and (spacing == 0).any():
        text = " × ".join(f"{mm:.4g}" for mm in spacing)
        raise VolumeError(
            f"{path}: the spacing is {text} mm, expected above 0; set the file's sform or qform"
        )


def _reason(error: Exception) -> str:
    """What went wrong, in words a user knows."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, KeyError):
        return f"its header holds {text}, which the format does not know"
    if (
        isinstance(error, EOFError)
        or "buffer is smaller" in text
        or ("Expected" in text and "bytes" in text)
    ):
        return f"it is truncated ({text})"
    if "CRC" in text or "Incorrect length" in text:
        return f"its checksum is wrong, so its content is damaged ({text})"
    return text


def _from_nibabel(image: SpatialImage, where: str, volume: int | None) -> Image:
    dtype = np.dtype(image.get_data_dtype())
    if dtype.fields:
        raise VolumeError(
            f"{where}: holds colours (RGB), expected one grey value a voxel; a colour map cannot be segmented"
        )
    if dtype.kind == "c":
        raise VolumeError(
            f"{where}: holds complex numbers, expected magnitudes; save the magnitude image instead"
        )
    array = _one_volume(np.asanyarray(image.dataobj), where, volume)
    is_nifti = isinstance(image, nib.Nifti1Image | nib.Nifti1Pair)
    affine = np.asarray(image.affine, dtype=np.float64)
    return Image(
        array=array,
        affine=affine,
        header=image.header.binaryblock if is_nifti else b"",
        warnings=_orientation_warnings(image, array.shape) if is_nifti else (),
    )


def _orientation_warnings(image: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """What a NIfTI header's two affines leave in doubt; nibabel uses the sform, then the qform, then neither."""
    header = image.header
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        return (
            "neither sform nor qform is set: left and right are a guess (x taken to run from right to left)",
        )
    if not sform or not qform:
        return ()
    apart = corner_distance(header.get_sform(), header.get_qform(), shape)
    if apart <= CODES_AGREE_MM:
        return ()
    return (
        f"sform (code {sform}) and qform (code {qform}) disagree by up to {apart:.1f} mm: the sform was used",
    )


def corner_distance(a: Affine, b: Affine, shape: tuple[int, ...]) -> float:
    """The largest distance, mm, between a volume's corners under two affines; inf where one is not finite."""
    corners = np.array(
        [
            [i * (shape[0] - 1), j * (shape[1] - 1), k * (shape[2] - 1), 1]
            for i, j, k in np.ndindex(2, 2, 2)
        ]
    )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm((corners @ (a - b).T)[:, :3], axis=1).max())


def _one_volume(array: Array, where: str, volume: int | None) -> Array:
    spatial, extra = array.shape[:3], array.shape[3:]
    if len(spatial) < 3:
        raise VolumeError(
            f"{where}: has shape {array.shape}, expected three dimensions; a single slice needs a third axis of 1"
        )
    count = int(np.prod(extra)) if extra else 1
    if count == 1 and volume in (None, 0):
        return array.reshape(spatial)
    if volume is None:
        raise VolumeError(
            f"{where}: holds {count} volumes, expected one; pick one with --volume T (0 to {count - 1})"
        )
    if not 0 <= volume < count:
        raise VolumeError(
            f"{where}: --volume {volume} asked for, the file holds volumes 0 to {count - 1}"
        )
    return array.reshape(*spatial, count, order="F")[..., volume]


def _load_sitk(path: Path, reader: str) -> sitk.Image:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return sitk.ReadImage(
            str(path), imageIO=reader
        )  # by name: SimpleITK knows .mha, and not .MHA
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ReadError(
            f"{path}: cannot be read: {reason}; is the file whole? Copy or convert it again"
        ) from error


def _from_sitk(image: sitk.Image, where: str, volume: int | None) -> Image:
    import SimpleITK as sitk

    pixel = image.GetPixelIDTypeAsString()
    if "complex" in pixel:
        raise VolumeError(
            f"{where}: holds complex numbers, expected magnitudes; save the magnitude image instead"
        )
    if image.GetNumberOfComponentsPerPixel() > 1:
        parts = image.GetNumberOfComponentsPerPixel()
        raise VolumeError(
            f"{where}: holds {parts} values a voxel (colours or vectors), expected one grey value"
        )
    dims = image.GetDimension()
    array = _one_volume(
        sitk.GetArrayViewFromImage(image).transpose().copy(order="F"), where, volume
    )
    matrix = (
        np.array(image.GetDirection()).reshape(dims, dims)[:3, :3]
        * np.array(image.GetSpacing())[:3]
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, image.GetOrigin()[:3]
    return Image(array=array, affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _check_same_grid(name: Any, first: Image, other_name: Any, other: Image) -> None:
    if first.array.shape != other.array.shape:
        raise GeometryError(
            f"{other_name} has shape {other.array.shape}, {name} {first.array.shape}: channels must share one grid"
        )
    apart = corner_distance(first.affine, other.affine, first.array.shape)
    if apart > SAME_GRID_MM:
        raise GeometryError(
            f"{other_name} and {name} lie up to {apart:.2f} mm apart: resample the channels to one grid first"
        )
