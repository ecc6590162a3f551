"""Finding the cases to segment in files, folders and globs, and naming their outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

import nibabel as nib

from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.io.formats import image_stem, image_suffix
from pipeline.io.reader import source_list
from pipeline.io.writer import DESCRIPTION
from pipeline.types import Case, PathOrStr

CHANNEL_NUMBER = re.compile(r"_(\d{4})$")
RESULT_ENDINGS = ("_seg.nii.gz", "_uncertainty.nii.gz")


def find_cases(inputs: Sequence[PathOrStr], spec: Spec) -> list[Case]:
    """Find the cases in files, folders and globs.

    Folders are searched recursively; label maps that volseg wrote there are skipped. A model of
    several channels takes one file per channel. The end of a file's name, before the suffix, states
    its channel: by name (`sub-01_FLAIR.nii.gz`) or by number (`sub-01_0001.nii.gz`). Where the spec
    has a fallback channel, a file without such an ending belongs to that channel, and its file is
    used for channels without a file.

    Args:
        inputs: paths and glob patterns.
        spec: the channels of the model.

    Returns:
        cases with `case` (the output's relative path without suffix) and `image` (one path, or a
        list with one path per channel), in the order of the inputs, folders sorted by path.

    Raises:
        ConfigError: an input does not exist or holds no image, a channel has no file, or two inputs
            have the same output.
    """
    named_files: dict[tuple[str, Path], None] = {}  # a dict keeps the order and drops repetitions
    for item in inputs:
        named_files.update(dict.fromkeys(_image_files(item)))
    if len(spec.channels) > 1:
        cases = _group_channels(list(named_files), spec.channels, spec.fallback_channel)
    else:
        cases = [{"case": name, "image": str(path)} for name, path in named_files]
    _check_outputs_differ(cases)
    return cases


def is_written_by_volseg(path: Path) -> bool:
    """Return whether volseg wrote a NIfTI file, by the description in its header."""
    try:
        return bool(nib.load(path).header.get("descrip") == DESCRIPTION)
    except Exception:  # nibabel raises errors of many types for damaged files
        return False


def case_name(case: Case) -> str:
    """Return the name for a case without one: its first file's name without the suffix."""
    return image_stem(Path(source_list(case["image"])[0]))


def _image_files(item: PathOrStr) -> Iterator[tuple[str, Path]]:
    """Yield each image file of one input, with the name of its output."""
    path = Path(item)
    if path.is_file():
        yield image_stem(path), _header_file(path)
        return
    if path.is_dir():
        root, found = path, list(path.rglob("*"))
    elif has_magic(str(item)):
        root = _constant_folder(path)
        found = [Path(match) for match in glob(str(item), recursive=True)]
    else:
        raise ConfigError(f"{path}: no such file or folder")
    images = sorted(candidate for candidate in found if _is_input(candidate))
    if not images:
        raise ConfigError(f"{path}: no image files there; expected names such as scan.nii.gz")
    for image in images:
        yield image.relative_to(root).with_name(image_stem(image)).as_posix(), image


def _constant_folder(pattern: Path) -> Path:
    """Return the leading part of a glob pattern that has no wildcards."""
    parts = pattern.parts
    first_wildcard = next(i for i, part in enumerate(parts) if has_magic(part))
    return Path(*parts[:first_wildcard])


def _is_input(path: Path) -> bool:
    """Return whether a file found in a folder is an image to segment."""
    suffix = image_suffix(path)
    # the .img of a pair is read together with its .hdr
    if suffix in (None, ".img", ".img.gz") or path.name.startswith(".") or not path.is_file():
        return False
    # the name is compared first, because opening every file of a large folder is slow
    return not (path.name.endswith(RESULT_ENDINGS) and is_written_by_volseg(path))


def _header_file(path: Path) -> Path:
    """Return the .hdr of a pair that was named by its .img, so that the pair is one input."""
    suffix = image_suffix(path) or ""
    stem = path.name[: len(path.name) - len(suffix)]
    header = path.with_name(stem + suffix.replace("img", "hdr"))
    return header if header.is_file() else path


def _group_channels(
    named_files: Sequence[tuple[str, Path]], channels: Sequence[str], fallback: str | None
) -> list[Case]:
    """Return one case for all files whose names differ in the channel only."""
    files_of: dict[str, dict[str, str]] = {}
    for file_name, path in named_files:
        name, channel = _split_channel(file_name, channels, fallback)
        files = files_of.setdefault(name, {})
        if channel in files:
            raise ConfigError(
                f"{name}: two files for channel {channel}, {files[channel]} and {path}; keep one"
            )
        files[channel] = str(path)
    return [
        {"case": name, "image": _files_in_order(name, files, channels, fallback)}
        for name, files in files_of.items()
    ]


def _files_in_order(
    name: str, files: dict[str, str], channels: Sequence[str], fallback: str | None
) -> list[str]:
    """Return one file per channel; the fallback channel's file where a channel has none."""
    missing = [channel for channel in channels if channel not in files]
    if not missing:
        return [files[channel] for channel in channels]
    if fallback is None or fallback not in files:
        raise ConfigError(
            f"{name}: no file for channel {', '.join(missing)}; found {', '.join(files.values())}"
        )
    return [files.get(channel, files[fallback]) for channel in channels]


def _split_channel(name: str, channels: Sequence[str], fallback: str | None) -> tuple[str, str]:
    """Split a file's name into the name of the case and the channel."""
    for channel in channels:
        if name.endswith(f"_{channel}"):
            return name.removesuffix(f"_{channel}"), channel
    number = CHANNEL_NUMBER.search(name)
    if number and int(number[1]) < len(channels):
        return name[: number.start()], channels[int(number[1])]
    if fallback is not None:
        return name, fallback
    raise ConfigError(
        f"{name}: which channel is it? Expected a name that ends in one of "
        f"_{', _'.join(channels)}, or _0000, _0001, …"
    )


def _check_outputs_differ(cases: Sequence[Case]) -> None:
    images_of: dict[str, list[str]] = {}
    for case in cases:
        images_of.setdefault(case["case"], []).append(str(case["image"]))
    repeated = {name: images for name, images in images_of.items() if len(images) > 1}
    if repeated:
        name, images = next(iter(repeated.items()))
        raise ConfigError(
            f"{len(repeated)} outputs would be written more than once, {name}_seg.nii.gz for one, "
            f"from {' and '.join(images)}: rename the files, or give the folder that holds them all"
        )
