"""Image files in folders and globs; what cannot be followed is found too, with the reason.

DICOM files are found by their first bytes, all others by the suffix of their name. Links are
followed. Names that begin with a dot are left out, files and folders alike. A folder and
a glob over it find the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

import nibabel as nib

from pipeline.errors import ConfigError
from pipeline.io.dicom_series import is_dicom, is_own_dicom, may_be_dicom
from pipeline.io.formats import image_stem, image_suffix, printable
from pipeline.io.writer import DESCRIPTION
from pipeline.types import PathOrStr

LABELS_ENDING = "_seg.nii.gz"
UNCERTAINTY_ENDING = "_uncertainty.nii.gz"
PROBABILITIES_ENDING = "_probabilities.nii.gz"
# what can be written for a DICOM series besides: segmentations of two kinds, a report of volumes
DICOM_ENDINGS = {"binary": "_seg.dcm", "labelmap": "_labelmap.dcm", "report": "_sr.dcm"}
RESULT_ENDINGS = (
    LABELS_ENDING,
    UNCERTAINTY_ENDING,
    PROBABILITIES_ENDING,
    *DICOM_ENDINGS.values(),
)
# endings of label maps, those of BIDS derivatives included
LABEL_MAP_ENDINGS = (LABELS_ENDING, "_dseg.nii.gz")
# endings of all files that volseg writes, those of BIDS derivatives included
WRITTEN_ENDINGS = (*RESULT_ENDINGS, "_dseg.nii.gz")
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file or folder that was found.

    Attributes:
        path: where it lies.
        problem: why it cannot be used; empty if nothing is known against it.
        dicom: whether it is a DICOM file, one of a series.
    """

    path: Path
    problem: str = ""
    dicom: bool = False


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A found file with the name of its output.

    Attributes:
        name: the output's relative path without suffix.
        path: where the file lies.
        problem: why it cannot be used; empty if nothing is known against it.
        dicom: whether it is a DICOM file, one of a series.
    """

    name: str
    path: Path
    problem: str = ""
    dicom: bool = False


def named_files(item: PathOrStr) -> list[NamedFile]:
    """Return the images of one input: a file, a folder that is searched recursively, or a glob.

    Label maps that volseg wrote are left out of folders and globs.

    Raises:
        ConfigError: a folder or glob without images, or a glob with `..` after a wildcard.
    """
    path = Path(item)
    if path.is_file():
        if _is_dicom(path):
            return [NamedFile(path.name, path, dicom=True)]
        return [NamedFile(image_stem(path), _header_file(path))]
    if path.is_dir():
        return _relative(item, path, walk(path))
    if has_magic(str(item)):
        return _relative(item, *_glob(path))
    problem = _link_problem(path) or "no such file or folder"
    return [NamedFile(image_stem(path), path, problem)]


def walk(
    folder: Path,
    *,
    enter: Callable[[Path], bool] | None = None,
    ancestors: frozenset[Identity] = frozenset(),
) -> Iterator[FoundFile]:
    """Yield the images below a folder, sorted by path, and what could not be searched.

    Args:
        folder: is searched recursively.
        enter: whether a folder below it is searched; all are by default.
        ancestors: the folders that lead here, to end at a link that leads back to one of them.
    """
    try:
        status = folder.stat()
        children = _children(folder)
    except OSError as error:
        yield FoundFile(folder, f"this folder cannot be searched: {error.strerror}")
        return
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        yield FoundFile(folder, "this link leads back to a folder that contains it")
        return
    for child in children:
        if not _is_folder(child):
            yield from _candidate(child)
        elif enter is None or enter(child):
            yield from walk(child, enter=enter, ancestors=ancestors | {identity})


def is_written_by_volseg(path: Path) -> bool:
    """Return whether volseg wrote a file, by the description or the manufacturer in its header."""
    if path.name.endswith(tuple(DICOM_ENDINGS.values())):
        return is_own_dicom(path)
    try:
        return bool(nib.load(path).header.get("descrip") == DESCRIPTION)
    except Exception:  # nibabel raises errors of many types for damaged files
        return False


def is_readable(path: Path) -> bool:
    """Return whether a file begins like an image that nibabel reads, or like DICOM."""
    if is_dicom(path):
        return True
    try:
        nib.load(path)
    except Exception:  # nibabel raises errors of many types for damaged files
        return False
    return True


def _relative(item: PathOrStr, root: Path, found: Iterator[FoundFile]) -> list[NamedFile]:
    """Return files named by their path below a root, each once."""
    files: dict[Path, NamedFile] = {}
    for file in found:
        relative = file.path.relative_to(root)
        stem = image_stem(relative) if image_suffix(relative) else relative.name
        name = relative.with_name(stem).as_posix() if relative.name else file.path.name
        files.setdefault(file.path, NamedFile(name, file.path, file.problem, file.dicom))
    if not files:
        raise ConfigError(
            f"{printable(item)}: no image files there; expected names such as scan.nii.gz, or "
            "DICOM files of any name"
        )
    return list(files.values())


def _children(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted, without hidden names."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _candidate(path: Path) -> Iterator[FoundFile]:
    """Yield a path that is no folder if it is an image to segment, or a link that may lead to one.

    A broken link without a suffix may have led to a folder of images.
    """
    problem = _link_problem(path)
    suffix = image_suffix(path)
    if problem and (suffix or not path.suffix):
        yield FoundFile(path, problem)
    if not problem and path.is_file() and _is_dicom(path):
        if not (path.name.endswith(WRITTEN_ENDINGS) and is_written_by_volseg(path)):
            yield FoundFile(path, dicom=True)
        return
    # the .img of a pair is read together with its .hdr
    if problem or suffix in (None, ".img", ".img.gz"):
        return
    if not path.is_file():
        yield FoundFile(path, "this is neither a file nor a folder")
    # the name is compared first, because opening every file of a large folder is slow
    elif not (path.name.endswith(WRITTEN_ENDINGS) and is_written_by_volseg(path)):
        yield FoundFile(path)


def _is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, by its first bytes; compressed files are not opened."""
    return may_be_dicom(path) and is_dicom(path)


def _link_problem(path: Path) -> str:
    """Return what is wrong with a link; empty for anything else and for a link that leads on."""
    if not path.is_symlink():
        return ""
    try:
        path.stat()
    except OSError as error:
        target = printable(path.readlink())
        return f"this link leads to {target}: {error.strerror} (was the data fetched?)"
    return ""


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # links in a circle
        return False


def _glob(pattern: Path) -> tuple[Path, Iterator[FoundFile]]:
    """Return the part of a pattern without wildcards, and what matches below it."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    if ".." in parts[first:]:
        raise ConfigError(
            f"{printable(pattern)}: `..` after a wildcard; expected it before the first one, "
            "so that each output has its place"
        )
    root, patterns = Path(*parts[:first]), parts[first:]

    def leads_on(folder: Path) -> bool:
        return _begins(folder.relative_to(root).parts, patterns)

    def found() -> Iterator[FoundFile]:
        for file in walk(root, enter=leads_on):
            names = file.path.relative_to(root).parts
            if _fits(names, patterns) or (file.problem and _begins(names, patterns)):
                yield file

    return root, found()


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether a path, or a folder that it lies in, matches a pattern."""
    if not patterns:
        return True
    if patterns[0] == "**":
        return any(_fits(names[start:], patterns[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _begins(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether paths below a folder can match a pattern."""
    if not names or not patterns or patterns[0] == "**":
        return True
    return fnmatchcase(names[0], patterns[0]) and _begins(names[1:], patterns[1:])


def _header_file(path: Path) -> Path:
    """Return the .hdr of a pair that was named by its .img, so that the pair is one input."""
    suffix = image_suffix(path) or ""
    stem = path.name[: len(path.name) - len(suffix)]
    header = path.with_name(stem + suffix.replace("img", "hdr"))
    return header if header.is_file() else path
