"""What is to be segmented: the cases that files, folders and globs hold, and the names of their outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

import nibabel as nib

from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.io.reader import image_stem, image_suffix
from pipeline.io.writer import DESCRIPTION
from pipeline.types import Case, PathOrStr

CHANNEL_NUMBER = re.compile(r"_(\d{4})$")


def find_cases(inputs: Sequence[PathOrStr], spec: Spec) -> list[Case]:
    """The cases that files, folders and globs hold, in order.

    A folder is searched with all below it; label maps that volseg wrote there are passed over. A model of several channels
    takes one file a channel, told apart by an ending before the suffix: the channel's name (`sub-01_FLAIR.nii.gz`) or its
    number (`sub-01_0001.nii.gz`). Where the spec names a channel that stands in for others, that one's file (or a file that
    names no channel) serves for those without one.

    Returns:
        dicts of `case` (the output's name, relative, without suffix) and `image` (a path, or one a channel).

    Raises:
        ConfigError: an input that is not there, nothing to do, a channel without a file, or two inputs with one output.
    """
    files = dict.fromkeys(pair for item in inputs for pair in _files(item))
    cases = [{"case": name, "image": str(path)} for name, path in files]
    if len(spec.channels) > 1:
        cases = _grouped(cases, spec.channels, spec.fallback_channel)
    _refuse_collisions(cases)
    return cases


def _files(item: PathOrStr) -> Iterator[tuple[str, Path]]:
    """Each image file of one input, with the name of its output."""
    path = Path(item)
    if path.is_file():
        yield image_stem(path), _header_of(path)
        return
    if path.is_dir():
        root, found = path, list(path.rglob("*"))
    elif has_magic(str(item)):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if has_magic(part))])
        found = [Path(match) for match in glob(str(item), recursive=True)]
    else:
        raise ConfigError(f"{path}: no such file or folder")
    images = sorted(p for p in found if p.is_file() and _is_image(p))
    if not images:
        raise ConfigError(f"{path}: no image files there; expected names such as scan.nii.gz")
    yield from ((p.relative_to(root).with_name(image_stem(p)).as_posix(), p) for p in images)


def _is_image(path: Path) -> bool:
    """Whether a file found in a folder is an input: the .img of a pair is read with its .hdr, and our results are none."""
    kind = image_suffix(path)
    if kind is None or path.name.startswith(".") or kind in (".img", ".img.gz"):
        return False
    return not (
        path.name.endswith(("_seg.nii.gz", "_uncertainty.nii.gz")) and is_written_by_volseg(path)
    )


def _header_of(path: Path) -> Path:
    """The .hdr of a pair that is named by its .img, so that both are one input."""
    kind = image_suffix(path) or ""
    header = path.with_name(path.name[: len(path.name) - len(kind)] + kind.replace("img", "hdr"))
    return header if header.is_file() else path


def is_written_by_volseg(path: Path) -> bool:
    """Whether volseg wrote a file."""
    try:
        return bool(nib.load(path).header.get("descrip") == DESCRIPTION)
    except Exception:  # a damaged file, of which nibabel says so in many ways
        return False


def case_name(case: Case) -> str:
    """The name of a case that has none of its own: that of its file, without the suffix."""
    image = case["image"]
    return image_stem(Path(image if isinstance(image, str | Path) else image[0]))


def _grouped(cases: Sequence[Case], channels: Sequence[str], stand_in: str | None) -> list[Case]:
    """One case for the files that differ in their channel only; the stand-in's file serves channels that have none."""
    groups: dict[str, dict[str, str]] = {}
    for case in cases:
        name, channel = _channel_of(case["case"], channels, stand_in)
        files = groups.setdefault(name, {})
        if channel in files:
            raise ConfigError(
                f"{name}: two files for channel {channel}, {files[channel]} and {case['image']}; keep one"
            )
        files[channel] = case["image"]
    for name, files in groups.items():
        if stand_in in files:
            groups[name] = files = {
                channel: files.get(channel, files[stand_in]) for channel in channels
            }
        missing = [channel for channel in channels if channel not in files]
        if missing:
            raise ConfigError(
                f"{name}: no file for channel {', '.join(missing)}; found {', '.join(files.values())}"
            )
    return [
        {"case": name, "image": [files[channel] for channel in channels]}
        for name, files in groups.items()
    ]


def _channel_of(name: str, channels: Sequence[str], stand_in: str | None) -> tuple[str, str]:
    for channel in channels:
        if name.endswith(f"_{channel}"):
            return name[: -len(channel) - 1], channel
    number = CHANNEL_NUMBER.search(name)
    if number and int(number[1]) < len(channels):
        return name[: number.start()], channels[int(number[1])]
    if stand_in is not None:
        return name, stand_in
    raise ConfigError(
        f"{name}: which channel is it? Expected a name that ends in one of _{', _'.join(channels)}, or _0000, _0001, …"
    )


def _refuse_collisions(cases: Sequence[Case]) -> None:
    twice = {
        name: count for name, count in Counter(case["case"] for case in cases).items() if count > 1
    }
    if twice:
        name = next(iter(twice))
        clashing = " and ".join(str(case["image"]) for case in cases if case["case"] == name)
        raise ConfigError(
            f"{len(twice)} outputs would be written more than once, {name}_seg.nii.gz for one, from {clashing}: "
            "rename the files, or give the folder that holds them all"
        )
