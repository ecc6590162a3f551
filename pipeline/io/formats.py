"""The image formats that are read, by the suffix of the file name."""

from __future__ import annotations

from pathlib import Path

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
# formats that SimpleITK reads, with the name of its reader; nibabel reads all others
SITK_READERS = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}


def image_suffix(path: Path) -> str | None:
    """Return the image suffix of a file name in lower case, or None for any other file.

    The longest suffix counts: `scan.nii.gz` has the suffix `.nii.gz`.
    """
    name = path.name.lower()
    matching = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    return max(matching, key=len, default=None)


def image_stem(path: Path) -> str:
    """Return a file's name without its image suffix; other dots belong to the name."""
    suffix = image_suffix(path) or path.suffix
    return path.name[: len(path.name) - len(suffix)]
