"""The image formats that are read, by the suffix of the file name, and names fit for messages."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.types import PathOrStr

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
    ".nhdr",
    ".mha",
    ".mhd",
)
# formats that SimpleITK reads, with the name of its reader; nibabel reads all others
SITK_READERS = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}


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


def printable(text: PathOrStr) -> str:
    r"""Return a name as it can be shown and encoded: undecodable bytes as `\xfc`, no line breaks.

    Names of files are bytes. Python holds those that are not UTF-8 as surrogates, which no encoding
    accepts.
    """
    try:
        shown = os.fsencode(text).decode("utf-8", errors="backslashreplace")
    except UnicodeEncodeError:  # other surrogates, which no file name holds, but a manifest may
        shown = os.fspath(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)
